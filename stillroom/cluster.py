"""Units of work on Ray: workers that Ray places, each of which takes units of one run as they come.

    results = spread(lambda compute, run: run_recipe(replace(recipe, compute=compute), run), Path("runs/mine"), ...)

What is done is what one process does, by the same code: each worker carries out the whole recipe, where `Run.carry_out`
leaves to the others what they are at (workers.py). So the run directory and the teacher cache must be one place for all
nodes; that is looked at on every node before any work. A worker that dies is started again by Ray, and what it was at
is taken up from its checkpoint, by itself or another. This process only watches. Nothing else in stillroom knows Ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from stillroom import __version__
from stillroom.compute import ComputeConfig, usable_cores
from stillroom.errors import StillroomError, TimeLimitReached
from stillroom.events import Tail, read_config
from stillroom.files import refuse_links, remove_if_there, write_atomic
from stillroom.run import FOLDERS, Run, open_bars
from stillroom.workers import LOOK_SECONDS, Report, read_reports, try_byte

if TYPE_CHECKING:
    from rich.progress import Progress

RETRIES = 3  # of a worker that died; its units are lost by no means, others take them
CONNECT_SECONDS = 5.0  # for an address to answer
LOOK_AROUND_SECONDS = 120.0  # for all nodes to look at the folders
GRACE_SECONDS = 20.0  # for the other workers to show some progress, once one has seen that all is done

Result = TypeVar("Result")
Work = Callable[[ComputeConfig, Run], Result]


@dataclass(frozen=True)
class Placement:
    """What Ray is asked for: so many workers, with so many cores and GPUs each."""

    workers: int
    cores: int
    gpus: int


def spread(
    work: Work[Result],
    directory: Path,
    compute: ComputeConfig,
    cache: Path,
    *,
    address: str | None = None,
    workers: int | None = None,
    time_limit: float | None = None,
) -> Result:
    """Carry out `work` in `directory` by workers on Ray and return what the first to finish returned.

    address: of a cluster; None: that of the environment variable RAY_ADDRESS, or else one of this machine, begun and
    ended here. workers: None for as many as the cluster has room for. cache: the teachers', an absolute path.
    Raises StillroomError where Ray, the cluster or its nodes cannot do this, and what a worker raised; TimeLimitReached
    where the time limit is near or a signal came: all workers have saved their work then.
    """
    directory = directory.resolve()
    refuse_links(directory / name for name in FOLDERS)
    stored = read_config(directory)["plan"] if (directory / "config.json").exists() else {}
    with _connected(address, workers) as ray, Run(time_limit=time_limit) as run, run.stop_on_signals():
        nodes = [node for node in ray.nodes() if node["Alive"]]
        compute, placement = place(compute, stored, [node["Resources"] for node in nodes], workers)
        with _shared_by_all(ray, nodes, directory, cache) as token:
            stop_file = directory / "workers" / f"stop-{token}"
            here = (os.getcwd(), list(sys.argv), str(cache))
            begin = ray.remote(
                num_cpus=placement.cores, num_gpus=placement.gpus, max_retries=RETRIES, max_calls=1
            )(_work)  # fmt: skip
            # Of another command at the same run they would share events and reports.
            names = [f"ray-{token[:6]}-{number}" for number in range(placement.workers)]
            begun = {begin.remote(work, compute, directory, name, stop_file, *here): name for name in names}
            try:
                return _watch(ray, begun, directory, stop_file, run)
            finally:
                for left in (stop_file, *(directory / "workers" / f"{name}.json" for name in names)):
                    remove_if_there(left)


def place(
    compute: ComputeConfig, stored: Mapping[str, Any], nodes: Sequence[Mapping[str, float]], workers: int | None
) -> tuple[ComputeConfig, Placement]:
    """Return the settings with the threads that each worker has and how many share a node, and what Ray is asked for.

    stored: the plan of a run that was begun, whose threads and kind of device stay. nodes: the resources of each, by
    Ray's names. A worker has a GPU of its own and its share of the node's cores, or else the cores of its threads.
    Raises StillroomError for what no node has room for.
    """
    if ":" in compute.device:
        raise StillroomError(
            f"compute.device is {compute.device!r}, but which card a worker has is for Ray to say; give "
            f"--compute.device {compute.device.split(':')[0]}"
        )
    device = str(stored.get("device", compute.device)).split(":")[0]
    gpus = 1 if device == "cuda" or (device == "auto" and any(node.get("GPU") for node in nodes)) else 0
    able = [node for node in nodes if node.get("CPU", 0) >= 1 and node.get("GPU", 0) >= gpus]
    if not able:
        raise StillroomError(
            f"compute.device is {device!r}, but no node of the Ray cluster has a {'GPU' if gpus else 'core'}; start "
            "Ray with --num-gpus or --num-cpus, or give another --compute.device"
        )
    shares = [int(node["CPU"] // (node["GPU"] if gpus else 1)) for node in able]
    cores = int(sum(node["CPU"] for node in able))
    asked = min(shares) if workers is None or gpus else min(min(shares), cores // workers)
    threads = int(stored.get("threads") or compute.threads or max(1, asked))
    room = sum(int(min(node["CPU"] // threads, node["GPU"] if gpus else node["CPU"])) for node in able)
    if room == 0:
        raise StillroomError(
            f"a worker has {threads} threads, but no node of the Ray cluster has as many cores; give fewer by "
            "--compute.threads, with a new --out"
        )
    placement = Placement(room if workers is None else workers, threads, gpus)
    most = int(max(node["CPU"] for node in able) // threads)  # on one node
    settled = replace(compute, threads=threads, device=device, workers_per_machine=max(1, min(most, placement.workers)))
    return settled, placement


def _work(
    work: Work[Result],
    compute: ComputeConfig,
    directory: Path,
    name: str,
    stop_file: Path,
    folder: str,
    words: list[str],
    cache: str,
) -> Result:
    """Carry out `work` as one of several workers: what Ray executes, in a process of its own."""
    os.chdir(folder)  # relative paths are those of the command
    sys.argv = words  # which provenance tells
    os.environ["STILLROOM_CACHE"] = cache
    with Run(directory, worker=name, stop_file=stop_file) as run, run.stop_on_signals():
        return work(compute, run)


# -- the cluster ---------------------------------------------------------------------------------------------------


@contextmanager
def _connected(address: str | None, workers: int | None) -> Iterator[Any]:
    """Yield the module ray, connected, and leave the cluster in the end, unless the caller was in it before."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise StillroomError(
            "--engine ray needs Ray, which is not installed; pip install 'stillroom[ray]', or use --engine shared"
        ) from error
    if ray.is_initialized():
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    if address == "local":
        quiet |= {
            "num_cpus": max(usable_cores(), workers or 1),
            "include_dashboard": False,
            "object_store_memory": 100 * 2**20,
        }
    else:
        _answer(address)
    try:
        ray.init(address=address, **quiet)
    except Exception as error:  # Ray raises many kinds
        raise StillroomError(
            f"no Ray cluster at {address!r} ({_first_line(error)}); check --ray-address, and that Ray and Python have "
            "the same versions there"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _answer(address: str) -> None:
    """Raise StillroomError where nothing answers at HOST:PORT: Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise StillroomError(
            f"nothing answers at the Ray address {address!r} ({error}); start a cluster by ray start --head, or give "
            "its address by --ray-address HOST:PORT"
        ) from error


@contextmanager
def _shared_by_all(ray: Any, nodes: list[dict[str, Any]], directory: Path, cache: Path) -> Iterator[str]:
    """Yield a token that every node has seen in both folders, or raise StillroomError for those that have not."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    token = secrets.token_hex(8)
    marks = [directory / "workers" / f"shared-{token}", cache / f".shared-{token}"]
    for mark in marks:
        write_atomic(mark, b"")
    claims = os.open(marks[0], os.O_RDWR)
    try:
        try_byte(claims, token)
        look = ray.remote(num_cpus=0, max_retries=0)(_look_around)
        asked = {}
        for node in nodes:
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[node["NodeManagerAddress"]] = look.options(scheduling_strategy=here).remote(
                marks, token, os.getcwd(), __version__
            )
        for name, answer in asked.items():
            try:
                problem = ray.get(answer, timeout=LOOK_AROUND_SECONDS)
            except Exception as error:  # whatever is missing there
                problem = f"cannot work ({_first_line(error)}); install the same stillroom there"
            if problem:
                raise StillroomError(f"node {name} of the Ray cluster {problem}")
        yield token
    finally:
        os.close(claims)
        for mark in marks:
            remove_if_there(mark)
        with contextlib.suppress(OSError):  # where nothing was begun
            marks[0].parent.rmdir()
            directory.rmdir()


def _look_around(marks: list[Path], token: str, folder: str, version: str) -> str:
    """Return what is wrong on this node, "" for nothing."""
    if version != __version__:
        return f"has stillroom {__version__}, this machine {version}; install the same"
    if not os.path.isdir(folder):
        return f"has no folder {folder!r}, in which the command was given; give it in a folder that all nodes share"
    for mark, flag in zip(marks, ("--out", "--teachers.cache"), strict=True):
        if not mark.exists():
            return (
                f"does not see the folder {str(mark.parent)!r} of this machine; artifacts go by paths that all nodes "
                f"share, such as a network file system: give one by {flag}"
            )
    file = os.open(marks[0], os.O_RDWR)
    try:
        if try_byte(file, token):
            return (
                f"does not see this machine's file locks in {str(marks[0].parent)!r}, so that two workers might do one "
                "unit; give a folder of a file system with locks that reach all nodes (NFS 4, Lustre with flock)"
            )
    finally:
        os.close(file)
    return ""


# -- watching ------------------------------------------------------------------------------------------------------


def _watch(ray: Any, begun: dict[Any, str], directory: Path, stop_file: Path, run: Run) -> Any:
    """Wait for the workers, show what they are at, pass on the word to stop; return or raise what came of it."""
    from ray.exceptions import RayError, RayTaskError

    board = Board(directory, run.show)
    found: list[Any] = []
    failure: BaseException | None = None
    stopped: TimeLimitReached | None = None
    left, moved = dict(begun), time.monotonic()
    with board:
        # Once one has returned all is done, and the others read it back: for as long as they are seen to.
        while left and (not found or time.monotonic() - moved < GRACE_SECONDS):
            done, _ = ray.wait(list(left), timeout=LOOK_SECONDS)
            if board.look() or done:
                moved = time.monotonic()
            if run.stopping and not stop_file.exists():
                write_atomic(stop_file, run.stop_reason.encode())
            for reference in done:
                name = left.pop(reference)
                try:
                    found.append(ray.get(reference))
                except RayTaskError as error:
                    if isinstance(error.cause, TimeLimitReached):
                        stopped = error.cause
                    else:
                        failure = failure or error.cause
                        write_atomic(stop_file, b"another worker failed")
                except RayError as error:  # it died, again and again; others go on with what it was at
                    run.notice(f"worker {name} died {1 + RETRIES} times ({_first_line(error)})")
        for reference in left:
            ray.cancel(reference, force=True)
        board.look()
    if failure is not None and not found:
        raise failure
    if found:
        return found[0]
    if stopped is not None:
        raise stopped
    raise StillroomError(
        "every worker died: is there memory for all of them (fewer by --workers)? Ray's logs are in "
        "/tmp/ray/session_latest/logs; what is finished is kept, the same command goes on"
    )


class Board:
    """One display of what the workers of the run in `directory` are at, by the reports and events that they leave."""

    def __init__(self, directory: Path, show: bool) -> None:
        self.directory, self.bars = directory, open_bars() if show else None
        self._tasks: dict[str, Any] = {}
        self._reports: dict[str, Report] = {}
        self._events = Tail(directory)
        self._events.look()  # past those of earlier commands
        self._said: set[str] = set()

    def __enter__(self) -> Board:
        if self.bars is not None:
            self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bars is not None:
            self.bars.stop()

    def look(self) -> bool:
        """Show what is new, and return whether anything is. A notice that many workers give is told once."""
        events, before = self._events.look(), self._reports
        for event in events:
            message = event.get("message") if event["event"] == "notice" else None
            if isinstance(message, str) and message not in self._said:
                self._said.add(message)
                print(message, file=sys.stderr)
        self._reports = read_reports(self.directory)
        if self.bars is not None:
            self._draw(self.bars)
        return bool(events) or self._reports != before

    def _draw(self, bars: Progress) -> None:
        for name, report in self._reports.items():
            if name not in self._tasks:
                self._tasks[name] = bars.add_task(name, rate="", shown="")
            bars.update(
                self._tasks[name], description=f"{name}: {report.label}", completed=report.done,
                total=report.total, rate=f"{report.rate:.1f}/s", shown=report.shown,
            )  # fmt: skip
        for name in self._tasks.keys() - self._reports.keys():
            bars.remove_task(self._tasks.pop(name))


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
