"""The benchmarks run, and their JSON says that both sides compute the same."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stillroom.compute import Plan
from stillroom.recipes import find_recipe

pytestmark = pytest.mark.slow  # each starts a process of its own

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = ["--networks", "convnet_thin", "--classes", "10", "--steps", "1", "--repeats", "1", "--threads", "1"]
TINY += ["--device", "cpu", "--variants", "float32-eager", "bfloat16-eager"]


def run_benchmark(name: str, out: Path, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(BENCHMARKS / name), *TINY, *arguments, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(out.read_text())
    assert record["provenance"]["command"].endswith(str(out))
    assert record["provenance"]["plan"]["threads"] == 1
    return record["rows"]


def test_published_loop_and_ours_agree_over_a_whole_optimisation(tmp_path: Path) -> None:
    rows = run_benchmark("compensator_step.py", tmp_path / "out.json", "--optimise-steps", "5", "--pack-slots", "2")
    published, exact, rounded = rows
    assert exact["gradient_cosine"] > 0.99999
    assert rounded["gradient_cosine"] > 0.99
    for row in (exact, rounded):
        assert row["agrees"]
        assert abs(row["final_statistics_loss"] / published["final_statistics_loss"] - 1) < 0.01
    assert all(row["milliseconds"] > 0 and row["share_of_peak"] > 0 for row in rows)


def test_student_step_of_both_ways_follows_the_same_gradient(tmp_path: Path) -> None:
    _, exact, rounded = run_benchmark("student_step.py", tmp_path / "out.json", "--batch", "8")
    assert exact["gradient_cosine"] > 0.99999
    assert rounded["gradient_cosine"] > 0.9


def test_published_recoveries_and_ours_agree_over_a_whole_optimisation(tmp_path: Path) -> None:
    rows = run_benchmark("recovery_step.py", tmp_path / "out.json", "--optimise-steps", "3", "--pack-slots", "2")
    assert [row["method"] for row in rows] == ["sre2l"] * 3 + ["gvbsm"] * 3
    for published, exact, rounded in (rows[:3], rows[3:]):
        assert exact["gradient_cosine"] > 0.9999
        assert rounded["gradient_cosine"] > 0.99
        for row in (exact, rounded):
            assert abs(row["final_statistics_loss"] / published["final_statistics_loss"] - 1) < 0.01
    assert all(row["milliseconds"] > 0 and row["share_of_peak"] > 0 for row in rows)


def test_pools_of_labels_are_measured_on_random_images_and_on_a_finished_set_by_its_own_teachers(
    tmp_path: Path,
) -> None:
    tiny = ["--data", "digits", "--teacher-epochs", "1", "--student", "convnet_thin", "--epochs", "1", "--seeds", "0"]
    tiny += ["--pools", "1", "--encodings", "uint8", "--threads", "1"]
    environment = os.environ | {"STILLROOM_CACHE": str(tmp_path / "cache")}

    def run(*command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr

    script = str(BENCHMARKS / "label_pools.py")
    run(sys.executable, script, *tiny, "--ipc", "2", "--networks", "convnet_thin", "--out", "random.json")
    words = ["--teachers.networks", "convnet_thin", "--teachers.epochs", "2", "--ipc", "2"]
    run(sys.executable, "-m", "stillroom.cli", "distill", "digits", "--method", "random", *words, "--out", "made")
    run(sys.executable, script, "made", *tiny, "--out", "own.json")
    for name in ("random", "own"):
        rows = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
        assert [row["labels"] for row in rows] == ["static", "replayed", "dynamic"]
    assert len(list((tmp_path / "cache" / "teachers").iterdir())) == 2  # none is trained for the finished set


def test_step_in_chunks_takes_less_memory_and_has_the_gradient_of_the_whole_one(tmp_path: Path) -> None:
    settings = ["--images", "8", "16", "--whole", "8", "--chunk", "2", "--size", "64"]
    rows = run_benchmark("memory.py", tmp_path / "out.json", *settings)
    for whole, chunked, twice in (rows[:3], rows[3:]):
        assert (whole["images"], chunked["images"], twice["images"]) == (8, 8, 16)
        assert chunked["gradient_cosine"] > 0.99
        assert whole["memory_mib"] is None or chunked["memory_mib"] < whole["memory_mib"]


def test_a_large_set_is_read_in_the_memory_of_its_parts(tmp_path: Path) -> None:
    settings = ["--size", "64", "--batch", "8", "--stored", "3000", "--working-mib", "32", "--rows", "900"]
    rows = run_benchmark("loader.py", tmp_path / "out.json", *settings)
    for row in rows:
        assert row["decoded_mib"] > 32  # so that a set that is held decoded would not agree
        assert row["agrees"]
        assert row["formed_per_second"] >= row["student_per_second"] > 0
        assert row["parquet_later_pass_per_second"] > 0


def test_what_every_worker_does_by_itself_is_not_shortened_by_more_workers(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    scaling = importlib.import_module("scaling")
    monkeypatch.setattr(scaling, "time_image", lambda *_, **__: 1.0)
    recipe = find_recipe("infer-imagenet-ipc50")
    free = scaling.list_stages(recipe, plan, scaling.ImageSeconds(0, 0, 0, 0, 0))
    stages = scaling.list_stages(recipe, plan, scaling.ImageSeconds(header=0, read=1, hash=2, encode=4, decode=8))
    naturals, tested = 49_000, 50_000 * 3
    assert stages[0].before - free[0].before == tested + naturals * (1 + 2)  # accuracies; decoded and hashed
    assert stages[1].before == naturals * (1 + 4 + 8 + 2)  # decoded, encoded; and read back for a fingerprint
    alone, units = sum(stage.before for stage in stages), sum(sum(stage.units) for stage in stages)
    assert scaling.simulate(stages, 1) == alone + units
    assert scaling.simulate(stages, 10**5) == alone + sum(max(stage.units) for stage in stages)
