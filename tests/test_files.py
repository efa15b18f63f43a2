"""Files are whole or absent, and their bytes depend on their content alone."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom import files
from stillroom.errors import StillroomError

TENSORS = {"weight": torch.arange(6, dtype=torch.float32).reshape(2, 3), "steps": torch.tensor(7)}


def test_written_bytes_are_read_back_and_no_other_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.bin"
    files.write_atomic(path, b"old")
    files.write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["a.bin"]


@pytest.mark.parametrize("function", ["replace", "fsync"])
@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full.*free 3 bytes"),
        (OSError(errno.EROFS, "Read-only file system"), "not writable"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    ],
)
def test_a_failed_write_names_path_and_fix_and_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, failure: OSError, words: str
) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(StillroomError, match=f"a.bin.*{words}"):
        files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_an_interrupt_while_writing_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(StillroomError, match="a file stands where"):
        files.write_atomic(tmp_path / "a" / "b.bin", b"")


def test_json_is_sorted_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"b": [1, 2.5, None], "a": {"é": "\udc80"}})
    assert files.read_json(path) == {"b": [1, 2.5, None], "a": {"é": "\udc80"}}
    assert list(json.loads(path.read_text())) == ["a", "b"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, Path("x")])
def test_json_refuses_what_it_cannot_hold_and_writes_nothing(tmp_path: Path, value: object) -> None:
    with pytest.raises(StillroomError, match=r"a\.json"):
        files.write_json(tmp_path / "a.json", {"key": value})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"NaN", b"[Infinity]", b"[" * 200_000, b"1" * 10_000])
def test_bad_json_is_one_clear_error_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(StillroomError, match=r"a\.json is not valid JSON"):
        files.read_json(tmp_path / "a.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for read in (files.read_json, files.load_tensors, files.sha256_file, files.read_bytes):
        with pytest.raises(StillroomError, match=r"cannot read .*gone.*No such file"):
            read(tmp_path / "gone")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool])
def test_tensors_and_meta_are_read_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    saved = torch.arange(-4, 8).reshape(3, 4).to(dtype)
    files.save_tensors(tmp_path / "a", {"x": saved, "empty": saved[:0]}, {"step": 3, "name": "é"})
    tensors, meta = files.load_tensors(tmp_path / "a")
    assert meta == {"step": 3, "name": "é"}
    assert tensors["x"].dtype == dtype
    assert torch.equal(tensors["x"], saved)
    assert tensors["empty"].shape == (0, 4)


def test_equal_tensors_give_equal_bytes_whatever_their_order_layout_and_sharing(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    strided = images.to(memory_format=torch.channels_last)
    files.save_tensors(tmp_path / "a", {"x": images, "y": images}, {"b": 1, "a": 2})
    files.save_tensors(tmp_path / "b", {"y": strided, "x": strided.requires_grad_()}, {"a": 2, "b": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_loaded_tensors_can_be_written_to(tmp_path: Path) -> None:
    files.save_tensors(tmp_path / "a", TENSORS, {})
    tensors, _ = files.load_tensors(tmp_path / "a")
    tensors["weight"] += 1
    assert torch.equal(tensors["weight"], TENSORS["weight"] + 1)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 10_000), noise=st.binary(max_size=40))
def test_a_cut_or_padded_tensor_file_is_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, cut: int, noise: bytes
) -> None:
    path = tmp_path_factory.mktemp("cut") / "a"
    whole = b"".join(files.tensor_pieces(TENSORS, {"step": 3}, path))
    content = whole[: cut % len(whole)] + noise
    if len(content) == len(whole):  # the format has no checksum: that is the manifest's task
        return
    path.write_bytes(content)
    with pytest.raises(StillroomError, match="not a whole safetensors file"):
        files.load_tensors(path)


def test_hashes_agree_with_hashlib(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"stillroom")
    expected = hashlib.sha256(b"stillroom").hexdigest()
    assert files.sha256_file(tmp_path / "a") == files.sha256_bytes(b"stillroom") == expected
