"""Images recovered from noise, pixel by pixel: what SRe2L and G-VBSM share beside the statistics loss.

A *block* is what the published scripts call a batch: images that are optimised together because one loss, with one set
of batch statistics, binds them. SRe2L's block has one image of each class, G-VBSM's a few classes whole. A set's images
stand slot by slot in class order, so the image of `slot` and `label` is at position ``slot * classes + label``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from stillroom.compute import Plan, build_generator
from stillroom.data import RealData
from stillroom.distilled import DistilledSet
from stillroom.errors import StillroomError
from stillroom.files import sha256_bytes
from stillroom.manifest import ViewSettings
from stillroom.methods.recover import Descent, Terms, descend, made_once
from stillroom.methods.select import describe_set
from stillroom.run import Run
from stillroom.teachers import Teacher

# Given blocks of equal size, positions int64 [blocks, images], and the steps that all such packs will take: the terms
# of their loss, for pixels float32 [blocks, images, 3, height, width], and what the terms remember between steps.
Prepare = Callable[[Tensor, int], tuple[Terms, list[Tensor]]]


def slot_blocks(ipc: int, classes: int, classes_per_batch: int) -> list[Tensor]:
    """Return SRe2L's blocks, positions int64 [images] each: a slot, or `classes_per_batch` classes of it at a time."""
    slots = torch.arange(ipc * classes).view(ipc, classes)
    return [block for slot in slots for block in slot.split(classes_per_batch)]


def class_blocks(ipc: int, classes: int, images_per_batch: int, rounds: int = 1) -> list[Tensor]:
    """Return G-VBSM's blocks, positions int64 [images] each: class by class, all images of a class in a row.

    In several rounds over the classes each has its share of the slots; where the budget is less, a round has one slot.
    """
    shares = torch.arange(ipc).tensor_split(rounds)
    order = [slots * classes + label for slots in shares for label in range(classes)]
    return list(torch.cat(order).split(images_per_batch))


def pack_blocks(blocks: list[Tensor], classes: int, pack_slots: int) -> list[range]:
    """Return runs of blocks of equal size, each at most `pack_slots` blocks and, beyond one, as many slots' images."""
    packs: list[range] = []
    first = 0
    for index in range(1, len(blocks) + 1):
        size = len(blocks[first])
        most = max(1, min(pack_slots, pack_slots * classes // size))
        if index == len(blocks) or len(blocks[index]) != size or index - first == most:
            packs.append(range(first, index))
            first = index
    return packs


def recover_set(
    settings: Any, real: RealData, teachers: list[Teacher], ipc: int, seed: int, images: Tensor
) -> DistilledSet:
    """Return `images` uint8 [ipc * classes, 3, height, width] as the set of the method that `settings` are of."""
    positions = torch.arange(len(images))
    manifest = describe_set(
        settings.method, {settings.method: asdict(settings)}, real, ipc, seed, teachers, ViewSettings()
    )
    return DistilledSet(images, positions % real.classes, positions // real.classes, None, None, manifest)


def recover_images(
    settings: Any,
    real: RealData,
    teachers: Sequence[Teacher],
    blocks: list[Tensor],
    seed: int,
    plan: Plan,
    run: Run,
    prepare: Prepare,
) -> Tensor:
    """Return the images of all blocks, uint8 [positions, 3, height, width], recovered from standard normal noise.

    settings: has method (a name), steps, learning_rate and betas. A unit of work is a pack of blocks; finished units
    are read back, an unfinished one goes on. Raises StillroomError where a loss is not finite or a finished unit was
    made with other weights, TimeLimitReached where the run is to stop.

    After every step pixels are cut to what an image can have, as DeepInversion's `clip` does in the published scripts.
    Confessed: those truncate to 8 bits and save a JPEG in the end; here pixels are rounded and kept.
    """
    packs = pack_blocks(blocks, real.classes, plan.pack_slots)
    mean, std = (torch.tensor(values, device=plan.device).view(3, 1, 1) for values in (real.mean, real.std))
    names = ", ".join(teacher.name for teacher in teachers)
    made_by = {"teachers": names, "hash": sha256_bytes("".join(teacher.hash for teacher in teachers).encode())}
    shape = (3, real.image_size, real.image_size)
    positions_of = [torch.stack([blocks[index] for index in packed]) for packed in packs]
    tasks = []
    for packed, positions in zip(packs, positions_of, strict=True):
        paths = [(settings.method, int(block[0])) for block in positions]
        unit = f"images-{packed.start}-{packed.stop}"

        def make(positions: Tensor = positions, paths: list[tuple[str, int]] = paths, unit: str = unit) -> Any:
            terms, memory = prepare(positions, settings.steps * len(packs))
            size = (positions.shape[1], *shape)
            noise = [torch.randn(size, generator=build_generator(seed, *path, "noise")) for path in paths]
            descent = Descent(
                "images", torch.stack(noise).to(plan.device), terms, settings.steps, settings.learning_rate,
                settings.betas, plan, (-mean / std, (1 - mean) / std), memory,
            )  # fmt: skip
            remedy = f"lower {settings.method}.learning_rate (now {settings.learning_rate})"
            checkpoint = run.checkpoint(unit, made_by["hash"])
            losses = descend(descent, paths, seed, run, checkpoint, f"{unit} of {len(blocks)}", remedy)
            run.event("images", unit=unit, losses=losses[-1].tolist())
            return {"images": to_bytes(descent.tensor.detach() * std + mean).cpu(), "losses": losses.cpu()}

        tasks.append(made_once(unit, made_by, f"images by {names}", make))
    images = torch.empty(sum(map(len, blocks)), *shape, dtype=torch.uint8)
    # One by one, each let go as it is copied: not all are held twice.
    jobs = [functools.partial(run.carry_out, [task]) for task in tasks]
    for number, [(_, tensors)] in run.in_any_order(jobs):
        images[positions_of[number]] = tensors["images"]
    return images


def to_bytes(pixels: Tensor) -> Tensor:
    """Return uint8 of pixels, cut to [0, 1] and rounded. Raises StillroomError where one is not finite."""
    if not pixels.isfinite().all():  # NaN would quietly be black
        raise StillroomError(
            "recovered pixels are not finite; lower the learning rate or use --compute.precision float32, with a new "
            "--out"
        )
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
