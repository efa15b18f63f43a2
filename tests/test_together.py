"""Two processes that share every batch of a training make what one makes, and only one of them leaves anything behind.

This process leads, as torchrun's rank 0 does; the helper is begun as its rank 1 is.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import Finished, ToyNet, stopping_again_and_again
from test_train import ADAMW, MUON, SGD, DropoutNet, train
from torch import nn

from stillroom import cli, together
from stillroom.compute import ComputeConfig, Plan, resolve_plan
from stillroom.data import RealData, load_real
from stillroom.distilled import load_distilled
from stillroom.errors import StillroomError
from stillroom.networks import NETWORKS, build_network
from stillroom.run import Run
from stillroom.students import evaluate
from stillroom.teachers import TeachersConfig, cache_entry
from stillroom.train import Epochs, TrainConfig, apply_normalization, fit

# The numerical plan: what two processes make is what one makes, to this part of the largest weight.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Pair:
    """This process and its helper, in whose working directory nothing should appear."""

    plan: Plan
    folder: Path


@pytest.fixture(scope="module")
def pair(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Of this module alone: whatever is planned meanwhile is planned for two, so `finished` comes before."""
    folder = tmp_path_factory.mktemp("helper")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import conftest, test_train; "
    code += "from stillroom import cli; sys.exit(cli.main(['run', 'toy']))"
    environment = os.environ | given | {"RANK": "1", "LOCAL_RANK": "1", "STILLROOM_CACHE": str(folder)}
    helper = subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (given | {"RANK": "0", "LOCAL_RANK": "0"}).items():
            patch.setenv(name, value)
        assert together.launched()
        assert together.join()
    plan = resolve_plan(ComputeConfig("cpu", "float32", "off", 1))
    assert plan.processes == 2
    yield Pair(plan, folder)
    together.leave()
    _, err = helper.communicate(timeout=60)
    assert (helper.returncode, err) == (0, "")


@pytest.fixture
def plan(plan: Plan) -> Plan:
    """One process, whoever else is there."""
    return replace(plan, processes=1)


def assert_close(one: nn.Module, two: nn.Module) -> None:
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=0, atol=TOLERANCE * float(a.abs().max() + 1e-3)), name


@pytest.mark.parametrize("config", [SGD, ADAMW, MUON, replace(SGD, batch_size=15)], ids=["sgd", "adamw", "muon", "odd"])
def test_two_processes_train_the_network_that_one_trains(
    toy: RealData, plan: Plan, pair: Pair, config: TrainConfig
) -> None:
    one, two = ToyNet(0), ToyNet(0)
    alone = train(toy, plan, Run(), one, config)
    both = train(toy, pair.plan, Run(), two, config)
    assert [row["loss"] for row in both] == pytest.approx([row["loss"] for row in alone], rel=1e-5)
    assert_close(one, two)
    assert type(two[1]) is nn.BatchNorm2d  # as it was
    assert not list(pair.folder.iterdir())


def test_what_two_processes_make_does_not_depend_on_whether_they_were_stopped(
    toy: RealData, pair: Pair, tmp_path: Path
) -> None:
    whole = DropoutNet(0)  # whose draws are each process's own
    train(toy, pair.plan, Run(), whole, ADAMW)

    def work(run: Run) -> nn.Module:
        net = DropoutNet(0)
        train(toy, pair.plan, run, net, ADAMW)
        return net

    net, stops = stopping_again_and_again(tmp_path, work, looks=6)
    assert stops >= 1
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), net.state_dict().values(), strict=True))
    assert not list(pair.folder.iterdir())


def test_dropout_is_not_drawn_alike_by_both(toy: RealData, plan: Plan, pair: Pair) -> None:
    """Of a batch of two equal halves, two processes that drew alike would learn what one learns of a half."""

    def learn(net: nn.Module, plan: Plan, times: int) -> nn.Module:
        images = apply_normalization(toy.train.batch(torch.arange(8)), toy.mean, toy.std).repeat(times, 1, 1, 1)
        labels, run, config = toy.train.labels[:8].repeat(times), Run(), replace(SGD, epochs=1, batch_size=8 * times)
        epochs, loss = Epochs(8 * times, 8 * times, 0, ("unit",)), nn.functional.cross_entropy
        fit(net, config, epochs, lambda *_: (images, labels), loss, plan, run, run.checkpoint("unit"), label="unit")
        return net

    assert_close(learn(ToyNet(0), plan, 1)[-1], learn(ToyNet(0), pair.plan, 2)[-1])
    with pytest.raises(AssertionError):
        assert_close(learn(DropoutNet(0), plan, 1)[-1], learn(DropoutNet(0), pair.plan, 2)[-1])


def test_a_student_of_two_processes_reaches_what_that_of_one_does(
    finished: Finished, toynet: str, pair: Pair, tmp_path: Path
) -> None:
    distilled, real = load_distilled(finished.directory / "distilled"), load_real(finished.recipe.data)
    unit = finished.directory / "units" / f"student-{distilled.fingerprint[:12]}-static-6-toynet-0.json"
    alone = json.loads(unit.read_text())
    with Run(tmp_path / "run") as run:
        result = evaluate(distilled, real, finished.recipe.student, (0,), pair.plan, run)
        assert (tmp_path / "run" / ".lock").read_text() == str(os.getpid())
        [own] = (tmp_path / "run" / "units").iterdir()
        history = json.loads(own.read_text())["history"]
    assert result.top1 == (alone["top1"],)
    assert [row["loss"] for row in history] == pytest.approx([row["loss"] for row in alone["history"]], rel=1e-4)


class OtherNorm(ToyNet):
    """With a normalisation that only one process can have."""

    def __init__(self) -> None:
        super().__init__(0)
        self.insert(2, nn.SyncBatchNorm(6))


def test_what_processes_cannot_share_is_refused_and_the_next_training_goes_on(toy: RealData, pair: Pair) -> None:
    with pytest.raises(
        StillroomError, match=r"a batch has 1 images, but each of 2 processes .* smaller --nproc-per-node"
    ):
        train(toy, pair.plan, Run(), ToyNet(0), replace(SGD, batch_size=1))
    with pytest.raises(StillroomError, match=r"layers SyncBatchNorm, whose statistics several processes do not share"):
        train(toy, pair.plan, Run(), OtherNorm())
    with pytest.raises(StillroomError, match="the loss of unit is"):
        train(toy, pair.plan, Run(), ToyNet(0), replace(SGD, learning_rate=1e30))
    train(toy, pair.plan, Run(), ToyNet(0), replace(SGD, epochs=1))


def test_more_processes_than_cards_and_a_card_by_number_are_refused(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(StillroomError, match=r"each of 2 processes has a card of its own; give --compute.device cuda"):
        resolve_plan(ComputeConfig("cuda:0", "float32", "off", 1))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(
        StillroomError, match=r"2 processes on this machine, which has 1 cards; give .* --compute.device cpu"
    ):
        resolve_plan(ComputeConfig("cuda", "float32", "off", 1))


def test_a_run_goes_on_with_another_number_of_processes_and_says_so(plan: Plan, pair: Pair, tmp_path: Path) -> None:
    before = {name: value for name, value in asdict(plan).items() if name != "processes"}  # as plans were
    with Run(tmp_path / "run") as run:
        run.bind_config({"a": 1}, before)
        run.finish_unit("x", {})
        assert Plan(**run.bind_config({"a": 1}, asdict(pair.plan))).processes == 2
        assert Plan(**run.bind_config({"a": 1}, asdict(plan))).processes == 1
        events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [(e["stored"], e["now"]) for e in events if e["event"] == "plan_differs"] == [(1, 2)]


def test_teachers_of_several_processes_are_others_in_the_cache(toy: RealData, plan: Plan) -> None:
    entries = {cache_entry("convnet_thin", toy, TeachersConfig(), replace(plan, processes=n)) for n in (1, 2)}
    assert len(entries) == 2


@pytest.mark.parametrize("name", [name for name in NETWORKS if name.endswith("thin")])
def test_networks_can_be_sent_to_helpers(name: str) -> None:
    model = build_network(name, 4, 32)
    sent = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert [n for n, _ in sent.named_parameters()] == [n for n, _ in model.named_parameters()]
    together._refuse_others(model)


ALONE = """
import os, torch
from pathlib import Path
from stillroom import together
together.join()
with together.helping(torch.nn.Linear(2, 2)) as model:
    loss = model(torch.ones(1, 2)).sum()
    loss.backward()
    together.average(loss)
del model, loss
names = lambda: [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
before = names()
together.leave()
print(any("gloo" in name for name in before), any("gloo" in name for name in names()))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed on Linux alone")
def test_no_thread_of_the_meeting_is_left_when_the_interpreter_ends() -> None:
    """One that lets go of its last tensor while Python ends aborts the process, rarely."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    told = subprocess.run(
        [sys.executable, "-c", ALONE], env=os.environ | given, capture_output=True, text=True, timeout=120
    )
    assert told.stdout == "True False\n", told.stderr


def test_the_engines_of_units_and_of_batches_are_not_mixed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    left: list[None] = []
    monkeypatch.setattr(together, "launched", lambda: True)
    monkeypatch.setattr(together, "join", lambda: True)
    monkeypatch.setattr(together, "leave", lambda: left.append(None))
    for engine in ("shared", "ray"):
        assert cli.main(["run", "small", "--engine", engine, "--out", str(tmp_path / "run")]) == cli.USAGE
        assert f"--engine {engine} the units: use one" in capsys.readouterr().err
    assert len(left) == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun_makes_the_run_that_one_process_makes(tmp_path: Path) -> None:
    words = ["run", "digits", "--teachers.networks", "convnet_thin", "--teachers.epochs", "2", "--ipc", "3"]
    words += ["--infer.steps", "5", "--student.train.epochs", "20", "--seeds", "0", "--compute.precision", "float32"]
    words += ["--no-controls", "--compute.device", "cpu", "--compute.threads", "1", "--compute.compile", "off"]
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    found = []
    for name, begin in (("one", [sys.executable]), ("two", run)):
        own = ["--out", str(tmp_path / name), "--teachers.cache", str(tmp_path / f"cache-{name}")]
        told = subprocess.run(
            [*begin, "-m", "stillroom.cli", *words, *own], capture_output=True, text=True, timeout=600
        )
        assert told.returncode == 0, told.stderr
        assert told.stdout.count("student convnet_thin") == 1  # one process prints
        found.append(json.loads((tmp_path / name / "results.json").read_text()))
    one, two = found
    assert two["provenance"]["plan"]["processes"] == 2
    assert two["cells"][0]["mean"] == pytest.approx(one["cells"][0]["mean"], abs=3)
