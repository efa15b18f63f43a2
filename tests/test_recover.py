"""The statistics loss: its gradient, which is written down and not left to autograd, and the step in chunks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import build_toy_teacher
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.compute import ComputeConfig, Plan, build_generator, resolve_plan
from stillroom.errors import StillroomError
from stillroom.methods.infer import InferConfig
from stillroom.methods.recover import (
    Recorder,
    build_objective,
    cut_chunks,
    deviation_moments,
    draw_augment,
    repays_compiling,
    statistics_distance,
)
from stillroom.networks import build_network


@pytest.mark.parametrize("groups", [1, 3])
def test_written_down_gradient_is_the_derivative_of_the_distance(groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 2, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    mean = torch.randn(2, generator=generator, dtype=torch.float64)
    variance = torch.rand(2, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: statistics_distance((*deviation_moments(x, mean, groups), variance)), x)


def losses_and_gradient(plan: Plan, slots: int, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both terms of Equation 3 and the compensators' gradient, all in float64."""
    teacher = build_toy_teacher(2).model.double()
    generator = build_generator(0, "data")
    naturals = torch.randn(slots, images, 3, 8, 8, generator=generator, dtype=torch.float64)
    compensators = torch.randn(slots, 3, 8, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(4, (slots, images), generator=generator)
    augments = [
        draw_augment("resized_crop_shift", build_generator(1, "step", slot), images, 8, shift_limit=2, per_image=True)
        for slot in range(slots)
    ]

    def form(tensor: torch.Tensor, rows: slice) -> torch.Tensor:
        views = naturals[:, rows] + tensor[:, None]
        return torch.cat([augment(own, rows) for own, augment in zip(views, augments, strict=True)])

    objective = build_objective(teacher, slots, 10.0, 0.7, plan, 1)
    losses = torch.stack(objective(compensators, form, labels))
    (losses * torch.tensor([[1.0], [0.5]])).sum().backward()  # terms of different weight
    assert compensators.grad is not None
    return losses.detach(), compensators.grad


@pytest.mark.parametrize(("slots", "images", "chunk"), [(1, 12, 5), (1, 12, 12), (3, 7, 2), (2, 4, 1)])
def test_in_chunks_losses_and_gradient_are_those_of_the_whole_batch(
    plan: Plan, slots: int, images: int, chunk: int
) -> None:
    whole, gradient = losses_and_gradient(plan, slots, images)
    losses, found = losses_and_gradient(replace(plan, chunk_images=chunk), slots, images)
    assert losses.dtype == torch.float64
    assert float((losses - whole).abs().max() / whole.abs().max()) < 1e-12
    assert float((found - gradient).norm() / gradient.norm()) < 1e-9


@given(st.integers(1, 300), st.integers(1, 64))
@settings(max_examples=50)
def test_chunks_cover_all_images_once_in_order_and_are_of_one_size_but_the_last(images: int, most: int) -> None:
    rows = [list(range(images)[chunk]) for chunk in cut_chunks(images, most)]
    assert [image for own in rows for image in own] == list(range(images))
    assert all(len(own) == len(rows[0]) <= most for own in rows[:-1])
    assert 0 < len(rows[-1]) <= len(rows[0])


def test_chunks_are_all_of_one_size_where_that_needs_less_than_twice_as_many() -> None:
    for images, most, expected in ((1000, 32, 25), (250, 32, 25), (64, 32, 32), (12, 32, 12), (97, 32, 25), (1, 1, 1)):
        assert len(range(images)[cut_chunks(images, most)[0]]) == expected


def test_a_slot_passes_whole_where_memory_holds_it_and_in_chunks_where_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, slot, expected in (
        (16 * 2**30, (100, 32), 0),
        (2 * 2**30, (100, 32), 32),
        (16 * 2**30, (1000, 224), 32),
        (2**20, (1000, 224), 1),
        (None, (1000, 224), 0),
        (2**20, (0, 0), 0),
    ):
        monkeypatch.setattr("stillroom.compute._free_memory", lambda device, free=free: free)
        assert resolve_plan(ComputeConfig("cpu"), slot=slot).chunk_images == expected
        assert resolve_plan(ComputeConfig("cpu", chunk_images=7), slot=slot).chunk_images == 7


@pytest.mark.parametrize(
    ("network", "side", "images", "steps", "pays"),
    [
        ("resnet18", 32, 100, 250, False),  # compiles in 43 s and saves 0.15 s a step
        ("resnet18", 32, 100, 350, True),
        ("convnet_thin", 48, 8, 320, False),  # in 24 s, and saves 4 ms
        ("convnet_thin", 32, 100, 1350, True),  # in 18 s, and saves 26 ms
        ("resnet18", 224, 1000, 2, False),
        ("resnet18", 224, 1000, 20, True),
    ],
)
def test_a_recovery_is_compiled_where_what_batchnorms_see_repays_it(
    plan: Plan, network: str, side: int, images: int, steps: int, pays: bool
) -> None:
    recorder = Recorder(build_network(network, 10, side), 1)
    assert repays_compiling(recorder, torch.zeros(1, 3, side, side), images * steps, plan, steps) is pays


@pytest.mark.parametrize("chunk", [0, 2])
def test_what_is_compiled_is_decided_at_the_first_step_by_all_steps_images(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(Plan, "compiled", lambda self, function, pays: asked.append(pays) or function)
    monkeypatch.setattr("stillroom.methods.recover.SAVED_SECONDS", 1e-3)
    monkeypatch.setattr("stillroom.methods.recover.COMPILE_SECONDS", 1.0)
    teacher = build_toy_teacher().model
    for steps in (1, 1000):
        objective = build_objective(teacher, 1, 10.0, 1.0, replace(plan, chunk_images=chunk), steps)
        for _ in range(2):
            objective(torch.zeros(1, 3, 8, 8), lambda u, rows: u.expand(4, -1, -1, -1)[rows], torch.arange(4)[None])
    assert asked == [False, True]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"betas": (2.0, -1.0)}, r"infer\.betas is \(2\.0, -1\.0\); give two numbers from 0 to below 1"),
        ({"betas": (0.5, 1.0)}, r"infer\.betas"),
        ({"betas": (float("nan"), 0.9)}, r"infer\.betas"),
        ({"statistics_weight": float("nan")}, r"infer\.statistics_weight is nan; give 0 or more"),
        ({"first_layer_weight": -1.0}, r"infer\.first_layer_weight is -1\.0"),
        ({"learning_rate": float("inf")}, r"infer\.learning_rate is inf"),
    ],
)
def test_settings_of_a_descent_that_are_out_of_range_are_refused_before_any_work(setting: dict, message: str) -> None:
    with pytest.raises(StillroomError, match=message):
        InferConfig(**setting)
