"""What lies in a dataset's folder: the names that count, and which files belong to which split."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from stillroom.errors import StillroomError

TEST_SPLITS = ("test", "val", "valid", "validation")
LEFT_BEHIND = ("thumbs.db", "desktop.ini", "__macosx")  # by Windows and archivers, who do not hide names by a dot


def visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        shown = (e for e in entries if not e.name.startswith(".") and e.name.lower() not in LEFT_BEHIND)
        return sorted(shown, key=lambda e: e.name)


def quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StillroomError(f"{path} cannot be read: {error}. Unpack the dataset again.") from error


def find_files(root: Path, pattern: str) -> list[Path]:
    """The files of a folder whose names fit `pattern`, at most two folders deep and nothing hidden, sorted."""
    found = [path for folder in ("", "*/", "*/*/") for path in root.glob(f"{folder}{pattern}")]
    return sorted(path for path in found if not any(p.startswith(".") for p in path.relative_to(root).parts))


def choose_splits(
    root: Path, files: Sequence[Path], test_splits: Sequence[str], with_test: bool
) -> tuple[list[Path], list[Path]]:
    """-> the files of training, and those of the first of `test_splits` that has some. A file belongs to the split that
    its own name contains, or else the name of its folder below `root`."""
    found: dict[str, list[Path]] = {}
    for path in files:
        for text in (path.name, path.parent.name if path.parent != root else ""):
            split = next((s for s in ("train", *test_splits) if s in text.lower()), None)
            if split:
                found.setdefault(split, []).append(path)
                break
    train, test = found.get("train", []), next((found[s] for s in test_splits if with_test and s in found), [])
    for part in (train, test) if train else ():
        folders = sorted({str(path.parent) for path in part})
        if len(folders) > 1:
            raise StillroomError(f"{root} holds several datasets; pass one of {folders} as --data.source.")
    return train, test
