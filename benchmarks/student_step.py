"""One step of a student's training at batch 64: the common way against stillroom's, interleaved in one process.

    python benchmarks/student_step.py --out docs/results/benchmark_student_step.json

Both form a batch of views, crop, flip and mix it, and learn stored soft labels by KL at temperature 30 with AdamW. The
common way: torchvision transforms image by image, float32, channels first, eager, AdamW as it comes.
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

import numpy as np
import torch
from measure import (
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
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from stillroom.compute import Plan, build_generator, peak_memory
from stillroom.data import RealData
from stillroom.distilled import DistilledSet, quantize_compensators
from stillroom.manifest import ViewSettings
from stillroom.methods.select import describe_set, draw_naturals, take_naturals
from stillroom.networks import build_network
from stillroom.students import CIFAR_STUDENT, build_draws, soft_label_loss
from stillroom.teachers import Teacher
from stillroom.train import build_optimizer

NETWORKS = ("resnet18", "resnet10_thin", "convnet")
TEMPERATURE = 30.0

Step = Callable[[], object]


def build_set(real: RealData, slots: int = 2, teachers: int = 4) -> DistilledSet:
    """Return a set of the shape that INFER makes: noise for compensators, noise for static logits."""
    generator = torch.Generator().manual_seed(0)
    images, labels = take_naturals(real, draw_naturals(real, slots, seed=0))
    names = [Teacher(f"t{i}", nn.Identity(), {"top1": 1.0, "top5": 1.0}, f"{i:064x}", "none") for i in range(teachers)]
    noise = 0.1 * torch.randn(teachers, slots, 3, real.image_size, real.image_size, generator=generator)
    stored = quantize_compensators(noise, 16)
    manifest = describe_set("infer", {}, real, slots + 1, 0, names, ViewSettings())
    slot_of = torch.arange(slots).repeat_interleave(real.classes)
    plain = DistilledSet(images, labels, slot_of, stored, None, manifest)
    return plain.with_labels(3 * torch.randn(plain.view_count, real.classes, generator=generator))


def build_common(model: nn.Module, distilled: DistilledSet, batch: int, device: str) -> tuple[Step, nn.Module]:
    """Return the common way's step, and the student that it trains."""
    model = copy.deepcopy(model).to(device).train()
    normalization = distilled.manifest.normalization
    transform = transforms.Compose(
        [
            transforms.RandomCrop(distilled.manifest.image_size, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.Normalize(normalization.mean, normalization.std),
        ]
    )
    assert distilled.soft_labels is not None
    views, logits = distilled.form_views(torch.arange(distilled.view_count)), distilled.soft_labels.float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    chance = np.random.default_rng(0)

    def step() -> float:
        rows = torch.randperm(len(views))[:batch]
        images = torch.stack([transform(views[row]) for row in rows.tolist()]).to(device)
        targets = logits[rows].to(device)
        weight, partners = float(chance.beta(0.8, 0.8)), torch.randperm(batch, device=device)
        images = weight * images + (1 - weight) * images[partners]
        targets = weight * targets + (1 - weight) * targets[partners]
        optimizer.zero_grad()
        loss = nn.functional.kl_div(
            nn.functional.log_softmax(model(images) / TEMPERATURE, dim=1),
            nn.functional.softmax(targets / TEMPERATURE, dim=1),
            reduction="batchmean",
        )
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, model


def build_ours(
    model: nn.Module, distilled: DistilledSet, batch: int, plan: Plan
) -> tuple[Step, Callable[[Tensor, Tensor], Tensor], nn.Module]:
    """Return the step that `train.fit` takes on the draws of `evaluate`, its loss function, and the student."""
    model = plan.place(copy.deepcopy(model)).train()
    draw_batch = build_draws(distilled, CIFAR_STUDENT, [], plan)
    optimizer = build_optimizer(model, CIFAR_STUDENT)

    def compute_loss(images: Tensor, targets: Tensor) -> Tensor:
        with plan.autocast():
            logits = model(images)
        return soft_label_loss(logits.float(), targets, TEMPERATURE)

    compute_loss = plan.compiled(compute_loss, True)
    count = itertools.count()

    def step() -> Tensor:
        generator = build_generator(0, "student", next(count))
        rows = torch.randperm(distilled.view_count, generator=generator)[:batch]
        images, targets = draw_batch(rows, generator)
        loss = compute_loss(images.contiguous(memory_format=plan.memory_format), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step, compute_loss, model


def flat_gradient(loss: Tensor, model: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def measure_network(name: str, real: RealData, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row for the common way and one for each variant of ours."""
    distilled, batch = build_set(real), arguments.batch
    student = build_network(name, real.classes, real.image_size)
    plans = {variant: build_plan(arguments, variant) for variant in arguments.variants}
    plan = next(iter(plans.values()))
    plan.activate()
    common, reference_model = build_common(student, distilled, batch, plan.device)
    images = distilled.form_views(torch.arange(batch)).to(plan.device) * 4 - 2
    assert distilled.soft_labels is not None
    targets = distilled.soft_labels[:batch].float().to(plan.device)
    with FlopCounterMode(display=False) as counter:
        loss = soft_label_loss(reference_model(images), targets, TEMPERATURE)
        reference = flat_gradient(loss, reference_model)
    gflop = counter.get_total_flops() / 1e9
    steps: dict[str, Step] = {"common": common}
    facts: dict[str, dict[str, Any]] = {"common": {}}
    for variant, its_plan in plans.items():
        its_plan.activate()
        step, compute_loss, model = build_ours(student, distilled, batch, its_plan)
        begun = time.perf_counter()
        loss = compute_loss(images.contiguous(memory_format=its_plan.memory_format), targets)
        found = flat_gradient(loss, model)
        seconds = time.perf_counter() - begun if its_plan.compile == "on" else None
        facts[variant] = {"gradient_cosine": cosine(found, reference), "compile_seconds": seconds}
        steps[variant] = step
    defaults = functools.partial(use_torch_defaults, plan.device, plan.threads)
    before = {"common": defaults} | {variant: its_plan.activate for variant, its_plan in plans.items()}
    for label, step in steps.items():
        before[label]()
        time_steps(step, 1)  # the optimiser's state comes with the first step
        facts[label]["memory"] = peak_memory(step, plan.device)
    times = time_interleaved(steps, arguments.steps, arguments.repeats, before)
    baseline = statistics.median(times["common"])
    rows = []
    for label, its_times in times.items():
        before[label]()
        peak = multiply_peak(plan.device, torch.float32 if label == "common" else plans[label].dtype)
        described = describe_times(its_times, baseline, batch, gflop, peak, facts[label]["memory"])
        milliseconds = described["milliseconds"]
        eager = statistics.median(times.get(label.replace("-compiled", "-eager"), times["common"]))
        seconds = facts[label].get("compile_seconds")
        rows.append(
            {
                "network": name,
                "loop": label,
                **described,
                "compile_seconds": seconds,
                # against the same precision run eagerly; None: it never pays
                "pays_after_steps": seconds * 1000 / (eager - milliseconds)
                if seconds is not None and eager > milliseconds
                else None,
                "gradient_cosine": facts[label].get("gradient_cosine", 1.0),
                "all_milliseconds": its_times,
            }
        )
    return rows


def main() -> int:
    parser = build_parser(__doc__, NETWORKS)
    parser.add_argument("--batch", type=int, default=64)
    return run_steps(parser.parse_args(), measure_network)


if __name__ == "__main__":
    sys.exit(main())
