"""Labels (relabel): hard, static soft (Equation 6, stored once per view), dynamic soft (for every augmented batch).

Replayed labels are dynamic ones stored for a few epochs; see replay.py. Learned labels are a method's own: kept here,
never made.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stillroom.compute import SEED_SCHEME, Plan
from stillroom.distilled import DistilledSet
from stillroom.errors import StillroomError, check_choices
from stillroom.logits import StoredLogits, count_logit_bytes, encode_logits, stack_logits
from stillroom.manifest import LabelEncoding, PoolFacts
from stillroom.replay import STUDENT_DRAWS, batch_settings, build_batches, fingerprint_draws
from stillroom.run import Run, Task
from stillroom.teachers import Teacher
from stillroom.train import Epochs, TrainConfig, apply_normalization, fit_batch

LABEL_BATCH = 256  # views of up to 64 px that pass at once
LABEL_BYTES = 2  # float16 per class
BLOCK_BYTES = 2**25  # of static labels that are a unit of work


@dataclass(frozen=True)
class PoolConfig:
    """Replayed labels: of how many epochs, how stored, and from which seed their batches are drawn."""

    epochs: int = 4  # stored; a training of more epochs takes them in turn
    encoding: LabelEncoding = (
        "float16"  # 2 bytes a class; uint8: 1, and 4 a row; top8: the 8 largest and the others' mean
    )
    seed: int = 0  # of order, crops, flips and mixing, for students of every seed

    def __post_init__(self) -> None:
        check_choices(self, "pool")
        if self.epochs < 1:
            raise StillroomError(f"pool.epochs is {self.epochs}; give 1 or more")


def ensemble_logits(teachers: list[Teacher], plan: Plan) -> Callable[[Tensor], Tensor]:
    """Return the teachers' mean logits (Equation 6) as a function.

    images float32 [batch, 3, height, width], normalised, on the plan's device -> float32 [batch, classes]. Logits z_i
    of teachers with `equal_norms` count as ``z_i mean_j ||z_j|| / ||z_i||``, an option in the overview figure of
    G-VBSM. Confessed: the figure does not say of what the norm is; as in the script for ImageNet it is the batch's.
    """
    if not teachers:
        raise StillroomError("soft labels need at least one teacher; see teachers.networks, or use hard labels")

    @torch.no_grad()
    def logits(images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=plan.memory_format)
        with plan.autocast():
            outputs = torch.stack([teacher.model(images).float() for teacher in teachers])  # [teachers, batch, classes]
        if any(teacher.equal_norms for teacher in teachers):
            norms = outputs.flatten(1).norm(dim=1)
            outputs = outputs * (norms.mean() / norms)[:, None, None]
        return outputs.mean(0)

    return logits


def attach_labels(
    distilled: DistilledSet,
    kind: str,
    teachers: list[Teacher],
    plan: Plan,
    run: Run,
    unit: str = "labels",
    pool: PoolConfig | None = None,
    train: TrainConfig | None = None,
) -> DistilledSet:
    """Return the set with labels of `kind`: "hard", "static" (logits of every view, stored) or "dynamic" (none).

    "replayed": logits of `pool.epochs` epochs of the batches that students trained by `train` see, stored. "learned":
    the set as it is. Raises StillroomError where its method learned none, or where they were replaced.
    """
    if kind == "learned":
        if distilled.manifest.label_kind != kind:
            raise StillroomError(
                f"labels is 'learned', but this set of {distilled.manifest.method!r} holds none, its labels are "
                f"{distilled.manifest.label_kind}; give hard, static, replayed or dynamic"
            )
        return distilled
    if kind == "static":
        return distilled.with_labels(compute_static_labels(distilled, teachers, plan, run, unit))
    if kind == "replayed":
        if train is None:
            raise StillroomError("replayed labels belong to the batches of a training; give its settings as train")
        stored, facts = compute_label_pool(distilled, teachers, pool or PoolConfig(), train, plan, run, unit)
        return distilled.with_pool(stored, facts)
    return distilled.with_labels(None, kind)  # type: ignore[arg-type]


def compute_static_labels(
    distilled: DistilledSet, teachers: list[Teacher], plan: Plan, run: Run, unit: str = "labels"
) -> Tensor:
    """Return the teachers' mean logits on every unaugmented view, float16 [views, classes] (Equation 6).

    The views are what a student will read back: stored, dequantised, clipped. Raises StillroomError where a logit is
    not finite, TimeLimitReached where the run is to stop. A unit of work is a block of views, of a small set all: its
    labels are kept in the run and read back.
    """
    made_by = {"teachers": [teacher.hash for teacher in teachers], "set": distilled.fingerprint}
    classes, batch = len(distilled.manifest.class_names), fit_batch(LABEL_BATCH, distilled.manifest.image_size[0])
    blocks = torch.arange(distilled.view_count).split(views_per_block(classes, distilled.manifest.image_size[0]))

    def make(block: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
        with run.progress("static labels", len(block)) as advance:
            return made_by, {"labels": label_views(distilled, block.split(batch), teachers, plan, advance)}

    names = [unit if len(blocks) == 1 else f"{unit}-{block[0]}-{block[-1] + 1}" for block in blocks]
    tasks = [
        Task(name, functools.partial(make, block), lambda made: bool(made == made_by))
        for name, block in zip(names, blocks, strict=True)
    ]
    labels = torch.empty(distilled.view_count, classes, dtype=torch.float16)
    # One by one, each let go as it is copied: not all are held twice.
    jobs = [functools.partial(run.carry_out, [task]) for task in tasks]
    for number, [(_, tensors)] in run.in_any_order(jobs):
        labels[blocks[number]] = tensors["labels"]
    return labels


def views_per_block(classes: int, image_size: int) -> int:
    """Return how many views' static labels are a unit of work: whole batches, of about BLOCK_BYTES."""
    batch = fit_batch(LABEL_BATCH, image_size)
    return max(1, BLOCK_BYTES // (classes * LABEL_BYTES * batch)) * batch


def label_views(
    distilled: DistilledSet,
    batches: Sequence[Tensor],
    teachers: list[Teacher],
    plan: Plan,
    advance: Callable[..., None],
) -> Tensor:
    """Return the teachers' mean logits on views, float16 [views, classes] on the CPU; `batches` are their rows.

    Raises StillroomError where a logit is not finite.
    """
    # Stored once and for all, so in float32 whatever the plan: a label must not depend on who has fast bfloat16.
    logits_of = ensemble_logits(teachers, replace(plan, precision="float32"))
    normalization, parts = distilled.manifest.normalization, []
    for rows in batches:
        views = distilled.form_views(rows).to(plan.device)
        logits = logits_of(apply_normalization(views, normalization.mean, normalization.std))
        parts.append(logits.half().cpu())
        advance(len(rows))
    labels = torch.cat(parts)
    bad = (~labels.isfinite()).any(1).nonzero().flatten()
    if len(bad):
        first = int(torch.cat(list(batches))[bad[0]])
        raise StillroomError(
            f"static labels of {len(bad)} views are not finite, first view {first}; check the teachers"
        )
    return labels


def compute_label_pool(
    distilled: DistilledSet,
    teachers: list[Teacher],
    pool: PoolConfig,
    train: TrainConfig,
    plan: Plan,
    run: Run,
    unit: str = "labels",
) -> tuple[StoredLogits, PoolFacts]:
    """Return the teachers' mean logits on the augmented batches of `pool.epochs` epochs, and what replays these.

    [epochs, steps, batch, classes], of the views as a student will read them back. A unit of work is one epoch, so a
    larger pool goes on where a smaller one ended. Raises StillroomError where a logit is not finite, TimeLimitReached
    where the run is to stop.
    """
    epochs = Epochs(distilled.view_count, train.batch_size, pool.seed, STUDENT_DRAWS, pool.epochs)
    facts = PoolFacts(
        epochs=pool.epochs,
        seed=pool.seed,
        encoding=pool.encoding,
        batches=batch_settings(train),
        teachers=tuple(teacher.hash for teacher in teachers),
        seed_scheme=SEED_SCHEME,
        draws_sha256=fingerprint_draws(distilled, train, epochs),
    )
    made_by = {name: value for name, value in asdict(facts).items() if name != "epochs"}
    made_by = json.loads(json.dumps(made_by | {"set": distilled.fingerprint}))  # as it will be read back
    form_batch = build_batches(distilled, train, plan.device)
    # Stored once and for all, so in float32, as static labels are.
    logits_of = ensemble_logits(teachers, replace(plan, precision="float32"))
    classes = len(distilled.manifest.class_names)

    def make(epoch: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        batches = []
        with run.progress(f"replayed labels, epoch {epoch + 1} of {pool.epochs}", epochs.steps) as advance:
            for within, rows in enumerate(epochs.rows(epoch)):
                images, _ = form_batch(rows, epochs.generator(epoch * epochs.steps + within))
                batches.append(encode_batch(logits_of(images), pool.encoding, epoch, within))
                advance()
        return made_by, stack_logits(batches).tensors

    tasks = [
        Task(
            f"{unit}-pool-{pool.encoding}-{pool.seed}-{epoch}",
            functools.partial(make, epoch),
            lambda made: bool(made == made_by),
        )
        for epoch in range(pool.epochs)
    ]
    blocks = [StoredLogits(pool.encoding, classes, tensors) for _, tensors in run.carry_out(tasks)]
    return stack_logits(blocks), facts


def encode_batch(logits: Tensor, encoding: LabelEncoding, epoch: int, within: int) -> StoredLogits:
    """Return a batch of replayed labels as stored; raises StillroomError that names it where a logit is not finite."""
    rows = (~logits.half().isfinite()).any(1).sum().item()
    if rows:
        raise StillroomError(
            f"replayed labels of {rows} rows in epoch {epoch}, step {within}, are not finite in float16; check the "
            "teachers"
        )
    return encode_logits(logits.cpu(), encoding)


def count_label_bytes(kind: str, views: int, classes: int, pool: PoolConfig, batch_size: int) -> int:
    """Return the bytes of labels that are stored with a set: of static and learned ones a float16 row per view, of
    replayed ones a row per image of every batch of the pool's epochs, of others none."""
    if kind in ("static", "learned"):
        return views * classes * LABEL_BYTES
    if kind == "replayed":
        batch = min(batch_size, views)
        return count_logit_bytes(pool.epochs * (views // batch) * batch, classes, pool.encoding)
    return 0


def dynamic_label_bytes(batch_size: int, steps: int, classes: int) -> int:
    """Return the bytes that storing dynamic labels would take: a float16 row per augmented image of every step."""
    return batch_size * steps * classes * LABEL_BYTES
