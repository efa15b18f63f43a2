"""What a run's directory tells while it goes on and afterwards: its events, and the curves of its trainings.

Read from outside, by who does not hold the run: lines may be half written, and processes may have died.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.errors import DamagedFileError, StillroomError
from stillroom.files import read_sealed

POINTS = 80  # of a curve, at most
END_OF_TIME = 2.5e11  # seconds: the year 9892, beyond which no calendar of Python's goes


@dataclass(frozen=True)
class Training:
    """The epochs of one network: `unit` names it with its seed, `family` without."""

    unit: str
    epochs: tuple[dict[str, Any], ...]  # epoch, step, loss; top1 in [0, 1] where it was measured

    @property
    def family(self) -> str:
        return re.sub(r"-\d+$", "", self.unit) if self.unit.startswith("student-") else self.unit

    @property
    def losses(self) -> list[tuple[float, float]]:
        """The loss by epoch, thinned to 80 points at most."""
        points = [(float(epoch["epoch"]), float(epoch["loss"])) for epoch in self.epochs]
        if len(points) <= POINTS:
            return points
        return [points[round(number * (len(points) - 1) / (POINTS - 1))] for number in range(POINTS)]


def require_run(directory: Path) -> None:
    """Raise StillroomError where `directory` is no run's, nor a comparison's or an evaluation's."""
    if not (directory / "config.json").exists():
        raise StillroomError(
            f"{directory} holds no config.json, so it is no run; give the directory of one, such as runs/demo"
        )


def read_config(directory: Path) -> dict[str, Any]:
    """Return the settings and the plan of a run, by these names.

    Raises StillroomError where they are damaged: of what other files hold, nothing makes them again.
    """
    path = directory / "config.json"
    try:
        return read_sealed(path, ("settings", "plan"))
    except DamagedFileError as error:
        raise StillroomError(
            f"{str(path)!r} was damaged or edited after it was written, so nothing says of which settings the units of "
            "this run are; restore it, or give another directory with --out (trained teachers are in the cache)"
        ) from error


def event_files(directory: Path) -> list[Path]:
    """Return the files of events that a run has: its own, and those of its workers."""
    files = [directory / "events.jsonl", *sorted((directory / "workers").glob("*.jsonl"))]
    return [file for file in files if file.is_file()]


def read_events(directory: Path) -> list[dict[str, Any]]:
    """Return the events of a run and of all its workers, in the order of their time."""
    events = [event for file in event_files(directory) for event in read_lines(file)]
    return sorted(events, key=lambda event: event["time"])  # stable


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of one file."""
    return parse_events(file.read_bytes())


def parse_events(content: bytes) -> Iterator[dict[str, Any]]:
    """Yield the events in some lines of a file, each with its `event` and its `time`; other lines are left out."""
    for line in content.splitlines():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):  # left half written by a killed process, or damaged
            continue
        known = isinstance(event, dict) and isinstance(event.get("event"), str) and _is_number(event.get("time"))
        if known and 0 <= event["time"] < END_OF_TIME:
            yield event


class Tail:
    """The events of a run as they come: each look reads what was written since, in whole lines."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._read: dict[Path, int] = {}

    def look(self) -> list[dict[str, Any]]:
        """Return the events that are new."""
        new: list[dict[str, Any]] = []
        for file in event_files(self.directory):
            with open(file, "rb") as events:
                events.seek(self._read.get(file, 0))
                lines, end, _ = events.read().rpartition(b"\n")
            self._read[file] = self._read.get(file, 0) + len(lines + end)
            new += parse_events(lines)
        new.sort(key=lambda event: event["time"])
        return new


def seconds_within(events: Iterable[dict[str, Any]]) -> float:
    """Return the seconds that one file's events tell of, from each opening to the last event before the next.

    Notices do not count: one may come before the opening that it belongs to, long after what was there before.
    """
    spent, begun, last = 0.0, None, 0.0
    for event in events:
        now = float(event["time"])
        if event["event"] == "notice":
            continue
        if begun is None or event["event"] == "opened":
            spent += 0.0 if begun is None else max(last - begun, 0.0)  # clocks may be set back
            begun = now
        last = now
    return spent + (0.0 if begun is None else max(last - begun, 0.0))


def trainings_of(events: Iterable[dict[str, Any]]) -> list[Training]:
    """Return every network's training, in the order of their beginnings; of an epoch done twice, the later one."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for event in events:
        if event["event"] == "epoch" and isinstance(event.get("unit"), str):
            epoch, loss = event.get("epoch"), event.get("loss")
            if type(epoch) is int and _is_number(loss):
                found.setdefault(event["unit"], {})[epoch] = event
    return [Training(unit, tuple(epochs[key] for key in sorted(epochs))) for unit, epochs in found.items()]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
