"""ImageNet as it is published: labels are those of its annotations, and every flaw of these gives one clear error."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from stillroom.data import FACTS, DataConfig, RealData, load_real
from stillroom.errors import StillroomError
from stillroom.readers import find_layout

TENCH, CRANE, MACHINE = WNIDS = ("n01440764", "n02012849", "n03126707")
NUMBERED = (MACHINE, TENCH, CRANE)  # classes 1, 2, 3 of the ground truth: not in the order of their ids
SHOWN = (CRANE, TENCH, TENCH, MACHINE)  # by validation images 1 ... 4
NAMES = ("tench", "crane (n02012849)", "crane (n03126707)")
MAPPING = "n01440764 tench, Tinca tinca\nn02012849 crane\nn03126707 crane, derrick\nn09999999 nothing of ours\n"


def val_image(number: int) -> str:
    return f"ILSVRC2012_val_{number:08}"


def write_images(images: Path, content: bytes | None = None) -> Path:
    """`train/<wnid>/` with two images each and a flat `val/`, all of them one colour per class, or of `content`."""

    def write(path: Path, wnid: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Image.new("RGB", (8, 8), (80 * WNIDS.index(wnid), 0, 0)).save(path, "JPEG")
        else:
            path.write_bytes(content)

    for wnid in WNIDS:
        for number in (7, 12):
            write(images / "train" / wnid / f"{wnid}_{number}.JPEG", wnid)
    for number, wnid in enumerate(SHOWN, start=1):
        write(images / "val" / f"{val_image(number)}.JPEG", wnid)
    (images / "test").mkdir()
    (images / "test" / "ILSVRC2012_test_00000001.JPEG").write_bytes(b"without a label")
    return images


def write_solution(root: Path, rows: list[str] | None = None) -> None:
    boxes = [f"{val_image(n)},{wnid} 85 1 499 272 {wnid} 3 4 5 6 " for n, wnid in enumerate(SHOWN, start=1)]
    lines = ["ImageId,PredictionString", *(boxes[::-1] if rows is None else rows)]  # Kaggle's are in no order
    (root / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")


def write_truth(folder: Path, numbers: str = "3\n2\n2\n1\n") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text(numbers)


def write_meta(folder: Path) -> None:
    """The devkit's table: classes by number, and the synsets above them, which have numbers beyond."""
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(n, wnid, "words", 0) for n, wnid in enumerate(NUMBERED, start=1)]
    savemat(folder / "meta.mat", {"synsets": np.array([*rows, (4, "n00001740", "entity", 3)], fields)})


def write_map(folder: Path) -> None:
    lines = [f"{wnid} {n} some_name" for n, wnid in enumerate(NUMBERED, start=1)]
    (folder / "map_clsloc.txt").write_text("\n".join(reversed(lines)) + "\n")


def kaggle(root: Path) -> None:
    write_images(root / "ILSVRC" / "Data" / "CLS-LOC")
    write_solution(root)


def devkit(root: Path) -> None:
    write_images(root)
    write_truth(root / "ILSVRC2012_devkit_t12" / "data")
    write_meta(root / "ILSVRC2012_devkit_t12" / "data")


def plain_map(root: Path) -> None:
    write_truth(write_images(root))
    write_map(root)


def class_folders(root: Path) -> None:
    write_images(root)
    for number, wnid in enumerate(SHOWN, start=1):
        (root / "val" / wnid).mkdir(exist_ok=True)
        (root / "val" / f"{val_image(number)}.JPEG").rename(root / "val" / wnid / f"{val_image(number)}.JPEG")
    (root / "LOC_synset_mapping.txt").write_text(MAPPING)


def load(source: Path | str, **settings: object) -> RealData:
    return load_real(DataConfig(source=str(source), **settings))


@pytest.mark.parametrize("write", [kaggle, devkit, plain_map, class_folders])
def test_every_published_form_gives_the_labels_of_its_annotations_and_the_first_name_of_each_class(tmp_path, write):
    write(tmp_path)
    (tmp_path / ("synset_words.txt" if write is devkit else "LOC_synset_mapping.txt")).write_text(MAPPING)
    assert find_layout(tmp_path) == "ilsvrc"
    real = load(tmp_path)
    assert real.class_names == ("tench", "crane (n02012849)", "crane (n03126707)")
    assert real.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert sorted(real.test.labels.tolist()) == [0, 0, 1, 2]
    for images in (real.train, real.test):
        reds = images.batch(torch.arange(len(images)))[:, 0].float().mean((1, 2))
        assert torch.allclose(reds, 80.0 * images.labels, atol=3)


def test_classes_keep_their_ids_where_nothing_names_them(tmp_path):
    plain_map(tmp_path)
    assert load(tmp_path).class_names == WNIDS


def test_the_named_dataset_is_found_as_kaggle_unpacks_it_and_nothing_is_decoded_before_it_is_asked_for(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(FACTS, "imagenet", replace(FACTS["imagenet"], classes=3, image_size=8))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    noise.save(tmp_path / "noise", "JPEG", quality=100)
    cut = (tmp_path / "noise").read_bytes()[:-60]  # whose header is whole
    write_images(tmp_path / "imagenet" / "ILSVRC" / "Data" / "CLS-LOC", cut)
    write_solution(tmp_path / "imagenet")
    real = load("imagenet", root=str(tmp_path), memory_limit_gib=0.0)
    assert real.test.labels.tolist() == [1, 0, 0, 2]
    with pytest.raises(StillroomError, match=r"1 image cannot be read: .*n01440764_12\.JPEG"):
        real.train.batch(torch.tensor([0]))


def test_validation_images_are_left_unread_where_training_images_are_held_out(tmp_path):
    write_images(tmp_path)
    assert load(tmp_path, holdout_per_class=1).test.labels.tolist() == [0, 1, 2]


def broken(flaw: str, root: Path) -> None:
    plain_map(root)
    match flaw:
        case "no annotations":
            (root / "ILSVRC2012_validation_ground_truth.txt").unlink()
        case "no numbers":
            (root / "map_clsloc.txt").unlink()
            (root / "synset_words.txt").write_text(MAPPING)
        case "number without a class":
            write_truth(root, "3\n2\n2\n0\n")
        case "no number":
            write_truth(root, "3\n2\ntwo\n1\n")
        case "image without a line":
            write_truth(root, "3\n2\n2\n")
        case "line without an image":
            write_truth(root, "3\n2\n2\n1\n1\n")
        case "other image":
            (root / "val" / "mine.png").write_bytes(b"")
        case "number twice":
            (root / "map_clsloc.txt").write_text(f"{TENCH} 1 tench\n{CRANE} 1 crane\n")
        case "no map":
            (root / "map_clsloc.txt").write_text("tench\n")
        case "no table":
            (root / "meta.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(300))
        case "large table":
            (root / "meta.mat").write_bytes(bytes(2**20 + 1))
        case "class without images":
            shutil.rmtree(root / "train" / MACHINE)
        case "image twice":
            write_solution(root, [f"{val_image(1)},{TENCH} 1 2 3 4", f"{val_image(1)},{CRANE} 1 2 3 4"])
        case "no class":
            write_solution(root, [f"{val_image(1)},"])
        case "no commas":
            write_solution(root, [f"{val_image(1)};{TENCH}"])
        case "endless field":
            write_solution(root, ['"' + "x" * 200_000])
        case "no text":
            (root / "LOC_val_solution.csv").write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize(("flaw", "message"), [
    ("no annotations", r"val holds images .* nothing says their classes: put Kaggle's LOC_val_solution\.csv, or .*"
     r"ILSVRC2012_validation_ground_truth\.txt and meta\.mat, into .*--data\.holdout-per-class N"),
    ("no numbers", r"says classes by number, .*put the devkit's meta\.mat or map_clsloc\.txt beside it.*"
     r"synset_words\.txt will not do: its lines are in another order"),
    ("number without a class", r"ground_truth\.txt line 4 is '0', which is no number of a class in .*map_clsloc\.txt"),
    ("no number", r"ground_truth\.txt line 3 is 'two', which is no number"),
    ("image without a line", r"says no class for some images in .*val; add .*: 'ILSVRC2012_val_00000004\.JPEG'\."),
    ("line without an image", r"lists images that are not in .*val; unpack .*: 'ILSVRC2012_val_00000005'\."),
    ("other image", r"says no class for some images in .*val; .*: 'mine\.png'\."),
    ("number twice", r"map_clsloc\.txt line 2 is 'n02012849 1 crane'; expected a wnid, a number of its own"),
    ("no map", r"map_clsloc\.txt line 1 is 'tench'; expected"),
    ("no table", r"meta\.mat is no meta\.mat of ILSVRC 2012: .*Unpack the devkit again"),
    ("large table", r"meta\.mat is no meta\.mat of ILSVRC 2012: .*it has 1048577 bytes"),
    ("class without images", r"names classes that have no folder in .*train; add these, or remove .*: 'n03126707'\."),
    ("image twice", r"LOC_val_solution\.csv line 3 is .*expected the name of an image that no line before it has"),
    ("no class", r"LOC_val_solution\.csv line 2 is 'ILSVRC2012_val_00000001,'; expected"),
    ("no commas", r"LOC_val_solution\.csv line 2 is 'ILSVRC2012_val_00000001;n01440764'; expected"),
    ("endless field", r"LOC_val_solution\.csv cannot be read as csv: field larger"),
    ("no text", r"LOC_val_solution\.csv cannot be read: .*utf-8"),
])  # fmt: skip
def test_flawed_annotations_give_one_error_that_names_the_flaw_and_the_fix(tmp_path, flaw, message):
    broken(flaw, tmp_path)
    with pytest.raises(StillroomError, match=message):
        load(tmp_path)
