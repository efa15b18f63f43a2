"""The fuzz campaign notices what it is there to notice."""

from __future__ import annotations

import tarfile
from pathlib import Path

import fuzz
import pytest


@pytest.mark.parametrize("name", ["../../escaped.png", "{absolute}.cls"])
def test_a_reader_that_extracts_is_reported_wherever_the_names_lead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    root, place = tmp_path / "root", tmp_path / "root" / "a" / "b" / "sandbox" / "input"
    place.mkdir(parents=True)
    monkeypatch.setattr(fuzz, "ABSOLUTE", tmp_path / "escaped")
    name = name.format(absolute=fuzz.ABSOLUTE)
    (place / "train-0.tar").write_bytes(fuzz.tar_of({name: b"x"}))

    def extract(folder: Path) -> None:
        with tarfile.open(folder / "train-0.tar") as tar:
            tar.extractall(folder, filter="fully_trusted")

    def format_of(read):
        return fuzz.Format(fuzz.write_shards, "train*.tar", read, {})

    assert fuzz.read_watched(format_of(lambda folder: None), place, root) == "read"
    for _ in range(2):  # the second is seen too
        told = fuzz.read_watched(format_of(extract), place, root)
        assert told == f"files appeared: [{str((place / name).resolve())!r}]"
