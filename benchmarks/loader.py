"""Views per second of a set of 224-pixel images that is not held decoded, against what a student consumes.

    python benchmarks/loader.py --out docs/results/benchmark_loader.json

Of a set of INFER's shape (images, one compensator per teacher and slot): views formed of its own files, as students get
them; views decoded from the published layout, where each of the M + 1 views of an image is a JPEG file; and what a
student's step consumes. Then a set of --stored images is saved, loaded and read in a process of its own, whose memory
is compared with the bytes of its files, compensators and labels (a hundred images are repeated, which the folder's own
compression finds). And images of a parquet file of --rows, read in a random order, as teachers are trained. Times are
the processor's (parquet's: the clock's), so what else the machine does does not count. Exit code 1 where a student
consumes more views than are formed in that time, or where reading a set takes more memory than these and --working-mib,
in which a batch is decoded and formed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from measure import build_parser, build_plan, wait_for_device, write_results
from memory import generate_images
from PIL import Image
from student_step import build_set
from torch import Tensor, nn

from stillroom import artifact
from stillroom.artifact import to_pixels
from stillroom.compute import Plan, map_in_threads
from stillroom.distilled import JPEG_QUALITY, DistilledSet
from stillroom.networks import build_network
from stillroom.readers import read_parquet
from stillroom.recipes import RECIPES
from stillroom.students import build_draws, soft_label_loss
from stillroom.train import build_optimizer

WORKING_MIB = 192  # for a batch of 64 views of 224 px in float32 on its way, and what the parser of the folder holds

READ = """
import sys, torch
from stillroom import artifact
from stillroom.distilled import load_distilled
artifact.HELD_BYTES = 0
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
load_distilled(sys.argv[1] + "/small").form_views(torch.arange(8))
before = peak()
large = load_distilled(sys.argv[1] + "/large")
for rows in torch.randperm(large.view_count).split(64)[:20]:
    large.form_views(rows)
    large.soft_labels[rows].float()
print([before, peak()])
"""


def per_second(work: Callable[[], object], views: int, repeats: int, device: str) -> float:
    """Return how many views the fastest of `repeats` calls works off in a second of processor time (GPU: the clock's).

    The fastest, since what else the processor does only ever slows it.
    """
    clock, seconds = time.process_time if device == "cpu" else time.perf_counter, []
    for _ in range(repeats):
        wait_for_device()
        begun = clock()
        work()
        wait_for_device()
        seconds.append(clock() - begun)
    return views / min(seconds)


def as_published(distilled: DistilledSet, rows: Tensor) -> list[bytes]:
    """Return views as the published scripts store them, a JPEG file each."""
    files = []
    for view in distilled.form_views(rows):
        buffer = io.BytesIO()
        pixels = to_pixels((view * 255).to(torch.uint8))
        Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
        files.append(buffer.getvalue())
    return files


def read_published(files: Sequence[bytes], side: int) -> Tensor:
    """Return float32 views [batch, 3, side, side] in [0, 1] of published files."""
    return torch.stack(
        map_in_threads(lambda file: artifact.decode_picture(file, "jpeg75", (side, side)).float() / 255, files)
    )


def student_step(network: str, distilled: DistilledSet, rows: Tensor, plan: Plan) -> Callable[[], object]:
    """Return a student's step on views that are there already: forward, backward, optimiser."""
    train = RECIPES["infer-imagenet-ipc50"].student.train
    model = plan.place(build_network(network, len(distilled.manifest.class_names), distilled.manifest.image_size[0]))
    optimizer = build_optimizer(model.train(), train)
    draw_batch = build_draws(distilled, train, [], plan)
    images, targets = draw_batch(rows, torch.Generator().manual_seed(0))
    images = images.contiguous(memory_format=plan.memory_format)

    def step() -> None:
        with plan.autocast():
            logits = model(images)
        soft_label_loss(logits.float(), targets, 30.0).backward()
        optimizer.step()
        nn.Module.zero_grad(model)

    return step


def measure_memory(distilled: DistilledSet, stored: int) -> dict[str, Any]:
    """Return how much memory the reading of a set of `stored` images takes, and how many bytes it has."""
    count, views = len(distilled.images), 1 + len(distilled.manifest.teachers)
    with tempfile.TemporaryDirectory() as folder:
        for name, images in (("small", count), ("large", stored)):
            rows = torch.arange(images) % count
            files = [distilled.image_files[row] for row in rows.tolist()]  # type: ignore[index]
            logits = torch.randn(images, len(distilled.manifest.class_names)).half().repeat(views, 1)
            replace(
                distilled,
                images=artifact.decode_files(files, distilled.manifest.image_encoding, distilled.manifest.image_size),
                labels=distilled.labels[rows],
                slots=distilled.slots[rows],
                image_files=tuple(files),
                soft_labels=logits,
            ).save(Path(folder) / name)
        size = sum(map(len, files)) + logits.nbytes + distilled.compensators.raw_bytes  # type: ignore[union-attr]
        done = subprocess.run([sys.executable, "-c", READ, folder], capture_output=True, text=True, check=True)
    before, peak = json.loads(done.stdout)
    return {
        "stored_images": stored,
        "decoded_mib": stored * distilled.images.shape[1:].numel() / 2**20,
        "artifact_mib": size / 2**20,
        "memory_before_mib": before / 2**20,
        "memory_mib": (peak - before) / 2**20,
    }


def measure_parquet(files: Sequence[bytes], group: int) -> dict[str, float]:
    """Return how many images a second are read from parquet in a random order, 64 at a time: by its row groups, the
    smallest pieces that parquet can read, and as our reader does, which unpacks what it reads again."""
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, {"STILLROOM_CACHE": folder}):
        table = pa.table({"image": pa.array(files, pa.binary()), "label": [k % 2 for k in range(len(files))]})
        pq.write_table(table, Path(folder) / "train.parquet", row_group_size=group)
        rates = {}
        for name, passes in (("by_groups", 1), ("first_pass", 1), ("later_pass", 2)):
            images = read_parquet(Path(folder), with_test=False).train.images
            if name == "by_groups":
                images._unpacked._most = 0
            for number in range(passes):
                order = np.random.default_rng(number).permutation(len(files))
                begun = time.perf_counter()
                for rows in np.array_split(order, -(-len(files) // 64)):
                    images.fetch(rows)
                rates[f"parquet_{name}_per_second"] = len(files) / (time.perf_counter() - begun)
    return rates


def main() -> int:
    parser: argparse.ArgumentParser = build_parser(__doc__, ["resnet18"])
    parser.set_defaults(variants=["bfloat16-eager"], repeats=3, classes=100)
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--stored", type=int, default=10000, help="images of the set whose memory is measured")
    parser.add_argument(
        "--rows", type=int, default=4000, help="images of a parquet file that is read in a random order"
    )
    parser.add_argument("--working-mib", type=float, default=WORKING_MIB, help="memory allowed beside the set's parts")
    arguments = parser.parse_args()
    artifact.HELD_BYTES = 0
    plan = build_plan(arguments, arguments.variants[0])
    plan.activate()
    real = generate_images(arguments.classes, arguments.size)
    real = replace(real, class_names=real.class_names[: arguments.classes])
    distilled = build_set(real, slots=1).with_image_encoding("jpeg95")
    distilled = distilled.with_labels(torch.randn(distilled.view_count, real.classes))
    rows = torch.randperm(distilled.view_count, generator=torch.Generator().manual_seed(0))[: arguments.batch]
    files, here = as_published(distilled, rows), distilled.to(plan.device)
    form = lambda: here.form_views(rows)  # noqa: E731
    published = lambda: read_published(files, arguments.size).to(plan.device)  # noqa: E731
    formed, decoded = (per_second(work, len(rows), arguments.repeats, plan.device) for work in (form, published))
    memory, results = measure_memory(distilled, arguments.stored), []
    encoded = [distilled.image_files[row % len(distilled.images)] for row in range(arguments.rows)]  # type: ignore[index]
    read = measure_parquet([file + bytes([row % 256]) for row, file in enumerate(encoded)], group=100)
    for network in arguments.networks:
        step = student_step(network, distilled, rows, plan)
        step()
        consumed = per_second(step, len(rows), arguments.repeats, plan.device)
        results.append(
            {
                "network": network,
                "formed_per_second": formed,
                "published_per_second": decoded,
                "student_per_second": consumed,
                "ahead_of_student": formed / consumed,
                "ahead_of_published": formed / decoded,
                **memory,
                **read,
                "agrees": formed >= consumed and memory["memory_mib"] <= memory["artifact_mib"] + arguments.working_mib,
            }
        )
    write_results(arguments.out, plan, vars(arguments), results)
    return 0 if all(row["agrees"] for row in results) else 1


if __name__ == "__main__":
    sys.exit(main())
