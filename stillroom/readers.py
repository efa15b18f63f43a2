"""Readers: one function per layout in which labelled images are stored; each returns a `Source`, nothing decoded yet.

Readers know files and columns, never datasets or sizes: `data` decides which images are used, how large they become
and whether they are held in memory. Nothing here executes what a file contains: arrays are read without pickle, and
the one pickled layout (CIFAR's) goes through `_ArrayUnpickler`, which can build lists, dictionaries, numbers, strings
and arrays of bytes and nothing else.
"""

from __future__ import annotations

import functools
import json
import math
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from stillroom.errors import StillroomError

TEST_SPLITS = ("test", "val", "valid", "validation")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
LEFT_BEHIND = ("thumbs.db", "desktop.ini", "__macosx")  # by Windows and archivers, who do not hide names by a dot

CIFAR_PICKLES = {  # dataset: (folder, training files, test files, key of the labels)
    "cifar10": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"], "labels"),
    "cifar100": ("cifar-100-python", ["train"], ["test"], "fine_labels"),
}


class Stored(Protocol):
    """The images of one split where they are stored, addressed by position 0 ... n-1 (int64 arrays of positions)."""

    def name(self, index: int) -> str:
        """What an error message calls the image."""

    def fetch(self, indices: np.ndarray) -> Sequence[Path | bytes | np.ndarray | None]:
        """Per image a file, the bytes of an encoded image, uint8 pixels [height, width, 1 or 3], or None (missing)."""

    def stored_bytes(self, indices: np.ndarray) -> int:
        """Bytes that these images occupy where they are stored."""

    def identity(self, indices: np.ndarray) -> Iterable[str]:
        """Text that changes when the files change: their names and sizes."""


@dataclass(frozen=True)
class Split:
    """`images` and their labels: integers [n] of any width, not yet checked against the classes."""

    images: Stored
    labels: np.ndarray


@dataclass(frozen=True)
class Source:
    """A dataset as a reader found it. `test` is None if there is no test split, `class_names` if none are stored."""

    train: Split
    test: Split | None
    class_names: tuple[str, ...] | None = None


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """uint8 pixels [n, height, width, 1 or 3] in memory; `where` names the array in messages. `enlarged` is how many
    pixels a reader made of each native one."""

    pixels: np.ndarray
    where: str
    enlarged: int = 1

    def name(self, index: int) -> str:
        return f"{self.where}[{index}]"

    def fetch(self, indices: np.ndarray) -> Sequence[np.ndarray]:
        return self.pixels[indices]  # type: ignore[return-value]  # an array is a sequence of its images

    def stored_bytes(self, indices: np.ndarray) -> int:
        return len(indices) * math.prod(self.pixels.shape[1:]) // self.enlarged

    def identity(self, indices: np.ndarray) -> Iterable[str]:
        return (self.name(i) for i in indices)


@dataclass(frozen=True, eq=False)
class FileImages:
    """One file per image; `paths` are relative to `root`."""

    root: Path
    paths: tuple[str, ...]

    def name(self, index: int) -> str:
        return str(self.root / self.paths[index])

    def fetch(self, indices: np.ndarray) -> Sequence[Path]:
        return [self.root / self.paths[i] for i in indices]

    def _size(self, index: int) -> int:
        try:
            return (self.root / self.paths[index]).stat().st_size
        except OSError:
            return 0  # missing or a dangling link: a bad image, reported when it is decoded

    def stored_bytes(self, indices: np.ndarray) -> int:
        return sum(self._size(i) for i in indices)

    def identity(self, indices: np.ndarray) -> Iterable[str]:
        return (f"{self.paths[i]} {self._size(i)}" for i in indices)


@contextmanager
def _reading_parquet(path: Path) -> Iterator[None]:
    """A damaged file makes pyarrow raise its own errors, OSError, or UnicodeDecodeError from a column's name."""
    try:
        yield
    except StillroomError:
        raise
    except Exception as error:
        raise StillroomError(f"{path} cannot be read as parquet: {error}. Fetch the file again.") from error


@dataclass(frozen=True, eq=False)
class ParquetImages:
    """One encoded image per row. A row group is the smallest piece that parquet can read: each is read once per
    `fetch`, and the last one is kept, so reading in order costs one pass and shuffled reading costs a group per image
    at worst (an image folder is faster there).

    `groups` has a (file, row group) pair for each row group; `starts` int64 [groups + 1] is the first row of each.
    """

    column: str
    groups: tuple[tuple[Path, int], ...]
    group_bytes: tuple[int, ...]
    starts: np.ndarray
    _last: dict[int, Any] = field(default_factory=dict, repr=False)

    def _group_of(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.starts, rows, side="right") - 1

    def name(self, index: int) -> str:
        group = int(self._group_of(np.asarray(index)))
        path = self.groups[group][0]
        first = next(g for g, (other, _) in enumerate(self.groups) if other == path)
        return f"{path} row {index - int(self.starts[first])}"

    def _cells(self, group: int) -> Any:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        if group not in self._last:
            path, number = self.groups[group]
            with _reading_parquet(path), pq.ParquetFile(path) as file:
                cells = file.read_row_group(number, columns=[self.column]).column(0)
            if pa.types.is_struct(cells.type):
                cells = pc.struct_field(cells, "bytes")
            self._last.clear()
            self._last[group] = cells
        return self._last[group]

    def fetch(self, indices: np.ndarray) -> Sequence[bytes | None]:
        groups = self._group_of(indices)
        items: list[bytes | None] = [None] * len(indices)
        for group in np.unique(groups):
            cells = self._cells(int(group))
            for position in np.flatnonzero(groups == group):
                items[position] = cells[int(indices[position] - self.starts[group])].as_py()
        return items

    def stored_bytes(self, indices: np.ndarray) -> int:
        """The image column's compressed bytes, from the footers; a row group used in part counts in proportion."""
        used = np.bincount(self._group_of(indices), minlength=len(self.groups))
        rows = np.maximum(np.diff(self.starts), 1)
        return round(sum(size * int(u) / int(n) for size, u, n in zip(self.group_bytes, used, rows, strict=True)))

    def identity(self, indices: np.ndarray) -> Iterable[str]:
        files = dict.fromkeys(path for path, _ in self.groups)
        yield from (f"{path.name} {path.stat().st_size}" for path in files)
        yield from map(str, indices)


def read_digits() -> Source:
    """scikit-learn's 1,797 handwritten digits, 8x8 gray, values 0 ... 16 scaled to 0 ... 255 and rounded; each pixel
    becomes a 4x4 block (32x32: the size of the small networks, and no value is invented). Every fifth image of a
    class, in the stored order, is a test image: 1,442 for training, 355 for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    pixels = pixels.repeat(4, axis=1).repeat(4, axis=2)[..., None]  # [n, 32, 32, 1]
    labels = digits.target.astype(np.int64)
    is_test = np.zeros(len(labels), bool)
    for label in range(10):
        is_test[np.flatnonzero(labels == label)[4::5]] = True
    train, test = (
        Split(ArrayImages(pixels[chosen], f"digits {name}", enlarged=16), labels[chosen])
        for name, chosen in (("train", ~is_test), ("test", is_test))
    )
    return Source(train, test)


def _npz_headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of each array, read before anything is allocated for it."""
    headers = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            if member.endswith(".npy"):
                with archive.open(member) as file:
                    first = np.lib.format.read_magic(file) == (1, 0)
                    read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
                    shape, _, dtype = read(file)
                    headers[member.removesuffix(".npy")] = (shape, dtype)
    return headers


def _npz_array(path: Path, key: str) -> np.ndarray:
    with np.load(path, allow_pickle=False) as arrays:
        return arrays[key]


def npz_headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of each array of an npz file, by name. Raises StillroomError for a file that is none."""
    headers: dict[str, tuple[tuple[int, ...], np.dtype]] = _try_npz(_npz_headers, path)
    return headers


def npz_array(path: Path, key: str) -> np.ndarray:
    """One array of an npz file, read without pickle. Raises StillroomError where that cannot be done."""
    array: np.ndarray = _try_npz(_npz_array, path, key)
    return array


def _try_npz(read: Callable[..., Any], path: Path, *key: str) -> Any:
    """A damaged archive makes zip, zlib and numpy's header parser warn and raise whatever they happen to."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read(path, *key)
    except Exception as error:
        what = "".join(f", array '{name}'" for name in key)
        raise StillroomError(
            f"{path}{what} cannot be read as npz without pickle: {error}. Write it again with numpy.savez."
        ) from error


def _image_fix(dtype: np.dtype) -> str:
    if dtype.kind == "b":
        return "Convert them: images.astype(np.uint8) * 255."
    if dtype.kind != "f":
        return "Convert them: images.astype(np.uint8) if they lie in 0 ... 255."
    return (
        "Convert them: np.rint(images * 255).astype(np.uint8) if they lie in [0, 1], np.rint(images).astype(np.uint8) "
        "if they lie in 0 ... 255."
    )


def _label_fix(shape: tuple[int, ...], dtype: np.dtype) -> str:
    if len(shape) == 2 and shape[1] > 1:
        return " If the rows are one-hot, store np.argmax(labels, axis=1)."
    if dtype.kind in "US":
        return " Store class_names, labels = np.unique(labels, return_inverse=True)."
    return " If they are whole numbers, store labels.astype(np.int64)." if dtype.kind in "fb" else ""


def _to_levels(images: np.ndarray, where: str) -> np.ndarray:
    """Floats in [0, 1] as the nearest of the 256 levels, uint8."""
    with np.errstate(all="ignore"):  # what overflows or is no number is refused below
        levels = np.rint(images.astype(np.float32) * 255)
    if not (levels.min() >= 0 and levels.max() <= 255):
        raise StillroomError(
            f"{where} has floats from {images.min():.3g} to {images.max():.3g}, but floats must lie in [0, 1]. Undo "
            "their normalisation (images * std + mean), or divide them by 255 if they lie in 0 ... 255; views that "
            "their set did not cut (clip is false) are cut by images.clip(0, 1), or by an export --to folder."
        )
    return levels.astype(np.uint8)


def _npz_split(
    path: Path,
    headers: dict[str, tuple[tuple[int, ...], np.dtype]],
    name: str,
    limit: float,
    needed: str,
    floats_too: bool,
) -> Split:
    images_key, labels_key = f"{name}_images", f"{name}_labels"
    for key in (images_key, labels_key):
        if key not in headers:
            raise StillroomError(f"{path} has no array '{key}', only {sorted(headers)}; needed are {needed}.")
    (shape, dtype), (label_shape, label_dtype) = headers[images_key], headers[labels_key]
    if dtype != np.uint8 and not (floats_too and dtype.kind == "f"):
        allowed = "uint8, 0 ... 255" + (", or floats in [0, 1]" if floats_too else "")
        raise StillroomError(f"'{images_key}' of {path} is {dtype}, but images must be {allowed}. {_image_fix(dtype)}")
    channels_first = len(shape) == 4 and shape[3] not in (1, 3)
    channels = (*shape, 1)[1 if channels_first else 3] if len(shape) in (3, 4) else 0
    if channels not in (1, 3) or 0 in shape:
        raise StillroomError(
            f"'{images_key}' of {path} has shape {list(shape)}; "
            "needed is [n, height, width], [n, height, width, 3] or [n, 3, height, width], none of them 0."
        )
    if label_dtype.kind not in "iu" or label_shape not in ((shape[0],), (shape[0], 1)):
        raise StillroomError(
            f"'{labels_key}' of {path} is {label_dtype} {list(label_shape)}; the {shape[0]} images of '{images_key}' "
            f"need as many integers 0 ... C-1, [{shape[0]}] or [{shape[0]}, 1].{_label_fix(label_shape, label_dtype)}"
        )
    colour_bytes = 3 * math.prod(shape) // channels
    if colour_bytes > limit:
        raise StillroomError(
            f"'{images_key}' of {path} needs {colour_bytes / 2**30:.3g} GiB as colour images, and npz cannot be read "
            "lazily. Raise --data.memory-limit-gib, or store the images as parquet or as an image folder."
        )
    images = npz_array(path, images_key)
    if dtype != np.uint8:
        images = _to_levels(images, f"'{images_key}' of {path}")
    if len(shape) == 3:
        images = images[..., None]
    elif channels_first:
        images = images.transpose(0, 2, 3, 1)
    labels = npz_array(path, labels_key).reshape(-1)
    return Split(ArrayImages(images, f"{path} {images_key}"), labels)


def read_npz(path: Path, memory_limit_bytes: float, with_test: bool = True, floats_too: bool = False) -> Source:
    """`train_images`, `train_labels`, `test_images`, `test_labels` (or `val_*` where there is no test split) and,
    optionally, `class_names`, strings [classes]. Images: uint8 [n, height, width], [n, height, width, 1 or 3] or
    [n, 1 or 3, height, width]; `floats_too`: or floats in [0, 1], rounded to 8 bits. Labels: integers [n] or [n, 1]."""
    headers = npz_headers(path)
    class_names = None
    if "class_names" in headers:
        shape, dtype = headers["class_names"]
        if dtype.kind not in "US" or len(shape) != 1:
            raise StillroomError(f"'class_names' of {path} is {dtype} {list(shape)}; it must be strings [classes].")
        names = npz_array(path, "class_names").tolist()
        class_names = tuple(n.decode("utf-8", "replace") if isinstance(n, bytes) else n for n in names)
    test = next((name for name in ("test", "val") if with_test and f"{name}_images" in headers), None)
    if with_test and test is None and "train_images" in headers:
        raise StillroomError(
            f"{path} has no test split: its arrays are {sorted(headers)}; needed are test_images and test_labels, or "
            "val_images and val_labels. Add them, or hold training images out with --data.holdout-per-class N."
        )
    needed = "train_images and train_labels"
    if with_test:
        needed = (
            "train_images, train_labels, test_images and test_labels (val_* will do; neither is needed with "
            "--data.holdout-per-class N)"
        )
    read = functools.partial(_npz_split, path, headers, limit=memory_limit_bytes, needed=needed, floats_too=floats_too)
    return Source(read("train"), read(test) if test else None, class_names)


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        shown = (e for e in entries if not e.name.startswith(".") and e.name.lower() not in LEFT_BEHIND)
        return sorted(shown, key=lambda e: e.name)


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _class_folders(split: Path) -> list[str]:
    for folder in sorted(split.glob(".*/")):
        image = next((e for e in _visible(folder) if Path(e.name).suffix.lower() in IMAGE_SUFFIXES), None)
        if image is not None:
            raise StillroomError(
                f"{folder} is hidden by the dot in its name, but holds images ({image.name}): rename it if it is a "
                "class, or move it out of the dataset."
            )
    return [e.name for e in _visible(split) if e.is_dir()]


def _files_below(folder: Path) -> list[str]:
    """Relative paths, sorted by name; links to folders are refused, since they can form a ring."""
    found = []
    for entry in _visible(folder):
        if entry.is_dir(follow_symlinks=False):
            found += [f"{entry.name}/{below}" for below in _files_below(folder / entry.name)]
        elif entry.is_dir():
            raise StillroomError(
                f"{folder / entry.name} is a link to a folder, which is not followed inside a class folder; put its "
                "images in its place, or remove it."
            )
        elif entry.is_file() or entry.is_symlink():
            found.append(entry.name)
    return found


def _read_class_folders(root: Path, split: str, classes: Sequence[str]) -> Split:
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        folder = root / split / name
        if not folder.is_dir():
            raise StillroomError(f"{root / split} has no folder for the class '{name}'; add {folder} with its images.")
        # Tiny-ImageNet has boxes.txt beside images/; with anything else there, images/ is a folder like any other.
        beside = [e for e in _visible(folder) if e.name != "images" and not e.name.endswith(".txt")]
        prefix = f"{split}/{name}/images" if (folder / "images").is_dir() and not beside else f"{split}/{name}"
        files = _files_below(root / prefix)
        if not files:
            raise StillroomError(f"{folder} holds no images; add some, or remove the class everywhere.")
        paths += [f"{prefix}/{file}" for file in files]
        labels += [label] * len(files)
    return Split(FileImages(root, tuple(paths)), np.array(labels, np.int64))


def no_train_folder(root: Path) -> StillroomError:
    """The error for a folder without `train` and parquet files, by what the folder seems to be."""
    entries = _visible(root)
    folders = [e.name for e in entries if e.is_dir()]
    whole = root.resolve().parent
    if root.resolve().name in ("train", *TEST_SPLITS) and (whole / "train").is_dir():
        return StillroomError(f"--data.source {root} is one split of a dataset; give the folder of all: {whole}.")
    inner = next((name for name in folders if (root / name / "train").is_dir()), None)
    if inner is not None:
        return StillroomError(f"--data.source {root} has no train/ folder, but {root / inner} has one; give that.")
    spelt = next((name for name in folders if name.lower() in ("train", "training")), None)
    if spelt is not None:
        return StillroomError(
            f"--data.source {root} has no train/ folder; rename {root / spelt} to train, and the folder of the test "
            "split to test or val."
        )
    classes = [name for name in folders if any(e.is_file() for e in _visible(root / name))]
    if classes:
        return StillroomError(
            f"--data.source {root} has no train/ folder, but folders that look like classes ({_quoted(classes)}): move "
            f"them below {root / 'train'}, and hold test images out with --data.holdout-per-class N."
        )
    if entries and not folders:
        return StillroomError(
            f"--data.source {root} holds {len(entries)} files and no folders, whose names would be the classes: sort "
            f"the images into {root / 'train'}/<class>/, and hold test images out with --data.holdout-per-class N."
        )
    return StillroomError(
        f"{root} has no train/ folder and no parquet files. Expected {root}/train/<class>/<images> and "
        f"{root}/test/<class>/<images> (or val, valid, validation), or parquet files with 'train' and 'test' in "
        "their names."
    )


def _training_classes(train: Path) -> tuple[str, ...]:
    classes = _class_folders(train)
    if not classes:
        raise StillroomError(
            f"{train} holds no class folders, whose names are the classes: sort the images into {train}/<class>/."
        )
    if len(classes) == 1:
        raise StillroomError(
            f"{train} has 1 class folder, {classes[0]!r}; at least 2 are needed, each of them directly below train/."
        )
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise StillroomError(f"{train} has the class folder {name!r}, no name in UTF-8; rename it.") from error
    return tuple(classes)


def read_folder(root: Path, test_splits: Sequence[str] = TEST_SPLITS, with_test: bool = True) -> Source:
    """`train/<class>/*` and `test|val|valid|validation/<class>/*`; sorted class folders are the labels. Every file
    below a class folder is an image (only those of its `images` folder, where it has one with nothing but .txt files
    beside it); hidden names are ignored. The test split is the first of `test_splits` that shares a class with `train`:
    `test` is often unlabelled."""
    classes = _training_classes(root / "train")
    present = {name: _class_folders(root / name) for name in test_splits if with_test and (root / name).is_dir()}
    split = next((name for name, found in present.items() if set(classes) & set(found)), next(iter(present), None))
    if split is not None and not present[split]:
        raise StillroomError(
            f"{root / split} holds no class folders, so its images have no labels: sort them into {split}/<class>/, or "
            "leave it unread and hold training images out with --data.holdout-per-class N."
        )
    if split is not None and set(present[split]) != set(classes):
        alone = {"train": set(classes) - set(present[split]), split: set(present[split]) - set(classes)}
        where = " and ".join(f"{_quoted(sorted(names))} only in {part}/" for part, names in alone.items() if names)
        raise StillroomError(
            f"{root} needs the same class folders in train/ and {split}/, but has {where}; add or remove some."
        )
    train = _read_class_folders(root, "train", classes)
    return Source(train, _read_class_folders(root, split, classes) if split is not None else None, classes)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StillroomError(f"{path} cannot be read: {error}. Unpack the dataset again.") from error


def read_tiny_imagenet(root: Path, with_test: bool = True) -> Source:
    """The official folders: `wnids.txt` gives the label order, `words.txt` the class names, `train/<wnid>/images` the
    training images, and `val/val_annotations.txt` the labels of `val/images` (class folders below `val` serve too)."""
    wnids = [line.strip() for line in _lines(root / "wnids.txt") if line.strip()]
    if len(set(wnids)) < len(wnids):
        raise StillroomError(f"{root / 'wnids.txt'} lists a class twice; unpack the dataset again.")
    words: dict[str, str] = {}
    if (root / "words.txt").is_file():
        for line in _lines(root / "words.txt"):
            wnid, _, meaning = line.partition("\t")
            words[wnid] = meaning.strip()
    names = tuple(words.get(wnid) or wnid for wnid in wnids)
    train = _read_class_folders(root, "train", wnids)
    if not with_test or not (root / "val").is_dir():
        return Source(train, None, names)
    annotations = root / "val" / "val_annotations.txt"
    if not annotations.is_file():
        return Source(train, _read_class_folders(root, "val", wnids), names)
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    paths: list[str] = []
    labels: list[int] = []
    for number, line in enumerate(_lines(annotations), start=1):
        if line.strip():
            file, wnid = (*line.split("\t"), "")[:2]
            if wnid not in label_of or "/" in file or file.startswith("."):
                raise StillroomError(
                    f"{annotations} line {number} is '{line}'; expected a file name, a tab and a class of wnids.txt."
                )
            paths.append(f"val/images/{file}")
            labels.append(label_of[wnid])
    return Source(train, Split(FileImages(root, tuple(paths)), np.array(labels, np.int64)), names)


def find_parquet(root: Path) -> list[Path]:
    """The parquet files of a folder, at most two folders deep (the Hub's `data/` and `<config>/<split>/`), sorted."""
    found = [path for pattern in ("*", "*/*", "*/*/*") for path in root.glob(f"{pattern}.parquet")]
    return sorted(path for path in found if not any(p.startswith(".") for p in path.relative_to(root).parts))


def _parquet_splits(root: Path, test_splits: Sequence[str], with_test: bool) -> tuple[list[Path], list[Path]]:
    """A file belongs to the split that its own name contains, or else the name of its folder below `root`."""
    files: dict[str, list[Path]] = {}
    for path in find_parquet(root):
        for text in (path.name, path.parent.name if path.parent != root else ""):
            split = next((s for s in ("train", *test_splits) if s in text.lower()), None)
            if split:
                files.setdefault(split, []).append(path)
                break
    if "train" not in files:
        raise StillroomError(
            f"{root} has no parquet file with 'train' in its name; expected e.g. train-00000-of-00001.parquet."
        )
    test = next((files[split] for split in test_splits if with_test and split in files), [])
    for part in (files["train"], test):
        folders = sorted({str(path.parent) for path in part})
        if len(folders) > 1:
            raise StillroomError(f"{root} holds several datasets; pass one of {folders} as --data.source.")
    return files["train"], test


def _image_column(schema: Any, wanted: str | None, where: Path) -> str:
    import pyarrow as pa

    def is_binary(kind: Any) -> bool:
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    def holds_images(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            index = kind.get_field_index("bytes")
            return index >= 0 and is_binary(kind.field(index).type)
        return is_binary(kind)

    return _choose(
        "image", wanted, [f.name for f in schema if holds_images(f.type)], ("img", "image"), True, schema, where
    )


def _label_column(schema: Any, wanted: str | None, usual: str | None, where: Path) -> str:
    import pyarrow as pa

    def holds_labels(kind: Any) -> bool:
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)

    fitting = [f.name for f in schema if holds_labels(f.type)]
    if wanted is None and usual in fitting:
        wanted = usual
    # A lone integer column may as well be a row number, so a label column is never chosen by its type alone.
    return _choose("label", wanted, fitting, ("label", "labels", "fine_label"), False, schema, where)


def _choose(
    kind: str, wanted: str | None, fitting: list[str], usual: Sequence[str], by_type: bool, schema: Any, where: Path
) -> str:
    columns = ", ".join(f"{f.name} ({f.type})" for f in schema)
    accepted = "binary, or a struct with binary 'bytes'" if kind == "image" else "integer or string"
    named = [name for name in fitting if name in usual]
    chosen = [wanted] if wanted is not None else named if named or not by_type else fitting
    if len(chosen) != 1 or fitting.count(chosen[0]) != 1:
        held = "each image's file (PNG, JPEG, ...)" if kind == "image" else "each image's class"
        only = f" {fitting[0]}" if len(fitting) == 1 else ""
        fix = f"Name one with --data.{kind}-column{only}." if fitting else f"Add one that holds {held}."
        reason = f"{len(chosen)} candidates for the {kind} column" if fitting else f"no {kind} column"
        if fitting and not chosen:
            reason = f"no column named {', '.join(usual[:-1])} or {usual[-1]}, as {kind} columns must be,"
        reason = reason if wanted is None else f"no {kind} column '{wanted}'"
        raise StillroomError(f"{where} has {reason} of type {accepted}. Its columns: {columns}. {fix}")
    return chosen[0]


def _hub_class_names(schema: Any, label_column: str) -> tuple[str, ...] | None:
    """Names of a ClassLabel column, from the JSON that the `datasets` library leaves in the parquet schema."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label_column]
        names = feature["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(names) if isinstance(names, list) and all(isinstance(n, str) for n in names) else None


def read_parquet(
    path: Path,
    image_column: str | None = None,
    label_column: str | None = None,
    usual_label_column: str | None = None,
    test_splits: Sequence[str] = TEST_SPLITS,
    with_test: bool = True,
) -> Source:
    """A folder of parquet files, as on the Hugging Face Hub, or one file, which then is the training split. Images are
    encoded (PNG, JPEG, ...), in a binary column or a struct with `bytes`. Labels are integers, or strings, whose sorted
    training values are the classes."""
    import pyarrow.parquet as pq

    train_files, test_files = _parquet_splits(path, test_splits, with_test) if path.is_dir() else ([path], [])
    with _reading_parquet(train_files[0]):
        schema = pq.read_schema(train_files[0])
        image_column = _image_column(schema, image_column, train_files[0])
        label_column = _label_column(schema, label_column, usual_label_column, train_files[0])

    def split(files: list[Path]) -> tuple[ParquetImages, list[Any]]:
        groups: list[tuple[Path, int]] = []
        group_bytes: list[int] = []
        rows: list[int] = [0]
        labels: list[Any] = []
        for path in files:
            with _reading_parquet(path), pq.ParquetFile(path) as file:
                _image_column(file.schema_arrow, image_column, path)
                _label_column(file.schema_arrow, label_column, None, path)
                for number in range(file.num_row_groups):
                    meta = file.metadata.row_group(number)
                    chunks = [meta.column(c) for c in range(meta.num_columns)]
                    groups.append((path, number))
                    group_bytes.append(
                        sum(c.total_compressed_size for c in chunks if _belongs(c.path_in_schema, image_column))
                    )
                    rows.append(meta.num_rows)
                found = file.read(columns=[label_column]).column(0).to_pylist()
            if None in found:
                raise StillroomError(
                    f"{path} row {found.index(None)} has no '{label_column}'; give it a label or remove the row."
                )
            labels += found
        return ParquetImages(image_column, tuple(groups), tuple(group_bytes), np.cumsum(rows)), labels

    train_images, train_labels = split(train_files)
    test_images, test_labels = split(test_files) if test_files else (None, [])
    names = _hub_class_names(schema, label_column)
    if any(isinstance(label, str) for label in train_labels):
        names = tuple(sorted(set(map(str, train_labels))))
        train_labels = _numbered(train_labels, names, train_files[0].parent)
        test_labels = _numbered(test_labels, names, (test_files or train_files)[0].parent)
    train = Split(train_images, _integers(train_labels, train_files[0]))
    return Source(train, Split(test_images, _integers(test_labels, test_files[0])) if test_images else None, names)


def _belongs(path_in_schema: str, column: str) -> bool:
    return path_in_schema == column or path_in_schema.startswith(f"{column}.")


def _numbered(labels: list[Any], names: tuple[str, ...], where: Path) -> list[int]:
    label_of = {name: label for label, name in enumerate(names)}
    unknown = next((label for label in labels if label not in label_of), None)
    if unknown is not None:
        raise StillroomError(f"{where} has the test label {unknown!r}, which the training split lacks.")
    return [label_of[label] for label in labels]


def _integers(labels: list[Any], where: Path) -> np.ndarray:
    odd = next((label for label in labels if not isinstance(label, int) or not -(2**63) <= label < 2**63), None)
    if odd is not None:
        raise StillroomError(f"{where} has the label {odd!r}; labels must be integers 0 ... C-1 in both splits.")
    return np.array(labels, np.int64)


class _PickledArray:
    """Stands in for a pickled numpy array of bytes: numpy itself never interprets what a pickle says."""

    data: np.ndarray

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        if not isinstance(dtype, _PickledDtype) or dtype.kind != "u1" or fortran:
            raise pickle.UnpicklingError("an array that is not uint8 in C order")
        content = content.encode("latin1") if isinstance(content, str) else content
        self.data = np.frombuffer(content, np.uint8).reshape(shape)


class _PickledDtype:
    def __init__(self, kind: str, *_: Any) -> None:
        self.kind = kind

    def __setstate__(self, state: Any) -> None:
        """Byte order and alignment, which single bytes do not have."""


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("numpy.core.multiarray", "_reconstruct"): lambda *_: _PickledArray(),
            ("numpy._core.multiarray", "_reconstruct"): lambda *_: _PickledArray(),
            ("numpy", "ndarray"): _PickledArray,
            ("numpy", "dtype"): _PickledDtype,
            ("_codecs", "encode"): lambda text, *_: text.encode("latin1"),  # how protocol 2 writes bytes
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a dataset does not need")
        return known[module, name]


def read_cifar_pickles(folder: Path, dataset: str) -> Source:
    """torchvision's layout of CIFAR: `cifar-10-batches-py/` or `cifar-100-python/` with Python pickles."""
    _, train_files, test_files, label_key = CIFAR_PICKLES[dataset]

    def split(files: list[str]) -> Split:
        parts = []
        for name in files:
            path = folder / name
            # A damaged pickle can raise nearly anything.
            try:
                with path.open("rb") as file:
                    batch = _ArrayUnpickler(file, encoding="latin1").load()
                pixels = batch["data"].data.reshape(-1, 3, 32, 32)
                labels = np.array([int(label) for label in batch[label_key]], np.int64)
                if len(labels) != len(pixels):
                    raise ValueError(f"{len(pixels)} images but {len(labels)} labels")
            except Exception as error:
                raise StillroomError(f"{path} is no batch of {dataset}: {error!r}. Fetch the dataset again.") from error
            parts.append((pixels, labels))
        pixels, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
        return Split(ArrayImages(pixels.transpose(0, 2, 3, 1), f"{folder}/{files[0]}"), labels)

    return Source(split(train_files), split(test_files))
