"""What a recipe leaves open, chosen for the user's images and machine: `stillroom run own --data.source FOLDER`.

    fitted, why = fit_recipe(find_recipe("own"), look_at(recipe.data), device="cpu", cores=2)

Nothing is timed, so the same images on the same machine get the same settings. How fast a machine is, is a coarse rule;
`--dry-run` times the steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillroom.data import Look, count_held_out
from stillroom.errors import StillroomError
from stillroom.labels import count_label_bytes
from stillroom.methods.infer import slot_count
from stillroom.networks import build_network
from stillroom.pipeline import LARGEST_SHARE, LEAST_SIGHTS
from stillroom.recipes import Recipe

# The settings that are chosen, unless the user says them.
OPEN = (
    "data.image_size", "data.holdout_share", "teachers.networks", "teachers.epochs", "ipc", "infer.steps",
    "student.network", "student.train.epochs", "student.dynamic_epochs",
)  # fmt: skip

# Values that nobody gives, by which what was said is told from what was not. A share beside --data.holdout-per-class
# would be refused, so that its default stands for "not said".
OTHERS = {
    path: ("no network",) if path == "teachers.networks" else "no network" if path == "student.network" else 4093
    for path in OPEN
    if path != "data.holdout_share"
}

SIDES = (224, 128, 96, 64, 32)
BUDGETS = (50, 20, 10, 5, 3, 2, 1)  # images per class
HELD_OUT, MOST_TESTS = 0.2, 10_000  # of each class, where there is no test split; of all classes together
THIN, FULL = ("resnet10_thin", "convnet_thin"), ("resnet18", "mobilenet_v2")  # the last trains students on a CPU

# FLOPs per second that training reaches: thin networks 130 to 290 billion on one AVX512-bf16 core (docs/log.md), of
# which half is taken, since other processors have no bfloat16; cards were not measured.
CORE_SPEED, MOST_CORES = 1e11, 8  # beyond which small networks gain little
CARD_SPEED = {"cuda": 1e13, "mps": 1e12}
TARGET_SECONDS = 1800.0

TEACHER_PASSES = 500_000  # images in all epochs, at most: CIFAR-100's ten
RECOVERY_PASSES = 50_000  # images in all steps of a teacher's compensators
LEAST_STUDENT = 200 * 64  # images that a student sees, however few the classes: 200 steps
STUDENT_SIGHTS = 30_000  # shared by the classes, but between twice what is worth it, and what gave most (docs/log.md)
CARD_FACTOR = 10  # as many steps on a card


@dataclass(frozen=True)
class _Set:
    """What the distilled set would hold: whole images, compensators, views."""

    images: int
    compensators: int
    views: int


def fit_recipe(
    recipe: Recipe, look: Look, device: str, cores: int, said: Mapping[str, Any] | None = None
) -> tuple[Recipe, list[str]]:
    """Return `recipe` with the settings in OPEN chosen, and why, a sentence each.

    said: those of them that the user gave, which stay, and by which the others are chosen. Images are as large as the
    photographs and half an hour by the coarse rule allow; the budget is as large as the rarest class and a third of the
    bytes allow. Raises StillroomError where the rarest class has too few images for any budget.
    """
    said, kind = said or {}, device.split(":")[0]
    share = _holdout_share(recipe, look)
    fitted = with_settings(recipe, {"data.holdout_share": share} | dict(said))
    if said.get("data.image_size", 0) is None:
        raise StillroomError("data.image_size is None; give a number of pixels, or leave it out to have it chosen")
    counts = _training_counts(fitted, look)
    if not counts.min():
        raise StillroomError(
            f"class {look.class_names[int(counts.argmin())]!r} has no training image left once some are held out; "
            "hold fewer out, or add images to it"
        )
    short = int(np.quantile(look.short_sides, 0.1))
    sides = [side for side in SIDES if side <= max(short, SIDES[-1])]
    if "data.image_size" in said:
        sides = [said["data.image_size"]]
    speed = CARD_SPEED.get(kind) or CORE_SPEED * min(cores, MOST_CORES)
    for side in sides:
        chosen = _choose(fitted, counts, look, side, kind != "cpu", said)
        if _count_work(chosen, counts) <= TARGET_SECONDS * speed:
            break
    return chosen, _reasons(chosen, counts, look, side == sides[0], kind, cores)


def with_settings(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Return `recipe` with settings changed that are named by their path, such as "student.train.epochs"."""

    def change(settings: Any, prefix: str) -> Any:
        found = {}
        for field in fields(settings):
            path, value = f"{prefix}{field.name}", getattr(settings, field.name)
            if path in values:
                found[field.name] = values[path]
            elif is_dataclass(value) and any(name.startswith(f"{path}.") for name in values):
                found[field.name] = change(value, f"{path}.")
        return replace(settings, **found)

    return change(recipe, "")


def open_settings(recipe: Recipe) -> dict[str, Any]:
    """Return what `recipe` has for the settings in OPEN, by their paths."""
    return {path: functools.reduce(getattr, path.split("."), recipe) for path in OPEN}


def find_said(parse: Callable[[Recipe], Recipe], recipe: Recipe) -> dict[str, Any]:
    """Return which settings in OPEN `parse` gives whatever it begins from: those that words and files say.

    parse: settings -> the settings with what was said laid over them.
    """
    once, again = (open_settings(parse(with_settings(recipe, values))) for values in ({}, OTHERS))
    return {path: value for path, value in once.items() if value == again[path] and path in OTHERS} | {
        path: value for path, value in once.items() if path not in OTHERS and value != open_settings(recipe)[path]
    }


def summarise(recipe: Recipe) -> str:
    """Return in one line what `recipe` has for the settings in OPEN."""
    train = recipe.student.train
    return (
        f"{recipe.data.image_size} pixels, {recipe.method} at ipc {recipe.ipc}, teachers "
        f"{' '.join(recipe.teachers.networks)} ({recipe.teachers.train.epochs} epochs, at least "
        f"{recipe.teachers.least_steps} steps), students {recipe.student.network} ({train.epochs} epochs)"
    )


def _holdout_share(recipe: Recipe, look: Look) -> float:
    if look.has_test or recipe.data.holdout_per_class:
        return 0.0
    return max(0.01, round(min(HELD_OUT, MOST_TESTS / sum(look.counts)), 2))


def _training_counts(recipe: Recipe, look: Look) -> np.ndarray:
    """Training images of each class that are left once some are held out."""
    counts = np.array(look.counts)
    if recipe.data.holds_out:
        counts = np.maximum(counts - count_held_out(counts, recipe.data), 0)
    return counts if recipe.data.train_per_class is None else np.minimum(counts, recipe.data.train_per_class)


def _choose(recipe: Recipe, counts: np.ndarray, look: Look, side: int, card: bool, said: Mapping[str, Any]) -> Recipe:
    """Return `recipe` with the settings in OPEN for images of `side` pixels."""
    classes, images, more = len(counts), int(counts.sum()), CARD_FACTOR if card else 1
    networks = FULL if card else THIN
    values: dict[str, Any] = {
        "data.image_size": side,
        "teachers.networks": networks,
        "teachers.epochs": min(20, max(1, more * TEACHER_PASSES // images)),
        "student.network": networks[0 if card else -1],
    }
    recipe = with_settings(recipe, values | dict(said))
    ipc = said.get("ipc") or _largest_budget(recipe, counts, look)
    if "teachers.networks" not in said and recipe.method == "infer" and ipc * classes < 2 * (classes + 2):
        # Of so small a budget two teachers' compensators would leave one image per class.
        recipe = with_settings(recipe, {"teachers.networks": networks[-1:]})
        ipc = said.get("ipc") or _largest_budget(recipe, counts, look)
    held = _hold(recipe, classes, ipc)
    if held is None:  # which is refused when the run begins, by what the method needs
        return with_settings(recipe, {"ipc": ipc})
    sights = min(max(STUDENT_SIGHTS // classes, 2 * LEAST_SIGHTS), 6 * LEAST_SIGHTS)
    epochs = max(1, round(more * max(LEAST_STUDENT, sights * classes) / held.views))
    steps = {"infer.steps": min(max(more * RECOVERY_PASSES // held.images, 30), 150 * more)}
    trained = {"ipc": ipc, "student.train.epochs": epochs, "student.dynamic_epochs": max(1, epochs // 2)}
    return with_settings(recipe, steps | trained | dict(said))


def _largest_budget(recipe: Recipe, counts: np.ndarray, look: Look) -> int:
    """Return the largest of BUDGETS that the rarest class and the bytes allow, or else the smallest that works."""
    classes, rarest = len(counts), int(counts.min())
    working = [ipc for ipc in BUDGETS if ipc <= rarest and _hold(recipe, classes, ipc) is not None]
    if not working:
        least = min(ipc for ipc in BUDGETS if _hold(recipe, classes, ipc) is not None)
        left = " after some are held out for testing" if recipe.data.holds_out else ""
        raise StillroomError(
            f"class {look.class_names[int(counts.argmin())]!r} has {rarest} training image{'s' * (rarest != 1)}{left}, "
            f"but {recipe.method!r} needs {least} of each class at least; add images to it, or leave it out"
        )
    return next((ipc for ipc in working if _share(recipe, counts, ipc) <= LARGEST_SHARE), working[-1])


def _hold(recipe: Recipe, classes: int, ipc: int) -> _Set | None:
    """Return what a set of this budget holds; None where the method can make none."""
    if recipe.method != "infer":
        return _Set(ipc * classes, 0, ipc * classes)
    makers = len(recipe.infer.teachers or recipe.teachers.networks) if recipe.infer.compensators else 0
    try:
        slots = slot_count(ipc, classes, len(recipe.infer.teachers or recipe.teachers.networks))
    except StillroomError:
        return None
    return _Set(slots * classes, slots * makers, slots * classes * (makers + recipe.infer.naturals_as_views))


def _share(recipe: Recipe, counts: np.ndarray, ipc: int) -> float:
    """The share of the real images' bytes that the set would take, as `pipeline.doubt_budget` counts it."""
    held, side = _hold(recipe, len(counts), ipc), recipe.data.image_size
    assert held is not None
    assert side is not None
    batch = recipe.student.train.batch_size
    labels = [count_label_bytes(kind, held.views, len(counts), recipe.pool, batch) for kind in recipe.labels]
    pixels = held.images + held.compensators * recipe.infer.compensator_bits / 8
    return float((pixels + max(labels) / (3 * side**2)) / counts.sum())


def _count_work(recipe: Recipe, counts: np.ndarray) -> float:
    """FLOPs of the whole recipe: its teachers, its set and its students, controls among them."""
    classes, side, held = len(counts), recipe.data.image_size, _hold(recipe, len(counts), recipe.ipc)
    if held is None:
        return 0.0
    assert side is not None
    passes = dict.fromkeys((*recipe.teachers.networks, recipe.student.network), 0.0)
    images = int(counts.sum())
    for name in recipe.teachers.networks:
        if recipe.teachers.source == "train":
            passes[name] += recipe.teachers.steps_for(images) * min(recipe.teachers.train.batch_size, images)
        passes[name] += held.images * getattr(recipe.method_config, "steps", 0)
    # A kind of label trains its own set, and two or three controls at equal steps and at equal epochs.
    trainings = 1.0 + (recipe.controls and 2 + 2 * recipe.ipc * classes / held.views)
    trainings += recipe.controls and held.compensators > 0 and 1 + held.images / held.views
    epochs = sum(recipe.student.train_for(kind).epochs for kind in recipe.labels)
    passes[recipe.student.network] += len(recipe.seeds) * epochs * held.views * trainings
    # A backward pass takes twice the forward one.
    return sum(3 * count_flops(name, classes, side) * number for name, number in passes.items())


@functools.cache
def count_flops(network: str, classes: int, side: int) -> int:
    """Return the FLOPs of the convolutions and linear layers in a forward pass of one image through `network`."""
    model, found = build_network(network, classes, side).eval(), 0

    def count(layer: Any, inputs: Any, output: Tensor) -> None:
        nonlocal found
        found += 2 * output.numel() * layer.weight[0].numel()

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, 3, side, side))
    return found


def _reasons(
    recipe: Recipe, counts: np.ndarray, look: Look, as_large_as_photographs: bool, kind: str, cores: int
) -> list[str]:
    sides, rarest = look.short_sides, int(counts.argmin())
    machine = f"{cores} core{'s' * (cores > 1)}" if kind == "cpu" else kind
    each = f"{counts.min():,}" if counts.min() == counts.max() else f"{counts.min():,} to {counts.max():,}"
    reasons = [
        f"for {len(counts)} classes of {each} training images, whose short sides have {min(sides)} to {max(sides)} "
        f"pixels, and for {machine}: {summarise(recipe)}; flags change any of it"
    ]
    if not as_large_as_photographs:
        reasons.append(f"--data.image-size: larger images may take more than half an hour on {machine}")
    if recipe.data.holdout_share:
        reasons.append(
            f"--data.holdout-share: there is no test split, so it is the last {recipe.data.holdout_share:.0%} of each "
            "class"
        )
    larger = next((ipc for ipc in reversed(BUDGETS) if ipc > recipe.ipc), None)
    if larger is not None and larger > counts[rarest]:
        name = look.class_names[rarest]
        reasons.append(
            f"--ipc: the rarest class, {name!r} with {counts[rarest]} training images, limits all to {recipe.ipc}"
        )
    elif larger is not None and _share(recipe, counts, larger) > LARGEST_SHARE:
        reasons.append(f"--ipc: {larger} would take more than {LARGEST_SHARE:.0%} of the images' bytes")
    return reasons
