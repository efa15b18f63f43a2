"""Several processes at one run: one of them does each unit, a dead one's is gone on with, the bits are the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Finished

from stillroom import cli, workers
from stillroom import run as run_module
from stillroom import teachers as teachers_module
from stillroom.compute import Plan
from stillroom.data import RealData
from stillroom.errors import StillroomError, TimeLimitReached
from stillroom.files import seal, write_json
from stillroom.networks import NETWORKS
from stillroom.run import InOtherHands, Run, Task
from stillroom.teachers import TeachersConfig, cache_entry, load_teachers
from stillroom.workers import Worker, try_byte

PLAN = {"device": "cpu", "threads": 1, "processor": "abacus", "torch_version": "2", "seed_scheme": 1, "compile": "auto"}

# Holds the bytes given until its standard input ends; without torch, so that it starts at once.
HOLD = """
import fcntl, os, sys
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
for byte in sys.argv[2:]:
    fcntl.lockf(file, fcntl.LOCK_EX, 1, int(byte))
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def another_worker_at(claims: Path, *units: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that is at these units until it is killed."""
    command = [sys.executable, "-c", HOLD, str(claims), *(str(workers._byte_of(unit)) for unit in units)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        yield other
        other.kill()


def counting(name: str, done: list[str]) -> Task:
    def make() -> tuple[dict[str, Any], dict[str, torch.Tensor] | None]:
        done.append(name)
        return {"by": name}, {"x": torch.tensor([len(name)])} if "tensor" in name else None

    return Task(name, make)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """What happens at each wait for others, in place of the time that passes; more waits than these are a failure."""
    happens: list[Callable[[], None]] = []
    monkeypatch.setattr(run_module.time, "sleep", lambda seconds: happens.pop(0)())
    return happens


def test_tasks_are_done_once_in_their_order_whoever_asks(tmp_path: Path) -> None:
    done: list[str] = []
    names = ["a", "tensor b", "c"]
    for directory, worker in ((None, None), (tmp_path / "alone", None), (tmp_path / "shared", "me")):
        done.clear()
        for _ in range(2):
            with Run(directory, worker=worker) as run:
                made = run.carry_out([counting(name, done) for name in names])
            assert [result["by"] for result, _ in made] == names
            assert made[1][1]["x"].tolist() == [8]
            assert made[0][1] == {}
        assert done == (names if directory else names * 2)


def test_a_finished_unit_that_does_not_fit_is_made_anew(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        run.finish_unit("a", {"of": "old"})
        [(result, _)] = run.carry_out([Task("a", lambda: ({"of": "new"}, None), lambda made: made["of"] == "new")])
        assert result == {"of": "new"} == run.load_unit("a")[0]


def test_a_unit_in_other_hands_is_left_to_them_and_taken_up_when_they_die(
    tmp_path: Path, waits: list[Callable[[], None]]
) -> None:
    done: list[str] = []
    with Run(tmp_path, worker="me") as run, another_worker_at(tmp_path / "workers" / "claims", "b") as other:
        waits += [lambda: done.append("waited"), lambda: (other.kill(), other.wait(), None)[-1]]
        made = run.carry_out([counting(name, done) for name in "abc"])
    assert done == ["a", "c", "waited", "b"]
    assert [result["by"] for result, _ in made] == ["a", "b", "c"]


def test_a_unit_that_another_worker_finished_is_read(tmp_path: Path, waits: list[Callable[[], None]]) -> None:
    done: list[str] = []
    with Run(tmp_path, worker="me") as run, another_worker_at(tmp_path / "workers" / "claims", "b"):
        waits.append(lambda: run.finish_unit("b", {"by": "another"}))
        assert [result["by"] for result, _ in run.carry_out([counting(name, done) for name in "ab"])] == [
            "a",
            "another",
        ]
    assert done == ["a"]


def test_a_unit_that_another_worker_finished_just_before_it_was_claimed_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    with Run(tmp_path, worker="me") as run:
        monkeypatch.setattr(Worker, "claim", lambda self, unit: run.finish_unit(unit, {"by": "another"}) or True)
        assert run.carry_out([counting("a", done)])[0][0] == {"by": "another"}
    assert not done


def test_a_damaged_unit_that_another_worker_has_mended_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []
    path = tmp_path / "units" / "a.json"
    with Run(tmp_path, worker="me") as run:
        run.finish_unit("a", {"by": "nobody"})
        path.write_bytes(path.read_bytes()[:-5])

        def claimed_after_another(worker: Worker, unit: str) -> bool:
            path.rename(path.with_name("a.json.damaged"))
            run.finish_unit(unit, {"by": "another"})
            return True

        monkeypatch.setattr(Worker, "claim", claimed_after_another)
        assert run.finished("a") is None
        assert path.exists()  # until it is this worker's
        assert run.carry_out([counting("a", done)])[0][0] == {"by": "another"}
        assert run.load_unit("a")[0] == {"by": "another"}
    assert not done
    assert not capsys.readouterr().err


def test_a_worker_puts_a_damaged_unit_aside_once_it_is_its_own(
    tmp_path: Path, waits: list[Callable[[], None]], capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []
    with Run(tmp_path, worker="me") as run, another_worker_at(tmp_path / "workers" / "claims", "a") as other:
        (tmp_path / "units" / "a.json").write_text("{")

        def dies() -> None:
            assert [path.name for path in (tmp_path / "units").iterdir()] == ["a.json"]
            other.kill()
            other.wait()

        waits.append(dies)
        assert run.carry_out([counting("a", done)])[0][0] == {"by": "a"}
    assert {path.name for path in (tmp_path / "units").iterdir()} == {"a.json", "a.json.damaged"}
    assert "made anew" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["stop file", "signal"])
def test_who_waits_to_be_alone_says_so_and_stops_when_asked(
    tmp_path: Path,
    waits: list[Callable[[], None]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    stop = tmp_path / "stop"
    monkeypatch.setattr(run_module, "PATIENCE_SECONDS", 0.0)
    with (
        Run(tmp_path / "run", worker="me", stop_file=stop) as run,
        another_worker_at(tmp_path / "run" / "workers" / "claims", "table"),
        run.stop_on_signals(),
    ):
        assert run.worker is not None

        def ask() -> None:
            if how == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                stop.write_text("SIGTERM")
                run.worker._asked -= workers.LOOK_SECONDS

        waits += [lambda: None, ask]
        with pytest.raises(TimeLimitReached, match="SIGTERM"), run.alone("table"):
            raise AssertionError("another one holds it")
    assert not waits
    assert capsys.readouterr().err.count("waiting for another worker that is at table") == 1


def test_a_job_that_waits_for_others_is_put_off(tmp_path: Path, waits: list[Callable[[], None]]) -> None:
    done: list[str] = []
    with Run(tmp_path, worker="me") as run, another_worker_at(tmp_path / "workers" / "claims", "b") as other:
        waits.append(lambda: (other.kill(), other.wait(), None)[-1])
        jobs = [lambda name=name: run.carry_out([counting(name + "1", done), counting(name, done)]) for name in "abc"]
        inner = [lambda: list(run.in_any_order(jobs))]  # one within the other waits but once, outside
        [(_, made)] = run.in_any_order(inner)
        assert sorted(number for number, _ in made) == [0, 1, 2]
        assert done == ["a1", "a", "b1", "c1", "c", "b"]
        with Run(tmp_path / "sets", parent=run) as nested:  # shared as its parent is
            assert nested.worker is not None
            assert nested.worker.name == "me"
    assert InOtherHands.__mro__[1] is Exception  # which no handler of failures takes for one


def test_jobs_of_one_process_are_done_in_order(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        assert list(run.in_any_order([lambda: "x", lambda: "y"])) == [(0, "x"), (1, "y")]


def test_a_run_is_one_process_s_or_workers_never_both(tmp_path: Path) -> None:
    with Run(tmp_path), pytest.raises(StillroomError, match="in use by process"):
        Run(tmp_path, worker="a")
    both = pytest.raises(StillroomError, match="in use by process")
    with Run(tmp_path, worker="a"), Run(tmp_path, worker="b"), both:
        Run(tmp_path)
    Run(tmp_path).close()


def test_the_stop_file_stops_a_worker_and_says_why(tmp_path: Path) -> None:
    stop = tmp_path / "stop"
    with Run(tmp_path / "run", worker="me", stop_file=stop) as run:
        assert not run.stopping
        stop.write_text("SIGTERM")
        assert not run.stopping  # looked for once a second, not at each step
        assert run.worker is not None
        run.worker._asked -= 1
        assert run.stopping
        with Run(tmp_path / "run" / "sets", parent=run) as nested, pytest.raises(TimeLimitReached, match="SIGTERM"):
            nested.check_time()


def test_workers_of_another_kind_of_machine_are_refused(tmp_path: Path) -> None:
    with Run(tmp_path, worker="a") as run:
        run.bind_config({}, PLAN)
        assert run.bind_config({}, PLAN) == PLAN
        with pytest.raises(StillroomError, match="has processor 'slide rule', but the run was begun with 'abacus'"):
            run.bind_config({}, PLAN | {"processor": "slide rule"})


def test_each_worker_has_events_of_its_own_and_all_of_their_time_counts(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with Run(tmp_path, worker=name) as run:
            run.bind_config({}, PLAN)
            run.event("last")
            assert not (tmp_path / "events.jsonl").exists()
            with open(tmp_path / "workers" / f"{name}.jsonl") as file:
                opened, last = (json.loads(line) for line in file)
            lines = [opened, last | {"time": opened["time"] + 5}]
            (tmp_path / "workers" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Run(tmp_path) as run:
        assert run.seconds_spent() == 10.0


def test_a_worker_says_what_it_is_at_and_takes_it_back_in_the_end(tmp_path: Path) -> None:
    report = tmp_path / "run" / "workers" / "me.json"
    with Run(tmp_path / "run", worker="me") as run:
        with Run(tmp_path / "set", parent=run) as nested, nested.progress("slots", 10, start=4) as advance:
            first = json.loads(report.read_text())
            assert run.worker is not None
            run.worker._reported -= workers.REPORT_SECONDS
            advance(2, loss=0.5)
        second = json.loads(report.read_text())
    assert [first[key] for key in ("label", "done", "total", "shown")] == ["slots", 4, 10, ""]
    assert [second[key] for key in ("done", "shown")] == [6, "loss 0.5"]
    assert first["process"].endswith(f"-{os.getpid()}")
    assert not report.exists()


def test_a_file_system_without_locks_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(*arguments: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    worker = Worker(tmp_path, "me")
    with pytest.raises(StillroomError, match=r"keeps no locks \(No locks available\).* use --engine local"):
        worker.claim("a")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(StillroomError, match="does not have; use --engine local"):
        try_byte(0, "a")


def test_teachers_that_nobody_trains_come_first(
    toy: RealData, plan: Plan, toynet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NETWORKS, "busy", NETWORKS[toynet])
    monkeypatch.setattr(teachers_module, "check_above_chance", lambda *_: None)
    config = TeachersConfig(("busy", toynet), epochs=1, batch_size=16, cache=str(tmp_path))
    held = teachers_module._try_lock(cache_entry("busy", toy, config, plan), alone=True)
    assert held is not None

    def let_go(seconds: float) -> None:
        assert (cache_entry(toynet, toy, config, plan) / "teacher.json").exists()
        held.__exit__(None, None, None)

    monkeypatch.setattr(teachers_module.time, "sleep", let_go)
    assert [teacher.name for teacher in load_teachers(toy, config, plan, Run())] == ["busy", "toynet"]


# The command line with the toy world in it. The first worker stops in the middle of its first unit of compensators,
# when a checkpoint is written, and kills itself as soon as the other one has finished another unit.
COMMAND = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from conftest import TOYNET_ROW, build_toy_recipe
from stillroom import cli, run
from stillroom.networks import NETWORKS
from stillroom.recipes import RECIPES
NETWORKS["toynet"], RECIPES["toy"] = TOYNET_ROW, build_toy_recipe(Path(sys.argv[2]))
role, words = sys.argv[3], sys.argv[4:]
directory = Path(words[words.index("--out") + 1])
save, load = run.Checkpoint.save, run.Checkpoint.load
if role == "dies":
    def save_and_die(self, *arguments):
        save(self, *arguments)
        if "compensators" in self.path.name and arguments[1]["step"] == 2:
            while not any(unit.name.startswith("compensators") for unit in (directory / "units").iterdir()):
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
    run.CHECKPOINT_SECONDS, run.Checkpoint.save = 0.0, save_and_die
else:
    def load_and_tell(self):
        found = load(self)
        if found is not None:
            print("goes on with", self.path.stem, "from step", found[1]["step"], flush=True)
        return found
    run.Checkpoint.load = load_and_tell
raise SystemExit(cli.main(words))
"""


def wait_for(path: Path, pattern: str, seconds: float = 240) -> list[Path]:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if found := sorted(path.glob(pattern)):
            return found
        time.sleep(0.1)
    raise AssertionError(f"no {pattern} in {path}")


def bare(value: Any) -> Any:
    """A unit's result without what depends on the clock."""
    if isinstance(value, dict):
        return {key: bare(item) for key, item in value.items() if key not in ("seconds", "sha256")}
    return [bare(item) for item in value] if isinstance(value, list) else value


def assert_same_bits(one: Path, other: Path, folders: tuple[str, ...] = ("units", "distilled")) -> None:
    """Units and set of two runs: the same files with the same bytes, seconds apart."""
    for folder in folders:
        names = sorted(path.name for path in (one / folder).iterdir())
        assert names == sorted(path.name for path in (other / folder).iterdir())
        for name in names:
            a, b = ((run / folder / name).read_bytes() for run in (one, other))
            if name.startswith("student"):
                assert bare(json.loads(a)) == bare(json.loads(b)), name
            else:
                assert a == b, name


def test_two_processes_make_what_one_makes_though_one_is_killed_in_the_middle(
    finished: Finished, tmp_path: Path, own_cache: Path
) -> None:
    data = finished.recipe.data.source
    words = ["run", "toy", "--engine", "shared", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-W", "ignore", "-c", COMMAND, str(Path(__file__).parent), data]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "dies", *words], **pipes) as dies:
        try:
            wait_for(tmp_path / "run" / "checkpoints", "compensators-*")
            lives = subprocess.run([*command, "lives", *words], capture_output=True, text=True, timeout=600)
            _, last_words = dies.communicate(timeout=60)
        finally:
            dies.kill()
    out, err = lives.stdout, lives.stderr
    assert (lives.returncode, dies.returncode) == (0, -signal.SIGKILL), (err, last_words)
    assert "goes on with compensators-toynet-" in out
    assert "from step 2" in out
    assert "toy, 4 images per class, student toynet" in out
    assert_same_bits(finished.directory, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert len(list((tmp_path / "run" / "workers").glob("*.jsonl"))) == 2


def test_the_job_array_is_the_same_command_for_every_task(tmp_path: Path) -> None:
    """The script itself, with an srun that writes down what it is asked to execute."""
    script = Path(__file__).parents[1] / "examples" / "slurm.sh"
    srun = tmp_path / "srun"
    srun.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" "$STILLROOM_CACHE" > {tmp_path}/asked\n')
    srun.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "3"}
    del environment["STILLROOM_CACHE"]
    out = tmp_path / "run"
    asked = ["bash", str(script), "digits", str(out), "--ipc", "5"]
    subprocess.run(asked, env=environment, check=True)
    program, *words, cache = (tmp_path / "asked").read_text().splitlines()
    assert (program, words[0], cache) == ("stillroom", "run", f"{out}/../teachers")
    command = cli.parse_recipe("run", words[1:], cli.RecipeCommand)
    assert command is not None
    assert (command.recipe, command.engine, command.out, command.time_limit) == ("digits", "shared", out, "3h50m")
    assert (command.settings.ipc, command.settings.compute.threads) == (5, 3)


def test_a_worker_never_replaces_the_configuration_that_another_one_goes_by(tmp_path: Path) -> None:
    with Run(tmp_path, worker="a") as run, Run(tmp_path, worker="b") as other:
        run.bind_config({"steps": 1000}, PLAN)  # and trains teachers, which are no units
        with pytest.raises(StillroomError, match="another configuration:\n  steps: 1000 there, 2 now"):
            other.bind_config({"steps": 2}, PLAN)
        assert run.bind_config({"steps": 1000}, PLAN) == other.bind_config({"steps": 1000}, PLAN) == PLAN
    with Run(tmp_path) as run:  # alone, and nothing is begun
        run.bind_config({"steps": 2}, PLAN)


def test_of_workers_that_begin_at_once_the_first_binds_the_settings_and_others_wait_to_compare(
    tmp_path: Path, waits: list[Callable[[], None]]
) -> None:
    with Run(tmp_path, worker="b") as run, another_worker_at(tmp_path / "workers" / "claims", "config.json") as other:

        def bound_by_the_other() -> None:
            path = tmp_path / "config.json"
            write_json(path, seal({"settings": {"steps": 1000}, "plan": PLAN}, {}, path))
            other.kill()
            other.wait()

        waits.append(bound_by_the_other)
        with pytest.raises(StillroomError, match="steps: 1000 there, 2 now"):
            run.bind_config({"steps": 2}, PLAN)
    assert not waits
