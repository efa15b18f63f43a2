"""The six-line way: wrong values are answered by name, value and fix, before any work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from conftest import TOY_CLASSES, build_toy_teacher

import stillroom
from stillroom import students
from stillroom.data import RealData
from stillroom.errors import StillroomError
from stillroom.teachers import Teacher


@pytest.fixture
def other(toy: RealData) -> RealData:
    """Data of five classes, where the toy world and its teachers have four."""
    assert len(toy.class_names) == TOY_CLASSES == 4
    return replace(toy, class_names=(*toy.class_names, "fifth"))


Call = Callable[[RealData, Teacher], object]
DISTILL: list[tuple[Call, str]] = [
    (lambda real, t: stillroom.distill("infer", real, [t], ipc="10"), r"ipc is '10' \(str\); give a whole number"),
    (lambda real, t: stillroom.distill("infer", real, [t], ipc=2.5), r"ipc is 2.5 \(float\); give a whole number"),
    (lambda real, t: stillroom.distill("infer", real, ["toynet"], ipc=3), r"teachers is \['toynet'\]; give the list"),
    (
        lambda real, t: stillroom.distill("infer", "digits", [t], ipc=3),
        r"real is 'digits' \(str\); give what load_real",
    ),
    (lambda real, t: stillroom.distill("infer", real, [t], ipc=3, steps="5"), r"steps is '5' \(str\); give a whole"),
    (lambda real, t: stillroom.distill("infer", real, [t], ipc=3, clip=1), r"clip is 1 \(int\); give True or False"),
    (lambda real, t: stillroom.load_teachers("digits", ["toynet"]), r"real is 'digits' \(str\); give what"),
    (lambda real, t: stillroom.load_teachers(real, "nonet"), "Unknown network 'nonet'"),
    (lambda real, t: stillroom.load_real(3), r"source is 3 \(int\); give text"),
    (
        lambda real, t: stillroom.load_real("digits", image_size="32"),
        r"image_size is '32' \(str\); give a whole number",
    ),
]


@pytest.mark.parametrize(("call", "message"), DISTILL)
def test_a_value_of_another_type_is_named_with_what_to_give(toy: RealData, call: Call, message: str) -> None:
    with pytest.raises(StillroomError, match=message):
        call(toy, build_toy_teacher(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": "3"}, "seeds is '3'; give how many"),
        ({"seeds": True}, "seeds is True; give how many"),
        ({"seeds": 0}, "seeds is 0; give how many"),
        ({"seeds": [1, 1]}, r"seeds \[1, 1\] has repeats; give each once"),
        ({"seeds": ["a"]}, r"seeds is 'a' \(str\); give whole numbers"),
        ({"epochs": "1"}, r"epochs is '1' \(str\); give a whole number"),
        ({"epochs": -1}, r"^train\.epochs is -1; give 1 or more"),
        ({"learning_rate": "fast"}, r"learning_rate is 'fast' \(str\); give a number"),
    ],
)
def test_students_of_wrong_values_are_refused_before_they_are_trained(
    toy: RealData, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    distilled = stillroom.distill("random", toy, [], ipc=2, labels="hard")
    monkeypatch.setattr(students, "train_student", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(StillroomError, match=message):
        stillroom.evaluate(distilled, toy, "convnet_thin", **settings)


def test_arguments_in_another_order_are_named(toy: RealData) -> None:
    distilled = stillroom.distill("random", toy, [], ipc=2, labels="hard")
    with pytest.raises(StillroomError, match="distilled is RealData"):
        stillroom.evaluate(toy, distilled)  # type: ignore[arg-type]
    with pytest.raises(StillroomError, match="give what distill or load_distilled returns"):
        stillroom.evaluate("runs/mine", toy)  # type: ignore[arg-type]


def test_teachers_of_another_dataset_are_refused(toy: RealData, other: RealData) -> None:
    with pytest.raises(StillroomError, match="teacher 'toynet0' knows 4 classes, but 'toy' has 5; load"):
        stillroom.distill("infer", other, [build_toy_teacher(0)], ipc=3, steps=1)


def test_one_network_may_be_given_by_its_name_alone(toy: RealData, toynet: str) -> None:
    (teacher,) = stillroom.load_teachers(toy, toynet, recipe="fast", epochs=8, batch_size=16, learning_rate=0.05)
    assert teacher.name == toynet
