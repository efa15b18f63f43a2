"""INFER: one additive compensator per teacher and slot, shared by all classes (Zhang et al., ICLR 2025, Algorithm 1).

paper                         here
P^k, a slot's instances       naturals: one real image per class, in slots 0 ... K-1
u_j, UFC                      compensator [3, height, width], one per teacher and slot
s~_i = x_i + u_j (Eq. 2)      view; the naturals themselves are views too, as in the published scripts
l + alpha L_BN   (Eq. 3, 4)   label loss + statistics_weight * statistics loss; see methods/recover.py
Y^k              (Eq. 6)      static labels; see labels.py
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from stillroom.artifact import StoredImages
from stillroom.compute import Plan
from stillroom.data import RealData
from stillroom.distilled import DistilledSet, quantize_compensators
from stillroom.errors import StillroomError, check_choices, suggest
from stillroom.files import load_torch, sha256_bytes
from stillroom.manifest import ViewSettings
from stillroom.methods.recover import (
    Descent,
    Objective,
    build_objective,
    check_descent,
    check_has_batchnorm,
    descend,
    draw_augment,
    made_once,
)
from stillroom.methods.select import Content, describe_set, draw_naturals, find_originals, take_naturals
from stillroom.run import Run, Task
from stillroom.teachers import Teacher
from stillroom.train import apply_normalization

LARGEST_ROUNDING = 0.25  # of a pixel's 255 levels, that prepared naturals may lie off


@dataclass(frozen=True)
class InferConfig:
    """Algorithm 1's settings; the defaults are CIFAR's in Table 5 and in the published scripts.

    Confessed: Table 5 has no augmentation for CIFAR; the shift is the scripts', which made the tables.
    """

    steps: int = 1000
    learning_rate: float = 0.25  # in units of the channels' standard deviation
    betas: tuple[float, float] = (0.5, 0.9)
    statistics_weight: float = 1.0  # alpha of Equation 3: 1 for CIFAR, 0.01 for ImageNet (the paper gives none)
    first_layer_weight: float = 10.0  # of the first BatchNorm in the statistics loss; in the scripts, not in the paper
    augmentation: Literal["none", "shift", "resized_crop", "resized_crop_shift"] = (
        "shift"  # shift: circular, one-sided, as in the scripts
    )
    shift_limit: int = 4  # pixels
    per_image: bool = False  # whether each image has a draw of its own; the scripts draw once per batch
    naturals: str | None = None  # folder of the scripts' tensor_{k}.pt, a slot each; None: drawn at random
    naturals_as_views: bool = True  # as in the scripts; the paper's Equation 2 has the compensated views only
    clip: bool = True  # views are cut to valid pixels; the optimisation never is
    view_encoding: Literal["exact", "jpeg75"] = "exact"  # jpeg75: what the scripts' 8-bit files leave of a view
    compensator_bits: Literal[16, 8] = 16
    teachers: tuple[str, ...] | None = None  # those of the loaded teachers that make compensators (Table 3); None: all
    compensators: bool = True  # False: the same naturals and nothing else, an ablation

    def __post_init__(self) -> None:
        check_choices(self, "infer")
        check_descent(self, "infer")
        if self.teachers is not None and (not self.teachers or len(set(self.teachers)) != len(self.teachers)):
            raise StillroomError(f"infer.teachers is {list(self.teachers)}; name one teacher or more, each once")
        if not (self.compensators or self.naturals_as_views):
            raise StillroomError(
                "infer.compensators and infer.naturals_as_views are both false, which leaves no views; set one true"
            )


def slot_count(ipc: int, classes: int, teachers: int) -> int:
    """Return K, the number of slots that `ipc` images per class pay for: naturals and compensators both count.

    ``floor(ipc C / (C + M))`` (Section 4.1) in integers: the published scripts' ``int(ipc / (M / C + 1))`` loses a slot
    to rounding (C = 10, M = 1, ipc = 33 gives 29, not 30). Raises StillroomError where K would be 0.
    """
    slots = ipc * classes // (classes + teachers)
    if slots < 1:
        smallest = -(-(classes + teachers) // classes)
        raise StillroomError(
            f"ipc {ipc} is too small for INFER: with {classes} classes the images of {teachers} compensators per slot "
            f"leave no slot; the smallest that works is --ipc {smallest}"
            f"{', or use fewer --teachers.networks' if teachers > 1 else ''}"
        )
    return slots


def makers_of(names: Sequence[str], config: InferConfig) -> tuple[str, ...]:
    """Return the names of the teachers that make compensators; raises StillroomError for one that is not loaded."""
    for name in config.teachers or ():
        if name not in names:
            raise StillroomError(
                f"infer.teachers names {name!r}, which is not among the teachers." + suggest(name, names)
            )
    return config.teachers or tuple(names)


def check(real: RealData, networks: Mapping[str, nn.Module], ipc: int, config: InferConfig) -> int:
    """Return K, or raise StillroomError for what cannot be distilled, before any work is spent."""
    if not networks:
        raise StillroomError("INFER needs at least one teacher; see teachers.networks")
    makers = makers_of(list(networks), config)
    for name in makers if config.compensators else ():
        check_has_batchnorm(name, networks[name])
    slots = slot_count(ipc, real.classes, len(makers))
    if config.naturals is not None:
        load_naturals(config.naturals, real, slots)
    return slots


def content(real: RealData, teachers: int, ipc: int, config: InferConfig) -> Content:
    """Return what a set holds: K naturals per class, and a compensator of each maker for each of the K slots."""
    makers = len(config.teachers or range(teachers))
    slots = slot_count(ipc, real.classes, makers)
    images = slots * real.classes
    if not config.compensators:
        return Content(images, 0, 0, images)
    return Content(images, slots * makers, config.compensator_bits, images * (makers + config.naturals_as_views))


def load_naturals(folder: Path | str, real: RealData, slots: int) -> tuple[Tensor, Tensor]:
    """Return what take_naturals does, of images prepared for INFER's published scripts: `folder`/tensor_{k}.pt.

    Each file is one slot: a float tensor [classes, 3, side, side], one image per class in label order, normalised by
    the dataset's mean and deviation. Read with ``weights_only``. Raises StillroomError where a file is missing, of
    another shape or not finite, and where its pixels are not the 8-bit ones that other constants would not give back.
    """
    shape = [real.classes, 3, real.image_size, real.image_size]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (real.mean, real.std))
    images = []
    for slot in range(slots):
        path = Path(folder) / f"tensor_{slot}.pt"
        if not path.is_file():
            raise StillroomError(
                f"naturals: {path} is not there; {slots} slots need tensor_0.pt ... tensor_{slots - 1}.pt"
            )
        if path.stat().st_size > 16 * math.prod(shape) + 2**20:
            raise StillroomError(f"naturals: {path} has {path.stat().st_size:,} bytes, too many for a tensor {shape}")
        try:
            values = load_torch(path)
        except Exception as error:  # damaged files, and pickles of more than tensors, raise many classes
            raise StillroomError(f"naturals: {path} is no torch file of a tensor alone: {str(error)[:200]}") from error
        if not isinstance(values, Tensor) or not values.is_floating_point() or list(values.shape) != shape:
            held = f"{values.dtype} {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise StillroomError(f"naturals: {path} holds {held}; needed are floats {shape}, an image of each class")
        levels = (values.detach().double() * std + mean) * 255
        if not bool(levels.isfinite().all()):
            raise StillroomError(f"naturals: {path} has values that are not finite; prepare it again")
        pixels = levels.round().clamp(0, 255)
        if float((levels - pixels).abs().max()) > LARGEST_ROUNDING:
            raise StillroomError(
                f"naturals: {path} gives pixels from {levels.min():.1f} to {levels.max():.1f}, up to "
                f"{(levels - pixels).abs().max():.2f} from whole ones in 0 ... 255; it was normalised by other "
                f"constants than mean {real.mean} and deviation {real.std}"
            )
        images.append(pixels.to(torch.uint8))
    return torch.cat(images), torch.arange(real.classes).repeat(slots)


def place_naturals(real: RealData, slots: int, seed: int, folder: str | None) -> tuple[Tensor | StoredImages, Tensor]:
    """Return images uint8 [slots * classes, 3, height, width] and labels: those in `folder`, or else a random draw."""
    if folder is not None:
        return load_naturals(folder, real, slots)
    return take_naturals(real, draw_naturals(real, slots, seed))


def distill(
    real: RealData, teachers: list[Teacher], ipc: int, config: InferConfig, seed: int, plan: Plan, run: Run
) -> DistilledSet:
    """Return the distilled set of Algorithm 1, without labels (labels.py makes those from its views).

    A unit of work is one teacher and `plan.pack_slots` slots; finished units are read back, an unfinished one goes on.
    Raises StillroomError for bad input and where a loss is not finite, TimeLimitReached where the run is to stop.
    """
    slots = check(real, {teacher.name: teacher.model for teacher in teachers}, ipc, config)
    images, labels = place_naturals(real, slots, seed, config.naturals)
    makers = makers_of([teacher.name for teacher in teachers], config)
    made_by = [next(teacher for teacher in teachers if teacher.name == name) for name in makers]
    stored = None
    if config.compensators:
        recovered = recover_compensators(made_by, images, real, config, seed, plan, run)
        compensators = recovered * torch.tensor(real.std).view(3, 1, 1)  # to [0, 1] pixel units
        stored = quantize_compensators(compensators, config.compensator_bits)
    manifest = describe_set(
        "infer",
        {"infer": asdict(config)},
        real,
        ipc,
        seed,
        made_by,
        ViewSettings(config.naturals_as_views, config.clip, config.view_encoding),
    )
    slot_of = torch.arange(slots).repeat_interleave(real.classes)
    # Prepared naturals come without their files.
    originals = None if config.naturals is not None else find_originals(real, draw_naturals(real, slots, seed))
    return DistilledSet(images, labels, slot_of, stored, None, manifest, originals=originals)


def recover_compensators(
    teachers: list[Teacher],
    naturals: Tensor | StoredImages,
    real: RealData,
    config: InferConfig,
    seed: int,
    plan: Plan,
    run: Run,
) -> Tensor:
    """Return each teacher's compensators, float32 [teachers, slots, 3, height, width] in units of the channels'
    deviation.

    naturals: uint8 [slots * classes, 3, height, width], slot by slot in class order; those of a pack of slots are
    looked at at a time. Raises StillroomError where a finished unit was made with other weights.
    """
    slots = len(naturals) // real.classes
    packs = [range(i, min(i + plan.pack_slots, slots)) for i in range(0, slots, plan.pack_slots)]

    def take(packed: range) -> Tensor:
        own = naturals[packed.start * real.classes : packed.stop * real.classes]
        return own.unflatten(0, (len(packed), -1))

    hashes = {packed: sha256_bytes([take(packed).numpy().data]) for packed in packs}  # a user's files can change
    tasks = [compensator_tasks(teacher, hashes, take, real, config, seed, plan, run) for teacher in teachers]
    made = iter(run.carry_out([task for own in tasks for task in own]))
    return torch.stack([torch.cat([next(made)[1]["compensators"] for _ in own]) for own in tasks])


def compensator_tasks(
    teacher: Teacher,
    packs: Mapping[range, str],
    take: Callable[[range], Tensor],
    real: RealData,
    config: InferConfig,
    seed: int,
    plan: Plan,
    run: Run,
) -> list[Task]:
    """Return the tasks of one teacher's compensators: one for each pack of slots, here with the hash of its naturals.

    take(pack): these, uint8 [slots, classes, 3, height, width].
    """

    @functools.cache  # compiled once per size of pack, and worth it by all of the teacher's steps
    def objective_of(slots: int) -> Objective:
        return objective_for(teacher.model, slots, config, plan, config.steps * len(packs))

    tasks = []
    for packed, images in packs.items():
        unit = f"compensators-{teacher.name.replace(':', '-')}-{packed.start}-{packed.stop}"
        made_by = {"teacher": teacher.name, "hash": teacher.hash, "slots": list(packed), "images": images}

        def make(packed: range = packed, unit: str = unit) -> dict[str, Tensor]:
            objective = objective_of(len(packed))
            return optimize_compensators(teacher, take(packed), packed, real, config, seed, plan, run, unit, objective)

        tasks.append(made_once(unit, made_by, f"compensators of {teacher.name!r}", make))
    return tasks


def begin_descent(naturals: Tensor, real: RealData, config: InferConfig, plan: Plan, objective: Objective) -> Descent:
    """Return Algorithm 1's inner loop for some slots at once: Adam on their compensators, from zero.

    naturals: uint8 [slots, classes, 3, height, width]; the compensators are float32 [slots, 3, height, width] in units
    of the channels' standard deviation. Each slot has its own statistics, loss and draws.
    """
    slots, classes, *shape = naturals.shape
    images = naturals.to(plan.device)
    labels = torch.arange(classes, device=plan.device).expand(slots, classes)

    def terms(step: int, compensators: Tensor, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        augments = [
            draw_augment(
                config.augmentation, draws, classes, real.image_size,
                shift_limit=config.shift_limit, per_image=config.per_image,
            )
            for draws in generators
        ]  # fmt: skip

        def form(tensor: Tensor, rows: slice) -> Tensor:
            pixels = apply_normalization(images[:, rows].flatten(0, 1), real.mean, real.std).unflatten(0, (slots, -1))
            views = pixels + tensor[:, None]  # Equation 2: [slots, rows, 3, height, width]
            batch = torch.cat([augment(own, rows) for own, augment in zip(views, augments, strict=True)])
            return batch.contiguous(memory_format=plan.memory_format)

        return objective(compensators, form, labels)

    start = torch.zeros(slots, *shape, device=plan.device)
    return Descent("compensators", start, terms, config.steps, config.learning_rate, config.betas, plan)


def optimize_compensators(
    teacher: Teacher,
    naturals: Tensor,
    packed: range,
    real: RealData,
    config: InferConfig,
    seed: int,
    plan: Plan,
    run: Run,
    unit: str,
    objective: Objective | None = None,
) -> dict[str, Tensor]:
    """Optimise the compensators of the slots `packed` for one teacher, all in one batch.

    naturals: uint8 [slots, classes, 3, height, width]. Returns on the CPU "compensators" float32 [slots, 3, height,
    width] in units of the channels' standard deviation, and "losses" float32 [steps, 2, slots]: label loss, weighted
    statistics loss. Raises StillroomError where a loss is not finite, TimeLimitReached where the run is to stop.
    """
    if objective is None:
        objective = objective_for(teacher.model, len(packed), config, plan, config.steps)
    descent = begin_descent(naturals, real, config, plan, objective)
    label = f"compensators {teacher.name} {packed.start}-{packed.stop - 1}"
    draws = [("compensators", teacher.name, slot) for slot in packed]
    remedy = f"lower infer.learning_rate (now {config.learning_rate})"
    made_by = sha256_bytes([teacher.hash.encode(), naturals.contiguous().numpy().data])
    losses = descend(descent, draws, seed, run, run.checkpoint(unit, made_by), label, remedy)
    run.event("compensators", teacher=teacher.name, slots=list(packed), losses=losses[-1].tolist())
    return {"compensators": descent.tensor.detach().cpu(), "losses": losses.cpu()}


def objective_for(model: nn.Module, slots: int, config: InferConfig, plan: Plan, calls: int) -> Objective:
    """Return Equation 3's two terms for `slots` slots by these settings; see `recover.build_objective`."""
    return build_objective(model, slots, config.first_layer_weight, config.statistics_weight, plan, calls)
