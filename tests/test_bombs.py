"""Small files that stand for any number of bytes are refused unread; tests/faults/fuzz.py has more of them."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from stillroom import artifact, softlabels
from stillroom.compute import Plan
from stillroom.data import RealData
from stillroom.distilled import load_distilled
from stillroom.errors import StillroomError
from stillroom.files import load_torch, sha256_bytes
from stillroom.manifest import MANIFEST_NAME, SEAL_KEY, _seal, file_name
from stillroom.methods.select import RandomConfig, distill_random
from stillroom.readers import parquet, read_column, read_parquet
from stillroom.run import Run


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_repeated(path: Path, value: bytes, rows: int, label: Any = 0) -> Path:
    """One image, and one label, so many times: their dictionaries hold each once."""
    codes = pa.array(np.zeros(rows, np.int32))
    columns = {"image": pa.array([value], pa.binary()), "label": pa.array([label])}
    table = pa.table({name: pa.DictionaryArray.from_arrays(codes, values) for name, values in columns.items()})
    pq.write_table(table, path, store_schema=False, row_group_size=rows)
    return path


@pytest.mark.parametrize("rows", [7, 5000])
def test_a_column_read_in_parts_is_the_column(tmp_path: Path, rows: int) -> None:
    values = [os.urandom(n % 50) for n in range(5000)]
    cells = pa.array([{"bytes": value, "path": None} for value in values])
    pq.write_table(pa.table({"image": cells}), tmp_path / "a.parquet", row_group_size=rows)
    with pq.ParquetFile(tmp_path / "a.parquet") as file:
        found = [read_column(file, group, "image", tmp_path) for group in range(min(3, file.num_row_groups))]
        expected = [file.read_row_group(group, columns=["image"]).column(0) for group in range(len(found))]
    assert all(a.equals(b) for a, b in zip(found, expected, strict=True))


def test_one_image_many_times_is_refused_before_all_of_them_are_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "LARGEST_GROUP", 2**22)
    path = write_repeated(tmp_path / "train-0.parquet", os.urandom(2**16), 4000)  # 250 MiB of 64 kB
    assert path.stat().st_size < 2**17
    source = read_parquet(tmp_path, with_test=False)
    pool = pa.system_memory_pool()
    before = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        with pytest.raises(
            StillroomError, match=r"train-0.parquet holds more than 0.0 GiB of 'image' in row group 0; wri"
        ):
            source.train.images.fetch(np.array([0]))
    finally:
        pa.set_memory_pool(before)
    assert pool.max_memory() < 2**25


def test_one_label_many_times_and_rows_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_repeated(tmp_path / "train-0.parquet", png(), 400, "a" * 2**14)
    monkeypatch.setattr(parquet, "LARGEST_GROUP", 2**22)
    with pytest.raises(StillroomError, match="of 'label' in row group 0"):
        read_parquet(tmp_path, with_test=False)
    monkeypatch.setattr(parquet, "LARGEST_ROWS", 399)
    with pytest.raises(StillroomError, match=r"train-0.parquet has 400 rows; split it, or do not trust it"):
        read_parquet(tmp_path, with_test=False)


def test_soft_labels_of_far_more_values_than_rows_are_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(softlabels, "MOST_UNASKED", 100)
    lists = pa.ListArray.from_arrays(pa.array([0, 10**5, 10**5], pa.int32()), pa.array(np.zeros(10**5, np.float32)))
    pq.write_table(pa.table({"soft_label": lists}), tmp_path / "a.parquet")
    with pytest.raises(StillroomError, match=r"a.parquet has 100,00\d values; 8 are needed"):
        softlabels._read_column([tmp_path / "a.parquet"], 4, None, "logits", [])


def test_a_tensor_of_few_bytes_and_a_huge_shape_is_refused_by_its_shape(tmp_path: Path) -> None:
    torch.save(torch.zeros(1, dtype=torch.float16).expand(2**40, 4), tmp_path / "a.pt")
    with pytest.raises(StillroomError, match=r"holds torch.float16 \[1099511627776, 4\]; needed are floats \[2, 4\]"):
        softlabels._read_file(tmp_path, ["a", "b"], np.zeros(2, int), 4, str(tmp_path / "a.pt"), "logits", [])


def test_torch_s_archives_are_read_as_torch_writes_them_and_never_unpacked(tmp_path: Path) -> None:
    torch.save({"x": torch.arange(3)}, tmp_path / "a.pt")
    assert load_torch(tmp_path / "a.pt")["x"].tolist() == [0, 1, 2]
    torch.save({"x": torch.arange(3)}, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    assert load_torch(tmp_path / "b.pt")["x"].tolist() == [0, 1, 2]
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as old,
        zipfile.ZipFile(tmp_path / "c.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
    with pytest.raises(ValueError, match="its parts are compressed, which torch does not do"):
        load_torch(tmp_path / "c.pt")


def save_as_a_set(folder: Path, parquet: bytes, rows: int) -> None:
    """Put `parquet` into a set of 8 x 8 pixels, as its images, by a manifest that fits them."""
    manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
    (folder / manifest["files"]["images"]["name"]).unlink()
    digest = sha256_bytes(parquet)
    facts = {"name": file_name("images", digest), "bytes": len(parquet), "sha256": digest, "entries": rows}
    manifest["files"]["images"] = facts | {"raw_bytes": rows * 3 * 8 * 8}
    (folder / facts["name"]).write_bytes(parquet)
    (folder / MANIFEST_NAME).write_bytes(_seal({k: v for k, v in manifest.items() if k != SEAL_KEY}))


def set_of(value: bytes, rows: int) -> bytes:
    """The images of a set: one so many times, in a dictionary that holds it once."""
    codes, numbers = pa.array(np.zeros(rows, np.int32)), pa.array(np.zeros(rows, np.int64))
    image = pa.StructArray.from_arrays(
        [pa.DictionaryArray.from_arrays(codes, pa.array([value], pa.binary())), pa.nulls(rows, pa.string())],
        ["bytes", "path"],
    )
    sink = io.BytesIO()
    table = pa.table({"image": image, "label": numbers, "slot": pa.array(np.arange(rows) % 8)})
    pq.write_table(table, sink, store_schema=False, row_group_size=rows, compression="zstd")
    return sink.getvalue()


@pytest.mark.parametrize(("value", "rows"), [(png() + bytes(2**20), 500), (b"", 2**20)])
def test_a_distilled_set_whose_few_bytes_stand_for_many_is_refused_in_little_memory(
    toy: RealData, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: bytes, rows: int
) -> None:
    distill_random(toy, [], 2, RandomConfig(), 0, plan, Run()).save(tmp_path / "set")
    save_as_a_set(tmp_path / "set", set_of(png(), 8), 8)
    assert len(load_distilled(tmp_path / "set").images) == 8
    monkeypatch.setattr(artifact, "LEAST_HELD", 2**25)
    content = set_of(value, rows)
    assert len(content) < 2**16
    save_as_a_set(tmp_path / "set", content, rows)
    before = pa.default_memory_pool()
    pa.set_memory_pool(pool := pa.system_memory_pool())
    try:
        with pytest.raises(StillroomError, match=rf"images-.*has {len(content):,} bytes, but stands for more than"):
            load_distilled(tmp_path / "set")
    finally:
        pa.set_memory_pool(before)
    assert pool.max_memory() < 2**27
