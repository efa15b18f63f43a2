"""One step of compensator optimisation: the published loop against stillroom's, interleaved in one process.

    python benchmarks/compensator_step.py --out docs/results/benchmark_compensator_step.json

What runs is `recover.Descent`, the very step of a distillation. Teachers have random weights and the running statistics
of a few passes over images: the work of a step does not depend on what a teacher knows. Exit code 1 where the two do
not agree: gradients of cosine below 0.99 at the start, or statistics losses more than 1 % apart after a whole
optimisation.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
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
from published import PublishedLoop
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stillroom import augment
from stillroom.compute import Plan, build_generator, peak_memory
from stillroom.data import RealData
from stillroom.methods.infer import InferConfig, begin_descent, objective_for
from stillroom.networks import build_network
from stillroom.train import apply_normalization

NETWORKS = ("resnet18", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2")
LEAST_COSINE, MOST_APART = 0.99, 0.01


def build_teacher(name: str, real: RealData, passes: int = 20) -> nn.Module:
    """Return a network of random weights whose BatchNorms hold the statistics of `passes` batches of images."""
    model = build_network(name, real.classes, real.image_size)
    rows = torch.randperm(len(real.train), generator=build_generator(0, "benchmark"))[: 64 * passes]
    with torch.no_grad():
        for batch in itertools.islice(itertools.cycle(rows.split(64)), passes):
            model.train()(apply_normalization(real.train.batch(batch), real.mean, real.std))
    return model.eval().requires_grad_(False)


def draws(path: str) -> Callable[[], torch.Generator]:
    """Return a function that gives one generator after another, the same ones for the same `path`."""
    counter = itertools.count()
    return lambda: build_generator(0, path, next(counter))


def draw_shift(generator: torch.Generator) -> tuple[int, int]:
    return augment.draw_shift(generator, InferConfig().shift_limit)


class OurLoop:
    """`recover.Descent` on `plan.pack_slots` slots of the same images, begun anew for every optimisation."""

    def __init__(self, teacher: nn.Module, naturals: Tensor, real: RealData, plan: Plan) -> None:
        self.plan, self.slots, self.real = plan, plan.pack_slots, real
        self.naturals = naturals.expand(self.slots, *naturals.shape)
        plan.activate()
        model = plan.place(copy.deepcopy(teacher))
        self.objective = objective_for(model, self.slots, InferConfig(), plan, InferConfig().steps)
        self.begin(InferConfig().steps)

    def begin(self, steps: int) -> None:
        """Begin an optimisation of `steps` steps from zero."""
        self.config, self.taken = InferConfig(steps=steps), 0
        self.descent = begin_descent(self.naturals, self.real, self.config, self.plan, self.objective)

    def step(self, generators: list[torch.Generator]) -> Tensor:
        """Take one step and return the statistics losses [slots], without waiting for the device."""
        losses = self.descent.step(self.taken % self.config.steps, generators)
        self.taken += 1
        return losses[1]


def first_gradient(losses: tuple[Tensor, ...], compensators: Tensor) -> Tensor:
    (found,) = torch.autograd.grad((losses[0] + losses[1]).sum(), compensators)
    return found[0]


def measure_network(name: str, real: RealData, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row for the published loop and one for each variant of ours."""
    plans = {variant: build_plan(arguments, variant) for variant in arguments.variants}
    plan = next(iter(plans.values()))
    plan.activate()
    teacher = build_teacher(name, real)
    first = torch.stack([(real.train.labels == label).nonzero()[0, 0] for label in range(real.classes)])
    naturals = real.train.batch(first)
    images = apply_normalization(naturals, real.mean, real.std).to(plan.device)
    labels = torch.arange(real.classes, device=plan.device)
    optimise_steps = max(arguments.optimise_steps, 1)

    def one() -> torch.Generator:
        return build_generator(0, "one")

    baseline_switches = functools.partial(use_torch_defaults, plan.device, plan.threads)
    baseline_switches()
    published = PublishedLoop(teacher.to(plan.device), images, labels, optimise_steps)
    reference = first_gradient(published.losses(draw_shift(one())), published.compensator)
    with FlopCounterMode(display=False) as counter:
        first_gradient(published.losses(draw_shift(one())), published.compensator)
    gflop = counter.get_total_flops() / 1e9
    # All are built before any is compiled: building one forgets what was compiled.
    ours = {variant: OurLoop(teacher, naturals, real, its_plan) for variant, its_plan in plans.items()}
    rows: dict[str, dict[str, Any]] = {
        "published": {"memory": peak_memory(lambda: published.step(lambda: draw_shift(one())), plan.device)}
    }
    for variant, loop in ours.items():
        loop.plan.activate()
        generators = [one() for _ in range(loop.slots)]
        begun = time.perf_counter()
        found = first_gradient(loop.descent.terms(0, loop.descent.tensor, generators), loop.descent.tensor)
        seconds = time.perf_counter() - begun if loop.plan.compile == "on" else None
        rows[variant] = {"gradient_cosine": cosine(found, reference), "compile_seconds": seconds}
        rows[variant]["memory"] = peak_memory(lambda loop=loop, drawn=generators: loop.step(drawn), plan.device)  # type: ignore[misc]

    published = PublishedLoop(teacher, images, labels, optimise_steps)
    draw = draws("time")
    steps: dict[str, Callable[[], object]] = {"published": lambda: published.step(lambda: draw_shift(draw()))}
    for variant, loop in ours.items():
        steps[variant] = lambda loop=loop: loop.step([draw() for _ in range(loop.slots)])  # type: ignore[misc]
    switches = {"published": baseline_switches} | {label: its_plan.activate for label, its_plan in plans.items()}
    for label, step in steps.items():
        switches[label]()
        time_steps(step, 1)  # the first step of each allocates
    times = time_interleaved(steps, arguments.steps, arguments.repeats, switches)
    final = final_losses(teacher, images, labels, ours, baseline_switches, arguments.optimise_steps)

    baseline = statistics.median(times["published"])
    for label, row in rows.items():
        slots = 1 if label == "published" else ours[label].slots
        dtype = torch.float32 if label == "published" else plans[label].dtype
        seconds = row.get("compile_seconds")
        eager = per_slot_median(times, ours, label.replace("-compiled", "-eager"), baseline)
        switches[label]()
        peak = multiply_peak(plan.device, dtype)
        described = describe_times(times[label], baseline, len(images), gflop, peak, row["memory"], slots)
        milliseconds = described["milliseconds"]
        rows[label] = {
            "network": name,
            "loop": label,
            **described,
            "slots": slots,
            "compile_seconds": seconds,
            # against the same precision run eagerly; None: it never pays
            "pays_after_steps": seconds * 1000 / (eager - milliseconds) / slots
            if seconds is not None and eager > milliseconds
            else None,
            "gradient_cosine": row.get("gradient_cosine", 1.0),
            "final_statistics_loss": final.get(label),
            "agrees": agrees(row, final.get(label), final.get("published")),
            "all_milliseconds": times[label],
        }
    return list(rows.values())


def per_slot_median(times: dict[str, list[float]], ours: dict[str, OurLoop], variant: str, otherwise: float) -> float:
    return statistics.median(times[variant]) / ours[variant].slots if variant in ours else otherwise


def final_losses(
    teacher: nn.Module,
    images: Tensor,
    labels: Tensor,
    ours: dict[str, OurLoop],
    baseline_switches: Callable[[], None],
    steps: int,
) -> dict[str, float]:
    """Return each loop's statistics loss after a whole optimisation of `steps` steps with the same shifts.

    Mean over the last tenth of the steps, since a single step's depends on its shift; the first slot's.
    """
    if steps == 0:
        return {}
    last = max(1, steps // 10)
    baseline_switches()
    published, draw = PublishedLoop(teacher, images, labels, steps), draws("whole")
    losses = [published.step(lambda: draw_shift(draw())) for _ in range(steps)]
    final = {"published": statistics.mean(losses[-last:])}
    for variant, loop in ours.items():
        loop.plan.activate()
        loop.begin(steps)
        # every slot is shifted alike, so that each is the published optimisation
        found = [loop.step([build_generator(0, "whole", step) for _ in range(loop.slots)])[0] for step in range(steps)]
        final[variant] = statistics.mean(loss.item() for loss in found[-last:])
    return final


def agrees(row: dict[str, Any], loss: float | None, published: float | None) -> bool:
    apart = 0.0 if loss is None or published is None else abs(loss / published - 1)
    return bool(row.get("gradient_cosine", 1.0) >= LEAST_COSINE and apart <= MOST_APART)


def main() -> int:
    parser = build_parser(__doc__, NETWORKS)
    add_optimisation(parser)
    return run_steps(parser.parse_args(), measure_network)


if __name__ == "__main__":
    sys.exit(main())
