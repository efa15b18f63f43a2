"""Continual learning: classes come a few at a time, and all that is kept of earlier ones is a small distilled set.

    python examples/continual_learning.py --image-size 16                 # digits, two classes at a time
    python examples/continual_learning.py --data cifar100 --classes-per-task 10 --steps 500 --ipc 20

One network goes on from task to task; each batch is half of the task's real images and half of the memory's views. Soft
labels know the classes of their own task alone. Compared, in as many steps, are memories of as many images per class:
none, random images with hard labels, with the teacher's soft labels, and a method's set. Printed is the accuracy over
all classes after the last task: what a method gains over random images is its row less the one above it.

Few classes are dear for INFER, whose compensators only they share: two and one teacher leave six of ten images a class.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

import stillroom
from stillroom.networks import build_network

NETWORK, HALF, TEMPERATURE = "convnet_thin", 32, 4.0  # half of a batch; of the soft labels


def cut_task(real, classes: list[int], folder: Path):
    """The real data of some classes alone, by way of an .npz file, as any other data of one's own would come."""
    arrays = {"class_names": np.array([real.class_names[index] for index in classes])}
    for split, images in (("train", real.train), ("test", real.test)):
        rows = torch.isin(images.labels, torch.tensor(classes)).nonzero().flatten()
        arrays[f"{split}_images"] = images.batch(rows).permute(0, 2, 3, 1).numpy()
        arrays[f"{split}_labels"] = images.labels[rows].numpy() - classes[0]
    path = folder / f"classes{classes[0]}.npz"
    np.savez(path, **arrays)
    return stillroom.load_real(str(path), flip="on" if real.flip else "off")


def remember(task, kind: str, teachers, classes: list[int], total: int, args) -> tuple[torch.Tensor, torch.Tensor]:
    """The task's memory: views float32 [n, 3, height, width] in [0, 1], labels float32 [n, total], probabilities."""
    method = "random" if kind.startswith("random") else kind
    steps = {"steps": args.distill_steps} if method in ("infer", "sre2l", "cda", "gvbsm") else {}
    labels = "hard" if kind == "random, hard" else "static"
    distilled = stillroom.distill(method, task, teachers, args.ipc, labels=labels, **steps)
    views = distilled.views(normalize=False, temperature=TEMPERATURE)
    images, known = (torch.stack(part) for part in zip(*(views[i] for i in range(len(views))), strict=True))
    return images, torch.zeros(len(known), total).index_copy(1, torch.tensor(classes), known.float())


def learn(real, tasks, memories, seed: int, args) -> float:
    """Train one network through the tasks; memories: for each task what is kept of it, or None. Returns top-1."""
    model = build_network(NETWORK, total := real.classes, real.image_size, seed)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    draw = torch.Generator().manual_seed(seed)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    for task, (classes, data) in enumerate(tasks):
        model.train()
        old = tuple(torch.cat(part) for part in zip(*kept, strict=True)) if kept else None
        for _ in range(args.steps):
            rows = torch.randint(len(data.train), (HALF,), generator=draw)
            images = data.train.batch(rows).float() / 255
            target = torch.zeros(len(rows), total)
            target[torch.arange(len(rows)), data.train.labels[rows] + classes[0]] = 1
            if old is not None:
                rows = torch.randint(len(old[0]), (HALF,), generator=draw)
                images, target = torch.cat([images, old[0][rows]]), torch.cat([target, old[1][rows]])
            optimizer.zero_grad()
            cross_entropy(model(images * 2 - 1), target).backward()
            optimizer.step()
        if memories is not None:
            kept.append(memories[task])
    model.eval()
    with torch.no_grad():
        rows = torch.arange(len(real.test)).split(256)
        right = [model(real.test.batch(r).float() / 127.5 - 1).argmax(1) == real.test.labels[r] for r in rows]
    return torch.cat(right).float().mean().item()


def main(words: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Print the table and return each memory's accuracies, a seed each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--method", default="infer")
    parser.add_argument("--image-size", type=int)
    numbers = {"classes-per-task": 2, "ipc": 10, "distill-steps": 40, "teacher-epochs": 10, "steps": 60, "seeds": 3}
    for name, value in numbers.items():  # steps: of the network, a task
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args(words)

    size = {} if args.image_size is None else {"image_size": args.image_size, "resize": "squash"}
    real = stillroom.load_real(args.data, **size)
    labels, each = list(range(real.classes)), args.classes_per_task
    order = [labels[i : i + each] for i in range(0, real.classes, each)]
    memories: dict[str, list | None] = {"none": None, "random, hard": [], "random, soft": [], args.method: []}
    with tempfile.TemporaryDirectory() as folder:
        tasks = [(classes, cut_task(real, classes, Path(folder))) for classes in order]
        for classes, task in tasks:
            teachers = stillroom.load_teachers(task, [NETWORK], recipe="fast", epochs=args.teacher_epochs)
            for kind, kept in memories.items():
                if kept is not None:
                    kept.append(remember(task, kind, teachers, classes, real.classes, args))
        reached = {k: [learn(real, tasks, m, seed, args) for seed in range(args.seeds)] for k, m in memories.items()}
    print(f"{len(order)} tasks of {each} classes, {args.ipc} images per class kept, {args.steps} steps a task")
    for kind, top1 in reached.items():
        spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
        print(f"memory {kind:14s} {statistics.mean(top1):.1%} ± {spread:.1%} over {len(top1)} seeds")
    gain = [a - b for a, b in zip(reached[args.method], reached["random, soft"], strict=True)]
    print(f"gain of {args.method} over random images with soft labels, by seed:", ", ".join(f"{x:+.1%}" for x in gain))
    return reached


if __name__ == "__main__":
    main()
