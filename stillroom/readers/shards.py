"""WebDataset's shards: tar files of samples, each an image `<key>.jpg` (jpeg, png, webp) with its label beside it.

The label is `<key>.cls`, a whole number as text, or the field `label` or `class` of `<key>.json`. A key is a member's
name up to the first dot of its last part. Members of a sample may come in any order; those with other endings are
passed over, as are names that begin with a dot or with `__`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.errors import StillroomError
from stillroom.readers.listing import TEST_SPLITS, choose_splits, find_files, quoted, read_lines, visible
from stillroom.readers.stored import Source, Span, Split, changed_at
from stillroom.readers.tar import compressed, member_name, read_members

# Ending: (part of the sample, largest size in bytes, far above any photograph or label)
PARTS = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp"), ("image", 2**28)),
    "cls": ("cls", 2**10),
    "json": ("json", 2**20),
}
LABEL_FIELDS = ("label", "class")
CLASS_NAMES = ("classes.txt", "class_names.json")
COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst")


@dataclass(frozen=True, eq=False)
class ShardImages:
    """Images within tar files: `firsts` int64 [shards + 1] is the first image of each shard, `starts` and `sizes` int64
    [n] are the bytes of each image."""

    shards: tuple[Path, ...]
    firsts: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray

    def _span(self, index: int) -> Span:
        shard = int(np.searchsorted(self.firsts, index, side="right")) - 1
        return Span(self.shards[shard], int(self.starts[index]), int(self.sizes[index]))

    def name(self, index: int) -> str:
        span = self._span(index)
        return member_name(span.path, span.start)

    def fetch(self, indices: np.ndarray) -> Sequence[Span]:
        return [self._span(i) for i in indices]

    def stored_bytes(self, indices: np.ndarray) -> int:
        return int(self.sizes[indices].sum())

    def identity(self, indices: np.ndarray) -> Iterable[str]:
        spans = (self._span(i) for i in indices)
        return (f"{span.path.name} {span.start} {span.size}" for span in spans)

    def times(self, indices: np.ndarray) -> Iterable[int]:
        return map(changed_at, self.shards)


def find_shards(root: Path) -> list[Path]:
    """The tar files of a folder, compressed ones too, at most two folders deep, sorted."""
    found = [path for pattern in ("*.tar", "*.tar.*", "*.tgz") for path in find_files(root, pattern)]
    return sorted(path for path in found if path.suffix in (".tar", *COMPRESSED) and path.is_file())


def has_shards(root: Path) -> bool:
    """Whether `root` holds tar files of a training split, and no class folders."""
    if (root / "train").is_dir() and any(entry.is_dir() for entry in visible(root / "train")):
        return False
    return bool(choose_splits(root, find_shards(root), TEST_SPLITS, with_test=False)[0])


def read_shards(root: Path, test_splits: Sequence[str] = TEST_SPLITS, with_test: bool = True) -> Source:
    """A folder of tar files, each of the split that its name contains (`train-000000.tar`), or else its folder's name.
    Classes are named by `classes.txt`, a line each, or `class_names.json`, a list, in label order, beside the shards.

    Raises StillroomError for shards that are compressed, cut off or damaged, and for samples that are not one image
    with one label.
    """
    train, test = choose_splits(root, find_shards(root), test_splits, with_test)
    for path in (*train, *test):
        if path.suffix in COMPRESSED:
            raise compressed(path)
    names = _read_class_names(root)
    label_of = {name: label for label, name in enumerate(names or ())}
    return Source(_read_split(train, label_of), _read_split(test, label_of) if test else None, names)


def _read_class_names(root: Path) -> tuple[str, ...] | None:
    path = next((root / name for name in CLASS_NAMES if (root / name).is_file()), None)
    if path is None:
        return None
    lines = read_lines(path)
    names: Any = [line.strip() for line in "\n".join(lines).strip().split("\n")]
    if path.suffix == ".json":
        try:
            names = json.loads("\n".join(lines))
        except (ValueError, RecursionError) as error:
            raise StillroomError(f"{path} is no JSON: {error}. Write a list of class names, in label order.") from error
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise StillroomError(f"{path} must hold a name for every class, in label order, none of them empty.")
    return tuple(names)


def _read_split(shards: Sequence[Path], label_of: Mapping[str, int]) -> Split:
    # Headers lie far apart, and most of the time goes by in waiting for them: so many shards at once.
    with ThreadPoolExecutor(min(16, len(shards))) as pool:
        indexes = list(pool.map(lambda path: _index(path, label_of), shards))
    starts, sizes, labels = np.concatenate(indexes).T.copy()
    firsts = np.cumsum([0, *map(len, indexes)])
    return Split(ShardImages(tuple(shards), firsts, starts, sizes), labels)


def _index(path: Path, label_of: Mapping[str, int]) -> np.ndarray:
    """-> start, size and label of each image of a shard, int64 [images, 3], in the order of the images."""
    found: dict[str, dict[str, Any]] = {"image": {}, "cls": {}, "json": {}}
    other = 0
    with path.open("rb", buffering=2**13) as file:
        for member in read_members(file, path):
            key, ending = _split_name(member.name)
            part, largest = PARTS.get(ending, ("", 0))
            if not part or not key:
                other += 1
                continue
            if key in found[part]:
                what = "image" if part == "image" else f".{part}"
                raise StillroomError(
                    f"{path} has the {what} of the sample {key!r} twice; give each sample its own key."
                )
            where = f"{path}: {member.name!r}"
            if member.size > largest:
                raise StillroomError(
                    f"{where} has {member.size:,} bytes, above the {largest:,} that a .{ending} may have; leave it out."
                )
            found[part][key] = (member.start, member.size)
            if part != "image":
                file.seek(member.start)
                found[part][key] = _parse_label(file.read(member.size), part, where, label_of)
    for key, label in found["cls"].items():
        other_label = found["json"].get(key)
        if other_label is not None and other_label != label:
            raise StillroomError(
                f"{path} has two labels for the sample {key!r}: {label} in .cls, {other_label} in .json; mend one."
            )
    labels = {key: label for key, label in (found["json"] | found["cls"]).items() if label is not None}
    _require_whole_samples(path, found, labels, other)
    return np.array([(*span, labels[key]) for key, span in found["image"].items()], np.int64).reshape(-1, 3)


def _split_name(name: str) -> tuple[str, str]:
    """-> key and ending of a member, both empty where its name hides it."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if any(part.startswith(("__", ".")) and part != ".." for part in parts):
        return "", ""
    stem, _, ending = parts[-1].partition(".") if parts else ("", "", "")
    return "/".join([*parts[:-1], stem]), ending.lower()


def _parse_label(content: bytes, part: str, where: str, label_of: Mapping[str, int]) -> int | None:
    """-> the label that a .cls or .json member holds, not yet checked against the classes; None where JSON has none."""
    try:
        value = content.decode().strip() if part == "cls" else json.loads(content)
    except (ValueError, RecursionError) as error:
        raise StillroomError(f"{where} cannot be read: {error}. Write it again.") from error
    if part == "cls":
        value = int(value) if re.fullmatch(r"-?[0-9]{1,18}", value) else value
    else:
        fields = value if isinstance(value, dict) else {}
        value = next((fields[f] for f in LABEL_FIELDS if fields.get(f) is not None), None)
        if value is None:
            return None
        value = label_of.get(value, value) if isinstance(value, str) else value
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**63:
        shown = repr(value)[:80] if isinstance(value, str | float | int) else f"of type {type(value).__name__}"
        names = f", or a name of {' or '.join(CLASS_NAMES)}" if part == "json" else ""
        raise StillroomError(f"{where} has the label {shown}; labels must be whole numbers 0 ... C-1{names}.")
    return value


def _require_whole_samples(path: Path, found: dict[str, dict[str, Any]], labels: dict[str, int], other: int) -> None:
    images = found["image"]
    without_label = [key for key in images if key not in labels]
    without_image = [key for key in found["json"] | found["cls"] if key not in images]
    for keys, what, fix in (
        (without_label, "a label", "<key>.cls, or <key>.json with the field label or class"),
        (without_image, "an image", "<key>.jpg, .jpeg, .png or .webp"),
    ):
        if keys:
            count = f"{len(keys)} sample{'s' if len(keys) > 1 else ''}"
            raise StillroomError(
                f"{path} has {count} without {what} ({quoted(keys)}). Add {fix}; or move the shard away."
            )
    if other and not images:
        raise StillroomError(
            f"{path} has members ({other}), but no sample among them; one is <key>.jpg with <key>.cls or <key>.json."
        )
