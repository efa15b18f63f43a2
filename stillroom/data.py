"""Real datasets: what is known of the named ones, and one front door that turns folders, parquet, shards and npz into
a `RealData`: two splits of square uint8 colour images with labels 0 ... C-1.

    load_real(DataConfig("digits"))                                  # scikit-learn's, needs no download
    load_real(DataConfig("cifar100", root="data"))                   # data/cifar100.npz, or parquet, or pickles
    load_real(DataConfig("photos/", image_size=64, resize="crop"))   # photos/train/<class>/*, photos/test/<class>/*
    load_real(DataConfig("shards/", image_size=224, resize="crop"))  # shards/train-000000.tar, shards/val-000000.tar
    load_real(DataConfig("owner/name"))                              # parquet on the Hugging Face Hub
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stillroom import readers
from stillroom.errors import StillroomError, check_choices, find_near
from stillroom.files import remembered, sha256_bytes, sha256_file
from stillroom.images import (
    Images,
    LazyImages,
    MemoryImages,
    Resize,
    Triple,
    content_of,
    first_size,
    identify,
    is_long_to_hash,
    load_images,
    mean_and_std,
    read_sizes,
    sample_rows,
)
from stillroom.manifest import NOT_STATED, RealFacts
from stillroom.readers import ArrayImages, Source


@dataclass(frozen=True)
class DataConfig:
    """Which real dataset, and how it is read."""

    source: str = "digits"
    """A name (digits, cifar10, cifar100, tiny-imagenet, imagenet), a path, or a Hub id "owner/name" (also
    "hf://owner/name"). A name wins over a path of the same spelling; "./digits" is the path."""
    root: str = "data"
    """Folder where named datasets are looked for: <name>.npz, <name>/ (folders, parquet, shards) or as published."""
    image_size: int | None = None
    """Side of the images in pixels. None: the named dataset's, or else the short side of the first training image."""
    resize: Resize = "refuse"
    """Images that are not squares of that side: refuse, squash to it, or crop (the centre square, resized). Both
    resize bilinearly, antialiased."""
    image_column: str | None = None
    """Parquet column of the images. None: found by its type, and by the names img and image."""
    label_column: str | None = None
    """Parquet column of the labels. None: label, labels or fine_label."""
    skip_bad_images: bool = False
    """Leave out images that cannot be read, and count them, rather than stop."""
    download: bool = False
    """Download cifar10 or cifar100 into `root` when it is not there."""
    train_per_class: int | None = None
    """Use only the first N training images of each class (all, where a class has fewer)."""
    holdout_per_class: int = 0
    """Above 0: the last N training images of each class leave training and replace the test split, which is not read.
    For tuning, which must never see the test split."""
    holdout_share: float = 0.0
    """Above 0: the same with a share of each class, such as 0.2, at least one image of those that have two."""
    flip: Literal["auto", "on", "off"] = "auto"
    """Whether a mirrored image keeps its class, so that training may flip. auto: yes, except for digits."""
    memory_limit_gib: float = 4.0
    """A split that needs more than this as uint8 pixels is decoded batch by batch; 0 decodes everything so."""
    licence: str | None = None
    """What the owner of these images allows: an identifier such as cc-by-4.0, or words. It stands in the set's manifest
    and card. None: what is known of a named dataset."""

    def __post_init__(self) -> None:
        check_choices(self, "--data")
        if not self.source:
            raise StillroomError("--data.source is empty; give a name, a path or a Hub id 'owner/name'.")
        for flag, value, low, high in (
            ("image-size", self.image_size, 1, 4096),
            ("train-per-class", self.train_per_class, 1, None),
            ("holdout-per-class", self.holdout_per_class, 0, None),
            ("memory-limit-gib", self.memory_limit_gib, 0, None),
        ):
            if value is not None and not (value >= low and (high is None or value <= high)):
                upper = f" and at most {high}" if high is not None else ""
                raise StillroomError(f"--data.{flag} is {value}; it must be at least {low}{upper}.")
        if not 0 <= self.holdout_share < 1:
            raise StillroomError(f"--data.holdout-share is {self.holdout_share}; give a share from 0 to below 1.")
        if self.holdout_share and self.holdout_per_class:
            raise StillroomError(
                f"--data.holdout-share is {self.holdout_share} and --data.holdout-per-class {self.holdout_per_class}, "
                "but a test split is held out one way; give one of them."
            )

    @property
    def holds_out(self) -> bool:
        """Whether the test split is a part of the training images."""
        return self.holdout_per_class > 0 or self.holdout_share > 0


@dataclass(frozen=True)
class Facts:
    """What is known of a named dataset. `mean` and `std` are of training pixels in [0, 1]; None: computed. `flip`:
    whether a mirrored image keeps its label. `folder`: where its original layout lies below the root. `class_names`
    None: its files name them. `licence`: what its authors allow, where they say."""

    classes: int
    image_size: int
    mean: Triple | None
    std: Triple | None
    flip: bool
    test_split: str
    folder: str | None
    class_names: tuple[str, ...] | None = None
    label_column: str = "label"
    licence: str = NOT_STATED


IMAGENET_LICENCE = (
    "ImageNet's terms of access, non-commercial research and education only; the pictures' rights are their owners'"
)
DIGITS = tuple("0123456789")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# fmt: off
CIFAR100 = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish", "forest",
    "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion", "lizard",
    "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange", "orchid",
    "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine", "possum",
    "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper",
    "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone",
    "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf",
    "woman", "worm",
)
# fmt: on

# CIFAR and Tiny-ImageNet have the constants of INFER's published scripts. CIFAR-10's deviations there are the customary
# ones, not those of its pixels (0.247 0.243 0.262). ImageNet's labels are its class folders, sorted.
# fmt: off
FACTS: dict[str, Facts] = {
    #                      classes size mean                      std                       flip   test    folder
    "digits":        Facts(  10,   32, None,                     None,                     False, "test", None, DIGITS,
                           licence="CC BY 4.0, as the UCI repository has them (Alpaydin and Kaynak)"),
    "cifar10":       Facts(  10,   32, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), True,  "test",
                           "cifar-10-batches-py", CIFAR10, licence="not stated by its authors"),
    "cifar100":      Facts( 100,   32, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), True,  "test",
                           "cifar-100-python", CIFAR100, label_column="fine_label",
                           licence="not stated by its authors"),
    "tiny-imagenet": Facts( 200,   64, (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262), True,  "val",
                           "tiny-imagenet-200",
                           licence=f"not stated by its authors; its pictures are ImageNet's: {IMAGENET_LICENCE}"),
    "imagenet":      Facts(1000,  224, (0.485,  0.456,  0.406),  (0.229,  0.224,  0.225),  True,  "val",
                           "ILSVRC2012", licence=IMAGENET_LICENCE),
}
# fmt: on


@dataclass(frozen=True, eq=False)
class RealData:
    """A real dataset, ready for use: `classes` labels, two splits of uint8 [n, 3, image_size, image_size].

    `mean` and `std` are of pixels in [0, 1]: the named dataset's customary constants, or else computed over the
    training split in float64 (a constant channel gets std 1). `flip`: whether a horizontal flip keeps the label.
    `raw_bytes`: training images x native channels (1 if the first is gray, else 3) x height x width, as used or, for
    arrays that were enlarged, as stored. `skipped_images`: bad ones that were left out, and why. `stored_bytes`: what
    the training images occupy at the source: file sizes, array bytes, or the compressed bytes of a parquet column.
    `resize`: the rule by which they were read. `licence`: what their authors allow, in words.
    """

    name: str
    class_names: tuple[str, ...]
    train: Images
    test: Images
    mean: Triple
    std: Triple
    image_size: int
    flip: bool
    skipped_images: tuple[str, ...]
    raw_bytes: int
    stored_bytes: int
    resize: Resize = "refuse"
    licence: str = NOT_STATED

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256, hexadecimal, of class names and of both splits' labels and images, however these are held: pixels, or
        for files that are more than 4 GiB as pixels image size, resize rule, file names and file sizes."""
        splits = [split for split in (self.train, self.test) if isinstance(split, MemoryImages | LazyImages)]
        about = [json.dumps(self.class_names), *(sha256_bytes(split.labels.numpy().tobytes()) for split in splits)]

        def hash_all() -> dict[str, Any]:
            digest = hashlib.sha256(json.dumps(self.class_names).encode())
            for split in splits:
                digest.update(split.labels.numpy().tobytes())
                for piece in content_of(split, self.image_size, self.resize):
                    digest.update(piece)
            return {"fingerprint": digest.hexdigest()}

        if not any(is_long_to_hash(split, self.image_size) for split in splits):
            return hash_all()["fingerprint"]
        files = (identify(split, self.image_size, self.resize) for split in splits)
        return remembered(itertools.chain(about, *files), hash_all)["fingerprint"]


def describe_real(real: RealData) -> RealFacts:
    """The facts of a real dataset that the manifest of a set made of it holds."""
    return RealFacts(
        real.name,
        real.fingerprint,
        len(real.train),
        real.raw_bytes,
        real.stored_bytes,
        real.flip,
        real.resize,
        real.licence,
    )


def load_real(config: DataConfig) -> RealData:
    """Load the dataset that `config` names.

    Raises `StillroomError` for a source that is missing, unknown, damaged or ambiguous, labels that are not 0 ... C-1
    with at least one training image each, fewer than two classes or two of one name, and images that cannot be read
    (all of a split are counted, the first few named) or have another size.
    """
    try:
        return _load(config)
    except OSError as error:
        raise StillroomError(f"--data.source {config.source} cannot be read: {error}.") from error


def fit_size(config: DataConfig, side: int) -> DataConfig:
    """Return `config` for images of `side` pixels; training images that are squares of another size are cropped to it
    unasked, which is the same as squashed.

    Whether they are is judged by the headers of some hundred of them, spread evenly; others are treated as `config`
    says. Raises StillroomError for a source that is missing, unknown or damaged.
    """
    fitted, known = replace(config, image_size=side), FACTS.get(config.source)
    if config.resize != "refuse" or (known is not None and known.image_size == side):
        return fitted
    try:
        train = _open(config)[2].train
        sizes = set(read_sizes(train.images, sample_rows(len(train.labels))))
    except OSError as error:
        raise StillroomError(f"--data.source {config.source} cannot be read: {error}.") from error
    width, height = sizes.pop() if len(sizes) == 1 else (0, -1)
    return replace(fitted, resize="crop") if width == height != side else fitted


@dataclass(frozen=True)
class Look:
    """What a first look at a dataset tells, before any image is decoded: its classes, how many training images each
    has, the short sides of some hundred of them in pixels, and whether there is a test split that is read."""

    class_names: tuple[str, ...]
    counts: tuple[int, ...]
    short_sides: tuple[int, ...]
    has_test: bool


def look_at(config: DataConfig) -> Look:
    """Look at the dataset that `config` names, before anything is held out; raises StillroomError as `load_real` does
    for a source that is missing, unknown or ambiguous, and where no training image can be read."""
    try:
        name, facts, source = _open(config)
        labels = source.train.labels
        classes = _count_classes(source, facts.classes if facts and config.source in FACTS else None, name)
        rows = sample_rows(len(labels))
        sides = [min(size) for size in read_sizes(source.train.images, rows)]
        if not sides:
            first_size(source.train.images, rows)  # which says why
    except OSError as error:
        raise StillroomError(f"--data.source {config.source} cannot be read: {error}.") from error
    names = source.class_names or (facts.class_names if facts and facts.classes == classes else None)
    counts = np.bincount(labels, minlength=classes)
    return Look(names or tuple(map(str, range(classes))), tuple(counts.tolist()), tuple(sides), source.test is not None)


def _load(config: DataConfig) -> RealData:
    name, facts, source = _open(config)
    named = config.source in FACTS
    classes = _count_classes(source, facts.classes if facts and named else None, name)
    test_split = source.test
    if config.holds_out:
        held = count_held_out(np.bincount(source.train.labels, minlength=classes), config)
        train_rows, test_rows = _hold_out(source.train.labels, held)
        if not len(train_rows):
            raise StillroomError(
                f"--data.holdout-per-class {config.holdout_per_class} leaves no training image of {name}; give "
                "fewer than its classes have."
            )
        test_split = source.train
    elif test_split is None:
        raise StillroomError(
            f"--data.source {config.source} has no test split. Add a folder, or parquet files or shards, named "
            f"{', '.join(readers.TEST_SPLITS[:-1])} or {readers.TEST_SPLITS[-1]}, or hold training images out with "
            "--data.holdout-per-class N or --data.holdout-share 0.2."
        )
    else:
        train_rows, test_rows = np.arange(len(source.train.labels)), np.arange(len(test_split.labels))
    if config.train_per_class is not None:
        train_rows = train_rows[_rank_in_class(source.train.labels[train_rows]) < config.train_per_class]

    height, width, channels = first_size(source.train.images, train_rows)
    if facts and not named and (facts.classes, facts.image_size) != (classes, min(height, width)):
        facts = None  # another dataset that happens to have the name
    size = config.image_size or (facts.image_size if facts else min(height, width))
    class_names = source.class_names or (facts.class_names if facts else None) or tuple(map(str, range(classes)))

    _require_own_names(class_names, config.source)
    _require_every_class(source.train.labels[train_rows], class_names, name)
    constants = (facts.mean, facts.std) if facts and facts.mean and facts.std else None
    load = functools.partial(
        load_images,
        size=size,
        resize=config.resize,
        skip_bad_images=config.skip_bad_images,
        memory_limit_bytes=config.memory_limit_gib * 2**30,
    )
    train, train_rows, levels, bad = load(source.train, train_rows, count_levels=constants is None)
    test, test_rows, _, bad_tests = load(test_split, test_rows, count_levels=False)
    _require_every_class(train.labels.numpy(), class_names, name)
    if not len(test):
        raise StillroomError(f"{name} has no test image that can be read.")
    mean, std = constants or mean_and_std(levels)
    as_stored = size * size
    if isinstance(source.train.images, ArrayImages):
        as_stored = min(as_stored, height * width // source.train.images.enlarged)
    return RealData(
        name=name,
        class_names=class_names,
        train=train,
        test=test,
        mean=mean,
        std=std,
        image_size=size,
        flip=config.flip == "on" or (config.flip == "auto" and (facts.flip if facts else True)),
        skipped_images=(*bad, *bad_tests),
        raw_bytes=len(train) * channels * as_stored,
        stored_bytes=source.train.images.stored_bytes(train_rows),
        resize=config.resize,
        licence=config.licence or (facts.licence if facts else NOT_STATED),
    )


# Finding the source


def _open(config: DataConfig) -> tuple[str, Facts | None, Source]:
    """-> the dataset's name, the facts that its name suggests, and what a reader found."""
    name, path = config.source, Path(config.source)
    if name == "digits":
        return name, FACTS[name], readers.read_digits()
    if name in FACTS:
        return name, FACTS[name], _open_named(name, config)
    if not path.exists():
        repo = hub_id(name)
        if repo is None:
            beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
            near = find_near(path.name, [*beside, *(() if "/" in name else FACTS)])
            raise StillroomError(
                f"--data.source {name} is no existing path and no known dataset.{near} Give a folder, a file, or one "
                f"of {', '.join(FACTS)}."
            )
        path = fetch_from_hub(repo, f"--data.source {name}")
        facts = FACTS.get(repo.partition("/")[2])
        return repo, facts, _read_parquet(path, facts, config)
    name = path.resolve().name if path.is_dir() else path.stem
    facts = FACTS.get(name) or next((facts for facts in FACTS.values() if facts.folder == name), None)
    return name, facts, _read_path(path, facts, config)


def _open_named(name: str, config: DataConfig) -> Source:
    root, facts = Path(config.root), FACTS[name]
    npz, folder, original = root / f"{name}.npz", root / name, root / (facts.folder or name)
    if npz.is_file():
        return _read_path(npz, facts, config)
    if folder.is_dir() and readers.find_layout(folder) is not None:
        return _read_path(folder, facts, config)
    if name in readers.CIFAR_PICKLES:
        if config.download and not original.is_dir():
            _download(name, root)
        if original.is_dir():
            return readers.read_cifar_pickles(original, name)
    elif original.is_dir():
        return _read_path(original, facts, config)
    fix = "Pass --data.download to fetch it" if name in readers.CIFAR_PICKLES else "Fetch and unpack it yourself"
    raise StillroomError(
        f"{name} was not found: looked for {npz}, {folder}/ (train/<class>/, parquet or shards) and {original}/. "
        f"{fix}, or say where it is with --data.root."
    )


def _read_path(path: Path, facts: Facts | None, config: DataConfig) -> Source:
    with_test = not config.holds_out
    if path.is_file():
        if path.suffix == ".npz":
            return readers.read_npz(path, config.memory_limit_gib * 2**30, with_test)
        if path.suffix == ".parquet":
            return _read_parquet(path, facts, config)
        fix = " Give the folder that the shards are in." if path.suffix == ".tar" else ""
        raise StillroomError(f"--data.source {path} is neither .npz nor .parquet, nor a folder.{fix}")
    match readers.find_layout(path):
        case "tiny-imagenet":
            return readers.read_tiny_imagenet(path, with_test)
        case "ilsvrc":
            return readers.read_ilsvrc(path, with_test)
        case "class folders":
            return readers.read_folder(path, _test_splits(facts), with_test)
        case "bare class folders":
            return readers.read_bare_folders(path)
        case "parquet":
            return _read_parquet(path, facts, config)
        case "shards":
            return readers.read_shards(path, _test_splits(facts), with_test)
        case None:
            raise readers.no_train_folder(path)


def _read_parquet(path: Path, facts: Facts | None, config: DataConfig) -> Source:
    return readers.read_parquet(
        path,
        config.image_column,
        config.label_column,
        facts.label_column if facts else None,
        _test_splits(facts),
        with_test=not config.holds_out,
    )


def _test_splits(facts: Facts | None) -> list[str]:
    """`readers.TEST_SPLITS`, led by the one that `facts` names: the test split of some datasets has no labels."""
    return sorted(readers.TEST_SPLITS, key=lambda split: split != (facts.test_split if facts else "test"))


def hub_id(source: str) -> str | None:
    """The "owner/name" of a dataset on the Hugging Face Hub that `source` is, or is after "hf://" (and "datasets/", as
    the Hub's own addresses have it); None for anything else, such as a path into a folder that exists."""
    match = re.fullmatch(r"(hf://(?:datasets/)?)?([A-Za-z0-9][\w.-]*)/([A-Za-z0-9][\w.-]*)", source)
    if match is None:
        return None
    address, owner, name = match.groups()
    if address is None and (Path(owner).exists() or Path(name).suffix in (".npz", ".parquet")):
        return None
    return f"{owner}/{name}"


def fetch_from_hub(repo: str, what: str, patterns: Sequence[str] = ("*.parquet",)) -> Path:
    """Return the local folder of the files of the Hub's dataset `repo` that fit `patterns`, as they are there today.

    Raises StillroomError, which begins with `what`, where the Hub's library is not installed or does not get them, and
    where what it got is not what the Hub's hashes say; such a file is deleted.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise StillroomError(f"{what} is no existing path; to read it from the Hub, install stillroom[hub].") from error
    begun = time.time() - 2  # clocks of file systems are coarse
    # Offline, missing, private and refused requests raise errors of several libraries.
    try:
        folder = Path(snapshot_download(repo, repo_type="dataset", allow_patterns=list(patterns)))
    except Exception as error:
        raise StillroomError(
            f"{what} is no existing path and could not be fetched from the Hub: "
            f"{' '.join(str(error).split())[:200]}. Check the spelling and the network, or download its "
            "parquet files and pass their folder."
        ) from error
    for path in sorted(folder.rglob("*")):
        stored = path.resolve()
        if stored.is_file() and stored.stat().st_ctime >= begun and not _is_as_named(stored):
            stored.unlink()
            raise StillroomError(f"{what}: {path.name} came damaged from the Hub, and is deleted here; try again")
    return folder


def _is_as_named(stored: Path) -> bool:
    """Whether a file of the Hub's cache, named by its SHA-256 or, if small, by git's hash of it, has that hash."""
    if re.fullmatch(r"[0-9a-f]{64}", stored.name):
        return sha256_file(stored) == stored.name
    if re.fullmatch(r"[0-9a-f]{40}", stored.name):
        content = stored.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == stored.name
    return True  # of a system without links, whose copies have names of their own


def _download(name: str, root: Path) -> None:
    import torchvision.datasets

    fetch = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    # Network, checksum and disk failures raise errors of several libraries.
    try:
        fetch(root, download=True)
    except Exception as error:
        raise StillroomError(
            f"{name} could not be downloaded to {root}: {error}. Fetch it elsewhere and say where with --data.root."
        ) from error


# Labels and selection


def _count_classes(source: Source, expected: int | None, name: str) -> int:
    """Check the labels of both splits; return how many classes there are."""
    stored = len(source.class_names) if source.class_names is not None else None
    if stored is not None and expected is not None and stored != expected:
        raise StillroomError(f"{name} has {expected} classes, but these files name {stored}; pass their path instead.")
    found = np.unique(source.train.labels)
    if not len(found):
        raise StillroomError(f"{name} has no training images.")
    classes = stored or expected or len(found)
    if classes < 2:
        raise StillroomError(f"{name} has {classes} class; at least 2 are needed to classify.")
    rule = f"its {classes} classes are labelled 0 ... {classes - 1}"
    if stored is None and expected is None:
        rule = f"the {classes} labels that its training images have ({_listed(found)}) must be 0 ... {classes - 1}"
    for split, part in (("training", source.train), ("test", source.test)):
        labels = part.labels if part is not None else found
        wrong = labels[(labels < 0) | (labels >= classes)]
        if len(wrong):
            raise StillroomError(
                f"{name} has the {split} label {_listed(np.unique(wrong))} (on {len(wrong)} of {len(labels)} images), "
                f"but {rule}. Renumber the labels without gaps, or leave out images that are labelled by mistake."
            )
    return classes


def _listed(labels: np.ndarray) -> str:
    return ", ".join(map(str, labels[:10])) + (", ..." if len(labels) > 10 else "")


def _require_own_names(class_names: Sequence[str], source: str) -> None:
    unwritable = [name for name in class_names if name != name.encode(errors="replace").decode()]
    if unwritable:
        raise StillroomError(
            f"--data.source {source} has the class name {unwritable[0]!r}, which UTF-8 cannot write; give it another."
        )
    repeated = [class_name for class_name, count in Counter(class_names).items() if count > 1]
    if repeated:
        labels = [label for label, class_name in enumerate(class_names) if class_name == repeated[0]]
        raise StillroomError(
            f"--data.source {source} has the class name {repeated[0]!r} for the labels {labels}; give every class a "
            "name of its own (class_names in an npz file, the names of a parquet file's ClassLabel, words.txt, "
            "classes.txt beside shards)."
        )


def _require_every_class(labels: np.ndarray, class_names: Sequence[str], name: str) -> None:
    missing = np.flatnonzero(np.bincount(labels.astype(np.int64), minlength=len(class_names)) == 0)
    if len(missing):
        raise StillroomError(
            f"{name}: class {missing[0]} ('{class_names[missing[0]]}') has no training image left after holding out "
            "and skipping; add images, or take the class away."
        )


def _rank_in_class(labels: np.ndarray) -> np.ndarray:
    """How many earlier images have the same label, int64 [n]."""
    order = np.argsort(labels, kind="stable")
    _, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - np.repeat(first, counts)
    return ranks


def count_held_out(counts: np.ndarray, config: DataConfig) -> np.ndarray:
    """How many images of each class become the test split, of so many in all, where `config` holds some out."""
    if config.holdout_per_class:
        return np.full_like(counts, config.holdout_per_class)
    return np.minimum(np.maximum((counts * config.holdout_share).astype(counts.dtype), 1), np.maximum(counts - 1, 0))


def _hold_out(labels: np.ndarray, held: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-> positions of all but the last `held[label]` images of each class, and of those."""
    rank_from_end = _rank_in_class(labels[::-1])[::-1]
    kept = rank_from_end >= held[labels]
    return np.flatnonzero(kept), np.flatnonzero(~kept)
