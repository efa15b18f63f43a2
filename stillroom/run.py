"""A run is a directory that explains itself: configuration, events, finished units, checkpoints, the artifact.

    run/
        config.json          the resolved settings and the numerical plan; another configuration is refused
        events.jsonl         one JSON object per event
        units/NAME.json      a finished unit: small results
        units/NAME.safetensors   or tensors
        checkpoints/NAME.safetensors   unfinished work, removed when its unit is finished
        distilled/           the artifact
        results.json         the table

Running the same command again continues the run: a finished unit is never done again.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

from stillroom.errors import StillroomError, TimeLimitReached
from stillroom.files import break_seal, load_tensors, read_json, save_tensors, seal, write_json

CHECKPOINT_SECONDS = 60.0


class Run:
    """One run directory, its clock, and what is shown of its progress.

    `directory` None keeps nothing: work is done in this process and returned (the Python API's default).
    `time_limit` is in seconds from now. Work is saved and TimeLimitReached raised a little earlier (5 %, at most 15 s),
    since a step must end and a checkpoint be written in the time that is left. A run within a `parent` stops with it.
    """

    def __init__(
        self,
        directory: Path | None = None,
        *,
        time_limit: float | None = None,
        show: bool = True,
        parent: Run | None = None,
    ) -> None:
        self.directory = directory
        self.parent = parent
        self.stop_at = None if time_limit is None else time.monotonic() + time_limit - min(15.0, 0.05 * time_limit)
        self.show = show and sys.stderr.isatty()
        self._stop_signal: str | None = None
        self._lock: Any = None
        if directory is not None:
            self._open(directory)

    def _open(self, directory: Path) -> None:
        self._created = not directory.exists()
        try:
            for part in ("units", "checkpoints"):
                (directory / part).mkdir(parents=True, exist_ok=True)
            self._lock = _lock(directory)
            _end_last_line(directory / "events.jsonl")
        except OSError as error:
            raise StillroomError(
                f"run directory {str(directory)!r} cannot be written ({error.strerror}); give another with --out"
            ) from error

    def close(self) -> None:
        """Release the directory for another process; one in which nothing was begun goes."""
        if self._lock is None or self.directory is None:
            return
        if self._created and {entry.name for entry in self.directory.iterdir()} <= {".lock", "units", "checkpoints"}:
            with contextlib.suppress(OSError):
                for part in ("units", "checkpoints"):
                    (self.directory / part).rmdir()
                (self.directory / ".lock").unlink()
                self.directory.rmdir()
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
        bits. A run in which no unit is begun takes another configuration. Raises StillroomError with the differing
        fields where the directory holds work of another one.
        """
        if self.directory is None:
            return plan
        path = self.directory / "config.json"
        settings = json.loads(json.dumps(settings))  # tuples become lists, as they will be read back
        begun = any(entry for part in ("units", "checkpoints") for entry in (self.directory / part).iterdir())
        if not path.exists() or (not begun and read_json(path)["settings"] != settings):
            write_json(path, {"settings": settings, "plan": plan})
            self.event("opened")
            return plan
        stored = read_json(path)
        if new := {k: v for k, v in settings.items() if k in may_be_new and k not in stored["settings"]}:
            stored["settings"] |= new
            write_json(path, stored)
        differences = list(_differences(stored["settings"], settings))
        if differences:
            lines = "\n".join(f"  {name}: {old!r} there, {new!r} now" for name, old, new in differences)
            raise StillroomError(
                f"run directory {str(self.directory)!r} holds another configuration:\n{lines}\n"
                "give another directory with --out, or the same settings"
            )
        if stored["plan"]["seed_scheme"] != plan["seed_scheme"]:
            raise StillroomError(
                f"run directory {str(self.directory)!r} was begun under seed scheme {stored['plan']['seed_scheme']}, "
                f"this version draws by scheme {plan['seed_scheme']}; give another directory with --out"
            )
        if stored["plan"]["device"].split(":")[0] != plan["device"].split(":")[0]:
            raise StillroomError(
                f"run directory {str(self.directory)!r} was begun on {stored['plan']['device']}, this run is on "
                f"{plan['device']}; give --compute.device {stored['plan']['device']}, or another directory with --out"
            )
        self.event("opened")
        here = ["processor", "torch_version", "device"]  # facts of this machine; the kind of device is the same
        if plan["compile"] == "off":  # not to be had here, or not wanted any more
            here.append("compile")
        for key in here:
            if stored["plan"][key] != plan[key]:
                self.event("plan_differs", field=key, stored=stored["plan"][key], now=plan[key])
        return stored["plan"] | {key: plan[key] for key in here}

    # -- units and checkpoints -------------------------------------------------------------------------------------

    def unit_done(self, name: str) -> bool:
        """Whether the unit is finished (as JSON or as tensors)."""
        return self.directory is not None and any(self._unit(name, s).exists() for s in (".json", ".safetensors"))

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
        self.checkpoint(name).remove()  # left by a process that was killed just after finishing the unit
        path = self._unit(name, ".safetensors")
        if path.exists():
            tensors, result = load_tensors(path)
            return break_seal(result, tensors, path), tensors
        path = self._unit(name, ".json")
        return break_seal(read_json(path), {}, path), {}

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
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **fields}, allow_nan=True)
        with open(self.directory / "events.jsonl", "a") as events:
            events.write(line + "\n")

    def seconds_spent(self) -> float:
        """Return the time that processes have spent on this run, from each one's opening to its last event.

        What a killed process did after its last event is not counted.
        """
        if self.directory is None or not (self.directory / "events.jsonl").exists():
            return 0.0
        spent = begun = last = 0.0
        for line in (self.directory / "events.jsonl").read_text().splitlines():
            try:
                event = json.loads(line)
            except json.JSONDecodeError:  # left half written by a killed process
                continue
            if event["event"] == "opened":
                spent += last - begun
                begun = event["time"]
            last = event["time"]
        return round(spent + last - begun, 1)

    def notice(self, message: str) -> None:
        """Tell the user one thing, on standard error, and keep it in the events."""
        print(message, file=sys.stderr)
        self.event("notice", message=message)

    @property
    def stopping(self) -> bool:
        """Whether work should be saved and left now: the time limit is near, or a termination signal came."""
        late = self.stop_at is not None and time.monotonic() >= self.stop_at
        return late or self._stop_signal is not None or (self.parent is not None and self.parent.stopping)

    def stop(self) -> TimeLimitReached:
        """Return the exception that leaves the run cleanly."""
        reason = self._stop_signal or (self.parent and self.parent._stop_signal) or "time limit"
        self.event("stopped", reason=reason)
        return TimeLimitReached(reason)

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
        """Show a bar with rate and time left on a terminal; yield ``advance(steps=1, **shown)``; silent elsewhere."""
        if not self.show:
            yield lambda steps=1, **shown: None
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:<34}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
        )
        begun = time.monotonic()
        from rich.console import Console

        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task(label, total=total, completed=start, rate="", shown="")
            done = start

            def advance(steps: int = 1, **shown: Any) -> None:
                nonlocal done
                done += steps
                rate = (done - start) / max(time.monotonic() - begun, 1e-9)
                text = " ".join(f"{k} {v}" for k, v in shown.items())
                fields: dict[str, Any] = {"rate": f"{rate:.1f}/s", **({"shown": text} if shown else {})}
                bars.update(task, advance=steps, **fields)

            yield advance


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


def _lock(directory: Path) -> Any:
    """Hold an exclusive lock on the directory; it ends with the process, however that ends."""
    lock = open(directory / ".lock", "a+")  # noqa: SIM115 - kept open for the life of the run
    try:
        import fcntl
    except ImportError:  # Windows: two commands on one directory are not detected there
        return lock
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
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


def _end_last_line(events: Path) -> None:
    """Keep a line that a killed process left half written from swallowing the next one."""
    if events.exists() and not events.read_bytes().endswith(b"\n"):
        with open(events, "a") as file:
            file.write("\n")


def _differences(stored: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(stored, dict) and isinstance(now, dict):
        for key in sorted(stored.keys() | now.keys()):
            yield from _differences(stored.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif stored != now:
        yield name, stored, now
