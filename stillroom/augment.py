"""Augmentation of whole batches, [batch, channels, height, width]: crops, flips, shifts, patch orders, mixup, CutMix.

Chance and effect are apart. `draw_*` takes a CPU generator and returns what was drawn, on the CPU, so that a draw is
the same for every device; `apply_*` is deterministic, moves the draw to the images' device and never changes its
input. `per_image=False` draws once and repeats it for the batch. Crops, flips, shifts, patch orders move pixels only:
they work on uint8 and on floats of any range, exactly. Resized crops and mixup compute new values and need floats. All
are differentiable in the images. Arguments out of range and shapes that do not fit raise StillroomError.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stillroom.errors import StillroomError


@dataclass(frozen=True)
class Mixing:
    """One draw of mixup or CutMix for a batch.

    permutation: int64 [batch], the partner of each image. weight: share of the image itself in its label, in [0, 1].
    box: top, left, height, width of the pasted rectangle in px; CutMix only.
    """

    permutation: Tensor
    weight: float
    box: tuple[int, int, int, int] | None = None


def draw_crops(generator: torch.Generator, batch: int, padding: int, per_image: bool = True) -> Tensor:
    """Corners of random crops from images padded by `padding` px: int64 [batch, 2] of (top, left), 0 to 2 `padding`."""
    _require("padding", padding, padding >= 0, "0 or more px")
    return _draw_pairs(generator, batch, 2 * padding, per_image)


def apply_crops(images: Tensor, offsets: Tensor, padding: int, fill: float | Tensor = 0.0) -> Tensor:
    """Pad each side by `padding` px of `fill`, then cut images of the old size at `offsets` (int64 [batch, 2]).

    fill: one value, or one per channel: where images are normalised, black is -mean / std.
    """
    batch, channels, height, width = _sizes(images)
    _require("offsets", tuple(offsets.shape), offsets.shape == (batch, 2), f"shape [{batch}, 2], as the images need")
    _require("padding", padding, padding >= 0, "0 or more px")
    border = torch.as_tensor(fill, dtype=images.dtype).to(images.device, non_blocking=True)
    _require("fill", fill, border.numel() in (1, channels), f"one value, or one for each of {channels} channels")
    top, left = (offsets.to(images.device, non_blocking=True) - padding).unbind(1)
    rows = top[:, None] + torch.arange(height, device=images.device)  # [batch, height]
    columns = left[:, None] + torch.arange(width, device=images.device)  # [batch, width]
    # the padded images never exist: what would come from their border is filled in afterwards
    inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[:, None, None, :]
    picked = _pick(images, rows.clamp(0, height - 1), columns.clamp(0, width - 1))
    return torch.where(inside, picked, border.reshape(-1, 1, 1))


def draw_flips(generator: torch.Generator, batch: int, per_image: bool = True) -> Tensor:
    """Which images to mirror: bool [batch], each true with probability one half."""
    _require("batch", batch, batch >= 1, "1 or more images")
    return (torch.rand(batch if per_image else 1, generator=generator) < 0.5).expand(batch)


def apply_flips(images: Tensor, flips: Tensor) -> Tensor:
    """Mirror, left to right, the images that `flips` (bool [batch]) marks."""
    batch = _sizes(images)[0]
    _require("flips", tuple(flips.shape), flips.shape == (batch,), f"shape [{batch}], as the images need")
    return torch.where(flips.to(images.device, non_blocking=True)[:, None, None, None], images.flip(-1), images)


def draw_shift(generator: torch.Generator, limit: int) -> tuple[int, int]:
    """One shift (down, right) for a whole batch, each 0 to `limit` px: one-sided, as in INFER's published scripts."""
    down, right = draw_shifts(generator, 1, limit)[0].tolist()
    return down, right


def apply_shift(images: Tensor, shift: tuple[int, int]) -> Tensor:
    """Move all images by `shift` (down, right) px; what leaves on one side enters on the other."""
    return torch.roll(images, shift, dims=(2, 3))


def draw_shifts(generator: torch.Generator, batch: int, limit: int) -> Tensor:
    """A shift for each image: int64 [batch, 2] of (down, right), each 0 to `limit` px."""
    _require("limit", limit, limit >= 0, "0 or more px")
    return _draw_pairs(generator, batch, limit, per_image=True)


def apply_shifts(images: Tensor, shifts: Tensor) -> Tensor:
    """Move each image by its own of `shifts` (int64 [batch, 2]), circularly, as `apply_shift` does."""
    batch, _, height, width = _sizes(images)
    _require("shifts", tuple(shifts.shape), shifts.shape == (batch, 2), f"shape [{batch}, 2], as the images need")
    down, right = shifts.to(images.device, non_blocking=True).unbind(1)
    rows = (torch.arange(height, device=images.device) - down[:, None]) % height  # [batch, height]
    columns = (torch.arange(width, device=images.device) - right[:, None]) % width  # [batch, width]
    return _pick(images, rows, columns)


def draw_patch_orders(generator: torch.Generator, batch: int, patches: int) -> Tensor:
    """Orders of the rows and of the columns of `patches` x `patches` patches: int64 [batch, 2, patches]."""
    _require("batch", batch, batch >= 1, "1 or more images")
    _require("patches", patches, patches >= 1, "1 or more rows and columns")
    return torch.rand(batch, 2, patches, generator=generator, dtype=torch.float64).argsort(-1)


def apply_patch_orders(images: Tensor, orders: Tensor) -> Tensor:
    """Cut each image into a grid of patches and set its rows, then its columns, in its own of `orders`.

    orders: int64 [batch, 2, patches], permutations. Rows and columns move whole, as in RDED's published scripts; the
    last of each has the pixels that a grid of equal patches leaves over.
    """
    batch, _, height, width = _sizes(images)
    _require("orders", tuple(orders.shape), orders.shape[:-1] == (batch, 2), f"shape [{batch}, 2, patches]")
    patches = orders.shape[-1]
    _require("patches", patches, 1 <= patches <= min(height, width), f"1 to {min(height, width)} rows and columns")
    places = orders.to(images.device, non_blocking=True).argsort(-1)  # where each row or column of patches goes
    down, across = (
        (torch.arange(length, device=images.device) // (length // patches)).clamp(max=patches - 1)
        for length in (height, width)
    )
    rows = places[:, 0, down].argsort(dim=-1, stable=True)  # [batch, height]
    columns = places[:, 1, across].argsort(dim=-1, stable=True)  # [batch, width]
    return _pick(images, rows, columns)


def draw_resized_crops(
    generator: torch.Generator,
    batch: int,
    height: int,
    width: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    per_image: bool = True,
) -> Tensor:
    """Boxes of random area and shape in images of `height` x `width` px: int64 [batch, 4], (top, left, height, width).

    scale: range of the share of the area. ratio: range of width over height, drawn evenly in its logarithm. As in
    torchvision's RandomResizedCrop, the first of ten tries that fits is taken; if none does, the largest centred box
    of an allowed shape.
    """
    _require("batch", batch, batch >= 1, "1 or more images")
    _require("height, width", (height, width), min(height, width) >= 1, "1 px or more")
    _require("scale", scale, 0 < scale[0] <= scale[1] <= 1, "an ascending pair within (0, 1]")
    _require("ratio", ratio, 0 < ratio[0] <= ratio[1], "an ascending pair of positive numbers")
    boxes, tries = batch if per_image else 1, 10
    chance = torch.rand(4, boxes, tries, generator=generator, dtype=torch.float64)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * chance[0])
    shape = torch.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * chance[1])
    high = torch.sqrt(area / shape).round().long()  # [boxes, tries]
    wide = torch.sqrt(area * shape).round().long()
    fits = (high >= 1) & (high <= height) & (wide >= 1) & (wide <= width)
    top = (chance[2] * (height - high + 1)).long()
    left = (chance[3] * (width - wide + 1)).long()

    nearest = min(max(width / height, ratio[0]), ratio[1])
    central_high = max(1, min(height, round(width / nearest)))
    central_wide = max(1, min(width, round(height * nearest)))
    central = torch.tensor([(height - central_high) // 2, (width - central_wide) // 2, central_high, central_wide])
    first = fits.int().argmax(1)
    drawn = torch.stack([top, left, high, wide], dim=-1)[torch.arange(boxes), first]  # [boxes, 4]
    return torch.where(fits.any(1, keepdim=True), drawn, central).expand(batch, 4)


def apply_resized_crops(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut each image at its own of `boxes` (int64 [batch, 4]) and resize it: float [batch, channels, size, size].

    Bilinear with antialias, the same filter as torchvision's and Pillow's. Both directions are one matrix product each,
    so that every image can have its own box and gradients reach the pixels.
    """
    batch, _, height, width = _sizes(images)
    _require("images", images.dtype, images.is_floating_point(), "a floating-point type; convert them first")
    _require("boxes", tuple(boxes.shape), boxes.shape == (batch, 4), f"shape [{batch}, 4], as the images need")
    _require("size", size, size >= 1, "1 px or more")
    top, left, high, wide = boxes.to(images.device, non_blocking=True).unbind(1)
    vertical = _resampling(top, high, height, size).to(images.dtype)[:, None]  # [batch, 1, size, height]
    horizontal = _resampling(left, wide, width, size).to(images.dtype)[:, None]  # [batch, 1, size, width]
    # autocast would round the pixels to bfloat16 in the products
    with torch.autocast(images.device.type, enabled=False):
        return vertical @ images @ horizontal.transpose(-1, -2)


def draw_mixup(generator: torch.Generator, batch: int, beta: float, *, folded: bool) -> Mixing:
    """Partners, and one weight from Beta(beta, beta) for the batch.

    folded: take max(weight, 1 - weight), as Algorithm 2 of INFER's paper; its published scripts take the plain weight.
    """
    weight = _draw_beta(generator, beta)
    return Mixing(_draw_permutation(generator, batch), max(weight, 1 - weight) if folded else weight)


def apply_mixup(tensor: Tensor, mixing: Mixing) -> Tensor:
    """weight * tensor + (1 - weight) * tensor[permutation]: of images and, the same way, of logits or soft labels.

    tensor: floating-point [batch, ...]. With a `Mixing` of `draw_cutmix`, this is what mixes the labels.
    """
    _require("tensor", tensor.dtype, tensor.is_floating_point(), "a floating-point type (labels: one-hot rows)")
    partners = _partners(tensor, mixing)
    return mixing.weight * tensor + (1 - mixing.weight) * partners


def draw_cutmix(generator: torch.Generator, batch: int, beta: float, height: int, width: int) -> Mixing:
    """Partners, and one rectangle for the batch: of area 1 - w, w from Beta(beta, beta), its centre anywhere.

    The part of the rectangle beyond the image is lost; `weight` is the share of its area that the image truly keeps.
    """
    _require("height, width", (height, width), min(height, width) >= 1, "1 px or more")
    side = math.sqrt(1 - _draw_beta(generator, beta))
    half_height, half_width = int(height * side) // 2, int(width * side) // 2
    row = int(torch.randint(height, (), generator=generator))
    column = int(torch.randint(width, (), generator=generator))
    top, bottom = max(0, row - half_height), min(height, row + half_height)
    left, right = max(0, column - half_width), min(width, column + half_width)
    weight = 1 - (bottom - top) * (right - left) / (height * width)
    return Mixing(_draw_permutation(generator, batch), weight, (top, left, bottom - top, right - left))


def apply_cutmix(images: Tensor, mixing: Mixing) -> Tensor:
    """Paste into each image its partner's pixels within `mixing.box`; `apply_mixup` then mixes the labels."""
    _sizes(images)
    if mixing.box is None:
        raise StillroomError("mixing holds no box: draw it with draw_cutmix, or use apply_mixup.")
    top, left, height, width = mixing.box
    inside = (..., slice(top, top + height), slice(left, left + width))
    mixed = images.clone()
    mixed[inside] = _partners(images, mixing)[inside]
    return mixed


def _pick(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Each image's own rows [batch, height] and columns [batch, width]: [batch, channels, height, width]."""
    # one flat gather, because its backward is one scatter: that of strided windows fills every window there is
    source = (rows[:, :, None] * images.shape[3] + columns[:, None, :]).flatten(1)[:, None]  # [batch, 1, pixels]
    picked = images.flatten(2).gather(2, source.expand(-1, images.shape[1], -1))
    return picked.unflatten(2, (rows.shape[1], columns.shape[1]))


def _resampling(start: Tensor, length: Tensor, pixels: int, size: int) -> Tensor:
    """Rows that resample `pixels` to `size` samples of [start, start + length): float32 [batch, size, pixels].

    A triangle, as wide as a source pixel, or as a target pixel where that is larger, cut at the box and normalised.
    """
    step = (length / size)[:, None, None]  # source px per sample, [batch, 1, 1]
    samples = torch.arange(size, device=start.device)[:, None]
    source = torch.arange(pixels, device=start.device) - start[:, None, None]  # from the edge, [batch, 1, pixels]
    distance = (source + 0.5 - (samples + 0.5) * step).abs()
    weights = (1 - distance / step.clamp(min=1)).clamp(min=0)
    weights = weights * ((source >= 0) & (source < length[:, None, None]))
    return weights / weights.sum(-1, keepdim=True)


def _draw_pairs(generator: torch.Generator, batch: int, most: int, per_image: bool) -> Tensor:
    _require("batch", batch, batch >= 1, "1 or more images")
    return torch.randint(most + 1, (batch if per_image else 1, 2), generator=generator).expand(batch, 2)


def _draw_permutation(generator: torch.Generator, batch: int) -> Tensor:
    _require("batch", batch, batch >= 1, "1 or more images")
    return torch.randperm(batch, generator=generator)


def _draw_beta(generator: torch.Generator, beta: float) -> float:
    _require("beta", beta, beta > 0, "more than 0; to mix nothing, leave the mixing out")
    # torch.distributions draws from the global generator only, so numpy draws, seeded by ours
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    return float(np.random.default_rng(seed).beta(beta, beta))


def _partners(tensor: Tensor, mixing: Mixing) -> Tensor:
    batch = len(mixing.permutation)
    _require("tensor", tuple(tensor.shape), tensor.shape[:1] == (batch,), f"{batch} rows, as the mixing was drawn for")
    return tensor[mixing.permutation.to(tensor.device, non_blocking=True)]


def _sizes(images: Tensor) -> tuple[int, int, int, int]:
    _require("images", tuple(images.shape), images.ndim == 4, "four dimensions [batch, channels, height, width]")
    batch, channels, height, width = images.shape
    return batch, channels, height, width


def _require(argument: str, value: object, holds: bool, need: str) -> None:
    if not holds:
        raise StillroomError(f"{argument}={value!r} cannot be augmented with: it needs {need}.")
