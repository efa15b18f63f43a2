"""Sets and exports as other people's libraries read them: Hugging Face datasets, webdataset, NumPy alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EXAMPLES, Finished, fenced, load_example

from stillroom.artifact import to_8_bits
from stillroom.distilled import (
    DistilledSet,
    dequantize_compensators,
    load_distilled,
    quantize_compensators,
)
from stillroom.export import _class_order, export_set

theirs = pytest.mark.filterwarnings("ignore")  # libraries that import others warn of much


@pytest.fixture(scope="module")
def made(finished: Finished) -> DistilledSet:
    """INFER's set of the toy world, with compensators and static labels."""
    distilled = load_distilled(finished.directory / "distilled")
    assert distilled.compensators is not None
    assert distilled.soft_labels is not None
    return distilled


def views_of(distilled: DistilledSet, order: torch.Tensor) -> np.ndarray:
    """Views in 8 bits as foreign libraries show them, uint8 [views, height, width, 3]."""
    return to_8_bits(distilled.form_views(order)).permute(0, 2, 3, 1).numpy()


@theirs
def test_exported_parquet_opens_with_datasets_bit_for_bit(made: DistilledSet, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the library datasets is not installed")
    export_set(made, "parquet", tmp_path / "out")
    rows = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"), split="train")
    order = _class_order(made)
    assert rows.features["label"].names == list(made.manifest.class_names)
    assert np.array_equal(np.stack([np.asarray(image) for image in rows["image"]]), views_of(made, order))
    assert list(rows["label"]) == made.labels[made.view_table()[order, 0]].tolist()
    assert torch.equal(torch.tensor(list(rows["soft_label"])).half(), made.soft_labels[order])


@theirs
def test_a_set_itself_opens_with_datasets_though_other_files_lie_beside_its_images(
    finished: Finished, made: DistilledSet, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets", reason="the library datasets is not installed")
    rows = datasets.load_dataset(
        str(finished.directory / "distilled"), cache_dir=str(tmp_path / "cache"), split="train"
    )
    shown = np.stack([np.asarray(image) for image in rows["image"]])
    assert np.array_equal(shown, made.images[:].permute(0, 2, 3, 1).numpy())
    assert list(rows["label"]) == made.labels.tolist()
    assert rows.features["label"].names == list(made.manifest.class_names)


@theirs
def test_exported_shards_open_with_webdataset_bit_for_bit(
    made: DistilledSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    webdataset = pytest.importorskip("webdataset", reason="the library webdataset is not installed")
    monkeypatch.setattr("stillroom.export.SHARD_VIEWS", 9)
    export_set(made, "webdataset", tmp_path / "out")
    shards = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    assert len(shards) == -(-made.view_count // 9)
    samples = list(
        webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8").to_tuple("__key__", "png", "cls", "logits.npy")
    )
    assert [key for key, *_ in samples] == [f"{number:08d}" for number in range(made.view_count)]
    label_of = made.labels[made.view_table()[:, 0]].tolist()
    own = {
        (pixels.tobytes(), label, logits.numpy().tobytes())
        for pixels, label, logits in zip(
            views_of(made, torch.arange(made.view_count)), label_of, made.soft_labels, strict=True
        )
    }
    assert {(pixels.tobytes(), label, logits.tobytes()) for _, pixels, label, logits in samples} == own
    labels = [label for _, _, label, _ in samples]
    assert labels != sorted(labels)  # classes are mixed
    assert (tmp_path / "out" / "classes.txt").read_text(encoding="utf-8").splitlines() == list(
        made.manifest.class_names
    )


def test_equal_sets_are_exported_as_equal_shards(made: DistilledSet, tmp_path: Path) -> None:
    for name in ("one", "two"):
        export_set(made, "webdataset", tmp_path / name)
    one, two = ((tmp_path / name / "train-000000.tar").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("change", ["whole", "hard", "compensated views alone"])
def test_numpy_alone_reads_the_views_labels_and_logits_of_a_set(
    made: DistilledSet, tmp_path: Path, change: str
) -> None:
    if change != "whole":
        made = made.with_labels(None)
    if change == "compensated views alone":
        made = replace(
            made, manifest=replace(made.manifest, views=replace(made.manifest.views, naturals_as_views=False))
        )
    made.save(tmp_path / "set")
    views, labels, logits = load_example("read_with_numpy").read(tmp_path / "set")
    every = torch.arange(made.view_count)
    assert views.dtype == np.float32
    assert np.array_equal(views, made.form_views(every).permute(0, 2, 3, 1).numpy())
    assert labels.tolist() == made.labels[made.view_table()[:, 0]].tolist()
    assert (logits is None) == (change != "whole")
    assert logits is None or np.array_equal(logits, made.soft_labels.numpy())


@pytest.mark.parametrize("change", ["whole", "8 bits", "hard, uncut", "naturals alone"])
def test_the_parts_of_a_set_are_formed_into_views_by_numpy_as_the_guide_shows(
    made: DistilledSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    if change == "8 bits":
        made = replace(made, compensators=quantize_compensators(dequantize_compensators(made.compensators), 8))
    if change == "hard, uncut":
        made = made.with_labels(None)
        made = replace(made, manifest=replace(made.manifest, views=replace(made.manifest.views, clip=False)))
    if change == "naturals alone":
        made = replace(made.with_labels(None), compensators=None)
    export_set(made, "compact", tmp_path / "compact.npz")
    (shown,) = [
        block
        for block in fenced((EXAMPLES.parent / "docs" / "own-images.md").read_text(), "python")
        if "compact.npz" in block
    ]
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(shown, found)
    assert np.array_equal(found["views"], made.form_views(torch.arange(made.view_count)).numpy())
    assert found["labels"].tolist() == made.labels[made.view_table()[:, 0]].tolist()
    with np.load("compact.npz") as parts:
        assert ("soft_labels" in parts) == (change in ("whole", "8 bits"))
        assert ("scale" in parts) == (change == "8 bits")
        assert "soft_labels" not in parts or np.array_equal(parts["soft_labels"], made.soft_labels.numpy())
