"""RDED: mosaics of the crops that a teacher recognises best (Sun et al., CVPR 2024, arXiv 2312.03526).

paper                                        here
pre-selected images of a class               candidates: drawn at random
key patch of an image                        its crop of the lowest loss, of crops_per_image random ones
realism score, - log p(label | patch)        score_crops: cross-entropy of the first teacher, the observer
N IPC key patches of the lowest loss         tiles, best first
N patches to one image, N = factor^2         compose_mosaics: rank k IPC + i is tile k of image i

A finished class is kept as positions of its images and boxes in them; the mosaics are made of these at the end.

Confessed: the published script crops the files as they are, before they become squares of one size; stores mosaics as
JPEG of quality 75, rounded down; and normalises all data by ImageNet's constants. Ours crops the images of the
training split, rounds to the nearest value, stores by image_encoding, and normalises by the dataset's constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from stillroom import augment
from stillroom.compute import Plan, build_generator
from stillroom.data import RealData
from stillroom.distilled import DistilledSet
from stillroom.errors import StillroomError
from stillroom.manifest import ViewSettings
from stillroom.methods.select import SCORING_BATCH, choose_by_class, describe_set, rows_by_class
from stillroom.run import Run
from stillroom.teachers import Teacher
from stillroom.train import apply_normalization, fit_batch


@dataclass(frozen=True)
class RdedConfig:
    """RDED's settings; the defaults are those of the published scripts for CIFAR and Tiny-ImageNet."""

    candidates: int = 300  # images drawn from each class; all of them, where a class has fewer
    crops_per_image: int = 5  # random ones, of which the one of the lowest loss is kept
    crop_scale: tuple[float, float] = (0.08, 1.0)  # share of the area that a crop keeps; crops are squares
    factor: int = 1  # a mosaic has factor x factor tiles: 2 for images of 128 pixels and more in the scripts

    def __post_init__(self) -> None:
        for name in ("candidates", "crops_per_image", "factor"):
            if getattr(self, name) < 1:
                raise StillroomError(f"rded.{name} is {getattr(self, name)}; give 1 or more")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise StillroomError(f"rded.crop_scale is {self.crop_scale}; give an ascending pair above 0 and up to 1")


def check(real: RealData, networks: Mapping[str, nn.Module], ipc: int, config: RdedConfig) -> int:
    """Return the real images per class that are needed, one for each tile; raises StillroomError for bad settings."""
    if not networks:
        raise StillroomError("RDED needs a teacher, which scores the crops; see teachers.networks")
    if real.image_size % config.factor:
        raise StillroomError(
            f"rded.factor is {config.factor}, which does not divide images of {real.image_size} pixels; give a divisor"
        )
    tiles = ipc * config.factor**2
    if config.candidates < tiles:
        raise StillroomError(
            f"rded.candidates is {config.candidates}, but ipc {ipc} takes the best crops of {tiles} images "
            f"({config.factor} x {config.factor} in each); give {tiles} or more"
        )
    return tiles


def distill(
    real: RealData, teachers: list[Teacher], ipc: int, config: RdedConfig, seed: int, plan: Plan, run: Run
) -> DistilledSet:
    """Return `ipc` mosaics per class, uint8. Raises StillroomError for bad input, TimeLimitReached to stop the run."""
    needed = check(real, {teacher.name: teacher.model for teacher in teachers}, ipc, config)
    rows = rows_by_class(real, needed)
    ranked = min(config.candidates, *map(len, rows))

    def choose(index: int) -> Tensor:
        return choose_tiles(teachers[0], real, index, rows[index], ranked, config, seed, plan)

    best = choose_by_class(teachers[0], real.classes, choose, "rded", [asdict(config), seed], run)
    tiles = best[:, :needed]  # [classes, tiles, 5]
    images = torch.stack([compose_mosaics(real, own, config.factor, plan) for own in tiles], dim=1)
    labels = torch.arange(real.classes).repeat(ipc)
    slots = torch.arange(ipc).repeat_interleave(real.classes)
    manifest = describe_set("rded", {"rded": asdict(config)}, real, ipc, seed, teachers, ViewSettings())
    return DistilledSet(images.flatten(0, 1), labels, slots, None, None, manifest)


def choose_tiles(
    teacher: Teacher, real: RealData, index: int, rows: Tensor, count: int, config: RdedConfig, seed: int, plan: Plan
) -> Tensor:
    """Return the `count` best tiles of class `index`, best first: int64 [count, 5] of (row, top, left, height, width).

    rows: the class's positions in the training split. The draws are the class's own, whatever the order of classes.
    Of equal losses the earlier crop, and the earlier drawn image, is taken.
    """
    order = torch.randperm(len(rows), generator=build_generator(seed, "rded", "candidates", index))
    rows = rows[order[: config.candidates]]
    side, crops = real.image_size, config.crops_per_image
    generator = build_generator(seed, "rded", "crops", index)
    boxes = augment.draw_resized_crops(
        generator, len(rows) * crops, side, side, scale=config.crop_scale, ratio=(1.0, 1.0)
    ).unflatten(0, (len(rows), crops))  # [candidates, crops, 4]
    size = side // config.factor
    images = max(1, fit_batch(SCORING_BATCH, size) // crops)  # whose crops are scored in one pass
    parts = [
        score_crops(teacher, real, index, some, own, size, plan)
        for some, own in zip(rows.split(images), boxes.split(images), strict=True)
    ]
    losses, best = torch.cat(parts).min(1)  # [candidates]
    if not losses.isfinite().all():
        raise StillroomError(
            f"teacher {teacher.name!r} gives losses that are not finite on crops of class "
            f"{real.class_names[index]!r}; check its weights"
        )
    key = torch.cat((rows[:, None], boxes[torch.arange(len(rows)), best]), dim=1)  # the key patch of each image
    return key[losses.argsort(stable=True)[:count]]


@torch.no_grad()
def score_crops(
    teacher: Teacher, real: RealData, index: int, rows: Tensor, boxes: Tensor, size: int, plan: Plan
) -> Tensor:
    """Return the observer's cross-entropy on crops of images of class `index`, float32 [rows, crops], on the CPU.

    rows: int64 [rows]; boxes: int64 [rows, crops, 4]; size: of a tile in px. A tile smaller than an image is seen in
    its middle, on the mean colour, as in the published script; the paper does not say. In float32 whatever the plan: a
    choice must not depend on who has fast bfloat16.
    """
    crops = boxes.shape[1]
    tiles = cut_tiles(real, rows.repeat_interleave(crops), boxes.flatten(0, 1), size, plan)
    tiles = apply_normalization(tiles, real.mean, real.std)
    before = (real.image_size - size) // 2
    after = real.image_size - size - before
    seen = nn.functional.pad(tiles, (before, after, before, after))
    logits = teacher.model(seen.contiguous(memory_format=plan.memory_format)).float()
    targets = torch.full((len(logits),), index, device=logits.device)
    return nn.functional.cross_entropy(logits, targets, reduction="none").unflatten(0, (-1, crops)).cpu()


def cut_tiles(real: RealData, rows: Tensor, boxes: Tensor, size: int, plan: Plan) -> Tensor:
    """Return the boxes (int64 [tiles, 4]) of training images (rows int64 [tiles]), resized: float32 [tiles, 3, size,
    size] in [0, 1], on the plan's device. An image that is asked for several times in a row is read once."""
    distinct, back = rows.unique_consecutive(return_inverse=True)
    images = real.train.batch(distinct).to(plan.device).float() / 255
    return augment.apply_resized_crops(images[back.to(plan.device)], boxes, size)


def compose_mosaics(real: RealData, tiles: Tensor, factor: int, plan: Plan) -> Tensor:
    """Return the mosaics of one class's tiles, uint8 [ipc, 3, height, width], on the CPU.

    tiles: int64 [factor^2 ipc, 5] of (row, top, left, height, width), best first. Image i has the tiles i, ipc + i, 2
    ipc + i, ... from its top left corner, row by row: the best tile of each is among the class's best.
    """
    rows, boxes = tiles[:, 0], tiles[:, 1:]
    pixels = cut_tiles(real, rows, boxes, real.image_size // factor, plan)
    grid = pixels.unflatten(0, (factor, factor, -1))  # [down, across, ipc, 3, size, size]
    mosaics = grid.permute(2, 3, 0, 4, 1, 5).flatten(4, 5).flatten(2, 3)
    return (mosaics * 255).round().clamp(0, 255).to(torch.uint8).cpu()
