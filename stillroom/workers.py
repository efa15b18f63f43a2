"""Several processes at one run: which unit of work is whose, what each of them is at, and when all are to stop.

    run/workers/
        claims        an empty file: a worker locks the byte that is its unit's, and the lock ends with the process
        NAME.json     what the worker is at, while it works
        NAME.jsonl    its events

Workers need nothing but the directory: the same command started several times with `--engine shared`, by hand or as a
job array, or by `cluster.py` on Ray. It must be one directory for all of them, whose locks reach all of them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from stillroom.errors import StillroomError
from stillroom.files import open_unlinked, read_json, remove_if_there, sha256_bytes, write_json

LOOK_SECONDS = 1.0  # between two looks at what others have finished, and at the word to stop
REPORT_SECONDS = 2.0  # between two reports of one worker
FRESH_SECONDS = 120.0  # after which the word of a worker on another machine counts as left behind


def name_worker() -> str:
    """Return a name that no other process has while this one lives: that of the machine, and the process's number."""
    return f"{socket.gethostname()}-{os.getpid()}"


@dataclass(frozen=True)
class Report:
    """What a worker is at: `done` of `total` steps (0: not counted), so many a second, and what else is `shown`."""

    process: str  # its machine and number
    label: str
    done: int
    total: int
    rate: float
    shown: str


class Worker:
    """One of the processes that share the run in `directory`.

    `stop_file`: where there is such a file all are to stop, for the reason that it holds; None: nobody says so.
    Raises StillroomError where the system, or the file system, has no locks.
    """

    def __init__(self, directory: Path, name: str, stop_file: Path | None = None) -> None:
        self.name, self.stop_file = name, stop_file
        self.folder = directory / "workers"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._claims = open_unlinked(self.folder / "claims", os.O_RDWR | os.O_CREAT)
        self._asked, self._reason = -LOOK_SECONDS, ""
        self._label, self._reported = "", -REPORT_SECONDS

    @property
    def events(self) -> Path:
        return self.folder / f"{self.name}.jsonl"

    def claim(self, unit: str) -> bool:
        """Whether the unit is this worker's now; False: another one is at it."""
        return try_byte(self._claims, unit)

    def release(self, unit: str) -> None:
        """Leave the unit to others."""
        import fcntl

        fcntl.lockf(self._claims, fcntl.LOCK_UN, 1, _byte_of(unit))

    def asked_to_stop(self) -> str:
        """Return why all workers are to stop, "" where they are not. Looks at most once a second: steps are short."""
        if self.stop_file is not None and not self._reason and time.monotonic() - self._asked >= LOOK_SECONDS:
            self._asked = time.monotonic()
            if self.stop_file.exists():
                self._reason = self.stop_file.read_text() or "stop"
        return self._reason

    def report(self, label: str, done: int, total: int, rate: float = 0.0, shown: str = "") -> None:
        """Leave word of what this worker is at, for whoever shows it; seldom enough to cost nothing."""
        if label != self._label or time.monotonic() - self._reported >= REPORT_SECONDS:
            self._label, self._reported = label, time.monotonic()
            report = Report(name_worker(), label, done, total, rate, shown)
            write_json(self.folder / f"{self.name}.json", asdict(report))

    def close(self) -> None:
        """Give back every claim and take the report away."""
        remove_if_there(self.folder / f"{self.name}.json")
        os.close(self._claims)


def read_reports(directory: Path) -> dict[str, Report]:
    """Return what each worker that shares the run says it is at, by name; those left behind by dead ones omitted."""
    found = {}
    for file in sorted((directory / "workers").glob("*.json")):
        with contextlib.suppress(OSError, LookupError, TypeError, ValueError, OverflowError):  # gone, or damaged
            said = read_json(file)
            report = Report(
                str(said["process"]), str(said["label"]), int(said["done"]), int(said["total"]), float(said["rate"]),
                str(said["shown"]),
            )  # fmt: skip
            fresh = time.time() - file.stat().st_mtime < FRESH_SECONDS
            host, _, number = report.process.rpartition("-")
            if _is_alive(number) if host == name_worker().rpartition("-")[0] else fresh:
                found[file.stem] = report
    return found


def _is_alive(number: str) -> bool:
    """Whether a process of this machine has this number; False on Windows, where asking would disturb it."""
    if not number.isdecimal() or os.name != "posix":
        return False
    try:
        os.kill(int(number), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def try_byte(file: int, unit: str) -> bool:
    """Lock the unit's byte of an open file; False where another process holds it.

    Raises StillroomError where there are no such locks.
    """
    try:
        import fcntl
    except ImportError as error:  # Windows
        raise StillroomError(
            "several workers at one run need the file locks of Linux or macOS, which this system does not have; use "
            "--engine local"
        ) from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _byte_of(unit))
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise StillroomError(
            f"the run directory's file system keeps no locks ({error.strerror}), so that workers cannot share it; put "
            "the run elsewhere by --out, or use --engine local"
        ) from error
    return True


def _byte_of(unit: str) -> int:
    """Two units of one byte would wait for each other, and no more; of 2^48 bytes that is not to be expected."""
    return int(sha256_bytes(unit.encode())[:12], 16)
