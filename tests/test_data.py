"""Real data: every layout gives the pixels and labels that were stored, and every flaw gives one clear error."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import sys
import tarfile
import tempfile
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from stillroom import distill, load_distilled
from stillroom import images as images_module
from stillroom.data import (
    CIFAR100,
    FACTS,
    DataConfig,
    LazyImages,
    MemoryImages,
    RealData,
    fetch_from_hub,
    fit_size,
    hub_id,
    load_real,
    look_at,
)
from stillroom.errors import StillroomError
from stillroom.images import load_images, sample_rows
from stillroom.readers import Split
from stillroom.readers import parquet as parquet_module
from stillroom.readers.stored import FileImages

EVERYTHING_LAZY = 0.0
SIDE = 6


def pixels_of(n: int, seed: int = 0, side: int = SIDE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def encode(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def write_folder(
    root: Path, splits: tuple[str, ...] = ("train", "test"), per_class: int = 3, classes: str = "ab", height: int = SIDE
) -> Path:
    for split in splits:
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for k, image in enumerate(pixels_of(per_class, seed=len(split) * 100 + ord(name))):
                (folder / f"{k}.png").write_bytes(encode(image[:height]))
    return root


def write_npz(path: Path, classes: int = 2, n: int = 6, **changes: Any) -> Path:
    labels = np.arange(n) % classes
    arrays = {
        "train_images": pixels_of(n, 1),
        "train_labels": labels,
        "test_images": pixels_of(n, 2),
        "test_labels": labels,
        **changes,
    }
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def write_parquet(
    path: Path,
    pixels: np.ndarray,
    labels: Any,
    image: str = "img",
    label: str = "label",
    names: list[str] | None = None,
    raw: bool = False,
    extra: dict[str, Any] | None = None,
) -> Path:
    cells: list[Any] = [encode(p) for p in pixels]
    column = (
        pa.array(cells, pa.binary())
        if raw
        else pa.array(
            [{"bytes": c, "path": None} for c in cells], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        )
    )
    table = pa.table({image: column, label: labels, **(extra or {})})
    if names is not None:
        feature = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(feature)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=4)
    return path


def all_pixels(images: Any) -> torch.Tensor:
    return images.batch(torch.arange(len(images)))


def load(source: Path | str, **settings: Any) -> RealData:
    return load_real(DataConfig(source=str(source), **settings))


def to_channels_first(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


# The dataset without a download


def test_digits_are_scikit_learns_images_in_blocks_of_four_and_need_no_files():
    from sklearn.datasets import load_digits

    digits = load_digits()
    real = load_real(DataConfig())
    assert (len(real.train), len(real.test), real.classes, real.image_size) == (1442, 355, 10, 32)
    assert not real.flip
    assert real.class_names == tuple("0123456789")
    assert real.train.labels.dtype == torch.int64
    first = torch.from_numpy(np.rint(digits.images[0] / 16 * 255))
    image = real.train.batch(torch.tensor([0]))[0]
    assert image.dtype == torch.uint8
    assert image.shape == (3, 32, 32)
    for row, column in ((0, 0), (3, 2), (1, 3)):
        assert (image[:, row::4, column::4] == first).all()
    test_labels = np.bincount(real.test.labels.numpy(), minlength=10)
    assert (test_labels == np.bincount(digits.target) // 5).all()
    assert real.raw_bytes == real.stored_bytes == 1442 * 64


def test_computed_mean_and_std_are_those_of_the_training_pixels_in_float64(tmp_path):
    pixels = pixels_of(6, 1)
    pixels[..., 2] = 7
    real = load(write_npz(tmp_path / "x.npz", train_images=pixels))
    scaled = pixels.astype(np.float64) / 255
    assert np.allclose(real.mean, scaled.mean((0, 1, 2)), rtol=0, atol=1e-14)
    assert np.allclose(real.std[:2], scaled.std((0, 1, 2))[:2], rtol=0, atol=1e-14)
    assert real.std[2] == 1.0


# Named datasets


def test_the_facts_have_as_many_names_as_classes():
    assert len(set(CIFAR100)) == 100
    assert list(CIFAR100) == sorted(CIFAR100)
    for facts in FACTS.values():
        assert facts.class_names is None or len(facts.class_names) == facts.classes


def cifar_arrays(classes: int, per_class: int = 2) -> tuple[np.ndarray, np.ndarray]:
    return pixels_of(classes * per_class, side=32), np.tile(np.arange(classes), per_class)


def pickled_as_python_2(pixels: np.ndarray, labels: np.ndarray, key: str) -> bytes:
    """CIFAR's own files were written by Python 2, whose byte strings have opcodes that Python 3 never writes."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    data = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).reshape(len(pixels), 3072)
    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + number(0) + number(1) + b"tR("
    dtype += number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + number(0) + b"t" + text(b"b") + b"tR("
    array += (
        number(1) + b"(" + number(len(data)) + number(3072) + b"t" + dtype + b"I00\n" + text(data.tobytes()) + b"tb"
    )
    items = text(b"data") + array + text(key.encode()) + b"(l" + b"".join(number(int(v)) + b"a" for v in labels)
    return b"\x80\x02}(" + items + b"u."


def write_cifar_pickles(folder: Path, classes: int, **content: bytes) -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = cifar_arrays(classes, per_class=5)
    key, train = ("labels", [f"data_batch_{i}" for i in range(1, 6)]) if classes == 10 else ("fine_labels", ["train"])
    folder.mkdir(parents=True)
    for name, rows in zip(train, np.array_split(np.arange(len(pixels)), len(train)), strict=True):
        (folder / name).write_bytes(pickled_as_python_2(pixels[rows], labels[rows], key))
    (folder / ("test_batch" if classes == 10 else "test")).write_bytes(pickled_as_python_2(pixels, labels, key))
    for name, value in content.items():
        (folder / name).write_bytes(value)
    return pixels, labels


def test_the_hand_written_pickle_reads_the_same_with_pythons_own_unpickler():
    pixels, labels = cifar_arrays(10)
    data = pickled_as_python_2(pixels, labels, "labels").replace(b"numpy.core.", b"numpy._core.")
    batch = pickle.loads(data, encoding="latin1")
    assert (batch["data"].reshape(-1, 3, 32, 32) == pixels.transpose(0, 3, 1, 2)).all()
    assert batch["labels"] == labels.tolist()


@pytest.mark.parametrize(("name", "classes", "folder"), [
    ("cifar10", 10, "cifar-10-batches-py"),
    ("cifar100", 100, "cifar-100-python"),
])  # fmt: skip
def test_cifar_is_found_as_npz_then_parquet_then_pickles_and_is_the_same_from_each(tmp_path, name, classes, folder):
    pixels, labels = write_cifar_pickles(tmp_path / folder, classes)
    column = FACTS[name].label_column
    from_pickles = load(name, root=str(tmp_path))
    for split in ("train", "test"):
        write_parquet(
            tmp_path / name / f"{split}-0.parquet", pixels, labels, label=column, extra={"coarse_label": labels}
        )
    from_parquet = load(name, root=str(tmp_path))
    write_npz(tmp_path / f"{name}.npz", train_images=pixels[:-classes], train_labels=labels[:-classes],
              test_images=pixels, test_labels=labels)  # fmt: skip
    from_npz = load(name, root=str(tmp_path))
    assert len(from_npz.train) == len(pixels) - classes
    for real in (from_pickles, from_parquet):
        assert torch.equal(all_pixels(real.train), to_channels_first(pixels))
        assert torch.equal(real.train.labels, torch.from_numpy(labels))
    assert from_pickles.fingerprint == from_parquet.fingerprint != from_npz.fingerprint
    for real in (from_pickles, from_parquet, from_npz):
        assert real.class_names == FACTS[name].class_names
        assert (real.mean, real.std, real.flip) == (FACTS[name].mean, FACTS[name].std, True)


class MakesFolder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    payload = pickle.dumps({"data": MakesFolder(tmp_path / "made"), "fine_labels": [0]}, protocol=2)
    write_cifar_pickles(tmp_path / "cifar-100-python", 100, train=payload)
    with pytest.raises(StillroomError, match=r"cifar-100-python/train is no batch of cifar100.*mkdir"):
        load("cifar100", root=str(tmp_path))
    assert not (tmp_path / "made").exists()


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 400))
def test_a_damaged_pickle_is_refused(tmp_path_factory, noise, position):
    folder = tmp_path_factory.mktemp("pickle") / "cifar-100-python"
    folder.mkdir()
    intact = pickled_as_python_2(*cifar_arrays(100, 1), "fine_labels")
    (folder / "train").write_bytes(intact[:position] + noise)
    with pytest.raises(StillroomError, match="Fetch the dataset again"):
        load("cifar100", root=str(folder.parent))


def test_a_named_dataset_that_is_missing_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(StillroomError) as caught:
        load("cifar100", root=str(tmp_path))
    for text in ("cifar100.npz", "parquet", "cifar-100-python", "--data.download", "--data.root"):
        assert text in str(caught.value)
    with pytest.raises(StillroomError, match="unpack it yourself"):
        load("tiny-imagenet", root=str(tmp_path))


def test_download_asks_torchvision_once_and_reads_what_it_wrote(tmp_path, monkeypatch):
    def install(fetch: Any) -> None:
        datasets = SimpleNamespace(CIFAR10=None, CIFAR100=fetch)
        monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(datasets=datasets))
        monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)

    def fetch(root: Path, download: bool) -> None:
        assert download
        write_cifar_pickles(Path(root) / "cifar-100-python", 100)

    def offline(root: Path, download: bool) -> None:
        raise OSError("no network")

    install(fetch)
    for _ in range(2):
        assert len(load("cifar100", root=str(tmp_path), download=True).train) == 500
    install(offline)
    with pytest.raises(StillroomError, match=r"could not be downloaded.*no network"):
        load("cifar100", root=str(tmp_path / "elsewhere"), download=True)


def write_tiny_imagenet(root: Path) -> Path:
    wnids = ["n09", "n01", "n05"]
    for wnid in wnids:
        (root / "train" / wnid / "images").mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("boxes")
        for k in range(2):
            (root / "train" / wnid / "images" / f"{k}.JPEG").write_bytes(encode(pixels_of(1)[0], "JPEG"))
    (root / "val" / "images").mkdir(parents=True)
    for k in range(3):
        (root / "val" / "images" / f"val_{k}.JPEG").write_bytes(encode(pixels_of(1)[0], "JPEG"))
    (root / "test" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(wnids) + "\n")
    (root / "words.txt").write_text("n00\tentity\nn01\tbullfrog, Rana\nn09\tgoldfish\n")
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn05\t0\t0\nval_1.JPEG\tn09\t0\nval_2.JPEG\tn01\n")
    return root


def test_tiny_imagenets_labels_follow_wnids_txt_and_its_annotations(tmp_path):
    real = load(write_tiny_imagenet(tmp_path / "tiny"))
    assert real.class_names == ("goldfish", "bullfrog, Rana", "n05")
    assert real.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert real.test.labels.tolist() == [2, 0, 1]


def test_tiny_imagenet_names_a_bad_annotation_and_a_missing_image(tmp_path):
    root = write_tiny_imagenet(tmp_path / "tiny")
    (root / "val" / "images" / "val_1.JPEG").unlink()
    with pytest.raises(StillroomError, match=r"1 image cannot be read.*val_1\.JPEG"):
        load(root)
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn77\n")
    with pytest.raises(StillroomError, match=r"line 1 is 'val_0\.JPEG\tn77'"):
        load(root)


@pytest.mark.parametrize("folder", ["imagenet", "ILSVRC2012"])
def test_imagenet_is_read_lazily_from_class_folders_without_decoding_them_first(tmp_path, monkeypatch, folder):
    monkeypatch.setitem(FACTS, "imagenet", replace(FACTS["imagenet"], classes=2, image_size=4))
    root = write_folder(tmp_path / folder, ("train", "val", "test"))
    bad = root / "train" / "b" / "2.png"
    bad.write_bytes(bad.read_bytes()[:50])  # its header is whole
    with pytest.raises(StillroomError, match="1 image cannot be read"):
        load("imagenet", root=str(tmp_path), resize="squash")
    real = load("imagenet", root=str(tmp_path), resize="squash", memory_limit_gib=EVERYTHING_LAZY)
    assert (real.class_names, real.mean, real.image_size) == (("a", "b"), FACTS["imagenet"].mean, 4)
    assert real.train.batch(torch.arange(5)).shape == (5, 3, 4, 4)
    expected = np.asarray(Image.fromarray(pixels_of(3, seed=397)[0]).resize((4, 4), Image.Resampling.BILINEAR))
    assert torch.equal(real.test.batch(torch.tensor([0]))[0], torch.from_numpy(expected.copy()).permute(2, 0, 1))
    with pytest.raises(StillroomError, match=r"b/2\.png"):
        real.train.batch(torch.tensor([5]))


def test_a_path_gets_a_named_datasets_facts_only_if_classes_and_size_agree(tmp_path):
    pixels, labels = cifar_arrays(10)
    arrays = {"train_images": pixels, "train_labels": labels, "test_images": pixels, "test_labels": labels}
    real = load(write_npz(tmp_path / "cifar10.npz", **arrays))
    assert real.class_names[3] == "cat"
    assert real.mean == FACTS["cifar10"].mean
    other = load(write_npz(tmp_path / "cifar100.npz", **arrays))
    assert other.class_names == tuple("0123456789")
    assert other.mean != FACTS["cifar100"].mean
    with pytest.raises(StillroomError, match=r"cifar100: class 10 \('bowl'\) has no training image"):
        load("cifar100", root=str(tmp_path))


# Image folders


def test_a_folder_gives_sorted_classes_and_the_stored_pixels_and_hidden_names_are_ignored(tmp_path):
    root = write_folder(tmp_path / "photos", classes="ba")
    for folder in (root / "train", root / "train" / "a", root / "test" / "b"):
        for name in (".DS_Store", "._0", "Thumbs.db", "desktop.ini"):
            (folder / name).write_bytes(b"x")
    (root / "train" / "__MACOSX").mkdir()
    (root / "test" / ".ipynb_checkpoints").mkdir()
    real = load(root)
    assert real.class_names == ("a", "b")
    assert real.name == "photos"
    assert real.flip
    assert real.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    expected = [pixels_of(3, seed=500 + ord(name)) for name in "ab"]
    assert torch.equal(all_pixels(real.train), to_channels_first(np.concatenate(expected)))
    assert real.raw_bytes == 6 * 3 * SIDE * SIDE
    assert real.stored_bytes == sum(path.stat().st_size for path in (root / "train").rglob("*.png"))


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_hidden_class_folder_with_images_is_refused_and_one_without_is_ignored(tmp_path, split):
    root = write_folder(tmp_path)
    (root / split / ".net").mkdir()
    (root / split / ".net" / "notes.txt").write_text("")
    (root / split / ".net" / "._0.png").write_text("")
    assert load(root).class_names == ("a", "b")
    (root / split / ".net" / "0.PNG").write_text("")
    with pytest.raises(StillroomError, match=r"\.net is hidden by the dot in its name, .*\(0\.PNG\): rename it if"):
        load(root)


@pytest.mark.parametrize("split", ["test", "val", "valid", "validation"])
def test_the_test_split_may_have_any_of_four_names(tmp_path, split):
    assert len(load(write_folder(tmp_path, ("train", split))).test) == 6


def test_an_unlabelled_test_folder_gives_way_to_the_labelled_validation_folder(tmp_path):
    write_folder(tmp_path, ("train", "val"))
    (tmp_path / "test" / "images").mkdir(parents=True)
    assert len(load(tmp_path).test) == 6


def broken(flaw: str, root: Path) -> Path:
    write_folder(root)
    train = root / "train"
    match flaw:
        case "no train":
            shutil.rmtree(train)
        case "empty":
            shutil.rmtree(train)
            shutil.rmtree(root / "test")
        case "bare class":
            (train / "a").rename(root / "a")
            shutil.rmtree(train)
            shutil.rmtree(root / "test")
        case "bare and test" | "bare and other" | "bare and hidden":
            for name in "ab":
                (train / name).rename(root / name)
            shutil.rmtree(train)
            if flaw != "bare and test":
                shutil.rmtree(root / "test")
            if flaw == "bare and other":
                (root / "birds" / "owls").mkdir(parents=True)
                (root / "birds" / "owls" / "0.png").write_bytes(encode(pixels_of(1)[0]))
            if flaw == "bare and hidden":
                (root / ".c").mkdir()
                (root / ".c" / "0.png").write_bytes(encode(pixels_of(1)[0]))
        case "class called train":
            for name in "ab":
                (train / name).rename(root / name)
            (train / "0.png").write_bytes(encode(pixels_of(1)[0]))
            shutil.rmtree(root / "test")
        case "loose images":
            for path in (train / "a").iterdir():
                path.rename(root / path.name)
            shutil.rmtree(train)
            shutil.rmtree(root / "test")
        case "one split" | "one test split":
            return root / ("train" if flaw == "one split" else "test")
        case "wrapped":
            return root.parent
        case "misspelt train":
            train.rename(root / "Training")
        case "no classes":
            shutil.rmtree(train)
            train.mkdir()
            (train / "0.png").write_bytes(encode(pixels_of(1)[0]))
        case "empty class":
            (train / "c").mkdir()
            (root / "test" / "c").mkdir()
        case "one class":
            for folder in (train / "b", root / "test" / "b"):
                folder.rename(root / folder.parent.name[:2])
        case "class not tested":
            (root / "test" / "b").rename(root / "b")
        case "class only tested":
            (root / "test" / "c").mkdir()
        case "other classes":
            (root / "test" / "a").rename(root / "test" / "A")
            (root / "test" / "b").rename(root / "test" / "B")
        case "unlabelled test":
            shutil.rmtree(root / "test")
            (root / "test").mkdir()
            (root / "test" / "0.png").write_bytes(encode(pixels_of(1)[0]))
        case "linked folder":
            (train / "b" / "more").symlink_to(train / "a")
        case "name of bytes":
            for split in ("train", "test"):
                (root / split / os.fsdecode(b"caf\xe9")).mkdir()
        case "no test":
            (root / "test").rename(root / "other")
        case "text":
            (train / "b" / "notes.txt").write_text("hello")
        case "truncated":
            path = train / "b" / "1.png"
            path.write_bytes(path.read_bytes()[:60])
        case "missing target":
            (train / "b" / "9.png").symlink_to(root / "nowhere.png")
        case "other size":
            (train / "b" / "9.png").write_bytes(encode(pixels_of(1, side=9)[0][:5]))
        case "postscript":
            (train / "b" / "9.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\n%%EndComments\n")
    return root


@pytest.mark.parametrize(("flaw", "message"), [
    ("no train", r"no train/ folder.*Expected .*train/<class>/<images>"),
    ("empty", r"no train/ folder.*Expected .*train/<class>/<images>"),
    ("bare class", r"no train/ folder, but 'a', which look like classes, and at least 2 are needed"),
    ("bare and test", r"'a', 'b', which look like classes, and test/, a test split or a class: move .*photos/train\."),
    ("bare and other", r"'a', 'b', which look like classes, and 'birds' without an image directly inside"),
    ("bare and hidden", r"photos/\.c is hidden by the dot in its name, but holds images"),
    ("class called train", r"train holds images and no class folders, beside .* \('a', 'b'\): if train is a class too"),
    ("loose images", r"holds 3 files and no folders.*into .*photos/<class>/.*--data\.holdout-share 0\.2"),
    ("one split", r"photos/train is one split of a dataset; give the folder of all: .*photos\.$"),
    ("one test split", r"photos/test is one split of a dataset; give the folder of all: .*photos\.$"),
    ("wrapped", r"has no train/ folder, but .*photos has one; give that"),
    ("misspelt train", r"rename .*photos/Training to train"),
    ("no classes", r"train holds no class folders.*sort the images into .*photos/train/<class>/"),
    ("empty class", r"train has no images in the folders 'c'"),
    ("one class", r"train has 1 class folder, 'a'; at least 2"),
    ("class not tested", "in train/ and test/, but has 'b' only in train/; add or remove"),
    ("class only tested", "in train/ and test/, but has 'c' only in test/; remove 'c': empty"),
    ("other classes", "'a', 'b' only in train/ and 'A', 'B' only in test/"),
    ("unlabelled test", r"test holds no class folders, so its images have no labels.*--data\.holdout-per-class N"),
    ("no test", r"photos has no test split.* folder.* named test, val.*--data\.holdout-per-class N"),
    ("linked folder", r"b/more is a link to a folder"),
    ("name of bytes", r"class folder 'caf\\udce9', no name in UTF-8; rename"),
    ("text", r"1 image cannot be read: .*notes\.txt.*--data\.skip-bad-images"),
    ("truncated", r"1 image cannot be read: .*b/1\.png.*--data\.skip-bad-images"),
    ("missing target", r"b/9\.png"),
    ("other size", r"b/9\.png is 9x5 pixels \(width x height\), not 6x6\. Pass --data\.resize"),
    ("postscript", r"b/9\.png: not an image of a known format"),
])  # fmt: skip
def test_a_flawed_folder_gives_one_error_that_names_the_flaw_and_the_fix(tmp_path, flaw, message):
    with pytest.raises(StillroomError, match=message):
        load(broken(flaw, tmp_path / "photos"))


def test_class_folders_alone_are_the_training_split_and_files_beside_them_are_ignored(tmp_path):
    split = write_folder(tmp_path / "split")
    bare = tmp_path / "my photos"
    shutil.copytree(split / "train", bare)
    (bare / "notes.txt").write_text("of summer")
    (bare / ".cache").mkdir()
    (bare / "a" / "more").mkdir()
    (bare / "a" / "more" / "0.png").write_bytes(encode(pixels_of(1)[0]))
    with pytest.raises(StillroomError, match=r"my photos has no test split.*--data\.holdout-share 0\.2"):
        load(bare)
    real = load(bare, holdout_per_class=1)
    assert real.class_names == load(split).class_names
    assert (real.train.labels.tolist(), real.test.labels.tolist()) == ([0, 0, 0, 1, 1], [0, 1])
    first = torch.arange(3)
    assert torch.equal(real.train.batch(first), load(split).train.batch(first))


def test_class_folders_alone_may_have_their_images_in_a_folder_of_that_name(tmp_path):
    for name in "ab":
        (tmp_path / name / "images").mkdir(parents=True)
        (tmp_path / name / "boxes.txt").write_text("0")
        for number in range(2):
            (tmp_path / name / "images" / f"{number}.png").write_bytes(encode(pixels_of(1)[0]))
    assert load(tmp_path, holdout_per_class=1).test.labels.tolist() == [0, 1]


def test_a_share_of_each_class_is_held_out_and_one_of_a_pair_but_never_a_last_image(tmp_path):
    for name, count in (("many", 10), ("three", 3), ("two", 2), ("one", 1)):
        (tmp_path / name).mkdir()
        for number in range(count):
            (tmp_path / name / f"{number}.png").write_bytes(encode(pixels_of(1)[0]))
    real = load(tmp_path, holdout_share=0.25)
    assert real.class_names == ("many", "one", "three", "two")
    assert real.train.labels.bincount().tolist() == [8, 1, 2, 1]
    assert real.test.labels.bincount(minlength=4).tolist() == [2, 0, 1, 1]


def test_a_look_tells_classes_counts_and_sizes_and_whether_there_is_a_test_split(tmp_path):
    root = write_folder(tmp_path)
    (root / "train" / "b" / "bad.png").write_bytes(b"no image")
    (root / "train" / "b" / "wide.png").write_bytes(encode(pixels_of(1, side=9)[0][:5]))
    look = look_at(DataConfig(str(root)))
    assert (look.class_names, look.counts, look.has_test) == (("a", "b"), (3, 5), True)
    assert sorted(look.short_sides) == [5, 6, 6, 6, 6, 6, 6]
    shutil.rmtree(root / "test")
    assert not look_at(DataConfig(str(root))).has_test
    with pytest.raises(StillroomError, match="no existing path"):
        look_at(DataConfig(str(root / "nowhere")))


def test_folders_within_a_class_are_read_and_nothing_beside_a_folder_named_images_is_lost(tmp_path):
    root = write_folder(tmp_path)
    for k, folder in enumerate(("more/deeper", "images", "empty.png")):
        (root / "train" / "b" / folder).mkdir(parents=True)
        if folder != "empty.png":
            (root / "train" / "b" / folder / "x.png").write_bytes(encode(pixels_of(1, seed=k)[0]))
    assert load(root).train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]


def test_class_folders_beside_train_are_refused_where_no_split_lies_there(tmp_path):
    root = write_folder(tmp_path, splits=("train",), classes="ab")
    (root / "dogs").mkdir()
    load(root, holdout_per_class=1)
    (root / "dogs" / "0.png").write_bytes(encode(pixels_of(1)[0]))
    with pytest.raises(StillroomError, match="and beside it 'dogs', which hold images too: move"):
        load(root, holdout_per_class=1)
    write_folder(tmp_path, splits=("test",), classes="ab")
    assert load(root).class_names == ("a", "b")  # what lies beside the splits of a dataset is nothing of it


def test_class_folders_may_have_any_name_in_utf_8_and_may_be_links(tmp_path):
    names = ["-dash", "100%", "[b]old", "a b", "it's", 'say "x"', "süß", "日本", "🐱 cat", "line\nbreak", "back\\slash"]
    for split in ("train", "test"):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_bytes(encode(pixels_of(1)[0]))
        (tmp_path / split / "link").symlink_to(tmp_path / split / "a b")
    assert load(tmp_path).class_names == tuple(sorted([*names, "link"]))


def test_a_file_name_that_is_not_utf_8_is_read_and_has_its_part_in_the_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, "HASHED_BYTES", 0)
    root = write_folder(tmp_path)
    before = load(root, memory_limit_gib=EVERYTHING_LAZY).fingerprint
    (root / "train" / "b" / "2.png").rename(root / "train" / "b" / os.fsdecode(b"caf\xe9.png"))
    assert load(root, memory_limit_gib=EVERYTHING_LAZY).fingerprint != before


@pytest.mark.parametrize("limit", [4.0, EVERYTHING_LAZY])
def test_skipping_leaves_out_every_bad_image_and_counts_them(tmp_path, limit):
    root = write_folder(tmp_path)
    (root / "train" / "a" / "0.png").write_bytes(b"not an image")
    (root / "test" / "b" / "2.png").write_bytes(b"")
    with pytest.raises(StillroomError, match="skip-bad-images"):
        load(root, memory_limit_gib=limit)
    real = load(root, skip_bad_images=True, memory_limit_gib=limit)
    assert [reason.partition(": ")[0] for reason in real.skipped_images] == [
        str(root / "train" / "a" / "0.png"),
        str(root / "test" / "b" / "2.png"),
    ]
    assert real.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert real.test.labels.tolist() == [0, 0, 0, 1, 1]
    expected = np.concatenate([pixels_of(3, seed=597)[1:], pixels_of(3, seed=598)])
    assert torch.equal(all_pixels(real.train), to_channels_first(expected))
    for k in range(3):
        (root / "train" / "b" / f"{k}.png").write_bytes(b"")
    with pytest.raises(StillroomError, match=r"class 1 \('b'\) has no training image"):
        load(root, skip_bad_images=True, memory_limit_gib=limit)


def test_an_image_above_pillows_pixel_limit_is_a_bad_image(tmp_path, monkeypatch):
    root = write_folder(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIDE * SIDE - 1)
    with pytest.raises(StillroomError, match="DecompressionBomb"):
        load(root)


def one_image(root: Path, content: bytes, **settings: Any) -> np.ndarray:
    """Load a folder whose first training image has this content; -> [height, width, 3]."""
    write_folder(root)
    (root / "train" / "a" / "0.png").write_bytes(content)
    return load(root, image_size=SIDE, **settings).train.batch(torch.tensor([0]))[0].permute(1, 2, 0).numpy()


def test_transparency_is_composited_on_white(tmp_path):
    rgba = np.zeros((SIDE, SIDE, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    image = one_image(tmp_path, encode(rgba))
    assert image[0, 0].tolist() == [10, 20, 30]
    assert (image[1:] == 255).all()


def test_sixteen_bit_gray_is_scaled_and_not_clipped(tmp_path):
    values = np.linspace(0, 65535, SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint16)
    image = one_image(tmp_path, encode(values))
    assert (image == np.rint(values / 65535 * 255)[..., None]).all()


def test_gray_is_repeated_and_counts_one_native_channel(tmp_path):
    gray = pixels_of(1)[0][..., 0]
    image = one_image(tmp_path, encode(gray))
    assert (image == gray[..., None]).all()
    assert load(tmp_path).raw_bytes == 6 * SIDE * SIDE


def test_cmyk_and_palette_images_become_colour(tmp_path):
    red = Image.new("RGB", (SIDE, SIDE), (255, 0, 0))
    for k, (mode, kind) in enumerate([("CMYK", "TIFF"), ("P", "PNG")]):
        buffer = io.BytesIO()
        red.convert(mode).save(buffer, kind)
        assert (one_image(tmp_path / str(k), buffer.getvalue()) == [255, 0, 0]).all()


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown rotated clockwise by 90 degrees
    pixels = pixels_of(1)[0]
    image = one_image(tmp_path, encode(pixels, exif=exif))
    assert (image == np.rot90(pixels, -1)).all()


@pytest.mark.parametrize(
    "mode", ["L", "LA", "P", "P with tRNS", "PA", "RGBA", "RGB with tRNS", "CMYK", "1", "I;16", "I"]
)
@pytest.mark.parametrize("strip", [1, 2 * SIDE, 2**20])
def test_colours_do_not_depend_on_the_strips_in_which_they_are_found(monkeypatch, mode, strip):
    image = Image.fromarray(pixels_of(1, 5)[0])
    if mode.startswith("I"):
        levels = np.random.default_rng(0).integers(0, 2**16, (SIDE, SIDE))
        expected = np.repeat(np.round(levels * 255 / 65535)[..., None], 3, axis=2)
        image = Image.fromarray(levels.astype({"I;16": np.uint16, "I": np.int32}[mode]))
    else:
        image = image.convert(mode.split()[0] if mode != "PA" else "P")
        image = image.convert("PA") if mode == "PA" else image
        if mode in ("LA", "RGBA"):
            image.putalpha(Image.fromarray(pixels_of(1, 6)[0][..., 0]))
        if mode.endswith("tRNS"):
            image.info["transparency"] = 3 if mode.startswith("P") else image.getpixel((1, 1))
        background = Image.new("RGBA", image.size, "white")
        expected = np.asarray(Image.alpha_composite(background, image.convert("RGBA")).convert("RGB"))
        if mode in ("CMYK", "1", "L"):
            expected = np.asarray(image.convert("RGB"))
    monkeypatch.setattr(images_module, "STRIP_PIXELS", strip)
    found = images_module._to_rgb(image)
    assert found.mode == "RGB"
    assert (np.asarray(found) == expected).all()


def test_threads_decode_so_many_pixels_at_a_time_and_a_larger_image_alone(tmp_path, monkeypatch):
    room, at_once, most = images_module._Room(images_module.PIXEL_BYTES * 2 * SIDE * SIDE), [], []
    monkeypatch.setattr(images_module, "_room", room)
    monkeypatch.setattr("stillroom.compute.usable_cores", lambda: 8)
    convert = images_module._to_rgb

    def slowly(image: Image.Image) -> Image.Image:
        at_once.append(image.size)
        most.append((len(at_once), max(at_once)))
        time.sleep(0.02)
        at_once.remove(image.size)
        return convert(image)

    monkeypatch.setattr(images_module, "_to_rgb", slowly)
    for number in range(8):
        side = 4 * SIDE if number in (2, 5) else SIDE
        Image.new("RGB", (side, side)).save(tmp_path / f"{number}.png")
    images_module._decode(FileImages(tmp_path, tuple(f"{n}.png" for n in range(8))), np.arange(8), SIDE, "squash")
    assert len(most) == 8
    assert max(count for count, largest in most if largest[0] == SIDE) == 2
    assert {count for count, largest in most if largest[0] > SIDE} == {1}


def test_warnings_are_as_before_once_threads_have_decoded(tmp_path):
    before = list(warnings.filters)
    root = write_folder(tmp_path)
    load(root)
    real = load(root, memory_limit_gib=EVERYTHING_LAZY)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: all_pixels(real.train), range(20)))
    assert warnings.filters == before


@pytest.mark.parametrize("through", ["the pipe itself", "a link"])
def test_a_pipe_among_images_is_not_waited_for(tmp_path, through):
    root = write_folder(tmp_path / "data")
    image = root / "train" / "a" / "0.png"
    image.unlink()
    os.mkfifo(image if through == "the pipe itself" else tmp_path / "pipe")
    if through == "a link":
        image.symlink_to(tmp_path / "pipe")
        with pytest.raises(StillroomError, match=r"a/0\.png: neither a file nor a link to one"):
            load(root)
    else:
        assert len(load(root).train) == 5


def test_crop_keeps_the_centre_and_squash_keeps_everything(tmp_path):
    wide = np.zeros((SIDE, 3 * SIDE, 3), np.uint8)
    wide[:, SIDE : 2 * SIDE] = pixels_of(1, 3)[0]
    content = encode(wide)
    assert (one_image(tmp_path / "crop", content, resize="crop") == wide[:, SIDE : 2 * SIDE]).all()
    squashed = np.asarray(Image.fromarray(wide).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    assert (one_image(tmp_path / "squash", content, resize="squash") == squashed).all()
    with pytest.raises(StillroomError, match="18x6"):
        one_image(tmp_path / "refuse", content)


# Parquet


@pytest.mark.parametrize("place", ["", "data", "plain_text"])
@pytest.mark.parametrize("raw", [False, True])
def test_parquet_gives_the_stored_pixels_over_several_files_and_row_groups(tmp_path, place, raw):
    pixels, labels = pixels_of(22), np.arange(22) % 2
    for k, rows in enumerate((slice(0, 9), slice(9, 22))):
        write_parquet(tmp_path / place / f"train-{k:05}-of-00002.parquet", pixels[rows], labels[rows], raw=raw)
    write_parquet(tmp_path / place / "validation-00000-of-00001.parquet", pixels[:4], labels[:4], raw=raw)
    real = load(tmp_path)
    assert torch.equal(all_pixels(real.train), to_channels_first(pixels))
    assert real.train.labels.tolist() == labels.tolist()
    assert len(real.test) == 4
    assert real.class_names == ("0", "1")
    encoded = sum(len(encode(p)) for p in pixels)
    assert 0.5 * encoded < real.stored_bytes < 1.5 * encoded + 2000


def parquet_pair(root: Path, labels: Any, **options: Any) -> Path:
    for split in ("train", "test"):
        write_parquet(root / f"{split}.parquet", pixels_of(len(labels)), labels, **options)
    return root


def test_class_names_come_from_the_hubs_metadata_or_from_sorted_string_labels(tmp_path):
    assert load(parquet_pair(tmp_path / "hub", [0, 1, 1], names=["dog", "cat"])).class_names == ("dog", "cat")
    real = load(parquet_pair(tmp_path / "text", ["dog", "cat", "dog"]))
    assert real.class_names == ("cat", "dog")
    assert real.train.labels.tolist() == [1, 0, 1]
    encoded = pa.array(["dog", "cat", "dog"]).dictionary_encode()
    assert load(parquet_pair(tmp_path / "dictionary", encoded)).class_names == ("cat", "dog")


@pytest.mark.parametrize("places", [("train", "test"), ("train-0", "train-1")])
def test_parquet_whose_labels_are_numbers_in_one_file_and_text_in_another_is_refused(tmp_path, places):
    for name, labels in zip(places, ([0, 1], ["0", "1"]), strict=True):
        write_parquet(tmp_path / f"{name}.parquet", pixels_of(2), labels)
    with pytest.raises(StillroomError, match=rf"{places[1]}.parquet and .* text in 'label' in the one and numbers in"):
        load(tmp_path, holdout_per_class=0 if "test" in places else 1)


def test_names_in_a_dictionary_that_no_row_has_are_no_classes(tmp_path):
    labels = pa.DictionaryArray.from_arrays(pa.array([1, 2, 2], pa.int8()), pa.array(["unused", "cat", "dog"]))
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", pixels_of(3), labels)
    real = load(tmp_path)
    assert real.class_names == ("cat", "dog")
    assert real.train.labels.tolist() == [0, 1, 1]


def test_text_labels_are_numbered_by_their_sorted_names_over_files_and_row_groups(tmp_path):
    texts = ["dog", "cat", "bee", "dog", "ant", "cat", "bee", "ant", "cow", "dog"]
    for k, rows in enumerate((slice(0, 6), slice(6, 10))):
        write_parquet(tmp_path / f"train-{k}.parquet", pixels_of(10)[rows], texts[rows])
    write_parquet(tmp_path / "test.parquet", pixels_of(2), ["dog", "bee"])
    real = load(tmp_path)
    names = sorted(set(texts))
    assert real.class_names == tuple(names)
    assert real.train.labels.tolist() == [names.index(text) for text in texts]
    assert real.test.labels.tolist() == [names.index("dog"), names.index("bee")]


ODD_NAMES = ("cat/dog", "../x", "/etc/passwd", "a b", "süß 日本", "C:\\CON", "..", "line\nbreak", "{}%s", "-rf *")


@pytest.mark.parametrize("labels", ["numbers", "strings"])
def test_class_names_of_any_kind_name_classes_and_never_files(tmp_path, labels):
    numbers, names = np.arange(20) % 10, sorted(ODD_NAMES)
    if labels == "numbers":
        parquet_pair(tmp_path / "data", numbers, names=names)
    else:
        parquet_pair(tmp_path / "data", [names[n] for n in numbers])
    real = load(tmp_path / "data")
    assert real.class_names == tuple(names)
    assert real.train.labels.tolist() == numbers.tolist()
    distill("random", real, [], ipc=2, labels="hard").save(tmp_path / "set")
    assert load_distilled(tmp_path / "set").manifest.class_names == tuple(names)
    made = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    images = next((tmp_path / "set").glob("images-*.parquet")).name
    files = ("README.md", "contact_sheet.png", images, "manifest.json")
    assert made == ["data", "data/test.parquet", "data/train.parquet", "set", *(f"set/{name}" for name in files)]


def test_a_class_name_that_utf_8_cannot_write_is_refused(tmp_path):
    with pytest.raises(StillroomError, match=r"data has the class name '\\ud800', which UTF-8 cannot write"):
        load(parquet_pair(tmp_path / "data", [0, 1], names=["cat", "\ud800"]))


def test_ambiguous_or_unfit_columns_are_listed_and_can_be_named(tmp_path):
    both = parquet_pair(tmp_path / "both", [0, 1], extra={"labels": [1, 0]})
    with pytest.raises(
        StillroomError, match=r"2 candidates for the label column.*labels \(int64\).*--data\.label-column"
    ):
        load(both)
    assert load(both, label_column="labels").train.labels.tolist() == [1, 0]
    with pytest.raises(StillroomError, match=r"no image column 'label'"):
        load(both, label_column="labels", image_column="label")
    with pytest.raises(StillroomError, match=r"has no label column .*Add one that holds each image's class"):
        load(parquet_pair(tmp_path / "float", [0.0, 1.0]))
    (tmp_path / "paths").mkdir()
    pq.write_table(pa.table({"image": ["a.png", "b.png"], "label": [0, 1]}), tmp_path / "paths" / "train.parquet")
    with pytest.raises(StillroomError, match=r"no image column .*image \(string\), label.*Add one that holds .*PNG"):
        load(tmp_path / "paths")
    with pytest.raises(
        StillroomError,
        match=r"no column named label, labels or fine_label, .*Name one with --data\.label-column row_id\.",
    ):
        load(parquet_pair(tmp_path / "id", [0, 1], label="row_id"))
    assert len(load(parquet_pair(tmp_path / "photo", [0, 1], image="photo")).train) == 2


def test_flawed_parquet_is_refused(tmp_path):
    with pytest.raises(StillroomError, match="row 1 has no 'label'"):
        load(parquet_pair(tmp_path / "null", pa.array([0, None, 1])))
    unseen = parquet_pair(tmp_path / "unseen", ["cat", "dog"])
    write_parquet(unseen / "test.parquet", pixels_of(1), ["bird"])
    with pytest.raises(StillroomError, match="test label 'bird', which the training split lacks"):
        load(unseen)
    untrained = write_parquet(tmp_path / "untrained" / "a.parquet", pixels_of(2), [0, 1]).parent
    with pytest.raises(StillroomError, match="no parquet file with 'train'"):
        load(untrained)
    write_parquet(tmp_path / "untested" / "train.parquet", pixels_of(2), [0, 1])
    with pytest.raises(StillroomError, match=r"no test split\. Add .*parquet files.*--data\.holdout-per-class N"):
        load(tmp_path / "untested")
    two = [parquet_pair(tmp_path / "two" / name, [0, 1]) for name in "xy"]
    with pytest.raises(StillroomError, match=r"several datasets.*--data\.source"):
        load(two[0].parent)
    damaged = parquet_pair(tmp_path / "damaged", [0, 1])
    (damaged / "train.parquet").write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(StillroomError, match=r"train\.parquet cannot be read as parquet"):
        load(damaged)
    absent = parquet_pair(tmp_path / "absent", [0, 1])
    cells = pa.array([{"bytes": None}, {"bytes": encode(pixels_of(1)[0])}], pa.struct([("bytes", pa.binary())]))
    pq.write_table(pa.table({"img": cells, "label": [0, 1]}), absent / "train.parquet")
    with pytest.raises(StillroomError, match=r"train\.parquet row 0: .*no bytes are stored"):
        load(absent)


def test_one_parquet_file_is_a_training_split_and_needs_a_holdout(tmp_path):
    path = write_parquet(tmp_path / "mine.parquet", pixels_of(6), [0, 1] * 3)
    with pytest.raises(StillroomError, match="no test split"):
        load(path)
    assert (len(load(path, holdout_per_class=1).train), len(load(path, holdout_per_class=1).test)) == (4, 2)


@pytest.mark.parametrize("name", [
    "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",  # SHA-256 of "hello"
    "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0",  # what git calls a file that holds "hello"
])  # fmt: skip
def test_a_file_that_comes_damaged_from_the_hub_is_refused_and_deleted(tmp_path, monkeypatch, name):
    blob, link = tmp_path / "blobs" / name, tmp_path / "snapshots" / "abc" / "train.parquet"
    for path in (blob, link):
        path.parent.mkdir(parents=True)
    link.symlink_to(blob)
    come = [b"hellO", b"hello"]

    def snapshot_download(repo: str, repo_type: str, allow_patterns: list[str]) -> str:
        blob.write_bytes(come.pop(0))
        return str(link.parent)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    with pytest.raises(StillroomError, match=r"^mine: train\.parquet came damaged from the Hub, and is deleted here"):
        fetch_from_hub("owner/name", "mine")
    assert not blob.exists()
    assert fetch_from_hub("owner/name", "mine") == link.parent


def test_a_hub_id_is_fetched_as_parquet_and_failures_say_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = parquet_pair(tmp_path / "snapshot", [0, 1])

    def snapshot_download(repo: str, repo_type: str, allow_patterns: list[str]) -> str:
        assert (repo, repo_type, allow_patterns) == ("owner/pets", "dataset", ["*.parquet"])
        return str(folder)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    real = load("owner/pets")
    assert (real.name, len(real.train)) == ("owner/pets", 2)

    def offline(*_: Any, **__: Any) -> str:
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=offline))
    with pytest.raises(StillroomError, match="could not be fetched from the Hub: no network"):
        load("owner/pets")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(StillroomError, match=r"install stillroom\[hub\]"):
        load("owner/pets")


@pytest.mark.parametrize(("source", "repo"), [
    ("owner/pets", "owner/pets"), ("hf://owner/pets", "owner/pets"), ("hf://datasets/owner/pets", "owner/pets"),
    ("hf://here/x.npz", "here/x.npz"), ("here/x", None), ("owner/x.npz", None), ("owner/a/b", None), ("pets", None),
    ("hf://pets", None), ("hf://../pets", None), ("https://owner/pets", None),
])  # fmt: skip
def test_a_hub_id_is_told_from_a_path(tmp_path, monkeypatch, source, repo):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert hub_id(source) == repo


def test_only_squares_of_one_other_size_are_fitted_to_a_size_unasked(tmp_path):
    write = iter(range(9))

    def fitted(*sizes: tuple[int, int], side: int = 4, **settings: Any) -> tuple[int | None, str]:
        root = tmp_path / str(next(write))
        for number, size in enumerate(sizes):
            for name in "ab":
                (root / "train" / name).mkdir(parents=True, exist_ok=True)
                Image.new("RGB", size).save(root / "train" / name / f"{number}.png")
        (root / "train" / "a" / "0.txt").write_text("no image, which says nothing")
        config = fit_size(DataConfig(str(root), **settings), side)
        return config.image_size, config.resize

    assert fitted((8, 8), (8, 8)) == (4, "crop")
    assert fitted((8, 8), (8, 8), side=8) == (8, "refuse")
    assert fitted((8, 8), (9, 9)) == (4, "refuse")
    assert fitted((8, 6)) == (4, "refuse")
    assert fitted((8, 8), resize="squash") == (4, "squash")
    assert fit_size(DataConfig("digits"), 16) == DataConfig("digits", image_size=16, resize="crop")
    assert fit_size(DataConfig("cifar10", root="nowhere"), 32).resize == "refuse"  # known without a look
    with pytest.raises(StillroomError, match="nowhere is no existing path"):
        fit_size(DataConfig("nowhere"), 32)


# npz


def test_npz_accepts_every_stated_shape_of_images_and_labels(tmp_path):
    pixels = pixels_of(6, 1)
    plain = load(write_npz(tmp_path / "a.npz"))
    assert isinstance(plain.train, MemoryImages)
    assert torch.equal(all_pixels(plain.train), to_channels_first(pixels))
    first = {"train_images": pixels.transpose(0, 3, 1, 2), "train_labels": (np.arange(6, dtype=np.uint8) % 2)[:, None]}
    assert load(write_npz(tmp_path / "b.npz", **first)).fingerprint == plain.fingerprint
    for gray in (pixels[..., 0], pixels[..., :1], pixels[..., 0][:, None]):
        real = load(write_npz(tmp_path / "c.npz", train_images=gray))
        assert torch.equal(all_pixels(real.train), to_channels_first(pixels[..., :1]).expand(-1, 3, -1, -1))
        assert real.raw_bytes == real.stored_bytes == 6 * SIDE * SIDE


def test_npz_class_names_and_the_validation_split_are_used_where_they_are_needed(tmp_path):
    names = np.array(["dog", "cat"])
    val = {"val_images": pixels_of(2, 9), "val_labels": np.arange(2)}
    real = load(write_npz(tmp_path / "a.npz", class_names=names, **val))
    assert real.class_names == ("dog", "cat")
    assert len(real.test) == 6
    assert len(load(write_npz(tmp_path / "b.npz", test_images=None, test_labels=None, **val)).test) == 2


@pytest.mark.parametrize(("changes", "message"), [
    ({"train_images": np.zeros((6, 4, 4, 3), np.float32)},
     r"float32.*must be uint8.*np\.rint\(images \* 255\).* in \[0, 1\], np\.rint\(images\).* in 0 \.\.\. 255"),
    ({"test_images": np.zeros((6, 4, 4, 3), np.int64)}, r"'test_images' .*int64.*images\.astype\(np\.uint8\) if"),
    ({"train_images": np.zeros((6, 4, 4, 3), bool)}, r"bool.*images\.astype\(np\.uint8\) \* 255"),
    ({"train_images": np.zeros((6, 4, 4, 4), np.uint8)}, r"shape \[6, 4, 4, 4\]"),
    ({"train_images": np.zeros((6, 0, 0, 3), np.uint8)}, r"shape \[6, 0, 0, 3\]"),
    ({"train_images": np.zeros((6,), np.uint8)}, r"shape \[6\]"),
    ({"train_images": np.array([{}] * 6)}, "object"),
    ({"train_images": None}, r"no array 'train_images', only \['test_images', .*needed are train_images, train_labels"),
    ({"test_images": None, "test_labels": None},
     r"no test split.*\['train_images', 'train_labels'\]; needed are test_images and .*--data\.holdout-per-class N"),
    ({"test_labels": None}, "no array 'test_labels'"),
    ({"train_labels": np.zeros(5, np.int64)}, r"int64 \[5\]; the 6 images"),
    ({"train_labels": np.eye(6)}, r"float64 \[6, 6\].*integers 0 \.\.\. C-1.*np\.argmax\(labels, axis=1\)"),
    ({"test_labels": np.eye(6, dtype=np.uint8)}, r"'test_labels'.*uint8 \[6, 6\].*np\.argmax\(labels, axis=1\)"),
    ({"train_labels": np.array(list("ababab"))}, r"<U1 \[6\].*class_names, labels = np\.unique"),
    ({"train_labels": np.array([0, 1, 0, 1, 0, np.nan])}, r"float64 \[6\].*integers.*labels\.astype\(np\.int64\)"),
    ({"train_labels": np.array([0, 1, 0, 1, -2, -1])},
     r"training label -2, -1 \(on 2 of 6 images\), but the 4 .*have \(-2, -1, 0, 1\) must be 0 \.\.\. 3\. Renumber"),
    ({"train_labels": np.array([0, 1, 0, 1, 0, 3])},
     r"training label 3 \(on 1 of 6 images\), but the 3 .* \(0, 1, 3\) must be 0 \.\.\. 2.* labelled by mistake"),
    ({"train_labels": np.array([0, 1, 0, 1, 0, 3]), "class_names": np.array(["a", "b"])},
     r"training label 3 \(on 1 of 6 images\), but its 2 classes are labelled 0 \.\.\. 1"),
    ({"class_names": np.array(["a", "a"])}, r"x\.npz has the class name 'a' for the labels \[0, 1\]; give every class"),
    ({"train_labels": np.array([0, 1, 0, 1, 0, 2**64 - 1], np.uint64)}, "training label 18446744073709551615"),
    ({"test_labels": np.array([0, 1, 0, 1, 0, 2])}, r"test label 2 .*, but the 2 labels that its training images have"),
    ({"train_labels": np.zeros(6, np.int64)}, "1 class"),
    ({"class_names": np.array(["a", "b", "c"])}, r"class 2 \('c'\) has no training image"),
    ({"class_names": np.array([1, 2])}, "must be strings"),
    ({"train_images": np.zeros((6, 4, 5, 3), np.uint8)}, r"train_images\[0\] is 5x4 pixels"),
])  # fmt: skip
def test_a_flawed_npz_gives_one_error_that_names_the_array(tmp_path, changes, message):
    with pytest.raises(StillroomError, match=message):
        load(write_npz(tmp_path / "x.npz", **changes))


def test_npz_arrays_above_the_memory_limit_are_refused_before_they_are_read(tmp_path):
    with pytest.raises(
        StillroomError, match=r"needs \d\.\d\de-\d+ GiB .*cannot be read lazily.*--data\.memory-limit-gib"
    ):
        load(write_npz(tmp_path / "x.npz"), memory_limit_gib=1e-9)


QUIET = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = st.sampled_from([np.uint8, np.uint8, np.int64, np.uint64, np.int8, np.float32, bool, "U3", object])
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 4, 4]), max_size=5).map(tuple)


def arrays(shapes: st.SearchStrategy, dtypes: st.SearchStrategy) -> st.SearchStrategy:
    def build(shape: tuple[int, ...], dtype: Any, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, 3, shape).astype(dtype)

    return st.builds(build, shapes, dtypes, st.integers(0, 99))


@QUIET
@given(
    st.fixed_dictionaries(
        {},
        optional={
            f"{split}_{key}": st.one_of(arrays(SHAPES, DTYPES), likely)
            for split in ("train", "test")
            for key, likely in (
                ("images", arrays(st.sampled_from([(4, 4, 4, 3), (4, 3, 4, 4), (4, 4, 4)]), st.just(np.uint8))),
                ("labels", st.sampled_from([np.array([0, 1, 0, 1]), np.array([[0], [1], [2], [0]])])),
            )
        }
        | {"class_names": arrays(SHAPES, DTYPES)},
    )
)
def test_any_npz_of_any_arrays_loads_or_is_refused(tmp_path, content):
    np.savez(tmp_path / "x.npz", **content)
    loads_or_is_refused(tmp_path / "x.npz")


def loads_or_is_refused(source: Path, **settings: Any) -> None:
    try:
        real = load(source, **settings)
    except StillroomError:
        return
    batch = all_pixels(real.train)
    assert batch.shape == (len(real.train), 3, real.image_size, real.image_size)
    assert set(real.train.labels.tolist()) == set(range(real.classes))
    assert all(np.isfinite([*real.mean, *real.std]))
    assert len(real.fingerprint) == 64


@QUIET
@given(st.data())
def test_any_damage_to_an_npz_is_harmless_or_refused(tmp_path, data):
    content = bytearray(write_npz(tmp_path / "x.npz").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "x.npz").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    loads_or_is_refused(tmp_path / "x.npz")


@QUIET
@given(st.data())
def test_any_folder_of_random_files_loads_or_is_refused(tmp_path_factory, data):
    root = write_folder(tmp_path_factory.mktemp("folder"))
    kinds = [encode(pixels_of(1)[0], kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM")]
    for _ in range(data.draw(st.integers(1, 3))):
        content = bytearray(data.draw(st.one_of(st.sampled_from(kinds), st.binary(max_size=80))))
        for _ in range(data.draw(st.integers(0, 3)) if content else 0):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        split, name = data.draw(
            st.sampled_from(["train/a/0", "train/a/9", "train/b/1", "test/a/0", "test/b/x"])
        ).rsplit("/", 1)
        (root / split / name).write_bytes(content)
    loads_or_is_refused(
        root, skip_bad_images=data.draw(st.booleans()), resize=data.draw(st.sampled_from(["refuse", "crop"]))
    )


@QUIET
@given(st.binary(max_size=60), st.integers(0, 3000))
def test_any_damage_to_a_parquet_file_is_harmless_or_refused(tmp_path, noise, position):
    root = parquet_pair(tmp_path, [0, 1, 0])
    content = (root / "train.parquet").read_bytes()
    position %= len(content)
    (root / "train.parquet").write_bytes(content[:position] + noise + content[position + len(noise) :])
    loads_or_is_refused(root, skip_bad_images=True)


# Selection, laziness, identity


def ranks(real: RealData) -> list[tuple[int, int]]:
    """(label, first pixel) of each training image."""
    return list(zip(real.train.labels.tolist(), all_pixels(real.train)[:, 0, 0, 0].tolist(), strict=True))


def test_the_first_images_train_and_the_last_are_held_out_in_place_of_the_test_split(tmp_path):
    labels = np.array([1, 0, 0, 1, 0, 1, 0, 0])
    images = np.zeros((8, 4, 4, 3), np.uint8) + np.arange(8, dtype=np.uint8)[:, None, None, None]
    path = write_npz(tmp_path / "x.npz", train_images=images, train_labels=labels, test_images=None, test_labels=None)
    held = load(path, holdout_per_class=1)
    assert all_pixels(held.train)[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 6]
    assert all_pixels(held.test)[:, 0, 0, 0].tolist() == [5, 7]
    assert held.test.labels.tolist() == [1, 0]
    both = load(path, holdout_per_class=1, train_per_class=1)
    assert ranks(both) == [(1, 0), (0, 1)]
    assert both.stored_bytes == both.raw_bytes == 2 * 4 * 4 * 3
    with pytest.raises(StillroomError, match=r"class 1 \('1'\) has no training image left after holding out"):
        load(path, holdout_per_class=3)


@pytest.mark.parametrize("layout", ["folder", "parquet"])
@pytest.mark.parametrize(
    "settings", [{}, {"resize": "crop", "image_size": 4}, {"holdout_per_class": 1}, {"train_per_class": 2}]
)
def test_lazy_images_are_the_same_as_those_in_memory(tmp_path, layout, settings):
    height = 4 if "resize" in settings else SIDE
    root = write_folder(tmp_path, height=height) if layout == "folder" else parquet_pair(tmp_path, np.arange(11) % 2)
    memory = load(root, **settings)
    lazy = load(root, memory_limit_gib=EVERYTHING_LAZY, **settings)
    assert isinstance(lazy.train, LazyImages)
    assert isinstance(memory.train, MemoryImages)
    for split in ("train", "test"):
        one, other = getattr(memory, split), getattr(lazy, split)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(all_pixels(one), all_pixels(other))
        shuffled = torch.randperm(len(one), generator=torch.Generator().manual_seed(0))
        assert torch.equal(one.batch(shuffled), other.to("cpu").batch(shuffled))
    fields = (
        "class_names", "mean", "std", "image_size", "raw_bytes", "stored_bytes", "skipped_images", "fingerprint",
    )  # fmt: skip
    assert all(getattr(memory, field) == getattr(lazy, field) for field in fields)


def test_a_lazy_batch_names_the_image_that_became_unreadable(tmp_path):
    root = write_folder(tmp_path)
    real = load(root, memory_limit_gib=EVERYTHING_LAZY)
    (root / "train" / "b" / "0.png").unlink()
    with pytest.raises(
        StillroomError, match=r"b/0\.png.* Restore them .* --data\.skip-bad-images and a new --out, whe"
    ):
        real.train.batch(torch.tensor([0, 3]))


@pytest.mark.parametrize(("resize", "found"), [("refuse", "2x2 pixels"), ("squash", "1 image cannot be read: .*b/1")])
def test_of_lazy_images_that_are_not_decoded_ahead_the_headers_are_looked_at(tmp_path, resize, found):
    folder = write_folder(tmp_path) / "train"
    names = ("a/0.png", "a/1.png", "b/0.png", "b/1.png")
    split = Split(FileImages(folder, names), np.array([0, 0, 1, 1]))
    lazily = functools.partial(load_images, split, np.arange(4), SIDE, resize, False, 0.0, count_levels=False)
    assert isinstance(lazily()[0], LazyImages)
    if resize == "refuse":
        Image.new("RGB", (2, 2)).save(folder / "b" / "1.png")
    else:
        (folder / "b" / "1.png").write_bytes(b"not an image")
    with pytest.raises(StillroomError, match=found):
        lazily()


def test_the_fingerprint_is_that_of_names_labels_and_pixels_and_changes_with_each(tmp_path):
    real = load(write_npz(tmp_path / "x.npz"))
    digest = hashlib.sha256(json.dumps(["0", "1"]).encode())
    for seed in (1, 2):
        digest.update((np.arange(6) % 2).astype(np.int64).tobytes())
        digest.update(json.dumps([6, 3, SIDE, SIDE]).encode())
        digest.update(np.ascontiguousarray(pixels_of(6, seed).transpose(0, 3, 1, 2)).tobytes())
    assert real.fingerprint == digest.hexdigest()
    other = pixels_of(6, 1)
    other[5, 5, 5, 2] ^= 1
    changed = {"train_images": other, "test_labels": np.arange(6)[::-1] % 2, "class_names": np.array(["a", "b"])}
    for key, value in changed.items():
        assert load(write_npz(tmp_path / "y.npz", **{key: value})).fingerprint != real.fingerprint


@pytest.mark.parametrize("memory_limit_gib", [4.0, EVERYTHING_LAZY])
def test_above_a_size_a_fingerprint_changes_with_a_files_size_and_not_with_the_place(
    tmp_path, monkeypatch, memory_limit_gib
):
    by_pixels = load(write_folder(tmp_path / "one"), memory_limit_gib=memory_limit_gib).fingerprint
    monkeypatch.setattr("stillroom.images.HASHED_BYTES", 0)
    one = load(tmp_path / "one", memory_limit_gib=memory_limit_gib).fingerprint
    root = write_folder(tmp_path / "two")
    assert load(root, memory_limit_gib=memory_limit_gib).fingerprint == one != by_pixels
    with (root / "test" / "a" / "0.png").open("ab") as file:
        file.write(b"x")
    assert load(root, memory_limit_gib=memory_limit_gib).fingerprint != one


def write_uncompressed(root: Path, layout: str, first: np.ndarray) -> None:
    """Six images of two classes in either split, the first one `first`; sizes of files are the same for all pixels."""
    files = [encode(image, compress_level=0) for image in (first, *pixels_of(5))]
    for split in ("train", "test"):
        root.mkdir(exist_ok=True)
        if layout == "folder":
            for number, content in enumerate(files):
                path = root / split / "ab"[number % 2] / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        elif layout == "parquet":
            table = pa.table({"image": files, "label": [0, 1] * 3})
            pq.write_table(table, root / f"{split}.parquet", compression="none", use_dictionary=False)
        else:
            with tarfile.open(root / f"{split}-0.tar", "w") as tar:
                for number, content in enumerate(files):
                    for name, data in ((f"{number}.png", content), (f"{number}.cls", b"%d" % (number % 2))):
                        member = tarfile.TarInfo(name)
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("layout", ["folder", "parquet", "shards"])
def test_what_a_look_at_all_lazy_images_gave_is_remembered_until_a_file_changes(tmp_path, monkeypatch, layout):
    decode, looked = images_module._decode, []
    monkeypatch.setattr(images_module, "_decode", lambda *a: looked.append(a) or decode(*a))

    def look() -> tuple[Any, ...]:
        real = load(tmp_path / "data", memory_limit_gib=EVERYTHING_LAZY)
        return real.mean, real.std, real.fingerprint

    write_uncompressed(tmp_path / "data", layout, pixels_of(1)[0])
    known, sizes = look(), {path: path.stat().st_size for path in (tmp_path / "data").rglob("*")}
    looked.clear()
    assert look() == known
    assert not looked
    write_uncompressed(tmp_path / "data", layout, pixels_of(1, seed=1)[0])
    assert {path: path.stat().st_size for path in (tmp_path / "data").rglob("*")} == sizes
    for path in sizes:
        os.utime(path, ns=(0, 0))  # whatever the grain of the file system's clock
    assert all(one != other for one, other in zip(look(), known, strict=True))


def test_a_fingerprint_is_that_of_both_splits_also_where_only_one_is_held_in_memory(tmp_path):
    write_uncompressed(tmp_path / "data", "folder", pixels_of(1)[0])
    for number in range(6, 20):
        (tmp_path / "data" / "train" / "a" / f"{number}.png").write_bytes(encode(pixels_of(1, number)[0]))
    between = 10 * 3 * SIDE * SIDE / 2**30
    assert [type(getattr(load(tmp_path / "data", memory_limit_gib=between), split)) for split in ("train", "test")] == [
        LazyImages, MemoryImages,
    ]  # fmt: skip
    for seed in (0, 1):
        (tmp_path / "data" / "test" / "a" / "0.png").write_bytes(encode(pixels_of(1, seed)[0], compress_level=0))
        mixed, held = (load(tmp_path / "data", memory_limit_gib=limit).fingerprint for limit in (between, 4.0))
        assert mixed == held


def test_nothing_is_remembered_of_another_way_to_read_pixels(tmp_path, monkeypatch):
    root = write_folder(tmp_path)
    before = load(root, memory_limit_gib=EVERYTHING_LAZY)
    known = before.mean, before.fingerprint
    read = images_module._to_rgb
    monkeypatch.setattr(images_module, "_to_rgb", lambda image: read(image).point(lambda level: level // 2))
    monkeypatch.setattr(images_module, "READ_SCHEME", 2)
    after = load(root, memory_limit_gib=EVERYTHING_LAZY)
    assert after.mean != known[0]
    assert after.fingerprint != known[1]


def test_sizes_of_many_images_are_learned_from_a_few_row_groups(tmp_path, monkeypatch):
    source = parquet_pair(tmp_path, np.arange(2000) % 2)
    groups = read_groups(monkeypatch)
    assert set(look_at(DataConfig(str(source))).short_sides) == {SIDE}
    assert sum(groups.values()) <= 8 * 4  # of four rows each: blocks of twelve rows begin anywhere


@pytest.mark.parametrize("count", [1, 5, 12, 97, 2000])
def test_sampled_rows_are_among_all_and_spread_to_both_ends(count):
    rows = sample_rows(count)
    assert len(set(rows.tolist())) == len(rows) >= min(count, 50)
    assert (rows[0], rows[-1]) == (0, count - 1)


def test_images_that_were_left_out_are_remembered_and_bad_ones_that_stop_are_looked_at_again(tmp_path):
    root = write_folder(tmp_path / "data")
    (root / "train" / "a" / "0.png").write_bytes(b"no image")
    lazily = functools.partial(load, root, memory_limit_gib=EVERYTHING_LAZY)
    one, other = lazily(skip_bad_images=True), lazily(skip_bad_images=True)
    assert one.skipped_images == other.skipped_images
    assert len(one.skipped_images) == 1
    assert torch.equal(one.train.labels, other.train.labels)
    for _ in range(2):
        with pytest.raises(StillroomError, match="1 image cannot be read"):
            lazily()


def test_a_damaged_record_of_a_look_is_made_anew_and_a_cache_that_cannot_be_written_keeps_none(tmp_path, own_cache):
    root = write_folder(tmp_path / "data")
    mean = load(root, memory_limit_gib=EVERYTHING_LAZY).mean
    records = list((own_cache / "looks").iterdir())
    for record in records:
        record.write_text(record.read_text().replace("1", "2"))
    assert load(root, memory_limit_gib=EVERYTHING_LAZY).mean == mean
    shutil.rmtree(own_cache / "looks")
    (own_cache / "looks").write_text("a file stands where the folder should be")
    assert load(root, memory_limit_gib=EVERYTHING_LAZY).mean == mean


def read_groups(monkeypatch) -> Counter[tuple[Path, int]]:
    """How often each row group's images are read, from now on."""
    read, groups = parquet_module.read_column, Counter[tuple[Path, int]]()

    def counted(file: Any, group: int, column: str, path: Path) -> Any:
        groups[path, group] += column == "img"
        return read(file, group, column, path)

    monkeypatch.setattr(parquet_module, "read_column", counted)
    return groups


def test_shuffled_parquet_is_read_twice_at_most_and_gives_the_same_images(tmp_path, monkeypatch):
    source = parquet_pair(tmp_path, np.arange(11) % 2)
    expected = all_pixels(load(source).train)
    monkeypatch.setattr(parquet_module, "FREE_BYTES", 0)
    groups = read_groups(monkeypatch)
    real = load(source, memory_limit_gib=EVERYTHING_LAZY)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for index in torch.randperm(len(real.train), generator=generator):
            assert torch.equal(real.train.batch(index[None])[0], expected[index])
    assert [groups[tmp_path / "train.parquet", group] for group in range(3)] == [2, 2, 2]


@pytest.mark.parametrize("trouble", ["no room", "no folder", "half written"])
def test_parquet_that_cannot_be_unpacked_is_read_by_its_groups(tmp_path, monkeypatch, trouble):
    source = parquet_pair(tmp_path, np.arange(11) % 2)
    expected = all_pixels(load(source).train)
    groups = read_groups(monkeypatch)
    monkeypatch.setattr(parquet_module, "FREE_BYTES", 0)
    if trouble == "no room":
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    elif trouble == "no folder":
        monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path / "file"))
        (tmp_path / "file").touch()
    else:
        opened = tempfile.TemporaryFile
        monkeypatch.setattr("tempfile.TemporaryFile", lambda **how: HalfWritten(opened(**how)))
    real = load(source, memory_limit_gib=EVERYTHING_LAZY)
    for _ in range(3):
        for index in torch.arange(len(real.train)).flip(0):
            assert torch.equal(real.train.batch(index[None])[0], expected[index])
    assert [groups[tmp_path / "train.parquet", group] for group in range(3)] == [4, 4, 3]  # the last one was at hand


class HalfWritten:
    """A file whose disk fills while it is written."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, content: bytes) -> int:
        return self.file.write(content[: len(content) // 2])


# Settings


@pytest.mark.parametrize(("settings", "message"), [
    ({"source": ""}, r"--data\.source is empty"),
    ({"source": "cifar1000"}, "Did you mean 'cifar100'"),
    ({"source": "no/such/path"}, "no existing path"),
    ({"source": "nowhere.npz"}, "no existing path"),
    ({"resize": "stretch"}, r"--data\.resize is 'stretch'"),
    ({"flip": "yes"}, r"--data\.flip is 'yes', which is not one of its choices.*auto"),
    ({"image_size": 0}, r"--data\.image-size is 0"),
    ({"train_per_class": 0}, r"--data\.train-per-class is 0"),
    ({"holdout_per_class": -1}, r"--data\.holdout-per-class is -1"),
    ({"holdout_share": 1.0}, r"--data\.holdout-share is 1\.0; give a share from 0 to below 1"),
    ({"holdout_share": 0.1, "holdout_per_class": 2}, r"holdout-share is 0\.1 and --data\.holdout-per-class 2"),
    ({"memory_limit_gib": float("nan")}, r"--data\.memory-limit-gib is nan"),
    ({"image_size": 16}, "digits train.* is 32x32 pixels .*not 16x16"),
])  # fmt: skip
def test_a_bad_setting_is_refused_by_name(settings, message):
    with pytest.raises(StillroomError, match=message):
        load_real(DataConfig(**settings))


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(StillroomError, match=r"neither \.npz nor \.parquet"):
        load(tmp_path / "x.zip")
    (tmp_path / "x.npz").write_bytes(b"text")
    with pytest.raises(StillroomError, match="cannot be read as npz"):
        load(tmp_path / "x.npz")


needs_real_data = pytest.mark.skipif(
    not Path(os.environ.get("STILLROOM_TEST_DATA", ""), "cifar100.npz").is_file(),
    reason="needs real images: set STILLROOM_TEST_DATA to a folder with cifar100.npz",
)


@needs_real_data
def test_real_cifar100_has_the_constants_of_its_row():
    real = load("cifar100", root=os.environ["STILLROOM_TEST_DATA"])
    assert isinstance(real.train, MemoryImages)
    assert (len(real.train), len(real.test), real.classes) == (50_000, 10_000, 100)
    for channel in range(3):
        pixels = real.train.images[:, channel].double() / 255
        assert abs(pixels.mean().item() - real.mean[channel]) < 1e-3
        assert abs(pixels.std().item() - real.std[channel]) < 1e-3
