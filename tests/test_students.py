"""Labels and students (Algorithm 2) against NumPy written from the paper, and the fairness of the comparison."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TOY_CLASSES, build_toy_teacher
from test_infer import numpy_forward

from stillroom import augment, students
from stillroom.compute import Plan, build_generator
from stillroom.data import RealData
from stillroom.distilled import DistilledSet
from stillroom.errors import StillroomError
from stillroom.labels import attach_labels, dynamic_label_bytes, ensemble_logits
from stillroom.methods import infer
from stillroom.methods.infer import InferConfig
from stillroom.methods.select import RandomConfig, distill_random
from stillroom.run import Run
from stillroom.students import (
    Evaluation,
    StudentConfig,
    build_draws,
    check_matches,
    evaluate,
    hard_label_loss,
    mse_hard_loss,
    soft_label_loss,
    steps_for,
    train_student,
)
from stillroom.teachers import Teacher, hash_weights
from stillroom.train import Epochs, TrainConfig

PLAIN = TrainConfig(epochs=2, batch_size=8, optimizer="adamw", learning_rate=1e-2, crop_padding=0, flip=False)
MIXED = replace(PLAIN, mixup_beta=0.8, crop_padding=1)


@pytest.fixture
def distilled(toy: RealData, toy_teachers: list[Teacher], plan: Plan) -> DistilledSet:
    """Two slots, two teachers: 8 naturals and 24 views, with large compensators and static labels."""
    made = infer.distill(toy, toy_teachers, 4, InferConfig(steps=3), 0, plan, Run())
    return attach_labels(made, "static", toy_teachers, plan, Run())


def views_by_hand(distilled: DistilledSet, row: int) -> np.ndarray:
    """Equation 2 for one view: the natural, plus the compensator of its teacher and slot, cut to valid pixels."""
    image, compensator = distilled.view_table()[row].tolist()
    view = distilled.images[image].numpy() / 255.0
    if compensator >= 0:
        assert distilled.compensators is not None
        teacher, slot = divmod(compensator, distilled.compensators.codes.shape[1])
        assert slot == int(distilled.slots[image])
        view = view + distilled.compensators.codes[teacher, slot].double().numpy()
    return view.clip(0, 1)


def normalized(views: np.ndarray, real: RealData) -> np.ndarray:
    return (views - np.array(real.mean)[:, None, None]) / np.array(real.std)[:, None, None]


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 30.0])
def test_student_loss_is_the_divergence_of_softened_distributions_without_a_factor_of_temperature(
    temperature: float,
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = (5 * torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = softmax(targets.numpy() / temperature), softmax(logits.numpy() / temperature)
    expected = (p * (np.log(p) - np.log(q))).sum(1).mean()
    assert soft_label_loss(logits, targets, temperature).item() == pytest.approx(expected, rel=1e-9)


def test_hard_label_loss_is_cross_entropy_with_mixed_one_hot_rows() -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.eye(4, dtype=torch.float64)
    targets = 0.7 * rows[[0, 1, 2, 3, 0]] + 0.3 * rows[[3, 3, 1, 0, 0]]
    expected = -(targets.numpy() * np.log(softmax(logits.numpy()))).sum(1).mean()
    assert hard_label_loss(logits, targets).item() == pytest.approx(expected, rel=1e-9)


def test_mse_hard_loss_is_the_mean_square_of_logits_plus_weighted_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, soft = (torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = [0, 3, 1, 1, 2]
    targets = torch.stack([soft, torch.eye(4, dtype=torch.float64)[labels]], dim=1)
    squares = ((logits - soft).numpy() ** 2).sum() / 20
    cross_entropy = -np.log(softmax(logits.numpy())[range(5), labels]).mean()
    for weight in (0.0, 0.15):
        expected = squares + weight * cross_entropy
        assert mse_hard_loss(logits, targets, weight).item() == pytest.approx(expected, rel=1e-9)


def test_cutmix_pastes_a_partner_s_pixels_and_mixes_logits_by_area_and_hard_labels_stay_the_image_s_own(
    distilled: DistilledSet, plan: Plan
) -> None:
    rows = torch.arange(10, 18)
    draw = build_draws(distilled, replace(PLAIN, cutmix_beta=1.0), [], plan, with_hard=True)
    plain, logits = build_draws(distilled, PLAIN, [], plan)(rows, build_generator(0))
    for seed in range(5):
        images, targets = draw(rows, build_generator(seed))
        mixing = augment.draw_cutmix(build_generator(seed), 8, 1.0, 8, 8)
        assert mixing.box is not None
        top, left, height, width = mixing.box
        for row in range(8):
            expected = plain[row].clone()
            inside = (slice(None), slice(top, top + height), slice(left, left + width))
            expected[inside] = plain[mixing.permutation[row]][inside]
            assert torch.equal(images[row], expected)
        share = 1 - height * width / 64
        torch.testing.assert_close(targets[:, 0], share * logits + (1 - share) * logits[mixing.permutation])
        assert targets[:, 1].argmax(1).tolist() == distilled.labels[distilled.view_table()[rows, 0]].tolist()


@pytest.mark.parametrize("kind", ["hard", "static", "dynamic"])
def test_students_are_trained_by_mse_hard_and_cutmix_with_every_kind_of_label(
    distilled: DistilledSet, toy: RealData, toy_teachers: list[Teacher], plan: Plan, toynet: str, kind: str
) -> None:
    config = StudentConfig(toynet, replace(PLAIN, cutmix_beta=1.0), 1, loss="mse_hard", hard_weight=0.2)
    labelled = attach_labels(distilled, kind, toy_teachers, plan, Run())
    both = [
        evaluate(labelled, toy, settings, (0,), plan, Run(), teachers=toy_teachers, total_steps=6)
        for settings in (config, replace(config, loss="kl"))
    ]
    assert all(0 <= evaluation.mean <= 1 for evaluation in both)


def test_static_labels_are_the_mean_logits_of_all_teachers_on_each_stored_view(
    distilled: DistilledSet, toy: RealData, toy_teachers: list[Teacher]
) -> None:
    """Equation 6, view by view: rows cannot be exchanged, and a teacher cannot be left out."""
    assert distilled.soft_labels is not None
    assert distilled.view_count == 24
    for row in range(distilled.view_count):
        view = normalized(views_by_hand(distilled, row), toy)[None]
        expected = np.mean([numpy_forward(teacher.model, view)[0][0] for teacher in toy_teachers], axis=0)
        np.testing.assert_allclose(distilled.soft_labels[row].double().numpy(), expected, rtol=2e-3, atol=2e-3)


def test_every_label_is_far_from_that_of_other_views(distilled: DistilledSet) -> None:
    """Otherwise the test above could not see rows that were exchanged."""
    assert distilled.soft_labels is not None
    distances = torch.cdist(distilled.soft_labels.double(), distilled.soft_labels.double())
    distances.fill_diagonal_(math.inf)
    assert distances.min() > 0.02


@pytest.mark.parametrize("folded", [False, True])
def test_mixup_mixes_images_and_logits_with_the_same_partners_and_weight(
    distilled: DistilledSet, toy: RealData, plan: Plan, folded: bool
) -> None:
    train = replace(PLAIN, mixup_beta=0.8, mixup_folded=folded)
    rows = torch.tensor([5, 0, 23, 11, 17, 2])
    weights = []
    for draw in range(8):
        images, targets = build_draws(distilled, train, [], plan)(rows, build_generator(draw))
        mixing = augment.draw_mixup(build_generator(draw), len(rows), 0.8, folded=folded)
        weights.append(mixing.weight)
        views = normalized(np.stack([views_by_hand(distilled, row) for row in rows.tolist()]), toy)
        assert distilled.soft_labels is not None
        logits = distilled.soft_labels[rows].double().numpy()
        partners = mixing.permutation.numpy()
        for found, whole in ((images, views), (targets, logits)):
            expected = mixing.weight * whole + (1 - mixing.weight) * whole[partners]
            np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-4, atol=1e-4)
    assert (min(weights) >= 0.5) == folded


def test_cutmix_mixes_labels_by_the_share_that_the_image_truly_keeps(
    distilled: DistilledSet, toy: RealData, plan: Plan
) -> None:
    """A box partly beyond the image takes less than was drawn: pixels are counted."""
    rows = torch.tensor([5, 0, 23, 11, 17, 2])
    shares = []
    for draw in range(6):
        train = replace(PLAIN, cutmix_beta=1.0)
        images, targets = build_draws(distilled, train, [], plan)(rows, build_generator(draw))
        partners = augment.draw_cutmix(build_generator(draw), len(rows), 1.0, 8, 8).permutation.numpy()
        views = normalized(np.stack([views_by_hand(distilled, row) for row in rows.tolist()]), toy)
        kept = np.isclose(images.numpy(), views, atol=1e-4).all(1)  # [batch, 8, 8]
        pasted = np.isclose(images.numpy(), views[partners], atol=1e-4).all(1)
        assert (kept | pasted).all()
        moved = partners != np.arange(len(rows))
        share = kept[moved].mean((1, 2)).min()  # two views can share a pixel where both are clipped
        assert distilled.soft_labels is not None
        logits = distilled.soft_labels[rows].double().numpy()
        expected = share * logits + (1 - share) * logits[partners]
        np.testing.assert_allclose(targets.double().numpy(), expected, rtol=1e-4, atol=1e-4)
        shares.append(share)
    assert len(set(shares)) > 2


def test_hard_labels_are_mixed_as_one_hot_rows(distilled: DistilledSet, plan: Plan) -> None:
    hard = distilled.with_labels(None)
    rows = torch.arange(10, 18)
    _, targets = build_draws(hard, replace(PLAIN, mixup_beta=0.8), [], plan)(rows, build_generator(3))
    mixing = augment.draw_mixup(build_generator(3), len(rows), 0.8, folded=False)
    one_hot = np.eye(TOY_CLASSES)[hard.labels[hard.view_table()[rows, 0]].numpy()]
    expected = mixing.weight * one_hot + (1 - mixing.weight) * one_hot[mixing.permutation.numpy()]
    np.testing.assert_allclose(targets.numpy(), expected, atol=1e-6)


def test_dynamic_labels_are_the_teachers_opinion_of_the_augmented_and_mixed_batch(
    distilled: DistilledSet, toy_teachers: list[Teacher], plan: Plan
) -> None:
    dynamic = distilled.with_labels(None, "dynamic")
    rows = torch.arange(8)
    images, targets = build_draws(dynamic, MIXED, toy_teachers, plan)(rows, build_generator(1))
    seen = images.double().numpy()
    expected = np.mean([numpy_forward(teacher.model, seen)[0] for teacher in toy_teachers], axis=0)
    np.testing.assert_allclose(targets.double().numpy(), expected, rtol=1e-4, atol=1e-4)
    static_images, _ = build_draws(distilled, MIXED, [], plan)(rows, build_generator(1))
    assert torch.equal(images, static_images)  # the kind of label changes the label alone


def test_teachers_of_equal_norms_count_alike_however_large_their_logits_are(
    distilled: DistilledSet, toy_teachers: list[Teacher], plan: Plan
) -> None:
    """G-VBSM's z_i sum_j ||z_j|| / (N ||z_i||), norms over the batch; a teacher alone is itself."""
    first, second = (replace(teacher, equal_norms=True) for teacher in toy_teachers)
    second.model[-1].weight.data *= 5
    second.model[-1].bias.data *= 5
    rows, dynamic = torch.arange(8), distilled.with_labels(None, "dynamic")
    images, targets = build_draws(dynamic, MIXED, [first, second], plan)(rows, build_generator(1))
    z = np.stack([numpy_forward(teacher.model, images.double().numpy())[0] for teacher in (first, second)])
    norms = [np.sqrt((logits**2).sum()) for logits in z]
    expected = sum(logits * sum(norms) / (2 * norm) for logits, norm in zip(z, norms, strict=True)) / 2
    np.testing.assert_allclose(targets.double().numpy(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ensemble_logits([first], plan)(images), first.model(images))


def test_dynamic_labels_without_teachers_are_refused(distilled: DistilledSet, plan: Plan) -> None:
    with pytest.raises(StillroomError, match="at least one teacher"):
        build_draws(distilled.with_labels(None, "dynamic"), PLAIN, [], plan)
    with pytest.raises(StillroomError, match="at least one teacher"):
        ensemble_logits([], plan)


def test_static_labels_that_are_not_finite_are_refused(
    distilled: DistilledSet, toy_teachers: list[Teacher], plan: Plan
) -> None:
    teacher = build_toy_teacher(4)
    teacher.model[-1].weight.data.fill_(1e6)  # beyond float16
    with pytest.raises(StillroomError, match="static labels of 24 views are not finite, first view 0"):
        attach_labels(distilled, "static", [teacher], plan, Run())


def test_bytes_of_dynamic_labels_are_a_float16_row_for_every_augmented_image(
    distilled: DistilledSet, toy: RealData, toy_teachers: list[Teacher], plan: Plan, toynet: str
) -> None:
    assert dynamic_label_bytes(64, 100, 10) == 64 * 100 * 10 * 2
    config = StudentConfig(toynet, MIXED, dynamic_epochs=1)
    dynamic = attach_labels(distilled, "dynamic", toy_teachers, plan, Run())
    result = evaluate(dynamic, toy, config, (0,), plan, Run(), teachers=toy_teachers)
    assert result.steps == 3  # 24 views in batches of 8, for one epoch
    assert result.label_bytes == 24 * TOY_CLASSES * 2
    static = evaluate(distilled, toy, config, (0,), plan, Run())
    assert static.steps == 2 * 3
    assert static.label_bytes == 24 * TOY_CLASSES * 2


def test_another_order_of_classes_is_refused_and_the_first_difference_named(
    distilled: DistilledSet, toy: RealData
) -> None:
    check_matches(distilled, toy)
    first, second, *others = toy.class_names
    with pytest.raises(StillroomError, match=r"another order.*label 0 is 'north west' in the set and 'north east'"):
        check_matches(distilled, replace(toy, class_names=(second, first, *others)))
    with pytest.raises(StillroomError, match=r"has 4 classes .*evaluate it on the dataset it was made of \(toy\)"):
        check_matches(distilled, replace(toy, class_names=(*toy.class_names, "centre")))


def test_another_image_size_is_refused_with_the_flag_that_mends_it(distilled: DistilledSet, toy: RealData) -> None:
    with pytest.raises(StillroomError, match=r"--data\.image-size 8"):
        check_matches(distilled, replace(toy, image_size=16))


def test_controls_at_equal_steps_take_exactly_the_methods_optimiser_steps(
    distilled: DistilledSet, toy: RealData, plan: Plan, toynet: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = 0
    step = torch.optim.AdamW.step

    def counted(self: torch.optim.AdamW, *args: object) -> object:
        nonlocal taken
        taken += 1
        return step(self, *args)

    config = StudentConfig(toynet, PLAIN)
    control = distill_random(toy, [], 4, RandomConfig(), 0, plan, Run()).with_labels(None)
    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    own = evaluate(distilled, toy, config, (0,), plan, Run())
    assert taken == own.steps == steps_for(distilled, PLAIN) == 6
    taken = 0
    equal = evaluate(control, toy, config, (0,), plan, Run(), total_steps=own.steps)
    assert taken == equal.steps == own.steps
    assert steps_for(control, PLAIN) == 4  # fewer images, so the same steps are more epochs


def test_the_last_epoch_is_reported_and_the_best_stands_only_beside_it(
    distilled: DistilledSet, toy: RealData, plan: Plan, toynet: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    curve = iter([0.3, 0.9, 0.5])
    monkeypatch.setattr(students, "measure_accuracy", lambda *_: {"top1": next(curve), "top5": 1.0})
    config = StudentConfig(toynet, replace(PLAIN, epochs=3), measure_every_epochs=1)
    result = evaluate(distilled, toy, config, (0,), plan, Run())
    assert result.top1 == (0.5,)
    assert result.best == (0.9,)
    assert result.mean == 0.5


def test_the_test_split_is_looked_at_after_training_alone_unless_a_curve_is_asked_for(
    distilled: DistilledSet, toy: RealData, plan: Plan, toynet: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    measure = students.measure_accuracy
    monkeypatch.setattr(students, "measure_accuracy", lambda *a: looks.append(0) or measure(*a))
    evaluate(distilled, toy, StudentConfig(toynet, PLAIN), (0,), plan, Run())
    assert len(looks) == 1


def test_spread_over_seeds_is_the_standard_deviation_of_the_sample() -> None:
    result = Evaluation("net", "hard", 1, (0.4, 0.5, 0.9), (1.0,) * 3, (0.9,) * 3, (1.0,) * 3, 0)
    assert result.std == pytest.approx(np.std([0.4, 0.5, 0.9], ddof=1))
    assert result.mean == pytest.approx(0.6)
    assert replace(result, top1=(0.4,)).std == 0.0
    assert str(result) == f"net, hard labels: 60.0% ± {statistics.stdev([0.4, 0.5, 0.9]):.1%} over 3 seeds"


def test_students_of_one_seed_draw_alike_and_others_do_not(
    distilled: DistilledSet, toy: RealData, plan: Plan, toynet: str
) -> None:
    config = StudentConfig(toynet, MIXED)

    def losses(seed: int) -> list[float]:
        _, history = train_student(distilled, toy, config, MIXED, 6, seed, [], plan, Run(), "unit")
        return [row["loss"] for row in history]

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


def test_sets_of_equal_size_are_visited_in_the_same_order_with_the_same_weights_at_the_start(
    distilled: DistilledSet, toy: RealData, plan: Plan, toynet: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[list[int]], str]] = []

    def record(model: torch.nn.Module, config: TrainConfig, epochs: Epochs, *_: object, **__: object) -> list[dict]:
        seen.append((epochs.rows(1).tolist(), hash_weights(model)))
        return [{"top1": 0.5, "top5": 1.0, "seconds": 1.0}]

    monkeypatch.setattr(students, "fit", record)
    for made in (distilled, distilled.with_labels(None)):
        evaluate(made, toy, StudentConfig(toynet, PLAIN), (3,), plan, Run(), cell=made.manifest.label_kind)
    assert seen[0] == seen[1]


def test_a_finished_student_is_never_trained_again(
    distilled: DistilledSet, toy: RealData, plan: Plan, toynet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = StudentConfig(toynet, PLAIN)
    with Run(tmp_path / "run") as run:
        first = evaluate(distilled, toy, config, (0, 1), plan, run)
    monkeypatch.setattr(students, "train_student", lambda *_, **__: pytest.fail("trained again"))
    with Run(tmp_path / "run") as run:
        assert evaluate(distilled, toy, config, (0, 1), plan, run) == first


def test_students_learn_the_toy_world_from_a_few_views(
    distilled: DistilledSet, toy: RealData, plan: Plan, toynet: str
) -> None:
    made = distill_random(toy, [], 4, RandomConfig(), 0, plan, Run()).with_labels(None)
    result = evaluate(made, toy, StudentConfig(toynet, replace(PLAIN, epochs=15)), (0, 1), plan, Run())
    assert result.mean > 0.8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "student.temperature is 0.0"),
        ({"dynamic_epochs": 0}, "student.dynamic_epochs is 0"),
        ({"hard_weight": -1.0}, "student.hard_weight is -1.0; give 0 or more"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(StillroomError, match=message):
        StudentConfig(**settings)


def test_no_seeds_are_refused_before_anything_is_trained(
    distilled: DistilledSet, toy: RealData, plan: Plan, toynet: str
) -> None:
    with pytest.raises(StillroomError, match="seeds is empty"):
        evaluate(distilled, toy, StudentConfig(toynet, PLAIN), (), plan, Run())


@pytest.mark.parametrize(("images", "batch", "epochs", "steps"), [(16, 8, 2, 4), (16, 10, 10, 16), (16, 64, 3, 3)])
def test_epochs_are_counted_in_views_so_that_an_incomplete_batch_costs_nobody(
    toy: RealData, plan: Plan, images: int, batch: int, epochs: int, steps: int
) -> None:
    control = distill_random(toy, [], images // TOY_CLASSES, RandomConfig(), 0, plan, Run())
    assert steps_for(control, replace(PLAIN, epochs=epochs, batch_size=batch)) == steps


def test_finished_students_are_not_taken_for_those_of_other_labellers_or_other_labels(
    toy: RealData, toy_teachers: list[Teacher], plan: Plan, tmp_path: Path
) -> None:
    config = StudentConfig("convnet_thin", replace(MIXED, epochs=1, batch_size=8), dynamic_epochs=1)
    plain = distill_random(toy, [], 2, RandomConfig(), 0, plan, Run())
    first, second = toy_teachers

    def train(run: Run, kind: str, teacher: Teacher) -> None:
        labelled = attach_labels(plain, kind, [teacher], plan, Run())
        evaluate(labelled, toy, config, (0,), plan, run, teachers=[teacher], total_steps=1, cell=kind)

    for kind in ("static", "dynamic"):
        with Run(tmp_path / kind) as run:
            train(run, kind, first)
            train(run, kind, first)
            with pytest.raises(StillroomError, match="was trained on another set, or labelled by other teachers'"):
                train(run, kind, second)
    with Run(tmp_path / "hard") as run:  # of which no teacher knows
        train(run, "hard", first)
        train(run, "hard", second)
