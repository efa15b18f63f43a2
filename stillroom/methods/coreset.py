"""Coresets: real images that stand for their class in a teacher's features. Herding and k-center greedy.

    herding    the k-th pick makes the mean of the picks nearest to the class's mean (Welling, ICML 2009; as in iCaRL,
               Rebuffi et al., CVPR 2017, Algorithm 4, without replacement)
    k_center   the k-th pick is the image farthest from its nearest pick (Sener & Savarese, ICLR 2018, Algorithm 1)

Both choose within each class, by the penultimate features of the first teacher, and both are nested: ipc 10 begins with
the picks of ipc 5. Nothing is drawn: data and teacher decide, and of equally good images the first is taken.

Confessed: Sener and Savarese go on from labelled images, DeepCore from a random one; k_center begins with the image
nearest to the class's mean, so that no chance is in it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.compute import Plan
from stillroom.data import RealData
from stillroom.distilled import DistilledSet
from stillroom.errors import StillroomError
from stillroom.manifest import ViewSettings
from stillroom.methods.select import (
    SCORING_BATCH,
    choose_by_class,
    describe_set,
    find_originals,
    rows_by_class,
    take_naturals,
)
from stillroom.networks import penultimate_features
from stillroom.run import Run
from stillroom.teachers import Teacher
from stillroom.train import apply_normalization, fit_batch

RANKED = 100  # images of a class that are put in order whatever the budget, so that smaller budgets take their part


@dataclass(frozen=True)
class HerdingConfig:
    """How herding measures."""

    normalize: bool = False  # features scaled to length 1, as iCaRL does; the condensation papers and DeepCore do not


@dataclass(frozen=True)
class KCenterConfig:
    """k-center greedy needs no settings."""


def pick_herding(features: Tensor, count: int) -> Tensor:
    """Return `count` rows of `features` (float [images, features]) in the order of picking, int64.

    The k-th pick is ``argmin_i || mean - (f_i + sum of the picks before) / k ||`` among the rows not yet picked.
    """
    mean, together = features.mean(0), torch.zeros_like(features[0])
    picks: list[int] = []
    for k in range(1, count + 1):
        distance = _distances(features, k * mean - together)  # k times that of the means: the same order
        distance[picks] = torch.inf
        picks.append(int(distance.argmin()))
        together += features[picks[-1]]
    return torch.tensor(picks)


def pick_k_centers(features: Tensor, count: int) -> Tensor:
    """Return `count` rows of `features` (float [images, features]) in the order of picking, int64.

    The first is the row nearest to the mean; each other is ``argmax_i min_j || f_i - f_j ||`` over the picks j.
    """
    picks = [int(_distances(features, features.mean(0)).argmin())]
    nearest = torch.full((len(features),), torch.inf, dtype=features.dtype)  # distance of each row to its pick
    while len(picks) < count:
        nearest = torch.minimum(nearest, _distances(features, features[picks[-1]]))
        nearest[picks] = -1  # a copy of a pick is 0 away, and still another image
        picks.append(int(nearest.argmax()))
    return torch.tensor(picks)


def _distances(features: Tensor, point: Tensor) -> Tensor:
    return torch.linalg.vector_norm(features - point, dim=1)


def compute_features(teacher: Teacher, real: RealData, rows: Tensor, plan: Plan) -> Tensor:
    """Return the teacher's penultimate features of training images, float32 [rows, features], on the CPU.

    rows: int64 [rows], positions in the training split. Raises StillroomError where a feature is not finite.
    """
    parts = []
    for some in rows.split(fit_batch(SCORING_BATCH, real.image_size)):
        images = apply_normalization(real.train.batch(some).to(plan.device), real.mean, real.std)
        features = penultimate_features(teacher.model, images.contiguous(memory_format=plan.memory_format))
        parts.append(features.cpu())
    features = torch.cat(parts)
    if not features.isfinite().all():
        raise StillroomError(f"features of {teacher.name!r} are not finite; check the weights of this teacher")
    return features


def check_herding(real: RealData, networks: Mapping[str, nn.Module], ipc: int, config: HerdingConfig) -> int:
    """Return the real images per class that are taken: `ipc`. Raises StillroomError for networks without features."""
    return _check("herding", real, networks, ipc)


def check_k_center(real: RealData, networks: Mapping[str, nn.Module], ipc: int, config: KCenterConfig) -> int:
    """Return the real images per class that are taken: `ipc`. Raises StillroomError for networks without features."""
    return _check("k_center", real, networks, ipc)


def distill_herding(
    real: RealData, teachers: list[Teacher], ipc: int, config: HerdingConfig, seed: int, plan: Plan, run: Run
) -> DistilledSet:
    """Return the first `ipc` picks of herding in each class. Raises StillroomError for bad input."""

    def pick(features: Tensor, count: int) -> Tensor:
        return pick_herding(nn.functional.normalize(features) if config.normalize else features, count)

    return _distill("herding", asdict(config), pick, real, teachers, ipc, seed, plan, run)


def distill_k_center(
    real: RealData, teachers: list[Teacher], ipc: int, config: KCenterConfig, seed: int, plan: Plan, run: Run
) -> DistilledSet:
    """Return the first `ipc` picks of k-center greedy in each class. Raises StillroomError for bad input."""
    return _distill("k_center", asdict(config), pick_k_centers, real, teachers, ipc, seed, plan, run)


def _check(method: str, real: RealData, networks: Mapping[str, nn.Module], ipc: int) -> int:
    if not networks:
        raise StillroomError(f"{method} needs a teacher, whose features it measures in; see teachers.networks")
    name, first = next(iter(networks.items()))
    image = torch.zeros(1, 3, real.image_size, real.image_size, device=next(first.parameters()).device)
    try:
        penultimate_features(copy.deepcopy(first).eval(), image)
    except StillroomError as error:
        raise StillroomError(f"{method} cannot use {name!r}, the first of teachers.networks: {error}") from error
    return ipc


def _distill(
    method: str,
    settings: dict[str, Any],
    pick: Callable[[Tensor, int], Tensor],
    real: RealData,
    teachers: list[Teacher],
    ipc: int,
    seed: int,
    plan: Plan,
    run: Run,
) -> DistilledSet:
    _check(method, real, {teacher.name: teacher.model for teacher in teachers}, ipc)
    rows = rows_by_class(real, ipc)
    ranked = min(max(RANKED, ipc), *map(len, rows))

    def choose(index: int) -> Tensor:
        # Distances in float64 on the CPU: a pick must not hang on how a device rounds. A class at a time is in memory.
        return rows[index][pick(compute_features(teachers[0], real, rows[index], plan).double(), ranked)]

    # The first of a longer ranking are those of a shorter one.
    order = choose_by_class(teachers[0], real.classes, choose, method, [settings, ranked], run)
    chosen = order[:, :ipc].T  # [ipc, classes]
    images, labels = take_naturals(real, chosen)
    slots = torch.arange(ipc).repeat_interleave(real.classes)
    manifest = describe_set(method, {method: settings}, real, ipc, seed, teachers, ViewSettings())
    return DistilledSet(images, labels, slots, None, None, manifest, originals=find_originals(real, chosen))
