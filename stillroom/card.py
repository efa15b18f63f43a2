"""What a distilled set shows of itself: its byte budget, its dataset card (README.md) and its contact sheet."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

from stillroom.claims import Claim
from stillroom.manifest import NOT_STATED, Manifest

PARTS = ("images", "compensators", "labels")
SHEET_CELLS = 10  # rows of naturals, and columns, at most
SHEET_SIDE = 64  # pixels of a cell, about


@dataclass(frozen=True)
class Budget:
    """Bytes of a distilled set beside those of the real one. `raw` and `stored` map images, compensators and labels.

    Raw: pixels, compensators as stored and label logits, against the real set's uint8 pixels. Stored: file sizes
    against file sizes (class indices lie in the images' file). The card and the manifest count on neither side.
    """

    raw: dict[str, int]
    stored: dict[str, int]
    real_raw_bytes: int
    real_stored_bytes: int
    paper_ratio: float

    @property
    def raw_ratio(self) -> float:
        """Raw bytes over the real set's raw bytes."""
        return sum(self.raw.values()) / self.real_raw_bytes

    @property
    def stored_ratio(self) -> float:
        """Stored bytes over the real set's stored bytes."""
        return sum(self.stored.values()) / self.real_stored_bytes


def budget_of(manifest: Manifest) -> Budget:
    """Count the bytes that a manifest with its `files` filled lists.

    `paper_ratio` is the convention of the INFER paper's tables: images and compensators over the number of real images,
    plus the labels' bytes over the bytes of the stored real set. It mixes units; the two ratios by bytes do not.
    """
    files = manifest.files
    raw = {part: files[part].raw_bytes if part in files else 0 for part in PARTS}
    stored = {part: files[part].bytes if part in files else 0 for part in PARTS}
    pictures = sum(files[part].entries for part in ("images", "compensators") if part in files)
    real = manifest.dataset
    paper_ratio = pictures / real.images + raw["labels"] / real.stored_bytes
    return Budget(raw, stored, real.raw_bytes, real.stored_bytes, paper_ratio)


def spell_loading(manifest: Manifest, opened: str, imported: str) -> list[str]:
    """Return lines of Python that train on the set: `opened` reads it, by the name `imported` from stillroom.

    They run as they are for every kind of label but "dynamic", which only teachers can give: of such a set they go
    through images and classes, and say where the teachers come in.
    """
    if manifest.pool is not None:
        return [
            f"from stillroom import ReplayLoader, {imported}",
            "",
            f"for images, soft_labels in ReplayLoader({opened}, temperature=20):  # anew each epoch",
            "    ...  # images float32 [batch, 3, height, width], augmented, normalised; soft_labels float32 "
            "[batch, classes]",
        ]
    bare, comment = "", "soft_label float32 [64, classes], sums to one"
    if manifest.label_kind == "dynamic":
        bare, comment = ".with_labels(None)", "one_hot float32 [64, classes], its class"
    name = "one_hot" if manifest.label_kind in ("dynamic", "hard") else "soft_label"
    return [
        "from torch.utils.data import DataLoader",
        f"from stillroom import {imported}",
        "",
        *(
            ["# No labels are stored: teachers make them of every augmented batch (stillroom evaluate does that).",
             "# Without teachers only the classes are left, as hard labels:"] if bare else []
        ),
        f"for image, {name} in DataLoader({opened}{bare}.views(), batch_size=64, shuffle=True):",
        f"    ...  # image float32 [64, 3, height, width], normalised; {comment.replace('soft_label', name)}",
    ]  # fmt: skip


def build_card(manifest: Manifest, claims: Sequence[Claim] = (), address: str | None = None) -> bytes:
    """README.md of the set that `manifest`, its `files` filled, describes; the front matter is read by dataset hubs.

    claims: what the set's run found, beside its controls. address: "owner/name", for a card that is read on the Hub.
    """
    budget, files = budget_of(manifest), manifest.files
    opened = 'load_distilled(".")' if address is None else f'load("{address}")'
    front = {
        "license": _licence_id(manifest.dataset.licence),
        "pretty_name": f"{manifest.dataset.name} distilled by {manifest.method}",
        "task_categories": ["image-classification"],
        "tags": ["dataset-distillation", "stillroom"],
        # By name, not by pattern: while a save is under way two versions of the images lie side by side.
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": files["images"].name}]},
        ],
    }
    height, width = manifest.image_size
    views = manifest.views
    lines = [
        "---",
        yaml.safe_dump(front, allow_unicode=True, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {manifest.dataset.name}, distilled",
        "",
        f"{files['images'].entries} images of {width} x {height} pixels in {len(manifest.class_names)} classes, "
        f"distilled from {manifest.dataset.images:,} images of {manifest.dataset.name} by {manifest.method} at "
        f"{manifest.ipc} images per class. Made with stillroom.",
        "",
        "![contact sheet](contact_sheet.png)",
        "",
        "Images, one class per row; below them the compensators, one teacher per row, contrast stretched.",
        "",
        "## Train on it",
        "",
        "```python",
        *spell_loading(manifest, opened, opened.partition("(")[0]),
        "```",
        "",
        "## What lies here",
        "",
        f"- `{files['images'].name}`: image, label, slot; opens by `datasets.load_dataset` of this folder",
    ]
    if kept := manifest.extra.get("original_images"):
        lines[-1] += f". {len(kept)} of the images are the real ones' own JPEG files, without metadata"
    if manifest.image_encoding == "float16":
        lines[-1] += (
            ". An image is the bytes of float16 pixels [3, height, width] in [0, 1] units, little-endian; they may lie "
            "beyond 0 and 1, where the contact sheet cuts them"
        )
    if "compensators" in files:
        lines.append(
            f"- `{files['compensators'].name}`: tensor `compensators` [teachers, slots, 3, height, width], to be added "
            "to image / 255 (8-bit codes first times `scale`)"
        )
    if "labels" in files:
        what = "tensor `logits` [views, classes], one row per view"
        what += ", learned by the method, not by teachers" if manifest.label_kind == "learned" else ""
        if manifest.pool is not None:
            what = (
                f"the teachers' logits of {manifest.pool.epochs} epochs of augmented batches, encoded as "
                f"{manifest.pool.encoding} ([epochs, steps, batch, ...]; `stillroom.logits` says how)"
            )
        lines.append(f"- `{files['labels'].name}`: {what}")
    lines += [
        "- `manifest.json`: recipe, class names in label order, normalization, teachers, seeds, versions, hashes",
        "",
        "Views stand in this order: "
        + ("the images as they are, then " if views.naturals_as_views else "")
        + "for each teacher every image + that teacher's compensator of the image's slot"
        + (", clipped to [0, 1]" if views.clip else "")
        + (", each passed through 8 bits and JPEG of quality 75" if views.view_encoding == "jpeg75" else "")
        + f". Labels are {manifest.label_kind}."
        + (f" The learned learning rate is {manifest.learning_rate:g}." if manifest.learning_rate is not None else ""),
        "",
        "## Bytes",
        "",
        "| part | raw | stored |",
        "| --- | ---: | ---: |",
        *(f"| {part} | {budget.raw[part]:,} | {budget.stored[part]:,} |" for part in PARTS),
        f"| sum | {sum(budget.raw.values()):,} | {sum(budget.stored.values()):,} |",
        f"| real set | {budget.real_raw_bytes:,} | {budget.real_stored_bytes:,} |",
        f"| ratio | {budget.raw_ratio:.2%} | {budget.stored_ratio:.2%} |",
        "",
        f"By the paper's convention (image count, plus label bytes): {budget.paper_ratio:.2%}.",
    ]
    if manifest.teachers:
        lines += ["", "## Teachers", "", "| network | top-1 on the real test split |", "| --- | ---: |"]
        lines += [f"| {teacher.name} | {teacher.show_accuracy(2)} |" for teacher in manifest.teachers]
    lines += ["", "## What students reach, and the controls", "", *_describe_claims(claims)]
    lines += ["", "## Use and limits", "", *_describe_use(manifest)]
    return ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace")


def _licence_id(licence: str) -> str:
    """The Hub's identifier for a licence in words."""
    if licence.startswith(NOT_STATED):
        return "unknown"
    if re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):  # as the Hub's identifiers are
        return licence
    return "cc-by-4.0" if licence.startswith("CC BY 4.0") else "other"


def _describe_claims(claims: Sequence[Claim]) -> list[str]:
    if not claims:
        return ["No results came with this set, so nothing here says how well it trains, or that random images do not."]
    lines = ["Top-1 on the real test split after the last epoch; differences in points, paired by seed:", ""]
    for claim in claims:
        lines.append(f"- {claim.sentence}")
        lines += [f"  - beside {control.control}: {control.said}" for control in claim.against]
    return lines


def _describe_use(manifest: Manifest) -> list[str]:
    """Intended use, and the limits that follow from what the manifest says."""
    real, kept = manifest.dataset.name, manifest.extra.get("original_images")
    return [
        f"- **Licence of {real}**: {manifest.dataset.licence}. This set is made of it, and whatever binds its use "
        "binds this set's; stillroom's own licence is of the code alone.",
        "- **Meant for** research: training and comparing image classifiers on few images, and studying dataset "
        f"distillation. It stands for {real}'s training images in that, and in nothing else.",
        f"- **Not meant for** decisions about people, nor as a benchmark of {real}: students trained on it are "
        f"usually less accurate than on {real} whole, and some classes suffer more than others.",
        "- **Not anonymous**: "
        + (f"{len(kept)} of the images are the real files of {real}" if kept else f"images may be real ones of {real}")
        + ", or made from them. A small set protects nobody whom it shows.",
        f"- Biases of {real} and of the teachers, whose opinions soft labels are, go with the set; none was measured.",
        f"- It was made for images of {manifest.image_size[1]} x {manifest.image_size[0]} pixels, and accuracy depends "
        "much on network, steps, augmentation and labels: compare under one protocol, beside random images.",
    ]


def sheet_rows(labels: Tensor) -> Tensor:
    """The positions int64 [cells] of the images that a contact sheet shows of those with `labels` int64 [n]."""
    classes = labels.unique()[:SHEET_CELLS]
    return torch.cat([(labels == label).nonzero().flatten()[:SHEET_CELLS] for label in classes])


def build_contact_sheet(images: Tensor, labels: Tensor, compensators: Tensor | None) -> bytes:
    """A PNG of at most 10 x 10 images, one class per row, and below it one row of compensators per teacher.

    images uint8 [n, 3, height, width], labels int64 [n], compensators float32 [teachers, slots, 3, height, width] or
    None; these are drawn around mid-gray, each stretched to the full range.
    """
    height, width = images.shape[-2:]
    rows = [images[labels == label][:SHEET_CELLS] for label in labels.unique()[:SHEET_CELLS]]
    for of_teacher in compensators if compensators is not None else ():
        shown = of_teacher[:SHEET_CELLS].cpu()
        largest = shown.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        rows.append((127.5 + 127.5 * shown / largest).round().to(torch.uint8))
    columns = max(len(row) for row in rows)
    sheet = torch.full((3, len(rows), height, columns, width), 255, dtype=torch.uint8)
    for index, row in enumerate(rows):
        sheet[:, index, :, : len(row)] = row.cpu().permute(1, 2, 0, 3)
    pixels = sheet.reshape(3, len(rows) * height, columns * width).permute(1, 2, 0).contiguous().numpy()
    return _png(pixels, SHEET_SIDE / max(height, width))


def _png(pixels: np.ndarray, scale: float) -> bytes:
    image = Image.fromarray(pixels)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
