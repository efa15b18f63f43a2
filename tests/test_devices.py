"""No GPU is needed to see a tensor on the wrong device: torch's "meta" device stands in for one.

Its tensors have shapes and no content, and it refuses to be mixed with the CPU as a GPU does. Reading a value back
fails, so that work which waits for the device inside its loop is found too.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOY_CLASSES, TOY_SIZE, ToyNet, build_toy

from stillroom.compute import Plan, build_generator
from stillroom.distilled import DistilledSet, StoredCompensators
from stillroom.labels import attach_labels, compute_static_labels
from stillroom.methods import METHODS, gvbsm, infer
from stillroom.methods.infer import InferConfig
from stillroom.run import Run
from stillroom.students import CIFAR_STUDENT, build_draws, soft_label_loss
from stillroom.teachers import Teacher, TeachersConfig, train_teacher
from stillroom.train import Epochs, fit, measure_accuracy

READ_BACK = "Cannot copy out of meta|cannot be called on meta|register_meta function for torch.nonzero"


def unfused(optimizer: Any) -> Callable[..., Any]:
    """The optimiser without fused kernels, which the stand-in does not have."""

    @functools.wraps(optimizer)
    def build(*args: Any, fused: bool = False, **settings: Any) -> Any:
        return optimizer(*args, **settings)

    return build


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch, plan: Plan) -> Plan:
    """A numerical plan on the stand-in."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **settings: contextlib.nullcontext())
    for name in ("Adam", "AdamW", "SGD"):
        monkeypatch.setattr(torch.optim, name, unfused(getattr(torch.optim, name)))
    for checked in (DistilledSet, StoredCompensators):  # values that are checked on arrival have no content here
        monkeypatch.setattr(checked, "__post_init__", lambda self: None)
    return replace(plan, device="meta", pack_slots=3)


def teacher_on(plan: Plan) -> Teacher:
    model = plan.place(copy.deepcopy(ToyNet(0)).eval().requires_grad_(False))
    return Teacher("toynet", model, {"top1": 1.0, "top5": 1.0}, "0" * 64, "toy")


def where_read_back(work: Callable[[], object]) -> str:
    """Do `work` up to the first value that is read back, and return the project's line that reads it."""
    with pytest.raises((NotImplementedError, RuntimeError), match=READ_BACK) as stopped:
        work()
    own = [entry for entry in stopped.traceback if "stillroom" in Path(entry.path).parts[-3:]]
    return str(own[-1].statement)


def test_the_stand_in_refuses_to_be_mixed_with_the_cpu() -> None:
    with pytest.raises(RuntimeError, match="device"):
        torch.empty(2, device="meta") + torch.zeros(2)


AUGMENTATIONS = ("none", "shift", "resized_crop", "resized_crop_shift")


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("per_image", [False, True])
def test_compensators_are_optimised_on_the_device_and_read_back_after_the_last_step(
    accelerator: Plan, augmentation: Any, per_image: bool
) -> None:
    config = InferConfig(steps=3, augmentation=augmentation, per_image=per_image, shift_limit=2)
    naturals = torch.zeros(3, TOY_CLASSES, 3, TOY_SIZE, TOY_SIZE, dtype=torch.uint8)
    line = where_read_back(
        lambda: infer.optimize_compensators(
            teacher_on(accelerator), naturals, range(3), build_toy(), config, 0, accelerator, Run(), "unit"
        )
    )
    assert "isfinite" in line  # after the last step


@pytest.mark.parametrize("method", ["sre2l", "cda", "gvbsm"])
def test_pixels_are_recovered_on_the_device_and_read_back_after_the_last_step(
    accelerator: Plan, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = METHODS[method].config(steps=3, shift_limit=2)
    monkeypatch.setattr(gvbsm, "gather_statistics", lambda teachers, *_: [torch.zeros(58) for _ in teachers])
    teachers = [teacher_on(accelerator)] * 2
    line = where_read_back(lambda: METHODS[method].distill(build_toy(), teachers, 3, config, 0, accelerator, Run()))
    assert "isfinite" in line  # after the last step


def test_real_statistics_are_gathered_on_the_device_and_read_back_once(accelerator: Plan) -> None:
    config = gvbsm.GvbsmConfig(crop_padding=1)
    line = where_read_back(
        lambda: gvbsm.gather_statistics([teacher_on(accelerator)], build_toy(), config, 0, accelerator, Run())
    )
    assert "layout.known, " in line or "torch.where" in line  # after the last batch


@pytest.mark.parametrize("kind", ["hard", "static", "dynamic"])
@pytest.mark.parametrize("resized_crop", [False, True])
def test_a_students_batches_are_made_and_learned_on_the_device(
    plan: Plan, accelerator: Plan, kind: str, resized_crop: bool
) -> None:
    distilled = infer.distill(build_toy(), [teacher_on(plan)], 5, InferConfig(steps=1), 0, plan, Run())
    distilled = attach_labels(distilled, kind, [teacher_on(plan)], plan, Run())
    train = replace(CIFAR_STUDENT, batch_size=4, resized_crop=resized_crop, shuffle_patches=2)
    draw_batch = build_draws(distilled, train, [teacher_on(accelerator)], accelerator)
    images, targets = draw_batch(torch.arange(4), build_generator(0, "batch"))
    assert images.device.type == targets.device.type == "meta"

    epochs = Epochs(distilled.view_count, 4, 0, ("student",))
    line = where_read_back(
        lambda: fit(
            ToyNet(1),
            train,
            epochs,
            draw_batch,
            lambda x, y: soft_label_loss(x, y, 30.0),
            accelerator,
            Run(),
            Run().checkpoint("unit"),
            label="student",
        )
    )
    assert "float(loss_sum)" in line  # once an epoch


def test_a_teacher_is_trained_on_the_device(accelerator: Plan) -> None:
    config = TeachersConfig(("toynet",), recipe="field", epochs=1, batch_size=16)  # fused AdamW refuses the meta device
    run = Run()
    line = where_read_back(
        lambda: train_teacher(ToyNet(0), "toynet", build_toy(), config, accelerator, run, run.checkpoint("unit"))
    )
    assert "float(loss_sum)" in line


def test_static_labels_are_read_back_block_by_block(plan: Plan, accelerator: Plan) -> None:
    distilled = infer.distill(build_toy(), [teacher_on(plan)], 5, InferConfig(steps=1), 0, plan, Run())
    line = where_read_back(lambda: compute_static_labels(distilled, [teacher_on(accelerator)], accelerator, Run()))
    assert "parts.append" in line


def test_accuracy_is_read_back_once_after_the_last_batch(accelerator: Plan) -> None:
    real = build_toy()
    model = accelerator.place(ToyNet(0))
    line = where_read_back(lambda: measure_accuracy(model, real.test, real.mean, real.std, accelerator))
    assert "len(images)" in line
