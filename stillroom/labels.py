"""Labels (relabel): hard, static soft (Equation 6, stored once per view), dynamic soft (for every augmented batch)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from stillroom.compute import Plan
from stillroom.distilled import DistilledSet
from stillroom.errors import StillroomError
from stillroom.run import Run
from stillroom.teachers import Teacher
from stillroom.train import apply_normalization

LABEL_BATCH = 256
LABEL_BYTES = 2  # float16 per class


def ensemble_logits(teachers: list[Teacher], plan: Plan) -> Callable[[Tensor], Tensor]:
    """Return the teachers' mean logits (Equation 6) as a function.

    images float32 [batch, 3, height, width], normalised, on the plan's device -> float32 [batch, classes].
    """
    if not teachers:
        raise StillroomError("soft labels need at least one teacher; see teachers.networks, or use hard labels")

    @torch.no_grad()
    def logits(images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=plan.memory_format)
        with plan.autocast():
            outputs = [teacher.model(images) for teacher in teachers]
        return torch.stack([output.float() for output in outputs]).mean(0)

    return logits


def attach_labels(
    distilled: DistilledSet, kind: str, teachers: list[Teacher], plan: Plan, run: Run, unit: str = "labels"
) -> DistilledSet:
    """Return the set with labels of `kind`: "hard", "static" (logits of every view, stored) or "dynamic" (none)."""
    if kind == "static":
        return distilled.with_labels(compute_static_labels(distilled, teachers, plan, run, unit))
    return distilled.with_labels(None, kind)  # type: ignore[arg-type]


def compute_static_labels(
    distilled: DistilledSet, teachers: list[Teacher], plan: Plan, run: Run, unit: str = "labels"
) -> Tensor:
    """Return the teachers' mean logits on every unaugmented view, float16 [views, classes] (Equation 6).

    The views are what a student will read back: stored, dequantised, clipped. Raises StillroomError where a logit is
    not finite. A unit of work is one set: its labels are kept in the run and read back.
    """
    made_by = {"teachers": [teacher.hash for teacher in teachers], "views": distilled.view_count}
    if run.unit_done(unit):
        made, tensors = run.load_unit(unit)
        if made == made_by:
            return tensors["labels"]
    # Stored once and for all, so in float32 whatever the plan: a label must not depend on who has fast bfloat16.
    logits_of = ensemble_logits(teachers, replace(plan, precision="float32"))
    normalization = distilled.manifest.normalization
    blocks = []
    with run.progress("static labels", distilled.view_count) as advance:
        for rows in torch.arange(distilled.view_count).split(LABEL_BATCH):
            views = distilled.form_views(rows).to(plan.device)
            logits = logits_of(apply_normalization(views, normalization.mean, normalization.std))
            blocks.append(logits.half().cpu())
            advance(len(rows))
    labels = torch.cat(blocks)
    bad = (~labels.isfinite()).any(1).nonzero().flatten()
    if len(bad):
        raise StillroomError(
            f"static labels of {len(bad)} views are not finite, first view {bad[0]}; check the teachers"
        )
    run.finish_unit(unit, made_by, {"labels": labels})
    return labels


def dynamic_label_bytes(batch_size: int, steps: int, classes: int) -> int:
    """Return the bytes that storing dynamic labels would take: a float16 row per augmented image of every step."""
    return batch_size * steps * classes * LABEL_BYTES
