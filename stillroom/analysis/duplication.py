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
from stillroom.train import apply_normalization, fit_batch

FEATURE_BATCH = 256


def feature_duplication(distilled: DistilledSet, teacher: Teacher, plan: Plan) -> float | None:
    """Return the mean cosine similarity between two views of a class (Section 4.4), averaged over the classes.

    None where no class has two views. Of the penultimate features of `teacher`, the first of the recipe; the paper does
    not say of what.
    """
    normalization = distilled.manifest.normalization

    def form(rows: Tensor) -> Tensor:
        return apply_normalization(distilled.form_views(rows).to(plan.device), normalization.mean, normalization.std)

    classes = distilled.labels[distilled.view_table()[:, 0]].cpu()
    batch = fit_batch(FEATURE_BATCH, distilled.manifest.image_size[0])
    return mean_over_classes(compute_features(teacher.model, form, distilled.view_count, batch), classes)


def compute_features(
    model: torch.nn.Module, form: Callable[[Tensor], Tensor], count: int, batch: int = FEATURE_BATCH
) -> Tensor:
    """Return the penultimate features of `count` images, float32 [count, features], on the CPU.

    form: rows int64 [batch] -> normalised images float32 [batch, 3, height, width] on the model's device.
    """
    return torch.cat([penultimate_features(model, form(rows)).cpu() for rows in torch.arange(count).split(batch)])


def mean_over_classes(features: Tensor, classes: Tensor) -> float | None:
    """Return `mean_similarity` within each class, averaged over the classes; features [n, features], classes [n].

    Classes of a single row have no pairs, and are left out; None where no class has two.
    """
    features = torch.nn.functional.normalize(features)
    values = [mean_similarity(features[own]) for index in classes.unique() if (own := classes == index).sum() > 1]
    return round(statistics.mean(values), 5) if values else None


def mean_similarity(features: Tensor) -> float:
    """Return the mean cosine over all pairs of two or more rows [n, features] of length 1.

    The square of the rows' sum holds every pair twice, and each row with itself.
    """
    count = len(features)
    return (float(features.double().sum(0).square().sum()) - count) / (count * (count - 1))
