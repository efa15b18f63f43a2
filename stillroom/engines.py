"""Who carries out a command: this process, it and others that share the run directory, or workers on Ray."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from stillroom import together
from stillroom.cluster import spread
from stillroom.compute import ComputeConfig
from stillroom.errors import UsageError
from stillroom.files import cache_root
from stillroom.run import Run
from stillroom.settings import parse_duration
from stillroom.sinks import SinkName, open_sink
from stillroom.teachers import TeachersConfig
from stillroom.workers import name_worker

EngineName = Literal["local", "shared", "ray"]
Result = TypeVar("Result")


class Engaged(Protocol):
    """A command that says who is to do its work, and for how long."""

    @property
    def time_limit(self) -> str | None: ...
    @property
    def engine(self) -> EngineName: ...
    @property
    def workers(self) -> int | None: ...
    @property
    def ray_address(self) -> str | None: ...
    @property
    def log(self) -> SinkName | None: ...


def carry_out(
    command: Engaged,
    directory: Path | None,
    compute: ComputeConfig,
    teachers: TeachersConfig,
    work: Callable[[ComputeConfig, Run], Result],
) -> Result:
    """Return what `work` returns, done in `directory` (None: nothing is kept) by whom the command names.

    Only --engine local without --log can do without a directory; the command's words have been looked at before.
    Raises UsageError for engines that exclude each other.
    """
    limit = parse_duration(command.time_limit)
    check_engine(command)
    if command.engine == "ray":
        assert directory is not None
        cache = cache_root(teachers.cache).resolve()
        return spread(
            work, directory, compute, cache,
            address=command.ray_address, workers=command.workers, time_limit=limit,
        )  # fmt: skip
    worker = name_worker() if command.engine == "shared" else None
    with contextlib.ExitStack() as stack:
        sinks: list[Callable[[dict[str, Any]], None]] = [] if sys.stderr.isatty() else [say_finished]
        if command.log is not None:
            assert directory is not None
            sinks.append(stack.enter_context(open_sink(command.log, directory)).take)

        def tell(event: dict[str, Any]) -> None:
            for sink in sinks:
                sink(event)

        run = stack.enter_context(Run(directory, time_limit=limit, worker=worker, sink=tell))
        stack.enter_context(run.stop_on_signals())
        return work(compute, run)


def check_engine(command: Engaged) -> None:
    """Raise UsageError for words of engines that exclude each other, and for workers that cannot be."""
    if command.engine != "local" and together.launched():
        raise UsageError(f"torchrun's processes share each training, --engine {command.engine} the units: use one")
    if command.engine == "ray" and command.log is not None:
        raise UsageError("--log sends what this process does, not Ray's workers: use --engine local or shared")
    if command.engine != "ray" and (command.workers is not None or command.ray_address is not None):
        raise UsageError("--workers and --ray-address are Ray's: give --engine ray too")
    if command.workers is not None and command.workers < 1:
        raise UsageError(f"--workers is {command.workers}; give 1 or more, or leave it out to fill the cluster")


def say_finished(event: dict[str, Any]) -> None:
    """Say, where no terminal shows bars, that a unit of work is done: a log that is silent for hours looks stuck."""
    if event["event"] == "unit_finished":
        within = f"{event['within']}: " if "within" in event else ""
        print(f"{time.strftime('%H:%M:%S')} finished {within}{event['unit']}", file=sys.stderr, flush=True)
