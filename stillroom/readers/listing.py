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
