"""The guide's worked examples do what it says of them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_toy_teacher, stopping_again_and_again

from stillroom.compute import Plan
from stillroom.data import RealData
from stillroom.distilled import DistilledSet
from stillroom.errors import StillroomError
from stillroom.run import Run
from stillroom.teachers import Teacher
from stillroom.train import apply_normalization

GUIDE = Path(__file__).parents[1] / "docs" / "adding-a-method.md"


def read_examples() -> dict[str, Any]:
    """What the code blocks under "Two that work" define."""
    names: dict[str, Any] = {"__name__": __name__}
    for code in re.findall(r"```python\n(.*?)```", GUIDE.read_text().partition("## Two that work")[2], re.DOTALL):
        exec(code, names)
    return names


EXAMPLES = read_examples()
CONFIGS = {"surest": EXAMPLES["SurestConfig"](), "means": EXAMPLES["MeansConfig"](steps=40)}


def distil(name: str, real: RealData, teacher: Teacher, plan: Plan, run: Run | None = None) -> DistilledSet:
    made = EXAMPLES[f"distill_{name}"](real, [teacher], 3, CONFIGS[name], 0, plan, run or Run())
    assert isinstance(made, DistilledSet)
    return made


def logits(teacher: Teacher, real: RealData, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return teacher.model(apply_normalization(images, real.mean, real.std))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CONFIGS)
def test_an_example_resumes_to_the_same_bits_and_refuses_other_weights(
    name: str, toy: RealData, plan: Plan, tmp_path: Path
) -> None:
    teacher = build_toy_teacher()
    pieces, stops = stopping_again_and_again(tmp_path / "run", lambda run: distil(name, toy, teacher, plan, run))
    assert stops >= 1
    assert pieces.fingerprint == distil(name, toy, teacher, plan).fingerprint
    with Run(tmp_path / "run") as run, pytest.raises(StillroomError, match="other weights"):
        distil(name, toy, replace(build_toy_teacher(1), name=teacher.name), plan, run)


def test_the_example_that_chooses_takes_what_the_teacher_is_surest_of(toy: RealData, plan: Plan) -> None:
    teacher = build_toy_teacher()
    made = distil("surest", toy, teacher, plan)
    for label in range(toy.classes):
        images = toy.train.batch((toy.train.labels == label).nonzero().flatten())
        best = logits(teacher, toy, images).softmax(1)[:, label].topk(3).values
        chosen = logits(teacher, toy, made.images[made.labels == label]).softmax(1)[:, label]
        torch.testing.assert_close(chosen, best)


def test_the_example_that_descends_nears_the_means_of_the_real_images(toy: RealData, plan: Plan) -> None:
    teacher = build_toy_teacher()
    made = distil("means", toy, teacher, plan)
    noise = torch.randint(0, 256, made.images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for label in range(toy.classes):
        own = made.labels == label
        target = logits(teacher, toy, toy.train.batch((toy.train.labels == label).nonzero().flatten())).mean(0)
        near, far = ((logits(teacher, toy, x[own]).mean(0) - target).norm() for x in (made.images, noise))
        assert near < far / 4
