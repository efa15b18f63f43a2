"""A process that has everything imported, and forks children that work: a command starts in milliseconds.

It never works itself: threads, such as arrow's, would not come along into a child.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest

from stillroom import cli, run, teachers
from stillroom.networks import NETWORKS
from stillroom.recipes import RECIPES

CRASHED = 70  # the exit code of an exception that nobody caught
HUNG_SECONDS = 120.0


@dataclass(frozen=True)
class Told:
    """How a child ended: its exit code, or minus its signal, and what it said on standard error."""

    code: int
    err: str

    @property
    def is_clear_error(self) -> bool:
        """Whether it failed with a message (a comparison: one for each row), and not by a crash."""
        return self.code in (1, 2) and bool(self.err.strip()) and "Traceback" not in self.err


@dataclass
class Child:
    """A forked process, and the file of its standard error."""

    pid: int
    err: Path

    def wait(self, kill_after: float | None = None, meanwhile: Callable[[], object] = lambda: None) -> Told:
        """Return how it ended; it is killed after so many seconds, and where it hangs. Calls `meanwhile` till then."""
        begun = time.monotonic()
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            meanwhile()
            if pid:
                # Killed at once, it has not come to its file.
                said = self.err.read_text(errors="replace") if self.err.exists() else ""
                return Told(os.waitstatus_to_exitcode(status), said)
            if time.monotonic() - begun > (HUNG_SECONDS if kill_after is None else kill_after):
                os.kill(self.pid, signal.SIGKILL)
                kill_after = HUNG_SECONDS
            time.sleep(0.001)


def fork(work: Callable[[], int], err: Path) -> Child:
    """Do `work`, which returns an exit code, in a child whose standard error goes to a file."""
    pid = os.fork()
    if pid:
        return Child(pid, err)
    code = CRASHED
    try:
        with open(err, "w") as file, contextlib.redirect_stderr(file), open(os.devnull, "w") as nowhere:
            with contextlib.redirect_stdout(nowhere):
                try:
                    code = work()
                except SystemExit as stop:
                    code = stop.code if isinstance(stop.code, int) else CRASHED
                except BaseException:
                    traceback.print_exc()
    finally:
        os._exit(code)


def prepare(folder: Path) -> Path:
    """Let children know the toy world, checkpoint at every step, wait briefly for each other, and find everything
    imported; return its images."""
    source = conftest.write_toy_npz(folder / "toy.npz")
    NETWORKS["toynet"] = conftest.TOYNET_ROW
    RECIPES["toy"] = conftest.build_toy_recipe(source)
    run.CHECKPOINT_SECONDS = 0.0
    run.LOOK_SECONDS = teachers.LOOK_SECONDS = 0.02  # between two looks at what other workers have finished
    names = folder / "modules.json"

    def work() -> int:
        os.environ["STILLROOM_CACHE"] = str(folder / "modules-cache")
        code = cli.main(["run", "toy", "--out", str(folder / "modules-run")])
        names.write_text(json.dumps(list(sys.modules)))
        return code

    told = fork(work, folder / "modules.err").wait()
    assert told.code == 0, told.err
    for name in json.loads(names.read_text()):
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    return source
