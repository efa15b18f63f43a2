"""Memory and time of a compensator's step by the number of images: passed in chunks, and whole where that fits.

    python benchmarks/memory.py --out docs/results/benchmark_memory.json

What runs is `recover.Descent` with ImageNet's settings on one slot of generated images, the very step of a
distillation, on teachers as in compensator_step.py, their heads for 1,000 classes. Time is the processor's (on a GPU
the clock's), per step and per image, against the whole step of the fewest images. Exit code 1 where the gradient in
chunks is not the whole step's (cosine below 0.99), or memory grows by more than what each image itself takes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from compensator_step import build_teacher
from measure import CIFAR_MEAN, CIFAR_STD, build_parser, build_plan, cosine, wait_for_device, write_results
from torch import Tensor

from stillroom.compute import Plan, build_generator, peak_memory
from stillroom.data import MemoryImages, RealData
from stillroom.methods.infer import begin_descent, objective_for
from stillroom.methods.recover import Descent
from stillroom.recipes import RECIPES

CLASSES, SIZE = 1000, 224
LEAST_COSINE = 0.99
BYTES_PER_PIXEL = 8  # that may come with each further image: its own 3, the draws of its augmentation, and noise


def generate_images(count: int, size: int) -> RealData:
    """Return `count` images of smooth noise, one each of as many classes, made a few at a time."""
    generator = torch.Generator().manual_seed(0)
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    for rows in torch.arange(count).split(50):
        coarse = torch.randn(len(rows), 3, 8, 8, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")
        images[rows] = ((0.45 + 0.25 * smooth).clamp(0, 1) * 255).to(torch.uint8)
    split = MemoryImages(images, torch.arange(count))
    names = tuple(f"class {index}" for index in range(CLASSES))
    return RealData(
        "generated", names, split, split, CIFAR_MEAN, CIFAR_STD, size, True, 0, images.numel(), images.numel()
    )


def time_step(step: Callable[[], object], device: str) -> float:
    """Return the milliseconds of processor time of one call, on a GPU those of the clock."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    wait_for_device()
    begun = clock()
    step()
    wait_for_device()
    return (clock() - begun) * 1000


def measure_network(name: str, real: RealData, arguments: argparse.Namespace, plan: Plan) -> list[dict[str, Any]]:
    """Return one row for each number of images in chunks, and for each that is passed whole."""
    plan.activate()
    model = plan.place(build_teacher(name, real, passes=2))
    config = replace(RECIPES["infer-imagenet-ipc10"].infer, steps=1000)
    naturals = real.train.batch(torch.arange(max(arguments.images)))[None]

    def begin(images: int, chunk: int) -> Descent:
        own = replace(plan, chunk_images=chunk)
        return begin_descent(naturals[:, :images], real, config, own, objective_for(model, 1, config, own, 1000))

    def gradient(descent: Descent) -> Tensor:
        terms = descent.terms(0, descent.tensor, [build_generator(0, "step")])
        return torch.autograd.grad(sum(terms).sum(), descent.tensor)[0]

    cases = [(images, 0) for images in arguments.whole] + [(images, arguments.chunk) for images in arguments.images]
    steps = {case: begin(*case) for case in cases}

    def take(case: tuple[int, int]) -> object:
        return steps[case].step(1, [build_generator(0, "step")])

    rows = {}
    for images, chunk in cases:
        peak = peak_memory(lambda case=(images, chunk): take(case), plan.device)  # type: ignore[misc]
        mib = None if peak is None else peak / 2**20
        rows[images, chunk] = {"network": name, "images": images, "chunk": chunk, "memory_mib": mib}
    times: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    for _ in range(arguments.repeats):  # in turn, so that what else the machine does slows all alike
        for case in cases:
            times[case].append(time_step(lambda case=case: take(case), plan.device))  # type: ignore[misc]
    base = min(arguments.whole)
    reference = statistics.median(times[base, 0]) / base
    agreement = cosine(gradient(begin(base, arguments.chunk)), gradient(begin(base, 0)))
    for case, row in rows.items():
        row["milliseconds"] = statistics.median(times[case])
        row["milliseconds_per_image"] = row["milliseconds"] / case[0]
        row["ratio_to_whole"] = row["milliseconds_per_image"] / reference
        row["gradient_cosine"] = agreement if case[1] else 1.0
        row["all_milliseconds"] = times[case]
    chunked = [rows[case] for case in cases if case[1]]
    first, last = chunked[0], chunked[-1]
    further = (last["images"] - first["images"]) * real.image_size**2 * BYTES_PER_PIXEL / 2**20
    flat = first["memory_mib"] is None or last["memory_mib"] - first["memory_mib"] <= max(further, 64)
    for row in chunked:
        row["agrees"] = agreement >= LEAST_COSINE and flat
    return list(rows.values())


def main() -> int:
    parser = build_parser(__doc__, ["resnet18"])
    parser.set_defaults(variants=["bfloat16-eager"], repeats=2)
    parser.add_argument("--images", type=int, nargs="+", default=[100, 250, 500, 1000], help="of the steps in chunks")
    parser.add_argument("--whole", type=int, nargs="+", default=[100], help="images of the steps that pass whole")
    parser.add_argument("--chunk", type=int, default=32, help="images that pass at a time")
    parser.add_argument("--size", type=int, default=SIZE, help="side of the images in pixels")
    arguments = parser.parse_args()
    real = generate_images(max(arguments.images + arguments.whole), arguments.size)
    plan, rows = build_plan(arguments, arguments.variants[0]), []
    for variant in arguments.variants:
        for name in arguments.networks:
            found = measure_network(name, real, arguments, build_plan(arguments, variant))
            rows += [{"variant": variant} | row for row in found]
    write_results(arguments.out, plan, vars(arguments), rows)
    return 0 if all(row.get("agrees", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
