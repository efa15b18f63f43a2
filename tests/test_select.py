"""Herding and k-center greedy against brute force written from the papers, and as units of work that resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TOY_CLASSES, ToyNet, build_toy_teacher
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from stillroom.compute import Plan
from stillroom.data import RealData
from stillroom.distilled import load_distilled
from stillroom.errors import StillroomError, TimeLimitReached
from stillroom.methods import METHODS, coreset
from stillroom.methods.coreset import HerdingConfig, KCenterConfig, pick_herding, pick_k_centers
from stillroom.methods.select import choose_by_class
from stillroom.pipeline import run_recipe
from stillroom.recipes import Recipe
from stillroom.run import Run
from stillroom.teachers import Teacher, hash_weights
from stillroom.train import apply_normalization

PICKS: list[Callable[[Tensor, int], Tensor]] = [pick_herding, pick_k_centers]


def herding_costs(x: np.ndarray, picks: list[int]) -> dict[int, float]:
    """iCaRL's Algorithm 4: how far each candidate would leave the mean of the picks from that of the class."""
    left = [i for i in range(len(x)) if i not in picks]
    return {i: float(np.linalg.norm(x.mean(0) - x[[*picks, i]].mean(0))) for i in left}


def k_center_costs(x: np.ndarray, picks: list[int]) -> dict[int, float]:
    """Sener and Savarese's Algorithm 1: minus each candidate's distance to its nearest pick; first, to the mean."""
    left = [i for i in range(len(x)) if i not in picks]
    if not picks:
        return {i: float(np.linalg.norm(x[i] - x.mean(0))) for i in left}
    return {i: -min(float(np.linalg.norm(x[i] - x[j])) for j in picks) for i in left}


def herding_by_hand(x: np.ndarray, count: int) -> list[int]:
    picks: list[int] = []
    for _ in range(count):
        costs = herding_costs(x, picks)
        picks.append(min(costs, key=lambda i: costs[i]))
    return picks


features = st.tuples(st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**32 - 1)).map(
    lambda draw: torch.from_numpy(np.random.default_rng(draw[2]).normal(size=draw[:2]))
)


@pytest.mark.parametrize(("pick", "costs_of"), [(pick_herding, herding_costs), (pick_k_centers, k_center_costs)])
@given(features)
def test_every_pick_is_the_best_of_those_left(
    pick: Callable[[Tensor, int], Tensor], costs_of: Callable[[np.ndarray, list[int]], dict[int, float]], x: Tensor
) -> None:
    picks = pick(x, len(x)).tolist()
    for k, picked in enumerate(picks):
        costs = costs_of(x.numpy(), picks[:k])
        assert costs[picked] == pytest.approx(min(costs.values()), rel=1e-9, abs=1e-9)  # two alone lie equally far


@pytest.mark.parametrize("pick", PICKS)
@given(features, st.data())
def test_picks_are_distinct_and_fewer_are_the_first_of_more(
    pick: Callable[[Tensor, int], Tensor], x: Tensor, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, len(x)))
    picks = pick(x, len(x))
    assert picks.dtype == torch.int64
    assert sorted(picks.tolist()) == list(range(len(x)))
    assert torch.equal(pick(x, count), picks[:count])


@given(features.filter(lambda x: len(x) >= 3))
def test_k_centers_cover_at_most_twice_as_wide_as_the_best_centers(x: Tensor) -> None:
    """Gonzalez's guarantee holds whatever the greedy begins with."""
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    best = min(distance[list(centers)].min(0).values.max() for centers in combinations(range(len(x)), 2))
    assert distance[pick_k_centers(x, 2)].min(0).values.max() <= 2 * best + 1e-9


@pytest.mark.parametrize("pick", PICKS)
def test_of_equally_good_images_the_first_is_taken_and_copies_only_once_each(
    pick: Callable[[Tensor, int], Tensor],
) -> None:
    assert pick(torch.ones(5, 3, dtype=torch.float64), 5).tolist() == [0, 1, 2, 3, 4]
    cross = torch.tensor([[1.0, 0], [-1, 0], [0, 0], [0, 0], [0, 1], [0, -1]], dtype=torch.float64)
    assert pick(cross, 2).tolist() == [2, 3 if pick is pick_herding else 0]


def test_the_features_are_those_of_the_first_teacher_for_its_own_class(toy: RealData, plan: Plan) -> None:
    teachers = [build_toy_teacher(1), build_toy_teacher(2)]
    made = coreset.distill_herding(toy, teachers, 5, HerdingConfig(), 0, plan, Run())
    x = apply_normalization(toy.train.images, toy.mean, toy.std)
    with torch.no_grad():
        seen = nn.Sequential(*list(teachers[0].model)[:-1])(x).double().numpy()
    for label in range(TOY_CLASSES):
        rows = (toy.train.labels == label).nonzero().flatten().numpy()
        picked = rows[herding_by_hand(seen[rows], 5)]
        assert torch.equal(made.images[made.labels == label], toy.train.images[picked])
    assert made.labels.tolist() == [*range(TOY_CLASSES)] * 5
    assert made.slots.tolist() == [slot for slot in range(5) for _ in range(TOY_CLASSES)]
    assert [teacher.name for teacher in made.manifest.teachers] == ["toynet1", "toynet2"]
    assert (made.manifest.method, made.manifest.recipe) == ("herding", {"herding": {"normalize": False}})


def test_normalised_herding_measures_directions_alone(toy: RealData, plan: Plan) -> None:
    teacher = build_toy_teacher(1)
    made = coreset.distill_herding(toy, [teacher], 4, HerdingConfig(normalize=True), 0, plan, Run())
    rows = (toy.train.labels == 0).nonzero().flatten()
    x = apply_normalization(toy.train.images[rows], toy.mean, toy.std)
    with torch.no_grad():
        seen = nn.Sequential(*list(teacher.model)[:-1])(x).double().numpy()
    picks = herding_by_hand(seen / np.linalg.norm(seen, axis=1, keepdims=True), 4)
    assert torch.equal(made.images[made.labels == 0], toy.train.images[rows[picks]])
    assert picks != herding_by_hand(seen, 4)


@pytest.mark.parametrize("method", ["herding", "k_center"])
def test_a_coreset_is_real_nested_and_the_same_for_every_seed(method: str, toy: RealData, plan: Plan) -> None:
    row = METHODS[method]
    one, other = (
        row.distill(toy, [build_toy_teacher(0)], ipc, row.config(), ipc, plan, Run()).images for ipc in (3, 7)
    )
    assert torch.equal(other[: 3 * TOY_CLASSES], one)
    real = {image.numpy().tobytes() for image in toy.train.images}
    assert len({image.numpy().tobytes() for image in other} & real) == 7 * TOY_CLASSES


def test_features_are_computed_in_passes_of_bounded_size(
    toy: RealData, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = coreset.compute_features(build_toy_teacher(0), toy, torch.arange(50), plan)
    monkeypatch.setattr(coreset, "SCORING_BATCH", 7)
    parts = coreset.compute_features(build_toy_teacher(0), toy, torch.arange(50), plan)
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-5)
    rounded = coreset.compute_features(build_toy_teacher(0), toy, torch.arange(50), replace(plan, precision="bfloat16"))
    assert torch.equal(parts, rounded)


def test_classes_that_are_done_are_kept_when_the_work_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, asked = build_toy_teacher(0), []

    def choose(index: int) -> Tensor:
        asked.append(index)
        return torch.tensor([index, 10 * index])

    stops = 0
    monkeypatch.setattr(Run, "stopping", property(lambda self: len(asked) % 2 == 0))
    while stops < 10:
        with Run(tmp_path / "run") as run:
            try:
                chosen = choose_by_class(teacher, 5, choose, "picks", [], run)
                break
            except TimeLimitReached:
                stops += 1
    assert (asked, stops) == ([0, 1, 2, 3, 4], 2)
    assert chosen.tolist() == [[0, 0], [1, 10], [2, 20], [3, 30], [4, 40]]
    with Run(tmp_path / "run") as run:
        assert torch.equal(choose_by_class(teacher, 5, choose, "picks", [], run), chosen)
        assert len(asked) == 5
        with pytest.raises(StillroomError, match=r"'picks-.*' was begun with other weights of 'toynet1'"):
            choose_by_class(build_toy_teacher(1), 5, choose, "picks", [], run)


def test_choices_begun_with_other_weights_are_refused_before_they_are_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "stopping", True)
    with Run(tmp_path / "run") as run:
        with pytest.raises(TimeLimitReached):
            choose_by_class(build_toy_teacher(0), 3, lambda index: torch.tensor([index]), "picks", [], run)
        with pytest.raises(StillroomError, match="begun with other weights"):
            choose_by_class(build_toy_teacher(1), 3, lambda index: torch.tensor([index]), "picks", [], run)


@pytest.mark.parametrize("method", ["herding", "k_center", "rded"])
def test_without_a_teacher_nothing_is_selected(method: str, toy: RealData, plan: Plan) -> None:
    with pytest.raises(StillroomError, match=r"needs a teacher, .*teachers\.networks"):
        METHODS[method].distill(toy, [], 2, METHODS[method].config(), 0, plan, Run())


@pytest.mark.parametrize("method", ["herding", "k_center"])
def test_a_network_without_penultimate_features_is_named(method: str, toy: RealData) -> None:
    network = nn.Sequential(nn.Conv2d(3, TOY_CLASSES, 8), nn.Flatten())
    with pytest.raises(StillroomError, match=f"{method} cannot use 'all conv', .*does not end in a linear layer"):
        METHODS[method].check(toy, {"all conv": network, "toynet": ToyNet(0)}, 2, METHODS[method].config())
    networks = {"toynet": ToyNet(0), "all conv": network}
    assert METHODS[method].check(toy, networks, 2, METHODS[method].config()) == 2
    assert networks["toynet"].training
    assert int(networks["toynet"][1].num_batches_tracked) == 0


def test_a_class_with_too_few_images_is_named_before_any_work(toy: RealData, plan: Plan) -> None:
    with pytest.raises(StillroomError, match="25 images per class are needed, but 'north west' has 24"):
        coreset.distill_k_center(toy, [build_toy_teacher(0)], 25, KCenterConfig(), 0, plan, Run())


def test_features_that_are_not_finite_name_the_teacher(toy: RealData, plan: Plan) -> None:
    model = ToyNet(0).eval()
    model[1].bias.data[0] = float("nan")
    teacher = Teacher("broken", model, {"top1": 0.9, "top5": 1.0}, hash_weights(model), "made for a test")
    with pytest.raises(StillroomError, match="features of 'broken' are not finite"):
        coreset.distill_k_center(toy, [teacher], 2, KCenterConfig(), 0, plan, Run())


@pytest.mark.parametrize("method", ["herding", "k_center"])
def test_a_coreset_goes_through_a_whole_run_beside_its_control(toy_recipe: Recipe, tmp_path: Path, method: str) -> None:
    recipe = replace(toy_recipe, method=method, labels=("static",), seeds=(0,))
    with Run(tmp_path / "run") as run:
        results = run_recipe(recipe, run)
        assert list((run.directory / "units").glob(f"{method}-*.safetensors"))
    assert load_distilled(tmp_path / "run" / "distilled").manifest.method == method
    assert [(c["set"], c["labels"]) for c in results["cells"]] == [
        (method, "static"), ("random", "hard"), ("random", "static"),
    ]  # fmt: skip
