"""What compensators are: as pictures (Figures 3, 6, 7), their losses, and what each layer's statistics contribute."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor

from stillroom.arrays import Compensators, Layers, Losses, Views, spell_pixels
from stillroom.compute import build_generator
from stillroom.distilled import DistilledSet, dequantize_compensators
from stillroom.errors import StillroomError
from stillroom.files import break_seal, load_tensors
from stillroom.methods.recover import LayerMoments, Recorder, statistics_distance
from stillroom.study import Study
from stillroom.train import apply_normalization

SLOTS = 6  # shown, at most
SHOWN_CLASSES = 4
LOSS_POINTS = 200  # of a curve, at most


def show_compensators(study: Study) -> Compensators:
    """Return the compensators of the first slots by teacher, each stretched to the visible range."""
    distilled = study.compensated().distilled
    values = _offsets(distilled)[:, :SLOTS]
    pictures, largest = stretch(values)
    return Compensators(
        dataset=distilled.manifest.dataset.name,
        teacher=np.array([teacher.name for teacher in distilled.manifest.teachers]),
        slot=np.arange(values.shape[1]),
        largest=largest.numpy(),
        pixels=spell_pixels(pictures.numpy()),
    )


def stretch(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return pictures uint8 of `values` float32 [..., 3, height, width], and the largest magnitude of each [...].

    0 becomes mid-gray, the largest magnitude black or white.
    """
    largest = values.abs().amax(dim=(-3, -2, -1))
    scale = largest.clamp_min(torch.finfo(torch.float32).tiny)[..., None, None, None]
    return (127.5 + 127.5 * values / scale).round().to(torch.uint8), largest


def show_views(study: Study) -> Views:
    """Return naturals of four random classes in the first slot, their compensators and the views that they make."""
    distilled = study.compensated().distilled
    manifest, offsets = distilled.manifest, _offsets(distilled)
    slot, slots = 0, offsets.shape[1]
    own = (distilled.slots == slot).nonzero().flatten()
    order = torch.randperm(len(own), generator=build_generator(study.config.draw, "figure", "views"))
    chosen = own[order[:SHOWN_CLASSES].sort().values]
    naturals = distilled.images[chosen]
    pixels = [(naturals.float() * (255 if naturals.is_floating_point() else 1)).clamp(0, 255).round().to(torch.uint8)]
    table = distilled.view_table()
    for teacher in range(len(offsets)):
        rows = [((table[:, 0] == i) & (table[:, 1] == teacher * slots + slot)).nonzero().item() for i in chosen]
        views = distilled.form_views(torch.tensor(rows))
        pixels.append((255 * views).clamp(0, 255).round().to(torch.uint8))
    stretched, largest = stretch(offsets[:, slot])
    first = torch.cat([torch.full_like(stretched[:1], 255), stretched])[None]  # [1, pictures, 3, height, width]
    pictures = torch.cat([first, torch.stack(pixels, dim=1)])
    return Views(
        dataset=manifest.dataset.name,
        slot=slot,
        line=np.array(["compensator", *(manifest.class_names[distilled.labels[i]] for i in chosen)]),
        picture=np.array(["natural", *(teacher.name for teacher in manifest.teachers)]),
        largest=np.array([0.0, *largest.tolist()]),
        pixels=spell_pixels(pictures.numpy()),
    )


def read_losses(study: Study) -> Losses:
    """Return the losses that the run kept while it optimised compensators, at 200 steps at most.

    Raises StillroomError where its units are gone, or the set came from elsewhere.
    """
    made = study.compensated()
    manifest = made.distilled.manifest
    found: dict[tuple[str, int], Tensor] = {}
    for path in sorted((made.run / "units").glob("compensators-*.safetensors")):
        tensors, sealed = load_tensors(path)
        said = break_seal(sealed, tensors, path)
        span = re.search(r"-(\d+)-(\d+)$", path.stem)
        assert span is not None
        for position, slot in enumerate(range(int(span[1]), int(span[2]))):
            found[said["teacher"], slot] = tensors["losses"][:, :, position]
    names = [teacher.name for teacher in manifest.teachers]
    slots = sorted({slot for _, slot in found})
    if not found or set(found) != {(name, slot) for name in names for slot in slots}:
        raise StillroomError(
            f"{made.run} does not hold the losses of its compensators (units/compensators-*); distil the set anew in a "
            "new directory: stillroom distill RECIPE --method infer --out DIR"
        )
    curves = torch.stack([torch.stack([found[name, slot] for slot in slots]) for name in names])
    steps = torch.linspace(0, curves.shape[2] - 1, min(LOSS_POINTS, curves.shape[2])).round().long()
    return Losses(
        dataset=manifest.dataset.name,
        statistics_weight=float(manifest.recipe["infer"]["statistics_weight"]),
        teacher=np.array(names),
        slot=np.array(slots),
        step=steps.numpy(),
        label=curves[:, :, steps, 0].numpy(),
        statistics=curves[:, :, steps, 1].numpy(),
    )


def measure_layers(study: Study) -> Layers:
    """Return each BatchNorm's part of the statistics loss (Equation 4) on the first slots' naturals and their views.

    Weighted as in the loss, the first layer more; without augmentation, unclipped, in float32. Raises StillroomError
    for a set whose manifest does not say how it was optimised.
    """
    made = study.compensated()
    distilled, manifest = made.distilled, made.distilled.manifest
    if "infer" not in manifest.recipe:
        raise StillroomError(
            f"the set in {made.run} does not say by what weights it was optimised; distil one by infer"
        )
    weights = manifest.recipe["infer"]
    offsets = _offsets(distilled)[:, :SLOTS]
    names, numbers, before, after = [], [], [], []
    for index, facts in enumerate(manifest.teachers):
        teacher = next(teacher for teacher in study.teachers if teacher.name == facts.name)
        recorder = Recorder(teacher.model, groups=1).to(study.plan.device)
        columns = []
        for slot in range(offsets.shape[1]):
            images = distilled.images[distilled.slots == slot].to(study.plan.device)
            pixels = images.float() / (255 if images.dtype == torch.uint8 else 1)
            both = []
            for views in (pixels, pixels + offsets[index, slot].to(study.plan.device)):
                normal = apply_normalization(views, manifest.normalization.mean, manifest.normalization.std)
                with torch.no_grad():
                    _, layers = recorder(normal)
                both.append(layer_distances(layers, weights["first_layer_weight"], weights["statistics_weight"]))
            columns.append(both)
        table = np.array(columns)  # [slots, 2, layers]
        names += [facts.name] * table.shape[2]
        numbers += list(range(1, table.shape[2] + 1))
        before.append(table[:, 0].T)
        after.append(table[:, 1].T)
    return Layers(
        dataset=manifest.dataset.name,
        teacher=np.array(names),
        number=np.array(numbers),
        slot=np.arange(offsets.shape[1]),
        before=np.concatenate(before),
        after=np.concatenate(after),
    )


def layer_distances(layers: list[LayerMoments], first_layer_weight: float, statistics_weight: float) -> list[float]:
    """Return the terms of `recover.statistics_loss` of one group, weighted, in the order the layers run."""
    parts = [statistics_weight * statistics_distance(moments).item() for moments in layers]
    return [first_layer_weight * parts[0], *parts[1:]]


def _offsets(distilled: DistilledSet) -> Tensor:
    assert distilled.compensators is not None
    return dequantize_compensators(distilled.compensators)
