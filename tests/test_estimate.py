"""The plan that --dry-run prints counts the work that the run then does."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_toy_teacher, draw_toy_colours
from PIL import Image

from stillroom import artifact, costs, estimate, labels
from stillroom.compute import Plan, usable_cores
from stillroom.costs import Cost, overlap
from stillroom.data import DataConfig, LazyImages, RealData
from stillroom.estimate import estimate_recipe
from stillroom.methods import METHODS
from stillroom.methods.gvbsm import GvbsmConfig
from stillroom.methods.infer import InferConfig
from stillroom.methods.sre2l import Sre2lConfig
from stillroom.pipeline import run_recipe
from stillroom.recipes import Recipe
from stillroom.run import Run


@pytest.mark.parametrize(
    "change",
    [
        {"labels": ("static", "hard")},
        {"labels": ("dynamic",), "controls": False},
        {"method": "random", "labels": ("hard", "static")},
        {"method": "rded", "labels": ("static", "dynamic")},
        {"labels": ("replayed",)},
        {"method": "sre2l", "labels": ("hard", "static"), "sre2l": Sre2lConfig(steps=2)},
        {"method": "gvbsm", "labels": ("dynamic",), "gvbsm": GvbsmConfig(steps=2)},
    ],
)
def test_the_estimated_student_steps_are_those_that_the_run_takes(
    toy_recipe: Recipe, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    recipe = replace(toy_recipe, **change)
    monkeypatch.setattr(estimate, "_time_training", lambda *_: (1.0, Cost(), 0))  # seconds are steps
    monkeypatch.setattr(estimate, "_time_views", lambda *_: 0.0)
    stages, _ = estimate_recipe(recipe)
    estimated = sum(stage.seconds for stage in stages if stage.name.startswith("students"))
    taken = len(recipe.seeds) * sum(cell["steps"] for cell in run_recipe(recipe, Run())["cells"])
    assert estimated == pytest.approx(taken, rel=0.02)


@pytest.mark.parametrize(
    "change",
    [
        {"method": "random", "labels": ("static",)},
        {"labels": ("static", "replayed"), "seeds": (0,)},
        {"method": "sre2l", "labels": ("replayed",), "sre2l": Sre2lConfig(steps=2), "seeds": (0,)},
    ],
)
def test_the_estimated_passes_for_stored_labels_are_those_that_the_run_takes(
    toy_recipe: Recipe, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    recipe = replace(toy_recipe, **change)
    monkeypatch.setattr(estimate, "_time_views", lambda networks, views, *_: float(views))  # seconds are passes
    estimated = sum(stage.seconds for stage in estimate_recipe(recipe)[0] if stage.name.endswith(" labels"))
    passes: list[int] = []
    counted = labels.ensemble_logits

    def count(*given: Any) -> Any:
        logits_of = counted(*given)

        def logits(images: torch.Tensor) -> torch.Tensor:
            passes.append(len(images))
            return logits_of(images)

        return logits

    monkeypatch.setattr(labels, "ensemble_logits", count)
    run_recipe(recipe, Run())
    assert estimated == sum(passes) > 0


def test_what_a_few_images_take_stands_for_all_and_for_every_network(
    toy: RealData, toynet: str, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "_median_time", lambda work, plan: 1.0 + 0 * len(work()))
    assert estimate._time_views([toynet, toynet], 6400, toy, plan) == 2 * 6400 / estimate.TIMED_SCORES
    assert estimate._time_views([toynet], 3, toy, plan) == 1.0


def test_a_teacher_that_is_loaded_is_measured_on_every_test_image(
    toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "_time_views", lambda networks, views, *_: float(views))
    (tmp_path / "weights.safetensors").touch()
    loaded = replace(toy_recipe.teachers, checkpoints=(f"toynet={tmp_path / 'weights.safetensors'}",))
    [_, teacher, *_], _ = estimate_recipe(replace(toy_recipe, teachers=loaded, labels=("hard",)), "set")
    assert (teacher.name, teacher.seconds) == ("teacher toynet", 40.0)


@pytest.mark.parametrize(
    ("method", "stages"), [("cda", ["images toynet"]), ("gvbsm", ["statistics toynet", "images toynet"])]
)
def test_the_recovery_of_pixels_is_timed(toy_recipe: Recipe, method: str, stages: list[str]) -> None:
    found, _ = estimate_recipe(replace(toy_recipe, method=method, labels=("static",)), "set")
    assert [stage.name for stage in found[2:]] == [*stages, "images", "static labels"]
    assert all(stage.seconds > 0 for stage in found)
    assert found[-3].memory > 0


def test_of_a_step_in_chunks_one_chunk_is_timed_and_its_memory_told(
    toy: RealData, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "peak_memory", lambda *_: None)  # counts what is kept, of a world too small to weigh
    own, found = 3 * 8 * 8, {}
    for chunk in (0, 4):
        cut = replace(plan, chunk_images=chunk)
        model = build_toy_teacher().model
        found[chunk] = estimate._time_recovery(model, 2, 64, InferConfig(), toy, cut)[1] - 2 * 64 * own
    assert 0 < found[4] < found[0] / 8


def test_what_a_large_set_takes_is_judged_by_its_files(toy_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(toy_recipe, labels=("static",), controls=False)
    held = {stage.name: stage for stage in estimate_recipe(recipe, "set")[0]}
    monkeypatch.setattr(artifact, "HELD_BYTES", 0)
    stages, _ = estimate_recipe(recipe, "set")
    stored = {stage.name: stage for stage in stages}
    assert held["images"].kept == held["images"].memory == 12 * 3 * 8 * 8
    assert stored["images"].kept == stored["images"].memory != held["images"].kept
    assert stored["static labels"].memory == stored["static labels"].kept > 0


@pytest.mark.parametrize("method", ["sre2l", "gvbsm", "rded"])
def test_images_that_are_made_are_held_as_pixels_however_many(
    toy_recipe: Recipe, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    monkeypatch.setattr(artifact, "HELD_BYTES", 0)
    stages, _ = estimate_recipe(replace(toy_recipe, method=method, labels=("replayed",), controls=False), "set")
    images, labels = stages[-2:]
    assert (images.name, images.memory, labels.name) == ("images", 16 * 3 * 8 * 8, "replayed labels")
    assert labels.memory == labels.kept > 0


def test_the_memory_told_is_that_of_the_largest_step_and_of_what_is_held_and_not_of_labels_that_are_not_stored(
    toy_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "resident_memory", lambda: 2**30)
    monkeypatch.setattr(estimate, "_time_steps", lambda *_: (1.0, 2**31))
    monkeypatch.setattr(estimate, "dynamic_label_bytes", lambda *_: 2**40)
    _, notes = estimate_recipe(replace(toy_recipe, labels=("dynamic",), controls=False))
    assert notes[-1] == "memory: 4.2 GiB at most, 1.0 of them libraries and data"  # 1 + 1.6 x 2


def test_a_method_whose_work_is_not_known_here_is_said_not_to_be_timed(
    toy_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "herding of my own", METHODS["herding"])
    mine: Any = "herding of my own"
    found, _ = estimate_recipe(replace(toy_recipe, method=mine, labels=("static",)), "set")
    assert [(stage.name, stage.work) for stage in found[2:3]] == [(mine, "not timed, not counted")]
    assert [stage.name for stage in found[3:]] == ["images", "static labels"]


SLOW = 0.02  # seconds of an image


def read_slowly(recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """The recipe on files that are decoded by the batch, each of which takes SLOW seconds."""
    for split, per_class, seed in (("train", 24, 1), ("test", 10, 2)):
        for index, (image, label) in enumerate(zip(*draw_toy_colours(per_class, seed), strict=True)):
            own = folder / split / str(label)
            own.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(own / f"{index}.png")
    decode = LazyImages.batch

    def batch(images: LazyImages, indices: torch.Tensor) -> torch.Tensor:
        time.sleep(SLOW * len(indices))
        return decode(images, indices)

    monkeypatch.setattr(LazyImages, "batch", batch)
    return replace(recipe, data=DataConfig(str(folder), memory_limit_gib=0))


@pytest.mark.parametrize(
    ("change", "reads"),
    [
        # Steps of a teacher and its accuracy; naturals and random images; trainings, each measured on the test split.
        ({"labels": ("hard",)}, {"teacher": 24 * 16 + 40, "images": 12 + 16, "students": 5 * 40}),
        ({"method": "rded", "labels": ("hard",), "controls": False}, {"scores": 96, "images": 16}),
        ({"method": "gvbsm", "gvbsm": GvbsmConfig(steps=2), "labels": ("hard",)}, {"statistics": 96, "images": 16}),
    ],
)
def test_images_that_are_slow_to_read_are_counted_wherever_a_stage_reads_them(
    toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], reads: dict[str, int]
) -> None:
    recipe = replace(read_slowly(toy_recipe, tmp_path / "slow", monkeypatch), seeds=(0,), **change)
    stages, notes = estimate_recipe(recipe)
    for name, count in reads.items():
        [seconds] = [stage.seconds for stage in stages if stage.name.startswith(name) and stage.name != "images toynet"]
        assert SLOW * count < seconds < 1.5 * SLOW * count + 1, name
    assert any(note.startswith("reading: 48 training images drawn at random took ") for note in notes)


def test_a_large_set_is_decoded_for_labels_and_in_every_step_of_its_students(
    toy_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = costs.decode_picture

    def slowly(*given: Any) -> torch.Tensor:
        time.sleep(SLOW * min(usable_cores(), 16))  # a thread per core shares the images
        return decode(*given)

    monkeypatch.setattr(costs, "decode_picture", slowly)
    recipe = replace(toy_recipe, labels=("static",), controls=False, seeds=(0,))
    held = {stage.name: stage.seconds for stage in estimate_recipe(recipe)[0]}
    monkeypatch.setattr(artifact, "HELD_BYTES", 0)
    stored = {stage.name: stage.seconds for stage in estimate_recipe(recipe)[0]}
    assert held["static labels"] < SLOW * 24 < stored["static labels"]
    assert held["students, static"] < SLOW * 6 * 8 < stored["students, static"]


def test_a_step_and_the_drawing_of_the_next_batch_take_the_longer_or_what_processors_do_for_both(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "usable_cores", lambda: 2)
    assert overlap(3.0, Cost(1.0, 1.0), plan) == 3.0
    assert overlap(1.0, Cost(3.0, 3.0), plan) == 3.0  # a thread for each, a processor for each
    assert overlap(3.0, Cost(3.0, 6.0), plan) == 4.5  # three threads, two processors
    assert overlap(3.0, Cost(3.0, 6.0), replace(plan, device="cuda")) == 3.0


def test_reading_into_memory_is_timed_and_images_in_memory_cost_no_more(
    toy_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = estimate.load_real

    def slowly(config: DataConfig) -> RealData:
        time.sleep(0.2)
        return load(config)

    monkeypatch.setattr(estimate, "load_real", slowly)
    stages, _ = estimate_recipe(toy_recipe, "teachers")
    assert [(stage.name, stage.work) for stage in stages[:1]] == [("data", "136 images")]
    assert stages[0].seconds > 0.2
    real = load(toy_recipe.data)
    assert costs.time_images(real, "png").train == costs.time_images(real, "png").test == Cost()
