"""G-VBSM against NumPy: statistics of layers and patches, matching, densification; and what holds of any method."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TOY_CLASSES, ToyNet, build_toy_teacher, stopping_again_and_again
from test_infer import numpy_forward, numpy_label_loss
from torch import nn

from stillroom.augment import draw_crops
from stillroom.compute import Plan, build_generator
from stillroom.data import MemoryImages, RealData
from stillroom.errors import StillroomError
from stillroom.methods import gvbsm
from stillroom.methods.gvbsm import (
    GvbsmConfig,
    Matcher,
    StatisticsLayout,
    densification_loss,
    draw_kept,
    find_classmates,
    gather_statistics,
    matching_loss,
    patch_moments,
)
from stillroom.methods.pixels import class_blocks
from stillroom.recipes import find_recipe
from stillroom.run import Run
from stillroom.teachers import Teacher

QUICK = GvbsmConfig(steps=6, shift_limit=1, crop_padding=1, images_per_batch=10)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def numpy_patches(x: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of every patch, over images, channels and its pixels."""
    rows, columns = x.shape[2] // side, x.shape[3] // side
    patches = [
        x[:, :, side * r : side * (r + 1), side * c : side * (c + 1)] for r in range(rows) for c in range(columns)
    ]
    return np.array([p.mean() for p in patches]), np.array([p.var() for p in patches])


def numpy_statistics(net: ToyNet, x: np.ndarray, side: int) -> list[np.ndarray]:
    """The statistics of the inputs of conv, norm, conv, norm: ToyNet's layers that are matched."""
    _, (first, second) = numpy_forward(net, x)
    after = (first[0] - first[1].running_mean.numpy()[:, None, None]) / np.sqrt(
        first[1].running_var.numpy()[:, None, None] + first[1].eps
    )
    after = np.maximum(
        after * first[1].weight.detach().numpy()[:, None, None] + first[1].bias.detach().numpy()[:, None, None], 0
    )
    found = []
    for values, is_convolution in ((x, True), (first[0], False), (after, True), (second[0], False)):
        found += [values.mean((0, 2, 3)), values.var((0, 2, 3))]
        found += list(numpy_patches(values, side)) if is_convolution else []
    return found


def test_patch_moments_agree_with_numpy_group_by_group() -> None:
    x = noise(6, 5, 8, 4)
    mean, variance = patch_moments(x, 2, 4)
    assert mean.shape == variance.shape == (2, 2)
    for group in range(2):
        expected = numpy_patches(x[3 * group : 3 * group + 3].double().numpy(), 4)
        np.testing.assert_allclose(mean[group], expected[0], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(variance[group], expected[1], rtol=1e-4)


def test_maps_that_patches_do_not_tile_are_resized_up() -> None:
    x = noise(2, 3, 7, 2)
    mean, variance = patch_moments(x, 1, 4)
    resized = nn.functional.interpolate(x.double(), (8, 4), mode="bilinear").numpy()
    for found, expected in zip((mean, variance), numpy_patches(resized, 4), strict=True):
        np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-6)


def test_a_matcher_lays_out_the_statistics_of_all_layers_in_the_order_they_run() -> None:
    net, views = ToyNet(3).eval().requires_grad_(False), noise(8, 3, 8, 8)
    matcher = Matcher(net, 2, 4)
    layout = matcher.find_layout(8)
    logits, statistics = matcher(views)
    assert layout.lengths == (3, 3, 4, 4, 6, 6, 6, 6, 4, 4, 6, 6)
    assert layout.owners.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3]
    assert layout.convolutions.tolist() == [True, False, True, False]
    torch.testing.assert_close(logits, net(views))
    for group in range(2):
        expected = np.concatenate(numpy_statistics(net, views[4 * group : 4 * group + 4].double().numpy(), 4))
        np.testing.assert_allclose(statistics[group].detach(), expected, rtol=1e-4, atol=1e-5)
    known = layout.known.split(layout.lengths)
    assert torch.equal(known[4], net[1].running_mean)
    assert torch.equal(known[11], net[4].running_var)
    assert known[0].isnan().all()


def test_matching_has_the_value_of_the_average_and_the_gradient_of_this_step() -> None:
    layout = StatisticsLayout(
        (2, 3),
        torch.tensor([0, 1]),
        torch.tensor([0, 0, 1, 1, 1]),
        torch.tensor([True, False]),
        torch.full((5,), float("nan")),
    )
    statistics, target = noise(1, 5).requires_grad_(), noise(5, seed=1)
    average, keep = noise(1, 5, seed=2), torch.ones(1, 2)
    distance, mixed = matching_loss(statistics, average, target, keep, layout, 0.8, 10.0)
    (gradient,) = torch.autograd.grad(distance.sum(), statistics)
    s, t, a = (value.detach().double().numpy().ravel() for value in (statistics, target, average))
    expected = 0.8 * a + 0.2 * s
    np.testing.assert_allclose(mixed[0], expected, rtol=1e-6)
    apart = [(expected - t)[:2], (expected - t)[2:]]
    norms = [np.linalg.norm(piece) for piece in apart]
    np.testing.assert_allclose(distance.detach(), 10 * norms[0] + norms[1], rtol=1e-6)
    np.testing.assert_allclose(gradient[0], np.concatenate([10 * apart[0] / norms[0], apart[1] / norms[1]]), rtol=1e-5)


def test_an_average_begins_at_the_first_statistics_and_a_dropped_layer_neither_counts_nor_moves() -> None:
    layout = StatisticsLayout(
        (2, 3), torch.tensor([0, 1]), torch.tensor([0, 0, 1, 1, 1]), torch.tensor([True, False]), torch.zeros(5)
    )
    statistics, begun = noise(1, 5).requires_grad_(), torch.full((1, 5), float("nan"))
    keep = torch.tensor([[0.0, 1.0]])
    distance, average = matching_loss(statistics, begun, torch.zeros(5), keep, layout, 0.8, 10.0)
    assert distance.item() == pytest.approx(statistics[0, 2:].norm().item())
    assert average[0, :2].isnan().all()
    assert torch.equal(average[0, 2:], statistics[0, 2:].detach())
    (gradient,) = torch.autograd.grad(distance.sum(), statistics)
    assert (gradient[0, :2] == 0).all()
    assert gradient.isfinite().all()


def test_densification_agrees_with_numpy_and_is_zero_for_a_lone_image() -> None:
    """Two blocks: three images of class 0 and two of class 1, then two, two and a lone one."""
    positions = torch.tensor([[0, 4, 8, 1, 5], [2, 6, 3, 7, 1]])
    views = 0.3 * noise(10, 3, 4, 4)
    found = densification_loss(views, find_classmates(positions, 4, "cpu"), 2, 4.0)

    def divergence(rows: list[int]) -> float:
        flat = views[rows].double().numpy().reshape(len(rows), -1)
        e = np.linalg.eigvalsh(flat @ flat.T)
        soft, plain = (np.exp(v - v.max()) / np.exp(v - v.max()).sum() for v in (e / 4.0, e))
        return float((soft * np.log(soft / plain)).sum())

    expected = [divergence([0, 1, 2]) + divergence([3, 4]), divergence([5, 6]) + divergence([7, 8])]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_densification_drives_equal_images_of_a_class_apart() -> None:
    x = (noise(1, 3, 4, 4) * 0.2).repeat(3, 1, 1, 1) + 1e-3 * noise(3, 3, 4, 4, seed=1)
    x.requires_grad_()
    mates = find_classmates(torch.tensor([[0, 1, 2]]), 1, "cpu")
    losses = []
    for _ in range(30):
        loss = densification_loss(x, mates, 1, 4.0).sum()
        (gradient,) = torch.autograd.grad(loss, x)
        x.data -= 0.05 * gradient
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_large_images_are_averaged_down_before_their_gram_matrix() -> None:
    views = noise(2, 3, 64, 64)
    mates = find_classmates(torch.tensor([[0, 1]]), 1, "cpu")
    small = views.unflatten(2, (32, 2)).unflatten(4, (32, 2)).mean((3, 5))
    scaled = 0.01
    torch.testing.assert_close(
        densification_loss(scaled * views, mates, 1, 4.0), densification_loss(scaled * small, mates, 1, 4.0)
    )


@pytest.mark.parametrize("augmentation", ["none", "crop_shift"])
def test_real_statistics_are_those_of_all_images_cropped_with_a_black_border(
    toy: RealData, plan: Plan, tmp_path: Path, augmentation: str
) -> None:
    """96 images in batches of 64 and 32; BatchNorms keep their own."""
    teacher = build_toy_teacher(1)
    config = replace(QUICK, augmentation=augmentation, crop_padding=3)
    with Run(tmp_path / "run") as run:
        [found] = gather_statistics([teacher], toy, config, 0, plan, run)
        assert torch.equal(found, gather_statistics([teacher], toy, config, 0, plan, run)[0])
    pixels = toy.train.images.numpy()
    if augmentation == "crop_shift":
        bordered, pieces = np.pad(pixels, ((0, 0), (0, 0), (3, 3), (3, 3))), []
        for index, rows in enumerate((range(64), range(64, 96))):
            corners = draw_crops(build_generator(0, "statistics", teacher.name, index), len(rows), 3).tolist()
            pieces += [
                bordered[row, :, top : top + 8, left : left + 8] for row, (top, left) in zip(rows, corners, strict=True)
            ]
        pixels = np.stack(pieces)
    x = (pixels / 255 - np.array(toy.mean)[:, None, None]) / np.array(toy.std)[:, None, None]
    layout = Matcher(teacher.model, 1, 4).find_layout(8)
    for index, (piece, expected) in enumerate(
        zip(found.split(layout.lengths), numpy_statistics(teacher.model, x, 4), strict=True)
    ):
        own = index in (4, 5, 10, 11)
        expected = layout.known.split(layout.lengths)[index] if own else expected
        np.testing.assert_allclose(piece, expected, rtol=1e-4, atol=1e-5)


def test_real_statistics_do_not_depend_on_the_order_of_images(toy: RealData, plan: Plan) -> None:
    """Folders are read class by class: the variances of batches of one class leave out what tells classes apart."""
    teacher, config = build_toy_teacher(1), replace(QUICK, augmentation="none")
    order = toy.train.labels.argsort(stable=True)
    ordered = replace(toy, train=MemoryImages(toy.train.images[order], toy.train.labels[order]))
    found, same = (gather_statistics([teacher], real, config, 0, plan, Run())[0] for real in (toy, ordered))
    torch.testing.assert_close(found, same, rtol=1e-4, atol=1e-5)


def test_a_step_s_terms_agree_with_numpy(toy: RealData, plan: Plan) -> None:
    teacher = build_toy_teacher(2)
    config = replace(QUICK, augmentation="none", drop_rate=0.0, statistics_weight=0.5, first_layer_weight=3.0)
    target = noise(58, seed=4).abs()
    matching = gvbsm.build_matching(teacher.model, target, 1, 8, config, plan, 1)
    terms, memory = gvbsm.build_terms(torch.arange(TOY_CLASSES)[None], toy, config, plan, [matching])
    x = noise(1, TOY_CLASSES, 3, 8, 8)
    label, statistics, density = (float(term) for term in terms(0, x, [build_generator(0)]))
    images = x[0].double().numpy()
    logits, _ = numpy_forward(teacher.model, images)
    assert label == pytest.approx(numpy_label_loss(logits, np.arange(TOY_CLASSES)), rel=1e-5)
    pieces = numpy_statistics(teacher.model, images, 4)
    targets = np.split(target.double().numpy(), np.cumsum([len(piece) for piece in pieces])[:-1])
    norms = [np.linalg.norm(piece - wanted) for piece, wanted in zip(pieces, targets, strict=True)]
    assert statistics == pytest.approx(0.5 * (3 * sum(norms[:4]) + sum(norms[4:])), rel=1e-4)
    assert density == 0  # one image of each class
    np.testing.assert_allclose(memory[0][0], np.concatenate(pieces), rtol=1e-3, atol=1e-5)


def test_teachers_take_turns_and_convolutions_are_dropped_by_chance(toy: RealData, plan: Plan) -> None:
    asked: list[int] = []
    layout = Matcher(ToyNet(0), 1, 4).find_layout(8)

    def matching(index: int) -> Any:
        def compute(views: torch.Tensor, labels: torch.Tensor, average: torch.Tensor, keep: torch.Tensor) -> Any:
            asked.append(index)
            return views.sum()[None], views.sum()[None], average

        return compute, layout

    terms, _ = gvbsm.build_terms(torch.arange(4)[None], toy, QUICK, plan, [matching(i) for i in range(3)])
    for step in range(7):
        terms(step, noise(1, 4, 3, 8, 8), [build_generator(step)])
    assert asked == [0, 1, 2, 0, 1, 2, 0]
    kept = torch.stack([draw_kept(layout, 0.4, build_generator(seed)) for seed in range(400)]).mean(0)
    assert kept[1] == kept[3] == 1
    assert ((kept[[0, 2]] - 0.6).abs() < 0.08).all()


def test_rounds_give_each_class_its_share_of_the_slots_in_turn() -> None:
    """Tiny-ImageNet's script: of 50 images per class a block of 50 has 5 of each of 10 classes, not one class whole."""
    blocks = class_blocks(50, 200, 50, rounds=10)
    slots, labels = (torch.stack(blocks) // 200).numpy(), (torch.stack(blocks) % 200).numpy()
    order = np.arange(10_000).reshape(10, 5, 200).transpose(0, 2, 1).reshape(200, 50)  # [round, class, slot of it]
    np.testing.assert_array_equal(200 * slots + labels, order)
    assert all(len(set(block)) == 10 for block in labels)
    assert torch.equal(torch.cat(class_blocks(7, 3, 4, rounds=2)), torch.tensor(
        [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, 12, 15, 18, 13, 16, 19, 14, 17, 20]
    ))  # fmt: skip
    assert torch.equal(torch.cat(class_blocks(2, 3, 4, rounds=9)), torch.arange(6))


def test_a_round_per_slot_makes_blocks_of_one_image_per_class(
    toy: RealData, toy_teachers: list[Teacher], plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gvbsm, "gather_statistics", lambda teachers, *_: [torch.zeros(58) for _ in teachers])
    asked: list[torch.Tensor] = []

    def recover(config: GvbsmConfig, real: RealData, teachers: object, blocks: list[torch.Tensor], *_: object) -> Any:
        asked.extend(blocks)
        return torch.zeros(12, 3, 8, 8, dtype=torch.uint8)

    monkeypatch.setattr(gvbsm, "recover_images", recover)
    made = gvbsm.distill(toy, toy_teachers, 3, replace(QUICK, rounds=3, images_per_batch=4), 0, plan, Run())
    assert [block.tolist() for block in asked] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert made.manifest.recipe["gvbsm"]["rounds"] == 3


def test_images_are_ipc_of_each_class_and_reach_a_lower_loss(
    toy: RealData, toy_teachers: list[Teacher], plan: Plan, tmp_path: Path
) -> None:
    config = replace(QUICK, steps=40, learning_rate=0.1, statistics_weight=1.0, augmentation="none", drop_rate=0.0)
    with Run(tmp_path / "run") as run:
        distilled = gvbsm.distill(toy, toy_teachers, 3, config, 0, plan, run)
        losses = run.load_unit("images-0-1")[1]["losses"].sum(1)
    assert distilled.labels.tolist() == [0, 1, 2, 3] * 3
    assert distilled.manifest.recipe["gvbsm"]["steps"] == 40
    assert losses.shape == (40, 1)
    assert losses[-4:].mean() < 0.8 * losses[:2].mean()


@pytest.mark.parametrize("change", [{}, {"images_per_batch": 7, "per_image": True}, {"augmentation": "resized_crop"}])
def test_packed_blocks_equal_blocks_one_by_one(
    toy: RealData, toy_teachers: list[Teacher], plan: Plan, change: dict[str, Any]
) -> None:
    config = replace(QUICK, **change)
    packed, single = (
        gvbsm.distill(toy, toy_teachers, 5, config, 0, replace(plan, pack_slots=slots), Run()) for slots in (6, 1)
    )
    assert (packed.images.int() - single.images.int()).abs().max() <= 1  # a rounding may fall the other way


def test_stopped_and_resumed_images_have_the_bits_of_an_uninterrupted_run(
    toy: RealData, toy_teachers: list[Teacher], plan: Plan, tmp_path: Path
) -> None:
    """The losses too: they show what 8-bit images may hide, averages that began anew."""
    with Run(tmp_path / "whole") as run:
        whole = gvbsm.distill(toy, toy_teachers, 3, QUICK, 0, plan, run)
        losses = run.load_unit("images-0-1")[1]["losses"]
    pieces, stops = stopping_again_and_again(
        tmp_path / "run", lambda run: gvbsm.distill(toy, toy_teachers, 3, QUICK, 0, plan, run)
    )
    with Run(tmp_path / "run") as run:
        assert torch.equal(run.load_unit("images-0-1")[1]["losses"], losses)
    assert stops > 3
    assert torch.equal(whole.images, pieces.images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "gvbsm.steps is 0"),
        ({"densification_weight": -1.0}, "gvbsm.densification_weight is -1.0"),
        ({"densification_temperature": 0.0}, "gvbsm.densification_temperature is 0.0"),
        ({"momentum": 1.0}, "gvbsm.momentum is 1.0"),
        ({"drop_rate": -0.1}, "gvbsm.drop_rate is -0.1"),
        ({"patch_side": 0}, "gvbsm.patch_side is 0"),
        ({"images_per_batch": 0}, "gvbsm.images_per_batch is 0"),
        ({"rounds": 0}, "gvbsm.rounds is 0"),
        ({"augmentation": "crop"}, "gvbsm.augmentation is 'crop'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StillroomError, match=message):
        GvbsmConfig(**settings)


def test_a_teacher_without_layers_to_match_and_no_teacher_at_all_are_refused(toy: RealData) -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(192, TOY_CLASSES))
    with pytest.raises(StillroomError, match="'plain' has neither BatchNorm layers nor convolutions"):
        gvbsm.check(toy, {"toynet": ToyNet(0), "plain": plain}, 1, QUICK)
    with pytest.raises(StillroomError, match="gvbsm needs at least one teacher"):
        gvbsm.check(toy, {}, 1, QUICK)


def test_recipes_have_the_scripts_settings() -> None:
    for source, block, rounds, optimizer, decay, weight, equal in (
        ("cifar10", 100, 1, "adamw", 0.0, 0.15, False), ("cifar100", 50, 1, "sgd", 5e-4, 0.15, False),
        ("tiny-imagenet", 50, 10, "sgd", 5e-4, 0.1, False), ("imagenet", 40, 1, "adamw", 0.01, 0.1, True),
    ):  # fmt: skip
        recipe = find_recipe(f"gvbsm-{source}-ipc50")
        assert (recipe.gvbsm.images_per_batch, recipe.gvbsm.rounds) == (block, rounds)
        assert (recipe.gvbsm.steps, recipe.gvbsm.statistics_weight, recipe.gvbsm.densification_weight) == (
            4000,
            0.01,
            1,
        )
        train = recipe.student.train_for("dynamic")
        assert (train.optimizer, train.weight_decay, train.decay_norms, train.cutmix_beta) == (
            optimizer,
            decay,
            False,
            1,
        )
        assert (recipe.student.loss, recipe.student.hard_weight) == ("mse_hard", weight)
        assert recipe.teachers.equal_norms == equal
