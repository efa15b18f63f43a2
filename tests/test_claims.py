"""Claims: what results carry, checked against NumPy and SciPy, and what they must never be made to say."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from conftest import Finished
from scipy import stats

from stillroom.claims import Against, Claim, claims_of, headline


def read(finished: Finished, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((finished.directory / name).read_text())
    return found


@pytest.mark.parametrize("seeds", [*range(2, 12)])
def test_the_interval_is_students(seeds: int) -> None:
    differences = np.random.default_rng(seeds).normal(1.0, 2.0, seeds)
    against = Against("control", float(differences.mean()), float(differences.std(ddof=1)), seeds)
    expected = stats.t.interval(0.95, seeds - 1, differences.mean(), differences.std(ddof=1) / np.sqrt(seeds))
    np.testing.assert_allclose(against.interval, expected, rtol=0.005, atol=0.005)


def test_beyond_the_table_the_interval_is_wider_than_students() -> None:
    low, high = Against("control", 0.0, 1.0, 30).interval or (0.0, 0.0)
    assert high - low > np.ptp(stats.t.interval(0.95, 29, 0.0, 1 / np.sqrt(30)))


@pytest.mark.parametrize(
    ("mean", "deviation", "seeds", "verdict"),
    [
        (2.5, 1.0, 3, "beaten"),  # half of the interval: 4.30 / sqrt(3) = 2.48
        (2.4, 1.0, 3, "too close to call"),
        (8.9, 1.0, 2, "too close to call"),  # 12.71 / sqrt(2) = 8.99
        (9.1, 1.0, 2, "too close to call"),  # above 0, but of two seeds
        (0.1, 0.0, 2, "too close to call"),
        (5.0, 0.0, 5, "too close to call"),  # the same by chance
        (5.0, 1e-15, 5, "too close to call"),  # as above, but for the rounding of floats
        (0.0, 0.0, 3, "not beaten"),
        (-0.1, 5.0, 3, "not beaten"),
        (20.0, None, 1, "one seed"),
        (-20.0, None, 1, "not beaten"),
    ],
)
def test_a_control_is_beaten_beyond_the_noise_alone(
    mean: float, deviation: float | None, seeds: int, verdict: str
) -> None:
    assert Against("control", mean, deviation, seeds).verdict == verdict


def test_the_control_that_is_named_is_the_one_hardest_to_beat() -> None:
    beaten, unclear = Against("beaten", 2.0, 0.3, 3), Against("unclear", 2.1, 4.0, 3)
    far, behind = Against("far", 9.0, 0.1, 3), Against("behind", -0.1, 0.1, 3)
    for against, name in (
        ((beaten, unclear), "unclear"), ((far, beaten), "beaten"), ((unclear, behind, beaten), "behind"),
        ((Against("one", 5.0, None, 1), Against("other", 4.0, None, 1)), "other"),
    ):  # fmt: skip
        claim = Claim("infer", 10, "static", "convnet", 300, (50.0, 51.0, 52.0), against)
        assert claim.hardest is not None
        assert claim.hardest.control == name
    claim = Claim("infer", 10, "static", "convnet", 300, (50.0, 51.0, 52.0), (beaten, unclear))
    assert claim.verdict == (
        "3 seeds are too few to tell it from unclear, the hardest to beat of 2 controls (+2.1 ± 4.0 points)"
    )


def test_a_runs_claims_are_paired_by_seed_with_each_of_its_controls(finished: Finished) -> None:
    results = read(finished, "results.json")
    claims = claims_of(results)
    assert [claim.labels for claim in claims] == ["static", "dynamic"]
    for claim in claims:
        (own,) = (c["top1"] for c in results["cells"] if c["budget"] == "own" and c["labels"] == claim.labels)
        expected = {}
        for cell in results["cells"]:
            for budget, words in (("equal epochs", "at equal epochs"), ("equal steps", "in as many steps")):
                if f"{budget} ({claim.labels})" in cell["budget"]:
                    what = "its naturals alone" if cell["set"] == "naturals" else "random images"
                    labels = "the same" if cell["labels"] == claim.labels else cell["labels"]
                    differences = np.subtract(own, cell["top1"])
                    expected[f"{what} with {labels} labels {words}"] = (differences.mean(), differences.std(ddof=1))
        assert len(expected) == 6
        assert {each.control: pytest.approx((each.mean, each.deviation)) for each in claim.against} == expected
        assert claim.hardest is not None
        assert claim.hardest.mean == pytest.approx(min(mean for mean, _ in expected.values()))
        assert claim.hardest.control in claim.sentence


def test_a_comparisons_claims_are_those_of_its_rows(compared: Finished) -> None:
    results = read(compared, "comparison.json")
    for claim, row in zip(claims_of(results), results["rows"], strict=True):
        assert (claim.method, claim.ipc, list(claim.top1)) == (row["method"], row["ipc"], row["top1"])
        assert sorted(each.mean for each in claim.against) == sorted(mean for mean, _ in row["differences"].values())


def row_of(method: str, top1: list[float], **more: Any) -> dict[str, Any]:
    row = {"method": method, "ipc": 10, "labels": "static", "student": "convnet", "steps": 1200, "top1": top1}
    return row | {"differences": {}, "paper": None} | more


def test_the_headline_says_what_is_not_beaten_and_that_the_highest_was_chosen() -> None:
    behind = {"random + static, equal steps": [-1.5, 0.5], "random + hard, equal steps": [9.0, 0.5]}
    rows = [row_of("infer", [50.0, 52.0, 51.0], differences=behind), row_of("random", [40.0, 41.0, 42.0])]
    text = headline({"dataset": {"name": "toys"}, "rows": rows})
    assert text == (
        "toys, 10 images per class, static labels, convnet students: the highest of 2 sets, chosen afterwards, is "
        "infer with 51.0 ± 1.0 % (3 seeds) in 1,200 steps; it is not ahead of random images with the same labels in as "
        "many steps, the hardest to beat of 2 controls (-1.5 ± 0.5 points)."
    )
    rows = [row_of("sre2l", [4.0, 5.0, 6.0]), row_of("random", [40.0, 41.0, 42.0])]
    assert headline({"dataset": {"name": "toys"}, "rows": rows}).endswith("no method is above random images.")


@pytest.mark.parametrize("told", [{"base": "random"}, {"asked": "random:distill_seed=1"}])
def test_random_images_by_another_name_are_not_said_to_lack_a_control(told: dict[str, str]) -> None:
    random = row_of("baseline", [40.0, 41.0, 42.0], **told)
    rows = [row_of("sre2l", [4.0, 5.0, 6.0]), random]
    assert headline({"dataset": {"name": "toys"}, "rows": rows}).endswith("; no method is above random images.")
    alone = headline({"dataset": {"name": "toys"}, "rows": [random]})
    assert alone.endswith("; these are random images themselves, which others are to beat.")
    assert "better than random" not in alone


@pytest.mark.parametrize(("known", "asked"), [({"fingerprint": "ab"}, {}), ({}, {"asked": "set:theirs"})])
def test_one_set_by_two_kinds_of_label_is_one_set(known: dict[str, str], asked: dict[str, str]) -> None:
    rows = [row_of(name, [40.0, 41.0], **known, **asked) for name in ("theirs", "theirs, its own labels")]
    results = {"dataset": {"name": "toys"}, "rows": rows}
    assert "the highest of 2 rows of 1 set, chosen afterwards, is theirs" in headline(results)
    rows.append(row_of("infer", [4.0, 5.0]))
    assert "the highest of 3 rows of 2 sets, chosen afterwards, is theirs" in headline(results)


def test_one_seed_carries_no_claim() -> None:
    row = row_of("infer", [50.0], differences={"random + static, equal steps": [5.0, None]})
    text = headline({"dataset": {"name": "toys"}, "rows": [row]})
    assert "50.0 % (one seed, spread unknown)" in text
    assert "one seed cannot tell it from random images with the same labels" in text
    assert "±" not in text
    assert "ahead" not in text


def test_failed_rows_are_left_out_and_failed_controls_are_counted() -> None:
    lost = {"naturals + static, equal steps": "out of memory", "scores": "another thing"}
    rows = [row_of("infer", [50.0, 51.0], failed=lost), {"method": "cda", "error": "broken"}]
    (claim,) = claims_of({"rows": rows})
    assert claim.lost == ("its naturals alone with the same labels in as many steps",)
    assert claim.verdict == (
        "no control stands beside it, so nothing says that it is better than random images; failed: 1 of its controls"
    )
    assert headline({"dataset": {"name": "toys"}, "rows": rows[1:]}) == (
        "toys: no cell is finished, so there is nothing to claim."
    )


def test_a_run_claims_its_first_kind_of_label_not_its_best(finished: Finished) -> None:
    results = read(finished, "results.json")
    for cell in results["cells"]:
        cell["top1"] = [90.0, 90.0] if cell["labels"] == "dynamic" else [10.0, 11.0]
    assert "10.5 ± 0.7 % (2 seeds) with static labels" in headline(results)


def test_an_evaluation_says_that_it_has_no_control() -> None:
    found = {"network": "convnet", "labels": "static", "steps": 300, "top1": [0.5, 0.6]}
    text = headline({"evaluation": found})
    assert "convnet students reach 55.0 ± 7.1 % (2 seeds) with static labels in 300 steps" in text
    assert "no control stands beside it" in text


def test_a_claim_without_controls_is_none_of_being_better() -> None:
    claim = Claim("infer", 10, "static", "convnet", 300, (50.0, 51.0))
    assert claim.hardest is None
    assert "nothing says that it is better" in claim.sentence
