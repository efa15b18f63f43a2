"""The layouts in which others publish sets: found, fetched if need be, and opened; no image is decoded yet.

    layout = find_layout("syn/mine", "auto")                # "auto": class folders, which may be INFER's or not
    root = locate("syn/mine", notes)
    published = open_published(root, layout, None, None, notes)

Links are refused: they could lead anywhere.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from stillroom.data import fetch_from_hub, hub_id
from stillroom.errors import StillroomError
from stillroom.manifest import MANIFEST_NAME
from stillroom.readers import LEFT_BEHIND, FileImages, Source, Split, find_parquet, npz_headers, read_npz, read_parquet

PublishedLayout = Literal["auto", "folder", "hub", "infer", "npz"]

# Settings that only some layouts have, and what these are made of.
ONLY_OF = {
    "image_column": (("hub",), "parquet"),
    "label_column": (("hub",), "parquet"),
    "soft_label_column": (("hub",), "parquet"),
    "soft_labels": (("auto", "folder", "infer"), "class folders"),
    "teachers": (("auto", "infer"), "INFER's files"),
}
SHOWN = {"auto": "folder", "infer": "folder"}  # whose images are those of a folder, until compensators are found


def find_layout(source: str, asked: PublishedLayout) -> PublishedLayout:
    """Return the layout of the published set `source`, by its files where `asked` is "auto".

    "auto" is left where class folders may be INFER's or not. Raises StillroomError for what is neither here nor an id
    of the Hub, for files of no layout, and for a layout that is not read from the Hub.
    """
    root, repo = Path(source), _hub_id_of(source)
    if asked == "auto":
        if repo is not None or root.suffix == ".parquet" or (root.is_dir() and find_parquet(root)):
            return "hub"
        if not root.is_dir() and root.suffix != ".npz":
            raise StillroomError(
                f"import: {root} is neither .npz nor .parquet, nor a folder; unpack it, or say --layout"
            )
        return "auto" if root.is_dir() else "npz"
    if repo is not None and asked != "hub":
        raise StillroomError(f"import: --layout {asked} reads what lies here; download {source} and give its folder")
    return asked


def refuse_settings_of_others(layout: PublishedLayout, source: str, given: Mapping[str, object]) -> None:
    """Raise StillroomError for a setting, by its name in `given`, that `layout` does not have; None is not set."""
    for name, (layouts, kind) in ONLY_OF.items():
        if given[name] is not None and layout not in layouts:
            value = given[name]
            shown = " ".join(value) if isinstance(value, tuple) else value
            raise StillroomError(
                f"import: --{name.replace('_', '-')} {shown} is for {kind}, but {source} is read as "
                f"{SHOWN.get(layout, layout)}; leave it out"
            )


def locate(source: str, notes: list[str]) -> Path:
    """Return where the published set lies, fetched from the Hub if it is there, which is noted.

    Raises StillroomError for a set of this artifact, and for what cannot be fetched or has no parquet files there.
    """
    root, repo = Path(source), _hub_id_of(source)
    if repo is not None:
        root = fetch_from_hub(repo, f"import: {source}", ("*.parquet", MANIFEST_NAME))
        notes.append(f"from the Hub, as it is at {root.name}")
    if (root / MANIFEST_NAME).is_file():
        whole = "" if repo is None else ", downloaded whole"
        raise StillroomError(
            f"import: {source} is a distilled set of this artifact already; load_distilled reads it{whole}"
        )
    if repo is not None and not find_parquet(root):
        raise StillroomError(f"import: {source} has no parquet files on the Hub; download it and give its folder")
    return root


def open_published(
    root: Path, layout: PublishedLayout, image_column: str | None, label_column: str | None, notes: list[str]
) -> Source:
    """Return the published images, labels and class names as files of `layout` have them; columns are parquet's."""
    if layout == "hub":
        return _open_parquet(root, image_column, label_column)
    if layout == "npz":
        return _open_npz(root, notes)
    return _open_folders(root, layout)


def _hub_id_of(source: str) -> str | None:
    """Return the Hub's id of a set that does not lie here, None for one that does."""
    if Path(source).exists():
        return None
    repo = hub_id(source)
    if repo is None:
        raise StillroomError(
            f"import: {source} does not exist; give the folder, the parquet or npz file, or the Hub id (owner/name) "
            "of the published set"
        )
    return repo


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in `folder`, sorted by name, without hidden names. Raises StillroomError for links."""
    with os.scandir(folder) as entries:
        shown = sorted(
            (e for e in entries if not e.name.startswith(".") and e.name.lower() not in LEFT_BEHIND),
            key=lambda e: e.name,
        )
    for entry in shown:
        if entry.is_symlink():
            raise StillroomError(
                f"import: {entry.path} is a symbolic link, which could lead anywhere; put a copy there"
            )
    return shown


def _open_folders(root: Path, layout: PublishedLayout) -> Source:
    """A folder per class, whose name is the class's."""
    if not root.is_dir():
        raise StillroomError(f"import: {root} is a file; --layout {layout} reads a folder of class folders")
    entries = _entries(root)
    folders = [entry.name for entry in entries if entry.is_dir()]
    if not folders:
        arrays = next((f"; give {entry.path}" for entry in entries if entry.name.endswith(".npz")), None)
        hint = arrays or "; give the folder that has them"
        raise StillroomError(f"import: {root} has no class folders and no parquet files{hint}")
    paths: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        files = _entries(root / folder)
        odd = next((entry.name for entry in files if not entry.is_file()), None)
        if odd is not None:
            hint = f"; give {root / folder}" if folder in ("train", "test", "val") else "; remove it"
            raise StillroomError(f"import: {root / folder} holds {odd!r}, which is no image file{hint}")
        paths += [f"{folder}/{entry.name}" for entry in files]
        labels += [label] * len(files)
    return Source(Split(FileImages(root, tuple(paths)), np.array(labels, np.int64)), None, tuple(folders))


def _open_parquet(root: Path, image_column: str | None, label_column: str | None) -> Source:
    """Parquet files: those named for training, or the only one."""
    files = find_parquet(root) if root.is_dir() else [root]
    if not files:
        raise StillroomError(f"import: {root} has no parquet files; --layout folder reads class folders")
    try:
        path = files[0] if len(files) == 1 else root
        return read_parquet(path, image_column, label_column, with_test=False)
    except StillroomError as error:  # of the reader of real data, which has other flags
        message = str(error).replace(" as --data.source", "").replace("--data.", "--")
        raise StillroomError(f"import: {message}") from error


def _open_npz(root: Path, notes: list[str]) -> Source:
    """One npz file, by the names that real data have there: what it holds for training."""
    if root.is_dir():
        raise StillroomError(f"import: {root} is a folder; --layout npz reads a file")
    try:
        source = read_npz(root, math.inf, with_test=False, floats_too=True)
        kind = npz_headers(root)["train_images"][1]
    except StillroomError as error:
        raise StillroomError(f"import: {error}") from error
    if kind.kind == "f":
        notes.append(f"pixels of {kind} rounded to 8 bits")
    return source
