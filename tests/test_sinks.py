"""Sinks: a run's numbers reach TensorBoard, wandb and trackio as the run's own events have them, or the run goes on."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stillroom import cli, sinks
from stillroom.errors import StillroomError
from stillroom.events import read_events
from stillroom.recipes import Recipe
from stillroom.run import Run

EPOCH = {"unit": "student-toynet-0", "epoch": 2, "step": 8, "loss": 0.5, "learning_rate": 0.01, "top1": 0.75}
theirs = pytest.mark.filterwarnings("ignore")  # libraries that import others warn of much


class Tracker(SimpleNamespace):
    """A module that wandb and trackio could be: it keeps what it is given."""

    def __init__(self, broken: str = "") -> None:
        super().__init__(calls=[], broken=broken)

    def _note(self, name: str, /, *arguments: Any, **settings: Any) -> None:
        self.calls.append((name, *arguments, *([settings] if settings else [])))
        if name == self.broken:
            raise OSError("no network")

    def init(self, **settings: Any) -> None:
        self._note("init", **settings)

    def log(self, numbers: dict[str, float]) -> None:
        self._note("log", numbers)

    def finish(self) -> None:
        self._note("finish")


@theirs
def test_tensorboard_holds_what_the_events_of_a_run_say(
    toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path / "cache"))
    assert cli.main(["distill", "toy", "--out", str(tmp_path / "run"), "--log", "tensorboard"]) == 0
    stored = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    stored.Reload()
    events = read_events(tmp_path / "run")
    epochs = [event for event in events if event["event"] == "epoch"]
    assert len(epochs) == 4
    for event in epochs:
        points = {point.step: point.value for point in stored.Scalars(f"{event['unit']}/loss")}
        assert points[event["step"]] == pytest.approx(event["loss"], rel=1e-6)
    packs = [event for event in events if event["event"] == "compensators"]
    assert packs
    for made in packs:
        (point,) = stored.Scalars(f"compensators-toynet-{made['slots'][0]}/loss_1")
        assert point.value == pytest.approx(sum(made["losses"][1]) / len(made["slots"]), rel=1e-6)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_every_number_under_the_name_of_its_unit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Tracker()
    monkeypatch.setitem(sys.modules, name, package)
    with sinks.open_sink(name, tmp_path / "mine") as sink, Run(tmp_path / "mine", sink=sink.take) as run:
        run.event("opened")
        assert package.calls == []  # opened by the first numbers
        run.event("epoch", **EPOCH)
        with Run(tmp_path / "mine" / "sets" / "cda", parent=run) as within:
            within.event("images", unit="images-0-2", losses=[[1.0, 3.0], [4.0, 4.0]])
        run.event("cell", set="infer", labels="static", budget="own", steps=8, mean=41.5, std=0.5, top1=[41.0, 42.0])
        run.event("row", error="it failed")
    unit = "student-toynet-0"
    assert [call[0] for call in package.calls] == ["init", "log", "log", "log", "finish"]
    assert package.calls[0][1].items() >= {"project": "stillroom", "name": "mine"}.items()
    assert package.calls[1][1] == {
        f"{unit}/step": 8, f"{unit}/epoch": 2, f"{unit}/loss": 0.5, f"{unit}/learning_rate": 0.01, f"{unit}/top1": 0.75,
    }  # fmt: skip
    assert package.calls[2][1] == {
        "cda/images-0-2/step": 0, "cda/images-0-2/loss_0": 2.0, "cda/images-0-2/loss_1": 4.0,
    }  # fmt: skip
    assert package.calls[3][1]["infer, static labels, own/mean"] == 41.5


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_sink_that_fails_is_told_once_and_the_run_goes_on(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = Tracker(broken)
    monkeypatch.setitem(sys.modules, "wandb", package)
    with sinks.open_sink("wandb", tmp_path) as sink, Run(tmp_path, sink=sink.take) as run:
        for _ in range(3):
            run.event("epoch", **EPOCH)
    assert capsys.readouterr().err.count("--log wandb failed") == 1
    assert sum(event["event"] == "epoch" for event in read_events(tmp_path)) == 3
    assert [call[0] for call in package.calls].count(broken) == 1


def test_numbers_that_are_none_and_unknown_events_are_left_out() -> None:
    assert sinks.numbers_of({"event": "notice", "message": "x"}) == ("", 0, {})
    assert sinks.numbers_of({"event": "epoch", **EPOCH, "loss": float("nan"), "top1": None})[2].keys() == {
        "epoch", "learning_rate",
    }  # fmt: skip


def test_a_missing_package_and_what_cannot_be_are_refused_before_any_work(
    toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    out = tmp_path / "run"
    words = ["squeeze", "toy", "--out", str(out), "--log"]
    assert cli.main([*words, "trackio"]) == 1
    assert "pip install trackio" in capsys.readouterr().err
    assert cli.main([*words, "wandb", "--engine", "ray"]) == 2
    assert "use --engine local or shared" in capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(StillroomError, match="not installed"), sinks.open_sink("trackio", out):
        raise AssertionError


def test_where_numbers_go_is_no_setting(toy_recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "toy", "--log", "tensorboard", "--print-config"]) == 0
    assert "tensorboard" not in capsys.readouterr().out
