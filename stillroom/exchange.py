"""Import: distilled sets as others publish them, read into ours. (Export, the other direction, is export.py.)

    imported = import_set("syn/cifar100-ipc10/generated_results", DataConfig("cifar100"), ImportConfig(layout="infer"))
    print(imported.manifest.extra["import"]["notes"])

folder    a folder of images per class, as SRe2L, RDED and their kin write them (`new000/class000_id000.jpg`), or ours
hub       parquet, as on the Hugging Face Hub or from there by its id: image, label, and perhaps soft labels
npz       train_images (uint8, or floats in [0, 1]), train_labels, perhaps class_names and soft_labels, as ours
infer     INFER's published JPEG files: naturals, then a block of views per teacher (see infer_files.py)

Pixels become 8 bits a channel, the only ones that the artifact has: sets of float or whitened pixels cannot be held.
Nothing is executed (softlabels.py says how labels are read), links are refused, and an image is decoded only after its
header has shown the expected size.
"""

from __future__ import annotations

import functools
import io
import math
import re
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, JpegImagePlugin
from torch import Tensor

from stillroom.artifact import keep_original
from stillroom.classnames import NUMBERED, match_classes, names_of_folders
from stillroom.data import DataConfig, RealData, describe_real, fit_size, load_real
from stillroom.distilled import DistilledSet
from stillroom.errors import StillroomError, check_choices
from stillroom.images import FORMATS, first_size, load_images
from stillroom.infer_files import EXPLAINED, NUMBERED_FILE, PUBLISHED_TEACHERS, find_blocks, recover_compensators
from stillroom.layouts import SHOWN, PublishedLayout, find_layout, locate, open_published, refuse_settings_of_others
from stillroom.manifest import ImageEncoding, Manifest, Normalization
from stillroom.readers import ArrayImages, FileImages, Source, Split, Stored
from stillroom.softlabels import SoftLabelKind, read_index, read_logits

LARGEST_IMAGE_FILE = 2**26  # bytes, far above any image of 224 pixels


@dataclass(frozen=True)
class ImportConfig:
    """How a published set is read."""

    layout: PublishedLayout = "auto"
    """auto: parquet files, and what is on the Hub, are hub; .npz files npz; class folders are infer where its blocks of
    views explain them, else folder."""
    class_order: str | None = None
    """Text file with a line per class of the real data, in label order: the class's folder (or name) in the published
    set. None: folders are matched to classes by name (by that of an export's index.csv, if any), or else all by
    number."""
    teachers: tuple[str, ...] | None = None
    """Names of the teachers whose views follow INFER's naturals, in order. None: those of the published scripts."""
    soft_labels: str | None = None
    """File of the folder and infer layouts with a row per image: .npy, or a torch file of one tensor. Rows stand in the
    order of sorted class folders and sorted files, columns in the label order of the real data. (Parquet has a column
    and npz an array of its own.)"""
    image_column: str | None = None
    """Parquet column of the images. None: found by its type, and by the names img and image."""
    label_column: str | None = None
    """Parquet column of the labels. None: label, labels or fine_label."""
    soft_label_column: str | None = None
    """Parquet column of the soft labels. None: soft_label, soft_labels, logits, probabilities or probs."""
    soft_label_kind: SoftLabelKind | None = None
    """What the soft labels are; probabilities are stored by their logarithms, which are logits at temperature 1. None:
    logits."""
    method: str = "imported"
    """Name of the method that made the set."""

    def __post_init__(self) -> None:
        check_choices(self, "import")
        if self.teachers is not None and (not self.teachers or len(set(self.teachers)) != len(self.teachers)):
            raise StillroomError(f"import.teachers is {list(self.teachers)}; name one teacher or more, each once")


@dataclass(frozen=True, eq=False)
class Found:
    """A published set in the real data's terms: `stored` images, int64 labels and slots [n] of its classes, logits
    float32 [n, classes] or None, and what there is to say about them."""

    stored: Stored
    labels: np.ndarray
    slots: np.ndarray
    logits: np.ndarray | None
    notes: list[str]


def import_set(source: Path | str, real: RealData | DataConfig, config: ImportConfig | None = None) -> DistilledSet:
    """Return the published set `source`, a folder, a parquet or npz file or a Hub id, as a distilled set of `real`.

    Settings of the real data need not say the size of its images: it is that of the set's (see `data.fit_size`). JPEG
    files of a quality that the manifest knows are kept as they are but for their metadata, others are stored
    losslessly. Labels are static
    where soft labels come along, else hard. ``manifest.extra["import"]`` holds source, layout, measures and notes for
    the reader. Raises StillroomError for files that are missing, damaged, links or of another size, classes that cannot
    be matched beyond doubt, labels that cannot be read safely, and settings of another layout.
    """
    config = config or ImportConfig()
    layout = find_layout(str(source), config.layout)
    refuse_settings_of_others(layout, str(source), asdict(config))
    notes: list[str] = []
    root = locate(str(source), notes)
    try:
        published = open_published(root, layout, config.image_column, config.label_column, notes)
        if not len(published.train.labels):
            raise StillroomError(f"import: {root} holds no images; fetch the set again")
        if isinstance(real, DataConfig):
            real = _load_fitting(real, published.train, root, notes)
        found = _match(published, root, real, config, notes)
        if config.soft_label_kind is not None and found.logits is None:
            raise StillroomError(
                f"import: --soft-label-kind {config.soft_label_kind} is given, but {source} has no soft labels; say "
                "where they are, or leave it out"
            )
        images, files, facts = _read_images(found, real.image_size)
    except OSError as error:
        raise StillroomError(f"import: {root} cannot be read: {error}") from error
    distilled = _plain_set(str(source), found, images, files, facts, real, config, SHOWN.get(layout, layout))
    if layout not in ("auto", "infer"):
        return distilled
    assert isinstance(found.stored, FileImages)
    teachers = config.teachers or PUBLISHED_TEACHERS
    try:
        blocks = find_blocks(found.stored, found.labels, real.class_names, teachers)
    except StillroomError as error:
        if layout == "infer":
            raise
        names = [path.rpartition("/")[2] for path in found.stored.paths]
        if not all(NUMBERED_FILE.fullmatch(name) for name in names) or read_index(root):  # an export of ours
            return distilled
        return _with_note(distilled, f"named as INFER's files are, but read as plain images, since {error}")
    recovered = recover_compensators(distilled, blocks, teachers)
    explained = recovered.manifest.extra["import"]["explained"]
    if layout == "infer" or explained > EXPLAINED:
        return recovered
    if read_index(root):
        return distilled
    note = (
        f"named as INFER's files are, but compensators would explain {explained:.0%} of what later images differ from "
        "the first; if they are INFER's nevertheless, say --layout infer"
    )
    return _with_note(distilled, note)


def _with_note(distilled: DistilledSet, note: str) -> DistilledSet:
    facts = distilled.manifest.extra["import"]
    extra = {"import": facts | {"notes": [*facts["notes"], note]}}
    return replace(distilled, manifest=replace(distilled.manifest, extra=extra))


def _load_fitting(data: DataConfig, published: Split, root: Path, notes: list[str]) -> RealData:
    """Load the real data at the size of the published images, which its settings may say but not contradict."""
    height, width, _ = first_size(published.images, np.arange(len(published.labels)))
    if height != width:
        raise StillroomError(
            f"import: {root} has images of {width} x {height} pixels, but sets hold squares; cut or resize them first"
        )
    if data.image_size not in (None, height):
        raise StillroomError(
            f"import: {root} has images of {width} x {height} pixels, but --data.image-size is {data.image_size}; "
            "leave it out, since the set's own is found"
        )
    fitted = fit_size(data, height)
    if fitted.resize != data.resize:
        notes.append(f"real images are squares of another size, and are resized to the set's {width} x {height}")
    try:
        return load_real(fitted)
    except StillroomError as error:  # of images that are no squares; another size would not be the set's
        raise StillroomError(str(error).replace(", or another --data.image-size", "")) from error


# -- their classes and ours ------------------------------------------------------------------------------------------


def _match(published: Source, root: Path, real: RealData, config: ImportConfig, notes: list[str]) -> Found:
    """Return the published images with labels, slots and logits of the real data's classes."""
    stored, theirs, names = published.train.images, published.train.labels, published.class_names
    if names is None:
        names = tuple(f"{number}" if config.class_order else f"class {number}" for number in range(real.classes))
    elif config.class_order is None and isinstance(stored, FileImages):
        names = names_of_folders(root, names)
    label_of, how = match_classes(names, real, config.class_order)
    ours = np.array([label_of[name] for name in names], np.int64)
    wrong = theirs[(theirs < 0) | (theirs >= len(ours))]
    if len(wrong):
        known = f"{real.name!r} has" if published.class_names is None else "its class names have"
        raise StillroomError(f"import: {root} has the label {wrong[0]}, but {known} labels 0 ... {len(ours) - 1}")
    labels = ours[theirs.astype(np.int64)]
    _require_every_class(labels, real, root)
    slots = np.zeros(len(labels), np.int64)
    for label in range(real.classes):
        rows = np.flatnonzero(labels == label).tolist()
        if isinstance(stored, FileImages):
            rows.sort(key=lambda row: _natural(stored.paths[row].rpartition("/")[2]))
        slots[rows] = np.arange(len(rows))
    notes = [*notes, *how]
    if isinstance(stored, FileImages):
        _refuse_other_numbers(stored, labels)
    given, column, kind = config.soft_labels, config.soft_label_column, config.soft_label_kind or "logits"
    logits = read_logits(stored, root, labels, ours, given, column, kind, notes)
    return Found(stored, labels, slots, logits, notes + _remarks(labels, logits, real))


def _require_every_class(labels: np.ndarray, real: RealData, root: Path) -> None:
    empty = np.setdiff1d(np.arange(real.classes), labels)
    if len(empty):
        names = [real.class_names[label] for label in empty[:5]]
        raise StillroomError(
            f"import: {root} has no images of {len(empty)} of {real.classes} classes, such as {names}; fetch the set "
            "again, or give the --data.source that it was made of"
        )


def _refuse_other_numbers(files: FileImages, labels: np.ndarray) -> None:
    """Raise StillroomError where folders are numbered by `labels`, and a file says the number of another class."""
    label_of = {path.partition("/")[0]: label for path, label in zip(files.paths, labels.tolist(), strict=True)}
    if not all((m := NUMBERED.fullmatch(folder)) and int(m[1]) == label for folder, label in label_of.items()):
        return
    for row, path in enumerate(files.paths):
        folder, _, name = path.partition("/")
        own = NUMBERED_FILE.fullmatch(name)
        if own and int(own[1]) != label_of[folder]:
            raise StillroomError(
                f"import: {files.name(row)} says class {int(own[1])} in a folder of class {label_of[folder]}; one of "
                "them is wrong"
            )


def _remarks(labels: np.ndarray, logits: np.ndarray | None, real: RealData) -> list[str]:
    """What uneven counts and soft labels say of the set."""
    counts, remarks = np.bincount(labels, minlength=real.classes), []
    if counts.min() != counts.max():
        few = real.class_names[int(counts.argmin())]
        remarks.append(f"classes have {counts.min()} to {counts.max()} images (fewest: {few!r}); was it fetched whole?")
    if logits is not None:
        agreement = float((logits.argmax(1) == labels).mean())
        chance = " - no more than chance: their rows or columns stand in another order"
        doubt = chance if agreement * real.classes < 2 else ""
        remarks.append(f"soft labels put the image's own class first for {agreement:.0%} of the images{doubt}")
    return remarks


def _natural(name: str) -> list[Any]:
    """Return a key that sorts img_2 before img_10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


# -- pixels --------------------------------------------------------------------------------------------------------


@functools.cache
def _jpeg_qualities() -> dict[Any, ImageEncoding]:
    """Return the manifest's JPEG encodings by their quantisation tables."""
    found: dict[Any, ImageEncoding] = {}
    for encoding in ("jpeg95", "jpeg90", "jpeg75"):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "JPEG", quality=int(encoding.removeprefix("jpeg")))
        with Image.open(buffer) as picture:
            assert isinstance(picture, JpegImagePlugin.JpegImageFile)
            found[_tables(picture)] = encoding  # type: ignore[assignment]
    return found


def _tables(picture: JpegImagePlugin.JpegImageFile) -> Any:
    return tuple((number, tuple(table)) for number, table in sorted(picture.quantization.items()))


def _read_header(item: Any, name: str, side: int) -> tuple[ImageEncoding, int] | None:
    """Return encoding and colour subsampling of a file that can be kept as it is, else None; nothing is decoded."""
    if isinstance(item, Path) and item.stat().st_size > LARGEST_IMAGE_FILE:
        raise StillroomError(f"import: {name} has {item.stat().st_size:,} bytes, too many for {side} x {side} pixels")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on odd metadata; sizes are judged below
            with Image.open(item if isinstance(item, Path) else io.BytesIO(item or b""), formats=FORMATS) as picture:
                size, encoding, sampling = picture.size, None, 0
                if isinstance(picture, JpegImagePlugin.JpegImageFile) and picture.mode == "RGB":
                    sampling = JpegImagePlugin.get_sampling(picture)  # -1: an odd one
                    if picture.getexif().get(0x0112, 1) == 1 and sampling >= 0:  # upright
                        encoding = _jpeg_qualities().get(_tables(picture))
    except Exception as error:  # damaged files make Pillow's plugins raise nearly anything
        raise StillroomError(f"import: {name} cannot be read as an image ({error}); remove or replace it") from error
    _require_side(size, side, name)
    return None if encoding is None else (encoding, sampling)


def _require_side(size: tuple[int, int], side: int, name: str) -> None:
    if size != (side, side):
        raise StillroomError(
            f"import: {name} has {size[0]} x {size[1]} pixels, but {side} x {side} are those of the real data; give "
            "the --data.image-size of the set, whose images all have one size"
        )


def _read_images(found: Found, side: int) -> tuple[Tensor, tuple[bytes, ...] | None, dict[str, Any]]:
    """Return uint8 [n, 3, side, side], the files less metadata where all can be kept, and facts for the manifest."""
    stored, count = found.stored, len(found.labels)
    rows = np.arange(count)
    kinds = set()
    chunks = np.array_split(rows, math.ceil(count / 1000))
    if isinstance(stored, ArrayImages):
        height, width = stored.pixels.shape[1:3]
        _require_side((width, height), side, stored.where)
    for chunk in chunks if not isinstance(stored, ArrayImages) else ():
        for row, item in zip(chunk, stored.fetch(chunk), strict=True):
            kinds.add(_read_header(item, stored.name(row), side))
    images, _, _, _ = load_images(Split(stored, found.labels), rows, side, "refuse", False, math.inf, False)
    pixels = images.batch(torch.from_numpy(rows))
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind is None:
        return pixels, None, {"image_encoding": "png"}
    items = [item for chunk in chunks for item in stored.fetch(chunk)]
    contents = (item.read_bytes() if isinstance(item, Path) else bytes(item) for item in items)  # type: ignore[arg-type]
    # Who took a picture, where and with what is nothing that students see, but what a published set would tell.
    files = tuple(file for file in map(keep_original, pixels, contents) if file is not None)
    if len(files) < count:
        return pixels, None, {"image_encoding": "png"}
    return pixels, files, {"image_encoding": kind[0], "subsampling": ("4:4:4", "4:2:2", "4:2:0")[kind[1]]}


def _plain_set(
    source: str,
    found: Found,
    images: Tensor,
    files: tuple[bytes, ...] | None,
    facts: dict[str, Any],
    real: RealData,
    config: ImportConfig,
    layout: str,
) -> DistilledSet:
    """Return the images as they are, without compensators."""
    kept = "kept as they are, without metadata" if files is not None else "stored losslessly"
    facts = {"source": source, "layout": layout, "notes": [*found.notes, f"images {kept}"]} | facts
    manifest = Manifest(
        method=config.method,
        recipe={"import": asdict(config)},
        dataset=describe_real(real),
        class_names=real.class_names,
        normalization=Normalization(real.mean, real.std),
        image_size=(real.image_size, real.image_size),
        ipc=int(np.bincount(found.labels).max()),
        label_kind="hard" if found.logits is None else "static",
        image_encoding=facts["image_encoding"],
        extra={"import": facts},
    )
    logits = None if found.logits is None else torch.from_numpy(found.logits).half()
    labels, slots = torch.from_numpy(found.labels), torch.from_numpy(found.slots)
    return DistilledSet(images, labels, slots, None, logits, manifest, files)
