"""One step of compensator optimisation: the published loop against stillroom's, interleaved in one process.

    python benchmarks/compensator_step.py --out docs/results/benchmark_compensator_step.json

Teachers have random weights and the running statistics of a few passes over images: the work of a step does not depend
on what a teacher knows. Exit code 1 where the two do not agree: gradients of cosine below 0.99, or statistics losses
more than 1 % apart after a whole optimisation.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from measure import (
    CLASSES,
    add_options,
    cosine,
    load_images,
    matmul_peak,
    peak_memory,
    summarize,
    time_interleaved,
    time_steps,
)
from measure import write_results as write
from published import PublishedLoop
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stillroom import augment
from stillroom.compute import ComputeConfig, Plan, build_generator, resolve_plan
from stillroom.data import RealData
from stillroom.methods.infer import InferConfig
from stillroom.methods.recover import Recorder, build_objective, cosine_rate
from stillroom.networks import build_network
from stillroom.train import apply_normalization

NETWORKS = ("resnet18", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2")
VARIANTS = ("bfloat16-compiled", "float32-compiled", "bfloat16-eager", "float32-eager")
LEAST_COSINE, MOST_APART = 0.99, 0.01


def build_teacher(name: str, real: RealData, passes: int = 20) -> nn.Module:
    """Return a network of random weights whose BatchNorms hold the statistics of `passes` batches of images."""
    model = build_network(name, real.classes, real.image_size)
    rows = torch.randperm(len(real.train), generator=build_generator(0, "benchmark"))[: 64 * passes]
    with torch.no_grad():
        for batch in itertools.islice(itertools.cycle(rows.split(64)), passes):
            model.train()(apply_normalization(real.train.batch(batch), real.mean, real.std))
    return model.eval().requires_grad_(False)


def draw_shifts(path: str) -> Callable[[], tuple[int, int]]:
    """Return a function that draws one shift after another, the same ones for the same `path`."""
    counter = itertools.count()
    return lambda: augment.draw_shift(build_generator(0, path, next(counter)), 4)


class OurLoop:
    """The same optimisation as `infer.optimize_compensators` runs it: `plan.pack_slots` slots in one batch."""

    def __init__(self, teacher: nn.Module, images: Tensor, labels: Tensor, plan: Plan, compiled: bool) -> None:
        slots = plan.pack_slots
        config = InferConfig()
        self.plan, self.slots, self.config = plan, slots, config
        self.images, self.labels = images, labels.repeat(slots)
        recorder = Recorder(plan.place(teacher), slots, config.first_layer_weight)
        objective = build_objective(recorder, slots, config.statistics_weight)

        def compute_losses(views: Tensor) -> tuple[Tensor, Tensor]:
            with plan.autocast():
                return objective(views, self.labels)

        self.compute_losses = torch.compile(compute_losses, dynamic=False) if compiled else compute_losses
        self.reset(config.steps)

    def reset(self, steps: int) -> None:
        """Begin an optimisation of `steps` steps from zero."""
        shape = (self.slots, *self.images.shape[1:])
        self.compensators = torch.zeros(shape, device=self.plan.device, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.compensators], 0.25, betas=self.config.betas, fused=True)
        self.taken, self.steps = 0, steps

    def losses(self, shifts: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Return label loss and weighted statistics loss, [slots] both."""
        views = torch.cat(
            [augment.apply_shift(self.images + u, s) for u, s in zip(self.compensators, shifts, strict=True)]
        )
        return self.compute_losses(views.contiguous(memory_format=self.plan.memory_format))

    def step(self, draw_shift: Callable[[], tuple[int, int]]) -> Tensor:
        """Take one step and return the statistics losses [slots], without waiting for the device."""
        self.optimizer.param_groups[0]["lr"] = cosine_rate(0.25, self.taken % self.steps, self.steps)
        label_loss, statistics_loss = self.losses([draw_shift() for _ in range(self.slots)])
        (label_loss + statistics_loss).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.taken += 1
        return statistics_loss.detach()


def build_plan(arguments: argparse.Namespace, variant: str) -> Plan:
    precision, mode = variant.split("-")
    return resolve_plan(
        ComputeConfig(
            device=arguments.device,
            precision=precision,  # type: ignore[arg-type]
            compile="on" if mode == "compiled" else "off",
            threads=arguments.threads,
            pack_slots=arguments.pack_slots,
        ),
        notify=print,
    )


def gradient(loop: PublishedLoop | OurLoop, compensator: Tensor, slots: int | None) -> Tensor:
    label_loss, statistics_loss = loop.losses((1, 2) if slots is None else [(1, 2)] * slots)  # type: ignore[arg-type]
    (found,) = torch.autograd.grad((label_loss + statistics_loss).sum(), compensator)
    return found[0]


def measure_network(name: str, real: RealData, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row for the published loop and one for each variant of ours."""
    teacher = build_teacher(name, real)
    first = torch.stack([(real.train.labels == label).nonzero()[0, 0] for label in range(real.classes)])
    plans = {variant: build_plan(arguments, variant) for variant in arguments.variants}
    plan = next(iter(plans.values()))
    plan.activate()
    images = apply_normalization(real.train.batch(first), real.mean, real.std).to(plan.device)
    labels = torch.arange(real.classes, device=plan.device)
    optimise_steps = max(arguments.optimise_steps, 1)
    published = PublishedLoop(teacher.to(plan.device), images, labels, optimise_steps)
    reference = gradient(published, published.compensator, None)
    with FlopCounterMode(display=False) as counter:
        gradient(published, published.compensator, None)
    gflop = counter.get_total_flops() / 1e9
    ours: dict[str, OurLoop] = {}
    rows: dict[str, dict[str, Any]] = {"published": {"memory_mib": peak_memory(lambda: published.step(lambda: (1, 2)))}}
    for variant, its_plan in plans.items():
        its_plan.activate()
        compiled = its_plan.compile == "on"
        loop = ours[variant] = OurLoop(teacher, images, labels, its_plan, compiled)
        begun = time.perf_counter()
        found = gradient(loop, loop.compensators, loop.slots)
        seconds = time.perf_counter() - begun if compiled else None
        rows[variant] = {"gradient_cosine": cosine(found, reference), "compile_seconds": seconds}
        draw = draw_shifts("memory")
        rows[variant]["memory_mib"] = peak_memory(lambda loop=loop, draw=draw: loop.step(draw))  # type: ignore[misc]

    published = PublishedLoop(teacher, images, labels, optimise_steps)
    draw = draw_shifts("time")
    steps: dict[str, Callable[[], object]] = {"published": lambda: published.step(draw)}
    for variant, loop in ours.items():
        steps[variant] = lambda loop=loop: loop.step(draw)  # type: ignore[misc]
    for step in steps.values():
        time_steps(step, 1)  # the first step of each allocates
    times = time_interleaved(steps, arguments.steps, arguments.repeats)
    final = final_losses(teacher, images, labels, ours, arguments.optimise_steps)

    baseline = statistics.median(times["published"])
    for label, row in rows.items():
        slots = 1 if label == "published" else ours[label].slots
        dtype = torch.float32 if label == "published" else plans[label].dtype
        per_slot = {key: value / slots for key, value in summarize(times[label]).items()}
        milliseconds = per_slot["milliseconds"]
        seconds = row.get("compile_seconds")
        eager = per_slot_median(times, ours, label.replace("-compiled", "-eager"), baseline)
        peak = matmul_peak(plan.device, dtype)
        rows[label] = {
            "network": name,
            "loop": label,
            **per_slot,
            "ratio": baseline / milliseconds,
            "images_per_second": 1000 * len(images) / milliseconds,
            "gflop": gflop,
            "matmul_peak_gflops": peak,
            "share_of_peak": gflop / milliseconds * 1000 / peak,
            "memory_mib": None if row["memory_mib"] is None else row["memory_mib"] / 2**20,
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
    teacher: nn.Module, images: Tensor, labels: Tensor, ours: dict[str, OurLoop], steps: int
) -> dict[str, float]:
    """Return each loop's statistics loss after a whole optimisation of `steps` steps with the same shifts.

    Mean over the last tenth of the steps, since a single step's depends on its shift; the first slot's.
    """
    if steps == 0:
        return {}
    last = max(1, steps // 10)
    published = PublishedLoop(teacher, images, labels, steps)
    draw = draw_shifts("whole")
    losses = [published.step(draw) for _ in range(steps)]
    final = {"published": statistics.mean(losses[-last:])}
    for variant, loop in ours.items():
        loop.reset(steps)
        shifts = [draw_shift() for draw_shift in [draw_shifts("whole")] for _ in range(steps)]
        # every slot is shifted alike, so that each is the published optimisation
        found = [loop.step(lambda shift=shift: shift)[0] for shift in shifts]  # type: ignore[misc]
        final[variant] = statistics.mean(loss.item() for loss in found[-last:])
    return final


def agrees(row: dict[str, Any], loss: float | None, published: float | None) -> bool:
    apart = 0.0 if loss is None or published is None else abs(loss / published - 1)
    return bool(row.get("gradient_cosine", 1.0) >= LEAST_COSINE and apart <= MOST_APART)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--classes", type=int, default=CLASSES, help="images in a batch, where --data is not given")
    parser.add_argument("--optimise-steps", type=int, default=100, help="of the whole optimisation; 0: none")
    parser.add_argument("--pack-slots", type=int, help="slots in a step; default: as runs on this device choose")
    add_options(parser)
    arguments = parser.parse_args()
    torch.compiler.config.force_disable_caches = arguments.cold_compile
    real = load_images(arguments.data, arguments.classes)
    rows: list[dict[str, Any]] = []
    for name in arguments.networks:
        torch.compiler.reset()
        rows += measure_network(name, real, arguments)
    write(arguments.out, build_plan(arguments, arguments.variants[0]), vars(arguments), rows)
    return 0 if all(row["agrees"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
