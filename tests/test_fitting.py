"""What `own` leaves open is chosen by the images and the machine: every rule, and that what the user says stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from stillroom import fitting
from stillroom.data import DataConfig, Look, RealData, load_real, look_at
from stillroom.errors import StillroomError
from stillroom.fitting import OPEN, count_flops, fit_recipe, open_settings, with_settings
from stillroom.images import MemoryImages
from stillroom.methods.infer import slot_count
from stillroom.pipeline import check_recipe, doubt_budget
from stillroom.recipes import Recipe, find_recipe

OWN = find_recipe("own")


def look(classes: int, each: int = 100, rarest: int | None = None, side: int = 400, has_test: bool = False) -> Look:
    names = tuple(f"class {number}" for number in range(classes))
    return Look(names, (*(each,) * (classes - 1), rarest or each), (side,) * 9, has_test)


def fit(found: Look, device: str = "cpu", cores: int = 2, said: dict[str, Any] | None = None, **changed: Any) -> Recipe:
    return fit_recipe(replace(OWN, **changed), found, device, cores, said)[0]


def real_of(found: Look, recipe: Recipe) -> RealData:
    """Black images of the numbers that are left for training."""
    counts = fitting._training_counts(recipe, found).tolist()
    side = recipe.data.image_size or 1
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    train = MemoryImages(torch.zeros(1, 3, side, side, dtype=torch.uint8).expand(len(labels), -1, -1, -1), labels)
    return RealData("own", found.class_names, train, train, (0, 0, 0), (1, 1, 1), side, True, (), 1, 1)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("classes", [2, 3, 10, 40, 100, 200])
@pytest.mark.parametrize("each", [40, 500])
def test_what_is_chosen_works_and_is_not_doubted(classes: int, each: int, device: str) -> None:
    found = look(classes, each)
    recipe = fit(found, device)
    real = real_of(found, recipe)
    check_recipe(recipe, real)
    assert doubt_budget(recipe, real) == []


def test_the_same_images_and_machine_get_the_same_settings() -> None:
    assert fit_recipe(OWN, look(7, rarest=13), "cpu", 3) == fit_recipe(OWN, look(7, rarest=13), "cpu", 3)


def test_nothing_but_what_is_open_is_changed() -> None:
    fitted = fit(look(10))
    assert with_settings(fitted, open_settings(OWN)) == OWN
    assert set(open_settings(fitted)) == set(OPEN)


@pytest.mark.parametrize(("side", "chosen"), [(20, 32), (32, 32), (70, 64), (100, 96), (150, 128), (4000, 224)])
def test_no_photograph_but_a_tiny_one_is_enlarged(monkeypatch: pytest.MonkeyPatch, side: int, chosen: int) -> None:
    monkeypatch.setattr(fitting, "TARGET_SECONDS", 1e9)
    assert fit(look(3, side=side)).data.image_size == chosen
    assert fit(look(3, side=side)).data.resize == "crop"


def test_a_few_small_photographs_do_not_decide_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "TARGET_SECONDS", 1e9)
    assert fit(replace(look(3), short_sides=(40, *(300,) * 19))).data.image_size == 224
    assert fit(replace(look(3), short_sides=(40, 40, 40, *(300,) * 17))).data.image_size == 32


def test_more_classes_get_smaller_images_and_more_cores_larger_ones_and_a_card_full_networks() -> None:
    def side(classes: int, cores: int) -> int:
        recipe, reasons = fit_recipe(OWN, look(classes, 500), "cpu", cores)
        assert any("larger images" in reason for reason in reasons) == (recipe.data.image_size != 224)
        return recipe.data.image_size or 0

    assert side(100, 1) == 32 < side(10, 2) <= side(10, 8)
    assert set(fit(look(10)).teachers.networks) == {"resnet10_thin", "convnet_thin"}
    assert fit(look(10)).student.network == "convnet_thin"
    assert (fit(look(10), "cuda:1").teachers.networks, fit(look(10), "cuda").student.network) == (
        ("resnet18", "mobilenet_v2"), "resnet18",
    )  # fmt: skip


def test_the_rarest_class_limits_the_budget_and_is_named() -> None:
    recipe, reasons = fit_recipe(OWN, look(10, 500, rarest=9), "cpu", 2)
    assert recipe.ipc == 5  # of 9, 1 is held out
    assert "--ipc: the rarest class, 'class 9' with 8 training images, limits all to 5" in reasons
    recipe, reasons = fit_recipe(OWN, look(10, 5000), "cpu", 2)
    assert recipe.ipc == 50
    assert not any("--ipc" in reason for reason in reasons)


def test_the_bytes_limit_the_budget_and_it_is_said() -> None:
    recipe, reasons = fit_recipe(OWN, look(10, 40, has_test=True), "cpu", 2)
    assert recipe.ipc == 10
    assert "--ipc: 20 would take more than 30% of the images' bytes" in reasons


def test_a_budget_that_two_teachers_would_eat_up_has_one() -> None:
    recipe = fit(look(2, 40, rarest=4))
    assert (recipe.ipc, recipe.teachers.networks) == (3, ("convnet_thin",))
    assert slot_count(recipe.ipc, 2, 1) == 2


@pytest.mark.parametrize("method", ["infer", "random"])
def test_a_class_too_small_for_any_budget_is_refused_by_name(method: str) -> None:
    if method == "random":
        assert fit(look(3, 100, rarest=1), method="random").ipc == 1
        return
    with pytest.raises(StillroomError, match=r"class 'class 2' has 1 training image after some are held out.*needs 2"):
        fit(look(3, 100, rarest=2))


def test_a_share_is_held_out_only_where_there_is_no_test_split_and_none_is_asked_for() -> None:
    recipe, reasons = fit_recipe(OWN, look(3), "cpu", 2)
    assert recipe.data.holdout_share == 0.2
    assert any("there is no test split" in reason for reason in reasons)
    assert fit(look(3, has_test=True)).data.holdout_share == 0
    assert fit(look(3), data=replace(OWN.data, holdout_per_class=7)).data.holdout_share == 0
    assert fit(look(10, 20_000)).data.holdout_share == 0.05  # ten thousand are enough


def test_what_the_user_says_stays_and_the_rest_is_chosen_by_it() -> None:
    recipe = fit(look(10), said={"ipc": 3, "data.image_size": 48, "teachers.networks": ("convnet_thin",)})
    assert (recipe.ipc, recipe.data.image_size, recipe.teachers.networks) == (3, 48, ("convnet_thin",))
    views = 2 * 2 * 10  # two naturals of each class, each alone and with one teacher's compensator
    assert recipe.student.train.epochs == round(30_000 / 10 * 6 / 10 * 10 / views)  # 1,800 sights of each class
    assert fit(look(10), said={"student.train.epochs": 2}).student.train.epochs == 2


def test_every_class_is_seen_more_often_than_what_is_worth_it_and_steps_are_not_too_few() -> None:
    for classes in (2, 10, 40, 200):
        recipe = fit(look(classes, 500))
        views = 3 * slot_count(recipe.ipc, classes, 2)
        assert recipe.student.train.epochs * views >= 580
        assert recipe.student.train.epochs * views * classes / 64 >= 190


def test_flops_of_a_pass_are_those_of_its_layers() -> None:
    before = count_flops("convnet_thin", 10, 32)
    model = fitting.build_network("convnet_thin", 10, 32)
    last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    assert count_flops("convnet_thin", 20, 32) - before == 2 * last.in_features * 10
    assert 4 < count_flops("convnet_thin", 10, 64) / before < 4.3


def test_a_look_reads_no_test_split_that_held_out_images_replace(tmp_path: Path) -> None:
    for folder in ("train/a", "train/b", "test/other"):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (40, 50)).save(tmp_path / folder / f"{number}.png")
    with pytest.raises(StillroomError, match="needs the same class folders"):
        look_at(DataConfig(str(tmp_path)))
    for held in ({"holdout_share": 0.25}, {"holdout_per_class": 1}):
        found = look_at(DataConfig(str(tmp_path), **held))
        assert found == Look(("a", "b"), (4, 4), (40,) * 8, False)


def test_named_data_are_fitted_too() -> None:
    recipe = fit(look_at(DataConfig("digits")), cores=1)
    assert (recipe.data.image_size, recipe.data.holdout_share) == (32, 0)
    real = load_real(recipe.data)
    check_recipe(recipe, real)
    assert doubt_budget(recipe, real) == []
