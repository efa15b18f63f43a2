"""Image folders: `train/<class>/*` and `test/<class>/*`, or `<class>/*` alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stillroom.errors import StillroomError
from stillroom.readers.listing import TEST_SPLITS, quoted, visible
from stillroom.readers.stored import FileImages, Source, Split

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")


def _class_folders(split: Path) -> list[str]:
    for folder in sorted(split.glob(".*/")):
        image = next((e for e in visible(folder) if Path(e.name).suffix.lower() in IMAGE_SUFFIXES), None)
        if image is not None:
            raise StillroomError(
                f"{folder} is hidden by the dot in its name, but holds images ({image.name}): rename it if it is a "
                "class, or move it out of the dataset."
            )
    return [e.name for e in visible(split) if e.is_dir()]


def _files_below(folder: Path) -> list[str]:
    """Relative paths, sorted by name; links to folders are refused, since they can form a ring."""
    found = []
    for entry in visible(folder):
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


def read_class_folders(root: Path, split: str, classes: Sequence[str]) -> Split:
    """The class folders in the folder `split` of `root`, "." for those of `root` itself."""
    paths: list[str] = []
    labels: list[int] = []
    empty: list[str] = []
    for label, name in enumerate(classes):
        folder = root / split / name
        if not folder.is_dir():
            raise StillroomError(f"{root / split} has no folder for the class '{name}'; add {folder} with its images.")
        # Tiny-ImageNet has boxes.txt beside images/; with anything else there, images/ is a folder like any other.
        beside = [e for e in visible(folder) if e.name != "images" and not e.name.endswith(".txt")]
        own = (Path(split) / name).as_posix()
        prefix = f"{own}/images" if (folder / "images").is_dir() and not beside else own
        files = _files_below(root / prefix)
        if not files:
            empty.append(name)
        paths += [f"{prefix}/{file}" for file in files]
        labels += [label] * len(files)
    if empty:
        raise StillroomError(
            f"{root / split} has no images in the folders {quoted(empty)}; add some, or remove the classes."
        )
    return Split(FileImages(root, tuple(paths)), np.array(labels, np.int64))


def no_train_folder(root: Path) -> StillroomError:
    """The error for a folder without `train` and parquet files, by what the folder seems to be."""
    entries = visible(root)
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
    classes = [name for name in folders if _holds_images(root / name)]
    if classes:
        splits = [name for name in folders if name.lower() in TEST_SPLITS]
        others = [name for name in folders if name not in classes]
        if splits:
            flaw = f"and {splits[0]}/, a test split or a class: move the classes below {root / 'train'}"
        elif others:
            flaw = f"and {quoted(others)} without an image directly inside: move these away, or images up into them"
        else:
            flaw = "and at least 2 are needed: give the folder that holds one folder for each class"
        return StillroomError(
            f"--data.source {root} has no train/ folder, but {quoted(classes)}, which look like classes, {flaw}."
        )
    tars = [e.name for e in entries if e.name.endswith(".tar")]
    if tars:
        return StillroomError(
            f"--data.source {root} holds tar files ({quoted(tars)}), none with 'train' in its name; name shards by "
            "their splits, e.g. train-000000.tar and val-000000.tar."
        )
    if entries and not folders:
        return StillroomError(
            f"--data.source {root} holds {len(entries)} files and no folders, whose names would be the classes: sort "
            f"the images into {root}/<class>/, and hold test images out with --data.holdout-share 0.2."
        )
    return StillroomError(
        f"{root} has no train/ folder and no parquet files or shards. Expected {root}/train/<class>/<images> and "
        f"{root}/test/<class>/<images> (or val, valid, validation), or {root}/<class>/<images>, or parquet or tar "
        "files with 'train' and 'test' in their names."
    )


def _holds_images(folder: Path) -> bool:
    """Whether an image lies in the folder itself, or in its folder `images`."""
    places = (place for place in (folder, folder / "images") if place.is_dir())
    return any(Path(e.name).suffix.lower() in IMAGE_SUFFIXES for place in places for e in visible(place))


def has_bare_classes(root: Path) -> bool:
    """Whether the folders of `root` are classes: two or more, each with images of its own, none named as a split is.

    A folder that is one split of a dataset, whose other splits lie beside it, is not meant alone.
    """
    folders = [e.name for e in visible(root) if e.is_dir()]
    named = {"train", "training", *TEST_SPLITS}
    if len(folders) < 2 or named & {name.lower() for name in folders}:
        return False
    here = root.resolve()
    if here.name in ("train", *TEST_SPLITS) and (here.parent / "train").is_dir():
        return False
    return all(_holds_images(root / name) for name in folders)


def training_classes(train: Path) -> tuple[str, ...]:
    classes = _class_folders(train)
    if not classes and train.name == "train" and _holds_images(train):
        others = [e.name for e in visible(train.parent) if e.is_dir() and e.name not in ("train", *TEST_SPLITS)]
        if beside := [name for name in others if _holds_images(train.parent / name)]:
            raise StillroomError(
                f"{train} holds images and no class folders, beside folders that look like classes ({quoted(beside)}): "
                f"if train is a class too, move all of them below {train}/, and else sort its images into "
                f"{train}/<class>/."
            )
    if not classes:
        raise StillroomError(
            f"{train} holds no class folders, whose names are the classes: sort the images into {train}/<class>/."
        )
    if len(classes) == 1:
        raise StillroomError(
            f"{train} has 1 class folder, {classes[0]!r}; at least 2 are needed, each of them directly below "
            f"{train.name}/."
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
    classes = training_classes(root / "train")
    if not any((root / name).is_dir() for name in TEST_SPLITS):
        others = [e.name for e in visible(root) if e.is_dir() and e.name != "train" and _holds_images(root / e.name)]
        if others:
            raise StillroomError(
                f"--data.source {root} has train/ with class folders, and beside it {quoted(others)}, which hold "
                f"images too: move them below {root / 'train'} if they are classes, and else away."
            )
    present = {name: _class_folders(root / name) for name in test_splits if with_test and (root / name).is_dir()}
    split = next((name for name, found in present.items() if set(classes) & set(found)), next(iter(present), None))
    if split is not None and not present[split]:
        raise StillroomError(
            f"{root / split} holds no class folders, so its images have no labels: sort them into {split}/<class>/, or "
            "leave it unread and hold training images out with --data.holdout-per-class N."
        )
    if split is not None and set(present[split]) != set(classes):
        alone = {"train": set(classes) - set(present[split]), split: set(present[split]) - set(classes)}
        where = " and ".join(f"{quoted(sorted(names))} only in {part}/" for part, names in alone.items() if names)
        folders = [root / part / name for part, names in alone.items() for name in names]
        empty = sorted(folder.name for folder in folders if not any(folder.iterdir()))
        fix = f"remove {quoted(empty)}: empty" if empty else "add or remove some"
        raise StillroomError(f"{root} needs the same class folders in train/ and {split}/, but has {where}; {fix}.")
    train = read_class_folders(root, "train", classes)
    return Source(train, read_class_folders(root, split, classes) if split is not None else None, classes)


def read_bare_folders(root: Path) -> Source:
    """`<class>/*`: class folders and nothing around them are the training split, and there is no other."""
    classes = training_classes(root)
    return Source(read_class_folders(root, ".", classes), None, classes)
