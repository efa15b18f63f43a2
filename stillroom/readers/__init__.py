"""Readers: one file per family of layouts in which labelled images are stored; each returns a `Source`, undecoded.

Readers know files and columns, never datasets or sizes: `data` decides which images are used, how large they become
and whether they are held in memory. Nothing here executes what a file contains: arrays are read without pickle, and
the one pickled layout (CIFAR's) goes through an unpickler that knows only arrays of bytes.
"""

from stillroom.readers.cifar import CIFAR_PICKLES, read_cifar_pickles
from stillroom.readers.digits import read_digits
from stillroom.readers.folders import no_train_folder, read_folder
from stillroom.readers.imagenet import read_tiny_imagenet
from stillroom.readers.listing import LEFT_BEHIND, TEST_SPLITS
from stillroom.readers.npz import npz_array, npz_headers, read_npz
from stillroom.readers.parquet import ParquetImages, find_parquet, read_parquet
from stillroom.readers.stored import ArrayImages, FileImages, Source, Split, Stored

__all__ = [
    "CIFAR_PICKLES",
    "LEFT_BEHIND",
    "TEST_SPLITS",
    "ArrayImages",
    "FileImages",
    "ParquetImages",
    "Source",
    "Split",
    "Stored",
    "find_parquet",
    "no_train_folder",
    "npz_array",
    "npz_headers",
    "read_cifar_pickles",
    "read_digits",
    "read_folder",
    "read_npz",
    "read_parquet",
    "read_tiny_imagenet",
]
