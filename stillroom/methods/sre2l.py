"""SRe2L: every pixel recovered from one teacher (Yin et al., NeurIPS 2023), and CDA, its curriculum of crops.

Yin & Shen's CDA (TMLR 2024) is SRe2L whose crops begin with the whole image and shrink as the optimisation goes on.
Equations are cited by what they are: squeeze is teachers.py, relabel is dynamic labels in labels.py, recover is here:

paper                                 here
R_BN, mean and variance per layer     statistics loss of methods/recover.py, weight and first layer's as in the scripts
R_TV, R_l2 (image priors)             total_variation, image_norm; both 0 in the published commands
multi-crop optimisation               augmentation "resized_crop...": one crop for the block in every step
curriculum of crop scales (CDA)       least_scale
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from stillroom.compute import Plan
from stillroom.data import RealData
from stillroom.distilled import DistilledSet
from stillroom.errors import StillroomError, check_choices
from stillroom.methods.pixels import recover_images, recover_set, slot_blocks
from stillroom.methods.recover import (
    Objective,
    Terms,
    build_objective,
    check_descent,
    check_has_batchnorm,
    draw_augment,
)
from stillroom.run import Run
from stillroom.teachers import Teacher


@dataclass(frozen=True)
class Sre2lConfig:
    """The settings of the recovery; the defaults are those of the published command for CIFAR-100."""

    method: ClassVar[str] = "sre2l"

    steps: int = 1000
    learning_rate: float = 0.25  # in units of the channels' standard deviation
    betas: tuple[float, float] = (0.5, 0.9)
    statistics_weight: float = 0.01  # alpha_BN; 1 for Tiny-ImageNet, 0.01 for ImageNet
    first_layer_weight: float = 10.0  # of the first BatchNorm in the statistics loss; in the scripts, not in the paper
    tv_weight: float = 0.0  # of the total variation
    l2_weight: float = 0.0  # of the images' norm
    augmentation: Literal["none", "shift", "resized_crop", "resized_crop_shift"] = "shift"  # CIFAR's images stay whole
    shift_limit: int = 4  # pixels; confessed: circular and one-sided, where Tiny-ImageNet's script shifts both ways
    per_image: bool = False  # whether each image has a draw of its own; the scripts draw once per batch
    least_scale: float = 0.08  # share of the area that a resized crop keeps at least
    curriculum: Literal["none", "step", "linear", "cosine"] = "none"  # how the least scale falls from 1 (CDA)
    curriculum_share: float = 1.0  # of the steps, after which the least scale is `least_scale` (CDA's milestone)
    classes_per_batch: int = 100  # that share their statistics: a slot of more classes is recovered in blocks

    def __post_init__(self) -> None:
        check_choices(self, self.method)
        check_descent(self, self.method)
        if self.tv_weight < 0 or self.l2_weight < 0:
            raise StillroomError(f"{self.method}.tv_weight and {self.method}.l2_weight must be 0 or more")
        if not 0 < self.least_scale <= 1:
            raise StillroomError(f"{self.method}.least_scale is {self.least_scale}; give a share above 0, such as 0.08")
        if not 0 <= self.curriculum_share <= 1:
            raise StillroomError(f"{self.method}.curriculum_share is {self.curriculum_share}; give a share from 0 to 1")
        if self.classes_per_batch < 1:
            raise StillroomError(f"{self.method}.classes_per_batch is {self.classes_per_batch}; give 1 or more")
        if self.curriculum != "none" and "crop" not in self.augmentation:
            raise StillroomError(
                f"{self.method}.curriculum is {self.curriculum!r}, but {self.method}.augmentation "
                f"{self.augmentation!r} crops nothing; give resized_crop or resized_crop_shift"
            )


@dataclass(frozen=True)
class CdaConfig(Sre2lConfig):
    """SRe2L with CDA's curriculum: crops from the whole image to any, on half a cosine over all steps.

    Confessed: no command for CIFAR is published; steps, rate and weight are SRe2L's there.
    """

    method: ClassVar[str] = "cda"

    augmentation: Literal["none", "shift", "resized_crop", "resized_crop_shift"] = "resized_crop_shift"
    curriculum: Literal["none", "step", "linear", "cosine"] = "cosine"


def least_scale(config: Sre2lConfig, step: int) -> float:
    """Return the smallest share of the area that a crop of `step` keeps: CDA's curriculum, from 1 downwards."""
    done = step / (config.curriculum_share * config.steps) if config.curriculum_share > 0 else 1.0
    if config.curriculum == "none" or done >= 1:
        return config.least_scale
    share = {"step": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.curriculum]
    return config.least_scale + (1 - config.least_scale) * share


def total_variation(images: Tensor) -> Tensor:
    """Return R_TV, float32 [blocks]: the L2 norms of a block's differences along the four directions, summed.

    images: [blocks, images, 3, height, width]. As in the scripts: norms over the whole block, not squares per image.
    """
    differences = (
        images[..., :, :-1] - images[..., :, 1:],
        images[..., :-1, :] - images[..., 1:, :],
        images[..., 1:, :-1] - images[..., :-1, 1:],
        images[..., :-1, :-1] - images[..., 1:, 1:],
    )
    return torch.stack([difference.flatten(1).norm(dim=1) for difference in differences]).sum(0)


def image_norm(images: Tensor) -> Tensor:
    """Return R_l2, float32 [blocks]: the mean L2 norm of a block's images [blocks, images, 3, height, width]."""
    return images.flatten(2).norm(dim=2).mean(1)


def check(real: RealData, networks: Mapping[str, nn.Module], ipc: int, config: Sre2lConfig) -> int:
    """Return 0, the real images that are taken, or raise StillroomError for a teacher that nothing is recovered from.

    Only the first network is a teacher here; the others label.
    """
    if not networks:
        raise StillroomError(f"{config.method} needs a teacher; see teachers.networks")
    check_has_batchnorm(*next(iter(networks.items())))
    return 0


def distill(
    real: RealData, teachers: list[Teacher], ipc: int, config: Sre2lConfig, seed: int, plan: Plan, run: Run
) -> DistilledSet:
    """Return `ipc` images per class recovered from the first of `teachers`; all of them label it later.

    Raises StillroomError for bad input and where a loss is not finite, TimeLimitReached where the run is to stop.
    """
    check(real, {teacher.name: teacher.model for teacher in teachers}, ipc, config)
    blocks = slot_blocks(ipc, real.classes, config.classes_per_batch)

    @functools.cache  # compiled once per number of blocks, and worth it by all of the run's steps
    def objective_of(count: int, calls: int) -> Objective:
        model, weights = teachers[0].model, (config.first_layer_weight, config.statistics_weight)
        return build_objective(model, count, *weights, plan, calls)

    def prepare(positions: Tensor, calls: int) -> tuple[Terms, list[Tensor]]:
        return build_terms(positions, real, config, plan, objective_of(len(positions), calls)), []

    images = recover_images(config, real, teachers[:1], blocks, seed, plan, run, prepare)
    return recover_set(config, real, teachers, ipc, seed, images)


def build_terms(positions: Tensor, real: RealData, config: Sre2lConfig, plan: Plan, objective: Objective) -> Terms:
    """Return the terms of SRe2L's loss for blocks of `positions` int64 [blocks, images].

    Label loss, weighted statistics loss and, where they have a weight, the image priors, all of the augmented images.
    """
    labels = (positions % real.classes).to(plan.device)

    def terms(step: int, pixels: Tensor, generators: Sequence[torch.Generator]) -> tuple[Tensor, ...]:
        augments = [
            draw_augment(
                config.augmentation, draws, positions.shape[1], real.image_size, shift_limit=config.shift_limit,
                per_image=config.per_image, flip=real.flip, least_scale=least_scale(config, step),
            )
            for draws in generators
        ]  # fmt: skip

        def form(tensor: Tensor, rows: slice) -> Tensor:
            own = tensor[:, rows]
            views = torch.cat([augment(block, rows) for block, augment in zip(own, augments, strict=True)])
            return views.contiguous(memory_format=plan.memory_format)

        losses = objective(pixels, form, labels)
        if not (config.tv_weight or config.l2_weight):
            return losses
        blocks = form(pixels, slice(None)).unflatten(0, (len(positions), -1))
        return *losses, config.tv_weight * total_variation(blocks) + config.l2_weight * image_norm(blocks)

    return terms
