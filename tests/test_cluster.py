"""Ray: what it is asked for, what is refused before any work, and that its workers make what one process makes."""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_toy_npz
from test_workers import another_worker_at, assert_same_bits, wait_for

from stillroom import __version__, cli, cluster
from stillroom.cluster import Board, Placement, place
from stillroom.compute import ComputeConfig
from stillroom.errors import StillroomError
from stillroom.run import Run

CPUS, GPUS = {"CPU": 16.0, "memory": 1e9}, {"CPU": 32.0, "GPU": 4.0}


@pytest.mark.parametrize(
    ("compute", "stored", "nodes", "workers", "threads", "expected"),
    [
        (ComputeConfig("cpu"), {}, [CPUS, CPUS], None, 16, Placement(2, 16, 0)),  # a node each
        (ComputeConfig("cpu", threads=4), {}, [CPUS, CPUS], None, 4, Placement(8, 4, 0)),
        (ComputeConfig("cpu"), {}, [{"CPU": 2.0}], 2, 1, Placement(2, 1, 0)),  # the cores are shared out
        (ComputeConfig("cpu"), {"threads": 3, "device": "cpu"}, [CPUS], None, 3, Placement(5, 3, 0)),  # as it was begun
        (ComputeConfig(), {}, [CPUS, GPUS, GPUS], None, 8, Placement(8, 8, 1)),  # a card each, none without
        (ComputeConfig("cuda", threads=4), {}, [GPUS], None, 4, Placement(4, 4, 1)),
        (ComputeConfig("cuda", threads=16), {}, [GPUS], None, 16, Placement(2, 16, 1)),  # as far as there are cores
        (ComputeConfig(), {"threads": 8, "device": "cpu"}, [CPUS, GPUS], None, 8, Placement(6, 8, 0)),
        (ComputeConfig("cpu"), {}, [CPUS], 3, 5, Placement(3, 5, 0)),
    ],
)
def test_a_worker_has_a_card_of_its_own_or_the_cores_of_its_threads(
    compute: ComputeConfig, stored: dict[str, Any], nodes: list[Any], workers: int, threads: int, expected: Placement
) -> None:
    settled, placement = place(compute, stored, nodes, workers)
    assert (settled.threads, placement) == (threads, expected)


@pytest.mark.parametrize(
    ("compute", "nodes", "message"),
    [
        (ComputeConfig("cuda:1"), [GPUS], "which card a worker has is for Ray to say; give --compute.device cuda"),
        (ComputeConfig("cuda"), [CPUS], "no node of the Ray cluster has a GPU"),
        (ComputeConfig("cpu"), [{"memory": 1.0}], "no node of the Ray cluster has a core"),
        (ComputeConfig("cpu", threads=17), [CPUS, CPUS], "has 17 threads, but no node of the Ray cluster has as many"),
    ],
)
def test_what_no_node_has_room_for_is_refused(compute: ComputeConfig, nodes: list[Any], message: str) -> None:
    with pytest.raises(StillroomError, match=message):
        place(compute, {}, nodes, None)


def test_workers_know_how_many_of_them_share_a_node() -> None:
    for workers, nodes, expected in ((None, [CPUS, CPUS], 4), (3, [CPUS, CPUS], 3), (None, [CPUS, {"CPU": 4.0}], 4)):
        assert place(ComputeConfig("cpu", threads=4), {}, nodes, workers)[0].workers_per_machine == expected


def run_on_ray(directory: Path, **options: Any) -> Any:
    return cluster.spread(lambda compute, run: None, directory, ComputeConfig("cpu"), directory / "cache", **options)


def test_without_ray_the_engine_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(StillroomError, match=r"not installed; pip install 'stillroom\[ray\]'"):
        run_on_ray(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_address_at_which_nothing_answers_is_refused_at_once() -> None:
    with socket.socket() as bound:  # and nobody listens
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
            with pytest.raises(StillroomError, match=rf"nothing answers at the Ray address '{address}'.*--ray-address"):
                cluster._answer(address)
    cluster._answer("auto")


def test_options_of_ray_without_ray_are_wrong_usage(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for words in (["--workers", "2"], ["--ray-address", "auto"]):
        assert cli.main(["run", "small", "--out", str(tmp_path / "run"), *words]) == cli.USAGE
        assert "--workers and --ray-address are Ray's: give --engine ray too" in capsys.readouterr().err


def test_ray_is_imported_by_one_module_and_only_when_it_is_asked_for() -> None:
    package = Path(cluster.__file__).parent
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text())
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
        named = [n for n in nodes if "ray" in {a.name.split(".")[0] for a in n.names} | {(n.module or "").split(".")[0]
                 if isinstance(n, ast.ImportFrom) else ""}]  # fmt: skip
        if path.name == "cluster.py":
            assert named
            assert not set(map(id, named)) & set(map(id, tree.body))  # within functions alone
        else:
            assert not named, path


def test_a_node_without_the_shared_folders_is_found_out(tmp_path: Path) -> None:
    marks = [tmp_path / "run" / "workers" / "shared-1", tmp_path / "cache" / ".shared-1"]
    look = functools.partial(cluster._look_around, marks, "1", os.getcwd())
    assert "has stillroom" in look("0.0.0-other")
    assert "has no folder '/nowhere'" in cluster._look_around(marks, "1", "/nowhere", __version__)
    for mark, flag in zip(marks, ("--out", "--teachers.cache"), strict=True):
        assert f"does not see the folder {str(mark.parent)!r}" in look(__version__)
        assert look(__version__).endswith(flag)
        mark.parent.mkdir(parents=True)
        mark.touch()
    assert "does not see this machine's file locks" in look(__version__)
    with another_worker_at(marks[0], "1"):  # as the driver is, for a node with locks that reach it
        assert look(__version__) == ""


def test_the_board_tells_each_notice_once_and_none_of_earlier_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Run(tmp_path, worker="a") as run:
        run.event("notice", message="long ago")
    with Board(tmp_path, show=True) as board:
        for name in "ab":
            with Run(tmp_path, worker=name) as run, run.progress("slots", 8, 3):
                run.event("notice", message="images were left out")
                board.look()
                assert board.bars is not None
                [task] = board.bars.tasks
                assert (task.description, task.completed, task.total) == (f"{name}: slots", 3, 8)
        board.look()
        assert not board.bars.tasks
    err = capsys.readouterr().err
    assert "long ago" not in err
    assert err.count("images were left out") == 1


def test_the_board_goes_on_though_a_line_is_half_written_and_a_report_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Run(tmp_path, worker="a") as run:
        run.event("opened")
        with Board(tmp_path, show=True) as board:
            assert not board.look()
            (tmp_path / "workers" / "b.json").write_text('{"process": 3, "label": "slots", "done": 1e999}')
            with open(tmp_path / "workers" / "a.jsonl", "a") as events:
                events.write('{"event": "notice", "mess\n[7]\n{"time": 1, "event": "notice"}\n{"time": 2, "eve')
                events.flush()
                assert board.look()
                events.write('nt": "notice", "message": "whole now"}\n')
            assert board.look()
            assert not board.look()
    assert capsys.readouterr().err.count("whole now") == 1


class FewWorkers:
    """What `_watch` asks of Ray: workers that return at their look of it, and what is cancelled."""

    def __init__(self, ends: dict[str, int], each_look: Any = lambda look: None) -> None:
        self.ends, self.each_look, self.looks, self.cancelled = ends, each_look, 0, list[str]()

    def wait(self, references: list[str], timeout: float) -> tuple[list[str], list[str]]:
        self.looks += 1
        self.each_look(self.looks)
        return [name for name in references if self.ends[name] <= self.looks], []

    def get(self, name: str) -> str:
        return name

    def cancel(self, name: str, force: bool) -> None:
        self.cancelled.append(name)


@pytest.mark.parametrize("moves", [True, False])
def test_the_others_may_end_for_as_long_as_they_are_seen_to_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: bool
) -> None:
    pytest.importorskip("ray")
    clock = [0.0]
    monkeypatch.setattr(cluster.time, "monotonic", lambda: clock[0])
    with Run(tmp_path, worker="slow") as worker, Run(show=False) as run:

        def each_look(look: int) -> None:
            clock[0] += cluster.GRACE_SECONDS / 2
            if moves:
                worker.event("row")

        few = FewWorkers({"fast": 1, "slow": 9}, each_look)
        found = cluster._watch(few, {"fast": "fast", "slow": "slow"}, tmp_path, tmp_path / "stop", run)
    assert found == "fast"
    assert few.cancelled == ([] if moves else ["slow"])
    assert few.looks == (9 if moves else 3)


def test_workers_of_two_commands_at_one_run_have_names_of_their_own_and_leave_no_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named: list[str] = []

    class Begin:
        @staticmethod
        def remote(work: Any, compute: Any, directory: Path, name: str, *rest: Any) -> str:
            (directory / "workers").mkdir(parents=True, exist_ok=True)
            (directory / "workers" / f"{name}.json").write_text("{}")
            named.append(name)
            return name

    class Ray:
        @staticmethod
        def nodes() -> list[dict[str, Any]]:
            return [{"Alive": True, "Resources": CPUS}]

        @staticmethod
        def remote(**options: Any) -> Any:
            return lambda function: Begin

    for token in ("0123456789", "9876543210"):
        monkeypatch.setattr(cluster, "_connected", lambda *_: contextlib.nullcontext(Ray))
        monkeypatch.setattr(cluster, "_shared_by_all", lambda *_, token=token: contextlib.nullcontext(token))
        monkeypatch.setattr(cluster, "_watch", lambda ray, begun, *_: begun)
        run_on_ray(tmp_path / "run", workers=2)
    assert named == ["ray-012345-0", "ray-012345-1", "ray-987654-0", "ray-987654-1"]
    assert not list((tmp_path / "run" / "workers").iterdir())


# -- with Ray itself -------------------------------------------------------------------------------------------------

WORDS = shlex.split(
    "--teachers.networks convnet_thin --teachers.recipe fast --teachers.epochs 2 --teachers.batch-size 16 --ipc 4 "
    "--infer.steps 40 --infer.shift-limit 1 --labels static --student.network convnet_thin --student.train.epochs 2 "
    "--student.train.batch-size 8 --seeds 0 1 --no-controls --compute.device cpu --compute.precision float32 "
    "--compute.compile off --compute.threads 1 --compute.pack-slots 1"
)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[str]:
    """A cluster of two workers: that of RAY_ADDRESS, or one begun here; where none starts, its tests are skipped.

    But not where CI is set: a machine of which nobody reads what it skipped would prove nothing.
    """
    if os.environ.get("CI"):
        import ray
    else:
        ray = pytest.importorskip("ray", reason="needs Ray: pip install 'stillroom[ray]'")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(cluster._connected(None, 2))
        except StillroomError as error:  # its daemons have 15 seconds, which a busy machine may not give them
            if os.environ.get("CI"):
                raise
            pytest.skip(f"Ray does not start on this machine now: {error}")
        yield ray.get_runtime_context().gcs_address


def begin_on_ray(folder: Path, address: str, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-m", "stillroom.cli", "run", "small", *WORDS, "--out", "run", *words]
    environment = os.environ | {"STILLROOM_CACHE": str(folder / "cache"), "RAY_ADDRESS": address}
    on_ray = ["--engine", "ray", "--workers", "2"]
    return subprocess.Popen(
        [*command, "--data.source", "toy.npz", *on_ray],
        cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def by_one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, done by this process."""
    folder = tmp_path_factory.mktemp("one")
    write_toy_npz(folder / "toy.npz")
    cache = str(folder / "cache")
    words = ["--out", str(folder / "run"), "--data.source", str(folder / "toy.npz"), "--teachers.cache", cache]
    assert cli.main(["run", "small", *WORDS, *words]) == 0
    return folder / "run"


@pytest.mark.slow
def test_two_workers_on_ray_make_what_one_process_makes_though_one_is_killed(
    ray_cluster: str, by_one_process: Path, tmp_path: Path
) -> None:
    write_toy_npz(tmp_path / "toy.npz")
    with begin_on_ray(tmp_path, ray_cluster) as driver:
        wait_for(tmp_path / "run" / "units", "compensators-*")
        report = json.loads(wait_for(tmp_path / "run" / "workers", "ray-*.json")[0].read_text())
        os.kill(int(report["process"].rpartition("-")[2]), signal.SIGKILL)
        out, err = driver.communicate(timeout=600)
    assert driver.returncode == 0, err
    assert "toy, 4 images per class" in out
    assert_same_bits(by_one_process, tmp_path / "run")
    assert not list((tmp_path / "run" / "workers").glob("stop-*"))


@pytest.mark.slow
def test_students_of_a_finished_set_are_trained_on_ray_to_the_bits_of_one_process(
    ray_cluster: str, by_one_process: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)
    data = str(by_one_process.parent / "toy.npz")
    words = [
        "evaluate",
        str(by_one_process),
        "--data.source",
        data,
        "--compute.device",
        "cpu",
        "--compute.threads",
        "1",
    ]
    assert cli.main([*words, "--out", str(tmp_path / "one")]) == 0
    assert cli.main([*words, "--out", str(tmp_path / "two"), "--engine", "ray", "--workers", "2"]) == 0
    assert_same_bits(tmp_path / "one", tmp_path / "two", ("units",))


@pytest.mark.slow
def test_a_signal_stops_all_workers_and_the_same_command_goes_on(
    ray_cluster: str, by_one_process: Path, tmp_path: Path
) -> None:
    write_toy_npz(tmp_path / "toy.npz")
    with begin_on_ray(tmp_path, ray_cluster) as driver:
        wait_for(tmp_path / "run" / "workers", "ray-*.json")  # all of the work still lies before them
        driver.send_signal(signal.SIGTERM)
        _, err = driver.communicate(timeout=600)
    assert driver.returncode == cli.STOPPED, err
    assert "stopped (SIGTERM)" in err
    with begin_on_ray(tmp_path, ray_cluster) as driver:
        _, err = driver.communicate(timeout=600)
    assert driver.returncode == 0, err
    assert_same_bits(by_one_process, tmp_path / "run")


@pytest.mark.slow
def test_an_error_of_a_worker_is_the_command_s_own(ray_cluster: str, tmp_path: Path) -> None:
    write_toy_npz(tmp_path / "toy.npz")
    with begin_on_ray(tmp_path, ray_cluster, "--ipc", "30") as driver:
        _, err = driver.communicate(timeout=600)
    assert driver.returncode == cli.FAILED, err
    assert err.startswith("stillroom: ipc 30 for 4 classes is a budget of 120 images, but 'toy' has only 96 training")
    assert len(err.splitlines()) == 1


CIFAR = Path(__file__).parents[1] / "data" / "cifar100.npz"


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR.exists(), reason="needs data/cifar100.npz")
def test_two_workers_distil_cifar_100_to_the_bits_of_one_process(
    ray_cluster: str, tmp_path: Path, own_cache: Path
) -> None:
    words = [
        "distill", "small", "--data.source", str(CIFAR), "--data.train-per-class", "20", "--teachers.networks",
        "convnet_thin", "--teachers.epochs", "2", "--teachers.recipe", "fast", "--ipc", "3", "--infer.steps", "5",
        "--labels", "static", "--compute.threads", "1", "--compute.compile", "off",
    ]  # fmt: skip
    assert cli.main([*words, "--out", str(tmp_path / "one")]) == 0
    on_ray = ["--engine", "ray", "--workers", "2", "--out", str(tmp_path / "two")]
    assert cli.main([*words, *on_ray]) == 0
    assert_same_bits(tmp_path / "one", tmp_path / "two")
