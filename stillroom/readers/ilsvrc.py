"""ImageNet as its organisers and Kaggle publish it: ILSVRC 2012.

Classes are the sorted folders of `train/`, WordNet ids such as n01440764. The validation images lie in one
folder, `val/ILSVRC2012_val_00000001.JPEG` and so on, and their classes in a file beside:

    LOC_val_solution.csv                     Kaggle's: an image's name and its class
    ILSVRC2012_validation_ground_truth.txt   the devkit's: per line a number, 1 ... 1000, which meta.mat (beside it) or
                                             map_clsloc.txt (of later devkits) turns into a class
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from stillroom.errors import StillroomError
from stillroom.readers.folders import IMAGE_SUFFIXES, read_class_folders, read_folder, training_classes
from stillroom.readers.listing import TEST_SPLITS, quoted, read_lines, visible
from stillroom.readers.stored import FileImages, Source, Split

KAGGLE_FOLDERS = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
DEVKIT_FOLDERS = "ILSVRC*devkit*/data"
SOLUTION = "LOC_val_solution.csv"
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
SYNSET_MAPPING = "LOC_synset_mapping.txt"
# A wnid and its names per line, like Kaggle's mapping. Its lines are sorted by wnid, which the ground truth's numbers
# are not (1 is n02119789): so it names classes and never numbers them.
SYNSET_WORDS = "synset_words.txt"
CLASS_NUMBERS = "map_clsloc.txt"
META = "meta.mat"
LARGEST_META = 2**20  # bytes; the devkit's has some 30 thousand
VALIDATION_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.jpe?g", re.IGNORECASE)


def find_ilsvrc(root: Path) -> Path | None:
    """The folder of `train/` and `val/` where `root` is ILSVRC as it was published, else None.

    Class folders alone are no sign of it: there must be Kaggle's folders, an annotation, or validation images that lie
    unsorted in `val/`.
    """
    for inner in KAGGLE_FOLDERS:
        if (root / inner / "train").is_dir():
            return root / inner
    annotated = any((root / name).is_file() for name in (SOLUTION, SYNSET_MAPPING, GROUND_TRUTH))
    return root if (root / "train").is_dir() and (annotated or _has_loose_images(root / "val")) else None


def _has_loose_images(val: Path) -> bool:
    if not val.is_dir():
        return False
    with os.scandir(val) as entries:
        return any(VALIDATION_IMAGE.fullmatch(entry.name) for entry in entries)


def read_ilsvrc(root: Path, with_test: bool = True) -> Source:
    """`train/<wnid>/*` and `val/`, below `root` or below Kaggle's `ILSVRC/Data/CLS-LOC/`; `val/` has class folders, or
    images and a file that annotates them (see this module's beginning), which is looked for in `root`, beside the
    images and in `ILSVRC2012_devkit_t12/data`. Classes are named by the first name that `LOC_synset_mapping.txt` or
    `synset_words.txt` gives them, with the wnid behind it where two have the same; by their wnids where there is none.

    Raises StillroomError where annotations are missing, name a class without a training folder, leave images out or
    list images that are not there.
    """
    images = find_ilsvrc(root) or root
    places = list(dict.fromkeys([root, *sorted(root.glob(DEVKIT_FOLDERS)), images, images / "val"]))
    wnids = training_classes(images / "train")
    if with_test and _has_loose_images(images / "val"):
        test = _read_loose_images(images, wnids, places)  # first, since it is sooner refused
        found = Source(read_class_folders(images, "train", wnids), test)
    else:
        found = read_folder(images, sorted(TEST_SPLITS, key=lambda split: split != "val"), with_test)
    return replace(found, class_names=_first_names(wnids, places))


def _find(places: Sequence[Path], *names: str) -> Path | None:
    return next((place / name for name in names for place in places if (place / name).is_file()), None)


def _first_names(wnids: Sequence[str], places: Sequence[Path]) -> tuple[str, ...]:
    """Confessed: crane and maillot each name two classes of ILSVRC, which then are "crane (n02012849)" and so on."""
    path = _find(places, SYNSET_MAPPING, SYNSET_WORDS)
    words = dict(line.strip().partition(" ")[::2] for line in read_lines(path)) if path else {}
    names = {wnid: words.get(wnid, "").split(",")[0].strip() or wnid for wnid in wnids}
    count = Counter(names.values())
    return tuple(name if count[name] == 1 else f"{name} ({wnid})" for wnid, name in names.items())


def _read_loose_images(images: Path, wnids: Sequence[str], places: Sequence[Path]) -> Split:
    val = images / "val"
    where = _find(places, SOLUTION, GROUND_TRUTH)
    if where is None:
        raise StillroomError(
            f"{val} holds images that are in no class folder, and nothing says their classes: put Kaggle's {SOLUTION}, "
            f"or the devkit's {GROUND_TRUTH} and {META}, into {places[0]}, sort them into {val}/<class>/, or "
            "leave them unread with --data.holdout-per-class N."
        )
    wnid_of = _read_solution(where) if where.name == SOLUTION else _read_ground_truth(where, places)
    files = [entry.name for entry in visible(val) if Path(entry.name).suffix.lower() in IMAGE_SUFFIXES]
    stems = [Path(file).stem for file in files]
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    unknown = sorted(set(wnid_of.values()) - set(label_of))
    left_out = [file for file, stem in zip(files, stems, strict=True) if stem not in wnid_of]
    absent = sorted(set(wnid_of) - set(stems))
    for names, flaw in (
        (unknown, f"names classes that have no folder in {images / 'train'}; add these, or remove the classes' images"),
        (left_out, f"says no class for some images in {val}; add their lines, or move the images away"),
        (absent, f"lists images that are not in {val}; unpack them again, or remove their lines"),
    ):
        if names:
            raise StillroomError(f"{where} {flaw}: {quoted(names)}.")
    labels = np.array([label_of[wnid_of[stem]] for stem in stems], np.int64)
    return Split(FileImages(images, tuple(f"val/{file}" for file in files)), labels)


def _read_solution(path: Path) -> dict[str, str]:
    """-> the wnid of each image's name, without suffix. A line's second field has wnids and boxes; its first is it."""
    wnid_of: dict[str, str] = {}
    try:
        rows = list(csv.reader(read_lines(path)))
    except csv.Error as error:
        raise StillroomError(f"{path} cannot be read as csv: {error}. Fetch it again.") from error
    for number, row in enumerate(rows, start=1):
        if not row or row[0] == "ImageId":
            continue
        image, wnid = Path(row[0]).stem, " ".join(row[1:2]).partition(" ")[0]
        if not wnid or image in wnid_of:
            raise StillroomError(
                f"{path} line {number} is {','.join(row)[:80]!r}; expected the name of an image that no line before it "
                "has, a comma and its class. Fetch it again."
            )
        wnid_of[image] = wnid
    return wnid_of


def _read_ground_truth(path: Path, places: Sequence[Path]) -> dict[str, str]:
    """-> the wnid of each image's name: line 1 is the class number of ILSVRC2012_val_00000001."""
    numbers_in = _find([path.parent, *places], META, CLASS_NUMBERS)
    if numbers_in is None:
        raise StillroomError(
            f"{path} says classes by number, and nothing says which classes these are: put the devkit's {META} or "
            f"{CLASS_NUMBERS} beside it, or use Kaggle's {SOLUTION}. ({SYNSET_WORDS} will not do: its lines are in "
            "another order.)"
        )
    wnid_of = _read_meta(numbers_in) if numbers_in.name == META else _read_class_numbers(numbers_in)
    wnids: dict[str, str] = {}
    for line_number, line in enumerate(read_lines(path), start=1):
        number = int(line) if re.fullmatch(r"\s*[0-9]{1,9}\s*", line) else None
        if number not in wnid_of:
            raise StillroomError(
                f"{path} line {line_number} is {line[:80]!r}, which is no number of a class in {numbers_in}; give both "
                "files of one devkit."
            )
        wnids[f"ILSVRC2012_val_{line_number:08}"] = wnid_of[number]
    return wnids


def _read_class_numbers(path: Path) -> dict[int | None, str]:
    """-> the wnid of each class number, from lines such as "n02119789 1 kit_fox"."""
    wnid_of: dict[int | None, str] = {}
    for line_number, line in enumerate(read_lines(path), start=1):
        match = re.fullmatch(r"\s*(\S+)\s+([0-9]{1,9})(\s.*)?", line)
        if line.strip() and (match is None or int(match[2]) in wnid_of):
            raise StillroomError(
                f"{path} line {line_number} is {line[:80]!r}; expected a wnid, a number of its own and a name. Fetch "
                "it again."
            )
        if match:
            wnid_of[int(match[2])] = match[1]
    return wnid_of


def _read_meta(path: Path) -> dict[int | None, str]:
    """-> the wnid of each class number, from the devkit's table of synsets."""
    from scipy.io import loadmat  # scikit-learn stands on scipy

    # A damaged file makes scipy and zlib raise whatever they happen to; a large one may be a bomb.
    try:
        if path.stat().st_size > LARGEST_META:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        synsets = np.atleast_1d(loadmat(path, squeeze_me=True, variable_names=["synsets"])["synsets"])
        return {int(n): str(w) for n, w in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)}
    except Exception as error:
        raise StillroomError(f"{path} is no meta.mat of ILSVRC 2012: {error!r}. Unpack the devkit again.") from error
