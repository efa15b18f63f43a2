"""The training loop: schedules, order, optimisers and accuracy against references; resumed equals uninterrupted."""

from __future__ import annotations

import itertools
import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TOY_CLASSES, ToyNet
from torch import Tensor, nn

from stillroom import augment
from stillroom import run as run_module
from stillroom import train as train_module
from stillroom.compute import Plan
from stillroom.data import MemoryImages, RealData
from stillroom.errors import StillroomError, TimeLimitReached
from stillroom.run import Run
from stillroom.train import (
    Epochs,
    TrainConfig,
    apply_normalization,
    augment_images,
    build_optimizer,
    fit,
    load_training_state,
    measure_accuracy,
    schedule_rate,
    training_state,
)

SGD = TrainConfig(epochs=2, batch_size=16, learning_rate=0.05, crop_padding=1, flip=False)
ADAMW = replace(SGD, optimizer="adamw", learning_rate=0.01)
MUON = replace(SGD, optimizer="muon", learning_rate=0.01)
ADAM = replace(ADAMW, optimizer="adam")
EPOCHS = Epochs(96, 16, 0, ("unit",))


class DropoutNet(ToyNet):
    """ToyNet that drops activations, so that the global generator decides what is learned."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.insert(7, nn.Dropout(0.5))


def train(
    real: RealData, plan: Plan, run: Run, net: nn.Module, config: TrainConfig = SGD, **options: Any
) -> list[dict[str, float]]:
    def draw_batch(rows: Tensor, generator: torch.Generator, drawn_step: int) -> tuple[Tensor, Tensor]:
        images = augment_images(real.train.batch(rows), config, False, generator)
        return apply_normalization(images, real.mean, real.std), real.train.labels[rows]

    epochs = replace(EPOCHS, batch_size=config.batch_size)
    loss = nn.functional.cross_entropy
    return fit(net, config, epochs, draw_batch, loss, plan, run, run.checkpoint("unit"), label="unit", **options)


def test_cosine_falls_once_an_epoch_from_the_configured_rate_towards_zero() -> None:
    config = TrainConfig(learning_rate=0.2, schedule="cosine")
    rates = [schedule_rate(config, step, total_steps=40, steps_per_epoch=10) for step in range(40)]
    expected = np.repeat([0.2 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)], 10)
    np.testing.assert_allclose(rates, expected)


@pytest.mark.parametrize("zeta", [1.5, 2.0])
def test_a_slow_cosine_goes_a_part_of_its_way_as_edc_writes_it(zeta: float) -> None:
    """mu(i) = (1 + cos(i pi / (zeta N))) / 2; RDED's zeta of 2 would reach one half after the last epoch."""
    config = TrainConfig(learning_rate=0.2, cosine_slowdown=zeta)
    rates = [schedule_rate(config, step, total_steps=20, steps_per_epoch=2) for step in range(22)]
    expected = 0.2 * (1 + np.cos(np.pi * np.arange(11) / (zeta * 10))) / 2
    np.testing.assert_allclose(rates, np.repeat(expected, 2))
    assert zeta != 2 or rates[-1] == pytest.approx(0.1)


def test_one_cycle_rises_in_a_line_to_its_peak_and_falls_in_a_line_to_zero() -> None:
    config = TrainConfig(learning_rate=0.5, schedule="one_cycle", warmup_fraction=0.2)
    rates = [schedule_rate(config, step, total_steps=50, steps_per_epoch=7) for step in range(50)]
    np.testing.assert_allclose(rates[:10], 0.05 * np.arange(1, 11))
    np.testing.assert_allclose(rates[10:], 0.5 * np.arange(40, 0, -1) / 40)
    assert max(rates) == 0.5


def test_one_cycle_without_warmup_starts_at_its_peak() -> None:
    config = TrainConfig(learning_rate=0.5, schedule="one_cycle", warmup_fraction=0.0)
    assert schedule_rate(config, 0, total_steps=4, steps_per_epoch=2) == 0.5


@pytest.mark.parametrize(("count", "batch_size"), [(96, 16), (100, 16), (5, 64), (7, 7)])
def test_an_epoch_visits_every_item_at_most_once_and_later_ones_visit_what_it_left_out(
    count: int, batch_size: int
) -> None:
    epochs = Epochs(count, batch_size, 0, ("unit",))
    visited = [epochs.rows(epoch).flatten().tolist() for epoch in range(30)]
    for rows in visited:
        assert len(rows) == len(set(rows)) == epochs.steps * epochs.batch
        assert count - len(rows) < epochs.batch
    assert set(itertools.chain(*visited)) == set(range(count))
    assert visited[0] != visited[1]


def test_order_of_an_epoch_depends_on_seed_and_unit_alone() -> None:
    first = Epochs(50, 10, 0, ("a",))
    assert torch.equal(first.rows(4), Epochs(50, 10, 0, ("a",)).rows(4))
    assert not torch.equal(first.rows(4), Epochs(50, 10, 1, ("a",)).rows(4))
    assert not torch.equal(first.rows(4), Epochs(50, 10, 0, ("b",)).rows(4))


@pytest.mark.parametrize("config", [SGD, replace(SGD, nesterov=True, decay_norms=False), ADAMW, ADAM])
def test_two_steps_agree_with_numpy_written_from_the_optimisers_papers(config: TrainConfig) -> None:
    net = nn.Linear(3, 2)
    optimizer = build_optimizer(net, config)
    values = {name: p.detach().double().numpy().copy() for name, p in net.named_parameters()}
    first = {name: np.zeros_like(v) for name, v in values.items()}
    second = {name: np.zeros_like(v) for name, v in values.items()}
    for step in (1, 2):
        gradients = {name: np.full(v.shape, 0.3 * step) + 0.1 * v for name, v in values.items()}
        for name, p in net.named_parameters():
            p.grad = torch.from_numpy(gradients[name]).float()
        optimizer.step()
        for name, value in values.items():
            decay = config.weight_decay if config.decay_norms or value.ndim > 1 else 0.0
            gradient, rate = gradients[name], config.learning_rate
            if config.optimizer == "sgd":
                gradient = gradient + decay * value
                first[name] = config.momentum * first[name] + gradient
                value -= rate * (gradient + config.momentum * first[name] if config.nesterov else first[name])
            else:
                if config.optimizer == "adam":
                    gradient = gradient + decay * value
                else:
                    value *= 1 - rate * decay
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient**2
                corrected = np.sqrt(second[name] / (1 - 0.999**step)) + 1e-8
                value -= rate * first[name] / (1 - 0.9**step) / corrected
    for name, p in net.named_parameters():
        np.testing.assert_allclose(p.detach().numpy(), values[name], rtol=1e-5, atol=1e-6)


def test_weight_decay_spares_norms_and_biases_only_where_asked_to() -> None:
    net = ToyNet(0)
    names = {id(p): name for name, p in net.named_parameters()}
    decayed, spared = build_optimizer(net, replace(SGD, decay_norms=False)).param_groups
    assert {names[id(p)] for p in decayed["params"]} == {"0.weight", "3.weight", "7.weight"}
    assert {names[id(p)] for p in spared["params"]} == {"1.weight", "1.bias", "4.weight", "4.bias", "7.bias"}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (5e-4, 0.0)
    (everything,) = build_optimizer(net, SGD).param_groups
    assert len(everything["params"]) == len(names)


def test_accuracy_agrees_with_numpy_on_more_images_than_one_batch(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "EVALUATION_BATCH", 64)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (150, 3, 4, 4), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 9, (150,), generator=generator)
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(48, 9))
    mean, std = (0.2, 0.4, 0.6), (0.5, 0.25, 0.3)
    found = measure_accuracy(net, MemoryImages(images, labels), mean, std, plan)
    shape = (1, 3, 1, 1)
    x = (images.numpy() / 255.0 - np.reshape(mean, shape)) / np.reshape(std, shape)
    logits = x.reshape(150, -1) @ net[2].weight.detach().double().numpy().T + net[2].bias.detach().double().numpy()
    ranked = np.argsort(-logits, axis=1)
    assert found["top1"] == pytest.approx((ranked[:, 0] == labels.numpy()).mean(), abs=1e-6)
    assert found["top5"] == pytest.approx((ranked[:, :5] == labels.numpy()[:, None]).any(1).mean(), abs=1e-6)


def test_training_state_comes_back_bit_for_bit(toy: RealData, plan: Plan) -> None:
    for config in (SGD, ADAMW, MUON):
        net = ToyNet(0)
        optimizer = build_optimizer(net, config)
        net(torch.randn(4, 3, 8, 8)).sum().backward()
        optimizer.step()
        state = {name: value.clone() for name, value in training_state(net, optimizer).items()}
        other = ToyNet(1)
        fresh = build_optimizer(other, config)
        load_training_state(other, fresh, state)
        again = training_state(other, fresh)
        assert state.keys() == again.keys()
        assert all(torch.equal(state[name], again[name]) for name in state)


def last_state(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Keep what every optimiser of a fit ends with: model and moments."""
    states: list[dict[str, Tensor]] = []

    def build(model: nn.Module, config: TrainConfig, dtype: torch.dtype) -> torch.optim.Optimizer:
        optimizer = build_optimizer(model, config, dtype)
        optimizer.register_step_post_hook(lambda *_: states.append(training_state(model, optimizer)))
        return optimizer

    monkeypatch.setattr(train_module, "build_optimizer", build)
    return states


def timeless(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


@pytest.mark.parametrize(
    ("net", "config", "ahead"),
    [
        (ToyNet, SGD, False),
        (ToyNet, ADAMW, False),
        (ToyNet, MUON, False),
        (DropoutNet, replace(SGD, schedule="one_cycle"), False),
        (DropoutNet, replace(SGD, schedule="one_cycle"), True),
    ],
)
def test_stopped_and_resumed_training_has_the_bits_of_an_uninterrupted_one(
    toy: RealData,
    plan: Plan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    net: type[ToyNet],
    config: TrainConfig,
    ahead: bool,
) -> None:
    """And so has one whose batches are drawn ahead: the whole one's are not."""
    states = last_state(monkeypatch)
    whole_history = train(toy, plan, Run(), net(0), config)
    whole = {name: value.clone() for name, value in states[-1].items()}
    history, stops = None, 0
    while history is None:
        torch.manual_seed(stops)  # whatever state the process is in
        with Run(tmp_path / "run") as run:
            # 12 steps in two epochs of 6: stopped within the first, at its end, and within the second.
            looks = itertools.chain([False] * (1, 2, 4)[stops % 3], itertools.repeat(True))
            monkeypatch.setattr(Run, "stopping", property(lambda self, looks=looks: next(looks)))
            try:
                history = train(toy, plan, run, net(9 if stops else 0), config, ahead=ahead)
            except TimeLimitReached:
                stops += 1
    assert stops >= 3
    assert timeless(history) == timeless(whole_history)
    resumed = states[-1]
    assert resumed.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def test_a_batch_is_drawn_ahead_while_a_step_runs_and_what_drawing_raises_is_raised(plan: Plan) -> None:
    drawn = [threading.Event() for _ in range(6)]

    def draw_batch(rows: Tensor, generator: torch.Generator, drawn_step: int) -> tuple[Tensor, Tensor]:
        drawn[drawn_step].set()
        if drawn_step == 4:
            raise StillroomError("image 7 is damaged")
        return torch.zeros(16, 3, 8, 8), torch.zeros(16, dtype=torch.int64)

    steps = iter(range(6))

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        assert drawn[next(steps) + 1].wait(20)
        return nn.functional.cross_entropy(logits, targets)

    run = Run()
    with pytest.raises(StillroomError, match="image 7 is damaged"):
        fit(ToyNet(0), SGD, EPOCHS, draw_batch, loss, plan, run, run.checkpoint("unit"), label="unit", ahead=True)
    assert next(steps) == 4  # the steps before had their batches
    assert not drawn[5].is_set()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("draws")]


def test_checkpoints_written_on_the_way_carry_a_killed_training_on(
    toy: RealData, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ToyNet(0)
    train(toy, plan, Run(), whole)
    monkeypatch.setattr(run_module, "CHECKPOINT_SECONDS", 0.0)
    steps = iter(range(100))

    def die(*_: object, **__: object) -> float:
        if next(steps) == 7:
            raise KeyboardInterrupt  # nothing is saved on the way out
        return real_rate(*_, **__)

    real_rate = train_module.schedule_rate
    monkeypatch.setattr(train_module, "schedule_rate", die)
    with Run(tmp_path / "run") as run, pytest.raises(KeyboardInterrupt):
        train(toy, plan, run, ToyNet(0))
    taken = []
    monkeypatch.setattr(train_module, "schedule_rate", lambda *a: taken.append(a[1]) or real_rate(*a))
    with Run(tmp_path / "run") as run:
        net = ToyNet(9)
        train(toy, plan, run, net)
    assert taken == [7, 8, 9, 10, 11]
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), whole.state_dict().values(), strict=True))


def test_a_resumed_trainings_seconds_count_all_of_its_processes(
    toy: RealData, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(0.0, 10.0)
    monkeypatch.setattr(train_module.time, "monotonic", lambda: next(clock))
    with Run(tmp_path / "run", time_limit=-1e9) as run, pytest.raises(TimeLimitReached):
        train(toy, plan, run, ToyNet(0))
    clock = itertools.count(5.0, 0.001)  # another process, another clock, and hardly any time
    with Run(tmp_path / "run") as run:
        stored = run.checkpoint("unit").load()
        assert stored is not None
        assert stored[1]["seconds"] >= 10
        history = train(toy, plan, run, ToyNet(9))
    assert all(stored[1]["seconds"] <= row["seconds"] < stored[1]["seconds"] + 1 for row in history)


def test_reaching_the_time_limit_saves_the_state_before_leaving(toy: RealData, plan: Plan, tmp_path: Path) -> None:
    with Run(tmp_path / "run", time_limit=0.0) as run:
        with pytest.raises(TimeLimitReached, match="time limit"):
            train(toy, plan, run, ToyNet(0))
        stored = run.checkpoint("unit").load()
    assert stored is not None
    assert stored[1]["step"] == 1
    assert "model.0.weight" in stored[0]


def test_a_loss_that_is_not_finite_stops_and_names_the_work_and_the_epoch(toy: RealData, plan: Plan) -> None:
    net = ToyNet(0)
    net[0].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(StillroomError, match=r"the loss of unit is nan in epoch 1; lower the learning rate \(now 0.05"):
        train(toy, plan, Run(), net)


def test_total_steps_end_a_training_within_an_epoch(toy: RealData, plan: Plan) -> None:
    history = train(toy, plan, Run(), ToyNet(0), total_steps=8, measure=lambda model: {"top1": 0.5})
    assert [(row["epoch"], row["step"]) for row in history] == [(1, 6), (2, 8)]
    assert "top1" not in history[0]
    assert history[1]["top1"] == 0.5


def test_accuracy_is_measured_at_the_asked_intervals_and_training_goes_on_in_train_mode(
    toy: RealData, plan: Plan
) -> None:
    net = DropoutNet(0)
    modes = []

    def measure(model: nn.Module) -> dict[str, float]:
        model.eval()
        return {"top1": 0.5}

    net.register_forward_pre_hook(lambda *_: modes.append(net.training))
    config = replace(SGD, epochs=5)
    history = train(toy, plan, Run(), net, config, measure=measure, measure_every_epochs=2)
    assert [row["epoch"] for row in history if "top1" in row] == [2, 4, 5]
    assert all(modes)


def test_patches_are_shuffled_before_crops_and_nothing_else_is_drawn_for_it_where_it_is_off() -> None:
    """As RDED does: the tiles change places, then a crop may take pixels of several."""
    images = torch.arange(3 * 8 * 8, dtype=torch.float32).view(1, 3, 8, 8).expand(5, 3, 8, 8)
    config, seed = replace(SGD, crop_padding=2, shuffle_patches=2), 3
    generator = torch.Generator().manual_seed(seed)
    orders = augment.draw_patch_orders(generator, 5, 2)
    shuffled = torch.stack([
        torch.cat([torch.cat([image[:, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4] for c in across], 2) for r in down], 1)
        for image, (down, across) in zip(images, orders.tolist(), strict=True)
    ])  # fmt: skip
    expected = augment.apply_crops(shuffled, augment.draw_crops(generator, 5, 2), 2)
    assert torch.equal(augment_images(images, config, False, torch.Generator().manual_seed(seed)), expected)
    off, drawn = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    augment_images(images, replace(config, shuffle_patches=1), False, off)
    augment.draw_crops(drawn, 5, 2)
    assert torch.equal(off.get_state(), drawn.get_state())


def test_training_leaves_the_global_random_state_as_it_was(toy: RealData, plan: Plan) -> None:
    before = torch.get_rng_state()
    train(toy, plan, Run(), DropoutNet(0))
    assert torch.equal(before, torch.get_rng_state())


def test_toynet_learns_the_toy_world(toy: RealData, plan: Plan) -> None:
    net = ToyNet(0)
    history = train(toy, plan, Run(), net, replace(SGD, epochs=4))
    accuracy = measure_accuracy(net, toy.test, toy.mean, toy.std, plan)
    assert accuracy["top1"] > 0.9
    assert history[-1]["loss"] < history[0]["loss"]
    assert accuracy["top5"] == 1.0  # of four classes
    assert TOY_CLASSES == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "train.epochs is 0; give 1 or more"),
        ({"batch_size": 0}, "train.batch_size is 0"),
        ({"mixup_beta": float("nan")}, "train.mixup_beta is nan"),
        ({"cutmix_beta": -1.0}, "train.cutmix_beta is -1.0"),
        (
            {"mixup_beta": 0.8, "cutmix_beta": 1.0},
            "mixup_beta is 0.8 and train.cutmix_beta 1.0, but a batch is mixed one",
        ),
        ({"crop_padding": -1}, "train.crop_padding is -1"),
        ({"weight_decay": -0.1}, "train.weight_decay is -0.1"),
        ({"learning_rate": 0.0}, "train.learning_rate is 0.0"),
        ({"learning_rate": float("inf")}, "train.learning_rate is inf"),
        ({"warmup_fraction": 1.0}, "train.warmup_fraction is 1.0"),
        ({"cosine_slowdown": 0.5}, "train.cosine_slowdown is 0.5; give 1"),
        ({"cosine_slowdown": float("nan")}, "train.cosine_slowdown is nan"),
        ({"shuffle_patches": 0}, "train.shuffle_patches is 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(StillroomError, match=message):
        TrainConfig(**settings)
