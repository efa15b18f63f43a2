"""Soft labels as others store them, read as logits: .npy, an array of an npz file, torch files, a parquet column; FKD's
batches are only named.

Nothing is unpickled that could run: .npy and npz without pickle, torch files with ``weights_only``.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from stillroom.errors import StillroomError
from stillroom.files import load_torch
from stillroom.readers import FileImages, ParquetImages, Stored, npz_array, npz_headers, read_column

INDEX_FILE, SOFT_LABEL_FILE = "index.csv", "soft_labels.npy"  # of a folder that was exported here
INDEX_COLUMNS = ["file", "label", "class", "image", "compensator"]  # compensator: -1 for an image as it is
SOFT_LABEL_ARRAY = "soft_labels"  # of an npz file
SMALLEST_PROBABILITY = 1e-8  # its logarithm stands for that of 0, which no label can store
MOST_UNASKED = 2**20  # values of a column that are read to tell what is wrong with them
SOFT_LABEL_COLUMNS = ("soft_label", "soft_labels", "logits", "probabilities", "probs")

SoftLabelKind = Literal["logits", "probabilities"]


def read_logits(
    stored: Stored,
    root: Path,
    labels: np.ndarray,
    ours: np.ndarray,
    given: str | None,
    column: str | None,
    kind: SoftLabelKind,
    notes: list[str],
) -> np.ndarray | None:
    """Return logits float32 [images, classes] that come with the published images, columns in our label order, or None.

    `labels` int64 [images] are ours, and so is `ours` [classes], by the number that parquet and npz have for a class.
    Class folders have the file `given`, whose columns are told to be in our order, or what an export left; parquet has
    `column`. Raises StillroomError for what cannot be read safely, and for other shapes and kinds.
    """
    if isinstance(stored, FileImages):
        return _read_file(root, list(stored.paths), labels, len(ours), given, kind, notes)
    if isinstance(stored, ParquetImages):
        files = list(dict.fromkeys(file for file, _ in stored.groups))
        logits = _read_column(files, len(ours), column, kind, notes)
    else:
        logits = _read_array(root, len(labels), len(ours), kind, notes)
    return None if logits is None else _move_columns(logits, ours)


def read_index(root: Path) -> list[dict[str, str]]:
    """The lines of the index that an export left in `root`, by INDEX_COLUMNS; none where there is no such index.

    Raises StillroomError where it cannot be read as CSV.
    """
    path = root / INDEX_FILE
    if not path.is_file():
        return []
    try:  # names of another encoding are no names of ours, and are refused as such
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            lines = csv.DictReader(file, restval="")
            return list(lines) if lines.fieldnames == INDEX_COLUMNS else []
    except csv.Error as error:
        raise StillroomError(f"import: {path} cannot be read as CSV ({error}); export again, or remove it") from error


def _read_file(
    root: Path,
    paths: list[str],
    labels: np.ndarray,
    classes: int,
    given: str | None,
    kind: SoftLabelKind,
    notes: list[str],
) -> np.ndarray | None:
    """Return logits float32 [images, classes] in the order of `paths`, or None with a note why there are none.

    From the file `given`, whose rows stand in that order, or else those that an export left in `root`, by its index.
    """
    path = Path(given) if given is not None else root / SOFT_LABEL_FILE
    if given is None and not path.is_file():
        return None
    if given is None and not read_index(root):
        raise StillroomError(
            f"import: {path} lies beside the images, but no {INDEX_FILE} of an export says which row is whose; give "
            f"--soft-labels {path} if rows stand in the order of sorted class folders and sorted files, or move it away"
        )
    if not path.exists():
        raise StillroomError(f"--soft-labels {path} does not exist; leave it out to import images alone")
    if path.is_dir():
        notes.append(_describe_fkd(path))
        return None
    shape = [len(paths), classes]
    stored: Tensor | np.ndarray
    if path.suffix == ".npy":
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)  # its shape is known before memory is taken
        except Exception as error:  # numpy's parser raises many classes
            raise StillroomError(f"import: {path} cannot be read as .npy without pickle: {error}") from error
        stored, is_float = array, array.dtype.kind == "f"
    else:
        stored = _load_torch(path)
        if not isinstance(stored, Tensor):
            notes.append(_describe_fkd(path))
            return None
        is_float = stored.is_floating_point()
    if list(stored.shape) != shape or not is_float:  # looked at first: a few bytes can be a tensor of any shape
        raise StillroomError(
            f"import: {path} holds {stored.dtype} {list(stored.shape)}; needed are floats {shape}, a row per image"
        )
    values = stored.float().numpy() if isinstance(stored, Tensor) else np.array(stored, np.float32)
    logits = to_logits(values, kind, str(path))
    return logits if given is not None else _order_by_index(logits, root, paths, labels)


def _order_by_index(logits: np.ndarray, root: Path, paths: list[str], labels: np.ndarray) -> np.ndarray:
    """Return exported logits [images, classes], rows in the order of `paths`, columns in that of our `labels` [images].

    The index says which row and label the export had for a file; our label of the same file says where that column
    belongs. Raises StillroomError where the index and the images differ.
    """
    index = read_index(root)
    row_of = {line["file"]: row for row, line in enumerate(index)}
    absent = [name for name in paths if name not in row_of]
    if absent or len(index) != len(paths):
        raise StillroomError(f"import: {root / INDEX_FILE} and the images differ, as in {absent[:3]}; export again")
    rows = [row_of[name] for name in paths]
    pairs = {(index[row]["label"], label) for row, label in zip(rows, labels.tolist(), strict=True)}
    theirs, ours = [str(label) for label in range(logits.shape[1])], dict(pairs)
    if len(pairs) != len(theirs) or set(ours) != set(theirs):
        raise StillroomError(f"import: {root / INDEX_FILE} has no one label for each class of images; export again")
    return _move_columns(logits[rows], np.array([ours[label] for label in theirs]))


def _move_columns(logits: np.ndarray, ours: np.ndarray) -> np.ndarray:
    """Return logits [rows, classes] with each column at our label of its class."""
    moved = np.empty_like(logits)
    moved[:, ours] = logits
    return moved


def _load_torch(path: Path) -> Any:
    try:
        return load_torch(path)
    except Exception as error:
        raise StillroomError(
            f"import: {path} cannot be read without running what it holds ({str(error).splitlines()[0]}); leave it "
            "out, or save its logits as .npy, a row per image"
        ) from error


def _describe_fkd(path: Path) -> str:
    """Say why the labels of FKD's batches (Shen & Xing, ECCV 2022; SRe2L's relabelling) are not taken.

    Each file is a list: crop boxes, flips, mixing partners, weight and box, and logits [batch, classes]. They belong to
    shuffled, cropped, mixed images, while a static label here belongs to a view as it is.
    """
    files = sorted(path.glob("epoch_*/batch_*.tar")) if path.is_dir() else [path]
    if not files:
        raise StillroomError(f"--soft-labels {path} has no epoch_*/batch_*.tar; give these, or a file with a row each")
    batch = _load_torch(files[0])
    logits = batch[-1] if isinstance(batch, list) and batch and isinstance(batch[-1], Tensor) else None
    if logits is None or logits.ndim != 2:
        raise StillroomError(f"import: {files[0]} is no tensor and no batch of FKD, whose last part is its logits")
    return (
        f"soft labels of {path} are not imported: {len(files)} batches of logits {list(logits.shape)} of crops, flips "
        "and mixes in shuffled order, none of which is an image as it is; label the set anew with --labels static"
    )


def _read_column(
    files: list[Path], classes: int, wanted: str | None, kind: SoftLabelKind, notes: list[str]
) -> np.ndarray | None:
    """Return logits float32 [rows, classes] of the parquet column `wanted`, or of one that is named as usual.

    None where there is none. Raises StillroomError for a column of another type, and for rows of another length.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    schema = pq.read_schema(files[0])
    column = wanted or next((name for name in SOFT_LABEL_COLUMNS if name in schema.names), None)
    if column is None:
        return None
    parts = []
    for file in files:
        if column not in pq.read_schema(file).names:
            raise StillroomError(f"import: {file} has no column {column!r}; it has {schema.names}")
        cell = pq.read_schema(file).field(column).type
        is_list = pa.types.is_list(cell) or pa.types.is_large_list(cell) or pa.types.is_fixed_size_list(cell)
        if not is_list or not pa.types.is_floating(cell.value_type):
            raise StillroomError(f"import: column {column!r} of {file} is {cell}; soft labels are lists of floats")
        cells = _read_cells(file, column, classes)
        sizes = set(pc.list_value_length(cells).to_pylist())
        if sizes - {classes} or cells.null_count:
            raise StillroomError(
                f"import: column {column!r} of {file} has lists of {sorted(map(str, sizes))[:5]} values; every row "
                f"needs {classes}"
            )
        parts.append(pc.list_flatten(cells).to_numpy().astype(np.float32).reshape(-1, classes))
    notes.append(f"soft labels from column {column!r}, {kind}")
    return to_logits(np.concatenate(parts), kind, f"column {column!r} of {files[0]}")


def _read_cells(file: Path, column: str, classes: int) -> Any:
    """Return a column of lists, a pyarrow ChunkedArray.

    Raises StillroomError where it says to have many more values than a row of `classes` each, which a few bytes can be.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as opened:
        groups = [opened.metadata.row_group(number) for number in range(opened.num_row_groups)]
        chunks = [group.column(c) for group in groups for c in range(group.num_columns)]
        values = sum(chunk.num_values for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)
        needed = opened.metadata.num_rows * classes
        if values > max(2 * needed, MOST_UNASKED):
            raise StillroomError(f"import: column {column!r} of {file} has {values:,} values; {needed:,} are needed")
        parts = [read_column(opened, number, column, file).chunks for number in range(len(groups))]
        return pa.chunked_array([chunk for part in parts for chunk in part], opened.schema_arrow.field(column).type)


def _read_array(path: Path, images: int, classes: int, kind: SoftLabelKind, notes: list[str]) -> np.ndarray | None:
    """Return logits float32 [images, classes] of the array `soft_labels` of an npz file; None where it has none.

    Raises StillroomError for an array of another shape or type, before it is read.
    """
    shape, dtype = npz_headers(path).get(SOFT_LABEL_ARRAY, (None, None))
    if shape is None or dtype is None:
        return None
    if shape != (images, classes) or dtype.kind != "f":
        raise StillroomError(
            f"import: '{SOFT_LABEL_ARRAY}' of {path} is {dtype} {list(shape)}; needed are floats [{images}, "
            f"{classes}], a row per image"
        )
    with np.errstate(over="ignore"):  # what is too large is refused as not finite
        values = npz_array(path, SOFT_LABEL_ARRAY).astype(np.float32)
    notes.append(f"soft labels from the array '{SOFT_LABEL_ARRAY}', {kind}")
    return to_logits(values, kind, f"'{SOFT_LABEL_ARRAY}' of {path}")


def to_logits(values: np.ndarray, kind: SoftLabelKind, where: str) -> np.ndarray:
    """Return float32 [rows, classes] as logits: probabilities by their logarithm, whose softmax gives them back.

    Raises StillroomError for values that are not finite, and where the rows are plainly the other kind.
    """
    if not np.isfinite(values).all():
        raise StillroomError(f"import: soft labels of {where} are not all finite; leave them out, or mend them")
    are_probabilities = bool((values >= 0).all() and np.allclose(values.sum(1), 1, atol=0.01))
    if are_probabilities != (kind == "probabilities"):
        said, fix = ("sum to one", "probabilities") if are_probabilities else ("do not sum to one", "logits")
        raise StillroomError(f"import: soft labels of {where} {said}; pass --soft-label-kind {fix}")
    return np.log(np.maximum(values, SMALLEST_PROBABILITY)) if are_probabilities else values
