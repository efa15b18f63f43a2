"""Arrays of images and labels in one .npz file, read without pickle."""

from __future__ import annotations

import functools
import math
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.errors import StillroomError
from stillroom.readers.stored import ArrayImages, Source, Split


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
