"""What students predict: around images (Figure 5), by difficulty (Figure 8), how surely, and class by class."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from stillroom.arrays import Calibration, ClassAccuracy, Difficulty, Landscape
from stillroom.compute import build_generator
from stillroom.study import Study
from stillroom.train import apply_normalization

LANDSCAPE_IMAGES = 32
REACH = 1.0  # of the way to another image, in both directions
LANDSCAPE_POINTS = 21  # a side
INTERVALS = 10


def measure_landscape(study: Study) -> Landscape:
    """Return the cross-entropy of students on planes through test images, mean over 32 random ones.

    Confessed: the paper does not say along which directions of pixel space it walks. Here every plane goes through an
    image and through images of two other classes, so that it crosses boundaries, and is the same for all students.
    """
    real, config = study.real, study.config
    names = study.shown
    starts, firsts, seconds = draw_triplets(real.test.labels, LANDSCAPE_IMAGES, config.draw)
    start, first, second = (
        apply_normalization(real.test.batch(rows).to(study.plan.device), real.mean, real.std)
        for rows in (starts, firsts, seconds)
    )
    offsets = torch.linspace(-REACH, REACH, LANDSCAPE_POINTS)
    labels = real.test.labels[starts].to(study.plan.device)
    losses = [
        plane_loss(study.student(name, config.seeds[0]), start, first - start, second - start, labels, offsets)
        for name in names
    ]
    return Landscape(
        dataset=real.name,
        student=study.student_config.network,
        labels=study.labels,
        images=len(starts),
        set=np.array(names),
        steps=np.array([study.steps(name) for name in names]),
        first=offsets.numpy(),
        second=offsets.numpy(),
        loss=np.stack(losses),
    )


def draw_triplets(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return int64 [count] three times: positions of random images, and of two images of other classes for each.

    The two are of different classes where there are three or more. labels: int64 [n].
    """
    generator = build_generator(seed, "figure", "landscape")
    starts = torch.randperm(len(labels), generator=generator)[:count]
    firsts, seconds = [], []
    for start in starts:
        order = torch.randperm(len(labels), generator=generator)
        others = order[labels[order] != labels[start]]
        further = others[labels[others] != labels[others[0]]]
        firsts.append(others[0])
        seconds.append(further[0] if len(further) else others[-1])
    return starts, torch.stack(firsts), torch.stack(seconds)


@torch.no_grad()
def plane_loss(
    model: nn.Module, start: Tensor, first: Tensor, second: Tensor, labels: Tensor, offsets: Tensor
) -> np.ndarray:
    """Return the mean cross-entropy of ``start + a first + b second`` for all a, b of `offsets`, float64 [a, b].

    start, first, second: float32 [images, 3, height, width], normalised. Pixels are not cut to valid ones. In float32
    whatever the plan, since a surface shows rounding.
    """
    losses = [
        nn.functional.cross_entropy(model(start + a * first + b * second).float(), labels).item()
        for a in offsets.tolist()
        for b in offsets.tolist()
    ]
    return np.array(losses).reshape(len(offsets), len(offsets))


def measure_difficulty(study: Study) -> Difficulty:
    """Return how many test images of each difficulty students get right.

    Difficulty is the cross-entropy of the first teacher. Confessed: the paper's intervals have equal widths, so that
    the first holds most images; ours hold equally many.
    """
    real, config = study.real, study.config
    names, reference = study.shown, study.teachers[0]
    labels = real.test.labels
    loss = nn.functional.cross_entropy(study.predict(reference.model, real.test), labels, reduction="none").numpy()
    members = split_evenly(loss, INTERVALS)
    right = [[_right(study, name, seed)[rows].sum() for rows in members] for name in names for seed in config.seeds]
    return Difficulty(
        dataset=real.name,
        student=study.student_config.network,
        labels=study.labels,
        reference=reference.name,
        set=np.array(names),
        steps=np.array([study.steps(name) for name in names]),
        seed=np.array(config.seeds),
        low=np.array([loss[rows].min() for rows in members]),
        high=np.array([loss[rows].max() for rows in members]),
        count=np.array([len(rows) for rows in members]),
        right=np.reshape(right, (len(names), len(config.seeds), len(members))),
    )


def split_evenly(values: np.ndarray, parts: int) -> list[np.ndarray]:
    """Return positions in `values` [n], in ascending order of value, in parts whose sizes differ by one at most."""
    return [rows for rows in np.array_split(np.argsort(values, kind="stable"), parts) if len(rows)]


def measure_calibration(study: Study) -> Calibration:
    """Return students' confidence and accuracy by ten intervals of confidence, and their calibration error."""
    names, seeds = study.shown, study.config.seeds
    labels = study.real.test.labels.numpy()
    found = [calibrate(study.logits(name, seed).softmax(1).numpy(), labels) for name in names for seed in seeds]
    shape = (len(names), len(seeds))
    confidence, accuracy, count = (np.stack(part).reshape(*shape, INTERVALS) for part in zip(*found, strict=True))
    gaps = np.where(count > 0, np.abs(np.nan_to_num(confidence) - np.nan_to_num(accuracy)), 0.0)
    return Calibration(
        dataset=study.real.name,
        student=study.student_config.network,
        labels=study.labels,
        set=np.array(names),
        steps=np.array([study.steps(name) for name in names]),
        seed=np.array(seeds),
        error=(gaps * count).sum(-1) / count.sum(-1),
        confidence=confidence,
        accuracy=accuracy,
        count=count,
    )


def calibrate(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean confidence, accuracy (nan where no image is) and images of each interval (Guo et al., ICML 2017).

    probabilities: [n, classes]; the confidence is that of the predicted class; interval m of M holds confidences in
    ((m - 1) / M, m / M].
    """
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    interval = np.clip(np.ceil(confidence * INTERVALS).astype(int) - 1, 0, INTERVALS - 1)
    count = np.bincount(interval, minlength=INTERVALS)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(interval, values, INTERVALS) / count for values in (confidence, right)]
    return means[0], means[1], count


def measure_classes(study: Study) -> ClassAccuracy:
    """Return students' accuracy on each class of the test split."""
    names, seeds, real = study.shown, study.config.seeds, study.real
    labels = real.test.labels.numpy()
    there = np.bincount(labels, minlength=real.classes)
    found = [
        np.bincount(labels, _right(study, name, seed), real.classes) / np.maximum(there, 1)
        for name in names
        for seed in seeds
    ]
    return ClassAccuracy(
        dataset=real.name,
        student=study.student_config.network,
        labels=study.labels,
        set=np.array(names),
        steps=np.array([study.steps(name) for name in names]),
        seed=np.array(seeds),
        name=np.array(real.class_names),
        accuracy=np.stack(found).reshape(len(names), len(seeds), real.classes),
    )


def _right(study: Study, name: str, seed: int) -> np.ndarray:
    """Whether each test image is predicted right, bool [n]."""
    return np.asarray(study.logits(name, seed).argmax(1).numpy() == study.real.test.labels.numpy())
