"""Tiny-ImageNet as it is published."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stillroom.errors import StillroomError
from stillroom.readers.folders import read_class_folders
from stillroom.readers.listing import read_lines
from stillroom.readers.stored import FileImages, Source, Split


def read_tiny_imagenet(root: Path, with_test: bool = True) -> Source:
    """The official folders: `wnids.txt` gives the label order, `words.txt` the class names, `train/<wnid>/images` the
    training images, and `val/val_annotations.txt` the labels of `val/images` (class folders below `val` serve too)."""
    wnids = [line.strip() for line in read_lines(root / "wnids.txt") if line.strip()]
    if len(set(wnids)) < len(wnids):
        raise StillroomError(f"{root / 'wnids.txt'} lists a class twice; unpack the dataset again.")
    words: dict[str, str] = {}
    if (root / "words.txt").is_file():
        for line in read_lines(root / "words.txt"):
            wnid, _, meaning = line.partition("\t")
            words[wnid] = meaning.strip()
    names = tuple(words.get(wnid) or wnid for wnid in wnids)
    train = read_class_folders(root, "train", wnids)
    if not with_test or not (root / "val").is_dir():
        return Source(train, None, names)
    annotations = root / "val" / "val_annotations.txt"
    if not annotations.is_file():
        return Source(train, read_class_folders(root, "val", wnids), names)
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    paths: list[str] = []
    labels: list[int] = []
    for number, line in enumerate(read_lines(annotations), start=1):
        if line.strip():
            file, wnid = (*line.split("\t"), "")[:2]
            if wnid not in label_of or "/" in file or file.startswith("."):
                raise StillroomError(
                    f"{annotations} line {number} is '{line}'; expected a file name, a tab and a class of wnids.txt."
                )
            paths.append(f"val/images/{file}")
            labels.append(label_of[wnid])
    return Source(train, Split(FileImages(root, tuple(paths)), np.array(labels, np.int64)), names)
