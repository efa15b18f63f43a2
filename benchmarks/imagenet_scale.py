"""INFER on 1,000 classes of 224-pixel images from end to end, in how much memory; and the dry run of the whole recipe.

    python benchmarks/imagenet_scale.py --out docs/results/imagenet_scale.json

Images are generated (each class a smooth pattern of its own, in noise; JPEG files as ImageNet's lie) and the teachers
are untrained networks whose heads hold the mean features of each class, which is better than guessing. What runs is
`stillroom run infer-imagenet-ipc50` at a small budget with a few steps: teachers measured, compensators, static labels,
the artifact, a student. Then the dry run of that command, and that of the recipe as it is, with the memory of theirs.
Exit code 1 where a command fails, or the run takes more than --most-gib.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import write_results
from PIL import Image

from stillroom.compute import ComputeConfig, resolve_plan
from stillroom.data import DataConfig, load_real
from stillroom.files import save_tensors
from stillroom.networks import build_network, penultimate_features
from stillroom.train import apply_normalization

LINKED = 51  # training images of a class in the dry run of the whole recipe: names of the same file


def write_images(root: Path, classes: int, per_class: int, side: int) -> None:
    """Write `root`/imagenet/train and val: JPEG files a little larger than `side`, one of each class in val."""

    def write(label: int) -> None:
        draw = np.random.default_rng(label)
        pattern = draw.normal(0, 1, (7, 7, 3))
        for number in range(per_class + 1):
            pixels = 120 + 50 * pattern + 15 * draw.normal(0, 1, pattern.shape)
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            folder = root / "imagenet" / ("train" if number < per_class else "val") / f"n{label:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            image.resize((side + 32, side + 16), Image.Resampling.BICUBIC).save(folder / f"{number}.JPEG", quality=90)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write, range(classes)))


def link_images(root: Path, linked: Path, count: int) -> None:
    """Give every class in `linked` as many training images, all of them names of the first one in `root`."""
    for folder in (root / "imagenet" / "train").iterdir():
        own = linked / "imagenet" / "train" / folder.name
        own.mkdir(parents=True)
        for number in range(count):
            os.link(folder / "0.JPEG", own / f"{number}.JPEG")
    (linked / "imagenet" / "val").symlink_to((root / "imagenet" / "val").resolve())


@torch.no_grad()
def write_teacher(root: Path, network: str) -> None:
    """Write the weights of a network that knows each class by the mean of its features."""
    real = load_real(DataConfig("imagenet", root=str(root), resize="squash", memory_limit_gib=0))
    model = build_network(network, real.classes, real.image_size).eval()
    positions = torch.stack([(real.train.labels == label).nonzero()[0, 0] for label in range(real.classes)])
    norms = [layer for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.train().momentum = None  # the mean of all batches
    for rows in positions[:: len(positions) // 64].split(16):
        model(apply_normalization(real.train.batch(rows), real.mean, real.std))
    model.eval()
    features = torch.cat(
        [
            penultimate_features(model, apply_normalization(real.train.batch(rows), real.mean, real.std))
            for rows in positions.split(16)
        ]
    )
    centered = torch.nn.functional.normalize(features - features.mean(0))
    head = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)][-1]
    head.weight.copy_(20 * centered)
    head.bias.copy_(-20 * centered @ features.mean(0))
    save_tensors(root / f"{network}.safetensors", model.state_dict(), {})


def run_measured(words: list[str]) -> dict[str, Any]:
    """Run `stillroom` with `words` and return what it took: seconds, and its peak of resident memory in GiB."""
    begun, peak = time.monotonic(), 0
    with subprocess.Popen(
        [sys.executable, "-m", "stillroom.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        while process.poll() is None:  # the peak itself, read again and again, since it goes with the process
            peak = max(peak, read_peak(process.pid))
            time.sleep(0.05)
        assert process.stdout is not None
        output = process.stdout.read()
    print(output)
    seconds = time.monotonic() - begun
    return {
        "exit_code": process.returncode,
        "peak_gib": peak / 2**20,
        "seconds": seconds,
        "output": output.splitlines(),
    }


def read_peak(process: int) -> int:
    """Return the largest resident memory of a process so far in KiB; 0 where it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for images and the run; made, and left there")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--per-class", type=int, default=3, help="training images")
    parser.add_argument("--ipc", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--networks", nargs="+", default=["resnet18"], help="teachers")
    parser.add_argument("--chunk", type=int, default=32, help="images of a slot that pass at a time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--most-gib", type=float, default=4.0)
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    root, linked = arguments.folder / "data", arguments.folder / "linked"
    if not linked.exists():
        write_images(root, arguments.classes, arguments.per_class, 224)
        link_images(root, linked, LINKED)
    for network in arguments.networks:
        if not (root / f"{network}.safetensors").exists():
            write_teacher(root, network)
    compute = ["--compute.threads", str(arguments.threads), "--compute.chunk-images", str(arguments.chunk)]
    recipe = ["run", "infer-imagenet-ipc50", "--data.memory-limit-gib", "0", *compute]
    small = [
        *recipe, "--data.root", str(root), "--ipc", str(arguments.ipc), "--infer.steps", str(arguments.steps),
        "--teachers.networks", *arguments.networks,
        "--teachers.checkpoints", *(f"{network}={root / network}.safetensors" for network in arguments.networks),
        "--labels", "static", "--seeds", "0", "--no-controls", "--student.train.epochs", "1",
        "--student.network", arguments.student, "--out", str(arguments.folder / "run"),
    ]  # fmt: skip
    rows = []
    for name, words in (
        ("run", small),
        ("dry run of the same", [*small, "--dry-run"]),
        ("dry run of the recipe", [*recipe, "--data.root", str(linked), "--dry-run"]),
    ):
        hidden = [word.replace(str(arguments.folder), "FOLDER") for word in words]
        rows.append({"what": name, "command": " ".join(["stillroom", *hidden])} | run_measured(words))
        rows[-1]["output"] = [line.replace(str(arguments.folder), "FOLDER") for line in rows[-1]["output"]]
    manifest = json.loads((arguments.folder / "run" / "distilled" / "manifest.json").read_text())
    rows[0]["artifact"] = [f"{role}: {facts['bytes']:,} bytes" for role, facts in manifest["files"].items()]
    plan = resolve_plan(ComputeConfig(threads=arguments.threads, chunk_images=arguments.chunk), print)
    write_results(arguments.out, plan, vars(arguments) | {"folder": "FOLDER"}, rows)
    return int(any(row["exit_code"] for row in rows) or rows[0]["peak_gib"] > arguments.most_gib)


if __name__ == "__main__":
    sys.exit(main())
