"""Parquet files, as on the Hugging Face Hub."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from stillroom.errors import StillroomError
from stillroom.files import cache_root
from stillroom.readers.listing import TEST_SPLITS, choose_splits, find_files
from stillroom.readers.stored import Source, Split, changed_at

# A few bytes of parquet can stand for any number of values: one of a dictionary again and again, or zeros, compressed.
LARGEST_GROUP = 2**31  # bytes of a column in one row group, as they are in memory
FREE_BYTES = 2**33  # of a disk that unpacked images leave free
LARGEST_ROWS = 2**27  # of a file: a hundred times ImageNet's


@contextmanager
def _reading_parquet(path: Path) -> Iterator[None]:
    """A damaged file makes pyarrow raise its own errors, OSError, or UnicodeDecodeError from a column's name."""
    try:
        yield
    except StillroomError:
        raise
    except Exception as error:
        raise StillroomError(f"{path} cannot be read as parquet: {error}. Fetch the file again.") from error


def read_column(file: Any, group: int, column: str, where: Path, most: int | None = None) -> Any:
    """Return a row group's column of an open parquet file, a pyarrow ChunkedArray, in memory that is bounded.

    Raises StillroomError where it takes more than `most` bytes (None: LARGEST_GROUP); no more than twice that is taken.
    """
    import pyarrow as pa

    most = LARGEST_GROUP if most is None else most
    meta = file.metadata.row_group(group)
    chunks = [meta.column(c) for c in range(meta.num_columns)]
    # No value is larger than all that is stored, however often it comes.
    stored = sum(c.total_uncompressed_size for c in chunks if _belongs(c.path_in_schema, column))
    rows = max(1, min(1024, most // max(1, stored)))
    taken, parts = stored, []
    batches = file.iter_batches(rows, row_groups=[group], columns=[column]) if stored <= most else ()
    for batch in batches:
        taken += batch.nbytes
        if taken > most:
            break
        parts.append(batch.column(0))
    if taken > most:
        raise StillroomError(
            f"{where} holds more than {most / 2**30:.1f} GiB of {column!r} in row group {group}; write it in "
            "smaller row groups, or do not trust it"
        )
    return pa.chunked_array(parts, file.schema_arrow.field(column).type)


class _Unpacked:
    """Row groups whose images lie one by one in a nameless file of the cache folder, which ends with the process.

    It takes at most `most` bytes, and leaves FREE_BYTES of the disk free; what does not fit is not kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._file: BinaryIO | None = None
        self._end = 0
        self._places: dict[int, np.ndarray] = {}  # per group int64 [rows, 2]: first byte and size, -1 where none is

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()

    def put(self, group: int, images: Any) -> None:
        """Keep a group's images, a pyarrow array of bytes, if there is room for them."""
        try:
            folder = cache_root()
            if self._end + images.nbytes > self._most or _free_bytes(folder) < images.nbytes + FREE_BYTES:
                return
            if self._file is None:
                folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - open as long as this is
            self._file.seek(self._end)
            sizes = [-1 if image is None else self._write(image) for image in (cell.as_py() for cell in images)]
        except OSError:  # the cache is read-only, or full after all
            self._most = 0
            return
        held = np.array(sizes, np.int64)
        firsts = self._end + np.cumsum([0, *np.maximum(held, 0)])
        self._places[group] = np.stack([firsts[:-1], held], axis=1)
        self._end = int(firsts[-1])

    def _write(self, image: bytes) -> int:
        assert self._file is not None
        if self._file.write(image) < len(image):
            raise OSError("the disk is full")
        return len(image)

    def take(self, group: int, rows: np.ndarray) -> list[bytes | None] | None:
        """The images of a group; None where it is not here."""
        if self._file is None or group not in self._places:
            return None
        images: list[bytes | None] = []
        for first, size in self._places[group][rows].tolist():
            self._file.seek(first)
            images.append(None if size < 0 else self._file.read(size))
        return images


def _free_bytes(folder: Path) -> int:
    """Bytes that are free on the disk of `folder`, or of the nearest folder above it that is there."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


@dataclass(frozen=True, eq=False)
class ParquetImages:
    """One encoded image per row. A row group is the smallest piece that parquet can read: each is read once per
    `fetch`, and the last one is kept, so reading in order costs one pass. A group that is read a second time is
    unpacked, so that shuffled reading costs two passes and not a group per image.

    `groups` has a (file, row group) pair for each row group; `starts` int64 [groups + 1] is the first row of each.
    """

    column: str
    groups: tuple[tuple[Path, int], ...]
    group_bytes: tuple[int, ...]
    starts: np.ndarray
    _last: dict[int, Any] = field(default_factory=dict, repr=False)
    _read: set[int] = field(default_factory=set, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @functools.cached_property
    def _unpacked(self) -> _Unpacked:
        # Encoded images hardly compress: a file of which much more comes is not unpacked to the end.
        return _Unpacked(2 * sum(self.group_bytes))

    def _group_of(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.starts, rows, side="right") - 1

    def name(self, index: int) -> str:
        group = int(self._group_of(np.asarray(index)))
        path = self.groups[group][0]
        first = next(g for g, (other, _) in enumerate(self.groups) if other == path)
        return f"{path} row {index - int(self.starts[first])}"

    def _cells(self, group: int) -> Any:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        if group not in self._last:
            path, number = self.groups[group]
            with _reading_parquet(path), pq.ParquetFile(path) as file:
                cells = read_column(file, number, self.column, path)
            if pa.types.is_struct(cells.type):
                cells = pc.struct_field(cells, "bytes")
            self._last.clear()
            self._last[group] = cells
            if group in self._read:
                self._unpacked.put(group, cells)
            self._read.add(group)
        return self._last[group]

    def fetch(self, indices: np.ndarray) -> Sequence[bytes | None]:
        groups = self._group_of(indices)
        items: list[bytes | None] = [None] * len(indices)
        with self._lock:  # of threads that draw the next batch
            for group in map(int, np.unique(groups)):
                positions = np.flatnonzero(groups == group)
                rows = indices[positions] - self.starts[group]
                images = self._unpacked.take(group, rows)
                if images is None:
                    cells = self._cells(group)
                    images = [cells[int(row)].as_py() for row in rows]
                for position, image in zip(positions, images, strict=True):
                    items[position] = image
        return items

    def stored_bytes(self, indices: np.ndarray) -> int:
        """The image column's compressed bytes, from the footers; a row group used in part counts in proportion."""
        used = np.bincount(self._group_of(indices), minlength=len(self.groups))
        rows = np.maximum(np.diff(self.starts), 1)
        return round(sum(size * int(u) / int(n) for size, u, n in zip(self.group_bytes, used, rows, strict=True)))

    def identity(self, indices: np.ndarray) -> Iterable[str]:
        files = dict.fromkeys(path for path, _ in self.groups)
        yield from (f"{path.name} {path.stat().st_size}" for path in files)
        yield from map(str, indices)

    def times(self, indices: np.ndarray) -> Iterable[int]:
        return map(changed_at, dict.fromkeys(path for path, _ in self.groups))


def find_parquet(root: Path) -> list[Path]:
    """The parquet files of a folder, at most two folders deep (the Hub's `data/` and `<config>/<split>/`), sorted."""
    return find_files(root, "*.parquet")


def _image_column(schema: Any, wanted: str | None, where: Path) -> str:
    import pyarrow as pa

    def is_binary(kind: Any) -> bool:
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    def holds_images(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            index = kind.get_field_index("bytes")
            return index >= 0 and is_binary(kind.field(index).type)
        return is_binary(kind)

    return _choose(
        "image", wanted, [f.name for f in schema if holds_images(f.type)], ("img", "image"), True, schema, where
    )


def _label_column(schema: Any, wanted: str | None, usual: str | None, where: Path) -> str:
    import pyarrow as pa

    def holds_labels(kind: Any) -> bool:
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)

    fitting = [f.name for f in schema if holds_labels(f.type)]
    if wanted is None and usual in fitting:
        wanted = usual
    # A lone integer column may as well be a row number, so a label column is never chosen by its type alone.
    return _choose("label", wanted, fitting, ("label", "labels", "fine_label"), False, schema, where)


def _is_text(schema: Any, label_column: str) -> bool:
    import pyarrow as pa

    kind = schema.field(label_column).type
    return not pa.types.is_integer(kind.value_type if pa.types.is_dictionary(kind) else kind)


def _choose(
    kind: str, wanted: str | None, fitting: list[str], usual: Sequence[str], by_type: bool, schema: Any, where: Path
) -> str:
    columns = ", ".join(f"{f.name} ({f.type})" for f in schema)
    accepted = "binary, or a struct with binary 'bytes'" if kind == "image" else "integer or string"
    named = [name for name in fitting if name in usual]
    chosen = [wanted] if wanted is not None else named if named or not by_type else fitting
    if len(chosen) != 1 or fitting.count(chosen[0]) != 1:
        held = "each image's file (PNG, JPEG, ...)" if kind == "image" else "each image's class"
        only = f" {fitting[0]}" if len(fitting) == 1 else ""
        fix = f"Name one with --data.{kind}-column{only}." if fitting else f"Add one that holds {held}."
        reason = f"{len(chosen)} candidates for the {kind} column" if fitting else f"no {kind} column"
        if fitting and not chosen:
            reason = f"no column named {', '.join(usual[:-1])} or {usual[-1]}, as {kind} columns must be,"
        reason = reason if wanted is None else f"no {kind} column '{wanted}'"
        raise StillroomError(f"{where} has {reason} of type {accepted}. Its columns: {columns}. {fix}")
    return chosen[0]


def _hub_class_names(schema: Any, label_column: str) -> tuple[str, ...] | None:
    """Names of a ClassLabel column, from the JSON that the `datasets` library leaves in the parquet schema."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label_column]
        names = feature["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(names) if isinstance(names, list) and all(isinstance(n, str) for n in names) else None


def read_parquet(
    path: Path,
    image_column: str | None = None,
    label_column: str | None = None,
    usual_label_column: str | None = None,
    test_splits: Sequence[str] = TEST_SPLITS,
    with_test: bool = True,
) -> Source:
    """A folder of parquet files, as on the Hugging Face Hub, or one file, which then is the training split. Images are
    encoded (PNG, JPEG, ...), in a binary column or a struct with `bytes`. Labels are integers, or strings, whose sorted
    training values are the classes."""
    import pyarrow.parquet as pq

    train_files, test_files = [path], list[Path]()
    if path.is_dir():
        train_files, test_files = choose_splits(path, find_parquet(path), test_splits, with_test)
        if not train_files:
            raise StillroomError(
                f"{path} has no parquet file with 'train' in its name; expected e.g. train-00000-of-00001.parquet."
            )
    with _reading_parquet(train_files[0]):
        schema = pq.read_schema(train_files[0])
        image_column = _image_column(schema, image_column, train_files[0])
        label_column = _label_column(schema, label_column, usual_label_column, train_files[0])
        is_text = _is_text(schema, label_column)

    text: dict[str, int] = {}  # labels that are text, numbered as they come

    def split(files: list[Path]) -> tuple[ParquetImages, np.ndarray]:
        groups: list[tuple[Path, int]] = []
        group_bytes: list[int] = []
        rows: list[int] = [0]
        labels: list[np.ndarray] = []
        for path in files:
            with _reading_parquet(path), pq.ParquetFile(path) as file:
                _image_column(file.schema_arrow, image_column, path)
                _label_column(file.schema_arrow, label_column, None, path)
                if _is_text(file.schema_arrow, label_column) != is_text:
                    raise StillroomError(
                        f"{path} and {train_files[0]} have text in {label_column!r} in the one and numbers in the "
                        "other; write all files alike."
                    )
                for number in range(file.num_row_groups):
                    meta = file.metadata.row_group(number)
                    chunks = [meta.column(c) for c in range(meta.num_columns)]
                    groups.append((path, number))
                    group_bytes.append(
                        sum(c.total_compressed_size for c in chunks if _belongs(c.path_in_schema, image_column))
                    )
                    rows.append(meta.num_rows)
                if file.metadata.num_rows > LARGEST_ROWS:
                    raise StillroomError(f"{path} has {file.metadata.num_rows:,} rows; split it, or do not trust it")
                labels.append(_read_labels(file, label_column, path, text))
        images = ParquetImages(image_column, tuple(groups), tuple(group_bytes), np.cumsum(rows))
        return images, np.concatenate(labels)

    train_images, train_labels = split(train_files)
    known = len(text)
    test_images, test_labels = split(test_files) if test_files else (None, train_labels[:0])
    names = _hub_class_names(schema, label_column)
    if is_text:
        unknown = next(iter(list(text)[known:]), None)
        if unknown is not None:
            raise StillroomError(
                f"{test_files[0].parent} has the test label {unknown!r}, which the training split lacks."
            )
        names = tuple(sorted(text))
        places = np.argsort([text[name] for name in names])  # of the first label that came, of the second, ...
        train_labels, test_labels = places[train_labels], places[test_labels]
    test = Split(test_images, test_labels) if test_images else None
    return Source(Split(train_images, train_labels), test, names)


def _read_labels(file: Any, column: str, path: Path, text: dict[str, int]) -> np.ndarray:
    """-> the labels of an open file, int64 [rows]: its numbers, or for text places in `text`, which grows by it.

    Raises StillroomError where a row has none, and for numbers that int64 has not.
    """
    import pyarrow as pa

    found, before = [], 0
    for group in range(file.num_row_groups):
        for chunk in read_column(file, group, column, path).chunks:
            if chunk.null_count:
                row = before + chunk.is_null().to_numpy(zero_copy_only=False).argmax()
                raise StillroomError(f"{path} row {row} has no '{column}'; give it a label or remove the row.")
            before += len(chunk)
            if not _is_text(file.schema_arrow, column):
                numbers = np.asarray(chunk)
                if len(numbers) and int(numbers.max()) >= 2**63:
                    raise StillroomError(
                        f"{path} has the label {numbers.max()}; labels must be integers 0 ... C-1 in both splits."
                    )
                found.append(numbers.astype(np.int64))
                continue
            encoded = chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
            codes, places = np.unique(encoded.indices.to_numpy(), return_inverse=True)  # a dictionary may hold more
            names = encoded.dictionary.take(pa.array(codes)).to_pylist()
            own = [text.setdefault(str(name), len(text)) for name in names]
            found.append(np.array(own, np.int64)[places])
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _belongs(path_in_schema: str, column: str) -> bool:
    return path_in_schema == column or path_in_schema.startswith(f"{column}.")
