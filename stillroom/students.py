"""Students (evaluate): networks trained on a distilled set alone, measured on the real test split (Algorithm 2).

The accuracy reported is that of the last epoch, its mean and standard deviation over seeds; the best epoch stands
beside it and is never chosen by.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillroom import augment
from stillroom.artifact import StoredImages
from stillroom.compute import Plan, derive_seed
from stillroom.data import RealData
from stillroom.distilled import DistilledSet
from stillroom.errors import StillroomError, check_choices
from stillroom.files import sha256_bytes
from stillroom.labels import dynamic_label_bytes, ensemble_logits
from stillroom.networks import build_network
from stillroom.replay import STUDENT_DRAWS, build_batches, replayed_epochs
from stillroom.run import Run, Task
from stillroom.teachers import Teacher
from stillroom.train import Epochs, TrainConfig, fit, measure_accuracy

# Table 5, CIFAR: AdamW 1e-3, decay 0.01, cosine per epoch, batch 64, crop + flip + mixup.
CIFAR_STUDENT = TrainConfig(
    epochs=400, batch_size=64, optimizer="adamw", learning_rate=1e-3, weight_decay=0.01, mixup_beta=0.8
)


@dataclass(frozen=True)
class StudentConfig:
    """How a student is trained on a distilled set; the defaults are CIFAR's row of Table 5."""

    network: str = "resnet18"
    train: TrainConfig = field(default_factory=lambda: CIFAR_STUDENT)
    # Epochs with dynamic or replayed labels: a fifth, as Table 5 has for CIFAR (M + 1 views per natural).
    dynamic_epochs: int = 80
    temperature: float = 30.0  # of the softened distributions
    measure_every_epochs: int = 0  # accuracy for the curve; 0: after training only
    loss: Literal["kl", "mse_hard"] = "kl"  # with soft labels; mse_hard: G-VBSM's, see `mse_hard_loss`
    hard_weight: float = 0.1  # of the hard label in mse_hard: G-VBSM's gamma
    learned_rate: bool = False  # the learning rate that a set's method learned, where it did, not train.learning_rate

    def __post_init__(self) -> None:
        check_choices(self, "student")
        if not self.temperature > 0:
            raise StillroomError(f"student.temperature is {self.temperature}; give a positive number such as 30")
        if self.dynamic_epochs < 1:
            raise StillroomError(f"student.dynamic_epochs is {self.dynamic_epochs}; give 1 or more")
        if not self.hard_weight >= 0:
            raise StillroomError(f"student.hard_weight is {self.hard_weight}; give 0 or more")

    def train_for(self, labels: str) -> TrainConfig:
        """The training settings for a kind of label."""
        return replace(self.train, epochs=self.dynamic_epochs) if labels in ("dynamic", "replayed") else self.train


@dataclass(frozen=True)
class Evaluation:
    """What students reached: accuracies are shares in [0, 1], one per seed, of the last epoch."""

    network: str
    labels: str
    steps: int
    top1: tuple[float, ...]
    top5: tuple[float, ...]
    best: tuple[float, ...]  # the highest top-1 among the measured epochs
    seconds: tuple[float, ...]
    label_bytes: int  # stored labels; for dynamic ones, what storing them would take

    @property
    def mean(self) -> float:
        return statistics.mean(self.top1)

    @property
    def std(self) -> float:
        """Standard deviation over seeds (of the sample, n - 1); 0 for one seed."""
        return statistics.stdev(self.top1) if len(self.top1) > 1 else 0.0

    def __str__(self) -> str:
        return f"{self.network}, {self.labels} labels: {self.mean:.1%} ± {self.std:.1%} over {len(self.top1)} seeds"


def name_students(cell: str, network: str) -> str:
    """Return what the units of a cell's students are called, less their seeds."""
    return f"student-{cell}-{network.replace(':', '-')}"


def soft_label_loss(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Return KL(softmax(targets / T) || softmax(logits / T)), mean over the batch (Algorithm 2).

    logits, targets: float32 [batch, classes]. Without the factor T^2, as in the published scripts.
    """
    return nn.functional.kl_div(
        nn.functional.log_softmax(logits / temperature, dim=1),
        nn.functional.log_softmax(targets / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )


def mse_hard_loss(logits: Tensor, targets: Tensor, hard_weight: float) -> Tensor:
    """Return MSE(logits, soft label) + gamma CE(logits, hard label), G-VBSM's matching loss ("MSE + gamma GT").

    logits: float32 [batch, classes]. targets: float32 [batch, 2, classes], the teachers' logits and the class
    probabilities. The squares are averaged over batch and classes, as in the published scripts.
    """
    soft, hard = targets.unbind(1)
    return nn.functional.mse_loss(logits, soft) + hard_weight * nn.functional.cross_entropy(logits, hard)


def hard_label_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy with `targets`, class probabilities [batch, classes]: one-hot rows, perhaps mixed."""
    return nn.functional.cross_entropy(logits, targets)


def choose_loss(config: StudentConfig, kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss for a kind of label: (logits, targets as `build_draws` makes them) -> scalar."""
    if kind == "hard":
        return hard_label_loss
    if config.loss == "kl":
        return functools.partial(soft_label_loss, temperature=config.temperature)
    return functools.partial(mse_hard_loss, hard_weight=config.hard_weight)


def check_matches(distilled: DistilledSet, real: RealData, held_out: bool = False) -> None:
    """Raise StillroomError where the set's classes, their order, image size, resize rule or flip are not the data's.

    A set of images that were not resized (or whose manifest is older than that fact) matches every rule: none changes
    an image that has its size. held_out: whether the test split is a part of the training images. Then the set must be
    made of this very training split, or it could hold what it is tested on.
    """
    names = distilled.manifest.class_names
    if names != real.class_names:
        if sorted(names) == sorted(real.class_names):
            first = next(i for i, (a, b) in enumerate(zip(names, real.class_names, strict=True)) if a != b)
            raise StillroomError(
                f"the distilled set's classes stand in another order than those of {real.name!r}: label {first} is "
                f"{names[first]!r} in the set and {real.class_names[first]!r} in the data; every accuracy would "
                "be wrong. Load the data that the set was made of, with the same source and layout"
            )
        raise StillroomError(
            f"the distilled set has {len(names)} classes ({', '.join(names[:3])}, ...), {real.name!r} has "
            f"{real.classes} ({', '.join(real.class_names[:3])}, ...); evaluate it on the dataset it was made of "
            f"({distilled.manifest.dataset.name})"
        )
    if distilled.manifest.image_size != (real.image_size, real.image_size):
        raise StillroomError(
            f"the distilled set has images of {distilled.manifest.image_size} px, {real.name!r} of {real.image_size} "
            f"px; give --data.image-size {distilled.manifest.image_size[0]}"
        )
    resize = distilled.manifest.dataset.resize
    if resize not in ("refuse", real.resize):
        raise StillroomError(
            f"the distilled set was made of images resized by {resize!r}, but {real.name!r} was read by "
            f"{real.resize!r}; give --data.resize {resize}"
        )
    if distilled.manifest.dataset.flip != real.flip:
        flip = "on" if distilled.manifest.dataset.flip else "off"
        raise StillroomError(
            f"whether a mirrored image keeps its class is {flip!r} in the distilled set, but not in {real.name!r}, so "
            f"that its controls would be augmented otherwise; give --data.flip {flip}"
        )
    if held_out and distilled.manifest.dataset.fingerprint != real.fingerprint:
        raise StillroomError(
            f"the distilled set was made of other training images than these of {real.name!r}, so that it may hold "
            "images that are held out for the test; give the same --data settings as for the set, or leave "
            "--data.holdout-per-class out"
        )


def steps_for(distilled: DistilledSet, train: TrainConfig) -> int:
    """Return the optimiser steps in which a student sees as many views as `train.epochs` epochs have.

    Counted in views, not in passes: a pass leaves out an incomplete batch, which is a third of a control of 100 images.
    """
    return max(1, round(train.epochs * distilled.view_count / min(train.batch_size, distilled.view_count)))


def evaluate(
    distilled: DistilledSet,
    real: RealData,
    config: StudentConfig,
    seeds: tuple[int, ...],
    plan: Plan,
    run: Run,
    *,
    teachers: list[Teacher] | None = None,
    total_steps: int | None = None,
    cell: str = "student",
) -> Evaluation:
    """Train one student per seed on `distilled` and measure each on the real test split.

    The labels are the set's kind; "dynamic" needs `teachers`. `total_steps` overrides the epochs (for controls at equal
    optimiser steps). A unit of work is one student; `cell` names them in the run. Raises StillroomError where set and
    data do not belong together, a finished student had another set or other labels, or a loss is not finite,
    TimeLimitReached where the run is to stop.
    """
    check_matches(distilled, real)
    if not seeds:
        raise StillroomError("seeds is empty; give at least one, such as 0 1 2")
    kind = distilled.manifest.label_kind
    train = config.train_for(kind)
    if config.learned_rate and distilled.manifest.learning_rate is not None:
        train = replace(train, learning_rate=distilled.manifest.learning_rate)
    if kind == "replayed":
        replayed_epochs(distilled, train)  # refused before anything is trained
    steps = total_steps or steps_for(distilled, train)
    made_by = sha256_bytes(f"{distilled.fingerprint} {hash_labels(distilled, teachers or [])}".encode())

    def training(seed: int) -> Task:
        unit = f"{name_students(cell, config.network)}-{seed}"

        def make() -> tuple[dict[str, Any], None]:
            _, history = train_student(
                distilled, real, config, train, steps, seed, teachers or [], plan, run, unit, made_by=made_by
            )
            best = max(row["top1"] for row in history if "top1" in row)
            last = {k: history[-1][k] for k in ("top1", "top5", "seconds")}
            return {**last, "best": best, "history": history, "made_by": made_by}, None

        def fits(result: dict[str, Any]) -> bool:
            if result.get("made_by", made_by) != made_by:  # those of before there was a hash have none
                raise StillroomError(
                    f"the finished student {unit!r} was trained on another set, or labelled by other teachers' "
                    "weights; give another directory with --out"
                )
            return True

        return Task(unit, make, fits)

    results = [result for result, _ in run.carry_out([training(seed) for seed in seeds])]
    stored = 0 if distilled.soft_labels is None else distilled.soft_labels.nbytes
    if distilled.pool is not None:
        stored = distilled.pool.raw_bytes
    batch = min(train.batch_size, distilled.view_count)
    return Evaluation(
        network=config.network,
        labels=kind,
        steps=steps,
        top1=tuple(r["top1"] for r in results),
        top5=tuple(r["top5"] for r in results),
        best=tuple(r["best"] for r in results),
        seconds=tuple(r["seconds"] for r in results),
        label_bytes=dynamic_label_bytes(batch, steps, real.classes) if kind == "dynamic" else stored,
    )


def hash_labels(distilled: DistilledSet, teachers: list[Teacher]) -> str:
    """Return a SHA-256 of what students of `distilled` will learn from beside its classes; "" for hard labels."""
    if distilled.soft_labels is not None:
        return sha256_bytes([distilled.soft_labels.contiguous().cpu().numpy().data])
    if distilled.manifest.pool is not None:
        return sha256_bytes(json.dumps(asdict(distilled.manifest.pool)).encode())
    if distilled.manifest.label_kind == "hard":
        return ""
    return sha256_bytes(json.dumps([(teacher.hash, teacher.equal_norms) for teacher in teachers]).encode())


def train_student(
    distilled: DistilledSet,
    real: RealData,
    config: StudentConfig,
    train: TrainConfig,
    steps: int,
    seed: int,
    teachers: list[Teacher],
    plan: Plan,
    run: Run,
    unit: str,
    *,
    made_by: str = "",
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train one student (Algorithm 2) and return the network, in eval mode, and its history, the last row of which has
    "top1", "top5" and "seconds".

    `made_by`: a hash of set and labels, without which an unfinished `unit` is not gone on with.
    """
    normalization = distilled.manifest.normalization
    model = build_network(
        config.network, real.classes, real.image_size, seed=derive_seed(seed, "student", config.network)
    )
    kind = distilled.manifest.label_kind
    epochs = Epochs(distilled.view_count, train.batch_size, seed, STUDENT_DRAWS)
    if kind == "replayed":  # the pool's draws; students of other seeds differ in their initialisation
        epochs = replayed_epochs(distilled, train)
    with_hard = kind != "hard" and config.loss == "mse_hard"
    draw_batch = build_draws(distilled, train, teachers, plan, with_hard=with_hard)
    history = fit(
        model,
        train,
        epochs,
        draw_batch,
        choose_loss(config, kind),
        plan,
        run,
        run.checkpoint(unit, made_by),
        label=unit,
        total_steps=steps,
        measure=lambda m: measure_accuracy(m, real.test, normalization.mean, normalization.std, plan),
        measure_every_epochs=config.measure_every_epochs,
        ahead=isinstance(distilled.images, StoredImages),
    )
    return model.eval(), history


def build_draws(
    distilled: DistilledSet, train: TrainConfig, teachers: list[Teacher], plan: Plan, with_hard: bool = False
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the function that makes a training batch of views: formed, cropped, flipped, mixed, and labelled.

    Targets are logits [batch, classes] (static, learned: of the stored rows, mixed like the images, which Equation 5
    allows; dynamic: of the teachers on the mixed images; replayed: of the teachers then, stored by epoch and step), or
    class probabilities for hard labels. `with_hard` puts the hard labels beside the logits, [batch, 2, classes]: those
    of the images before mixing, as in G-VBSM's scripts.
    """
    kind = distilled.manifest.label_kind
    form_batch = build_batches(distilled, train, plan.device)
    here = distilled.to(plan.device)
    label_dynamically = ensemble_logits(teachers, plan) if kind == "dynamic" else None
    steps = replayed_epochs(distilled, train).steps if kind == "replayed" else 0
    classes = len(distilled.manifest.class_names)
    label_of = here.labels[here.view_table()[:, 0]]  # [views]

    def hard(rows: Tensor) -> Tensor:
        return nn.functional.one_hot(label_of[rows], classes).float()

    def stored(rows: Tensor) -> Tensor:
        return hard(rows) if here.soft_labels is None else here.soft_labels[rows].float()

    def draw_batch(rows: Tensor, generator: torch.Generator, drawn_step: int = 0) -> tuple[Tensor, Tensor]:
        images, mixing = form_batch(rows, generator)
        rows = rows.to(plan.device, non_blocking=True)
        if label_dynamically is not None:
            targets = label_dynamically(images)
        elif distilled.pool is not None:
            targets = distilled.pool.decode(*divmod(drawn_step, steps), device=plan.device)
        else:  # CutMix too: its weight is the share of the image that is truly kept
            targets = stored(rows) if mixing is None else augment.apply_mixup(stored(rows), mixing)
        return images, torch.stack([targets, hard(rows)], dim=1) if with_hard else targets

    return draw_batch
