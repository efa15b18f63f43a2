"""Other people's layouts: what is written is read back, classes are never guessed, and bad folders are refused."""

from __future__ import annotations

import io
import json
import math
import os
import struct
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from conftest import TOY_CLASSES, TOY_COLOURS, TOY_SIZE, build_toy_teacher, write_toy_npz
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from stillroom import cli
from stillroom.classnames import match_classes
from stillroom.compute import Plan
from stillroom.data import CIFAR10, CIFAR100, DataConfig, RealData, load_real
from stillroom.distilled import (
    DistilledSet,
    dequantize_compensators,
    load_distilled,
    quantize_compensators,
)
from stillroom.errors import StillroomError
from stillroom.exchange import ImportConfig, import_set
from stillroom.export import DDRANKING_CONSTANTS, export_set
from stillroom.infer_files import estimate_compensator
from stillroom.manifest import TeacherFacts
from stillroom.methods import infer
from stillroom.methods.infer import InferConfig, load_naturals
from stillroom.methods.select import RandomConfig, distill_random
from stillroom.run import Run
from stillroom.students import StudentConfig, check_matches, evaluate
from stillroom.train import TrainConfig

SIDE, SLOTS = 32, 3
TEACHERS = ("resnet18", "mobilenet_v2", "efficientnet_b0", "shufflenet_v1")


def draw_smooth(count: int, low: float, high: float, seed: int) -> torch.Tensor:
    """Float32 [count, 3, 32, 32] between low and high: 2 x 2 random values, enlarged, which JPEG hardly changes."""
    coarse = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return low + (high - low) * smooth


@pytest.fixture
def large(toy: RealData) -> RealData:
    """The toy world's facts for images of 32 pixels."""
    return replace(toy, image_size=SIDE)


@pytest.fixture
def smooth(large: RealData, toy: RealData, plan: Plan) -> DistilledSet:
    """An INFER set of smooth images and compensators, far enough from the edges for few of its views to be clipped."""
    plain = distill_random(toy, [], SLOTS, RandomConfig(), 0, plan, Run(None))
    stored = quantize_compensators(draw_smooth(len(TEACHERS) * SLOTS, -0.2, 0.2, 1).unflatten(0, (4, SLOTS)), 16)
    manifest = replace(
        plain.manifest,
        method="infer",
        image_size=(SIDE, SIDE),
        teachers=tuple(TeacherFacts(name, 90, "a" * 64) for name in TEACHERS),
    )
    images = (draw_smooth(SLOTS * TOY_CLASSES, 0.05, 0.95, 2) * 255).round().to(torch.uint8)
    return DistilledSet(images, plain.labels, plain.slots, stored, None, manifest)


@pytest.fixture
def plain(toy: RealData, plan: Plan) -> DistilledSet:
    """Three random images of each of the toy world's classes, with soft labels."""
    chosen = distill_random(toy, [], SLOTS, RandomConfig(), 0, plan, Run(None))
    logits = torch.randn(len(chosen.images), TOY_CLASSES, generator=torch.Generator().manual_seed(3))
    logits[torch.arange(len(logits)), chosen.labels] += 5
    return chosen.with_labels(logits)


def write_folder(root: Path, names: tuple[str, ...], counts: tuple[int, ...] = (2, 2, 2, 2), kind: str = "png") -> Path:
    """Class folders of noise: the red of every image's first pixel is 10 times its folder's position."""
    generator = np.random.default_rng(0)
    for position, (name, count) in enumerate(zip(names, counts, strict=True)):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 256, (TOY_SIZE, TOY_SIZE, 3)).astype(np.uint8)
            pixels[0, 0, 0] = 10 * position
            Image.fromarray(pixels).save(root / name / f"class{position:03d}_id{number:03d}.{kind}", quality=75)
    return root


def positions_of(distilled: DistilledSet) -> dict[int, int]:
    """Label -> position of its folder, read from the pixels."""
    return dict(zip(distilled.labels.tolist(), (distilled.images[:, 0, 0, 0] // 10).tolist(), strict=True))


def notes_of(distilled: DistilledSet) -> str:
    return " | ".join(distilled.manifest.extra["import"]["notes"])


# -- INFER's layout --------------------------------------------------------------------------------------------------


def test_what_is_exported_as_inferred_files_is_recovered_as_naturals_and_compensators(
    smooth: DistilledSet, large: RealData, tmp_path: Path
) -> None:
    export_set(smooth, "infer", tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out" / "new002").iterdir())
    assert files == [f"class002_id{number:03d}.jpg" for number in range(SLOTS * 5)]
    back = import_set(tmp_path / "out", large)  # found to be INFER's by itself
    assert back.manifest.method == "infer"
    assert back.manifest.ipc == 6  # 3 slots of 4 classes and 4 teachers are 24 images
    assert [teacher.name for teacher in back.manifest.teachers] == list(TEACHERS)
    assert torch.equal(back.labels, smooth.labels)
    assert torch.equal(back.slots, smooth.slots)
    naturals = (back.images.float() - smooth.images.float()).abs()
    assert naturals.mean() < 2
    errors = (dequantize_compensators(back.compensators) - dequantize_compensators(smooth.compensators)).abs() * 255
    assert errors.mean() < 2  # the mean of four classes, of JPEG 75
    measures = back.manifest.extra["import"]
    published = [Image.open(tmp_path / "out" / f"new{c:03d}" / f"class{c:03d}_id{i:03d}.jpg")
                 for i in range(SLOTS, SLOTS * 5) for c in range(4)]  # fmt: skip
    theirs = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in published]).float()
    ours = back.form_views(torch.arange(12, 60)) * 255
    assert measures["mean_error"] == pytest.approx(float((ours - theirs).abs().mean()), abs=1e-3)
    assert measures["largest_error"] == pytest.approx(float((ours - theirs).abs().max()), abs=1e-3)
    assert measures["mean_error"] < 3
    assert measures["explained"] > 0.9
    assert f"{measures['mean_error']:.1f} of 255 levels on average" in notes_of(back)


def test_naturals_that_were_published_keep_their_bytes_through_import_and_export(
    smooth: DistilledSet, large: RealData, tmp_path: Path
) -> None:
    noise = torch.randint(
        0, 256, (12, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(4)
    ).byte()  # which a second JPEG would change
    export_set(replace(smooth, images=noise), "infer", tmp_path / "one")
    back = import_set(tmp_path / "one", large, ImportConfig(layout="infer"))
    assert back.manifest.image_encoding == "jpeg75"
    assert back.manifest.extra["import"]["subsampling"] == "4:2:0"
    back.save(tmp_path / "saved")
    assert "| resnet18 | accuracy not known |" in (tmp_path / "saved" / "README.md").read_text()
    export_set(load_distilled(tmp_path / "saved"), "infer", tmp_path / "two")
    for slot in range(SLOTS):
        name = f"new001/class001_id{slot:03d}.jpg"
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_soft_labels_of_files_become_those_of_the_views(smooth: DistilledSet, large: RealData, tmp_path: Path) -> None:
    export_set(smooth, "infer", tmp_path / "out")
    logits = torch.zeros(60, 4)
    logits[:, 0] = torch.arange(60)  # class * 15 + id, in the order of sorted files
    np.save(tmp_path / "labels.npy", logits.numpy())
    back = import_set(tmp_path / "out", large, ImportConfig(soft_labels=str(tmp_path / "labels.npy")))
    for row, (image, compensator) in enumerate(back.view_table().tolist()):
        block = 0 if compensator < 0 else 1 + compensator // SLOTS
        expected = 15 * back.labels[image] + SLOTS * block + back.slots[image]
        assert back.soft_labels[row, 0] == expected


def test_views_that_are_jpeg_by_setting_are_encoded_once(smooth: DistilledSet, tmp_path: Path) -> None:
    views = replace(smooth.manifest.views, view_encoding="jpeg75")
    lossy = replace(smooth, manifest=replace(smooth.manifest, views=views))
    export_set(lossy, "infer", tmp_path / "out")
    for row in (5, 17, 59):  # id 5 // 3 is block 1, of which slot 2; rows go by block, slot and class
        path = tmp_path / "out" / f"new{row % 4:03d}" / f"class{row % 4:03d}_id{row // 4:03d}.jpg"
        written = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
        assert torch.equal(lossy.form_views(torch.tensor([row]))[0] * 255, written.float())


def test_the_estimate_is_the_mean_over_unclipped_classes_and_the_largest_where_all_are_clipped() -> None:
    naturals = torch.tensor([100, 120, 250, 240], dtype=torch.uint8).view(4, 1, 1, 1).repeat(1, 3, 1, 2)
    views = torch.tensor([130, 154, 255, 255], dtype=torch.uint8).view(4, 1, 1, 1).repeat(1, 3, 1, 2)
    views[:, :, :, 1] = torch.tensor([255, 254, 255, 255], dtype=torch.uint8).view(4, 1, 1)
    estimate = estimate_compensator(naturals, views) * 255
    assert estimate[0, 0].tolist() == pytest.approx([32, 155])


def test_a_set_of_others_with_the_same_names_is_not_taken_for_inferred(
    smooth: DistilledSet, large: RealData, tmp_path: Path
) -> None:
    unrelated = replace(
        smooth,
        images=(draw_smooth(60, 0.05, 0.95, 9) * 255).to(torch.uint8),
        labels=torch.arange(4).repeat(15),
        slots=torch.arange(15).repeat_interleave(4),
        compensators=None,
    )
    export_set(unrelated, "infer", tmp_path / "out")
    found = import_set(tmp_path / "out", large)
    assert found.compensators is None
    assert found.manifest.ipc == 15
    assert "named as INFER's files are, but compensators would explain" in notes_of(found)
    forced = import_set(tmp_path / "out", large, ImportConfig(layout="infer"))
    assert "this may be no set of INFER's" in notes_of(forced)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda root: (root / "new001" / "class001_id004.jpg").unlink(), r"class 1 .* lacks the ids \[4\] of 0 to 14"),
        (lambda root: (root / "new001" / "class001_id004.jpg").rename(root / "new001" / "x.jpg"), "class000_id000.jpg"),
        (
            lambda root: (root / "new001" / "class001_id004.jpg").rename(root / "new001" / "class002_id004.jpg"),
            "says class 2 in a folder of class 1",
        ),
        (
            lambda root: [p.unlink() for p in root.glob("*/*_id014.jpg")],
            "14 files per class are no 5 equal blocks",
        ),
        (
            lambda root: (root / "new001" / "class001_id04.jpg").write_bytes(
                (root / "new001" / "class001_id004.jpg").read_bytes()
            ),
            "an id that another file of its class has too",
        ),
    ],
)
def test_a_damaged_published_set_is_refused_by_what_is_wrong(
    smooth: DistilledSet, large: RealData, tmp_path: Path, harm: Callable[[Path], Any], message: str
) -> None:
    export_set(smooth, "infer", tmp_path / "out")
    harm(tmp_path / "out")
    with pytest.raises(StillroomError, match=message):
        import_set(tmp_path / "out", large, ImportConfig(layout="infer"))


# -- class folders ---------------------------------------------------------------------------------------------------


def test_folders_come_back_bit_for_bit_with_their_soft_labels(
    plain: DistilledSet, toy: RealData, tmp_path: Path
) -> None:
    exact, renamed = export_set(plain, "folder", tmp_path / "out")
    assert exact == "views are exact"
    assert renamed.startswith(
        "folders are not named as their classes, whose names stand in index.csv: 'north west' is no"
    )
    assert sorted(os.listdir(tmp_path / "out")) == sorted(
        ["index.csv", "north_east", "north_west", "soft_labels.npy", "south_west", "süd_ost"]
    )
    back = import_set(tmp_path / "out", toy, ImportConfig(method="random"))
    rows = [int(((back.labels == label) & (back.slots == slot)).nonzero())
            for label, slot in zip(plain.labels.tolist(), plain.slots.tolist(), strict=True)]  # fmt: skip
    assert torch.equal(back.images[rows], plain.images)
    assert torch.equal(back.soft_labels[rows], plain.soft_labels)
    assert (back.manifest.method, back.manifest.label_kind, back.manifest.ipc) == ("random", "static", SLOTS)
    assert "for 100% of the images" in notes_of(back)
    export_set(back, "folder", tmp_path / "again")
    for path in (tmp_path / "out").rglob("*.*"):
        if path.suffix in (".png", ".npy"):
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "out")).read_bytes()


@pytest.mark.parametrize("sign", ["", "?"])  # with it folders are numbered, and index.csv alone has the names
def test_exported_folders_come_back_to_the_same_data_in_another_order_of_classes(
    plain: DistilledSet, toy: RealData, tmp_path: Path, sign: str
) -> None:
    names = tuple(toy.class_names) if not sign else ("a b", "a?b", "c", "d")
    export_set(replace(plain, manifest=replace(plain.manifest, class_names=names)), "folder", tmp_path / "out")
    order = [2, 0, 3, 1]  # our label of a class is where its old one stands here
    back = import_set(tmp_path / "out", replace(toy, class_names=tuple(names[label] for label in order)))
    assert "classes matched by name" in notes_of(back)
    assert "for 100% of the images" in notes_of(back)
    for image, label, logits in zip(plain.images, plain.labels, plain.soft_labels, strict=True):
        (row,) = [row for row, other in enumerate(back.images) if torch.equal(image, other)]
        assert order[back.labels[row]] == label
        assert torch.equal(back.soft_labels[row], logits[order])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace(",0,", ",1,", 1), "has no one label for each class"),
        (lambda text: text.replace(",0,", ",9,"), "has no one label for each class"),
        (lambda text: text.rpartition("\n")[0].rpartition("\n")[0], "and the images differ"),
        (lambda text: text + text.splitlines()[1], "and the images differ"),
        (lambda text: "name,label\n" + text, "of an export says which row is whose; give --soft-labels"),
        (lambda text: text + "x" * 200_000, "cannot be read as CSV"),
    ],
)
def test_an_index_that_does_not_fit_its_folders_is_refused(
    plain: DistilledSet, toy: RealData, tmp_path: Path, change: Callable[[str], str], message: str
) -> None:
    export_set(plain, "folder", tmp_path / "out")
    index = tmp_path / "out" / "index.csv"
    index.write_text(change(index.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(StillroomError, match=rf"index\.csv {message}"):
        import_set(tmp_path / "out", toy)


def test_soft_labels_without_an_index_are_refused_until_they_are_named(
    plain: DistilledSet, toy: RealData, tmp_path: Path
) -> None:
    export_set(plain, "folder", tmp_path / "out")
    (tmp_path / "out" / "index.csv").unlink()
    labels = tmp_path / "out" / "soft_labels.npy"
    with pytest.raises(StillroomError, match=rf"no index\.csv of an export .*give --soft-labels {labels}"):
        import_set(tmp_path / "out", toy)
    assert import_set(tmp_path / "out", toy, ImportConfig(soft_labels=str(labels))).manifest.label_kind == "static"


def test_an_export_of_views_comes_back_without_a_doubt_about_it(
    plain: DistilledSet, toy: RealData, tmp_path: Path
) -> None:
    export_set(plain, "folder", tmp_path / "out")
    assert "INFER" not in notes_of(import_set(tmp_path / "out", toy))
    (tmp_path / "out" / "index.csv").unlink()
    (tmp_path / "out" / "soft_labels.npy").unlink()
    assert "INFER" in notes_of(import_set(tmp_path / "out", toy))


def test_labels_that_a_layout_cannot_hold_are_told_of(plain: DistilledSet, tmp_path: Path) -> None:
    (said,) = [note for note in export_set(plain, "infer", tmp_path / "out") if "labels" in note]
    assert "its static labels are not written" in said


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("north_east", "North West", "süd-ost", "south west"), {1: 0, 0: 1, 3: 2, 2: 3}),
        (("new000", "new001", "new002", "new003"), {0: 0, 1: 1, 2: 2, 3: 3}),
        (("00000", "00001", "00002", "00003"), {0: 0, 1: 1, 2: 2, 3: 3}),
        (("n0", "n1", "n2", "n3"), {0: 0, 1: 1, 2: 2, 3: 3}),
        (("class_0", "class_1", "class_2", "class_3"), {0: 0, 1: 1, 2: 2, 3: 3}),
    ],
)
def test_folders_are_matched_to_classes_by_name_or_else_by_number(
    toy: RealData, tmp_path: Path, folders: tuple[str, ...], expected: dict[int, int]
) -> None:
    back = import_set(write_folder(tmp_path / "set", folders), toy)
    assert positions_of(back) == expected
    assert back.compensators is None


def test_a_class_order_says_which_folder_is_which_label(toy: RealData, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", ("n01440764", "n01443537", "n01484850", "n01491361"))
    order = tmp_path / "wnids.txt"
    order.write_text("n01484850\nn01440764\nn01491361\nn01443537\n")
    back = import_set(root, toy, ImportConfig(class_order=str(order)))
    assert positions_of(back) == {0: 2, 1: 0, 2: 3, 3: 1}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("n01440764", "n01443537", "n01484850", "n01491361"), "no classes of 'toy'.*--class-order FILE.*wnids.txt"),
        (("new001", "new002", "new003", "new004"), "numbered 1 to 4, and labels from 0"),
        (("0", "1", "2", "17"), "reach 17"),
        (("new1", "class1", "2", "3"), "3 of them different"),
        (("north west", "north east", "south west", "3"), r"\['3'\] are no classes|no numbers"),
        (("north west", "north_west", "south west", "süd/ost"), "are no classes of 'toy'"),
    ],
)
def test_classes_that_cannot_be_matched_beyond_doubt_are_refused(
    toy: RealData, names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(StillroomError, match=message):
        match_classes(names, toy)


def test_numbers_are_refused_where_two_orders_of_the_classes_are_in_use(toy: RealData) -> None:
    with pytest.raises(StillroomError, match=r"follow wnids.txt; say which is which by --class-order"):
        match_classes(("0", "1", "2", "3"), replace(toy, name="tiny-imagenet"))
    sorted_ids = replace(toy, name="tiny-imagenet", class_names=tuple(f"n0000000{i}" for i in range(4)))
    assert match_classes(("0", "1", "2", "3"), sorted_ids)[0] == {"0": 0, "1": 1, "2": 2, "3": 3}


def test_uneven_counts_are_said_and_an_empty_class_is_refused(toy: RealData, tmp_path: Path) -> None:
    folders = ("new000", "new001", "new002", "new003")
    back = import_set(write_folder(tmp_path / "uneven", folders, (2, 2, 1, 2)), toy)
    assert "1 to 2 images (fewest: 'south west'); was it fetched whole?" in notes_of(back)
    with pytest.raises(StillroomError, match=r"no images of 1 of 4 classes, such as \['south west'\]"):
        import_set(write_folder(tmp_path / "empty", folders, (2, 2, 0, 2)), toy)


def test_slots_follow_the_numbers_in_file_names(toy: RealData, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", ("0", "1", "2", "3"), (12, 12, 12, 12))
    for path in list(root.glob("*/*")):
        path.rename(path.with_name(f"img_{int(path.stem[-3:])}.png"))  # img_10 sorts before img_2
    back = import_set(root, toy)
    for row, image in enumerate(back.images):
        path = root / str(back.labels[row].item()) / f"img_{back.slots[row].item()}.png"
        assert np.array_equal(np.array(Image.open(path)), image.permute(1, 2, 0).numpy())


def test_jpeg_files_of_a_known_quality_are_kept_and_others_stored_losslessly(toy: RealData, tmp_path: Path) -> None:
    folders = ("0", "1", "2", "3")
    kept = import_set(write_folder(tmp_path / "kept", folders, kind="jpg"), toy)
    assert kept.manifest.image_encoding == "jpeg75"
    assert kept.image_files[0] == (tmp_path / "kept" / "0" / "class000_id000.jpg").read_bytes()
    kept.save(tmp_path / "saved")
    assert torch.equal(load_distilled(tmp_path / "saved").images, kept.images)
    tags = Image.Exif()
    tags[0x013B] = "Ada of the clinic"
    for path in (tmp_path / "kept").glob("*/*.jpg"):
        with Image.open(path) as picture:
            picture.save(path, quality=75, exif=tags, comment="bed 7")
    told = import_set(tmp_path / "kept", toy)
    assert told.manifest.image_encoding == "jpeg75"
    told.save(tmp_path / "told")
    stored = b"".join(load_distilled(tmp_path / "told").image_files or ())
    assert stored.startswith(b"\xff\xd8")
    assert not any(secret in stored for secret in (b"Exif", b"Ada", b"bed 7"))
    assert torch.equal(told.images, load_distilled(tmp_path / "told").images)
    with Image.open(tmp_path / "kept" / "0" / "class000_id000.jpg") as picture:
        picture.save(tmp_path / "kept" / "0" / "class000_id000.jpg", quality=60)
    other = import_set(tmp_path / "kept", toy)
    assert other.manifest.image_encoding == "png"
    assert other.image_files is None


def write_header(path: Path, width: int, height: int) -> None:
    """A PNG that promises width x height pixels and holds none."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    data = b"IDAT" + zlib.compress(b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", len(data) - 4) + data + bytes(4))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / "notes.txt").write_text("hello"), "notes.txt cannot be read as an image"),
        (lambda folder: (folder / "deeper").mkdir(), "holds 'deeper', which is no image file"),
        (lambda folder: (folder / "a.png").symlink_to("/etc/passwd"), "a.png is a symbolic link"),
        (lambda folder: (folder.parent / "3x").symlink_to(folder), "3x is a symbolic link"),
        (lambda folder: write_header(folder / "bomb.png", 100_000, 100_000), "bomb.png .*exceeds|bomb.png has 100000"),
        (lambda folder: write_header(folder / "large.png", 8000, 8000), "large.png has 8000 x 8000 pixels, but 8 x 8"),
        (lambda folder: write_header(folder / "cut.png", 8, 8), "cut.png"),
    ],
)
def test_files_that_are_no_images_of_the_size_are_refused_undecoded(
    toy: RealData, tmp_path: Path, harm: Callable[[Path], Any], message: str
) -> None:
    root = write_folder(tmp_path / "set", ("0", "1", "2", "3"))
    harm(root / "1")
    with pytest.raises(StillroomError, match=message):
        import_set(root, toy)


def test_what_is_not_there_or_ours_already_is_said(plain: DistilledSet, toy: RealData, tmp_path: Path) -> None:
    with pytest.raises(StillroomError, match="does not exist"):
        import_set(tmp_path / "nothing", toy)
    (tmp_path / "empty").mkdir()
    with pytest.raises(StillroomError, match="no class folders and no parquet files"):
        import_set(tmp_path / "empty", toy)
    plain.save(tmp_path / "ours")
    with pytest.raises(StillroomError, match="is a distilled set of this artifact already"):
        import_set(tmp_path / "ours", toy)
    with pytest.raises(StillroomError, match=r"import\.layout is 'foldr'"):
        ImportConfig(layout="foldr")  # type: ignore[arg-type]


# -- soft labels -----------------------------------------------------------------------------------------------------


def test_soft_labels_of_a_torch_file_are_read_without_unpickling_code(toy: RealData, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", ("0", "1", "2", "3"))
    logits = torch.randn(8, 4)
    torch.save(logits, tmp_path / "labels.pt")
    back = import_set(root, toy, ImportConfig(soft_labels=str(tmp_path / "labels.pt")))
    assert torch.equal(back.soft_labels, logits.half())
    torch.save({"logits": logits, "run": Path("x")}, tmp_path / "labels.pt")
    with pytest.raises(StillroomError, match="cannot be read without running what it holds"):
        import_set(root, toy, ImportConfig(soft_labels=str(tmp_path / "labels.pt")))
    np.save(tmp_path / "labels.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(StillroomError, match="without pickle"):
        import_set(root, toy, ImportConfig(soft_labels=str(tmp_path / "labels.npy")))
    np.save(tmp_path / "labels.npy", logits[:7].numpy())
    with pytest.raises(StillroomError, match=r"float32 \[7, 4\]; needed are floats \[8, 4\]"):
        import_set(root, toy, ImportConfig(soft_labels=str(tmp_path / "labels.npy")))


def test_labels_of_augmented_batches_are_named_and_left_out(toy: RealData, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", ("0", "1", "2", "3"))
    (tmp_path / "fkd" / "epoch_0").mkdir(parents=True)
    batch = [torch.rand(8, 4), torch.zeros(8), torch.randperm(8), 0.7, [1, 2, 3, 4], torch.randn(8, 4).half()]
    torch.save(batch, tmp_path / "fkd" / "epoch_0" / "batch_0.tar")
    back = import_set(root, toy, ImportConfig(soft_labels=str(tmp_path / "fkd")))
    assert back.manifest.label_kind == "hard"
    assert "1 batches of logits [8, 4] of crops, flips and mixes in shuffled order" in notes_of(back)
    torch.save([torch.rand(8, 4), np.float64(0.7), torch.rand(8)], tmp_path / "fkd" / "epoch_0" / "batch_0.tar")
    with pytest.raises(StillroomError, match=r"without running what it holds|no batch of FKD"):
        import_set(root, toy, ImportConfig(soft_labels=str(tmp_path / "fkd")))


def write_hub(path: Path, labels: list[int], names: list[str] | None, soft: np.ndarray, column: str) -> Path:
    """A parquet file as `datasets` writes it."""
    generator = np.random.default_rng(1)
    files = []
    for label in labels:
        buffer = io.BytesIO()
        pixels = generator.integers(0, 256, (TOY_SIZE, TOY_SIZE, 3)).astype(np.uint8)
        pixels[0, 0, 0] = 10 * label
        Image.fromarray(pixels).save(buffer, "PNG")
        files.append({"bytes": buffer.getvalue(), "path": "../../up.png"})
    table = pa.table({"image": files, "label": labels, column: list(soft.astype(np.float32))})
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path)
    return path


def test_parquet_columns_are_read_in_the_order_of_their_own_classes(toy: RealData, tmp_path: Path) -> None:
    theirs, labels = ["süd/ost", "south west", "north east", "north west"], [0, 1, 2, 3, 0, 1, 2, 3]
    soft = np.full((8, 4), 0.1)
    soft[np.arange(8), labels] = 0.7
    path = write_hub(tmp_path / "hub" / "train-0.parquet", labels, theirs, soft, "soft_label")
    back = import_set(tmp_path / "hub", toy, ImportConfig(soft_label_kind="probabilities"))
    assert positions_of(back) == {3: 0, 2: 1, 1: 2, 0: 3}
    expected = np.full((8, 4), 0.1)
    expected[np.arange(8), back.labels.numpy()] = 0.7
    assert np.allclose(back.soft_labels.float().softmax(1).numpy(), expected, atol=1e-3)
    assert "for 100% of the images" in notes_of(back)
    with pytest.raises(StillroomError, match="sum to one; pass --soft-label-kind probabilities"):
        import_set(path, toy)
    write_hub(path, labels, theirs, soft * 3, "logits")
    assert import_set(path, toy).soft_labels.max() == pytest.approx(2.1, abs=0.01)
    with pytest.raises(StillroomError, match="do not sum to one; pass --soft-label-kind logits"):
        import_set(path, toy, ImportConfig(soft_label_kind="probabilities"))
    write_hub(path, labels, None, soft[:, :3] * 3, "logits")
    with pytest.raises(StillroomError, match=r"lists of \['3'\] values; every row needs 4"):
        import_set(path, toy)
    pq.write_table(pq.read_table(path).rename_columns(["image", "kind", "logits"]), path)
    with pytest.raises(
        StillroomError, match=r"import: .* has no column named label.*Name one with --label-column kind"
    ):
        import_set(path, toy)
    write_hub(path, [*labels[:-1], 4], None, soft * 3, "logits")
    with pytest.raises(StillroomError, match=r"the label 4, but 'toy' has labels 0 \.\.\. 3"):
        import_set(path, toy)


def test_parquet_whose_class_names_cannot_be_all_or_are_twice_the_same_is_refused(
    toy: RealData, tmp_path: Path
) -> None:
    soft, three = np.full((6, 3), 0.5), ["north east", "north west", "süd/ost"]
    path = write_hub(tmp_path / "hub" / "train-0.parquet", [0, 1, 2, 0, 1, 2], three, soft, "logits")
    with pytest.raises(StillroomError, match=r"no images of 1 of 4 classes, such as \['south west'\]"):
        import_set(path, toy)
    write_hub(path, [0, 1, 2, 0, 1, 2], ["north east", "süd/ost", "north east"], soft, "logits")
    with pytest.raises(StillroomError, match=r"class names \['north east'\] more than once"):
        import_set(path, toy)
    (tmp_path / "hub" / "b").mkdir()
    path.rename(tmp_path / "hub" / "b" / "train-0.parquet")
    write_hub(tmp_path / "hub" / "a" / "train-0.parquet", [0], three, soft[:1], "logits")
    with pytest.raises(StillroomError, match=r"holds several datasets; pass one of \['[^']*/a', '[^']*/b'\]\."):
        import_set(tmp_path / "hub", toy)


@pytest.mark.parametrize("source", ["owner/toy", "hf://owner/toy", "hf://datasets/owner/toy"])
def test_a_set_on_the_hub_is_fetched_by_its_id_and_read_as_parquet(
    toy: RealData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    labels = [0, 1, 2, 3, 0, 1, 2, 3]
    soft = np.full((8, 4), 0.1)
    soft[np.arange(8), labels] = 0.7
    snapshot = tmp_path / "snapshots" / "4f2c"
    snapshot.mkdir(parents=True)
    write_hub(snapshot / "data" / "train-0.parquet", labels, None, soft, "soft_label")
    asked = []

    def snapshot_download(repo: str, repo_type: str, allow_patterns: list[str]) -> str:
        asked.append((repo, repo_type, allow_patterns))
        return str(snapshot)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    back = import_set(source, toy, ImportConfig(soft_label_kind="probabilities"))
    assert asked == [("owner/toy", "dataset", ["*.parquet", "manifest.json"])]
    assert back.labels.tolist() == labels
    assert np.allclose(back.soft_labels.float().softmax(1).numpy(), soft, atol=1e-3)
    assert (back.manifest.extra["import"]["source"], back.manifest.extra["import"]["layout"]) == (source, "hub")
    assert "from the Hub, as it is at 4f2c" in notes_of(back)
    (snapshot / "manifest.json").write_text("{}")
    with pytest.raises(StillroomError, match="of this artifact already; load_distilled reads it, downloaded whole"):
        import_set(source, toy)
    (snapshot / "manifest.json").unlink()
    (snapshot / "data" / "train-0.parquet").unlink()
    with pytest.raises(StillroomError, match=f"{source} has no parquet files on the Hub; download it"):
        import_set(source, toy)
    asked.clear()
    with pytest.raises(StillroomError, match=r"--soft-labels x\.npy is for class folders, but .* is read as hub"):
        import_set(source, toy, ImportConfig(soft_labels="x.npy"))
    with pytest.raises(StillroomError, match=f"--layout infer reads what lies here; download {source}"):
        import_set(source, toy, ImportConfig(layout="infer"))
    assert not asked
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(StillroomError, match=rf"import: {source} is no existing path; .*install stillroom\[hub\]"):
        import_set(source, toy)


# -- arrays --------------------------------------------------------------------------------------------------------


def test_arrays_come_back_as_they_were_exported(
    plain: DistilledSet, toy: RealData, smooth: DistilledSet, large: RealData, tmp_path: Path
) -> None:
    export_set(plain, "npz", tmp_path / "plain.npz")
    back, order = import_set(tmp_path / "plain.npz", toy), plain.labels.argsort(stable=True)
    for name in ("images", "labels", "soft_labels"):
        assert torch.equal(getattr(back, name), getattr(plain, name)[order]), name
    assert back.slots.tolist() == [0, 1, 2] * 4
    assert (back.manifest.extra["import"]["layout"], back.manifest.label_kind) == ("npz", "static")
    assert "rounded" not in notes_of(back)
    export_set(back, "npz", tmp_path / "again.npz")
    with np.load(tmp_path / "plain.npz") as one, np.load(tmp_path / "again.npz") as two:
        assert all(np.array_equal(one[name], two[name]) for name in one.files)
    export_set(smooth, "npz", tmp_path / "views.npz")  # floats, whose compensators are no more
    views = import_set(tmp_path / "views.npz", large)
    assert (len(views.images), views.compensators, views.manifest.label_kind) == (60, None, "hard")
    exact = smooth.form_views(smooth.labels[smooth.view_table()[:, 0]].argsort(stable=True))
    assert (views.images / 255 - exact).abs().max() <= 0.5 / 255 + 1e-6
    assert "pixels of float32 rounded to 8 bits" in notes_of(views)


def test_views_that_a_set_does_not_cut_are_refused_with_the_ways_to_cut_them(
    smooth: DistilledSet, large: RealData, tmp_path: Path
) -> None:
    assert "leave" not in " ".join(export_set(smooth, "npz", tmp_path / "cut.npz"))
    views = replace(smooth.manifest.views, clip=False)
    uncut = replace(smooth, manifest=replace(smooth.manifest, views=views))
    assert "views leave [0, 1]" in export_set(uncut, "npz", tmp_path / "views.npz")[1]
    with pytest.raises(
        StillroomError, match=r"\(clip is false\) are cut by images\.clip\(0, 1\), or by an export --to f"
    ):
        import_set(tmp_path / "views.npz", large)
    with np.load(tmp_path / "views.npz") as arrays:
        cut = dict(arrays) | {"train_images": arrays["train_images"].clip(0, 1)}
    np.savez(tmp_path / "clipped.npz", **cut)
    export_set(uncut, "folder", tmp_path / "folder")
    by_array = import_set(tmp_path / "clipped.npz", large)
    by_folder = import_set(tmp_path / "folder", large, ImportConfig(layout="folder"))
    assert sorted(by_array.images.flatten(1).tolist()) == sorted(by_folder.images.flatten(1).tolist())


FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FEW
@given(
    kind=st.sampled_from([np.uint8, np.float16, np.float32, np.float64]),
    axes=st.sampled_from(["channels last", "channels first", "gray"]),
    theirs=st.one_of(st.none(), st.permutations(range(TOY_CLASSES))),
    soft=st.sampled_from(["none", "logits", "probabilities"]),
    counts=st.lists(st.integers(1, 3), min_size=TOY_CLASSES, max_size=TOY_CLASSES),
    seed=st.integers(0, 99),
)
def test_any_arrays_of_a_set_are_read_as_their_levels_classes_and_labels(
    toy: RealData,
    tmp_path: Path,
    kind: Any,
    axes: str,
    theirs: list[int] | None,
    soft: str,
    counts: list[int],
    seed: int,
) -> None:
    """`theirs`: our label of each of their classes, or no names at all, where labels are ours."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.arange(TOY_CLASSES).repeat(counts))
    levels = generator.integers(0, 256, (len(labels), TOY_SIZE, TOY_SIZE, 1 if axes == "gray" else 3))
    stored = levels.astype(np.uint8)
    if kind is not np.uint8:  # anywhere nearer to this level than to another
        stored = ((levels + generator.uniform(-0.4, 0.4, levels.shape)) / 255).clip(0, 1).astype(kind)
    stored = {"gray": stored[..., 0], "channels first": stored.transpose(0, 3, 1, 2)}.get(axes, stored)
    arrays = {"train_images": stored, "train_labels": labels.astype(np.int16)}
    ours = np.array(theirs or range(TOY_CLASSES))
    if theirs is not None:
        arrays["class_names"] = np.array(toy.class_names)[ours]
    logits = generator.normal(0, 3, (len(labels), TOY_CLASSES))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    if soft != "none":
        arrays["soft_labels"] = logits if soft == "logits" else probabilities
    np.savez(tmp_path / "set.npz", **arrays)
    config = ImportConfig(soft_label_kind="probabilities" if soft == "probabilities" else None)
    back = import_set(tmp_path / "set.npz", toy, config)
    assert torch.equal(back.images, torch.from_numpy(levels.transpose(0, 3, 1, 2).copy()).expand(-1, 3, -1, -1))
    assert back.labels.tolist() == ours[labels].tolist()
    for label in range(TOY_CLASSES):
        assert back.slots[back.labels == label].tolist() == list(range((ours[labels] == label).sum()))
    if soft == "none":
        assert back.soft_labels is None
    else:
        read = back.soft_labels.float().softmax(1).numpy()
        assert np.allclose(read[:, ours], probabilities, atol=2e-3)


def arrays(shapes: list[tuple[int, ...]], kinds: list[Any]) -> st.SearchStrategy[np.ndarray]:
    """Arrays of 0 ... 3, over and over; the first shape and kind are the likeliest."""
    kind, shape = st.sampled_from([*kinds[:1] * 4, *kinds]), st.sampled_from([*shapes[:1] * 4, *shapes])
    return st.builds(lambda k, s: (np.arange(math.prod(s)).reshape(s) % 4).astype(k), kind, shape)


@settings(FEW, max_examples=100)
@given(
    st.fixed_dictionaries(
        {
            "train_images": arrays(
                [(8, 8, 8, 3), (8, 3, 8, 8), (8, 9, 9, 3), (0, 8, 8, 3), (8,)], [np.uint8, "f4", "O"]
            ),
            "train_labels": arrays([(8,), (8, 1), (7,), (8, 4)], [np.int64, np.uint64, "f8", bool, "U3"]),
        },
        optional={
            "class_names": arrays([(4,), (3,), (4, 1)], ["U3", "S3", np.int64]),
            "soft_labels": arrays([(8, 4), (8, 3), (32,)], ["f4", "f2", np.int64, "U3", "O"]),
        },
    )
)
def test_any_npz_is_a_set_or_is_refused(toy: RealData, tmp_path: Path, content: dict[str, np.ndarray]) -> None:
    np.savez(tmp_path / "set.npz", **content)
    try:
        back = import_set(tmp_path / "set.npz", toy)
    except StillroomError:
        return
    assert back.images.shape == (8, 3, TOY_SIZE, TOY_SIZE)
    assert (back.soft_labels is None) == ("soft_labels" not in content)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": None}, r"no array 'train_images', only .*; needed are train_images and train_labels\."),
        (
            {"train_images": np.full((8, 8, 8, 3), 1.1)},
            r"floats from 1\.1 to 1\.1, but .* in \[0, 1\]\. Undo .*by 255 if",
        ),
        ({"train_images": np.full((8, 8, 8, 3), np.nan)}, "floats from nan to nan"),
        ({"train_images": np.full((8, 8, 8, 3), 1e300)}, r"floats from 1e\+300"),
        (
            {"train_images": np.zeros((8, 8, 8, 3), np.int32)},
            r"is int32, but images must be uint8, .* or floats in \[0",
        ),
        ({"train_images": np.zeros((8, 9, 9, 3), np.uint8)}, r"9 x 9 pixels, but 8 x 8 are those of the real data"),
        ({"train_labels": np.array([0, 1, 2, 3, 0, 1, 2, 4])}, r"the label 4, but 'toy' has labels 0 \.\.\. 3"),
        (
            {"train_labels": np.arange(8) % 4, "class_names": np.array(["north west", "north east"])},
            r"the label 2, but its class names have labels 0 \.\.\. 1",
        ),
        ({"train_labels": np.arange(8) % 3}, r"no images of 1 of 4 classes, such as \['süd/ost'\]"),
        ({"class_names": np.array(["a", "b", "c", "d"])}, "are no classes of 'toy'.*--class-order FILE"),
        ({"soft_labels": np.zeros((8, 3))}, r"'soft_labels' of .* is float64 \[8, 3\]; needed are floats \[8, 4\]"),
        ({"soft_labels": np.zeros((8, 4), np.int64)}, "is int64"),
        ({"soft_labels": np.full((8, 4), np.inf)}, "are not all finite"),
        ({"soft_labels": np.full((8, 4), 0.25)}, "sum to one; pass --soft-label-kind probabilities"),
    ],
)
def test_arrays_that_are_no_set_are_refused_by_name(
    toy: RealData, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    arrays = {"train_images": np.zeros((8, 8, 8, 3), np.uint8), "train_labels": np.arange(8) % 4} | changes
    np.savez(tmp_path / "set.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(StillroomError, match=f"import: .*{message}"):
        import_set(tmp_path / "set.npz", toy)


def test_a_file_or_a_setting_of_another_layout_is_refused(toy: RealData, tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", train_images=np.zeros((8, 8, 8, 3), np.uint8), train_labels=np.arange(8) % 4)
    (tmp_path / "set.zip").write_bytes(b"x")
    with pytest.raises(StillroomError, match=r"set\.zip is neither \.npz nor \.parquet, nor a folder; unpack it"):
        import_set(tmp_path / "set.zip", toy)
    with pytest.raises(StillroomError, match="is a folder; --layout npz reads a file"):
        import_set(tmp_path, toy, ImportConfig(layout="npz"))
    with pytest.raises(StillroomError, match=r"no class folders and no parquet files; give .*set\.npz"):
        import_set(tmp_path, toy)
    with pytest.raises(StillroomError, match=r"set\.npz is a file; --layout infer reads a folder"):
        import_set(tmp_path / "set.npz", toy, ImportConfig(layout="infer"))
    with pytest.raises(
        StillroomError, match=r"--label-column kind is for parquet, but .*set\.npz is read as npz; leave"
    ):
        import_set(tmp_path / "set.npz", toy, ImportConfig(label_column="kind"))
    root = write_folder(tmp_path / "set", ("0", "1", "2", "3"))
    with pytest.raises(StillroomError, match=r"--soft-label-column x is for parquet, but .* is read as folder; leave"):
        import_set(root, toy, ImportConfig(soft_label_column="x"))
    with pytest.raises(StillroomError, match=r"--teachers a b is for INFER's files, but .* is read as npz; leave"):
        import_set(tmp_path / "set.npz", toy, ImportConfig(teachers=("a", "b")))
    with pytest.raises(StillroomError, match=r"--soft-label-kind probabilities is given, but .* has no soft labels"):
        import_set(tmp_path / "set.npz", toy, ImportConfig(soft_label_kind="probabilities"))


# -- the size of the set ---------------------------------------------------------------------------------------------


def write_real_folder(root: Path, sizes: list[tuple[int, int]]) -> Path:
    """Real images in class folders, one of each size (width, height) for either split of each class."""
    for split in ("train", "test"):
        for position, name in enumerate(("red", "green", "blue", "white")):
            (root / split / name).mkdir(parents=True)
            for number, size in enumerate(sizes):
                Image.new("RGB", size, (50 * position, 9, 9)).save(root / split / name / f"{number}.png")
    return root


def test_real_data_are_read_at_the_size_of_the_set_unasked(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", ("red", "green", "blue", "white"))
    source = str(write_real_folder(tmp_path / "squares", [(16, 16), (16, 16)]))
    back = import_set(root, DataConfig(source))
    assert (back.manifest.image_size, back.manifest.dataset.resize) == ((8, 8), "crop")
    assert "real images are squares of another size, and are resized to the set's 8 x 8" in notes_of(back)
    check_matches(back, load_real(DataConfig(source, image_size=8, resize="crop")))  # as evaluate reads them then
    same = import_set(root, DataConfig(str(write_real_folder(tmp_path / "same", [(8, 8)]))))
    assert (same.manifest.image_size, same.manifest.dataset.resize) == ((8, 8), "refuse")
    assert "resized" not in notes_of(same)
    squashed = import_set(root, DataConfig(source, image_size=8, resize="squash"))
    assert squashed.manifest.dataset.resize == "squash"


def test_real_images_that_are_no_squares_need_only_be_told_how_they_become_some(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", ("red", "green", "blue", "white"))
    for name, sizes in (("wide", [(16, 12)]), ("mixed", [(16, 16), (16, 12)])):
        source = str(write_real_folder(tmp_path / name, sizes))
        with pytest.raises(StillroomError, match=r"not 8x8\. Pass --data\.resize crop or --data\.resize squash\.$"):
            import_set(root, DataConfig(source))
        assert import_set(root, DataConfig(source, resize="crop")).manifest.image_size == (8, 8)


def test_a_size_that_cannot_be_is_refused_before_real_data_are_read(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", ("red", "green", "blue", "white"))
    with pytest.raises(StillroomError, match=r"images of 8 x 8 pixels, but --data\.image-size is 16; leave it out"):
        import_set(root, DataConfig("nowhere", image_size=16))
    arrays = {"train_images": np.zeros((8, 8, 12, 3), np.uint8), "train_labels": np.arange(8) % 4}
    np.savez(tmp_path / "wide.npz", **arrays)
    with pytest.raises(StillroomError, match=r"wide\.npz has images of 12 x 8 pixels, but sets hold squares; cut or"):
        import_set(tmp_path / "wide.npz", DataConfig("nowhere"))
    for folder in root.iterdir():
        for path in folder.iterdir():
            path.unlink()
    with pytest.raises(StillroomError, match="set holds no images; fetch the set again"):
        import_set(root, DataConfig("nowhere"))


# -- the other layouts -----------------------------------------------------------------------------------------------


def test_arrays_hold_every_view_class_by_class(smooth: DistilledSet, plain: DistilledSet, tmp_path: Path) -> None:
    export_set(smooth, "npz", tmp_path / "smooth.npz")
    with np.load(tmp_path / "smooth.npz") as arrays:
        views, labels = arrays["train_images"], arrays["train_labels"]
        assert (views.dtype, views.shape) == (np.float32, (60, 3, SIDE, SIDE))
        assert labels.tolist() == [label for label in range(4) for _ in range(15)]
        own = smooth.labels[smooth.view_table()[:, 0]] == 2
        assert np.array_equal(views[labels == 2], smooth.form_views(own.nonzero().flatten()).numpy())
    notes = export_set(plain, "npz", tmp_path / "deep" / "plain.npz")
    assert "train_images uint8 [12, 3, 8, 8], train_labels int64 [12], class_names" in notes[0]
    assert os.listdir(tmp_path / "deep") == ["plain.npz"]
    with np.load(tmp_path / "deep" / "plain.npz") as arrays:
        order = plain.labels.argsort(stable=True)
        assert np.array_equal(arrays["train_images"], plain.images[order].numpy())
        assert np.array_equal(arrays["soft_labels"], plain.soft_labels[order].numpy())
        assert arrays["class_names"].tolist() == list(plain.manifest.class_names)


def test_arrays_are_one_new_file_whose_name_says_what_it_is(
    plain: DistilledSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "mine.npz").write_bytes(b"x")
    for name, message in (
        ("folder.npz", r"is a folder, but --to npz writes a file; give .*folder\.npz/views\.npz"),
        ("mine.npz", "is there already; give a new file"),
        ("mine", r"does not end in \.npz, .*; give .*/mine\.npz"),
    ):
        with pytest.raises(StillroomError, match=message):
            export_set(plain, "npz", tmp_path / name)
    assert (tmp_path / "mine.npz").read_bytes() == b"x"
    monkeypatch.setattr(np, "savez", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StillroomError, match="cannot be written: No space left"):
        export_set(plain, "npz", tmp_path / "full.npz")
    assert sorted(os.listdir(tmp_path)) == ["folder.npz", "mine.npz"]


def test_ranking_tensors_are_normalised_as_the_evaluator_normalises_and_stand_class_by_class(
    plain: DistilledSet, tmp_path: Path
) -> None:
    notes = export_set(plain, "ddranking", tmp_path / "out")
    assert "ipc=3" in notes[0]
    assert "what the evaluator has for 'toy' is not known here" in notes[1]
    images = torch.load(tmp_path / "out" / "images.pt", weights_only=True)
    order, constants = plain.labels.argsort(stable=True), plain.manifest.normalization
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (constants.mean, constants.std))
    assert torch.allclose(images * std + mean, plain.images[order] / 255, atol=1e-6)
    labels = torch.load(tmp_path / "out" / "hard_labels.pt", weights_only=True)
    assert labels.tolist() == [label for label in range(4) for _ in range(3)]
    assert torch.equal(torch.load(tmp_path / "out" / "labels.pt", weights_only=True), plain.soft_labels[order].float())
    folder = torchvision.datasets.ImageFolder(tmp_path / "out" / "images")  # as its evaluators read a folder
    assert [label for _, label in folder] == labels.tolist()
    pixels = np.stack([np.asarray(picture) for picture, _ in folder])
    assert np.array_equal(pixels, plain.images[order].permute(0, 2, 3, 1).numpy())
    uneven = plain.with_labels(None)
    uneven = replace(uneven, images=plain.images[1:], labels=plain.labels[1:], slots=plain.slots[1:])
    for layout, message in (("ddranking", "classes have 2 to 3 views"), ("infer", "not every class has one image in")):
        with pytest.raises(StillroomError, match=message):
            export_set(uneven, layout, tmp_path / "uneven")


def write_real(path: Path, classes: int, side: int, names: tuple[str, ...] | None = None) -> None:
    """Real data of one image per class and split, in a folder, an npz file or parquet files, as `path` ends."""
    pixels = np.random.default_rng(0).integers(0, 256, (classes, side, side, 3)).astype(np.uint8)
    labels = np.arange(classes)
    if path.suffix == ".npz":
        named = {} if names is None else {"class_names": np.array(names)}
        np.savez(path, train_images=pixels, train_labels=labels, test_images=pixels, test_labels=labels, **named)
        return
    for split in ("train", "test"):
        files = []
        for label, image in enumerate(pixels):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            files.append({"bytes": buffer.getvalue(), "path": None})
            if path.suffix != ".hub":
                (path / split / f"n{label:08d}").mkdir(parents=True)
                (path / split / f"n{label:08d}" / "0.png").write_bytes(buffer.getvalue())
        if path.suffix == ".hub":
            path.mkdir(exist_ok=True)
            pq.write_table(pa.table({"img": files, "fine_label": labels}), path / f"{split}-0.parquet")


@pytest.mark.parametrize(
    ("file", "source", "classes", "side", "names", "known"),
    [
        ("cifar100.npz", "cifar100", 100, 32, None, "cifar100"),
        ("train.npz", "train.npz", 100, 32, CIFAR100, "cifar100"),
        ("train.npz", "train.npz", 10, 32, CIFAR10, "cifar10"),
        ("CIFAR-10_whole.npz", "CIFAR-10_whole.npz", 10, 32, None, "cifar10"),
        ("cifar-100-python", "./cifar-100-python", 100, 32, None, "cifar100"),
        ("x.hub", "uoft-cs/cifar100", 100, 32, None, "cifar100"),
        ("tiny-imagenet-200", "./tiny-imagenet-200", 200, 64, None, "tiny-imagenet"),
        ("x.hub", "zh-plus/tiny-imagenet", 200, 64, None, "tiny-imagenet"),
        ("train.npz", "train.npz", 10, 16, CIFAR10, None),  # other images of classes of the same names
        ("train.npz", "train.npz", 100, 32, None, None),
        ("cifar100.npz", "./cifar100.npz", 20, 32, None, None),  # its coarse labels
    ],
)
def test_ranking_tensors_have_the_evaluators_constants_whatever_the_dataset_is_called(
    plan: Plan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    source: str,
    classes: int,
    side: int,
    names: tuple[str, ...] | None,
    known: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_real(tmp_path / file, classes, side, names)
    hub = SimpleNamespace(snapshot_download=lambda *_, **__: str(tmp_path / file))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    column = "fine_label" if file == "x.hub" else None
    real = load_real(DataConfig(source, root=".", label_column=column))
    chosen = distill_random(real, [], 1, RandomConfig(), 0, plan, Run(None))
    notes = export_set(chosen, "ddranking", tmp_path / "out")
    own = (chosen.manifest.normalization.mean, chosen.manifest.normalization.std)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in DDRANKING_CONSTANTS.get(known, own))
    images = torch.load(tmp_path / "out" / "images.pt", weights_only=True)
    assert torch.allclose(images * std + mean, chosen.images[chosen.labels.argsort()] / 255, atol=1e-5)
    assert (f"which its evaluator has for {known}" if known else f"for {real.name!r} is not known here") in notes[1]
    assert any("sorted WordNet ids" in note for note in notes) == (known == "tiny-imagenet")


def test_a_folder_that_holds_something_is_left_alone_and_a_failed_export_leaves_nothing(
    plain: DistilledSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(StillroomError, match="holds something already; give a new or empty folder"):
        export_set(plain, "folder", tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    export_set(plain, "folder", tmp_path / "empty")
    monkeypatch.setattr(np, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StillroomError, match="cannot be written: No space left"):
        export_set(plain, "folder", tmp_path / "full")
    assert sorted(os.listdir(tmp_path)) == ["empty", "mine"]
    with pytest.raises(StillroomError, match="--to 'zip' is no layout"):
        export_set(plain, "zip", tmp_path / "zip")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("../../etc", "a/b", "c.d", "ok"), ["etc", "a_b", "c_d", "ok"]),
        (("a b", "a/b", "c", "d"), ["new000", "new001", "new002", "new003"]),
        (("CON", "b", "c", "d"), ["new000", "new001", "new002", "new003"]),
        (("..", "b", "c", "d"), ["new000", "new001", "new002", "new003"]),
        (("A", "a", "c", "d" * 300), ["new000", "new001", "new002", "new003"]),
    ],
)
def test_class_names_never_lead_out_of_the_folder(
    plain: DistilledSet, toy: RealData, tmp_path: Path, names: tuple[str, ...], expected: list[str]
) -> None:
    named = replace(plain, manifest=replace(plain.manifest, class_names=names))
    export_set(named, "folder", tmp_path / "deep" / "out")
    assert sorted(p.name for p in (tmp_path / "deep" / "out").iterdir() if p.is_dir()) == sorted(expected)
    assert os.listdir(tmp_path) == ["deep"]
    if names[0] != "../../etc":  # whose folder has lost its dots, and so its name
        back = import_set(tmp_path / "deep" / "out", replace(toy, class_names=names))
        ours, theirs = plain.labels.argsort(stable=True), back.labels.argsort(stable=True)
        assert torch.equal(back.images[theirs], plain.images[ours])


# -- prepared naturals -----------------------------------------------------------------------------------------------


def write_naturals(folder: Path, real: RealData, slots: int) -> torch.Tensor:
    """Slots of real images as the published scripts prepare them; returns uint8 [slots, classes, 3, size, size]."""
    folder.mkdir(exist_ok=True)
    rows = torch.stack([(real.train.labels == label).nonzero().flatten()[:slots] for label in range(real.classes)], 1)
    images = real.train.batch(rows.flatten()).unflatten(0, rows.shape)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (real.mean, real.std))
    for slot in range(slots):
        torch.save((images[slot] / 255 - mean) / std, folder / f"tensor_{slot}.pt")
    return images


def test_infer_takes_prepared_naturals_for_its_slots(toy: RealData, plan: Plan, tmp_path: Path) -> None:
    expected = write_naturals(tmp_path / "init", toy, 3)
    config = InferConfig(steps=1, naturals=str(tmp_path / "init"))
    made = infer.distill(toy, [build_toy_teacher(0)], 4, config, 0, plan, Run(None))
    assert torch.equal(made.images, expected.flatten(0, 1))
    assert made.labels.tolist() == [0, 1, 2, 3] * 3
    assert made.manifest.recipe["infer"]["naturals"] == str(tmp_path / "init")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:3], r"holds torch.float32 \[3, 3, 8, 8\]; needed are floats \[4, 3, 8, 8\]"),
        (lambda x: x.long(), "holds torch.int64"),
        (lambda x: x * float("nan"), "not finite"),
        (lambda x: x * 0.9, "normalised by other constants"),
        (lambda x: x + 5, "normalised by other constants"),
        (lambda x: {"images": x}, "holds dict"),
        (lambda x: {"images": Path("x")}, "no torch file of a tensor alone"),
        (lambda x: torch.zeros(400_000), "too many for a tensor"),
    ],
)
def test_prepared_naturals_are_checked(
    toy: RealData, tmp_path: Path, change: Callable[[torch.Tensor], Any], message: str
) -> None:
    write_naturals(tmp_path, toy, 2)
    path = tmp_path / "tensor_1.pt"
    torch.save(change(torch.load(path, weights_only=True)), path)
    with pytest.raises(StillroomError, match=message):
        load_naturals(tmp_path, toy, 2)
    path.unlink()
    with pytest.raises(StillroomError, match=r"tensor_1.pt is not there; 2 slots need tensor_0.pt ... tensor_1.pt"):
        load_naturals(tmp_path, toy, 2)


# -- used --------------------------------------------------------------------------------------------------------------


def test_an_imported_set_trains_a_student(
    plain: DistilledSet, toy: RealData, toynet: str, plan: Plan, tmp_path: Path
) -> None:
    export_set(plain, "folder", tmp_path / "out")
    back = import_set(tmp_path / "out", toy)
    train = TrainConfig(epochs=1, batch_size=4, optimizer="adamw", learning_rate=0.01, crop_padding=1)
    result = evaluate(back, toy, StudentConfig(toynet, train), (0,), plan, Run(None))
    assert result.labels == "static"
    assert 0 <= result.mean <= 1


def test_the_command_line_imports_and_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_toy_npz(tmp_path / "toy.npz")
    root = write_folder(tmp_path / "set", tuple(name.replace("/", "-") for name in TOY_COLOURS))
    assert cli.main(["import", str(root), "--data.source", str(source), "--out", str(tmp_path / "ours")]) == 0
    out = capsys.readouterr().out
    assert "read as folder" in out
    assert "classes matched by name" in out
    assert cli.main(["verify", str(tmp_path / "ours")]) == 0
    assert cli.main(["export", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "infer"]) == 0
    assert len(list((tmp_path / "theirs").glob("new00?/class00?_id00?.jpg"))) == 8
    again = str(tmp_path / "theirs.npz")
    assert cli.main(["export", str(tmp_path / "ours"), again, "--to", "npz"]) == 0
    assert cli.main(["import", again, "--data.source", str(source), "--out", str(tmp_path / "back")]) == 0
    assert "read as npz" in capsys.readouterr().out
    assert sorted(positions_of(load_distilled(tmp_path / "back"))) == [0, 1, 2, 3]
    assert cli.main(["export", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "folder"]) == 1
    assert "holds something already" in capsys.readouterr().err


def test_an_import_leaves_a_folder_that_holds_something_alone_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_toy_npz(tmp_path / "toy.npz")
    root = write_folder(tmp_path / "set", tuple(name.replace("/", "-") for name in TOY_COLOURS))
    words = ["import", str(root), "--data.source", str(source)]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imported").mkdir()
    assert cli.main(words) == 0  # an empty folder is as good as none
    first = (tmp_path / "imported" / "manifest.json").read_bytes()
    monkeypatch.setattr(cli, "import_set", lambda *_: pytest.fail("worked before it looked"))
    capsys.readouterr()
    assert cli.main([*words, "--method", "other"]) == 1
    assert "import: --out imported holds something already; give a new or empty folder" in capsys.readouterr().err
    assert (tmp_path / "imported" / "manifest.json").read_bytes() == first


def test_a_set_without_compensators_has_no_blocks_of_teachers_in_infers_layout(
    toy: RealData, toy_teachers: list[Any], plan: Plan, tmp_path: Path
) -> None:
    random = distill_random(toy, toy_teachers, 2, RandomConfig(), 0, plan, Run())
    (note,) = export_set(random, "infer", tmp_path / "out")
    assert note.endswith("blocks: naturals")
    assert "--teachers" not in note


def test_a_set_of_other_teachers_in_infers_layout_says_that_its_compensators_were_not_read(
    toy: RealData, tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    for label in range(toy.classes):
        folder = tmp_path / "new" / f"new{label:03d}"
        folder.mkdir(parents=True)
        for number in range(4):  # no five equal blocks
            pixels = generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label:03d}_id{number:03d}.jpg")
    imported = import_set(tmp_path / "new", toy)
    (note,) = [n for n in imported.manifest.extra["import"]["notes"] if "named as INFER's files are" in n]
    assert "name the set's own teachers with --teachers" in note
