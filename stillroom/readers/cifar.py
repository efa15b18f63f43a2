"""CIFAR's own layout: Python pickles, as torchvision downloads them.

Nothing here executes what a file contains: `_ArrayUnpickler` can build lists, dictionaries, numbers, strings and arrays
of bytes and nothing else.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.errors import StillroomError
from stillroom.readers.stored import ArrayImages, Source, Split

CIFAR_PICKLES = {  # dataset: (folder, training files, test files, key of the labels)
    "cifar10": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"], "labels"),
    "cifar100": ("cifar-100-python", ["train"], ["test"], "fine_labels"),
}


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
                raise StillroomError(
                    f"{path} is no batch of {dataset}: {error!r:.200}. Fetch the dataset again."
                ) from error
            parts.append((pixels, labels))
        pixels, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
        return Split(ArrayImages(pixels.transpose(0, 2, 3, 1), f"{folder}/{files[0]}"), labels)

    return Source(split(train_files), split(test_files))
