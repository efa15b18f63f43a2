"""One step of the recovery of images from noise: the published loops of SRe2L and G-VBSM against stillroom's.

    python benchmarks/recovery_step.py --networks resnet18

At CIFAR size, in one process, interleaved; what runs of ours is the very step of a distillation, on teachers as in
compensator_step.py. SRe2L: one image of each class. G-VBSM: ten images of each of ten classes, one teacher at all
steps, real statistics of the images given. Exit code 1 where the two do not agree: gradients of the pixels of cosine
below 0.99 at the start, or statistics losses more than 1 % apart after a whole optimisation.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from compensator_step import NETWORKS, agrees, build_teacher
from measure import (
    add_optimisation,
    build_parser,
    build_plan,
    cosine,
    describe_times,
    multiply_peak,
    run_steps,
    time_interleaved,
    time_steps,
    use_torch_defaults,
)
from published import Drawn, PublishedGvbsm, PublishedSre2l
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stillroom import augment
from stillroom.compute import Plan, build_generator, peak_memory
from stillroom.data import RealData
from stillroom.methods import gvbsm, sre2l
from stillroom.methods.gvbsm import GvbsmConfig, StatisticsLayout
from stillroom.methods.pixels import class_blocks, slot_blocks
from stillroom.methods.recover import Descent, build_objective
from stillroom.methods.sre2l import Sre2lConfig
from stillroom.run import Run
from stillroom.teachers import Teacher

METHODS = ("sre2l", "gvbsm")
IPC = 10


def settings_of(method: str, steps: int) -> Sre2lConfig | GvbsmConfig:
    return Sre2lConfig(steps=steps) if method == "sre2l" else GvbsmConfig(steps=steps)


def first_block(config: Sre2lConfig | GvbsmConfig, classes: int) -> Tensor:
    if isinstance(config, Sre2lConfig):
        return slot_blocks(1, classes, config.classes_per_batch)[0]
    return class_blocks(IPC, classes, config.images_per_batch)[0]


def draw(
    config: Sre2lConfig | GvbsmConfig, images: int, flip: bool, layout: StatisticsLayout | None, step: int
) -> Drawn:
    """Return what a step of ours draws, for the published loop to do the same."""
    generator = build_generator(0, "step", step)
    if isinstance(config, Sre2lConfig):
        return Drawn(augment.draw_shift(generator, config.shift_limit))
    crop = augment.draw_crops(generator, images, config.crop_padding, per_image=False)[0].tolist()
    flipped = flip and bool(augment.draw_flips(generator, images, per_image=False)[0])
    shift = augment.draw_shift(generator, config.shift_limit)
    assert layout is not None
    return Drawn(shift, crop, flipped, gvbsm.draw_kept(layout, config.drop_rate, generator).bool().tolist())


class OurLoop:
    """`recover.Descent` on `plan.pack_slots` equal blocks, begun anew for every optimisation."""

    def __init__(
        self, method: str, teacher: nn.Module, noise: Tensor, target: Tensor | None, real: RealData, plan: Plan
    ) -> None:
        plan.activate()
        self.method, self.real, self.plan, self.noise, self.slots = method, real, plan, noise, plan.pack_slots
        model = plan.place(copy.deepcopy(teacher))
        config, calls = settings_of(method, 1000), 1000
        if isinstance(config, Sre2lConfig):
            self.compute: Any = build_objective(
                model, self.slots, config.first_layer_weight, config.statistics_weight, plan, calls
            )
        else:
            assert target is not None
            self.compute = gvbsm.build_matching(model, target, self.slots, real.image_size, config, plan, calls)
        self.begin(calls)

    def begin(self, steps: int) -> None:
        """Begin an optimisation of `steps` steps from the same noise."""
        config = settings_of(self.method, steps)
        positions = first_block(config, self.real.classes).expand(self.slots, -1)
        memory: list[Tensor] = []
        if isinstance(config, Sre2lConfig):
            terms = sre2l.build_terms(positions, self.real, config, self.plan, self.compute)
        else:
            terms, memory = gvbsm.build_terms(positions, self.real, config, self.plan, [self.compute])
        start = self.noise.to(self.plan.device).expand(self.slots, *self.noise.shape).clone()
        mean, std = (torch.tensor(v, device=start.device).view(3, 1, 1) for v in (self.real.mean, self.real.std))
        limits = (-mean / std, (1 - mean) / std)
        self.descent = Descent(
            "images", start, terms, steps, config.learning_rate, config.betas, self.plan, limits, memory
        )
        self.steps, self.taken = steps, 0

    def gradient(self) -> Tensor:
        """Return the first block's gradient at the noise, by step 0's draws."""
        terms = self.descent.terms(0, self.descent.tensor, [build_generator(0, "step", 0)] * self.slots)
        (found,) = torch.autograd.grad(sum(terms[1:], terms[0]).sum(), self.descent.tensor)
        self.begin(self.steps)  # G-VBSM's averages have moved
        return found[0]

    def step(self) -> Tensor:
        """Take one step and return the statistics losses [blocks], without waiting for the device."""
        generators = [build_generator(0, "step", self.taken) for _ in range(self.slots)]
        losses = self.descent.step(self.taken % self.steps, generators)
        self.taken += 1
        return losses[1]


def measure(method: str, name: str, real: RealData, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row for the published loop and one for each variant of ours."""
    plans = {variant: build_plan(arguments, variant) for variant in arguments.variants}
    plan = next(iter(plans.values()))
    plan.activate()
    teacher = build_teacher(name, real)
    steps = max(arguments.optimise_steps, 1)
    config = settings_of(method, steps)
    positions = first_block(config, real.classes)
    noise = torch.randn(len(positions), 3, real.image_size, real.image_size, generator=build_generator(0, "noise"))
    labels = (positions % real.classes).to(plan.device)
    target = layout = None
    if isinstance(config, GvbsmConfig):
        known = Teacher(name, teacher, {}, "", "")
        [target] = gvbsm.gather_statistics([known], real, config, 0, build_plan(arguments, "float32-eager"), Run())
        layout = gvbsm.Matcher(teacher, 1, config.patch_side).find_layout(real.image_size)
    draws = functools.partial(draw, config, len(positions), real.flip, layout)
    switches = functools.partial(use_torch_defaults, plan.device, plan.threads)
    switches()

    def begin_published() -> PublishedSre2l | PublishedGvbsm:
        pixels = noise.clone().to(plan.device)
        model = copy.deepcopy(teacher).to(plan.device)
        if isinstance(config, Sre2lConfig):
            return PublishedSre2l(model, pixels, labels, config, real.mean, real.std)
        assert target is not None
        assert layout is not None
        pieces = [piece.to(plan.device) for piece in target.split(layout.lengths)]
        return PublishedGvbsm(model, pixels, labels, config, real.mean, real.std, pieces)

    published = begin_published()
    with FlopCounterMode(display=False) as counter:
        reference = published.gradient(draws(0))
    gflop = counter.get_total_flops() / 1e9
    published = begin_published()
    # All are built before any is compiled: building one forgets what was compiled.
    ours = {variant: OurLoop(method, teacher, noise, target, real, its) for variant, its in plans.items()}
    rows: dict[str, dict[str, Any]] = {
        "published": {"memory": peak_memory(lambda: published.step(draws(0)), plan.device)}
    }
    for variant, loop in ours.items():
        loop.plan.activate()
        begun = time.perf_counter()
        found = loop.gradient()
        seconds = time.perf_counter() - begun if loop.plan.compile == "on" else None
        rows[variant] = {"gradient_cosine": cosine(found, reference), "compile_seconds": seconds}
        rows[variant]["memory"] = peak_memory(loop.step, plan.device)

    work: dict[str, Callable[[], object]] = {"published": lambda: published.step(draws(published.taken))}
    work |= {variant: loop.step for variant, loop in ours.items()}
    before = {"published": switches} | {variant: its.activate for variant, its in plans.items()}
    for label, step in work.items():
        before[label]()
        time_steps(step, 1)  # the first step of each allocates
    times = time_interleaved(work, arguments.steps, arguments.repeats, before)

    final: dict[str, float] = {}
    if arguments.optimise_steps:
        last = max(1, steps // 10)
        switches()
        published = begin_published()
        final["published"] = statistics.mean([published.step(draws(step)) for step in range(steps)][-last:])
        for variant, loop in ours.items():
            loop.plan.activate()
            loop.begin(steps)
            final[variant] = statistics.mean(float(loss) for loss in [loop.step()[0] for _ in range(steps)][-last:])

    baseline = statistics.median(times["published"])
    for label, row in rows.items():
        slots = 1 if label == "published" else ours[label].slots
        dtype = torch.float32 if label == "published" else plans[label].dtype
        before[label]()
        peak = multiply_peak(plan.device, dtype)
        rows[label] = {
            "method": method,
            "network": name,
            "loop": label,
            **describe_times(times[label], baseline, len(positions), gflop, peak, row["memory"], slots),
            "slots": slots,
            "compile_seconds": row.get("compile_seconds"),
            "gradient_cosine": row.get("gradient_cosine", 1.0),
            "final_statistics_loss": final.get(label),
            "agrees": agrees(row, final.get(label), final.get("published")),
            "all_milliseconds": times[label],
        }
    return list(rows.values())


def measure_network(name: str, real: RealData, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    return [row for method in arguments.methods for row in measure(method, name, real, arguments)]


def main() -> int:
    parser = build_parser(__doc__, NETWORKS)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    add_optimisation(parser)
    return run_steps(parser.parse_args(), measure_network)


if __name__ == "__main__":
    sys.exit(main())
