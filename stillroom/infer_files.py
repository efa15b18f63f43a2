"""INFER's published files: a set written as its scripts write one, and read back as naturals and compensators.

    new000/class000_id000.jpg    JPEG of quality 75; block `id // slots` is 0 for naturals, then one for each teacher

A natural is published as it is, a compensator only by the views that it gives, so reading estimates it and measures
how well the estimate reproduces them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stillroom.artifact import to_pixels
from stillroom.distilled import JPEG_QUALITY, DistilledSet, quantize_compensators
from stillroom.errors import StillroomError
from stillroom.manifest import TeacherFacts, ViewSettings
from stillroom.readers import FileImages

# The blocks of INFER's published files. Confessed: the paper calls the fourth ShuffleNetV2; the scripts' is version 1.
PUBLISHED_TEACHERS = ("resnet18", "mobilenet_v2", "efficientnet_b0", "shufflenet_v1")

NUMBERED_FILE = re.compile(r"class(\d+)_id(\d+)\.\w+")
EDGE = 8  # levels of 255: how near to 0 or 255 JPEG may leave a pixel that was clipped
EXPLAINED = 0.5  # share of the views' differences to the naturals that compensators explain in a set of INFER's
BLOCK = 256  # views that are formed at once


def write_infer(distilled: DistilledSet, folder: Path) -> list[str]:
    """Write ``new{class:03d}/class{class:03d}_id{id:03d}.jpg``, ``id // slots`` being 0 for naturals, then a teacher.

    Pixels are cut to [0, 1], floored to 8 bits and saved at quality 75, naturals too, as the published scripts do;
    naturals that are such files already are written as they are.
    """
    manifest, classes = distilled.manifest, len(distilled.manifest.class_names)
    if not manifest.views.naturals_as_views:
        raise StillroomError(
            "--to infer: naturals are no views of this set, but that layout trains on them; use folder"
        )
    if classes > 1000:
        raise StillroomError(f"--to infer: {classes} classes do not sort by three digits; use --to folder")
    slots = int(distilled.slots.max()) + 1
    places = distilled.labels * slots + distilled.slots
    if len(places) != classes * slots or len(places.unique()) != len(places):
        raise StillroomError(f"--to infer: not every class has one image in each of {slots} slots; use --to folder")
    for label in range(classes):
        (folder / f"new{label:03d}").mkdir()
    count = len(distilled.images)
    kept = distilled.image_files if manifest.image_encoding == "jpeg75" else None
    # Encoded once, here, whatever the views' own encoding.
    exact = replace(manifest, views=replace(manifest.views, view_encoding="exact"))
    distilled = replace(distilled, manifest=exact)
    for rows in torch.arange(distilled.view_count).split(BLOCK):
        for row, view in zip(rows.tolist(), distilled.form_views(rows), strict=True):
            block, image = divmod(row, count)
            label, number = int(distilled.labels[image]), block * slots + int(distilled.slots[image])
            path = folder / f"new{label:03d}" / f"class{label:03d}_id{number:03d}.jpg"
            if block == 0 and kept is not None:
                path.write_bytes(kept[image])
            else:
                pixels = (view.clamp(0, 1) * 255).floor().to(torch.uint8)
                Image.fromarray(to_pixels(pixels)).save(path, "JPEG", quality=JPEG_QUALITY)
    names = [] if distilled.compensators is None else [teacher.name for teacher in manifest.teachers]
    back = f"; to read it back: stillroom import DIR --teachers {' '.join(names)} --data.source ..." if names else ""
    cut = ["pixels are cut to [0, 1] and rounded down to 8 bits"] if manifest.image_encoding == "float16" else []
    kind = manifest.label_kind
    lost = [
        f"its {kind} labels are not written: that layout has none, and its scripts label by teachers of their own; "
        "--to folder and --to npz keep them"
    ]
    if distilled.soft_labels is None:
        lost = []
    return [*cut, *lost, f"{slots} slots, blocks: {', '.join(['naturals', *names])}{back}"]


def find_blocks(files: FileImages, labels: np.ndarray, class_names: Sequence[str], teachers: Sequence[str]) -> Tensor:
    """Return int64 [teachers + 1, slots, classes]: the file of each view, the naturals' block first.

    labels: int64 [files], of `class_names`. Raises StillroomError where a file is not named as INFER's are, classes do
    not all have the ids 0 ... n-1, or these are no equal blocks of naturals and views of so many teachers.
    """
    ids: dict[int, dict[int, int]] = {}
    for row, (path, label) in enumerate(zip(files.paths, labels.tolist(), strict=True)):
        match = NUMBERED_FILE.fullmatch(path.rpartition("/")[2])
        if match is None:
            raise StillroomError(
                f"import: {files.name(row)} is not named as INFER's files are, class000_id000.jpg; try --layout folder"
            )
        if int(match[2]) in ids.setdefault(label, {}):
            raise StillroomError(f"import: {files.name(row)} has an id that another file of its class has too")
        ids[label][int(match[2])] = row
    count, blocks = max(len(own) for own in ids.values()), len(teachers) + 1
    for label, own in sorted(ids.items()):
        missing = sorted(set(range(count)) - own.keys())
        if missing:
            raise StillroomError(
                f"import: class {label} ({class_names[label]!r}) lacks the ids {missing[:5]} of 0 to {count - 1}; "
                "fetch the set again"
            )
    if count % blocks:
        raise StillroomError(
            f"import: {count} files per class are no {blocks} equal blocks, naturals and {len(teachers)} "
            "teachers; name the set's own teachers with --teachers"
        )
    rows = torch.tensor([[ids[label][number] for label in range(len(class_names))] for number in range(count)])
    return rows.unflatten(0, (blocks, count // blocks))


def estimate_compensator(naturals: Tensor, views: Tensor) -> Tensor:
    """Return the compensator of one teacher and slot, float32 [3, height, width] in [0, 1] pixel units.

    naturals, views: uint8 [classes, 3, height, width], the views being clip(natural + compensator) (Equation 2). Each
    pixel is the mean of view - natural over the classes where neither is at the clip edge (within 8 levels, as JPEG
    moves them), in which the noise of their files averages out; where all are, the difference of largest magnitude,
    since clipping only ever makes them smaller. What the scripts lose by rounding down stays in it, so that the views
    are reproduced, and the compensator is 0 to 1 level too low. JPEG's loss of fine colour is the same in every class
    and does not average out: of random compensators of 20 levels, 3 x 3 smooth, on 100 classes of CIFAR-100, the
    estimates are 10 levels off, and the published views are reproduced within 6.
    """
    clear = (naturals >= EDGE) & (naturals <= 255 - EDGE) & (views >= EDGE) & (views <= 255 - EDGE)
    difference = (views.float() - naturals.float()) / 255  # [classes, 3, height, width]
    mean = (difference * clear).sum(0) / clear.sum(0).clamp_min(1)
    largest = difference.gather(0, difference.abs().argmax(0, keepdim=True))[0]
    return torch.where(clear.any(0), mean, largest)


def recover_compensators(plain: DistilledSet, blocks: Tensor, teachers: Sequence[str]) -> DistilledSet:
    """Return the set of naturals and compensators that the images of `plain`, at `blocks` (`find_blocks`), came from.

    Measures go with it, in ``manifest.extra["import"]``: `explained` is the share of what the views differ from the
    naturals, in squares, that the estimates reproduce.
    """
    slots, classes = blocks.shape[1:]
    images, naturals = plain.images, blocks[0]
    compensators = torch.stack(
        [
            torch.stack([estimate_compensator(images[naturals[k]], images[own[k]]) for k in range(slots)])
            for own in blocks[1:]
        ]
    )
    order = naturals.flatten()  # slot by slot in class order
    files = None if plain.image_files is None else tuple(plain.image_files[row] for row in order.tolist())
    manifest = replace(
        plain.manifest,
        method=plain.manifest.method if plain.manifest.method != "imported" else "infer",
        # Ceiling of K (C + M) / C, the images that naturals and compensators count as (Section 4.1).
        ipc=-(-slots * (classes + len(teachers)) // classes),
        # Neither accuracy nor weights of these teachers are published with the files.
        teachers=tuple(TeacherFacts(name, 0.0, "") for name in teachers),
        views=ViewSettings(naturals_as_views=True, clip=True),
    )
    recovered = DistilledSet(
        images[order],
        plain.labels[order],
        torch.arange(slots).repeat_interleave(classes),
        quantize_compensators(compensators, 16),
        None if plain.soft_labels is None else plain.soft_labels[blocks.flatten()],
        manifest,
        files,
    )
    rows = torch.arange(slots * classes, blocks.numel())
    total, squares, differences, largest = 0.0, 0.0, 0.0, 0.0
    for part in rows.split(BLOCK):
        published = images[blocks.flatten()[part]].float() / 255
        errors = (recovered.form_views(part) - published).abs()
        start = recovered.images[recovered.view_table()[part, 0]].float() / 255
        total, squares = total + float(errors.sum()), squares + float(errors.square().sum())
        differences, largest = (
            differences + float((published - start).square().sum()),
            max(largest, float(errors.max())),
        )
    mean = 255 * total / (len(rows) * images[0].numel())
    explained = 1 - squares / max(differences, 1e-12)
    note = (
        f"compensators are estimated, by the mean of view - natural over the classes where neither is clipped; the "
        f"views they give differ from the published ones by {mean:.1f} of 255 levels on average, {255 * largest:.0f} "
        f"at most, and explain {explained:.0%} of what the views differ from the naturals"
    )
    doubt = [f"less than {EXPLAINED:.0%}, so this may be no set of INFER's: try --layout folder"]
    facts = plain.manifest.extra["import"]
    measures = {"layout": "infer", "mean_error": mean, "largest_error": 255 * largest, "explained": explained}
    notes = [*facts["notes"], note, *(doubt if explained < EXPLAINED else [])]
    return replace(recovered, manifest=replace(manifest, extra={"import": facts | measures | {"notes": notes}}))
