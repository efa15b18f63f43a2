"""`stillroom watch RUN`: what a run is at, while it goes on, read from its directory by another process.

It changes nothing there and keeps no lock, so it may come and go as it likes. On a terminal it shows stages, trainings
under way, results so far and the last messages, until the run ends; elsewhere, in a pipe say, a line per event.
"""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from stillroom.errors import UsageError
from stillroom.events import Tail, read_config, require_run
from stillroom.run import is_held
from stillroom.settings import parse_words
from stillroom.workers import Report, read_reports

OK = 0
LAST = 5  # messages shown
ROWS = 20  # results shown

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # which a terminal would obey


@dataclass(frozen=True)
class WatchCommand:
    """Show what a run is at, until it ends."""

    directory: tyro.conf.Positional[Path]  # of a run or a comparison
    once: bool = False  # show it once and stop
    every: float = 1.0  # seconds between two looks


@dataclass(frozen=True)
class Progress:
    """What a run is at. stages: names and how far each is; now: what is under way; rows: results so far."""

    state: str
    running: bool
    stages: tuple[tuple[str, str], ...]
    now: tuple[str, ...]
    rows: tuple[tuple[str, str], ...]
    messages: tuple[str, ...]


def watch_command(words: list[str]) -> int:
    """stillroom watch: a run, live."""
    command = parse_words(WatchCommand, "watch", words)
    if not 0.1 <= command.every <= 3600:
        raise UsageError(f"--every is {command.every:g}; give seconds from 0.1 to 3600")
    tail = Tail(command.directory)
    events = tail.look()
    progress = read_progress(command.directory, events)
    if command.once or not sys.stdout.isatty():
        print(draw_text(progress), flush=True)
        return OK if command.once else _follow(command, tail, events)
    with Live(draw(progress), auto_refresh=False) as live:
        while progress.running:
            time.sleep(command.every)
            events += tail.look()
            progress = read_progress(command.directory, events)
            live.update(draw(progress), refresh=True)
    return OK


def _follow(command: WatchCommand, tail: Tail, events: list[dict[str, Any]]) -> int:
    """Print a line per event that is worth one after `events`, until the run ends."""
    while True:
        progress = read_progress(command.directory, events)
        new = tail.look()  # after the look at the process: what it wrote last is not missed
        events += new
        for event in new:
            if said := spell_event(event):
                print(said, flush=True)
        if not progress.running:
            print(progress.state)
            return OK
        time.sleep(command.every)


def read_progress(directory: Path, events: Sequence[dict[str, Any]]) -> Progress:
    """Return what the run in `directory`, of these events, is at.

    Raises StillroomError where it is no run, or its configuration is damaged.
    """
    require_run(directory)
    settings = read_config(directory)["settings"]
    reports = read_reports(directory)
    running, state = _state(directory, events, reports)
    done = Counter(path.name.partition("-")[0] for path in directory.glob("units/*") if path.suffix != ".tmp")
    stages = [("teachers", _teachers(settings, events))]
    if sets := sorted(path for path in (directory / "sets").glob("*") if path.is_dir()):
        whole = sum((path / "distilled" / "manifest.json").exists() for path in sets)
        stages.append(("sets", f"{whole} of {len(sets)} begun"))
    else:
        parts = sum(count for kind, count in done.items() if kind.partition(".")[0] not in _LATER)
        whole = (directory / "distilled" / "manifest.json").exists()
        stages.append(("distilled set", "done" if whole else f"{parts} units" if parts else "not begun"))
    at = max((number for number, event in enumerate(events) if event["event"] == "planned"), default=len(events))
    planned: dict[str, Any] = dict(*events[at : at + 1])
    students = f" of {planned['students']}" if planned.get("students") else ""
    stages += [("labels", f"{done['labels']} units"), ("students", f"{done['student']} trained{students}")]
    rows = {row[0]: row for event in events if event["event"] in ("cell", "row") and (row := _spell_row(event))}
    if planned.get("rows"):  # every one is told again, once it is read back
        made = {row[0] for event in events[at:] if event["event"] == "row" and (row := _spell_row(event))}
        stages.append(("rows", f"{len(made)} of {planned['rows']}"))
    finished = {event.get("unit") for event in events if event["event"] == "unit_finished"}
    now = [f"{name}: {_spell_report(report)}" for name, report in reports.items()]
    last: dict[str, Any] = next((event for event in reversed(events) if event["event"] == "epoch"), {})
    if running and not reports and str(last.get("unit")).startswith("student") and last["unit"] not in finished:
        now.append(f"{last['unit']}: epoch {last.get('epoch')}, loss {last.get('loss')}")
    messages = [said for event in events if event["event"] not in ("cell", "row") and (said := spell_event(event))]
    return Progress(
        state, running, tuple(stages), tuple(map(_clean, now)), tuple(rows.values()), tuple(messages[-LAST:])
    )


_LATER = ("labels", "student", "distilled", "score", "duplication", "hard")  # units that are not a set's own parts


def _state(directory: Path, events: Sequence[dict[str, Any]], reports: dict[str, Report]) -> tuple[bool, str]:
    if reports or is_held(directory):
        number = (directory / ".lock").read_text(errors="replace").strip() if not reports else ""
        who = f"{len(reports)} workers" if reports else f"process {number}" if number else "another process"
        return True, f"{directory}: running ({who})"
    turns = [event for event in events if event["event"] in ("opened", "stopped")]
    if turns and turns[-1]["event"] == "stopped":
        return False, f"{directory}: stopped ({turns[-1].get('reason')}); the same command goes on"
    begun = turns[-1]["time"] if turns else 0.0
    made = [path for name in ("results.json", "comparison.json") if (path := directory / name).exists()]
    if any(path.stat().st_mtime >= begun - 1 for path in made):
        return False, f"{directory}: ended, {made[0].name} is there"
    if (directory / "distilled" / "manifest.json").exists():
        return False, f"{directory}: no process of this machine is at it; it has a distilled set and no results"
    return False, f"{directory}: no process of this machine is at it, and it is not finished; the same command goes on"


def _spell_report(report: Report) -> str:
    total = f" {report.done:,} of {report.total:,}" if report.total else ""
    return f"{report.label}{total} {report.shown}".rstrip()


def _teachers(settings: dict[str, Any], events: Iterable[dict[str, Any]]) -> str:
    trained = {str(event.get("name")): event.get("accuracy") for event in events if event["event"] == "teacher"}
    section = settings.get("teachers")
    names = section.get("networks", ()) if isinstance(section, dict) else ()
    reached = [f"{name} {100 * top['top1']:.1f} %" for name, top in trained.items() if isinstance(top, dict)]
    return _clean(f"{len(trained)} of {len(names)}" + (f": {', '.join(reached)}" if reached else ""))


def _spell_row(event: dict[str, Any]) -> tuple[str, str] | None:
    """Return a result's name and its accuracy; None of an event that lacks either."""
    keys = ("method" if "method" in event else "set", "labels", "student", "budget")
    name = ", ".join(str(event[key]) for key in keys if key in event)
    name += f", ipc {event['ipc']}" if "ipc" in event else ""
    if "error" in event:
        return _clean(name), _clean(f"failed: {event['error']}")
    top1 = event.get("top1")
    if not isinstance(top1, list) or not top1 or not all(type(value) in (int, float) for value in top1):
        return None
    spread = f" ± {statistics.stdev(top1):.1f}" if len(top1) > 1 else ""
    return _clean(name), f"{statistics.mean(top1):.1f}{spread} %"


def spell_event(event: dict[str, Any]) -> str | None:
    """Return an event as a line for people; None of those that are too many, such as epochs."""
    at = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    kind = event["event"]
    if kind in ("cell", "row"):
        row = _spell_row(event)
        return None if row is None else f"{at} {row[0]}: {row[1]}"
    said = {
        "opened": "opened",
        "notice": event.get("message"),
        "stopped": f"stopped: {event.get('reason')}",
        "teacher": f"teacher {event.get('name')} is there ({event.get('source')})",
        "unit_finished": f"finished {event.get('unit')}",
    }.get(kind)
    return None if said is None else _clean(f"{at} {said}")


def draw(progress: Progress) -> RenderableType:
    """Return the display of a terminal."""
    parts: list[RenderableType] = [Text(_clean(progress.state), style="bold")]
    stages = Table.grid(padding=(0, 2))
    for name, said in progress.stages:
        stages.add_row(Text(name), Text(said))
    parts.append(stages)
    parts += [Text(f"now  {said}", overflow="ellipsis", no_wrap=True) for said in progress.now]
    if progress.rows:
        table = Table("result", "top-1")
        for name, said in progress.rows[-ROWS:]:
            table.add_row(Text(name), Text(said))
        parts.append(table)
    parts += [Text(said, style="dim", overflow="ellipsis", no_wrap=True) for said in progress.messages]
    return Group(*parts)


def draw_text(progress: Progress) -> str:
    """Return the same as plain text, every result in it."""
    lines = [_clean(progress.state)]
    lines += [f"{name}: {said}" for name, said in progress.stages]
    lines += [f"now: {said}" for said in progress.now]
    lines += [f"{name}: {said}" for name, said in progress.rows]
    return "\n".join([*lines, *progress.messages])


def _clean(text: str) -> str:
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
