"""SRe2L and CDA against NumPy: loss, image priors, curriculum; blocks, packing, resuming, what is refused."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TOY_CLASSES, build_toy_teacher, stopping_again_and_again
from test_infer import numpy_forward, numpy_label_loss, numpy_statistics_loss
from torch import nn

from stillroom.compute import Plan, build_generator
from stillroom.data import RealData
from stillroom.errors import StillroomError
from stillroom.methods import METHODS, pixels, sre2l
from stillroom.methods.pixels import class_blocks, pack_blocks, slot_blocks, to_bytes
from stillroom.methods.recover import Form, build_objective
from stillroom.methods.sre2l import CdaConfig, Sre2lConfig, image_norm, least_scale, total_variation
from stillroom.run import Run
from stillroom.teachers import Teacher

QUICK = Sre2lConfig(steps=6, augmentation="resized_crop_shift", shift_limit=1)


def test_the_loss_is_cross_entropy_plus_weighted_statistics_plus_priors(toy: RealData, plan: Plan) -> None:
    """One block, one step, no augmentation: each term as NumPy has it, in float64."""
    teacher = build_toy_teacher(5)
    config = Sre2lConfig(steps=1, augmentation="none", statistics_weight=0.3, tv_weight=0.2, l2_weight=0.1)
    x = torch.randn(1, TOY_CLASSES, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    losses = build_objective(teacher.model, 1, 10.0, 0.3, plan, 1)
    terms = sre2l.build_terms(torch.arange(TOY_CLASSES)[None], toy, config, plan, losses)
    label, statistics, prior = (float(term) for term in terms(0, x, [build_generator(0)]))
    images = x[0].double().numpy()
    logits, inputs = numpy_forward(teacher.model, images)
    assert label == pytest.approx(numpy_label_loss(logits, np.arange(TOY_CLASSES)), rel=1e-5)
    assert statistics == pytest.approx(0.3 * numpy_statistics_loss(inputs, 10.0), rel=1e-5)
    i = images
    tv = sum(
        np.sqrt((difference**2).sum())
        for difference in (
            np.diff(i, axis=3), np.diff(i, axis=2), i[:, :, 1:, :-1] - i[:, :, :-1, 1:],
            i[:, :, 1:, 1:] - i[:, :, :-1, :-1],
        )
    )  # fmt: skip
    norm = np.mean([np.linalg.norm(image.ravel()) for image in i])
    assert prior == pytest.approx(0.2 * tv + 0.1 * norm, rel=1e-5)


def test_the_priors_of_flat_images_are_zero_and_belong_to_their_own_block() -> None:
    flat = torch.zeros(2, 3, 3, 4, 4)
    flat[1] = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert total_variation(flat)[0] == image_norm(flat)[0] == 0
    assert total_variation(flat)[1] > 0
    assert image_norm(flat)[1] > 0


@pytest.mark.parametrize(
    ("curriculum", "share", "expected"),
    [
        ("none", 1.0, [0.08, 0.08, 0.08, 0.08]),
        ("step", 0.5, [1.0, 1.0, 0.08, 0.08]),
        ("linear", 1.0, [1.0, 0.77, 0.54, 0.31]),
        ("linear", 0.5, [1.0, 0.54, 0.08, 0.08]),
        ("cosine", 1.0, [1.0, 0.08 + 0.92 * (1 + np.cos(np.pi / 4)) / 2, 0.54, 0.08 + 0.46 * (1 - np.sqrt(0.5))]),
        ("cosine", 0.0, [0.08, 0.08, 0.08, 0.08]),
    ],
)
def test_the_least_scale_of_crops_falls_as_cda_says(curriculum: Any, share: float, expected: list[float]) -> None:
    config = CdaConfig(steps=4, curriculum=curriculum, curriculum_share=share)
    np.testing.assert_allclose([least_scale(config, step) for step in range(4)], expected, atol=1e-12)


def test_cda_begins_with_whole_images_and_sre2l_does_not(toy: RealData, plan: Plan) -> None:
    """A batch's first view is the image itself where crops keep all of it, and nothing is shifted or flipped."""
    seen: list[torch.Tensor] = []

    def record(pixels: torch.Tensor, form: Form, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        views = form(pixels, slice(None))
        seen.append(views)
        return views.mean()[None], views.mean()[None]

    x = torch.randn(1, TOY_CLASSES, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for config in (CdaConfig(augmentation="resized_crop"), Sre2lConfig(augmentation="resized_crop")):
        terms = sre2l.build_terms(torch.arange(TOY_CLASSES)[None], toy, config, plan, record)
        terms(0, x, [build_generator(3)])
    assert torch.allclose(seen[0], x[0], atol=1e-6)
    assert not torch.allclose(seen[1], x[0], atol=0.1)


def test_blocks_hold_every_position_once_a_slot_or_whole_classes_at_a_time() -> None:
    by_slot, by_class = slot_blocks(3, 5, 2), class_blocks(3, 5, 6)
    for blocks in (by_slot, by_class):
        assert sorted(torch.cat(blocks).tolist()) == list(range(15))
    assert [block.tolist() for block in by_slot[:3]] == [[0, 1], [2, 3], [4]]
    assert (by_class[0] % 5).tolist() == [0, 0, 0, 1, 1, 1]
    assert (by_class[0] // 5).tolist() == [0, 1, 2, 0, 1, 2]
    assert [list(pack) for pack in pack_blocks(by_slot, 5, 4)][:4] == [[0, 1], [2], [3, 4], [5]]  # of one size
    assert [list(pack) for pack in pack_blocks(slot_blocks(5, 4, 4), 4, 2)] == [[0, 1], [2, 3], [4]]
    assert [list(pack) for pack in pack_blocks(class_blocks(4, 5, 10), 5, 4)] == [[0, 1]]  # four slots' images
    assert [list(pack) for pack in pack_blocks(class_blocks(4, 5, 10), 5, 1)] == [[0], [1]]


@pytest.mark.parametrize("method", ["sre2l", "cda"])
def test_images_are_ipc_of_each_class_slot_by_slot_and_reach_a_lower_loss(
    toy: RealData, toy_teachers: list[Teacher], plan: Plan, method: str, tmp_path: Path
) -> None:
    whole = {"cda": {"augmentation": "resized_crop", "curriculum": "step"}, "sre2l": {"augmentation": "none"}}[method]
    config = METHODS[method].config(steps=40, learning_rate=0.1, statistics_weight=1.0, **whole)
    with Run(tmp_path / "run") as run:
        distilled = METHODS[method].distill(toy, toy_teachers, 3, config, 0, replace(plan, pack_slots=3), run)
        _, tensors = run.load_unit("images-0-3")
    assert distilled.labels.tolist() == [0, 1, 2, 3] * 3
    assert distilled.slots.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert distilled.manifest.method == method
    assert distilled.manifest.recipe[method]["steps"] == 40
    losses = tensors["losses"].sum(1)  # [steps, blocks]
    assert (losses[-5:].mean(0) < 0.7 * losses[0]).all()


def test_pixels_never_leave_the_valid_range_and_are_rounded(toy: RealData, plan: Plan, tmp_path: Path) -> None:
    assert to_bytes(torch.tensor([-0.1, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 1.2])).tolist() == [0, 0, 0, 1, 255, 255]
    with pytest.raises(StillroomError, match="recovered pixels are not finite"):
        to_bytes(torch.tensor([0.5, torch.nan]))
    ends: list[torch.Tensor] = []
    original = pixels.descend

    def descend(descent: Any, *arguments: Any) -> torch.Tensor:
        losses = original(descent, *arguments)
        ends.append(descent.tensor.detach())
        return losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixels, "descend", descend)
        images = sre2l.distill(toy, [build_toy_teacher(0)], 1, QUICK, 0, plan, Run()).images
    raw = ends[0][0] * torch.tensor(toy.std).view(3, 1, 1) + torch.tensor(toy.mean).view(3, 1, 1)
    assert raw.min() > -1e-6
    assert raw.max() < 1 + 1e-6
    np.testing.assert_array_equal(images.numpy(), np.rint(raw.numpy() * 255).astype(np.uint8))


@pytest.mark.parametrize("change", [{}, {"classes_per_batch": 3}, {"tv_weight": 0.01, "per_image": True}])
def test_packed_blocks_equal_blocks_one_by_one(toy: RealData, plan: Plan, change: dict[str, Any]) -> None:
    config = replace(QUICK, **change)
    packed, single = (
        sre2l.distill(toy, [build_toy_teacher(0)], 5, config, 0, replace(plan, pack_slots=slots), Run())
        for slots in (3, 1)
    )
    assert (packed.images.int() - single.images.int()).abs().max() <= 1  # a rounding may fall the other way


def test_more_images_per_class_begin_with_the_same_ones(toy: RealData, plan: Plan) -> None:
    few, many = (sre2l.distill(toy, [build_toy_teacher(0)], ipc, QUICK, 0, plan, Run()) for ipc in (1, 3))
    assert torch.equal(few.images, many.images[: len(few.images)])
    assert not torch.equal(many.images[:4], many.images[4:8])


def test_only_the_first_teacher_recovers_and_all_are_recorded(
    toy: RealData, toy_teachers: list[Teacher], plan: Plan
) -> None:
    one, both = (
        sre2l.distill(toy, teachers, 1, QUICK, 0, plan, Run()) for teachers in (toy_teachers[:1], toy_teachers)
    )
    assert torch.equal(one.images, both.images)
    assert [teacher.name for teacher in both.manifest.teachers] == ["toynet0", "toynet1"]


def test_stopped_and_resumed_images_have_the_bits_of_an_uninterrupted_run(
    toy: RealData, toy_teachers: list[Teacher], plan: Plan, tmp_path: Path
) -> None:
    config = replace(QUICK, classes_per_batch=3)
    whole = sre2l.distill(toy, toy_teachers, 2, config, 0, plan, Run())
    pieces, stops = stopping_again_and_again(
        tmp_path / "run", lambda run: sre2l.distill(toy, toy_teachers, 2, config, 0, plan, run)
    )
    assert stops > 3
    assert torch.equal(whole.images, pieces.images)


def test_a_finished_unit_of_other_weights_is_refused(toy: RealData, plan: Plan, tmp_path: Path) -> None:
    with Run(tmp_path / "run") as run:
        sre2l.distill(toy, [build_toy_teacher(0)], 1, QUICK, 0, plan, run)
    other = build_toy_teacher(1, "toynet0")
    with Run(tmp_path / "run") as run, pytest.raises(StillroomError, match="images by toynet0 were made with other w"):
        sre2l.distill(toy, [other], 1, QUICK, 0, plan, run)


def test_no_more_than_one_finished_unit_is_held_beside_the_set(
    toy: RealData, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    units: list[weakref.ref[torch.Tensor]] = []
    held: list[int] = []

    def note(made: torch.Tensor) -> torch.Tensor:
        held.append(sum(unit() is not None for unit in units))
        units.append(weakref.ref(found := to_bytes(made)))
        return found

    monkeypatch.setattr(pixels, "to_bytes", note)
    sre2l.distill(toy, [build_toy_teacher()], 5, replace(QUICK, steps=1), 0, plan, Run())
    assert held == [0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "cda.steps is 0"),
        ({"learning_rate": 0.0}, "cda.learning_rate is 0.0"),
        ({"statistics_weight": -1.0}, "cda.statistics_weight"),
        ({"tv_weight": -1.0}, "cda.tv_weight and cda.l2_weight"),
        ({"least_scale": 0.0}, "cda.least_scale is 0.0"),
        ({"curriculum_share": 1.5}, "cda.curriculum_share is 1.5"),
        ({"classes_per_batch": 0}, "cda.classes_per_batch is 0"),
        ({"augmentation": "shift"}, "cda.curriculum is 'cosine', but cda.augmentation 'shift' crops nothing"),
        ({"curriculum": "steps"}, "cda.curriculum is 'steps'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StillroomError, match=message):
        CdaConfig(**settings)


def test_a_teacher_without_batchnorm_and_no_teacher_at_all_are_refused(toy: RealData) -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(192, TOY_CLASSES))
    with pytest.raises(StillroomError, match="'plain' has no BatchNorm layers"):
        sre2l.check(toy, {"plain": plain, "toynet": build_toy_teacher(0).model}, 1, QUICK)
    assert sre2l.check(toy, {"toynet": build_toy_teacher(0).model, "plain": plain}, 1, QUICK) == 0
    with pytest.raises(StillroomError, match="sre2l needs a teacher"):
        sre2l.check(toy, {}, 1, QUICK)
