"""How far static labels are from dynamic ones (Figure 9)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from stillroom.arrays import LabelDivergence
from stillroom.augment import apply_mixup
from stillroom.labels import ensemble_logits
from stillroom.replay import STUDENT_DRAWS, build_batches
from stillroom.study import NATURALS, REAL, Study
from stillroom.train import Epochs

IMAGES = 1024  # about: whole batches
PERCENTS = np.arange(101)


def measure_divergence(study: Study) -> LabelDivergence:
    """Return KL(dynamic || static) of augmented, mixed views as students see them, on about 1,024 of them per set.

    The static label of a mixed image is the mix of the stored logits (Equation 5), the dynamic one the teachers' on the
    mixed image. Confessed: the paper does not name the temperature; here are 1 and the students'.
    """
    config = study.student_config
    names = [name for name in study.choose(("random", NATURALS, "sre2l", "infer")) if name != REAL]
    temperatures = sorted({1.0, config.temperature})
    values = []
    for name in names:
        static, dynamic = label_both_ways(study, name)
        values.append([divergence_of(dynamic / t, static / t) for t in temperatures])  # [temperatures, images]
    found = [[value.numpy() for value in own] for own in values]
    return LabelDivergence(
        dataset=study.real.name,
        images=min(len(own[0]) for own in found),
        set=np.array(names),
        temperature=np.array(temperatures),
        mean=np.array([[value.mean() for value in own] for own in found]),
        percent=PERCENTS,
        divergence=np.array([[np.percentile(value, PERCENTS) for value in own] for own in found]),
    )


def label_both_ways(study: Study, name: str) -> tuple[Tensor, Tensor]:
    """Return static and dynamic logits of the first batches of a student, float32 [images, classes] both."""
    distilled, train = study.labelled(name, "static"), study.student_config.train_for("static")
    assert distilled.soft_labels is not None
    stored, form_batch = distilled.soft_labels.float(), build_batches(distilled, train, study.plan.device)
    # In float32, as static labels are: else the rounding of fast bfloat16 would count as divergence.
    logits_of = ensemble_logits(study.labellers, replace(study.plan, precision="float32"))
    epochs = Epochs(distilled.view_count, train.batch_size, study.config.seeds[0], STUDENT_DRAWS)
    static: list[Tensor] = []
    dynamic: list[Tensor] = []
    for step in range(-(-IMAGES // epochs.batch)):
        rows = epochs.rows(step // epochs.steps)[step % epochs.steps]
        images, mixing = form_batch(rows, epochs.generator(step))
        dynamic.append(logits_of(images).cpu())
        static.append(stored[rows] if mixing is None else apply_mixup(stored[rows], mixing))
    return torch.cat(static), torch.cat(dynamic)


def divergence_of(of: Tensor, against: Tensor) -> Tensor:
    """Return KL(softmax(of) || softmax(against)) in nats of each row of logits [n, classes], float32 [n]."""
    log_of, log_against = of.log_softmax(1), against.log_softmax(1)
    return (log_of.exp() * (log_of - log_against)).sum(1)
