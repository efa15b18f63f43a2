"""The fair table: every cell of the grid once, beside its controls, whatever stops or fails on the way."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_toy_teacher, without_units
from hypothesis import given
from hypothesis import strategies as st

from stillroom import (
    cli,
    compare,
    distilled,
    estimate,
    grid,
    labels,
    markup,
    paper,
    pipeline,
    protocols,
    render,
    scores,
    students,
    teachers,
)
from stillroom.analysis.duplication import feature_duplication, mean_over_classes, mean_similarity
from stillroom.analysis.results import measure_tradeoff
from stillroom.compute import Plan
from stillroom.costs import Cost
from stillroom.data import FACTS, load_real
from stillroom.distilled import count_bytes, load_distilled
from stillroom.errors import StillroomError, TimeLimitReached
from stillroom.files import read_sealed, seal, write_json
from stillroom.grid import Grid, comparison_of
from stillroom.labels import PoolConfig
from stillroom.methods import METHODS, Method, select
from stillroom.networks import NETWORKS
from stillroom.recipes import EXPECTED, RECIPES, Recipe, find_recipe, smoke
from stillroom.run import Run
from stillroom.study import Study, StudyConfig

INFER = ("", ":naturals_as_views=false", ":compensator_bits=8", ":compensators=false", ":teachers=[toynet]")


def run_grid(recipe: Recipe, directory: Path, **grid: Any) -> dict[str, Any]:
    comparison = comparison_of(recipe, Grid(**grid))
    with Run(directory) as run:
        return json.loads(json.dumps(compare.compare(comparison, run, "toy")))


def find(trainings: dict[str, Any], set_: str, end: str) -> Any:
    """The one training of a set that ends so: after the set's hash."""
    found = [t for name, t in trainings.items() if t["set"] == set_ and re.fullmatch(f"[0-9a-f]{{12}}-{end}", name)]
    assert len(found) == 1
    return found[0]


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in results["rows"]]
    trainings = {n: {k: v for k, v in t.items() if k != "seconds"} for n, t in results["trainings"].items()}
    return {"rows": rows, "trainings": trainings}


def test_every_cell_of_the_grid_has_its_row_and_its_differences_are_those_of_the_trainings(
    toy_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = replace(toy_recipe, labels=("hard", "static"))
    results = run_grid(recipe, tmp_path / "run", methods=("random", "infer"), ipc=(3, 4))
    cells = [(r["method"], r["ipc"], r["labels"]) for r in results["rows"]]
    assert cells == [(m, i, k) for i in (3, 4) for m in ("random", "infer") for k in ("hard", "static")]
    row = results["rows"][-1]
    own, control = (
        np.array(find(results["trainings"], name, "static-6-toynet")["top1"]) for name in ("infer", "random")
    )
    assert row["top1"] == own.tolist()
    assert row["differences"]["random + static, equal steps"] == pytest.approx(
        [np.mean(own - control), np.std(own - control, ddof=1)], abs=2e-3
    )
    assert set(row["differences"]) == {
        f"{name}, {budget}"
        for name in ("random + hard", "random + static", "naturals + static")
        for budget in ("equal epochs", "equal steps")
    }
    assert row["bytes"]["raw"] == count_bytes(load_distilled(tmp_path / "run/sets/infer-ipc4/distilled")).raw | {
        "labels": 24 * 4 * 2
    }


def test_random_images_are_trained_on_once_though_they_are_a_method_and_a_control(
    toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    relabelled: list[str] = []
    train, relabel = students.train_student, labels.ensemble_logits

    def count_training(*arguments: Any, **options: Any) -> Any:
        trained.append(arguments[-1])
        return train(*arguments, **options)

    def count_labels(*arguments: Any) -> Any:
        relabelled.append("")
        return relabel(*arguments)

    monkeypatch.setattr(students, "train_student", count_training)
    monkeypatch.setattr(labels, "ensemble_logits", count_labels)
    recipe = replace(toy_recipe, labels=("static",), seeds=(0,))
    run_grid(recipe, tmp_path / "run", methods=("random", "infer"))
    assert (
        len(trained) == len(set(trained)) == 7
    )  # random: hard and static at 4 and 6 steps; naturals: 3 and 6; infer: 6
    run_grid(recipe, tmp_path / "run", methods=("random", "infer", "infer:statistics_weight=0"), ipc=(4, 3))
    assert len(trained) == len(set(trained))  # the grid grew, and nothing was done twice
    # The grid's sets, and the naturals of each budget; those of 4 images are the random images of 3.
    assert len(relabelled) == 3 + 4


def test_variants_whose_naturals_differ_share_neither_labels_nor_students(toy_recipe: Recipe, tmp_path: Path) -> None:
    """As many naturals of either: only what they are tells them apart."""
    real = load_real(toy_recipe.data)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (real.mean, real.std))
    for slot in range(3):
        chosen = torch.arange(slot, 96, 24)  # an image of each class
        torch.save((real.train.batch(chosen) / 255 - mean) / std, tmp_path / f"tensor_{slot}.pt")
    recipe = replace(toy_recipe, labels=("static",), seeds=(0,))
    trainings = run_grid(recipe, tmp_path / "run", methods=("infer", f"infer:naturals={tmp_path}"))["trainings"]
    assert len([name for name, t in trainings.items() if t["set"] == "naturals" and "-static-6-" in name]) == 2


def test_a_worker_that_is_behind_leaves_the_rows_of_one_that_is_ahead_in_the_table(
    toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(toy_recipe, labels=("hard", "static"), seeds=(0,))
    grid = Grid(methods=("random", "sre2l"))
    whole = run_grid(recipe, tmp_path / "run", **asdict(grid))
    table = tmp_path / "run" / "comparison.json"
    ahead = table.read_bytes()
    table.unlink()
    compare_entry, write_tables = compare.compare_entry, compare.write_tables
    written: list[dict[str, Any]] = []

    def compare_entry_behind(*arguments: Any) -> Any:
        rows = list(compare_entry(*arguments))
        if not written:  # by one that began when there was no table, as this one did
            table.write_bytes(ahead)
        yield from rows

    def write_and_look(*arguments: Any) -> None:
        write_tables(*arguments)
        written.append(json.loads(table.read_text()))

    monkeypatch.setattr(compare, "compare_entry", compare_entry_behind)
    monkeypatch.setattr(compare, "write_tables", write_and_look)
    with Run(tmp_path / "run", worker="behind") as run:
        compare.compare(comparison_of(recipe, grid), run, "toy")
    assert len(written) == 4
    for results in written:
        assert without_times(results) == without_times(whole)
    assert (tmp_path / "run" / "table.csv").read_text().count("\n") == 5


def test_a_set_of_a_comparison_is_made_by_its_own_plan_and_what_differs_is_told_once(
    toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = replace(toy_recipe, labels=("hard",), seeds=(0,))
    run_grid(recipe, tmp_path / "run", methods=("random",), ipc=(3, 4))
    bound: list[tuple[str, int]] = []
    resolve, distill = pipeline.resolve_plan, pipeline.distill_recipe

    def distill_and_look(*arguments: Any) -> Any:
        bound.append((arguments[4].processor, torch.get_num_threads()))
        return distill(*arguments)

    monkeypatch.setattr(pipeline, "resolve_plan", lambda *given: replace(resolve(*given), processor="slide rule"))
    monkeypatch.setattr(compare, "distill_recipe", distill_and_look)
    for path in (tmp_path / "run" / "sets").glob("*/config.json"):  # begun by a command of more threads
        stored = read_sealed(path)
        stored["plan"]["threads"] = 2
        write_json(path, seal(stored, {}, path))
    capsys.readouterr()
    run_grid(recipe, tmp_path / "run", methods=("random",), ipc=(3, 4))
    err = capsys.readouterr().err
    assert err.count("goes on with processor 'slide rule'") == 1
    assert err.count("going on with the numerical plan that the run began with: threads 2 (not 1)") == 1
    assert bound == [("slide rule", 2)] * 2
    assert torch.get_num_threads() == 1


def test_of_two_workers_rows_the_one_that_did_not_fail_stays() -> None:
    good, old, bad, key = {"mean": 1.0}, {"mean": 0.0}, {"error": "no memory"}, (0, 0)
    for kept, others, made, expected in (
        ({}, {key: good}, {key: bad}, good),
        ({}, {key: bad}, {key: good}, good),
        ({}, {}, {key: bad}, bad),
        ({key: old}, {}, {key: bad}, bad),  # what failed now did not do so before
        ({key: old}, {key: good}, {}, good),
        ({}, {key: bad}, {}, bad),
    ):
        assert compare.merge_rows(kept, others, made) == {key: expected}


def test_a_second_time_nothing_is_computed(toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_grid(toy_recipe, tmp_path / "run", scores=True)
    for module, name in (
        (students, "train_student"), (teachers, "fit"), (labels, "ensemble_logits"), (compare, "feature_duplication"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("computed again"))
    assert without_times(run_grid(toy_recipe, tmp_path / "run", scores=True)) == without_times(first)


def test_a_grid_grows_by_every_kind_of_label_but_not_under_other_settings(toy_recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(toy_recipe, labels=("static",), seeds=(0,), pool=PoolConfig(epochs=2))
    first = run_grid(recipe, tmp_path / "run")
    grown = run_grid(replace(recipe, labels=("static", "hard", "replayed", "dynamic")), tmp_path / "run")
    assert [r["mean"] for r in grown["rows"] if r["labels"] == "static"] == [r["mean"] for r in first["rows"]]
    for changed in ({"pool": PoolConfig(epochs=3)}, {"infer": replace(recipe.infer, steps=5)}):
        with pytest.raises(StillroomError, match="holds another configuration"):
            run_grid(replace(recipe, **changed), tmp_path / "run")


class Killed(BaseException):
    """Ends the work where it stands."""


def test_killed_between_units_and_run_again_the_table_is_the_same(
    toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(toy_recipe, seeds=(0,))
    undisturbed = run_grid(recipe, tmp_path / "undisturbed")
    finish, turn = Run.finish_unit, iter(range(10**6))

    def finish_or_die(self: Run, *arguments: Any) -> None:
        number = next(turn)
        if number % 5 == 2:
            raise Killed
        finish(self, *arguments)

    monkeypatch.setattr(Run, "finish_unit", finish_or_die)
    kills = 0
    while True:
        try:
            results = run_grid(recipe, tmp_path / "run")
            break
        except Killed:
            kills += 1
    assert kills >= 4
    assert without_times(results) == without_times(undisturbed)


def test_cells_that_cannot_be_are_all_named_before_any_teacher_is_trained(
    toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "fit", lambda *_, **__: pytest.fail("a teacher was trained"))
    with pytest.raises(StillroomError) as caught:
        run_grid(toy_recipe, tmp_path / "run", methods=("random", "infer", "infr", "infer:step=3"), ipc=(1, 4, 40))
    message = str(caught.value)
    assert "infer, ipc 1: ipc 1 is too small" in message
    assert "random, ipc 40" in message
    assert "infer, ipc 40" in message
    assert "infr, ipc 4: grid.methods: there is no method 'infr'. Did you mean 'infer'?" in message
    assert "unknown key step. Did you mean 'steps'" in message
    assert "random, ipc 4:" not in message


def test_one_cell_that_fails_is_marked_and_the_others_are_there(
    toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> Any:
        raise StillroomError("the loss is not finite from step 3 on")

    broken = Method(METHODS["infer"].config, fail, METHODS["infer"].check, METHODS["infer"].content)
    monkeypatch.setitem(METHODS, "infer", broken)
    code = cli.main(["compare", "toy", "--grid.methods", "infer", "random", "--out", str(tmp_path / "run")])
    rows = json.loads((tmp_path / "run/comparison.json").read_text())["rows"]
    assert code == cli.FAILED
    assert [("error" in row, row["method"]) for row in rows] == [(True, "infer")] * 2 + [(False, "random")] * 2
    assert "failed: infer, ipc 4, static, toynet: the loss is not finite from step 3 on" in capsys.readouterr().out
    assert "static, toynet: the loss is not finite from step 3 on" in (tmp_path / "run/table.md").read_text()


def test_the_command_writes_the_table_in_every_format_and_tells_of_each_cell(
    toy_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", "toy", "--labels", "static", "--seeds", "0", "--out", str(tmp_path / "run")]
    assert cli.main(words) == cli.OK
    lines = without_units(capsys.readouterr().err).splitlines()
    told = [line.partition(":")[0] for line in lines if "the training is short" not in line]
    assert told == ["random, ipc 4, static, toynet", "infer, ipc 4, static, toynet"]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "run/table.csv").read_text())))
    kept = json.loads((tmp_path / "run/comparison.json").read_text())["rows"]
    assert [(r["method"], r["ipc"], r["labels"], r["student"]) for r in rows] == [
        (method, "4", "static", "toynet") for method in ("random", "infer")
    ]
    for row, own in zip(rows, kept, strict=True):
        assert float(row["mean"]) == own["mean"]
        assert float(row["bytes.raw.images"]) == own["bytes"]["raw"]["images"]
    steps = "differences.random + static, equal steps.mean"
    assert (rows[0][steps], float(rows[1][steps])) == ("", kept[1]["differences"]["random + static, equal steps"][0])
    page = (tmp_path / "run/table.md").read_text()
    first = page.split("**Accuracy, top-1 in %**\n\n")[1].split("\n\n")[0]
    assert len(first.splitlines()) == 4  # the header, and two rows
    assert "±" not in page.split("Columns:")[0]  # one seed has no spread
    assert r"\toprule" in (tmp_path / "run/table.tex").read_text()


@pytest.mark.parametrize("method", ["random", "herding", "sre2l:steps=2", *(f"infer{own}" for own in INFER)])
@pytest.mark.parametrize("kind", ["hard", "static", "replayed"])
def test_bytes_are_foretold_exactly(toy_recipe: Recipe, tmp_path: Path, method: str, kind: Any) -> None:
    pool = PoolConfig(epochs=2, encoding="uint8")
    recipe = replace(toy_recipe, labels=(kind,), seeds=(0,), controls=False, pool=pool)
    results = run_grid(recipe, tmp_path / "run", methods=(method,))
    foretold = grid.raw_bytes(grid.read_method(method, recipe), load_real(recipe.data), kind)
    assert sum(results["rows"][0]["bytes"]["raw"].values()) == foretold


def test_at_equal_bytes_a_method_gets_the_largest_budget_that_fits(toy_recipe: Recipe) -> None:
    real = load_real(toy_recipe.data)
    recipe = replace(toy_recipe, ipc=8)
    for kind in ("hard", "static"):
        matched = grid.match_bytes(recipe, real, kind)  # type: ignore[arg-type]
        budget = grid.raw_bytes(replace(recipe, method="random"), real, kind)  # type: ignore[arg-type]
        fits = [
            ipc
            for ipc in range(2, 9)
            if grid.raw_bytes(replace(recipe, ipc=ipc), real, kind) <= budget  # type: ignore[arg-type]
        ]
        assert matched == max(fits) < 8
    assert grid.match_bytes(replace(recipe, method="random"), real, "static") == 8


def test_a_method_whose_images_are_cheaper_gets_more_of_them(toy_recipe: Recipe) -> None:
    """Without compensators INFER's budget of 8 pays for 6 naturals per class: 10 have the bytes of 8 random images."""
    real, recipe = load_real(toy_recipe.data), replace(toy_recipe, ipc=8)
    bare = replace(recipe, infer=replace(recipe.infer, compensators=False))
    for kind in ("hard", "static", "replayed"):
        matched = grid.match_bytes(bare, real, kind)  # type: ignore[arg-type]
        sizes = [grid.raw_bytes(replace(bare, ipc=ipc), real, kind) for ipc in (matched, matched + 1)]  # type: ignore[arg-type]
        assert matched > 8
        assert sizes[0] <= grid.raw_bytes(replace(recipe, method="random"), real, kind) < sizes[1]  # type: ignore[arg-type]


def test_random_images_with_hard_labels_train_no_teachers_and_the_grid_still_grows(
    toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(toy_recipe, labels=("hard",), seeds=(0,))
    with monkeypatch.context() as patch:
        patch.setattr(teachers, "fit", lambda *_, **__: pytest.fail("a teacher was trained"))
        alone = run_grid(recipe, tmp_path / "run", methods=("random",))
    assert (alone["teachers"], alone["rows"][0]["duplication"]) == ({}, None)
    grown = run_grid(replace(recipe, labels=("hard", "static")), tmp_path / "run", methods=("random", "herding"))
    assert [(r["method"], r["labels"]) for r in grown["rows"]] == [
        (method, kind) for method in ("random", "herding") for kind in ("hard", "static")
    ]
    assert grown["rows"][0]["top1"] == alone["rows"][0]["top1"]


@pytest.mark.parametrize(
    ("methods", "ipc"),
    [
        (("random", "infer", "herding"), (4, 5)),
        (("infer", "again=infer:distill_seed=1"), ()),
        (("plain=random", "infer", "bare=infer:compensators=false", "random:labelled_by=[toynet]"), ()),
    ],
)
def test_a_dry_run_counts_every_training_once_and_writes_nothing(
    toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, methods: tuple[str, ...], ipc: tuple[int, ...]
) -> None:
    comparison = comparison_of(toy_recipe, Grid(methods=methods, ipc=ipc))
    with monkeypatch.context() as patch:
        patch.setattr(estimate, "_time_training", lambda *_: (1.0, Cost(), 0))  # seconds are steps
        patch.setattr(estimate, "_time_views", lambda *_: 0.0)
        stages, _ = estimate.estimate_comparison(comparison)
    estimated = sum(stage.seconds for stage in stages if "students" in stage.name)
    with Run(tmp_path / "run") as run:
        trainings = compare.compare(comparison, run)["trainings"]
    assert estimated == len(toy_recipe.seeds) * sum(training["steps"] for training in trainings.values())
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", "toy", "--grid.methods", "random", "infer", "--dry-run"]) == cli.OK
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_counts_the_students_on_all_real_images(toy_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "other", NETWORKS["toynet"])
    found = {}
    for real in (False, True):
        comparison = comparison_of(toy_recipe, Grid(methods=("random",), students=("toynet", "other"), real=real))
        found[real] = {stage.name for stage in estimate.estimate_comparison(comparison)[0]}
    assert found[True] - found[False] == {"on all real images, other"}


def test_a_dry_run_tells_of_what_is_there_already(
    toy_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", "toy", "--grid.methods", "random", "--labels", "hard", "--seeds", "0", "--out"]
    assert cli.main([*words, str(tmp_path / "run")]) == cli.OK
    for out, told in (("other", False), ("run", True)):
        capsys.readouterr()
        assert cli.main([*words, str(tmp_path / out), "--dry-run"]) == cli.OK
        assert (f"{out} holds 2 finished units, 1 of them students" in capsys.readouterr().out) == told


def test_a_budget_too_small_for_a_methods_bytes_is_refused(toy_recipe: Recipe) -> None:
    with pytest.raises(StillroomError, match=r"infer with static labels has no set of at most [\d,]+ bytes"):
        grid.match_bytes(replace(toy_recipe, ipc=1), load_real(toy_recipe.data), "static")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("random", "random")}, "has repeats"),
        ({"methods": ("mine=random", "mine=infer")}, "calls several mine; give each its own name"),
        ({"ipc": (0,)}, "1 or more images per class"),
        ({"budget": "byte"}, "grid.budget is 'byte'"),
        ({"scores": True, "budget": "bytes"}, "give --grid.budget ipc with it"),
    ],
)
def test_a_grid_that_means_nothing_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StillroomError, match=message):
        Grid(**change)


def test_settings_of_a_method_are_read_in_its_name(toy_recipe: Recipe) -> None:
    recipe = grid.read_method("infer:betas=[0.1,0.2],steps=7,per_image=true", toy_recipe)
    assert recipe.infer == replace(toy_recipe.infer, betas=(0.1, 0.2), steps=7, per_image=True)
    for text, message in (
        ("infer:steps", "where a setting=value should be"),
        ("infer:steps=many", "steps is 'many'; give a whole number"),
        ("random:steps=3", "has no settings"),
        ("infer:", "ends where a setting=value should be"),
    ):
        with pytest.raises(StillroomError, match=message):
            grid.read_method(text, toy_recipe)


def test_mean_similarity_is_the_mean_over_all_pairs() -> None:
    features = torch.nn.functional.normalize(torch.randn(7, 5, generator=torch.Generator().manual_seed(0)))
    cosines = (features @ features.T).numpy()
    pairs = [cosines[i, j] for i in range(7) for j in range(7) if i != j]
    assert mean_similarity(features) == pytest.approx(float(np.mean(pairs)), abs=1e-6)


def test_a_class_of_one_view_has_no_pairs_and_counts_for_nothing() -> None:
    features = torch.nn.functional.normalize(torch.randn(4, 5, generator=torch.Generator().manual_seed(0)))
    alone = mean_over_classes(features, torch.tensor([0, 0, 0, 1]))
    assert alone == mean_over_classes(features[:3], torch.zeros(3, dtype=torch.int64))
    assert mean_over_classes(features, torch.arange(4)) is None


def test_equal_views_are_duplicates_and_real_images_are_less(toy_recipe: Recipe, tmp_path: Path, plan: Plan) -> None:
    real, teacher = load_real(toy_recipe.data), build_toy_teacher()
    distilled = select.distill_random(real, [], 3, select.RandomConfig(), 0, plan, Run())
    first_of_class = replace(distilled, images=distilled.images[distilled.labels])  # slot 0 stands first
    assert feature_duplication(first_of_class, teacher, plan) == pytest.approx(1, abs=1e-4)
    assert feature_duplication(distilled, teacher, plan) < 0.99
    rows = run_grid(replace(toy_recipe, labels=("hard",), seeds=(0,)), tmp_path / "run")["rows"]
    assert all(0 < row["duplication"] < 1 for row in rows)


def test_scores_are_those_of_the_formulas() -> None:
    """The field's benchmark: a = 0.5 IOR - 0.5 HLR, LRS = (e^a - e^-1) / (e - e^-1); written out anew."""
    improvement, recovery = scores.improvement_over_random(0.45, 0.4), scores.hard_label_recovery(0.6, 0.2)
    a = 0.5 * 0.05 - 0.5 * 0.4
    expected = (math.exp(a) - math.exp(-1)) / (math.exp(1) - math.exp(-1))
    assert scores.label_robust_score(improvement, recovery) == pytest.approx(expected)
    a = 0.5 * 0.05 + 0.5 * -0.02
    expected = (math.exp(a) - math.exp(-1)) / (math.exp(1) - math.exp(-1))
    assert scores.augmentation_robust_score(0.05, -0.02) == pytest.approx(expected)
    assert scores.label_robust_score(-1, 1) == 0
    assert scores.label_robust_score(1, -1) == 1


def test_scores_stand_beside_soft_labels_and_are_made_of_their_own_trainings(
    toy_recipe: Recipe, tmp_path: Path
) -> None:
    results = run_grid(replace(toy_recipe, labels=("static",)), tmp_path / "run", methods=("infer",), scores=True)
    hard, static = results["rows"]
    assert "scores" not in hard
    found = static["scores"]

    def mean(set_: str, end: str) -> Any:
        return np.mean(find(results["trainings"], set_, f"{end}-toynet")["top1"]) / 100

    own, hard, bare = (mean("infer", kind) for kind in ("static-6", "hard-6", "static-6-plain"))
    augmented, plain = own - mean("random", "static-6"), bare - mean("random", "static-6-plain")
    recovery = results["teachers"]["toynet"]["top1"] / 100 - hard
    assert (found["IOR"], found["IOR_plain"]) == pytest.approx((augmented, plain), abs=2e-5)
    assert found["HLR"] == pytest.approx(recovery, abs=2e-4)
    assert found["LRS"] == pytest.approx(scores.label_robust_score(augmented, recovery), abs=2e-4)
    assert found["ARS"] == pytest.approx(scores.augmentation_robust_score(augmented, plain), abs=2e-5)


def test_the_papers_numbers_are_in_order() -> None:
    assert paper.PAPER["cifar100", 10, "infer", "static", "resnet18"] == (45.2, 0.04)
    assert paper.PAPER["imagenet", 50, "gvbsm", "dynamic", "resnet101"] == (61.0, 0.4)
    assert ("tiny-imagenet", 10, "sre2l", "dynamic", "resnet18") not in paper.PAPER
    assert len(paper.PAPER) == 18 + 24 + 14 + 42 + 24 + 24
    for (dataset, ipc, method, kind, student), (mean, _) in paper.PAPER.items():
        if method == "infer" and student == "resnet18":
            assert EXPECTED[f"infer-{dataset}-ipc{ipc}"][kind] == mean


TEXTS = st.lists(st.lists(st.text(max_size=12), min_size=3, max_size=3), min_size=1, max_size=5)


@given(TEXTS)
def test_csv_reads_back_as_it_was(rows: list[list[str]]) -> None:
    rows = [[text.replace("\r", "").replace("\0", "") for text in row] for row in rows]
    text = markup.to_csv(rows[0], rows[1:])
    assert list(csv.reader(io.StringIO(text, newline=""))) == rows


@given(TEXTS)
def test_markdown_and_latex_have_a_line_for_each_row_and_no_cell_breaks_out(rows: list[list[str]]) -> None:
    lines = markup.to_markdown(rows[0], rows[1:]).splitlines()
    assert len(markup.to_markdown(rows[0], rows[1:]).split("\n")) == len(rows) + 2
    assert all(line.replace(r"\|", "").count("|") == 4 for line in lines[:1] + lines[2:] if "\\" not in line)
    latex = markup.to_latex(rows[0], rows[1:]).split("\n")
    assert len(latex) == len(rows) + 6
    for line in (latex[2], *latex[4:-3]):
        assert line.removesuffix(r" \\").replace(r"\&", "").count("&") == 2


@pytest.mark.slow
def test_the_whole_grid_runs_on_digits_by_images_and_by_bytes(tmp_path: Path) -> None:
    recipe = replace(smoke(find_recipe("digits")), labels=("hard", "static", "replayed", "dynamic"))
    for budget in ("ipc", "bytes"):
        grid = {"methods": tuple(METHODS), "ipc": (2, 3), "budget": budget, "scores": budget == "ipc"}
        rows = run_grid(recipe, tmp_path / "run", **grid)["rows"]
        assert {(r["method"], r["ipc"], r["labels"]) for r in rows} == {
            (method, ipc, kind) for method in METHODS for ipc in (2, 3) for kind in recipe.labels
        }
        assert not [row for row in rows if "error" in row]
        assert all(0 <= row["mean"] <= 100 for row in rows)


def test_the_same_method_twice_under_two_names_is_refused(toy_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(StillroomError, match=r"infer:steps=4, ipc 4 .*: it is the same as 'infer'; leave one"):
        run_grid(toy_recipe, tmp_path / "run", methods=("infer", "infer:steps=4"))


def test_numbers_stand_to_the_right_in_latex_and_their_minus_is_one() -> None:
    text = markup.to_latex(["method", "gain", "bytes"], [["k-center", "-1.5 ± 0.2", "30,720"], ["rded", "-", "0 (9)"]])
    assert r"\begin{tabular}{lrr}" in text
    assert r"k-center & $-$1.5 $\pm$ 0.2 & 30,720 \\" in text


def test_differences_of_nothing_are_not_negative() -> None:
    assert render._spread([-0.04, 1.0], "+") == "+0.0 ± 1.0"
    assert render._spread([-0.04, None]) == "0.0"
    assert render._spread(None) == "-"


def test_scores_without_the_random_control_are_refused(toy_recipe: Recipe) -> None:
    with pytest.raises(StillroomError, match=r"leave --no-controls out"):
        comparison_of(replace(toy_recipe, controls=False), Grid(scores=True))


def test_one_kind_of_label_that_fails_does_not_lose_the_others(
    toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory\nfor labels")

    monkeypatch.setattr(labels, "compute_label_pool", fail)
    recipe = replace(toy_recipe, labels=("hard", "static", "replayed"), seeds=(0,))
    rows = run_grid(recipe, tmp_path / "run", methods=("infer",))["rows"]
    assert [row.get("error") for row in rows] == [None, None, "no memory for labels"]
    assert json.loads((tmp_path / "run" / "comparison.json").read_text())["rows"] == rows


def test_without_features_to_compare_there_is_no_duplication_and_every_accuracy(
    toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise StillroomError("it does not end in a linear layer")

    monkeypatch.setattr(compare, "feature_duplication", fail)
    rows = run_grid(replace(toy_recipe, labels=("hard",), seeds=(0,)), tmp_path / "run", methods=("infer",))["rows"]
    assert [(row["duplication"], "mean" in row) for row in rows] == [(None, True)]


def test_a_grid_grows_by_a_method_that_its_directory_has_never_heard_of(toy_recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(toy_recipe, labels=("hard",), seeds=(0,))
    run_grid(recipe, tmp_path / "run", methods=("random",))
    path = tmp_path / "run" / "config.json"
    stored = json.loads(path.read_text())
    del stored["settings"]["herding"], stored["sha256"]
    path.write_text(json.dumps(stored))
    assert len(run_grid(recipe, tmp_path / "run", methods=("random", "herding"))["rows"]) == 2
    assert "herding" in json.loads(path.read_text())["settings"]


def test_without_methods_the_recipe_s_own_stands_beside_random_images(toy_recipe: Recipe) -> None:
    assert comparison_of(replace(toy_recipe, method="herding"), Grid()).methods == ("random", "herding")
    assert comparison_of(replace(toy_recipe, method="random"), Grid()).methods == ("random",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "herding", "--grid.methods", "infer"], "--method herding is not looked at beside --grid.methods"),
        (["--ipc", "3", "--grid.ipc", "4", "5"], "--ipc 3 is not looked at beside --grid.ipc"),
        (["--grid.scores", "--labels", "hard"], "grid.scores are of soft labels"),
    ],
)
def test_what_would_be_ignored_is_refused(
    toy_recipe: Recipe, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert cli.main(["compare", "toy", *words, "--dry-run"]) == cli.USAGE
    assert message in capsys.readouterr().err


def test_a_budget_by_bytes_is_checked_by_its_images_and_not_by_its_number(toy_recipe: Recipe) -> None:
    """23 of 24 images per class; as bytes, naturals alone have more ipc than there are images."""
    recipe = replace(toy_recipe, ipc=23, labels=("hard",))
    comparison = comparison_of(recipe, Grid(methods=("infer:compensators=false",), budget="bytes"))
    (entry,), refused = grid.plan_entries(comparison, load_real(recipe.data))
    assert refused == []
    assert entry.recipe.ipc > 24


def test_dynamic_labels_count_in_the_paper_s_ratio_and_in_no_other(toy_recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(toy_recipe, labels=("hard", "dynamic"), seeds=(0,))
    hard, dynamic = run_grid(recipe, tmp_path / "run", methods=("random",))["rows"]
    assert dynamic["bytes"]["raw_ratio"] == hard["bytes"]["raw_ratio"]
    taken = dynamic["dynamic_label_bytes"] / dynamic["bytes"]["real_stored_bytes"]
    assert dynamic["bytes"]["paper_ratio"] == pytest.approx(hard["bytes"]["paper_ratio"] + taken, abs=2e-6)
    assert hard["std"] is None


def test_who_labels_is_a_variant_and_shares_the_set(
    toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Table 6 in one table: one distillation, labels and controls of their own."""
    monkeypatch.setitem(NETWORKS, "other", NETWORKS["toynet"])
    networks = replace(toy_recipe.teachers, networks=("toynet", "other"))
    recipe = replace(toy_recipe, teachers=networks, labels=("static",), seeds=(0,))
    methods = ("infer", "infer:labelled_by=[other]", "infer:labelled_by=[toynet]")
    results = run_grid(recipe, tmp_path / "run", methods=methods)
    assert [row["method"] for row in results["rows"]] == list(methods)
    assert sorted(path.name for path in (tmp_path / "run" / "sets").iterdir()) == ["infer-ipc4", "random-ipc4"]
    assert sum((t["set"], t["labels"]) == ("random", "static") for t in results["trainings"].values()) == 6
    with pytest.raises(StillroomError, match="labelled_by names 'third', which is not among the teachers"):
        run_grid(recipe, tmp_path / "run", methods=("infer:labelled_by=[third]",))


def test_a_set_that_is_there_already_stands_in_the_table_beside_random_images(
    toy_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = replace(toy_recipe, labels=("static",), seeds=(0,))
    made = run_grid(recipe, tmp_path / "made", methods=("infer",))["rows"][0]
    folder = tmp_path / "made" / "sets" / "infer-ipc4"
    (row,) = run_grid(recipe, tmp_path / "run", methods=(f"set:{folder}",))["rows"]
    for name in ("top1", "differences", "bytes", "duplication", "ipc"):
        assert row[name] == made[name]
    assert row["seconds"]["distil"] is None
    assert (row["folder"], row["set"]) == (str(folder / "distilled"), None)
    assert row["control_costs"].keys() == row["controls"].keys()
    arrays = measure_tradeoff(Study([tmp_path / "run"], StudyConfig(), Run(None)))
    random = arrays.method.tolist().index("random")
    assert [arrays.top1[random], arrays.steps[random]] == pytest.approx(
        [
            row["controls"]["random + static, equal epochs"][0],
            row["control_costs"]["random + static, equal epochs"]["steps"],
        ]
    )
    with pytest.raises(StillroomError, match=r"these cells cannot be:\n  set:.*nowhere"):
        run_grid(recipe, tmp_path / "run", methods=(f"set:{tmp_path}/nowhere",))


def test_a_set_stands_by_the_labels_that_it_came_with_too(toy_recipe: Recipe, plan: Plan, tmp_path: Path) -> None:
    """Labels that say the wrong class to every image: students of them and of the comparison's must differ."""
    student = replace(toy_recipe.student, train=replace(toy_recipe.student.train, epochs=12))
    recipe = replace(toy_recipe, labels=("hard", "static"), seeds=(0,), student=student, controls=False)
    hard, static = run_grid(recipe, tmp_path / "made", methods=("infer",))["rows"]
    mine = load_distilled(tmp_path / "made/sets/infer-ipc4/distilled")
    wrong = (mine.labels[mine.view_table()[:, 0]] + 1) % 4
    logits = 40.0 * torch.nn.functional.one_hot(wrong, 4).half()
    mine.with_labels(logits).save(tmp_path / "published")
    results = run_grid(recipe, tmp_path / "run", methods=(f"theirs=set:{tmp_path}/published",))
    rows = {(row["method"], row["labels"]): row for row in results["rows"]}
    own = rows.pop(("theirs, its own labels", "static"))
    assert [rows["theirs", kind]["top1"] for kind in ("hard", "static")] == [hard["top1"], static["top1"]]
    assert own["top1"] < static["top1"]
    assert own["over_hard"][0] == pytest.approx(own["top1"][0] - hard["top1"][0])
    assert own["bytes"]["raw"] == static["bytes"]["raw"]
    assert {(row["base"], row["fingerprint"]) for row in results["rows"]} == {("infer", mine.fingerprint)}
    published = load_distilled(tmp_path / "published")
    apart = students.evaluate(published, load_real(recipe.data), student, (0,), plan, Run())
    assert own["top1"] == [round(100 * v, 3) for v in apart.top1]


def test_labels_that_a_set_came_with_and_no_row_has_are_told_of(
    toy_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = replace(toy_recipe, labels=("static",), seeds=(0,))
    with Run(tmp_path / "made") as run:
        pipeline.make_recipe_set(recipe, run)
    ready = f"set:{tmp_path}/made"
    run_grid(replace(recipe, labels=("hard",)), tmp_path / "run", methods=(ready,))
    assert "no row has the static labels that it came with, since only hard" in capsys.readouterr().err


def test_a_set_that_is_there_has_random_images_of_its_bytes_beside_it(toy_recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(toy_recipe, labels=("static",), seeds=(0,))
    run_grid(recipe, tmp_path / "made", methods=("infer",))
    (row,) = run_grid(recipe, tmp_path / "run", methods=(f"mine=set:{tmp_path}/made/sets/infer-ipc4",), budget="bytes")[
        "rows"
    ]
    held = sum(row["bytes"]["raw"].values())
    each = 4 * (3 * 8 * 8 + 2 * 4)  # classes, and a random image's pixels and static label
    assert row["ipc"] == held // each
    assert row["matched_ipc"] == 4
    assert row["byte_budget"] == row["ipc"] * each
    assert len(load_distilled(tmp_path / f"run/sets/random-ipc{row['ipc']}/distilled").images) == 4 * row["ipc"]


def test_another_draw_of_a_set_has_random_images_of_its_draw_beside_it(toy_recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(toy_recipe, labels=("hard",), seeds=(0,))
    results = run_grid(recipe, tmp_path / "run", methods=("infer", "again=infer:distill_seed=1"))
    assert [row["method"] for row in results["rows"]] == ["infer", "again"]
    prints = {path.name: load_distilled(path / "distilled").fingerprint for path in (tmp_path / "run/sets").iterdir()}
    assert len(set(prints.values())) == len(prints) == 4  # each draw's own random images
    with pytest.raises(StillroomError, match=r"distill_seed '-1'; give a whole number"):
        grid.read_method("infer:distill_seed=-1", recipe)


def test_students_on_all_real_images_are_trained_where_the_grid_asks_or_a_teacher_is_one(
    toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NETWORKS, "other", NETWORKS["toynet"])
    recipe = replace(toy_recipe, labels=("static",), seeds=(0,))
    known = run_grid(recipe, tmp_path / "run", methods=("random",), students=("toynet", "other"))
    assert known["real"].keys() == {"toynet"}
    assert 100 * known["real"]["toynet"] == pytest.approx(known["teachers"]["toynet"]["top1"], abs=0.01)
    assert "real images, trained as teachers are: toynet " in (tmp_path / "run/table.md").read_text()
    asked = run_grid(recipe, tmp_path / "run", methods=("random",), students=("toynet", "other"), real=True)
    assert asked["real"].keys() == {"toynet", "other"}


def test_every_difference_and_the_protocol_stand_in_the_table(toy_recipe: Recipe, tmp_path: Path) -> None:
    results = run_grid(replace(toy_recipe, labels=("static",)), tmp_path / "run", methods=("infer",))
    header, (row,) = render.table_of(results)
    shown = {name: text for name, text in zip(header, row, strict=True) if name in render.CONTROLS}
    for name, (mean, std) in results["rows"][0]["differences"].items():
        column = f"vs {name}" if "hard" in name else f"vs {name.replace(' + static', '')}"
        assert shown.pop(column) == render._spread([mean, std], "+")
    assert shown == {}
    assert "protocol: own" in (tmp_path / "run" / "table.md").read_text()


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "tiny-imagenet", "imagenet"])
def test_a_grid_on_a_preset_compares_all_methods_by_their_own_settings_for_that_dataset(dataset: str) -> None:
    methods = ("infer", "sre2l", "cda", "gvbsm", "rded")
    for name, recipe in RECIPES.items():
        if name.startswith(tuple(f"{method}-{dataset}-" for method in methods)):
            for method in methods:
                preset = find_recipe(f"{method}-{dataset}-ipc10")
                assert getattr(recipe, method) == getattr(preset, method), (name, method)


def test_a_plain_grid_on_a_preset_shows_every_number_of_the_paper_for_its_cells() -> None:
    shown = set()
    for dataset, ipc, method, kind, student in paper.PAPER:
        infer = find_recipe(f"infer-{dataset}-ipc{ipc}")
        entry = grid.Entry(method, method, ipc, grid.read_method(method, infer))
        if compare.paper_number(entry, kind, replace(infer.student, network=student), FACTS[dataset]):  # type: ignore[arg-type]
            shown.add((dataset, ipc, method, kind, student))
    assert shown == set(paper.PAPER)


def test_cells_by_learned_labels_and_by_bytes_that_cannot_be_are_refused(toy_recipe: Recipe, tmp_path: Path) -> None:
    for labels_, options, message in (
        (("static", "learned"), {"methods": ("random", "infer")}, "learned labels: no method or set of the grid"),
        (("hard",), {"methods": ("mine=set:nowhere",)}, "mine: .*nowhere"),
    ):
        with pytest.raises(StillroomError, match=f"these cells cannot be:\n  {message}"):
            run_grid(replace(toy_recipe, labels=labels_), tmp_path / "run", **options)  # type: ignore[arg-type]


def test_sets_that_are_there_are_compared_by_hard_labels_without_any_teacher(
    toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(toy_recipe, labels=("hard",), seeds=(0,))
    run_grid(recipe, tmp_path / "made", methods=("random",))
    monkeypatch.setattr(compare, "load_teachers", lambda *_: pytest.fail("teachers were asked for"))
    run_grid(recipe, tmp_path / "run", methods=(f"set:{tmp_path}/made/sets/random-ipc4",))


CHANGED = {"infer": ("infer:steps=3",), "gvbsm": ("gvbsm:steps=3",), "rded": ("rded:candidates=3",)}


def test_published_numbers_stand_beside_the_published_cells_alone(toy_recipe: Recipe) -> None:
    toy = load_real(toy_recipe.data)
    cifar = replace(toy, class_names=FACTS["cifar100"].class_names, image_size=32)
    for name, labels_of, expected in (
        ("infer-cifar100-ipc10", "static", [45.2, 0.04]),
        ("gvbsm-cifar100-ipc10", "dynamic", [59.5, None]),
        ("rded-cifar100-ipc10", "dynamic", [42.6, None]),
        ("gvbsm-cifar100-ipc10", "static", None),
    ):
        recipe = find_recipe(name)
        entry = grid.Entry(recipe.method, recipe.method, 10, recipe)
        assert compare.paper_number(entry, labels_of, recipe.student, cifar) == expected
        spelt = replace(entry, name=f"{recipe.method}:spelt")
        assert compare.paper_number(spelt, labels_of, recipe.student, cifar) == expected
        changed = replace(entry, recipe=grid.read_method(*CHANGED[recipe.method], recipe))
        assert compare.paper_number(changed, labels_of, recipe.student, cifar) is None
    infer = find_recipe("infer-cifar100-ipc10")
    random = grid.Entry("random", "random", 10, replace(infer, method="random"))
    assert compare.paper_number(random, "hard", infer.student, cifar) == [15.8, 0.2]


def test_the_papers_ablations_stand_beside_fewer_teachers_of_compensators_or_labels() -> None:
    """Its Tables 3 and 6, where nothing else differs from the preset."""
    infer, real = find_recipe("infer-cifar100-ipc10"), FACTS["cifar100"]
    first, second = infer.teachers.networks[:2]
    for method, expected in (
        (f"infer:teachers=[{first}]", [38.1, 1.7]),
        (f"infer:teachers=[{first},{second}]", [46.2, 0.4]),
        (f"infer:labelled_by=[{first},{second}]", [53.2, 1.0]),
        (f"infer:teachers=[{second}]", None),
        (f"infer:teachers=[{first}],labelled_by=[{first}]", None),
        (f"infer:teachers=[{first}],steps=3", None),
        (f"sre2l:labelled_by=[{first}]", None),
    ):
        entry = grid.Entry(method, method, 10, grid.read_method(method, infer))
        assert compare.paper_number(entry, "dynamic", infer.student, real) == expected  # type: ignore[arg-type]


def test_naturals_are_trained_on_once_as_a_control_and_as_a_set_without_compensators(
    toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(toy_recipe, labels=("static",), seeds=(0,))
    before = run_grid(recipe, tmp_path / "run", methods=("infer",))["trainings"]
    monkeypatch.setattr(labels, "ensemble_logits", lambda *_: pytest.fail("labelled again"))
    grown = run_grid(recipe, tmp_path / "run", methods=("infer", "infer:compensators=false"))["trainings"]
    naturals = find(before, "naturals", "static-3-toynet")
    assert (
        find(grown, "infer-compensators-false-" + compare.slug("infer:compensators=false")[-6:], "static-3-toynet")[
            "seconds"
        ]
        == naturals["seconds"]
    )


def test_a_control_that_fails_is_marked_and_takes_nothing_else_with_it(
    toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = compare.Work.train

    def fail_random(work: compare.Work, cell: Any, plain: bool = False) -> Any:
        if cell.set == "random" and cell.labels == "static":
            raise StillroomError("its unit is damaged")
        return train(work, cell, plain)

    monkeypatch.setattr(compare.Work, "train", fail_random)
    recipe = replace(toy_recipe, labels=("static",), seeds=(0,))
    results = run_grid(recipe, tmp_path / "run", methods=("infer",))
    (row,) = results["rows"]
    assert row["failed"]["random + static, equal steps"] == "its unit is damaged"
    header, (texts,) = render.table_of(results)
    shown = dict(zip(header, texts, strict=True))
    assert (shown["vs random, equal steps"], shown["vs random + hard, equal steps"][0]) == ("failed", "+")
    assert shown["top-1"] == f"{row['mean']:.1f}"


def lost_controls(row: dict[str, Any]) -> set[str]:
    header, (texts,) = render.table_of({"rows": [row], "protocol": "own"})
    lost = {name for name, text in zip(header, texts, strict=True) if text == "failed"}
    reached = {name.removeprefix("vs ") for name in render.CONTROLS}
    assert lost & reached == {name.removeprefix("vs ") for name in lost & render.CONTROLS.keys()}
    return lost - reached


def test_a_row_stands_where_random_images_cannot_be_read_back(toy_recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(toy_recipe, labels=("static",), seeds=(0,))
    (before,) = run_grid(recipe, tmp_path / "run", methods=("infer",))["rows"]
    (images,) = (tmp_path / "run/sets/random-ipc4/distilled").glob("images-*")
    images.write_bytes(images.read_bytes()[:-1] + b"!")
    (row,) = run_grid(recipe, tmp_path / "run", methods=("infer",))["rows"]
    assert (row["top1"], row["bytes"]) == (before["top1"], before["bytes"])
    assert "was changed after it was written" in row["failed"]["controls"]
    assert lost_controls(row) == set(render.CONTROLS)


def test_a_damaged_measure_of_duplication_is_made_anew_and_leaves_no_empty_cell(
    toy_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = replace(toy_recipe, labels=("hard",), seeds=(0,))
    (before,) = run_grid(recipe, tmp_path / "run", methods=("infer",))["rows"]
    (unit,) = (tmp_path / "run/units").glob("duplication-*.json")
    unit.write_bytes(unit.read_bytes().replace(b"0.", b"1.", 1))
    (row,) = run_grid(recipe, tmp_path / "run", methods=("infer",))["rows"]
    assert row["duplication"] == before["duplication"] is not None


def test_a_row_stands_where_a_control_cannot_be_labelled(
    toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach = pipeline.attach_labels

    def fail_random(distilled: Any, kind: str, *rest: Any) -> Any:
        if distilled.manifest.method == "random" and kind == "static":
            raise StillroomError("its labels are not finite")
        return attach(distilled, kind, *rest)

    monkeypatch.setattr(pipeline, "attach_labels", fail_random)
    recipe = replace(toy_recipe, labels=("static",), seeds=(0,))
    (row,) = run_grid(recipe, tmp_path / "run", methods=("infer",))["rows"]
    assert lost_controls(row) == {"vs random, equal epochs", "vs random, equal steps"}
    assert row["differences"]["naturals + static, equal steps"]


@pytest.mark.parametrize("part", ["reference", "plain"])
def test_a_row_stands_where_its_scores_cannot_be_made_and_the_exit_code_tells(
    toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train, load = compare.Work.train, compare.load_teachers

    def fail_plain(work: compare.Work, cell: Any, plain: bool = False) -> Any:
        if plain:
            raise StillroomError("it went astray")
        return train(work, cell, plain)

    def fail_reference(real: Any, config: Any, *rest: Any) -> Any:
        if config.networks != toy_recipe.teachers.networks:
            raise StillroomError("it went astray")
        return load(real, config, *rest)

    monkeypatch.setitem(NETWORKS, "other", NETWORKS["toynet"])
    if part == "plain":
        monkeypatch.setattr(compare.Work, "train", fail_plain)
    monkeypatch.setattr(compare, "load_teachers", fail_reference if part == "reference" else load)
    words = ["compare", "toy", "--labels", "static", "--seeds", "0", "--grid.methods", "infer", "--grid.scores"]
    words += ["--grid.students", "other", "--out", str(tmp_path / "run")]
    assert cli.main(words) == cli.FAILED
    static = json.loads((tmp_path / "run/comparison.json").read_text())["rows"][-1]
    assert "it went astray" in static["failed"]["scores"]
    assert static["mean"] > 0
    assert {"LRS", "ARS", "HLR", "IOR"} <= lost_controls(static)
    assert "failed: scores, of infer" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("error", [MemoryError("no room"), ValueError("overlooked"), ZeroDivisionError("division")])
def test_whatever_a_method_fails_of_the_other_cells_stand(
    toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setitem(METHODS, "herding", replace(METHODS["herding"], distill=fail))
    recipe = replace(toy_recipe, labels=("hard",), seeds=(0,))
    herding, random = run_grid(recipe, tmp_path / "run", methods=("herding", "random"))["rows"]
    assert herding["error"] == str(error)
    assert random["mean"] > 0


def test_ready_sets_without_controls_leave_no_folder_of_sets(toy_recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(toy_recipe, labels=("hard",), seeds=(0,), controls=False)
    run_grid(recipe, tmp_path / "made", methods=("random",))
    ready = f"set:{tmp_path}/made/sets/random-ipc4"
    (row,) = run_grid(recipe, tmp_path / "run", methods=(ready,))["rows"]
    assert row["mean"] > 0
    assert not (tmp_path / "run/sets").exists()


def stop_at(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let a comparison reach its time limit when it is the turn of the set of this name."""
    compare_entry = compare.compare_entry

    def stop(entry: grid.Entry, work: compare.Work) -> Any:
        if entry.name == name:
            raise TimeLimitReached("time limit")
        return compare_entry(entry, work)

    monkeypatch.setattr(compare, "compare_entry", stop)


def test_finished_rows_stay_in_the_tables_while_a_grown_grid_is_under_way(
    toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(toy_recipe, labels=("hard",), seeds=(0,))
    before = run_grid(recipe, tmp_path / "run", methods=("random", "infer"))["rows"]
    stop_at(monkeypatch, "random")
    with pytest.raises(TimeLimitReached):
        run_grid(recipe, tmp_path / "run", methods=("herding", "random", "infer"))
    herding, *others = json.loads((tmp_path / "run/comparison.json").read_text())["rows"]
    assert herding["method"] == "herding"
    assert [row["top1"] for row in others] == [row["top1"] for row in before]
    with pytest.raises(TimeLimitReached):  # rows of fewer seeds would be others
        run_grid(replace(recipe, seeds=(0, 1)), tmp_path / "run", methods=("herding", "random", "infer"))
    assert len(json.loads((tmp_path / "run/comparison.json").read_text())["rows"]) == 1


def test_each_row_bears_the_protocol_that_it_was_made_by(
    toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A protocol that prescribes who labels is not that of a variant which others label."""
    students_ = dict.fromkeys(("cifar", "tiny", "imagenet"), toy_recipe.student)
    monkeypatch.setitem(protocols.PROTOCOLS, "mine", protocols.Protocol(students_, ("static",), ("toynet",)))  # type: ignore[misc, arg-type]
    monkeypatch.setitem(NETWORKS, "other", NETWORKS["toynet"])
    networks = replace(toy_recipe.teachers, networks=("toynet", "other"))
    recipe = replace(toy_recipe, teachers=networks, labels=("static",), seeds=(0,), labelled_by=("toynet",))
    results = run_grid(recipe, tmp_path / "run", methods=("random", "random:labelled_by=[other]"))
    assert [row["protocol"] for row in results["rows"]] == ["mine", "own"]
    header, texts = render.table_of(results)
    assert [row[header.index("protocol")] for row in texts] == ["mine", "own"]
    assert "protocol: mine, own" in (tmp_path / "run/table.md").read_text()


def test_a_second_time_no_image_is_encoded(toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(toy_recipe, labels=("static",), seeds=(0,))
    (before,) = run_grid(recipe, tmp_path / "run", methods=("infer",))["rows"]
    monkeypatch.setattr(distilled, "encode_picture", lambda *_: pytest.fail("encoded again"))
    (row,) = run_grid(recipe, tmp_path / "run", methods=("infer",))["rows"]
    assert row["bytes"] == before["bytes"]


def test_a_teachers_statistics_are_gathered_once_for_all_budgets(toy_recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(smoke(toy_recipe), teachers=toy_recipe.teachers, student=toy_recipe.student, labels=("hard",))
    run_grid(recipe, tmp_path / "run", methods=("gvbsm",), ipc=(2, 3))
    assert len(list((tmp_path / "run/units").glob("statistics-*"))) == 1
    assert not list((tmp_path / "run/sets").glob("*/units/statistics-*"))


def test_images_are_ranked_once_for_all_budgets(toy_recipe: Recipe, tmp_path: Path) -> None:
    """And the first of a ranking are what the smaller budget alone would take."""
    methods = ("herding", "k_center", "rded")
    recipe = replace(smoke(toy_recipe), teachers=toy_recipe.teachers, student=toy_recipe.student, labels=("hard",))
    run_grid(recipe, tmp_path / "run", methods=methods, ipc=(3, 2))
    for method in methods:
        assert len(list((tmp_path / "run/units").glob(f"{method}-*"))) == 1
        with Run(tmp_path / method) as run:
            pipeline.make_recipe_set(replace(recipe, method=method, ipc=2), run)
        alone, shared = (
            load_distilled(folder / "distilled") for folder in (tmp_path / method, tmp_path / f"run/sets/{method}-ipc2")
        )
        assert torch.equal(alone.images, shared.images)


def test_soft_labels_stand_beside_the_hard_ones_of_the_same_set_in_whatever_order(
    toy_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = replace(toy_recipe, labels=("static", "hard"))
    results = run_grid(recipe, tmp_path / "run", methods=("random", "infer"))
    for static, hard in zip(results["rows"][::2], results["rows"][1::2], strict=True):
        assert (static["labels"], hard["labels"], static["method"]) == ("static", "hard", hard["method"])
        gains = np.array(static["top1"]) - np.array(hard["top1"])
        assert static["over_hard"] == pytest.approx([np.mean(gains), np.std(gains, ddof=1)], abs=2e-3)
        assert "over_hard" not in hard


def test_each_seed_has_its_column_for_machines_and_the_caption_says_of_what_the_spread_is(
    toy_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = replace(toy_recipe, labels=("static",), seeds=(3, 5))
    (row,) = run_grid(recipe, tmp_path / "run", methods=("infer",))["rows"]
    (record,) = csv.DictReader((tmp_path / "run/table.csv").read_text().splitlines())
    for place, seed in enumerate((3, 5)):
        assert float(record[f"top1.seed{seed}"]) == row["top1"][place]
        assert float(record[f"top5.seed{seed}"]) == row["top5"][place]
    assert float(record["holds.images_per_class"]) == 3
    caption = (tmp_path / "run/table.md").read_text().splitlines()[0]
    assert "of students on one draw of each set" in caption
    assert "Teachers: toynet " in caption


def test_what_a_set_uses_of_its_byte_budget_is_shown(toy_recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(toy_recipe, labels=("static",), seeds=(0,))
    results = run_grid(recipe, tmp_path / "run", methods=("random", "infer"), budget="bytes")
    random, infer = results["rows"]
    assert infer["byte_budget"] == sum(random["bytes"]["raw"].values())
    share = sum(infer["bytes"]["raw"].values()) / infer["byte_budget"]
    assert 0.5 < share < 1
    header, texts = render.table_of(results)
    place = header.index("byte budget")
    budget = f"{infer['byte_budget']:,}"
    assert [(row[1], row[place]) for row in texts] == [
        ("4", f"100% of {budget}"),
        (f"4 (as bytes: {infer['matched_ipc']})", f"{share:.0%} of {budget}"),
    ]


def test_what_the_table_before_had_and_this_command_does_not_name_is_told_of(
    toy_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = replace(toy_recipe, labels=("hard", "static"), seeds=(0, 1))
    run_grid(recipe, tmp_path / "run", methods=("random", "infer"), ipc=(3, 4))
    told = capsys.readouterr().err
    assert "not in this table" not in told
    assert "(kept)" not in told
    run_grid(replace(recipe, labels=("hard",), seeds=(0,)), tmp_path / "run", methods=("random",), ipc=(4,))
    told = capsys.readouterr().err
    assert "in the one before it: methods infer; ipc 3; labels static; seeds 1. A table has" in told
    assert "random, ipc 4, hard, toynet: " in told
    assert told.count("(kept)") == 1


def test_a_damaged_table_is_written_anew(toy_recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(toy_recipe, labels=("hard",), seeds=(0,))
    before = run_grid(recipe, tmp_path / "run", methods=("random",))
    path = tmp_path / "run/comparison.json"
    path.write_bytes(path.read_bytes()[:-9])
    assert without_times(run_grid(recipe, tmp_path / "run", methods=("random",))) == without_times(before)


def test_students_of_the_grid_have_rows_of_their_own_and_unknown_ones_are_refused(
    toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NETWORKS, "other", NETWORKS["toynet"])
    recipe = replace(toy_recipe, labels=("hard",), seeds=(0,))
    rows = run_grid(recipe, tmp_path / "run", methods=("random",), students=("toynet", "other"))["rows"]
    assert [row["student"] for row in rows] == ["toynet", "other"]
    with pytest.raises(StillroomError, match="student nobody: "):
        run_grid(recipe, tmp_path / "run", methods=("random",), students=("nobody",))


@pytest.mark.parametrize("text", ["random=herding", "naturals=infer", "real=random", "herding=random"])
def test_a_set_cannot_have_the_name_of_another(text: str) -> None:
    """Controls are kept by theirs."""
    with pytest.raises(StillroomError, match=r"which is another set's name; give another"):
        Grid(methods=(text,))


def pooled(recipe: Recipe, folder: Path, epochs: int) -> str:
    """A set with compensators and replayed labels of so many epochs, as a grid asks for it."""
    own = replace(recipe, labels=("replayed",), pool=PoolConfig(epochs=epochs))
    with Run(folder) as run:
        pipeline.make_recipe_set(own, run)
    return f"set:{folder}"


def test_sets_of_equal_images_with_labels_of_their_own_are_trained_apart(toy_recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(toy_recipe, labels=("static",), seeds=(0,), controls=False)
    run_grid(recipe, tmp_path / "made", methods=("infer",))
    mine = load_distilled(tmp_path / "made/sets/infer-ipc4/distilled")
    for number in range(2):
        mine.with_labels(torch.full((mine.view_count, 4), float(number)).half()).save(tmp_path / f"p{number}")
    methods = tuple(f"p{number}=set:{tmp_path}/p{number}" for number in range(2))
    rows = run_grid(recipe, tmp_path / "run", methods=methods)["rows"]
    assert [row.get("error") for row in rows] == [None] * 4
    assert len(list((tmp_path / "run/units").glob("student-*"))) == 3  # the table's labels once, and two sets' own


def test_controls_by_the_pool_of_a_set_are_not_those_by_the_pool_of_the_table(
    toy_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = replace(toy_recipe, seeds=(0,))
    ready = pooled(recipe, tmp_path / "made", 1)
    asked = replace(recipe, labels=("replayed",), pool=PoolConfig(epochs=3))
    rows = run_grid(asked, tmp_path / "run", methods=(f"theirs={ready}",))["rows"]
    assert [row["method"] for row in rows] == ["theirs", "theirs, its own labels"]
    assert [row.get("failed") for row in rows] == [None, None]
    assert not any("naturals" in name for name in rows[1]["differences"])  # nobody labelled these for its batches


def test_by_bytes_a_set_is_counted_with_the_labels_of_its_row(toy_recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(toy_recipe, seeds=(0,))
    ready = pooled(recipe, tmp_path / "made", 1)
    asked = replace(recipe, labels=("replayed",), pool=PoolConfig(epochs=20))
    rows = run_grid(asked, tmp_path / "run", methods=(f"theirs={ready}",), budget="bytes")["rows"]
    real = load_real(recipe.data)
    for row, pool in zip(rows, (PoolConfig(epochs=20), PoolConfig(epochs=1)), strict=True):
        held = sum(row["bytes"]["raw"].values())
        random = [
            grid.raw_bytes(replace(asked, method="random", ipc=count, pool=pool), real, "replayed")
            for count in (row["ipc"], row["ipc"] + 1)
        ]
        assert random[0] <= held < random[1]
        assert row["byte_budget"] == random[0]


def test_a_name_given_to_another_set_does_not_show_the_numbers_of_the_first(
    toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(toy_recipe, labels=("hard",), seeds=(0,))
    run_grid(recipe, tmp_path / "run", methods=("x=infer", "herding"))
    stop_at(monkeypatch, "x")
    with pytest.raises(TimeLimitReached):
        run_grid(recipe, tmp_path / "run", methods=("herding", "x=infer:distill_seed=1"))
    rows = json.loads((tmp_path / "run/comparison.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["herding"]


def test_students_on_all_real_images_that_fail_are_told_of(
    toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NETWORKS, "other", NETWORKS["toynet"])
    load = compare.load_teachers

    def fail(real: Any, config: Any, *rest: Any) -> Any:
        if config.networks == ("other",):
            raise MemoryError("too large")
        return load(real, config, *rest)

    monkeypatch.setattr(compare, "load_teachers", fail)
    recipe = replace(toy_recipe, labels=("hard",), seeds=(0,))
    results = run_grid(recipe, tmp_path / "run", methods=("random",), students=("other",), real=True)
    assert render.failures_of(results) == ["failed: other on all real images: too large"]
    for suffix in ("md", "tex"):
        assert "other on all real images: too large" in (tmp_path / f"run/table.{suffix}").read_text()


def test_a_damaged_record_of_a_finished_set_is_written_anew(toy_recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(toy_recipe, labels=("hard",), seeds=(0,))
    (before,) = run_grid(recipe, tmp_path / "run", methods=("infer",))["rows"]
    unit = tmp_path / "run/sets/infer-ipc4/units/distilled.json"
    unit.write_bytes(unit.read_bytes()[:-5])
    (row,) = run_grid(recipe, tmp_path / "run", methods=("infer",))["rows"]
    assert (row.get("error"), row["top1"]) == (None, before["top1"])
