"""What every reader returns: the images of two splits where they are stored, and their labels; nothing decoded yet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Span:
    """`size` bytes of the file `path` from byte `start`: an encoded image within a larger file."""

    path: Path
    start: int
    size: int

    def read(self) -> bytes:
        """The bytes. Raises OSError where they cannot be read, ValueError where the file has become too short."""
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            content = file.read(self.size)
        if len(content) < self.size:
            raise ValueError(f"{self.path} ends within it")
        return content


def changed_at(path: Path) -> int:
    """When the file was last changed, in ns; 0 where it is not there."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


class Stored(Protocol):
    """The images of one split where they are stored, addressed by position 0 ... n-1 (int64 arrays of positions)."""

    def name(self, index: int) -> str:
        """What an error message calls the image."""

    def fetch(self, indices: np.ndarray) -> Sequence[Path | Span | bytes | np.ndarray | None]:
        """Per image a file, a span of one, the bytes of an encoded image, uint8 pixels [height, width, 1 or 3], or None
        (missing)."""

    def stored_bytes(self, indices: np.ndarray) -> int:
        """Bytes that these images occupy where they are stored."""

    def identity(self, indices: np.ndarray) -> Iterable[str]:
        """Text that changes when the files change: their names and sizes."""

    def times(self, indices: np.ndarray) -> Iterable[int]:
        """When the files that hold these images were last changed, in ns: more is told by no name and no size."""


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

    def times(self, indices: np.ndarray) -> Iterable[int]:
        return ()


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

    def times(self, indices: np.ndarray) -> Iterable[int]:
        return map(changed_at, self.fetch(indices))
