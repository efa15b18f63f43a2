"""Readers: one file per family of layouts in which labelled images are stored; each returns a `Source`, undecoded.

Readers know files and columns, never datasets or sizes: `data` decides which images are used, how large they become
and whether they are held in memory. Nothing here executes what a file contains: arrays are read without pickle, and
the one pickled layout (CIFAR's) goes through an unpickler that knows only arrays of bytes.
"""

from pathlib import Path
from typing import Literal

from stillroom.readers.cifar import CIFAR_PICKLES, read_cifar_pickles
from stillroom.readers.digits import read_digits
from stillroom.readers.folders import has_bare_classes, no_train_folder, read_bare_folders, read_folder
from stillroom.readers.ilsvrc import find_ilsvrc, read_ilsvrc
from stillroom.readers.listing import LEFT_BEHIND, TEST_SPLITS
from stillroom.readers.npz import npz_array, npz_headers, read_npz
from stillroom.readers.parquet import ParquetImages, find_parquet, read_column, read_parquet
from stillroom.readers.shards import ShardImages, has_shards, read_shards
from stillroom.readers.stored import ArrayImages, FileImages, Source, Span, Split, Stored
from stillroom.readers.tiny_imagenet import read_tiny_imagenet

__all__ = [
    "CIFAR_PICKLES",
    "LEFT_BEHIND",
    "TEST_SPLITS",
    "ArrayImages",
    "FileImages",
    "ParquetImages",
    "ShardImages",
    "Source",
    "Span",
    "Split",
    "Stored",
    "find_layout",
    "find_parquet",
    "no_train_folder",
    "npz_array",
    "npz_headers",
    "read_bare_folders",
    "read_cifar_pickles",
    "read_column",
    "read_digits",
    "read_folder",
    "read_ilsvrc",
    "read_npz",
    "read_parquet",
    "read_shards",
    "read_tiny_imagenet",
]

SourceLayout = Literal["tiny-imagenet", "ilsvrc", "class folders", "bare class folders", "parquet", "shards"]


def find_layout(root: Path) -> SourceLayout | None:
    """How the dataset in the folder `root` is laid out; None where it has neither class folders nor files to read."""
    has_train = (root / "train").is_dir()
    if has_train and (root / "wnids.txt").is_file():
        return "tiny-imagenet"
    if find_ilsvrc(root) is not None:
        return "ilsvrc"
    # Parquet is looked for only where there is no class folder, since a large image folder takes long to search.
    if (not has_train or any((root / "train").glob("*.parquet"))) and find_parquet(root):
        return "parquet"
    if has_shards(root):
        return "shards"
    if has_train:
        return "class folders"
    return "bare class folders" if has_bare_classes(root) else None
