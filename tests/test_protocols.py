"""Protocols by name: what they prescribe, what a flag still changes, and which results bear their name."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import get_args

import pytest
from conftest import Finished

from stillroom.errors import StillroomError
from stillroom.protocols import PROTOCOLS, ProtocolName, family_of, name_protocol, protocol_student
from stillroom.recipes import RECIPES


def test_every_protocol_is_named_and_its_students_bear_its_name_whatever_their_network() -> None:
    assert set(PROTOCOLS) == set(get_args(ProtocolName))
    for name in PROTOCOLS:
        for size in (28, 32, 64, 224):
            student = protocol_student(name, size)
            own = (PROTOCOLS[name].labels, PROTOCOLS[name].teachers or ("resnet18", "convnet"))
            assert name_protocol(student, size, *own) == name
            assert name_protocol(replace(student, network="convnet", measure_every_epochs=5), size, *own) == name
            for change in ({"temperature": 3.0}, {"dynamic_epochs": 7}, {"train": replace(student.train, epochs=7)}):
                assert name_protocol(replace(student, **change), size, *own) == "own"


def test_other_labels_or_labellers_than_a_protocol_s_are_not_called_by_its_name() -> None:
    student = protocol_student("unified", 32)
    for labels, labellers, expected in (
        (("dynamic",), ("resnet18",), "unified"),
        (("hard", "replayed"), ("resnet18",), "unified"),
        (("hard",), (), "unified"),
        (("static",), ("resnet18",), "own"),
        (("dynamic",), ("resnet18", "convnet"), "own"),
    ):
        assert name_protocol(student, 32, labels, labellers) == expected


def test_the_unified_protocol_is_what_its_paper_says() -> None:
    """RD3: 400 epochs of batches of 50, Adam 1e-3 by a cosine, CutMix, crop and flip, one ResNet-18, KL."""
    student, train = protocol_student("unified", 32), protocol_student("unified", 32).train
    assert (train.epochs, student.dynamic_epochs, train.batch_size) == (400, 400, 50)
    assert (train.optimizer, train.learning_rate, train.schedule) == ("adam", 1e-3, "cosine")
    assert (train.cutmix_beta, train.mixup_beta, train.flip, train.resized_crop) == (1.0, 0.0, True, True)
    assert (PROTOCOLS["unified"].labels, PROTOCOLS["unified"].teachers) == (("dynamic",), ("resnet18",))


def test_the_papers_recipes_and_the_laptop_s_have_the_students_of_their_protocols() -> None:
    shortened = ("laptop-tiny-imagenet-ipc10", "laptop-tiny-imagenet-ipc50")
    for name, recipe in RECIPES.items():
        size = {"tiny-imagenet": 64, "imagenet": 224}.get(recipe.data.source, 32)
        known = (
            dict.fromkeys(("laptop", "small", "own"), "laptop") | {"infer": "paper"} if name not in shortened else {}
        )
        expected = known.get(name.partition("-")[0], "own")  # digits, and other methods' own protocols
        assert name_protocol(recipe.student, size, recipe.labels, recipe.teachers.networks) == expected


def test_a_protocol_that_differs_by_image_size_asks_for_it() -> None:
    assert [family_of(size) for size in (1, 32, 33, 64, 65)] == ["cifar", "cifar", "tiny", "tiny", "imagenet"]
    assert protocol_student("unified", None) == protocol_student("unified", 224)
    with pytest.raises(StillroomError, match=r"'paper' differs by the size of images.*give --data\.image-size"):
        protocol_student("paper", None)


def test_the_table_of_a_run_names_its_protocol(finished: Finished) -> None:
    assert json.loads((finished.directory / "results.json").read_text())["protocol"] == "own"
    assert "students by the protocol: own" in finished.out
