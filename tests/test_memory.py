"""What is too large to hold is read where it lies, in bounded memory, and gives the same sets, labels and views."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import stopping_again_and_again
from torch.utils.data import DataLoader

from stillroom import artifact, files, labels, students
from stillroom.compute import Plan
from stillroom.data import RealData
from stillroom.distilled import DistilledSet, load_distilled
from stillroom.errors import StillroomError
from stillroom.labels import attach_labels, compute_static_labels
from stillroom.manifest import ImageEncodingChoice, ViewSettings
from stillroom.methods import infer
from stillroom.methods.infer import InferConfig
from stillroom.methods.select import RandomConfig, distill_random
from stillroom.run import Run
from stillroom.students import StudentConfig
from stillroom.teachers import Teacher
from stillroom.train import TrainConfig, fit, fit_batch

SETTINGS = InferConfig(steps=3, shift_limit=1)


@pytest.fixture
def nothing_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every set is too large to be held decoded, every file of tensors to be read at once."""
    monkeypatch.setattr(artifact, "HELD_BYTES", 0)
    monkeypatch.setattr(artifact, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(files, "MAPPED_FROM", 0)


def make_set(toy: RealData, teachers: list[Teacher], plan: Plan, encoding: ImageEncodingChoice = "png") -> DistilledSet:
    """INFER's set of two slots with static labels."""
    made = infer.distill(toy, teachers, 3, SETTINGS, 0, plan, Run()).with_image_encoding(encoding)
    return attach_labels(made, "static", teachers, plan, Run())


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def form_all(distilled: DistilledSet) -> torch.Tensor:
    return distilled.form_views(torch.arange(distilled.view_count))


# ---- tensors that stay in their file


def test_tensors_of_a_large_file_are_mapped_and_are_what_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"x": torch.arange(40.0).view(5, 8), "y": torch.arange(3, dtype=torch.int8)}
    files.save_tensors(tmp_path / "a", tensors, {"step": 3})
    held = files.load_tensors(tmp_path / "a")
    monkeypatch.setattr(files, "MAPPED_FROM", 0)
    monkeypatch.setattr(files, "parse_tensors", lambda *_: pytest.fail("read at once"))
    mapped, meta = files.load_tensors(tmp_path / "a")
    assert meta == held[1] == {"step": 3}
    assert all(torch.equal(mapped[name], held[0][name]) for name in tensors)
    mapped["x"] += 1
    assert torch.equal(mapped["x"], tensors["x"] + 1)
    assert torch.equal(files.load_tensors(tmp_path / "a")[0]["x"], tensors["x"])  # the file is as it was


@pytest.mark.parametrize("content", [b"", b"{", b"\xff" * 100, None])
def test_a_large_file_of_tensors_that_is_not_whole_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    files.save_tensors(tmp_path / "a", {"x": torch.zeros(9)}, {})
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-1] if content is None else content)
    monkeypatch.setattr(files, "MAPPED_FROM", 0)
    with pytest.raises(StillroomError, match="a is not a whole safetensors file"):
        files.load_tensors(tmp_path / "a")


# ---- images that stay as they are stored


def test_images_that_are_not_held_are_indexed_like_the_tensor_of_them(nothing_held: None) -> None:
    pixels = torch.randint(0, 256, (7, 3, 4, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    stored = artifact.hold_images(pixels.shape, lambda rows: pixels[rows])
    assert isinstance(stored, artifact.StoredImages)
    assert (len(stored), stored.shape, stored.dtype, stored.nbytes) == (7, pixels.shape, pixels.dtype, pixels.nbytes)
    for index in (3, -1, slice(2, 5), slice(None), torch.tensor([6, 0, 0]), torch.arange(7) % 2 == 0, torch.tensor(4)):
        assert torch.equal(stored[index], pixels[index])
    assert torch.equal(stored[torch.tensor([[1, 2], [3, 4]])], pixels[torch.tensor([[1, 2], [3, 4]])])
    assert torch.equal(torch.cat([*artifact.blocks_of(stored)]), pixels)
    assert stored.sha256 == files.sha256_bytes(pixels.numpy().tobytes())
    with pytest.raises(IndexError):
        stored[7]


@pytest.mark.parametrize("encoding", ["png", "jpeg95"])
def test_a_set_that_is_not_held_decoded_is_the_same_set(
    toy: RealData, toy_teachers: list[Teacher], plan: Plan, tmp_path: Path, request: Any, encoding: ImageEncodingChoice
) -> None:
    held = make_set(toy, toy_teachers, plan, encoding)
    held.save(tmp_path / "held")
    request.getfixturevalue("nothing_held")
    stored = make_set(toy, toy_teachers, plan, encoding)
    stored.save(tmp_path / "stored")
    loaded = load_distilled(tmp_path / "stored")
    assert read_folder(tmp_path / "held") == read_folder(tmp_path / "stored")
    for other in (stored, loaded, loaded.to("cpu")):
        assert not isinstance(other.images, torch.Tensor)
        assert other.fingerprint == held.fingerprint
        assert torch.equal(form_all(other), form_all(held))
        assert torch.equal(other.soft_labels, held.soft_labels)
    loaded.save(tmp_path / "again")
    assert read_folder(tmp_path / "again") == read_folder(tmp_path / "held")
    for workers in (0, 1):  # which decode, each for itself
        loader = DataLoader(loaded.views(), batch_size=7, num_workers=workers)
        assert torch.equal(torch.cat([images for images, _ in loader]), torch.stack([x for x, _ in held.views()]))


def test_views_through_jpeg_are_the_same_where_they_are_too_many_to_hold(
    toy: RealData, toy_teachers: list[Teacher], plan: Plan, request: Any
) -> None:
    held = make_set(toy, toy_teachers, plan)
    views = ViewSettings(view_encoding="jpeg75")
    held = dataclasses.replace(held, manifest=dataclasses.replace(held.manifest, views=views))
    expected, rows = form_all(held), torch.tensor([5, 0, 11])
    request.getfixturevalue("nothing_held")
    fresh = dataclasses.replace(held)
    assert torch.equal(fresh.form_views(rows), expected[rows])
    assert "_jpeg_views" not in vars(fresh)
    assert "_jpeg_views" in vars(held)


def test_random_images_that_are_not_held_are_those_of_the_real_data(toy: RealData, plan: Plan, request: Any) -> None:
    held = distill_random(toy, [], 4, RandomConfig(), 0, plan, Run())
    request.getfixturevalue("nothing_held")
    stored = distill_random(toy, [], 4, RandomConfig(), 0, plan, Run())
    assert isinstance(stored.images, artifact.StoredImages)
    assert torch.equal(stored.images[:], held.images[:])


def test_a_picture_that_cannot_be_decoded_is_named_when_it_is_asked_for(
    toy: RealData, plan: Plan, nothing_held: None
) -> None:
    made = distill_random(toy, [], 1, RandomConfig(), 0, plan, Run()).with_image_encoding("jpeg95")
    pictures = list(made.image_files)
    pictures[2] = pictures[2][:200]
    images = artifact.decode_files(pictures, "jpeg95", (8, 8))
    assert images[:2].shape == (2, 3, 8, 8)
    with pytest.raises(StillroomError, match="image 2 of the set is damaged"):
        images[1:4]


def test_a_set_whose_pictures_have_another_size_is_refused_before_one_is_decoded(
    toy: RealData, plan: Plan, tmp_path: Path, nothing_held: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = distill_random(toy, [], 1, RandomConfig(), 0, plan, Run()).with_image_encoding("jpeg95")
    small = artifact.encode_picture(made.images[0][:, :4, :4], "jpeg95")
    dataclasses.replace(made, image_files=(small, *made.image_files[1:])).save(tmp_path)
    monkeypatch.setattr(artifact, "decode_picture", lambda *_: pytest.fail("decoded"))
    with pytest.raises(StillroomError, match=r"does not hold what the manifest says \(an image is RGB of .* \(4, 4\)"):
        load_distilled(tmp_path)


# ---- static labels in blocks


def test_labels_made_block_by_block_are_those_made_at_once_and_an_interrupted_block_alone_is_made_again(
    toy: RealData, toy_teachers: list[Teacher], plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = infer.distill(toy, toy_teachers, 3, SETTINGS, 0, plan, Run())
    whole = compute_static_labels(made, toy_teachers, plan, Run())
    monkeypatch.setattr(labels, "LABEL_BATCH", 2)
    monkeypatch.setattr(labels, "BLOCK_BYTES", 4 * 2 * 8)  # 8 views of 4 classes
    formed: list[int] = []
    form_views = DistilledSet.form_views
    monkeypatch.setattr(DistilledSet, "form_views", lambda s, rows: formed.extend(rows.tolist()) or form_views(s, rows))
    found, stops = stopping_again_and_again(
        tmp_path / "run", lambda run: compute_static_labels(made, toy_teachers, plan, run), looks=0
    )
    assert torch.allclose(found.float(), whole.float(), atol=2e-2)
    assert stops == made.view_count // 8 == 3
    assert formed == list(range(made.view_count))
    names = sorted(path.name for path in (tmp_path / "run" / "units").iterdir())
    assert names == ["labels-0-8.safetensors", "labels-16-24.safetensors", "labels-8-16.safetensors"]


def test_larger_images_pass_fewer_at_a_time() -> None:
    assert [fit_batch(500, side) for side in (8, 32, 64, 128, 224, 4096)] == [500, 500, 500, 125, 40, 1]


# ---- how much memory is taken, in processes of their own

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for the peak")

# Not ru_maxrss, which a process begins with its parent's.
PEAK = """
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
"""

READ_SET = """
import sys, torch
from stillroom import artifact
from stillroom.distilled import load_distilled
def read(name):
    loaded = load_distilled(f"{sys.argv[1]}/{name}")
    for rows in torch.arange(loaded.view_count).split(64)[:3]:
        loaded.form_views(rows)
    return peak()
peaks = [read("small")]
for artifact.HELD_BYTES in (2**20, 2**30):
    peaks.append(read("large"))
print(peaks)
"""

TAKE_STEP = """
import torch
from dataclasses import replace
from stillroom.compute import ComputeConfig, build_generator, resolve_plan
from stillroom.data import MemoryImages, RealData
from stillroom.methods.infer import InferConfig, begin_descent, objective_for
from torch import nn
names, config = tuple(map(str, range(256))), InferConfig(steps=9)
naturals = torch.zeros(1, 256, 3, 32, 32, dtype=torch.uint8)
split = MemoryImages(naturals[0], torch.arange(256))
real = RealData("x", names, split, split, (0.5,) * 3, (0.2,) * 3, 32, True, 0, 1, 1)
plan = resolve_plan(ComputeConfig("cpu", "float32", "off", 1, 1))
conv = lambda inputs: nn.Sequential(nn.Conv2d(inputs, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
model = nn.Sequential(conv(3), conv(32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 256)).eval()
def take(images, chunk):
    objective = objective_for(model, 1, config, replace(plan, chunk_images=chunk), 1)
    begin_descent(naturals[:, :images], real, config, plan, objective).step(0, [build_generator(0, "x")])
    return peak()
print([take(*case) for case in ((8, 8), (64, 8), (256, 8), (256, 0))])
"""


def measure(code: str, *arguments: object) -> list[float]:
    """The peaks in MiB that `code` prints, each of all that was done before."""
    done = subprocess.run([sys.executable, "-c", PEAK + code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [float(peak) for peak in json.loads(done.stdout)]


@linux
def test_a_large_set_is_read_in_the_memory_of_its_files(
    toy: RealData, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact, "HELD_BYTES", 0)
    pixels = torch.zeros(3, 224, 224, dtype=torch.uint8)
    pixels[:, ::2] = 200
    picture = artifact.encode_picture(pixels, "jpeg75")
    plain = distill_random(toy, [], 1, RandomConfig(), 0, plan, Run())
    facts = dataclasses.replace(plain.manifest, image_size=(224, 224), image_encoding="jpeg75")
    for name, count in (("small", 256), ("large", 1500)):
        pictures, rows = (picture,) * count, torch.arange(count)
        images = artifact.decode_files(pictures, "jpeg75", (224, 224))
        DistilledSet(images, rows % 4, rows // 4, None, None, facts, pictures).save(tmp_path / name)
    small, as_files, decoded = measure(READ_SET, tmp_path)
    pixels_mib = (1500 - 256) * 3 * 224 * 224 / 2**20
    assert as_files - small < pixels_mib / 3
    assert decoded - small > pixels_mib  # so it would have been seen


@linux
def test_a_step_in_chunks_takes_the_memory_of_a_chunk_whatever_the_number_of_images() -> None:
    _, few, many, whole = measure(TAKE_STEP)
    further = 192 * 3 * 32 * 32 * 8 / 2**20  # MiB that 192 more images take themselves
    assert many - few < further + 8
    assert whole - many > 10 * further


def test_a_student_of_a_set_that_is_not_held_has_its_batches_drawn_ahead(
    toy: RealData, toy_teachers: list[Teacher], toynet: str, plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_set(toy, toy_teachers, plan).save(tmp_path / "set")
    student = StudentConfig(toynet, TrainConfig(epochs=1, batch_size=8, flip=False))
    asked: list[bool] = []

    def note(*given: Any, ahead: bool, **named: Any) -> Any:
        asked.append(ahead)
        return fit(*given, ahead=ahead, **named)

    monkeypatch.setattr(students, "fit", note)
    reached = []
    for held in (artifact.HELD_BYTES, 0):
        monkeypatch.setattr(artifact, "HELD_BYTES", held)
        distilled = load_distilled(tmp_path / "set")
        model, _ = students.train_student(
            distilled, toy, student, student.train, 4, 0, [], plan, Run(), "student"
        )  # fmt: skip
        reached.append(model.state_dict())
    assert asked == [False, True]
    for name, value in reached[0].items():
        assert torch.equal(reached[1][name], value), name
