"""INFER against NumPy written from the paper: Equations 2, 3 and 4, Algorithm 1's slots, packing and resuming."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TOY_CLASSES, ToyNet, build_toy, build_toy_teacher, stopping_again_and_again
from torch import nn

from stillroom.compute import Plan
from stillroom.data import RealData
from stillroom.distilled import dequantize_compensators
from stillroom.errors import StillroomError
from stillroom.methods import infer
from stillroom.methods.infer import InferConfig, slot_count
from stillroom.methods.recover import build_objective, cosine_rate, deviation_moments, statistics_distance
from stillroom.methods.select import draw_naturals, take_naturals
from stillroom.run import Run
from stillroom.teachers import Teacher
from stillroom.train import apply_normalization

QUICK = InferConfig(steps=6)


def numpy_forward(net: ToyNet, x: np.ndarray) -> tuple[np.ndarray, list[tuple[np.ndarray, nn.BatchNorm2d]]]:
    """Run ToyNet in float64 NumPy; return logits and each BatchNorm's input."""
    inputs = []
    for module in net:
        if isinstance(module, nn.Conv2d):
            weight, stride = module.weight.double().numpy(), module.stride[0]
            padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
            windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))[:, :, ::stride, ::stride]
            x = np.einsum("nchwij,ocij->nohw", windows, weight)
        elif isinstance(module, nn.BatchNorm2d):
            inputs.append((x, module))
            mean, var, scale, shift = (
                t.double().numpy()[None, :, None, None]
                for t in (module.running_mean, module.running_var, module.weight, module.bias)
            )
            x = (x - mean) / np.sqrt(var + module.eps) * scale + shift
        elif isinstance(module, nn.ReLU):
            x = np.maximum(x, 0)
        elif isinstance(module, nn.Flatten):
            x = x.reshape(len(x), -1)
        else:
            x = x @ module.weight.double().numpy().T + module.bias.double().numpy()
    return x, inputs


def numpy_statistics_loss(inputs: list[tuple[np.ndarray, nn.BatchNorm2d]], first_layer_weight: float) -> float:
    """Equation 4: sum over layers of || mean difference ||_2 + || variance difference ||_2."""
    total = 0.0
    for index, (x, norm) in enumerate(inputs):
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
        distance = np.linalg.norm(mean - norm.running_mean.double().numpy())
        distance += np.linalg.norm(var - norm.running_var.double().numpy())
        total += distance * (first_layer_weight if index == 0 else 1.0)
    return total


def numpy_label_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    shifted = logits - logits.max(1, keepdims=True)
    log_probability = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return -log_probability[np.arange(len(labels)), labels].mean()


def test_statistics_loss_and_label_loss_agree_with_numpy_written_from_equations_3_and_4(plan: Plan) -> None:
    net = ToyNet(3).eval().requires_grad_(False)
    views = torch.randn(TOY_CLASSES, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(TOY_CLASSES)
    objective = build_objective(net, 1, 10.0, 0.7, plan, 1)
    label_loss, statistics_loss = objective(views, lambda tensor, rows: tensor[rows], labels[None])
    logits, inputs = numpy_forward(net, views.double().numpy())
    assert len(inputs) == 2
    np.testing.assert_allclose(label_loss.item(), numpy_label_loss(logits, labels.numpy()), rtol=1e-5)
    np.testing.assert_allclose(statistics_loss.item(), 0.7 * numpy_statistics_loss(inputs, 10.0), rtol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_statistics_do_not_cancel_far_from_zero(offset: float) -> None:
    x = torch.randn(10, 5, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.1 + offset
    running_mean, running_var = torch.full((5,), offset + 0.05), torch.full((5,), 0.02)
    reference = x.double().numpy()
    expected = np.linalg.norm(reference.mean((0, 2, 3)) - running_mean.double().numpy()) + np.linalg.norm(
        reference.var((0, 2, 3)) - 0.02
    )
    found = statistics_distance((*deviation_moments(x, running_mean, 1), running_var))
    np.testing.assert_allclose(found.item(), expected, rtol=2e-3)


def test_statistics_loss_is_zero_where_the_batch_has_the_running_statistics() -> None:
    x = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    moments = deviation_moments(x, x.mean((0, 2, 3)), 1)
    distance = statistics_distance((*moments, x.var((0, 2, 3), correction=0)))
    assert distance.item() < 1e-5


def test_first_step_follows_adam_on_the_gradient_of_equation_3(toy: RealData, plan: Plan) -> None:
    """One step from zero, no augmentation: Adam moves each pixel by the learning rate against its gradient's sign."""
    teacher = build_toy_teacher(5)
    naturals, _ = take_naturals(toy, draw_naturals(toy, 1, seed=0))
    config = InferConfig(steps=1, augmentation="none", learning_rate=0.25)
    found = infer.optimize_compensators(teacher, naturals[None], range(1), toy, config, 0, plan, Run(), "unit")
    x = apply_normalization(naturals, toy.mean, toy.std).double().numpy()
    labels = np.arange(TOY_CLASSES)

    def loss(u: np.ndarray) -> float:
        logits, inputs = numpy_forward(teacher.model, x + u)
        return numpy_label_loss(logits, labels) + numpy_statistics_loss(inputs, 10.0)

    for channel, row, column in [(0, 0, 0), (1, 3, 5), (2, 7, 7), (0, 4, 2)]:
        u = np.zeros((3, 8, 8))
        u[channel, row, column] = 1e-5
        gradient = (loss(u) - loss(-u)) / 2e-5
        moved = found["compensators"][0, channel, row, column].item()
        assert moved == pytest.approx(-0.25 * np.sign(gradient), abs=1e-3), gradient
    assert found["losses"][0, :, 0].sum().item() == pytest.approx(loss(np.zeros((3, 8, 8))), rel=1e-5)


def test_optimisation_lowers_the_objective(toy: RealData, plan: Plan) -> None:
    naturals, _ = take_naturals(toy, draw_naturals(toy, 1, seed=0))
    config = InferConfig(steps=60, augmentation="none", learning_rate=0.1)
    losses = infer.optimize_compensators(
        build_toy_teacher(1), naturals[None], range(1), toy, config, 0, plan, Run(), "unit"
    )["losses"].sum(1)
    assert losses[-1].item() < 0.8 * losses[0].item()


@pytest.mark.parametrize(
    ("ipc", "classes", "teachers", "expected"),
    [
        (10, 100, 4, 9), (50, 100, 4, 48), (100, 100, 4, 96), (10, 10, 4, 7), (50, 10, 4, 35), (10, 200, 4, 9),
        (50, 200, 4, 49), (10, 1000, 3, 9), (50, 1000, 3, 49), (33, 10, 1, 30),
    ],
)  # fmt: skip
def test_slots_are_what_the_budget_pays_for_in_exact_integers(
    ipc: int, classes: int, teachers: int, expected: int
) -> None:
    assert slot_count(ipc, classes, teachers) == expected
    assert expected * (classes + teachers) <= ipc * classes < (expected + 1) * (classes + teachers)


def test_ipc_too_small_names_the_smallest_that_works() -> None:
    with pytest.raises(StillroomError, match=r"ipc 1 is too small .* smallest that works is --ipc 2"):
        slot_count(1, 10, 4)
    assert slot_count(2, 10, 4) == 1
    with pytest.raises(StillroomError, match=r"or use fewer --teachers\.networks$"):
        slot_count(1, 10, 4)
    with pytest.raises(StillroomError, match=r"smallest that works is --ipc 2$"):  # one teacher cannot be fewer
        slot_count(1, 10, 1)


def test_naturals_are_one_per_class_and_slot_and_never_repeated(toy: RealData) -> None:
    chosen = draw_naturals(toy, 24, seed=3)
    assert chosen.shape == (24, TOY_CLASSES)
    assert (toy.train.labels[chosen] == torch.arange(TOY_CLASSES)).all()
    assert len(chosen.unique()) == chosen.numel()


def test_more_naturals_begin_with_the_same_ones(toy: RealData) -> None:
    assert torch.equal(draw_naturals(toy, 5, seed=1), draw_naturals(toy, 9, seed=1)[:5])
    assert not torch.equal(draw_naturals(toy, 5, seed=1), draw_naturals(toy, 5, seed=2))


def test_a_class_with_too_few_images_is_named() -> None:
    with pytest.raises(StillroomError, match="25 images per class are needed, but 'north west' has 24"):
        draw_naturals(build_toy(), 25, seed=0)


def test_packed_slots_equal_slots_one_by_one(toy: RealData, toy_teachers: list[Teacher], plan: Plan) -> None:
    packed = infer.distill(toy, toy_teachers, 6, QUICK, 0, replace(plan, pack_slots=4), Run())
    single = infer.distill(toy, toy_teachers, 6, QUICK, 0, replace(plan, pack_slots=1), Run())
    assert packed.compensators is not None
    assert single.compensators is not None
    assert packed.compensators.codes.shape == (2, 4, 3, 8, 8)
    difference = dequantize_compensators(packed.compensators) - dequantize_compensators(single.compensators)
    assert difference.abs().max().item() < 1e-3
    assert torch.equal(packed.images, single.images)


def test_order_of_teachers_does_not_change_a_compensator(
    toy: RealData, toy_teachers: list[Teacher], plan: Plan
) -> None:
    one = infer.distill(toy, toy_teachers, 4, QUICK, 0, plan, Run())
    other = infer.distill(toy, toy_teachers[::-1], 4, QUICK, 0, plan, Run())
    assert one.compensators is not None
    assert other.compensators is not None
    assert torch.equal(one.compensators.codes, other.compensators.codes.flip(0))


def test_compensators_are_stored_in_pixel_units(toy: RealData, plan: Plan) -> None:
    """One step moves every pixel by 0.25 channel standard deviations: 0.25 * std in [0, 1] pixel units."""
    config = InferConfig(steps=1, augmentation="none")
    stored = infer.distill(toy, [build_toy_teacher(2)], 2, config, 0, plan, Run()).compensators
    assert stored is not None
    expected = 0.25 * torch.tensor(toy.std).view(3, 1, 1).expand(3, 8, 8)
    moved = dequantize_compensators(stored)[0, 0].abs()
    assert ((moved - expected).abs() < 2e-3).float().mean() > 0.95  # a gradient of 0 moves nothing


@pytest.mark.parametrize("augmentation", ["none", "shift", "resized_crop", "resized_crop_shift"])
@pytest.mark.parametrize("per_image", [False, True])
def test_every_augmentation_runs_and_repeats_itself(
    toy: RealData, plan: Plan, augmentation: str, per_image: bool
) -> None:
    config = replace(QUICK, augmentation=augmentation, per_image=per_image)
    runs = [infer.distill(toy, [build_toy_teacher(0)], 2, config, 0, plan, Run()) for _ in range(2)]
    assert all(run.compensators is not None for run in runs)
    first, second = (run.compensators.codes for run in runs if run.compensators is not None)
    assert torch.equal(first, second)
    assert first.abs().max() > 0


def test_stopped_and_resumed_compensators_have_the_bits_of_an_uninterrupted_run(
    toy: RealData, toy_teachers: list[Teacher], plan: Plan, tmp_path: Path
) -> None:
    whole = infer.distill(toy, toy_teachers, 4, QUICK, 0, plan, Run())
    pieces, stops = stopping_again_and_again(
        tmp_path / "run", lambda run: infer.distill(toy, toy_teachers, 4, QUICK, 0, plan, run)
    )
    assert stops > 3
    assert whole.compensators is not None
    assert pieces.compensators is not None
    assert torch.equal(whole.compensators.codes, pieces.compensators.codes)


def test_a_finished_unit_is_never_computed_again(
    toy: RealData, toy_teachers: list[Teacher], plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Run(tmp_path / "run") as run:
        infer.distill(toy, toy_teachers, 4, QUICK, 0, plan, run)
    monkeypatch.setattr(infer, "optimize_compensators", lambda *a, **k: pytest.fail("computed again"))
    with Run(tmp_path / "run") as run:
        infer.distill(toy, toy_teachers, 4, QUICK, 0, plan, run)


def test_a_network_without_batchnorm_is_refused_and_told_why(toy: RealData, plan: Plan) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, TOY_CLASSES))
    teacher = Teacher("plain", model, {"top1": 1.0, "top5": 1.0}, "0" * 64, "made for a test")
    with pytest.raises(StillroomError, match=r"'plain' has no BatchNorm layers.*use a network that has them"):
        infer.distill(toy, [teacher], 4, QUICK, 0, plan, Run())


def test_a_loss_that_is_not_finite_stops_and_says_where(toy: RealData, plan: Plan) -> None:
    teacher = build_toy_teacher(0)
    teacher.model[0].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(StillroomError, match="not finite from step 0"):
        infer.distill(toy, [teacher], 4, QUICK, 0, plan, Run())


def test_statistics_weight_zero_leaves_the_label_loss_alone(toy: RealData, plan: Plan) -> None:
    naturals, _ = take_naturals(toy, draw_naturals(toy, 1, seed=0))
    config = InferConfig(steps=2, statistics_weight=0.0)
    losses = infer.optimize_compensators(
        build_toy_teacher(0), naturals[None], range(1), toy, config, 0, plan, Run(), "unit"
    )["losses"]
    assert (losses[:, 1] == 0).all()
    assert (losses[:, 0] > 0).all()


def test_learning_rate_falls_on_half_a_cosine() -> None:
    rates = [cosine_rate(0.25, step, 1000) for step in (0, 500, 999)]
    np.testing.assert_allclose(rates, [0.25, 0.125, 0.25 * (1 + np.cos(np.pi * 0.999)) / 2], atol=1e-12)


def test_only_the_named_teachers_make_compensators_and_pay_for_slots(
    toy: RealData, toy_teachers: list[Teacher], plan: Plan
) -> None:
    both = infer.distill(toy, toy_teachers, 4, QUICK, 0, plan, Run())
    one = infer.distill(toy, toy_teachers, 4, replace(QUICK, teachers=("toynet1",)), 0, plan, Run())
    assert both.compensators is not None
    assert one.compensators is not None
    assert [teacher.name for teacher in one.manifest.teachers] == ["toynet1"]
    assert one.compensators.codes.shape[:2] == (1, 3)  # two teachers leave two slots, one leaves three
    assert torch.equal(one.compensators.codes[0, :2], both.compensators.codes[1])


def test_without_compensators_the_same_naturals_are_left(
    toy: RealData, toy_teachers: list[Teacher], plan: Plan
) -> None:
    made = infer.distill(toy, toy_teachers, 4, QUICK, 0, plan, Run())
    bare = infer.distill(toy, toy_teachers, 4, replace(QUICK, compensators=False), 0, plan, Run())
    assert bare.compensators is None
    assert torch.equal(bare.images, made.images)
    assert bare.view_count == len(bare.images)


def test_ablations_that_make_no_sense_are_refused(toy: RealData, toy_teachers: list[Teacher]) -> None:
    networks = {teacher.name: teacher.model for teacher in toy_teachers}
    with pytest.raises(StillroomError, match=r"infer\.teachers names 'toynet2', which is not among the teachers"):
        infer.check(toy, networks, 4, InferConfig(teachers=("toynet2",)))
    with pytest.raises(StillroomError, match=r"infer\.teachers is"):
        InferConfig(teachers=())
    with pytest.raises(StillroomError, match="leaves no views"):
        InferConfig(compensators=False, naturals_as_views=False)


def test_finished_compensators_are_not_taken_for_those_of_other_naturals_or_other_weights(
    toy: RealData, toy_teachers: list[Teacher], plan: Plan, tmp_path: Path
) -> None:
    naturals = toy.train.batch(torch.arange(8))  # of two slots
    config = InferConfig(steps=2, shift_limit=1)
    with Run(tmp_path / "run") as run:
        first = infer.recover_compensators(toy_teachers[:1], naturals, toy, config, 0, plan, run)
        again = infer.recover_compensators(toy_teachers[:1], naturals, toy, config, 0, plan, run)
        assert torch.equal(first, again)
        with pytest.raises(StillroomError, match="were made for other images; give another directory"):
            infer.recover_compensators(toy_teachers[:1], naturals.flip(0), toy, config, 0, plan, run)
        other = replace(toy_teachers[1], name=toy_teachers[0].name)
        with pytest.raises(StillroomError, match="were made with other weights of it"):
            infer.recover_compensators([other], naturals, toy, config, 0, plan, run)
