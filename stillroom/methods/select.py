"""Selection: distilled sets made of real images as they are. `random` is the control beside every method.

INFER's naturals come from here too, by the same draw: its K naturals per class are the first K of the random control's
ipc, so that the two differ in what INFER adds and not in luck.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.artifact import StoredImages, hold_images
from stillroom.compute import Plan, build_generator
from stillroom.data import RealData, describe_real
from stillroom.distilled import DistilledSet, Originals
from stillroom.errors import StillroomError
from stillroom.files import sha256_bytes
from stillroom.manifest import Manifest, Normalization, TeacherFacts, ViewSettings
from stillroom.run import Run, Task
from stillroom.teachers import Teacher

SCORING_BATCH = 256  # images, or crops, that a teacher looks at in one pass


@dataclass(frozen=True)
class RandomConfig:
    """Random images need no settings."""


@dataclass(frozen=True)
class Content:
    """What a set holds: how many images and compensators, bits of a compensator's value, and views.

    image_bits: of a pixel's value, 16 where images are float16. learned_labels: whether each view has a label that the
    method learned.
    """

    images: int
    compensators: int
    compensator_bits: int
    views: int
    image_bits: int = 8
    learned_labels: bool = False


def whole_images(real: RealData, teachers: int, ipc: int, config: Any) -> Content:
    """Return the content of a set of `ipc` images per class and nothing else."""
    return Content(ipc * real.classes, 0, 0, ipc * real.classes)


def rows_by_class(real: RealData, per_class: int) -> list[Tensor]:
    """Return each class's positions in the training split, int64, ascending.

    Raises StillroomError where a class has fewer than `per_class` images, naming it.
    """
    rows = [(real.train.labels == index).nonzero().flatten() for index in range(real.classes)]
    short = {name: len(own) for name, own in zip(real.class_names, rows, strict=True) if len(own) < per_class}
    if short:
        shown = ", ".join(f"{name!r} has {count}" for name, count in list(short.items())[:5])
        raise StillroomError(
            f"{per_class} images per class are needed, but {shown}"
            f"{f' and {len(short) - 5} more classes are short' if len(short) > 5 else ''}; "
            "lower --ipc, or add images to these classes"
        )
    return rows


def draw_naturals(real: RealData, per_class: int, seed: int) -> Tensor:
    """Return int64 [per_class, classes]: positions in the training split, without replacement, one per slot and class.

    Each class's order is a draw of its own, so asking for more keeps what fewer gave. Raises StillroomError where a
    class has fewer than `per_class` images, naming it.
    """
    columns = []
    for index, rows in enumerate(rows_by_class(real, per_class)):
        order = torch.randperm(len(rows), generator=build_generator(seed, "naturals", index))
        columns.append(rows[order[:per_class]])
    return torch.stack(columns, dim=1)


def take_naturals(real: RealData, chosen: Tensor) -> tuple[Tensor | StoredImages, Tensor]:
    """Return images uint8 [slots * classes, 3, height, width] and labels int64, slot by slot in class order.

    Many large images stay where the real data has them, and are decoded when they are asked for.
    """
    flat = chosen.flatten()
    shape = [len(flat), 3, real.image_size, real.image_size]
    return hold_images(shape, lambda rows: real.train.batch(flat[rows]).cpu()), real.train.labels[flat]


def find_originals(real: RealData, chosen: Tensor) -> Originals:
    """Return where the files of take_naturals' images are read, for DistilledSet; chosen: as there."""
    flat = chosen.flatten()
    return lambda rows: real.train.originals(flat[rows])


def describe_set(
    method: str,
    settings: dict[str, Any],
    real: RealData,
    ipc: int,
    seed: int,
    teachers: list[Teacher],
    views: ViewSettings,
) -> Manifest:
    """Return the manifest of a set that `method` made."""
    return Manifest(
        method=method,
        recipe=settings,
        dataset=describe_real(real),
        class_names=real.class_names,
        normalization=Normalization(real.mean, real.std),
        image_size=(real.image_size, real.image_size),
        ipc=ipc,
        teachers=tuple(TeacherFacts(t.name, 100 * t.accuracy["top1"], t.hash) for t in teachers),
        seeds={"distill": seed},
        extra={"skipped_images": len(real.skipped_images)} if real.skipped_images else {},
        views=views,
    )


def choose_by_class(
    teacher: Teacher, classes: int, choose: Callable[[int], Tensor], method: str, settings: Sequence[Any], run: Run
) -> Tensor:
    """Return ``choose(0), choose(1), ...`` stacked: int64 [classes, ...], what is taken from each class, best first.

    One unit of work, which sets of one comparison share whose `settings` are equal: as many are ranked whatever the
    budget. Its checkpoint holds the classes that are done. Raises StillroomError where these were chosen with other
    weights of the teacher, TimeLimitReached where the run is to stop.
    """
    run, unit = run.shared, f"{method}-{sha256_bytes(json.dumps(settings).encode())[:8]}"

    def fits(made: dict[str, Any]) -> bool:
        if made["hash"] != teacher.hash:
            raise StillroomError(
                f"{unit!r} was begun with other weights of {teacher.name!r} ({made['hash'][:12]}, now "
                f"{teacher.hash[:12]}); give another directory with --out"
            )
        return True

    def make() -> tuple[dict[str, Any], dict[str, Tensor]]:
        checkpoint = run.checkpoint(unit)
        kept, made = checkpoint.load() or ({}, {"hash": teacher.hash})
        fits(made)
        chosen = list(kept.get("chosen", ()))
        with run.progress(unit, classes, len(chosen)) as advance:
            for index in range(len(chosen), classes):
                chosen.append(choose(index))
                advance()
                if index < classes - 1 and (checkpoint.due or run.stopping):
                    checkpoint.save({"chosen": torch.stack(chosen)}, made)
                    if run.stopping:
                        raise run.stop()
        return made, {"chosen": torch.stack(chosen)}

    [(_, tensors)] = run.carry_out([Task(unit, make, fits)])
    return tensors["chosen"]


def check_random(real: RealData, networks: Mapping[str, nn.Module], ipc: int, config: RandomConfig) -> int:
    """Return the real images per class that are taken: `ipc`. Any networks will do, and none."""
    return ipc


def distill_random(
    real: RealData, teachers: list[Teacher], ipc: int, config: RandomConfig, seed: int, plan: Plan, run: Run
) -> DistilledSet:
    """Return `ipc` random real images per class. The teachers only label it, later, and are recorded."""
    chosen = draw_naturals(real, ipc, seed)
    images, labels = take_naturals(real, chosen)
    slots = torch.arange(ipc).repeat_interleave(real.classes)
    manifest = describe_set("random", {"random": asdict(config)}, real, ipc, seed, teachers, ViewSettings())
    return DistilledSet(images, labels, slots, None, None, manifest, originals=find_originals(real, chosen))
