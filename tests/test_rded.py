"""RDED against slow loops written from the paper, crop by crop, with torchvision's own crops; and as a unit of work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TOY_CLASSES, TOY_SIZE, ToyNet, build_toy_teacher
from torch import Tensor
from torchvision.transforms import functional as transforms

from stillroom import augment
from stillroom.compute import Plan, build_generator
from stillroom.data import RealData
from stillroom.distilled import DistilledSet
from stillroom.errors import StillroomError, TimeLimitReached
from stillroom.methods import rded
from stillroom.methods.rded import RdedConfig
from stillroom.pipeline import run_recipe
from stillroom.recipes import Recipe, find_recipe
from stillroom.run import Run
from stillroom.teachers import Teacher, hash_weights

QUICK = RdedConfig(candidates=12, crops_per_image=3, crop_scale=(0.3, 1.0))


def distill(
    toy: RealData, plan: Plan, ipc: int = 2, seed: int = 0, run: Run | None = None, **change: Any
) -> DistilledSet:
    teachers = [build_toy_teacher(0), build_toy_teacher(1)]
    return rded.distill(toy, teachers, ipc, replace(QUICK, **change), seed, plan, run or Run())


def rded_by_hand(toy: RealData, teacher: Teacher, label: int, ipc: int, config: RdedConfig, seed: int) -> Tensor:
    """One class, a crop at a time: the paper's two stages; float32 [ipc, 3, side, side] in [0, 1]."""
    size = TOY_SIZE // config.factor
    rows = (toy.train.labels == label).nonzero().flatten()
    rows = rows[torch.randperm(len(rows), generator=build_generator(seed, "rded", "candidates", label))]
    rows = rows[: config.candidates]
    boxes = augment.draw_resized_crops(
        build_generator(seed, "rded", "crops", label),
        len(rows) * config.crops_per_image,
        TOY_SIZE,
        TOY_SIZE,
        scale=config.crop_scale,
        ratio=(1.0, 1.0),
    ).tolist()
    key_patches = []
    for number, row in enumerate(rows.tolist()):
        patches = []
        for box in boxes[number * config.crops_per_image : (number + 1) * config.crops_per_image]:
            image = toy.train.images[row].double() / 255
            patch = transforms.resized_crop(image, *box, [size, size], antialias=True)
            seen = torch.zeros(3, TOY_SIZE, TOY_SIZE)
            corner = (TOY_SIZE - size) // 2
            inside = (slice(None), slice(corner, corner + size), slice(corner, corner + size))
            seen[inside] = (
                (patch - torch.tensor(toy.mean).view(3, 1, 1)) / torch.tensor(toy.std).view(3, 1, 1)
            ).float()
            probability = teacher.model(seen[None])[0].double().softmax(0)[label]
            patches.append((-float(probability.log()), patch))
        key_patches.append(min(patches, key=lambda pair: pair[0]))
    ranked = [patch for _, patch in sorted(key_patches, key=lambda pair: pair[0])]
    mosaics = torch.zeros(ipc, 3, TOY_SIZE, TOY_SIZE, dtype=torch.float64)
    for tile in range(config.factor**2):
        top, left = size * (tile // config.factor), size * (tile % config.factor)
        for image in range(ipc):
            mosaics[image, :, top : top + size, left : left + size] = ranked[tile * ipc + image]
    return mosaics


@pytest.mark.parametrize("factor", [1, 2])
def test_mosaics_are_those_of_the_paper_crop_by_crop(toy: RealData, plan: Plan, factor: int) -> None:
    made = distill(toy, plan, ipc=3, seed=5, factor=factor)
    assert made.images.dtype == torch.uint8
    assert made.images.shape == (3 * TOY_CLASSES, 3, TOY_SIZE, TOY_SIZE)
    assert made.labels.tolist() == [*range(TOY_CLASSES)] * 3
    for label in range(TOY_CLASSES):
        config = replace(QUICK, factor=factor)
        expected = 255 * rded_by_hand(toy, build_toy_teacher(0), label, 3, config, seed=5)
        own = made.images[made.labels == label].double()
        assert (own - expected).abs().max() <= 0.5 + 1e-3  # rounded to the nearest value


def test_whole_images_as_crops_give_the_images_that_the_teacher_is_surest_of(toy: RealData, plan: Plan) -> None:
    made = distill(toy, plan, ipc=4, candidates=24, crop_scale=(1.0, 1.0))
    teacher = build_toy_teacher(0)
    x = (toy.train.images / 255 - torch.tensor(toy.mean).view(3, 1, 1)) / torch.tensor(toy.std).view(3, 1, 1)
    losses = -teacher.model(x).log_softmax(1)[torch.arange(len(x)), toy.train.labels]
    for label in range(TOY_CLASSES):
        rows = (toy.train.labels == label).nonzero().flatten()
        assert torch.equal(made.images[made.labels == label], toy.train.images[rows[losses[rows].argsort()[:4]]])


def test_every_image_lends_one_crop_at_most_and_the_best_come_first(toy: RealData, plan: Plan) -> None:
    teacher, rows = build_toy_teacher(0), (toy.train.labels == 2).nonzero().flatten()
    tiles = rded.choose_tiles(teacher, toy, 2, rows, 12, QUICK, 0, plan)
    assert len(tiles[:, 0].unique()) == 12
    assert set(tiles[:, 0].tolist()) <= set(rows.tolist())
    losses = rded.score_crops(teacher, toy, 2, tiles[:, 0], tiles[:, None, 1:], TOY_SIZE, plan).flatten()
    assert (losses.diff() >= 0).all()
    assert torch.equal(rded.choose_tiles(teacher, toy, 2, rows, 5, QUICK, 0, plan), tiles[:5])
    assert (tiles[:, 3] == tiles[:, 4]).all()  # squares


def test_mosaics_fill_rows_with_the_ranks_of_the_scripts(toy: RealData, plan: Plan) -> None:
    """Of eight tiles and two mosaics, mosaic 1 has ranks 1, 3, 5, 7 from the top left corner on."""
    toy.train.images[:] = torch.arange(len(toy.train)).view(-1, 1, 1, 1).to(torch.uint8)
    tiles = torch.tensor([[10 + rank, 0, 0, TOY_SIZE, TOY_SIZE] for rank in range(8)])
    corners = rded.compose_mosaics(toy, tiles, 2, plan)[:, 0, ::4, ::4]
    assert corners.tolist() == [[[10, 12], [14, 16]], [[11, 13], [15, 17]]]


def test_each_class_draws_for_itself_and_each_seed_anew(toy: RealData, plan: Plan) -> None:
    rows = (toy.train.labels == 1).nonzero().flatten()
    alone = rded.compose_mosaics(toy, rded.choose_tiles(build_toy_teacher(0), toy, 1, rows, 2, QUICK, 0, plan), 1, plan)
    made = distill(toy, plan)
    assert torch.equal(made.images[made.labels == 1], alone)
    assert not torch.equal(distill(toy, plan, seed=1).images, made.images)


def test_passes_of_another_size_choose_the_same(toy: RealData, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = distill(toy, plan, factor=2)
    for batch in (1, 7):  # fewer than the crops of an image; no divisor
        monkeypatch.setattr(rded, "SCORING_BATCH", batch)
        assert torch.equal(distill(toy, plan, factor=2).images, whole.images)


def test_stopped_and_resumed_mosaics_have_the_bits_of_an_uninterrupted_run(
    toy: RealData, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, scored = distill(toy, plan, factor=2), []
    score = rded.score_crops
    monkeypatch.setattr(rded, "score_crops", lambda *a: (scored.append(a[2]), score(*a))[1])
    stopping, pieces, stops = Run.stopping, None, 0
    monkeypatch.setattr(Run, "stopping", True)
    while pieces is None and stops < 10:
        with Run(tmp_path / "run") as run:
            try:
                pieces = distill(toy, plan, factor=2, run=run)
            except TimeLimitReached:
                stops += 1
    assert scored == [0, 1, 2, 3]
    assert pieces is not None
    assert torch.equal(pieces.images, whole.images)
    monkeypatch.setattr(Run, "stopping", stopping)
    with Run(tmp_path / "run") as run:
        assert torch.equal(distill(toy, plan, factor=2, run=run).images, whole.images)
        assert len(scored) == 4
        with pytest.raises(StillroomError, match=r"'rded-\w+' was begun with other weights of 'toynet7'"):
            rded.distill(toy, [build_toy_teacher(7)], 2, replace(QUICK, factor=2), 0, plan, run)


def test_a_class_smaller_than_the_candidates_gives_all_it_has(toy: RealData, plan: Plan) -> None:
    rows = (toy.train.labels == 0).nonzero().flatten()
    tiles = rded.choose_tiles(build_toy_teacher(0), toy, 0, rows, 24, replace(QUICK, candidates=300), 0, plan)
    assert sorted(tiles[:, 0].tolist()) == rows.tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factor": 3}, "rded.factor is 3, which does not divide images of 8 pixels"),
        ({"factor": 2, "candidates": 7}, "rded.candidates is 7, but ipc 2 takes the best crops of 8 images"),
        ({"candidates": 1}, "give 2 or more"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(toy: RealData, settings: dict[str, int], message: str) -> None:
    with pytest.raises(StillroomError, match=message):
        rded.check(toy, {"toynet": ToyNet(0)}, 2, replace(QUICK, **settings))


def test_mosaics_of_four_need_four_images_each(toy: RealData, plan: Plan) -> None:
    config = RdedConfig(factor=2)
    assert rded.check(toy, {"toynet": ToyNet(0)}, 7, config) == 28
    with pytest.raises(StillroomError, match="28 images per class are needed, but 'north west' has 24"):
        rded.distill(toy, [build_toy_teacher(0)], 7, config, 0, plan, Run())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factor": 0}, "rded.factor is 0"),
        ({"candidates": 0}, "rded.candidates is 0"),
        ({"crops_per_image": 0}, "rded.crops_per_image is 0"),
        ({"crop_scale": (0.5, 0.2)}, r"rded.crop_scale is \(0.5, 0.2\)"),
        ({"crop_scale": (0.0, 1.0)}, "above 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StillroomError, match=message):
        RdedConfig(**settings)


def test_losses_that_are_not_finite_name_teacher_and_class(toy: RealData, plan: Plan) -> None:
    model = ToyNet(0).eval().requires_grad_(False)
    model[1].bias[0] = float("nan")
    teacher = Teacher("broken", model, {"top1": 0.9, "top5": 1.0}, hash_weights(model), "made for a test")
    with pytest.raises(
        StillroomError, match="'broken' gives losses that are not finite on crops of class 'north west'"
    ):
        rded.distill(toy, [teacher], 2, QUICK, 0, plan, Run())


def test_mosaics_go_through_a_whole_run_beside_their_control(toy_recipe: Recipe, tmp_path: Path) -> None:
    shuffling = replace(toy_recipe.student.train, shuffle_patches=2, cosine_slowdown=2.0)
    recipe = replace(
        toy_recipe, method="rded", rded=replace(QUICK, factor=2, candidates=20), labels=("dynamic",), seeds=(0,),
        student=replace(toy_recipe.student, train=shuffling),
    )  # fmt: skip
    with Run(tmp_path / "run") as run:
        results = run_recipe(recipe, run)
        assert list((run.directory / "units").glob("rded-*.safetensors"))
    assert [(c["set"], c["labels"]) for c in results["cells"]] == [
        ("rded", "dynamic"), ("random", "hard"), ("random", "dynamic"),
    ]  # fmt: skip
    assert results["settings"]["rded"]["factor"] == 2


def test_recipes_have_the_scripts_settings() -> None:
    for source, ipc, batch, factor in (
        ("cifar10", 10, 50, 1), ("cifar100", 50, 200, 1), ("tiny-imagenet", 50, 100, 1), ("imagenet", 10, 100, 2),
    ):  # fmt: skip
        recipe = find_recipe(f"rded-{source}-ipc{ipc}")
        assert (recipe.data.source, recipe.ipc, recipe.rded.factor) == (source, ipc, factor)
        assert (recipe.rded.candidates, recipe.rded.crops_per_image) == (300, 5)
        train = recipe.student.train_for("dynamic")
        assert (train.epochs, train.batch_size, train.crop_padding, train.resized_crop) == (300, batch, 0, factor == 2)
        assert (train.shuffle_patches, train.cosine_slowdown) == (factor, 2.0)
        assert np.isclose(recipe.student.temperature, 20)
