"""The uses run on digits, and what they print is what they say that it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_example
from scipy.stats import spearmanr

SMALL = ["--image-size", "8", "--seeds", "1"]  # of digits, which are no larger


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("a", "b"),
    [([0.1, 0.5, 0.3, 0.9], [3.0, 7.0, 1.0, 8.0]), ([1.0, 1.0, 2.0, 3.0, 3.0], [5.0, 4.0, 4.0, 9.0, 1.0])],
)
def test_rank_correlation_is_spearmans_with_ties_shared(a: list[float], b: list[float]) -> None:
    assert load_example("choose_architecture").rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)


def test_equal_accuracies_order_nothing() -> None:
    assert load_example("choose_architecture").rank_correlation([1.0, 1.0], [1.0, 2.0]) == 0


@pytest.mark.slow
def test_architectures_are_ranked_by_a_set_and_by_random_images_in_as_many_steps(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--networks", "convnet_thin", "convnet", "--full-epochs", "4", "--epochs", "2", "--ipc", "10"]
    found = load_example("choose_architecture").main([*SMALL, *words, "--steps", "1"])
    shown = capsys.readouterr().out
    assert list(found) == ["infer", "random"]
    assert {line for line in shown.splitlines() if line.endswith(" steps")} == {"infer: 6 steps", "random: 6 steps"}
    assert f"gain of infer over random images: {found['infer'] - found['random']:+.2f}" in shown


@pytest.mark.slow
def test_a_memory_of_earlier_classes_is_better_than_none(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--classes-per-task", "5", "--teacher-epochs", "8", "--steps", "30", "--distill-steps", "1"]
    reached = load_example("continual_learning").main([*SMALL, *words])
    assert list(reached) == ["none", "random, hard", "random, soft", "infer"]
    assert reached["random, hard"][0] > reached["none"][0] + 0.1  # which has only the last classes
    assert "gain of infer over random images with soft labels, by seed:" in capsys.readouterr().out


def test_a_folder_is_looked_at_for_copies_of_its_images(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--per-class", "20", "--ipc", "3", "--steps", "1", "--epochs", "1", "--teacher-epochs", "40"]
    found = load_example("private_folder").main([*SMALL, *words])
    assert {method: copies for method, (_, copies) in found.items()} == {"random": 30, "infer": 20, "sre2l": 0}
    assert "0 of 30" in capsys.readouterr().out


def test_the_nearest_training_image_is_found_and_a_copy_is_at_zero() -> None:
    draw = np.random.default_rng(0)
    training = draw.integers(0, 256, (6, 3, 4, 4), dtype=np.uint8)
    images = np.concatenate([draw.integers(0, 256, (3, 3, 4, 4), dtype=np.uint8), training[2:3]])
    away = (images[:, None].astype(float) - training[None].astype(float)) / 255
    wanted = np.sqrt((away**2).mean((2, 3, 4))).min(1)
    found = load_example("private_folder").nearest(torch.from_numpy(images), torch.from_numpy(training))
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6)
    assert found[3] == 0
