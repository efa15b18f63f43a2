"""Import: distilled sets as others publish them, read into ours. (Export, the other direction, is export.py.)

    imported = import_set("syn/cifar100-ipc10/generated_results", real, ImportConfig(layout="infer"))
    print(imported.manifest.extra["import"]["notes"])

folder    a folder of images per class, as SRe2L, RDED and their kin write them (`new000/class000_id000.jpg`), or ours
hub       parquet, as on the Hugging Face Hub: image, label, and perhaps soft labels
infer     INFER's published JPEG files: naturals, then a block of views per teacher (see infer_files.py)

Pixels become 8 bits a channel, the only ones that the artifact has: sets of float or whitened pixels cannot be held.
Nothing is executed (softlabels.py says how labels are read), links are refused, and an image is decoded only after its
header has shown the expected size.
"""

from __future__ import annotations

import functools
import io
import math
import os
import re
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, JpegImagePlugin
from torch import Tensor

from stillroom.data import RealData, describe_real
from stillroom.distilled import DistilledSet
from stillroom.errors import StillroomError, check_choices
from stillroom.images import FORMATS, load_images
from stillroom.infer_files import EXPLAINED, NUMBERED_FILE, PUBLISHED_TEACHERS, find_blocks, recover_compensators
from stillroom.manifest import MANIFEST_NAME, ImageEncoding, Manifest, Normalization
from stillroom.readers import LEFT_BEHIND, FileImages, ParquetImages, Split, Stored, find_parquet, read_parquet
from stillroom.softlabels import SoftLabelKind, read_soft_label_column, read_soft_labels

LARGEST_IMAGE_FILE = 2**26  # bytes, far above any image of 224 pixels
WORDNET_ID = re.compile(r"n\d{8}")
NUMBERED = re.compile(r"(?:new|class|label|n|c)?[ _-]?(\d+)", re.IGNORECASE)
# Numbered by sorted WordNet id in one world (class folders) and by the lines of wnids.txt in the other.
TWO_ORDERS = ("tiny-imagenet", "tiny-imagenet-200")


@dataclass(frozen=True)
class ImportConfig:
    """How a published set is read."""

    layout: Literal["auto", "folder", "hub", "infer"] = "auto"
    """auto: parquet files are hub; class folders are infer where its blocks of views explain them, else folder."""
    class_order: str | None = None
    """Text file with a line per class of the real data, in label order: the class's folder (or name) in the published
    set. None: folders are matched to classes by name, or else all by number."""
    teachers: tuple[str, ...] = PUBLISHED_TEACHERS
    """Names of the teachers whose views follow INFER's naturals, in order."""
    soft_labels: str | None = None
    """File of the folder and infer layouts with a row per image: .npy, or a torch file of one tensor. Rows stand in the
    order of sorted class folders and sorted files, columns in the label order of the real data."""
    image_column: str | None = None
    """Parquet column of the images. None: found by its type, and by the names img and image."""
    label_column: str | None = None
    """Parquet column of the labels. None: label, labels or fine_label."""
    soft_label_column: str | None = None
    """Parquet column of the soft labels. None: soft_label, soft_labels, logits, probabilities or probs."""
    soft_label_kind: SoftLabelKind = "logits"
    """What the soft labels are; probabilities are stored by their logarithms, which are logits at temperature 1."""
    method: str = "imported"
    """Name of the method that made the set."""

    def __post_init__(self) -> None:
        check_choices(self, "import")
        if not self.teachers or len(set(self.teachers)) != len(self.teachers):
            raise StillroomError(f"import.teachers is {list(self.teachers)}; name one teacher or more, each once")


@dataclass(frozen=True, eq=False)
class Found:
    """A published set as its files have it: `stored` images, int64 labels and slots [n] of the real data's classes,
    logits float32 [n, classes] or None, and what there is to say about them."""

    stored: Stored
    labels: np.ndarray
    slots: np.ndarray
    logits: np.ndarray | None
    notes: list[str]


def import_set(path: Path | str, real: RealData, config: ImportConfig | None = None) -> DistilledSet:
    """Return the published set at `path`, a folder or a parquet file, as a distilled set of `real`.

    JPEG files of a quality that the manifest knows are kept as they are, others are stored losslessly. Labels are
    static where soft labels come along, else hard. ``manifest.extra["import"]`` holds source, layout, measures and
    notes for the reader. Raises StillroomError for files that are missing, damaged, links or of another size, classes
    that cannot be matched beyond doubt, and labels that cannot be read safely.
    """
    config, root = config or ImportConfig(), Path(path)
    if not root.exists():
        raise StillroomError(f"import: {root} does not exist; give the folder, or parquet file, of the published set")
    if (root / MANIFEST_NAME).is_file():
        raise StillroomError(f"import: {root} is a distilled set of this artifact already; load_distilled reads it")
    layout = config.layout
    is_hub = layout == "hub" or (layout == "auto" and (root.is_file() or bool(find_parquet(root))))
    try:
        found = _find_rows(root, real, config) if is_hub else _find_files(root, real, config)
        images, files, facts = _read_images(found, real.image_size)
    except OSError as error:
        raise StillroomError(f"import: {root} cannot be read: {error}") from error
    distilled = _plain_set(root, found, images, files, facts, real, config, "hub" if is_hub else "folder")
    if is_hub or layout == "folder":
        return distilled
    assert isinstance(found.stored, FileImages)
    try:
        blocks = find_blocks(found.stored, found.labels, real.class_names, config.teachers)
    except StillroomError as error:
        if layout == "infer":
            raise
        names = [path.rpartition("/")[2] for path in found.stored.paths]
        if not all(NUMBERED_FILE.fullmatch(name) for name in names):
            return distilled
        return _with_note(distilled, f"named as INFER's files are, but read as plain images, since {error}")
    recovered = recover_compensators(distilled, blocks, config.teachers)
    explained = recovered.manifest.extra["import"]["explained"]
    if layout == "infer" or explained > EXPLAINED:
        return recovered
    note = (
        f"named as INFER's files are, but compensators would explain {explained:.0%} of what later images differ from "
        "the first; if they are INFER's nevertheless, say --layout infer"
    )
    return _with_note(distilled, note)


def _with_note(distilled: DistilledSet, note: str) -> DistilledSet:
    facts = distilled.manifest.extra["import"]
    extra = {"import": facts | {"notes": [*facts["notes"], note]}}
    return replace(distilled, manifest=replace(distilled.manifest, extra=extra))


# -- finding images and their classes --------------------------------------------------------------------------------


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in `folder`, sorted by name, without hidden names. Raises StillroomError for links."""
    with os.scandir(folder) as entries:
        shown = sorted(
            (e for e in entries if not e.name.startswith(".") and e.name.lower() not in LEFT_BEHIND),
            key=lambda e: e.name,
        )
    for entry in shown:
        if entry.is_symlink():
            raise StillroomError(
                f"import: {entry.path} is a symbolic link, which could lead anywhere; put a copy there"
            )
    return shown


def _find_files(root: Path, real: RealData, config: ImportConfig) -> Found:
    """Find the images of a folder per class."""
    if not root.is_dir():
        raise StillroomError(f"import: {root} is a file; --layout {config.layout} reads a folder of class folders")
    folders = [entry.name for entry in _entries(root) if entry.is_dir()]
    if not folders:
        raise StillroomError(f"import: {root} has no class folders and no parquet files; give the folder that has them")
    label_of, notes = match_classes(folders, real, config.class_order)
    paths: list[str] = []
    for folder in folders:
        entries = _entries(root / folder)
        odd = next((entry.name for entry in entries if not entry.is_file()), None)
        if odd is not None:
            hint = f"; give {root / folder}" if folder in ("train", "test", "val") else "; remove it"
            raise StillroomError(f"import: {root / folder} holds {odd!r}, which is no image file{hint}")
        paths += [f"{folder}/{entry.name}" for entry in entries]
    names = [path.partition("/") for path in paths]
    labels = np.array([label_of[folder] for folder, _, _ in names], np.int64)
    by_number = all((m := NUMBERED.fullmatch(folder)) and int(m[1]) == label for folder, label in label_of.items())
    for folder, _, name in names:
        own = NUMBERED_FILE.fullmatch(name)
        if by_number and own and int(own[1]) != label_of[folder]:
            raise StillroomError(
                f"import: {root / folder / name} says class {int(own[1])} in a folder of class {label_of[folder]}; one "
                "of them is wrong"
            )
    slots = np.zeros(len(paths), np.int64)
    for label in np.unique(labels):
        own_rows = sorted(np.flatnonzero(labels == label), key=lambda row: _natural(names[row][2]))
        slots[own_rows] = np.arange(len(own_rows))
    logits = read_soft_labels(root, paths, real.classes, config.soft_labels, config.soft_label_kind, notes)
    return _checked(Found(FileImages(root, tuple(paths)), labels, slots, logits, notes), real, root)


def _find_rows(root: Path, real: RealData, config: ImportConfig) -> Found:
    """Find the images of parquet files: those named for training, or the only one."""
    files = find_parquet(root) if root.is_dir() else [root]
    if not files:
        raise StillroomError(f"import: {root} has no parquet files; --layout folder reads class folders")
    path = files[0] if len(files) == 1 else root
    try:
        source = read_parquet(path, config.image_column, config.label_column, with_test=False)
    except StillroomError as error:
        raise StillroomError(f"import: {error}".replace("--data.", "--")) from error  # the real data has others
    stored = source.train.images
    assert isinstance(stored, ParquetImages)
    theirs = source.train.labels
    if source.class_names is not None:
        label_of, notes = match_classes(source.class_names, real, config.class_order)
        ours = np.array([label_of[name] for name in source.class_names], np.int64)
    else:
        names = [f"{number}" if config.class_order else f"class {number}" for number in range(real.classes)]
        label_of, notes = match_classes(names, real, config.class_order)
        ours = np.array([label_of[name] for name in names], np.int64)
    wrong = theirs[(theirs < 0) | (theirs >= len(ours))]
    if len(wrong):
        raise StillroomError(
            f"import: {files[0]} has the label {wrong[0]}, but {real.name!r} has labels 0 ... {real.classes - 1}"
        )
    labels = ours[theirs]
    slots = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        slots[labels == label] = np.arange((labels == label).sum())
    read = list(dict.fromkeys(file for file, _ in stored.groups))
    logits = read_soft_label_column(read, len(ours), config.soft_label_column, config.soft_label_kind, notes)
    if logits is not None:
        moved = np.empty_like(logits)
        moved[:, ours] = logits  # their columns stand in the order of their classes
        logits = moved
    return _checked(Found(stored, labels, slots, logits, notes), real, root)


def _checked(found: Found, real: RealData, root: Path) -> Found:
    """Raise StillroomError for classes without images; note uneven counts and what soft labels say of the classes."""
    counts = np.bincount(found.labels, minlength=real.classes)
    empty = [real.class_names[label] for label in np.flatnonzero(counts == 0)[:5]]
    if empty:
        raise StillroomError(
            f"import: {root} has no images of {(counts == 0).sum()} of {real.classes} classes, such as {empty}; fetch "
            "the set again, or give the --data.source that it was made of"
        )
    if counts.min() != counts.max():
        few = real.class_names[int(counts.argmin())]
        found.notes.append(
            f"classes have {counts.min()} to {counts.max()} images (fewest: {few!r}); was it fetched whole?"
        )
    if found.logits is not None:
        agreement = float((found.logits.argmax(1) == found.labels).mean())
        doubt = (
            " - no more than chance: their rows or columns stand in another order"
            if (agreement * real.classes < 2)
            else ""
        )
        found.notes.append(f"soft labels put the image's own class first for {agreement:.0%} of the images{doubt}")
    return found


def match_classes(
    names: Sequence[str], real: RealData, class_order: str | None = None
) -> tuple[dict[str, int], list[str]]:
    """Return the real data's label of each published class name (or folder), and notes on how they were matched.

    By the lines of the file `class_order`; or by name, where every name is that of a class but for case and signs; or
    by number, where every name is one (`new000`, `class_7`, `00012`). Raises StillroomError for anything between.
    """
    if class_order is not None:
        lines = _read_lines(Path(class_order))
        if len(lines) != real.classes or len(set(lines)) != len(lines):
            raise StillroomError(
                f"--class-order {class_order} has {len(lines)} names, {len(set(lines))} of them different; it needs "
                f"one for each of the {real.classes} classes of {real.name!r}, in label order"
            )
        absent = [name for name in names if name not in lines]
        if absent:
            raise StillroomError(f"--class-order {class_order} does not name {absent[:5]}, which the set has; add them")
        return {name: lines.index(name) for name in names}, [f"classes in the order of {class_order}"]
    known: dict[str, int] = {}
    for label, name in enumerate(real.class_names):
        if known.setdefault(plain_name(name), label) != label:  # two classes that differ by signs alone
            known[plain_name(name)] = -1
    by_name = {name: known.get(plain_name(name), -1) for name in names}
    if min(by_name.values()) >= 0 and len(set(by_name.values())) == len(by_name):
        return by_name, ["classes matched by name"]
    numbers = {name: int(m[1]) for name in names if (m := NUMBERED.fullmatch(name)) and not WORDNET_ID.fullmatch(name)}
    shown = ", ".join(map(repr, real.class_names[:3]))
    advice = "say which is which by --class-order FILE, a line per class of the real data with its name in the set"
    if len(numbers) < len(names):
        strange = [name for name in names if name not in numbers and by_name[name] < 0][:5] or list(names[:5])
        wordnet = "; Tiny-ImageNet's own wnids.txt is such a file" if any(map(WORDNET_ID.fullmatch, strange)) else ""
        raise StillroomError(
            f"import: {strange} are no classes of {real.name!r} ({shown}, ...) and no numbers; {advice}{wordnet}"
        )
    found = set(numbers.values())
    if found == set(range(1, real.classes + 1)):
        raise StillroomError(f"import: classes are numbered 1 to {real.classes}, and labels from 0; {advice}")
    if len(found) != len(numbers) or max(found) >= real.classes:
        raise StillroomError(
            f"import: numbers of classes reach {max(found)} in {len(numbers)} names, {len(found)} of them different, "
            f"but {real.name!r} has the labels 0 to {real.classes - 1}; {advice}"
        )
    if real.name in TWO_ORDERS and not all(map(WORDNET_ID.fullmatch, real.class_names)):
        raise StillroomError(
            f"import: the set numbers the classes of {real.name!r}, most likely by sorted WordNet id, but labels here "
            f"follow wnids.txt; {advice}"
        )
    return numbers, [f"classes matched by number, in label order: 0 is {real.class_names[0]!r}"]


def plain_name(name: str) -> str:
    """Return a class name as it is compared: composed letters, no case, one underscore for any signs."""
    return re.sub(r"[\W_]+", "_", unicodedata.normalize("NFC", name)).casefold().strip("_")


def _natural(name: str) -> list[Any]:
    """Return a key that sorts img_2 before img_10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _read_lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise StillroomError(f"import: {path} cannot be read as text: {error}") from error


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
    if size != (side, side):
        raise StillroomError(
            f"import: {name} has {size[0]} x {size[1]} pixels, but {side} x {side} are those of the real data; give "
            "the --data.image-size of the set"
        )
    return None if encoding is None else (encoding, sampling)


def _read_images(found: Found, side: int) -> tuple[Tensor, tuple[bytes, ...] | None, dict[str, Any]]:
    """Return uint8 [n, 3, side, side], the files themselves where all can be kept, and facts for the manifest."""
    stored, count = found.stored, len(found.labels)
    rows = np.arange(count)
    kinds = set()
    chunks = np.array_split(rows, math.ceil(count / 1000))
    for chunk in chunks:
        for row, item in zip(chunk, stored.fetch(chunk), strict=True):
            kinds.add(_read_header(item, stored.name(row), side))
    images, _, _ = load_images(Split(stored, found.labels), rows, side, "refuse", False, math.inf, False)
    pixels = images.batch(torch.from_numpy(rows))
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind is None:
        return pixels, None, {"image_encoding": "png"}
    items = [item for chunk in chunks for item in stored.fetch(chunk)]
    files = tuple(item.read_bytes() if isinstance(item, Path) else bytes(item) for item in items)  # type: ignore[arg-type]
    return pixels, files, {"image_encoding": kind[0], "subsampling": ("4:4:4", "4:2:2", "4:2:0")[kind[1]]}


def _plain_set(
    root: Path,
    found: Found,
    images: Tensor,
    files: tuple[bytes, ...] | None,
    facts: dict[str, Any],
    real: RealData,
    config: ImportConfig,
    layout: str,
) -> DistilledSet:
    """Return the images as they are, without compensators."""
    kept = "kept as they are" if files is not None else "stored losslessly"
    facts = {"source": str(root), "layout": layout, "notes": [*found.notes, f"images {kept}"]} | facts
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
