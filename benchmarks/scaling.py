"""What several workers gain: measured here with 1 and 2 on Ray, and simulated up to 64 for a recipe from unit times.

    taskset -c 0,1 python benchmarks/scaling.py --workers 1 2 --out docs/results/benchmark_scaling.json

Measured: the same small run of digits from nothing, by each number of workers in turn, --repeats times, of which the
median counts; the sets must be the same bit for bit. On two free cores a repeat takes three to four minutes. The clock
runs from the first event of a worker to the last, so Ray's own start is beside it, not in it.

Simulated: every unit of the recipe, its seconds by a few timed images of each network on one core of this machine (so
what counts are ratios), handed out as workers take them: in order, to whoever is free, a stage after the one that it
needs. Between stages stands what every worker does for itself, and more workers do not shorten: it measures the loaded
teachers, decodes and hashes the naturals, encodes the set, reads it back, and takes the random control. Nothing else is
counted: neither libraries, nor compiling, nor what a shared file system takes.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import write_results
from PIL import Image

from stillroom.compute import ComputeConfig, Plan, resolve_plan
from stillroom.costs import time_images
from stillroom.data import DataConfig, load_real
from stillroom.labels import views_per_block
from stillroom.methods.infer import slot_count
from stillroom.methods.recover import build_objective
from stillroom.networks import build_network
from stillroom.recipes import Recipe, find_recipe

RUN = [
    "run", "digits", "--teachers.networks", "convnet_thin", "resnet10_thin", "--ipc", "10", "--labels", "static",
    "--no-controls", "--seeds", "0", "1", "2", "3", "--compute.threads", "1", "--compute.compile", "off",
]  # fmt: skip
CLASSES, SIDE, VIEWED = 1000, 224, 8  # images of ImageNet-1k's kind, of which so many are timed
TESTED, HEADERS = 50_000, 40_000  # its test images, and the images of both splits whose headers are read at the start
PHOTOGRAPHS, PHOTOGRAPH = 64, (500, 375)  # that are written and timed, and their size: ImageNet's usual one


def measure_run(workers: int, settings: Sequence[str], folder: Path) -> dict[str, Any]:
    """Return the seconds of one run by so many workers on Ray, and the hashes of the set that they made."""
    out, begun = folder / f"workers-{workers}", time.time()
    words = [
        *RUN,
        *settings,
        "--engine",
        "ray",
        "--workers",
        str(workers),
        "--out",
        str(out),
        "--teachers.cache",
        f"{out}-cache",
    ]
    done = subprocess.run([sys.executable, "-m", "stillroom.cli", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    lines = [line for file in (out / "workers").glob("*.jsonl") for line in file.read_text().splitlines()]
    events = [json.loads(line) for line in lines]
    times = [event["time"] for event in events]
    return {
        "kind": "measured",
        "workers": workers,
        "seconds": round(max(times) - min(times), 1),
        "seconds_with_start": round(time.time() - begun, 1),
        "units": sum(event["event"] == "unit_finished" for event in events),
        "load": os.getloadavg()[0],  # of the machine: more than the workers means that others took part of it
        "set": sorted(path.name for path in (out / "distilled").iterdir()),  # files are named by their hashes
    }


def time_image(network: str, plan: Plan, recover: bool) -> float:
    """Return seconds per image: of a recovery's step, forward and backward, or of a forward pass alone."""
    model = plan.place(build_network(network, CLASSES, SIDE)).eval()
    images = torch.randn(VIEWED, 3, SIDE, SIDE, requires_grad=recover).contiguous(memory_format=plan.memory_format)
    labels = torch.arange(VIEWED)[None]
    objective = build_objective(model.requires_grad_(False), 1, 10.0, 1.0, plan, 0) if recover else None
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        if objective is not None:
            pixels = torch.zeros(1, 3, SIDE, SIDE, requires_grad=True)
            torch.stack(objective(pixels, lambda pixels, rows: images.detach()[rows] + pixels, labels)).sum().backward()
        else:
            with torch.no_grad(), plan.autocast():
                model(images)
        seconds.append(time.perf_counter() - begun)
    return min(seconds) / VIEWED


@dataclass(frozen=True)
class ImageSeconds:
    """Seconds of one core for an image: its header, itself as a photograph is decoded and cut; its pixels hashed and
    encoded; and its file decoded."""

    header: float
    read: float
    hash: float
    encode: float
    decode: float


def time_photographs() -> ImageSeconds:
    """Return what images take, by generated photographs: smooth, with some noise."""
    draws = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for index in range(PHOTOGRAPHS):
            coarse = Image.fromarray(draws.integers(0, 256, (12, 16, 3), np.uint8)).resize(PHOTOGRAPH)
            pixels = np.asarray(coarse) + draws.normal(0, 8, (PHOTOGRAPH[1], PHOTOGRAPH[0], 3))
            own = Path(folder) / ("train", "test")[index % 2] / str(index // 2 % 2)
            own.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(own / f"{index}.jpg", quality=95)
        config = DataConfig(folder, image_size=SIDE, resize="crop", memory_limit_gib=0)
        load_real(config)  # looks at all of them, and remembers what it saw
        begun = time.process_time()
        real = load_real(config)
        header = (time.process_time() - begun) / PHOTOGRAPHS
        costs = time_images(real, "jpeg95")
        image = real.train.batch(torch.zeros(1, dtype=torch.int64)).numpy()
    begun = time.process_time()
    for _ in range(PHOTOGRAPHS):
        hashlib.sha256(image.data).digest()
    hashing = (time.process_time() - begun) / PHOTOGRAPHS
    return ImageSeconds(header, costs.train.busy, hashing, costs.encode.busy, costs.decode.busy)


@dataclass(frozen=True)
class Stage:
    """Units that may run side by side, and before them the seconds that every worker spends on its own."""

    before: float
    units: Sequence[float]


def list_stages(recipe: Recipe, plan: Plan, image: ImageSeconds) -> list[Stage]:
    """Return the stages of an INFER recipe on ImageNet-1k, with the seconds that one core takes for each unit.

    Its teachers are loaded, its images stay files that are decoded by the batch. Trainings are those of
    `pipeline.build_cells`: the set, and its controls at equal epochs and equal steps; a training's step is counted as a
    recovery's, which has the same passes.
    """
    slots, teachers = slot_count(recipe.ipc, CLASSES, len(recipe.teachers.networks)), recipe.teachers.networks
    forward = {name: time_image(name, plan, recover=False) for name in teachers}
    both = {name: time_image(name, plan, recover=True) for name in {*teachers, recipe.student.network}}
    naturals, random = slots * CLASSES, recipe.ipc * CLASSES
    views = {
        "infer": naturals * (len(teachers) + recipe.infer.naturals_as_views),
        "random": random,
        "naturals": naturals,
    }
    labelling, fingerprint = sum(forward.values()), image.decode + image.hash
    begin = HEADERS * image.header + sum(TESTED * (image.read + forward[name]) for name in teachers)
    compensators = [CLASSES * (image.read + both[name] * recipe.infer.steps) for name in teachers for _ in range(slots)]
    stages = [Stage(begin + naturals * (image.read + image.hash), compensators)]

    def label(name: str, before: float) -> None:
        whole, rest = divmod(views[name], block := views_per_block(CLASSES, SIDE))
        each = labelling + image.decode
        stages.append(Stage(before, [each * block] * whole + [each * rest] * bool(rest)))

    encoded = naturals * (image.read + image.encode)
    if "static" in recipe.labels:
        label("infer", encoded + naturals * fingerprint)
    else:
        stages.append(Stage(encoded, []))
    stages.append(Stage(0, [naturals * image.hash]))  # one worker saves the set
    # It is read back, and the random control taken beside it.
    beside = naturals * fingerprint + random * (image.read + image.encode + fingerprint)
    if "static" in recipe.labels:
        label("random", beside)
        label("naturals", 0)
        beside = 0
    trainings: dict[tuple[str, str, int], float] = {}
    for kind in recipe.labels:
        train = recipe.student.train_for(kind)
        seen = {name: train.epochs * count for name, count in views.items()}  # images of a training of as many epochs
        for name, by in (("infer", kind), ("random", "hard"), ("random", kind), ("naturals", kind)):
            for images in {seen[name], seen["infer"]}:
                each = both[recipe.student.network] + image.decode + labelling * (by == "dynamic")
                trainings[name, by, images] = images * each
    measured = TESTED * (image.read + time_image(recipe.student.network, plan, recover=False))
    stages.append(Stage(beside, [seconds + measured for seconds in trainings.values() for _ in recipe.seeds]))
    return stages


def simulate(stages: Sequence[Stage], workers: int) -> float:
    """Return the seconds until all units are done, each taken in order by the worker that is free first."""
    now = 0.0
    for stage in stages:
        free = [now + stage.before] * workers
        for seconds in stage.units:
            heapq.heappush(free, heapq.heappop(free) + seconds)
        now = max(free)
    return now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--teacher-epochs", type=int, default=3, help="of the measured run")
    parser.add_argument("--steps", type=int, default=300, help="of each of the measured run's compensators")
    parser.add_argument("--slots", type=int, default=2, help="that are a unit of the measured run")
    parser.add_argument("--student-epochs", type=int, default=40, help="of the measured run")
    parser.add_argument("--recipe", default="infer-imagenet-ipc50")
    parser.add_argument("--simulated", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    settings = ["--teachers.epochs", str(arguments.teacher_epochs), "--infer.steps", str(arguments.steps)]
    settings += ["--compute.pack-slots", str(arguments.slots), "--student.train.epochs", str(arguments.student_epochs)]
    found: dict[int, list[dict[str, Any]]] = {workers: [] for workers in arguments.workers}
    for _ in range(arguments.repeats):
        for workers, runs in found.items():
            with tempfile.TemporaryDirectory() as folder:
                runs.append(measure_run(workers, settings, Path(folder)))
    if len({tuple(run["set"]) for runs in found.values() for run in runs}) > 1:
        raise SystemExit("the sets differ by the number of workers")
    rows = [
        sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2] | {"all_seconds": [run["seconds"] for run in runs]}
        for runs in found.values()
    ]
    plan = resolve_plan(ComputeConfig("cpu", compile="off", threads=1))
    plan.activate()
    image = time_photographs()
    stages = list_stages(find_recipe(arguments.recipe), plan, image)
    for part, own in (("set and labels", stages[:-1]), ("with students and controls", stages)):
        for workers in arguments.simulated:
            seconds = simulate(own, workers)
            rows.append({
                "kind": f"simulated, {part}",
                "workers": workers,
                "seconds": round(seconds, 1),
                "units": sum(len(stage.units) for stage in own),
                "alone": round(sum(stage.before for stage in own), 1),  # seconds that every worker spends for itself
            })  # fmt: skip
    first = {}
    for row in rows:
        alone = first.setdefault(row["kind"], row)
        row["speedup"] = round(alone["seconds"] * alone["workers"] / row["seconds"], 2)
        row["efficiency"] = round(row["speedup"] / row["workers"], 3)
    write_results(arguments.out, plan, vars(arguments), rows)


if __name__ == "__main__":
    main()
