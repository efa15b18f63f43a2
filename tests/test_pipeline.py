"""A recipe from end to end: its table, its controls, and what an interruption does to it (nothing)."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Finished, build_toy_recipe, build_toy_teacher, draw_toy_colours, write_toy_npz

from stillroom import cli, evaluate_command, files, pipeline, students, teachers
from stillroom import run as run_module
from stillroom.compare import compare
from stillroom.compute import Plan, resolve_plan
from stillroom.data import FACTS, DataConfig, RealData, load_real
from stillroom.distilled import DistilledSet, load_distilled, verify_distilled
from stillroom.errors import StillroomError, TimeLimitReached
from stillroom.estimate import estimate_comparison, estimate_recipe
from stillroom.grid import Grid, comparison_of
from stillroom.manifest import read_manifest
from stillroom.methods import METHODS, infer
from stillroom.methods.rded import RdedConfig
from stillroom.methods.select import RandomConfig, distill_random
from stillroom.methods.sre2l import Sre2lConfig
from stillroom.networks import NETWORKS, build_network
from stillroom.pipeline import build_cells, check_recipe, doubt_budget, is_preset, run_recipe
from stillroom.recipes import EXPECTED, RECIPES, Recipe, find_recipe, smoke
from stillroom.run import Run
from stillroom.tables import show_results
from stillroom.teachers import Teacher


def results_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "results.json").read_text())


def timeless(results: dict[str, Any]) -> dict[str, Any]:
    """The results without what no two runs share."""
    cells = [{k: v for k, v in cell.items() if k != "seconds"} for cell in results["cells"]]
    return {k: v for k, v in results.items() if k != "provenance"} | {"cells": cells}


def files_of(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (directory / "distilled").iterdir()}


def test_the_table_holds_the_method_and_every_control_at_equal_epochs_and_at_equal_steps(finished: Finished) -> None:
    """24 views, 16 random images or 12 naturals in batches of 8; two epochs of static labels, one of dynamic ones."""
    cells = {(c["set"], c["labels"], c["budget"]): c["steps"] for c in results_of(finished.directory)["cells"]}
    assert cells == {
        ("infer", "static", "own"): 6,
        ("random", "hard", "equal epochs (static)"): 4,
        ("random", "hard", "equal steps (static)"): 6,
        ("random", "static", "equal epochs (static)"): 4,
        ("random", "static", "equal steps (static)"): 6,
        ("naturals", "static", "equal epochs (static)"): 3,
        ("naturals", "static", "equal steps (static)"): 6,
        ("infer", "dynamic", "own"): 3,
        ("random", "hard", "equal epochs (dynamic)"): 2,
        ("random", "hard", "equal steps (dynamic)"): 3,
        ("random", "dynamic", "equal epochs (dynamic)"): 2,
        ("random", "dynamic", "equal steps (dynamic)"): 3,
        ("naturals", "dynamic", "equal epochs (dynamic)"): 2,
        ("naturals", "dynamic", "equal steps (dynamic)"): 3,
    }


def test_results_say_what_was_done_and_what_it_cost(finished: Finished) -> None:
    results = results_of(finished.directory)
    assert results["recipe"] == "toy"
    assert results["dataset"] == {"name": "toy", "classes": 4, "train": 96, "test": 40}
    assert results["teachers"]["toynet"]["top1"] > 50
    assert results["seeds"] == [0, 1]
    assert results["settings"]["infer"]["steps"] == 4
    assert results["provenance"]["plan"]["precision"] == "float32"
    distilled = load_distilled(finished.directory / "distilled")
    assert results["bytes"]["raw"]["images"] == distilled.images.nbytes == 12 * 3 * 8 * 8
    for cell in results["cells"]:
        assert len(cell["top1"]) == 2
        assert cell["mean"] == pytest.approx(np.mean(cell["top1"]), abs=2e-3)
        assert cell["std"] == pytest.approx(np.std(cell["top1"], ddof=1), abs=2e-3)
        assert all(best >= last for best, last in zip(cell["best"], cell["top1"], strict=True))
    own = {c["labels"]: c["label_bytes"] for c in results["cells"] if c["budget"] == "own"}
    assert own == {"static": 24 * 4 * 2, "dynamic": 3 * 8 * 4 * 2}


def test_a_second_time_nothing_is_computed_and_the_results_are_the_same(
    finished: Finished, toynet: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(finished.directory, tmp_path / "run")
    monkeypatch.setenv("STILLROOM_CACHE", str(finished.directory.parent / "cache"))
    for module, name in ((infer, "optimize_compensators"), (students, "train_student"), (teachers, "fit")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("computed again"))
    with Run(tmp_path / "run") as run:
        results = run_recipe(finished.recipe, run, "toy")
    assert timeless(json.loads(json.dumps(results))) == timeless(results_of(finished.directory))


class Killed(BaseException):
    """Ends the work where it stands: nothing catches it, nothing is saved on the way out."""


def test_killed_at_any_write_and_run_again_the_results_and_the_artifact_are_the_same(
    finished: Finished, toynet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "CHECKPOINT_SECONDS", 0.0)  # a checkpoint at every step
    replace_file = files.os.replace
    writes = iter(range(10**6))

    def replace_or_die(source: Path, target: Path) -> None:
        number = next(writes)
        if number % 23 == 11:
            raise Killed  # before the new file is there
        replace_file(source, target)
        if number % 23 == 22:
            raise Killed  # just after

    monkeypatch.setattr(files.os, "replace", replace_or_die)
    kills = 0
    while True:
        with Run(tmp_path / "run") as run:
            try:
                results = run_recipe(finished.recipe, run, "toy")
                break
            except Killed:
                kills += 1
    assert kills >= 10
    assert timeless(json.loads(json.dumps(results))) == timeless(results_of(finished.directory))
    assert files_of(tmp_path / "run") == files_of(finished.directory)
    assert verify_distilled(tmp_path / "run" / "distilled") == []
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_stopped_at_every_stage_and_run_again_the_results_and_the_artifact_are_the_same(
    finished: Finished, toynet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping = iter(looks())
    monkeypatch.setattr(Run, "stopping", property(lambda self: next(stopping)))
    stops = 0
    while True:
        with Run(tmp_path / "run") as run:
            try:
                results = run_recipe(finished.recipe, run, "toy")
                break
            except TimeLimitReached:
                stops += 1
    assert stops >= 4
    assert timeless(json.loads(json.dumps(results))) == timeless(results_of(finished.directory))
    assert files_of(tmp_path / "run") == files_of(finished.directory)


def looks() -> Iterator[bool]:
    """Stop at every 29th look at the clock, and keep to it for the look that leaves."""
    while True:
        yield from [False] * 29
        yield from [True] * 2


def test_budgets_that_come_to_the_same_steps_are_trained_once_and_count_for_both(
    toy: RealData, toy_teachers: list[Teacher], plan: Plan, toy_recipe: Recipe
) -> None:
    """Or a table whose static and dynamic students train equally long would not compare the dynamic ones."""
    recipe = replace(toy_recipe, student=replace(toy_recipe.student, dynamic_epochs=2))
    distilled = distill_random(toy, toy_teachers, 6, RandomConfig(), 0, plan, Run()).with_labels(None)
    cells = build_cells(recipe, distilled, toy, toy_teachers, plan, Run())
    hard = [c.budget for c in cells if (c.set, c.labels) == ("random", "hard")]
    assert hard == [
        "equal epochs (static), equal epochs (dynamic)",
        "equal steps (static), equal steps (dynamic)",
    ]
    assert len({c.name for c in cells}) == len(cells)


def test_naturals_and_random_images_begin_with_the_same_images(toy: RealData, plan: Plan, finished: Finished) -> None:
    """The control differs from the naturals in what INFER adds, not in luck."""
    distilled = load_distilled(finished.directory / "distilled")
    real = load_real(finished.recipe.data)
    control = distill_random(real, [], 4, RandomConfig(), finished.recipe.distill_seed, plan, Run())
    assert torch.equal(control.images[: len(distilled.images)], distilled.images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ipc": 1}, "ipc 1 is too small for INFER.*the smallest that works is --ipc 2"),
        (
            {"ipc": 25},
            r"class 'red' has 24 training images, but ipc 25 needs 25 of .* lower --ipc to 24, or .* by --no-controls",
        ),
        (
            {"ipc": 25, "controls": False},
            "ipc 25 for 4 classes is a budget of 100 images, but 'toy' has only 96 training images; lower --ipc",
        ),
        ({"teachers": {"networks": ("convnet_in",)}}, "'convnet_in' has no BatchNorm.*use a network that has them"),
        ({"student": {"network": "convnte"}}, "Unknown network 'convnte'.*convnet"),
    ],
)
def test_what_cannot_be_distilled_is_refused_before_any_work_and_leaves_the_run_unbound(
    toy_recipe: Recipe, tmp_path: Path, change: dict[str, Any], message: str, own_cache: Path
) -> None:
    values = {k: replace(getattr(toy_recipe, k), **v) if isinstance(v, dict) else v for k, v in change.items()}
    with Run(tmp_path / "run") as run, pytest.raises(StillroomError, match=message):
        run_recipe(replace(toy_recipe, **values), run)
    assert not (tmp_path / "run" / "config.json").exists()
    assert not list(own_cache.iterdir())


def test_random_images_with_hard_labels_need_no_teacher_and_train_none(
    toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = replace(toy_recipe, method="random", labels=("hard",), seeds=(0,))
    assert [
        replace(bare, **change).needs_teachers for change in ({}, {"labels": ("hard", "static")}, {"method": "infer"})
    ] == [
        False,
        True,
        True,
    ]
    monkeypatch.setattr(teachers, "fit", lambda *_, **__: pytest.fail("a teacher was trained"))
    with Run(tmp_path / "run") as run:
        results = run_recipe(bare, run)
    show_results(results)
    assert "teachers, top-1: none" in capsys.readouterr().out
    assert [stage.name for stage in estimate_recipe(bare)[0]] == ["data", "images", "students, hard"]
    assert load_distilled(tmp_path / "run" / "distilled").manifest.teachers == ()


def test_teachers_are_needed_by_the_method_or_by_the_labels(
    toy_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(toy_recipe, method="herding", labels=("hard",))
    assert recipe.needs_teachers
    monkeypatch.setitem(METHODS, "herding", replace(METHODS["herding"], needs_teachers=False))
    assert not recipe.needs_teachers
    assert replace(recipe, labels=("hard", "static")).needs_teachers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: made, None),
        (
            lambda made: replace(made, images=made.images[:4], labels=made.labels[:4], slots=made.slots[:4]),
            r"'herding' made a set .*images=4, .*content in METHODS it holds .*images=16, .*; mend",
        ),
        (lambda made: replace(made, manifest=replace(made.manifest, method="rded")), "made a set of 'rded' that holds"),
    ],
)
def test_a_method_that_makes_another_set_than_it_says_is_refused(
    toy_recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[DistilledSet], DistilledSet],
    message: str | None,
) -> None:
    row = METHODS["herding"]
    monkeypatch.setitem(METHODS, "herding", replace(row, distill=lambda *given: change(row.distill(*given))))
    recipe = replace(toy_recipe, method="herding", labels=("static",), seeds=(0,), controls=False)
    with pytest.raises(StillroomError, match=message) if message else contextlib.nullcontext():
        run_recipe(recipe, Run())


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_names_networks_that_exist_and_has_a_tiny_twin(name: str) -> None:
    recipe = find_recipe(name)
    twin = smoke(recipe)
    assert twin.ipc == 2
    assert json.dumps(asdict(recipe))
    assert set(EXPECTED.get(name, {})) <= set(recipe.labels)
    assert name in EXPECTED or not name.startswith(("infer-", "rded-"))
    assert name not in EXPECTED or name.startswith(f"{recipe.method}-")
    with torch.device("meta"):
        for network in {*recipe.teachers.networks, recipe.student.network, *twin.teachers.networks}:
            build_network(network, 10, 32)


def test_one_teacher_makes_compensators_and_another_labels(
    toy_recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Tables 3 and 6: what each is good for. A finished set is read back, since its teachers are all still there."""
    monkeypatch.setitem(NETWORKS, "other", NETWORKS["toynet"])
    recipe = replace(
        toy_recipe, teachers=replace(toy_recipe.teachers, networks=("toynet", "other")), seeds=(0,),
        infer=replace(toy_recipe.infer, teachers=("toynet",)), labelled_by=("other",),
    )  # fmt: skip
    asked: list[list[str]] = []
    original = pipeline.attach_labels

    def attach(distilled: Any, kind: str, teachers: list[Teacher], *rest: Any) -> Any:
        asked.append([teacher.name for teacher in teachers])
        return original(distilled, kind, teachers, *rest)

    monkeypatch.setattr(pipeline, "attach_labels", attach)
    for _ in range(2):
        with Run(tmp_path / "run") as run:
            results = run_recipe(recipe, run)
    assert asked
    assert all(names == ["other"] for names in asked)
    manifest = read_manifest(tmp_path / "run" / "distilled")
    assert [teacher.name for teacher in manifest.teachers] == ["toynet"]
    assert set(results["teachers"]) == {"toynet", "other"}


# Recipes of different budgets or data often have the same twin.
TWINS = {json.dumps(asdict(replace(smoke(recipe), data=DataConfig()))): name for name, recipe in RECIPES.items()}


@pytest.mark.parametrize("name", TWINS.values())
def test_every_recipe_s_tiny_twin_runs_on_other_data(tmp_path: Path, name: str) -> None:
    toy_recipe = build_toy_recipe(write_toy_npz(tmp_path / "toy.npz"))
    twin = smoke(find_recipe(name))
    limit = getattr(twin.method_config, "shift_limit", 0)  # ImageNet's 32 pixels are more than a toy image has
    settings = {twin.method: replace(twin.method_config, shift_limit=4)} if limit > 4 else {}
    twin = replace(twin, data=toy_recipe.data, compute=toy_recipe.compute, controls=False, ipc=3, **settings)
    longer = replace(twin.teachers, epochs=8, batch_size=16, learning_rate=0.05)
    results = run_recipe(replace(twin, teachers=longer), Run())
    assert [c["labels"] for c in results["cells"]] == list(twin.labels)
    assert all(0 <= accuracy <= 100 for cell in results["cells"] for accuracy in cell["top1"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ipc": 0}, "ipc is 0"),
        ({"seeds": ()}, "seeds is empty"),
        ({"seeds": (1, 1)}, "seeds 1 1 has repeats"),
        ({"labels": ()}, "labels is empty"),
        ({"labelled_by": ("resnet17",)}, "labelled_by names 'resnet17', which is not among the teachers"),
        ({"labelled_by": ()}, "labelled_by is"),
        ({"labels": ("hard", "hard")}, "labels hard hard has repeats"),
    ],
)
def test_recipes_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StillroomError, match=message):
        Recipe(**settings)


def test_the_papers_number_stands_only_beside_the_papers_work(toy: RealData) -> None:
    name = "infer-cifar100-ipc10"
    recipe = find_recipe(name)
    cifar = replace(toy, class_names=FACTS["cifar100"].class_names, image_size=32)
    own_file = replace(recipe, data=replace(recipe.data, source="data/cifar100.npz"), seeds=(7,))
    assert is_preset(name, own_file, cifar)
    assert not is_preset("small", find_recipe("small"), toy)
    for other in (toy, replace(cifar, class_names=cifar.class_names[::-1]), replace(cifar, image_size=64)):
        assert not is_preset(name, recipe, other)
    for change in (
        {"data": replace(recipe.data, holdout_per_class=5)},
        {"data": replace(recipe.data, train_per_class=5)},
        {"teachers": replace(recipe.teachers, networks=("resnet18",))},
        {"teachers": replace(recipe.teachers, equal_norms=True)},
        {"infer": replace(recipe.infer, steps=999)},
        {"image_encoding": "jpeg75"},
        {"ipc": 9},
    ):
        assert not is_preset(name, replace(recipe, **change), cifar)


def test_an_unknown_recipe_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(StillroomError, match=r"no recipe 'digit'\. Did you mean 'digits'"):
        find_recipe("digit")


def test_a_damaged_set_is_refused_with_the_way_to_mend_it_and_a_deleted_one_is_made_again(
    finished: Finished, toynet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished.directory, tmp_path / "run")
    monkeypatch.setenv("STILLROOM_CACHE", str(finished.directory.parent / "cache"))
    folder = tmp_path / "run" / "distilled"
    damaged = next(folder.glob("images-*.parquet"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with Run(tmp_path / "run") as run, pytest.raises(StillroomError, match=r"Or delete the folder '.*distilled'"):
        run_recipe(finished.recipe, run, "toy")
    shutil.rmtree(folder)
    with Run(tmp_path / "run") as run:
        run_recipe(finished.recipe, run, "toy")
    assert files_of(tmp_path / "run") == files_of(finished.directory)


@pytest.mark.parametrize("deleted", [False, True])
def test_a_set_of_other_weights_is_refused_whether_its_folder_is_there_or_not(
    finished: Finished, toynet: str, tmp_path: Path, deleted: bool
) -> None:
    """The run's students were trained with the former weights' set: one made anew would be shown with their numbers."""
    shutil.copytree(finished.directory, tmp_path / "run")
    if deleted:
        shutil.rmtree(tmp_path / "run" / "distilled")
    other = [build_toy_teacher(3, "toynet")]
    real = load_real(finished.recipe.data)
    with (
        Run(tmp_path / "run") as run,
        pytest.raises(StillroomError, match=r"distilled' was made with other teachers' weights; give another"),
    ):
        pipeline.distill_recipe(finished.recipe, run, real, other, resolve_plan(finished.recipe.compute))


def test_a_set_that_was_put_in_the_place_of_the_run_s_own_is_refused(
    finished: Finished, toynet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its students were trained on the other one: relabelled in place, say."""
    shutil.copytree(finished.directory, tmp_path / "run")
    monkeypatch.setenv("STILLROOM_CACHE", str(finished.directory.parent / "cache"))
    folder = tmp_path / "run" / "distilled"
    distilled = load_distilled(folder)
    assert distilled.soft_labels is not None
    distilled.with_labels(-distilled.soft_labels).save(folder)
    with Run(tmp_path / "run") as run, pytest.raises(StillroomError, match=r"the labels in .* are not those that this"):
        run_recipe(finished.recipe, run, "toy")


def write_long_tailed(path: Path, counts: tuple[int, ...]) -> DataConfig:
    images, labels = draw_toy_colours(max(counts), 1)
    rows = np.concatenate([np.flatnonzero(labels == label)[:count] for label, count in enumerate(counts)])
    return DataConfig(str(write_toy_npz(path, train_images=images[rows], train_labels=labels[rows])))


@pytest.mark.parametrize(
    ("change", "most"),
    [
        ({"method": "random"}, "--ipc to 3"),
        ({"method": "herding"}, "--ipc to 3"),
        ({"method": "rded", "rded": RdedConfig(factor=2)}, "--ipc to 1, or add"),
        ({"method": "sre2l"}, "--ipc to 3, or leave the random control out by --no-controls"),
        ({"method": "infer", "ipc": 6}, "--ipc to 3, or add"),
        ({"method": "infer", "ipc": 6, "controls": False}, "--ipc to 4, or add"),
    ],
)
def test_the_rarest_class_limits_every_method_and_the_refusal_names_the_largest_budget_that_works(
    toy_recipe: Recipe, tmp_path: Path, change: dict[str, Any], most: str
) -> None:
    data = write_long_tailed(tmp_path / "long.npz", (24, 12, 5, 4 if change["method"] == "rded" else 3))
    recipe = replace(toy_recipe, data=data, **({"ipc": 5} | change))
    message = rf"class 'süd/ost' has \d training images, but ipc \d needs \d+ of each .* the rarest one.* lower {most}"
    with pytest.raises(StillroomError, match=message) as error:
        check_recipe(recipe, load_real(data))
    largest = int(re.findall(r"--ipc to (\d)", str(error.value))[0])
    check_recipe(replace(recipe, ipc=largest), load_real(data))
    with pytest.raises(StillroomError, match="training images"):
        check_recipe(replace(recipe, ipc=largest + 1), load_real(data))


def test_of_a_class_with_one_image_infer_needs_the_control_left_out_and_says_so(
    toy_recipe: Recipe, tmp_path: Path
) -> None:
    data = write_long_tailed(tmp_path / "long.npz", (24, 12, 5, 1))
    with pytest.raises(StillroomError, match="lower --ipc to 2 with --no-controls, or"):
        check_recipe(replace(toy_recipe, data=data, ipc=4), load_real(data))
    check_recipe(replace(toy_recipe, data=data, ipc=2, controls=False), load_real(data))


@pytest.mark.parametrize("method", ["random", "k_center", "rded", "sre2l", "infer"])
def test_at_the_rarest_class_s_budget_every_class_of_a_long_tailed_set_has_as_many_images(
    toy_recipe: Recipe, tmp_path: Path, method: str
) -> None:
    data = write_long_tailed(tmp_path / "long.npz", (24, 12, 8, 4))
    few = replace(toy_recipe, sre2l=Sre2lConfig(steps=2, shift_limit=1), labels=("static",), seeds=(0,))
    with Run(tmp_path / "run") as run:
        run_recipe(replace(few, data=data, method=method), run)
    counts = load_distilled(tmp_path / "run" / "distilled").labels.bincount()
    assert counts.tolist() == [3 if method == "infer" else 4] * 4


def on_another_machine(monkeypatch: pytest.MonkeyPatch, module: Any, **changes: Any) -> None:
    """Plans of `module` are from now on those of a machine that differs in so much."""
    resolve = module.resolve_plan
    monkeypatch.setattr(module, "resolve_plan", lambda *given: replace(resolve(*given), **changes))


def test_a_run_that_goes_on_by_another_plan_says_so_once_and_its_results_too(
    finished: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own_cache: Path,
    capsys: pytest.CaptureFixture[str],
    toynet: str,
) -> None:
    shutil.copytree(finished.directory, tmp_path / "run")
    with monkeypatch.context() as elsewhere:
        on_another_machine(elsewhere, pipeline, torch_version="9", threads=7)
        with Run(tmp_path / "run") as run:
            pipeline.open_stages(finished.recipe, run)
    err = capsys.readouterr().err
    assert err.count("the run goes on with torch_version '9' (it began with") == 1
    assert err.count("going on with the numerical plan that the run began with: threads 1 (not 7)\n") == 1
    with Run(tmp_path / "run") as run:
        _, plan = pipeline.open_stages(finished.recipe, run)
        assert not capsys.readouterr().err
        [differed] = pipeline.provenance(plan, run)["plan_differed"]  # what was made in between is among the results
    assert differed == {"field": "torch_version", "stored": torch.__version__, "now": "9"}
    assert "plan_differed" not in pipeline.provenance(plan)


def test_students_of_a_set_that_go_on_by_another_plan_say_so(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], toynet: str
) -> None:
    words = ["evaluate", str(finished.directory), "--data.source", finished.recipe.data.source, "--labels", "hard",
             "--seeds", "0", "--compute.device", "cpu", "--out", str(tmp_path / "students")]  # fmt: skip
    for threads in ("1", "2"):
        assert cli.main([*words, "--compute.threads", threads]) == 0
        on_another_machine(monkeypatch, evaluate_command, processor="slide rule")
    err = capsys.readouterr().err
    assert err.count("the run goes on with processor 'slide rule' (it began with") == 1
    assert err.count("going on with the numerical plan that the run began with: threads 1 (not 2)\n") == 1
    results = json.loads((tmp_path / "students" / "results.json").read_text())
    assert [d["field"] for d in results["provenance"]["plan_differed"]] == ["processor"]


def test_a_budget_that_may_not_be_worth_it_is_doubted_when_the_run_begins_and_in_its_plan(
    toy_recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = replace(toy_recipe, ipc=2, labels=("static",), seeds=(0,), controls=False)
    _, notes = estimate_recipe(recipe)
    run_recipe(recipe, Run())
    said = capsys.readouterr().err
    for doubt in (
        "the budget is small: ipc 2 keeps 1 image per class beside 1 compensator, where random images keep 2",
        "the training is short: students with static labels see each class 4 times",
    ):
        assert any(note.startswith(doubt) for note in notes)
        assert said.count(doubt) == 1
    assert "not much smaller" not in said


def test_a_comparison_doubts_what_its_sets_share_once(
    toy_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = Grid(methods=("random", "infer"), ipc=(2, 3))
    asked = comparison_of(replace(toy_recipe, labels=("static",), seeds=(0,), controls=False), grid)
    _, notes = estimate_comparison(asked)
    with Run(tmp_path / "run") as run:
        compare(asked, run)
    said = capsys.readouterr().err
    for doubt in (
        "infer at ipc 2: the budget is small: ipc 2 keeps 1",
        "random at ipc 2, infer at ipc 2: the training",
    ):
        assert sum(note.startswith(doubt) for note in notes) == 1
        assert said.count(doubt) == 1


def test_only_what_a_budget_lacks_is_doubted(toy_recipe: Recipe) -> None:
    real = load_real(toy_recipe.data)
    long = replace(toy_recipe.student, train=replace(toy_recipe.student.train, epochs=50), dynamic_epochs=49)
    enough = replace(toy_recipe, student=long, labels=("static",))
    assert doubt_budget(enough, real) == []
    assert [
        "--student.dynamic-epochs" in doubt for doubt in doubt_budget(replace(enough, labels=("dynamic",)), real)
    ] == [True]
    assert doubt_budget(replace(toy_recipe, labels=("dynamic",)), real, "set") == []
    large = replace(enough, method="random", ipc=8, labels=("hard",))  # 32 of 96 images
    assert [doubt.partition(":")[0] for doubt in doubt_budget(large, real)] == ["the set is not much smaller"]
    assert "33%" in doubt_budget(large, real)[0]
    assert doubt_budget(replace(large, ipc=7), real) == []
