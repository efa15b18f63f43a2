"""Feature duplication: how alike the views of a class are to a network (Section 4.4, Figure 4, left)."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from stillroom.compute import Plan
from stillroom.distilled import DistilledSet
from stillroom.networks import penultimate_features
from stillroom.teachers import Teacher
from stillroom.train import apply_normalization

FEATURE_BATCH = 256


def feature_duplication(distilled: DistilledSet, teacher: Teacher, plan: Plan) -> float:
    """Return the mean cosine similarity between two views of a class (Section 4.4), averaged over the classes.

    Of the penultimate features of `teacher`, the first of the recipe; the paper does not say of what.
    """
    normalization = distilled.manifest.normalization

    def form(rows: Tensor) -> Tensor:
        return apply_normalization(distilled.form_views(rows).to(plan.device), normalization.mean, normalization.std)

    classes = distilled.labels[distilled.view_table()[:, 0]].cpu()
    return mean_over_classes(compute_features(teacher.model, form, distilled.view_count), classes)


def compute_features(model: torch.nn.Module, form: Callable[[Tensor], Tensor], count: int) -> Tensor:
    """Return the penultimate features of `count` images, float32 [count, features], on the CPU.

    form: rows int64 [batch] -> normalised images float32 [batch, 3, height, width] on the model's device.
    """
    return torch.cat(
        [penultimate_features(model, form(rows)).cpu() for rows in torch.arange(count).split(FEATURE_BATCH)]
    )


def mean_over_classes(features: Tensor, classes: Tensor) -> float:
    """Return `mean_similarity` within each class, averaged over the classes; features [n, features], classes [n]."""
    features = torch.nn.functional.normalize(features)
    values = [mean_similarity(features[classes == index]) for index in classes.unique()]
    return round(statistics.mean(values), 5)


def mean_similarity(features: Tensor) -> float:
    """Return the mean cosine over all pairs of rows [n, features] of length 1; 1 where there is a single row.

    The square of the rows' sum holds every pair twice, and each row with itself.
    """
    count = len(features)
    if count == 1:
        return 1.0
    return (float(features.double().sum(0).square().sum()) - count) / (count * (count - 1))
