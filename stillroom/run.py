"""A run is a directory that explains itself: configuration, events, finished units, checkpoints, the artifact.

    run/
        config.json          the resolved settings and the numerical plan; another configuration is refused
        events.jsonl         one JSON object per event
        units/NAME.json      a finished unit: small results
        units/NAME.safetensors   or tensors
        checkpoints/NAME.safetensors   unfinished work, removed when its unit is finished
        workers/             what processes that share the run leave for each other; see workers.py
        distilled/           the artifact
        results.json         the table

Running the same command again continues the run: a finished unit is never done again. Stages hand their units to
`Run.carry_out`, and need not know whether this process does them all, or one of several.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from stillroom.errors import DamagedFileError, StillroomError, TimeLimitReached
from stillroom.events import event_files, read_config, read_lines, seconds_within
from stillroom.files import (
    break_seal,
    load_tensors,
    open_unlinked,
    read_sealed,
    refuse_links,
    save_tensors,
    seal,
    write_json,
)
from stillroom.workers import LOOK_SECONDS, Worker

if TYPE_CHECKING:
    from rich.progress import Progress

CHECKPOINT_SECONDS = 60.0
PATIENCE_SECONDS = 10.0  # before a worker says that it waits for another one's moment
ASKING_SECONDS = 0.1  # longer than anybody holds the lock of a run to ask whether it is held
UNIT_SUFFIXES = (".json", ".safetensors")
FOLDERS = ("units", "checkpoints", "workers", "sets", "distilled", "tensorboard", "wandb")  # that a run may write to
# Of settings whose difference does not say what made it
HINTS = {"data_fingerprint": " (other images, or their labels or classes are others)"}

Result = TypeVar("Result")
Made = tuple[dict[str, Any], dict[str, Tensor]]  # a unit's small results, and its tensors


@dataclass(frozen=True)
class Task:
    """A unit of work, by its name in the run.

    make() returns its result, and its tensors, None where it has none. fits(result) says whether the finished unit of
    that name is this one: where it is not, it is made anew, or fits raises StillroomError.
    """

    name: str
    make: Callable[[], tuple[dict[str, Any], dict[str, Tensor] | None]]
    fits: Callable[[dict[str, Any]], bool] = lambda result: True


class InOtherHands(Exception):  # noqa: N818 - nothing is wrong
    """What is left of a piece of work are units that other workers are at; this one may do something else meanwhile."""


class Run:
    """One run directory, its clock, and what is shown of its progress.

    `directory` None keeps nothing: work is done in this process and returned (the Python API's default).
    `time_limit` is in seconds from now. Work is saved and TimeLimitReached raised a little earlier (5 %, at most 15 s),
    since a step must end and a checkpoint be written in the time that is left. A run within a `parent` stops with it,
    and is shared where that is. `worker`: a name, by which this process is one of several that share the directory;
    `stop_file` is what stops them all. None: it is this process's alone. `sink` is given every event too, and those of
    runs within this one, which say which by `within`; it must not raise.
    """

    def __init__(
        self,
        directory: Path | None = None,
        *,
        time_limit: float | None = None,
        show: bool = True,
        parent: Run | None = None,
        worker: str | None = None,
        stop_file: Path | None = None,
        sink: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.directory = directory
        self.parent = parent
        self.sink: Callable[[dict[str, Any]], None] | None = sink if parent is None else parent.sink
        self.worker: Worker | None = None
        self._others_first = False
        self._told: set[str] = set()  # what is told once, by this run or one within it
        self.made = 0  # units that this process made, its own and those of runs within it
        self.stop_at = None if time_limit is None else time.monotonic() + time_limit - min(15.0, 0.05 * time_limit)
        self.show = show and sys.stderr.isatty()
        self._stop_signal: str | None = None
        self._lock: Any = None
        if worker is None and parent is not None and parent.worker is not None:
            worker = parent.worker.name
        if directory is not None:
            self._open(directory, worker, stop_file)

    def _open(self, directory: Path, worker: str | None, stop_file: Path | None) -> None:
        self._created = not directory.exists() and worker is None
        try:
            refuse_links([directory / name for name in FOLDERS] + ([] if self.parent is None else [directory]))
            for part in ("units", "checkpoints"):
                (directory / part).mkdir(parents=True, exist_ok=True)
            self._lock = _lock(directory, shared=worker is not None)
            self.worker = None if worker is None else Worker(directory, worker, stop_file)
            self._events = directory / "events.jsonl" if self.worker is None else self.worker.events
            _end_last_line(self._events)
        except StillroomError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise StillroomError(
                f"run directory {str(directory)!r} cannot be written ({error.strerror}); give another with --out"
            ) from error

    def close(self) -> None:
        """Release the directory for another process; one in which nothing was begun goes."""
        if self._lock is None or self.directory is None:
            return
        if self.worker is not None:
            self.worker.close()
        if self._created and {entry.name for entry in self.directory.iterdir()} <= {".lock", "units", "checkpoints"}:
            with contextlib.suppress(OSError):
                for part in ("units", "checkpoints"):
                    (self.directory / part).rmdir()
                (self.directory / ".lock").unlink()
                self.directory.rmdir()
        _sign_off(self._lock)
        self._lock.close()
        self._lock = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- configuration ---------------------------------------------------------------------------------------------

    def bind_config(
        self, settings: dict[str, Any], plan: dict[str, Any], may_be_new: Collection[str] = ()
    ) -> dict[str, Any]:
        """Store `settings` and `plan` in a new run, or check `settings` against the stored ones of an old run.

        may_be_new: sections that an old run may be without, and then gets.

        Returns the plan to work with: the stored one where there is one, so that a resumed run computes the same
        bits. But the processor, torch's version, the card, how many processes there are, and that nothing is compiled
        are as they are now; the user is told where they differ. A run in which no unit is begun takes another
        configuration, but not from one of several workers: others may be training teachers by the first. Raises
        StillroomError with the differing fields where the directory holds work of another one, and where workers that
        share it are not of one kind.
        """
        if self.directory is None:
            return plan
        with self.alone("config.json"):
            return self._bind_config(self.directory, settings, plan, may_be_new)

    def _bind_config(
        self, directory: Path, settings: dict[str, Any], plan: dict[str, Any], may_be_new: Collection[str]
    ) -> dict[str, Any]:
        path = directory / "config.json"
        if self.worker is not None:  # another one may have written it just now
            _look_anew(directory)
        settings = json.loads(json.dumps(settings))  # tuples become lists, as they will be read back
        begun = any(entry for part in ("units", "checkpoints") for entry in (directory / part).iterdir())
        if begun and not path.exists():
            raise StillroomError(
                f"{str(path)!r} is gone, so nothing says of which settings the finished units of this run are; restore "
                "it, or give another directory with --out (trained teachers are in the cache)"
            )
        free = self.worker is None and not begun
        if not path.exists() or (free and read_config(directory)["settings"] != settings):
            write_json(path, seal({"settings": settings, "plan": plan}, {}, path))
            self.event("opened")
            return plan
        stored = read_config(directory)
        if new := {k: v for k, v in settings.items() if k in may_be_new and k not in stored["settings"]}:
            stored["settings"] |= new
            write_json(path, seal(stored, {}, path))
        differences = list(_differences(stored["settings"], settings))
        if differences:
            lines = "\n".join(
                f"  {name}: {old!r} there, {new!r} now{HINTS.get(name, '')}" for name, old, new in differences
            )
            raise StillroomError(
                f"run directory {str(directory)!r} holds another configuration:\n{lines}\n"
                "give another directory with --out, or the same settings"
            )
        if stored["plan"]["seed_scheme"] != plan["seed_scheme"]:
            raise StillroomError(
                f"run directory {str(directory)!r} was begun under seed scheme {stored['plan']['seed_scheme']}, "
                f"this version draws by scheme {plan['seed_scheme']}; give another directory with --out"
            )
        if stored["plan"]["device"].split(":")[0] != plan["device"].split(":")[0]:
            raise StillroomError(
                f"run directory {str(directory)!r} was begun on {stored['plan']['device']}, this run is on "
                f"{plan['device']}; give --compute.device {stored['plan']['device']}, or another directory with --out"
            )
        self.event("opened")
        # Facts of this machine and this start; the kind of device is the same.
        here = ["processor", "torch_version", "device", *(["processes"] if "processes" in plan else [])]
        if plan["compile"] == "off":  # not to be had here, or not wanted any more; nothing else gives way to a new wish
            here.append("compile")
        before = {key: stored["plan"].get(key, 1) for key in here}  # of before there was a choice: one process
        differing = [key for key in here if before[key] != plan[key]]
        if differing and self.worker is not None:  # who made a unit would be told by its bits
            key = differing[0]
            raise StillroomError(
                f"this worker has {key} {plan[key]!r}, but the run was begun with {before[key]!r}; let workers of "
                "that kind share it, or go on by --engine local"
            )
        for key in differing:
            self.event("plan_differs", field=key, stored=before[key], now=plan[key])
        if differing:
            changes = ", ".join(f"{key} {plan[key]!r} (it began with {before[key]!r})" for key in differing)
            self.notice_once(f"the run goes on with {changes}: what is made from now on may differ in its bits")
        return stored["plan"] | {key: plan[key] for key in here}

    # -- units and checkpoints -------------------------------------------------------------------------------------

    @property
    def shared(self) -> Run:
        """The run that keeps what this one has in common with others of its kind: its parent, or itself."""
        return self.parent or self

    def unit_done(self, name: str) -> bool:
        """Whether the unit is finished (as JSON or as tensors)."""
        if self.directory is None:
            return False
        if self.worker is not None:
            _look_anew(self.directory / "units")
        return any(self._unit(name, s).exists() for s in UNIT_SUFFIXES)

    def carry_out(self, tasks: Sequence[Task]) -> list[Made]:
        """Return result and tensors of every task: of its finished unit, or made now, in their order.

        One of several workers makes those that nobody else is at, and waits for the others; where one of these dies,
        its unit is gone on with. Raises what making raises, TimeLimitReached where the run is to stop.
        """
        found: dict[str, Made] = {}
        while True:
            for task in tasks:
                if task.name not in found and (made := self._made(task)) is not None:
                    found[task.name] = made
            if len(found) == len(tasks):
                return [found[task.name] for task in tasks]
            self._wait_for_others()

    def in_any_order(self, jobs: Sequence[Callable[[], Result]]) -> Iterator[tuple[int, Result]]:
        """Yield the number and the result of every job, a function that carries out tasks.

        They are done in order. But where what is left of one is in other workers' hands, the next is begun meanwhile,
        and what it did until then is done once more, its units read back.
        """
        left = dict(enumerate(jobs))
        while left:
            before = len(left)
            for number, job in list(left.items()):
                outer, self._others_first = self._others_first, self.worker is not None
                try:
                    result = job()
                except InOtherHands:
                    continue
                finally:
                    self._others_first = outer
                del left[number]
                yield number, result
            if len(left) == before:
                self._wait_for_others()

    def _made(self, task: Task) -> Made | None:
        """Return the unit, finished or made now; None where another worker is at it."""
        if (made := self._fitting(task)) is not None:
            return made
        if self.worker is None:
            made = self._make(task)
        elif self.worker.claim(task.name):
            try:
                made = self._fitting(task) or self._make(task)  # by another one, before it was this one's
            finally:
                self.worker.release(task.name)
        else:
            return None
        self.check_time()
        return made

    def _fitting(self, task: Task) -> Made | None:
        made = self.finished(task.name)
        return made if made is not None and task.fits(made[0]) else None

    def finished(self, name: str) -> Made | None:
        """Return result and tensors of the unit where it is finished; None where its file is damaged, too: it is to be
        made anew."""
        try:
            return self.load_unit(name) if self.unit_done(name) else None
        except DamagedFileError:
            return None
        except StillroomError as error:
            if isinstance(error.__cause__, FileNotFoundError):  # put aside by another worker since it was looked for
                return None
            raise

    def _make(self, task: Task) -> Made:
        """Make a unit that is nobody else's meanwhile; what is there in its place is damaged, or does not fit."""
        self._put_aside_damaged(task.name)
        result, tensors = task.make()
        self.finish_unit(task.name, result, tensors)
        self.shared.made += 1
        return result, tensors or {}

    def _put_aside_damaged(self, name: str) -> None:
        try:
            if self.unit_done(name):
                self.load_unit(name)
        except DamagedFileError:
            for path in (self._unit(name, suffix) for suffix in UNIT_SUFFIXES):
                with contextlib.suppress(FileNotFoundError):
                    kept = path.rename(path.with_name(f"{path.name}.damaged"))
                    self.notice(f"{path} was damaged or edited after it was written; it is kept as {kept.name!r}, and "
                                "made anew")  # fmt: skip

    def _wait_for_others(self) -> None:
        """Wait a moment, or raise InOtherHands where there may be something else to do."""
        if self._others_first or (self.parent is not None and self.parent._others_first):
            raise InOtherHands
        self.check_time()
        if (reporter := self._reporter) is not None:
            reporter.report("waiting for other workers", 0, 0)
        time.sleep(LOOK_SECONDS)

    @contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """Keep the other workers out of a moment's work, waiting for one that is at it unless the run is to stop."""
        if self.worker is None:
            yield
            return
        begun, told = time.monotonic(), False
        while not self.worker.claim(what):
            if not told and time.monotonic() - begun >= PATIENCE_SECONDS:  # suspended perhaps, or cut off
                self.notice(f"waiting for another worker that is at {what}")
                told = True
            self.check_time()
            time.sleep(LOOK_SECONDS / 10)
        try:
            yield
        finally:
            self.worker.release(what)

    @property
    def _reporter(self) -> Worker | None:
        """What this process reports by: as a worker at the outermost run, which is the one that is looked at."""
        return self.worker if self.parent is None else self.parent._reporter

    def finish_unit(self, name: str, result: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
        """Write the unit's result atomically and drop its checkpoint."""
        if self.directory is None:
            return
        path = self._unit(name, ".json" if tensors is None else ".safetensors")
        if tensors is None:
            write_json(path, seal(result, {}, path))
        else:
            save_tensors(path, tensors, seal(result, tensors, path))
        self.checkpoint(name).remove()
        self.event("unit_finished", unit=name)

    def load_unit(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the finished unit's result and tensors (empty for a JSON unit).

        Raises StillroomError that names the file where it is not as it was written.
        """
        path = self._unit(name, ".safetensors")
        if path.exists():
            tensors, result = load_tensors(path)
            result = break_seal(result, tensors, path)
        else:
            tensors, result = {}, read_sealed(self._unit(name, ".json"))
        self.checkpoint(name).remove()  # left by a process that was killed just after finishing the unit
        return result, tensors

    def checkpoint(self, name: str, made_by: str = "") -> Checkpoint:
        """Return the place where the unfinished unit's state is kept.

        `made_by`: a hash of what the work is made of and the configuration does not bind, such as teachers' weights.
        """
        path = None if self.directory is None else self.directory / "checkpoints" / f"{name}.safetensors"
        return Checkpoint(path, made_by)

    def _unit(self, name: str, suffix: str) -> Path:
        assert self.directory is not None
        return self.directory / "units" / f"{name}{suffix}"

    # -- events, clock, progress -----------------------------------------------------------------------------------

    def event(self, kind: str, **fields: Any) -> None:
        """Append one line of JSON to the run's events."""
        if self.directory is None:
            return
        told = {"time": round(time.time(), 3), "event": kind, **fields}
        with open(self._events, "a", opener=open_unlinked) as events:
            events.write(json.dumps(told, allow_nan=True) + "\n")
        if self.sink is not None:
            self.sink(told if self.parent is None else told | {"within": self.directory.name})

    def seconds_spent(self) -> float:
        """Return the time that processes have spent on this run, from each one's opening to its last event.

        What a killed process did after its last event is not counted; where several share the run, their waiting is.
        """
        if self.directory is None:
            return 0.0
        return round(sum(seconds_within(read_lines(file)) for file in event_files(self.directory)), 1)

    def notice(self, message: str) -> None:
        """Tell the user one thing, on standard error, and keep it in the events."""
        print(message, file=sys.stderr)
        self.event("notice", message=message)

    def notice_once(self, message: str) -> None:
        """Tell the user what runs within this one have to say, too."""
        if message not in self.shared._told:
            self.shared._told.add(message)
            self.notice(message)

    @property
    def stopping(self) -> bool:
        """Whether work should be saved and left now: the time limit is near, or a termination signal came."""
        late = self.stop_at is not None and time.monotonic() >= self.stop_at
        asked = self.worker is not None and bool(self.worker.asked_to_stop())
        return late or asked or self._stop_signal is not None or (self.parent is not None and self.parent.stopping)

    def stop(self) -> TimeLimitReached:
        """Return the exception that leaves the run cleanly."""
        reason = self.stop_reason
        self.event("stopped", reason=reason)
        return TimeLimitReached(reason)

    @property
    def stop_reason(self) -> str:
        """Why the run is to stop, where it is: the signal's name, or "time limit"."""
        if self.parent is not None:
            return self.parent.stop_reason
        return self._stop_signal or (self.worker and self.worker.asked_to_stop()) or "time limit"

    def check_time(self) -> None:
        """Raise TimeLimitReached between units where `stopping` holds."""
        if self.stopping:
            raise self.stop()

    @contextmanager
    def stop_on_signals(self) -> Iterator[None]:
        """Within this context SIGTERM and the first Ctrl-C stop the run as its time limit does."""

        def on_signal(number: int, frame: FrameType | None) -> None:
            if self._stop_signal is not None:
                raise KeyboardInterrupt
            self._stop_signal = signal.Signals(number).name

        previous = {s: signal.signal(s, on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def progress(self, label: str, total: int, start: int = 0) -> Iterator[Callable[..., None]]:
        """Show a bar with rate and time left on a terminal; yield ``advance(steps=1, **shown)``; silent elsewhere.

        One of several workers leaves word of it for whoever shows them all.
        """
        reporter = self._reporter
        if not self.show and reporter is None:
            yield lambda steps=1, **shown: None
            return
        begun, done = time.monotonic(), start
        with open_bars() if self.show else contextlib.nullcontext() as bars:
            task = None if bars is None else bars.add_task(label, total=total, completed=start, rate="", shown="")
            if reporter is not None:
                reporter.report(label, start, total)

            def advance(steps: int = 1, **shown: Any) -> None:
                nonlocal done
                done += steps
                rate = (done - start) / max(time.monotonic() - begun, 1e-9)
                text = " ".join(f"{k} {v}" for k, v in shown.items())
                if reporter is not None:
                    reporter.report(label, done, total, rate, text)
                if bars is not None and task is not None:
                    fields: dict[str, Any] = {"rate": f"{rate:.1f}/s", **({"shown": text} if shown else {})}
                    bars.update(task, advance=steps, **fields)

            yield advance


def open_bars() -> Progress:
    """Return the bars that progress is shown by, on standard error; to be entered, and gone when they are left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}"),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)


class Checkpoint:
    """The state of unfinished work: tensors and a small dictionary, written at most once a minute and when leaving."""

    def __init__(self, path: Path | None, made_by: str = "") -> None:
        self.path, self.made_by = path, made_by
        self._written = time.monotonic()

    @property
    def due(self) -> bool:
        return self.path is not None and time.monotonic() - self._written >= CHECKPOINT_SECONDS

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Replace the stored state atomically."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(self.path, tensors, seal(state | {"made_by": self.made_by}, tensors, self.path))
            self._written = time.monotonic()

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the stored state, or None where there is none; raises StillroomError for that of other work."""
        if self.path is None or not self.path.exists():
            return None
        tensors, state = load_tensors(self.path)
        state = break_seal(state, tensors, self.path)
        if state.pop("made_by", self.made_by) != self.made_by:
            raise StillroomError(
                f"{str(self.path)!r} was begun with other teachers' weights or other images; delete it to begin anew, "
                "or give another directory with --out"
            )
        return tensors, state

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def finished_units(directory: Path) -> list[str]:
    """Return the names of the units that are finished in a run's directory, and in the runs of a comparison's sets."""
    return sorted(
        path.stem
        for folder in (directory / "units", *(directory / "sets").glob("*/units"))
        for path in folder.glob("*")
        if path.suffix in UNIT_SUFFIXES and not path.name.startswith(".")
    )


def _lock(directory: Path, shared: bool) -> Any:
    """Hold a lock on the directory, alone or with other workers; it ends with the process, however that ends."""
    lock = open(directory / ".lock", "a+", opener=open_unlinked)  # noqa: SIM115 - kept open for the life of the run
    try:
        import fcntl
    except ImportError:  # Windows: two commands on one directory are not detected there
        return lock
    wanted = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
    try:
        try:
            fcntl.flock(lock, wanted)
        except BlockingIOError:  # `is_held` may have it for a moment
            time.sleep(ASKING_SECONDS)
            fcntl.flock(lock, wanted)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        lock.close()
        raise StillroomError(
            f"run directory {str(directory)!r} is in use by process {owner}; wait for it, or give another with --out"
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def _look_anew(folder: Path) -> None:
    """Open the folder: until then a network file system remembers that a file was missing there."""
    os.close(os.open(folder, os.O_RDONLY))


def _sign_off(lock: Any) -> None:
    """Take this process's number out of the lock file, since another process may be given it; others' stay."""
    with contextlib.suppress(OSError):
        lock.seek(0)
        if lock.read().strip() == str(os.getpid()):
            lock.truncate(0)


def is_held(directory: Path) -> bool:
    """Whether a process has the run in `directory` open, alone or with others.

    Asked by taking the lock and giving it back at once. False on Windows, and where it cannot be asked of somebody
    else's run on a network file system.
    """
    try:
        import fcntl
    except ImportError:
        return False
    path = directory / ".lock"
    if not path.exists():
        return False
    # Some network file systems keep a writer's lock for files alone that are open for writing.
    with open(path, "r+b" if os.access(path, os.W_OK) else "rb", opener=open_unlinked) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


def _end_last_line(events: Path) -> None:
    """Keep a line that a killed process left half written from swallowing the next one."""
    if events.exists():
        with open(events, "a+b", opener=open_unlinked) as file:
            last = b"\n"
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                last = file.read()
            if last != b"\n":
                file.write(b"\n")


def _differences(stored: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(stored, dict) and isinstance(now, dict):
        for key in sorted(stored.keys() | now.keys()):
            yield from _differences(stored.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif stored != now:
        yield name, stored, now
