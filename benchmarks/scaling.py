"""What several workers gain: measured here with 1 and 2 on Ray, and simulated up to 64 for a recipe from unit times.

    taskset -c 0,1 python benchmarks/scaling.py --workers 1 2 --out docs/results/benchmark_scaling.json

Measured: the same small run of digits from nothing, by each number of workers in turn, --repeats times, of which the
median counts; the sets must be the same bit for bit. The clock runs from the first event of a worker to the last, so
Ray's own start is beside it, not in it.

Simulated: every unit of the recipe, its seconds by a few timed images of each network on one core of this machine (so
what counts are ratios), handed out as workers take them: in order, to whoever is free, a stage after the one that it
needs. Nothing else is counted: neither reading data, nor compiling, nor what a shared file system takes.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measure import write_results

from stillroom.compute import ComputeConfig, Plan, resolve_plan
from stillroom.labels import views_per_block
from stillroom.methods.infer import slot_count
from stillroom.methods.recover import build_objective
from stillroom.networks import build_network
from stillroom.recipes import Recipe, find_recipe

RUN = [
    "run", "digits", "--teachers.networks", "convnet_thin", "resnet10_thin", "--teachers.epochs", "3",
    "--infer.steps", "60", "--ipc", "10", "--labels", "static", "--no-controls",
    "--student.train.epochs", "10", "--seeds", "0", "1", "2", "3", "--compute.threads", "1", "--compute.compile", "off",
]  # fmt: skip
CLASSES, SIDE, VIEWED = 1000, 224, 8  # images of ImageNet-1k's kind, of which so many are timed


def measure_run(workers: int, folder: Path) -> dict[str, Any]:
    """Return the seconds of one run by so many workers on Ray, and the hashes of the set that they made."""
    out, begun = folder / f"workers-{workers}", time.time()
    words = [*RUN, "--engine", "ray", "--workers", str(workers), "--out", str(out), "--teachers.cache", f"{out}-cache"]
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


def list_units(recipe: Recipe, plan: Plan) -> list[list[float]]:
    """Return the seconds of every unit of an INFER recipe on ImageNet-1k, stage by stage, as one core takes them.

    Its teachers are loaded. Trainings are those of `pipeline.build_cells`: the set, and its controls at equal epochs
    and equal steps; a training's step is counted as a recovery's, which has the same passes.
    """
    slots, teachers = slot_count(recipe.ipc, CLASSES, len(recipe.teachers.networks)), recipe.teachers.networks
    forward = {name: time_image(name, plan, recover=False) for name in teachers}
    both = {name: time_image(name, plan, recover=True) for name in {*teachers, recipe.student.network}}
    compensators = [both[name] * recipe.infer.steps * CLASSES for name in teachers for _ in range(slots)]
    views = {
        "infer": slots * CLASSES * (len(teachers) + recipe.infer.naturals_as_views),
        "random": recipe.ipc * CLASSES,
        "naturals": slots * CLASSES,
    }
    labelling = sum(forward.values())
    stages = [compensators]
    if "static" in recipe.labels:
        for count in views.values():
            block = views_per_block(CLASSES, SIDE)
            whole, rest = divmod(count, block)
            stages.append([labelling * block] * whole + [labelling * rest] * bool(rest))
    trainings: dict[tuple[str, str, int], float] = {}
    for kind in recipe.labels:
        train = recipe.student.train_for(kind)
        seen = {name: train.epochs * count for name, count in views.items()}  # images of a training of as many epochs
        for name, by in (("infer", kind), ("random", "hard"), ("random", kind), ("naturals", kind)):
            for images in {seen[name], seen["infer"]}:
                each = both[recipe.student.network] + labelling * (by == "dynamic")
                trainings[name, by, images] = images * each
    stages.append([seconds for seconds in trainings.values() for _ in recipe.seeds])
    return stages


def simulate(stages: Sequence[Sequence[float]], workers: int) -> float:
    """Return the seconds until all units are done, each taken in order by the worker that is free first."""
    now = 0.0
    for units in stages:
        free = [now] * workers
        for seconds in units:
            heapq.heappush(free, heapq.heappop(free) + seconds)
        now = max(free)
    return now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--recipe", default="infer-imagenet-ipc50")
    parser.add_argument("--simulated", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    found: dict[int, list[dict[str, Any]]] = {workers: [] for workers in arguments.workers}
    for _ in range(arguments.repeats):
        for workers, runs in found.items():
            with tempfile.TemporaryDirectory() as folder:
                runs.append(measure_run(workers, Path(folder)))
    if len({tuple(run["set"]) for runs in found.values() for run in runs}) > 1:
        raise SystemExit("the sets differ by the number of workers")
    rows = [
        sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2] | {"all_seconds": [run["seconds"] for run in runs]}
        for runs in found.values()
    ]
    plan = resolve_plan(ComputeConfig("cpu", compile="off", threads=1))
    plan.activate()
    stages = list_units(find_recipe(arguments.recipe), plan)
    for part, own in (("set and labels", stages[:-1]), ("with students and controls", stages)):
        for workers in arguments.simulated:
            seconds = simulate(own, workers)
            rows.append({
                "kind": f"simulated, {part}",
                "workers": workers,
                "seconds": round(seconds, 1),
                "units": sum(map(len, own)),
            })  # fmt: skip
    first = {}
    for row in rows:
        alone = first.setdefault(row["kind"], row)
        row["speedup"] = round(alone["seconds"] * alone["workers"] / row["seconds"], 2)
        row["efficiency"] = round(row["speedup"] / row["workers"], 3)
    write_results(arguments.out, plan, vars(arguments), rows)


if __name__ == "__main__":
    main()
