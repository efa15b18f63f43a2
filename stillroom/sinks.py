"""Where a run's numbers go besides its own files: TensorBoard, wandb or trackio, as `--log` names them.

    with open_sink("tensorboard", Path("runs/mine")) as sink, Run(Path("runs/mine"), sink=sink.take) as run:
        ...

None of these packages is imported unless it is named. A sink is no part of the work: one that fails is left, and the
run goes on. Each process sends what it does itself; what a resumed run finds finished was sent when it was made.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from stillroom.errors import StillroomError

SinkName = Literal["tensorboard", "wandb", "trackio"]
PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
PROJECT = "stillroom"  # the name under which wandb and trackio list the runs

Send = Callable[[dict[str, float], str, int], None]  # numbers by name, whose they are, and their place in its course
Close = Callable[[], None]


class Sink:
    """Takes a run's events and sends their numbers on; opened by the first that has some."""

    def __init__(self, name: SinkName, directory: Path, package: Any) -> None:
        self.name, self.directory, self.package = name, directory, package
        self._send: Send | None = None
        self._close: Close = lambda: None
        self._failed = False
        self._rows = 0

    def take(self, event: dict[str, Any]) -> None:
        """Send the numbers of one event (see Run.event). Never raises: the first failure is told, and is the last."""
        if self._failed:
            return
        try:
            of, step, numbers = numbers_of(event)
            if not numbers:
                return
            if event["event"] in ("row", "cell"):
                self._rows, step = self._rows + 1, self._rows
            if self._send is None:
                self._send, self._close = OPENERS[self.name](self.package, self.directory)
            self._send(numbers, of, step)
        except Exception as error:  # packages of others, which write to disks and networks
            self._fail(error)

    def close(self) -> None:
        """Send what is left and close; a failure is told."""
        try:
            self._close()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._failed = True
        print(f"stillroom: --log {self.name} failed ({error!r:.200}); the run goes on without it", file=sys.stderr)


@contextmanager
def open_sink(name: SinkName, directory: Path) -> Iterator[Sink]:
    """Yield the sink of a run in `directory`. Raises StillroomError where its package is not installed."""
    try:
        package = importlib.import_module(PACKAGES[name])
    except ImportError as error:
        raise StillroomError(
            f"--log {name} needs a package that is not installed ({error}); pip install {name}"
        ) from error
    sink = Sink(name, directory, package)
    try:
        yield sink
    finally:
        sink.close()


def numbers_of(event: dict[str, Any]) -> tuple[str, int, dict[str, float]]:
    """Return whose numbers an event holds, their place in its course, and the numbers by name; none of other kinds.

    Of an epoch its loss and what was measured, accuracies in [0, 1]; of compensators and images each term of the last
    step's losses, the mean over slots (of INFER's: loss_0 of labels, loss_1 of statistics); of rows and cells what
    students reached, in %.
    """
    kind = event.get("event")
    if kind == "epoch":
        return str(event["unit"]), int(event["step"]), _plain(event, ("event", "time", "unit", "step"))
    if kind in ("compensators", "images"):
        whose = event["unit"] if kind == "images" else f"compensators-{event['teacher']}-{event['slots'][0]}"
        if "within" in event:  # a set of a comparison, where others have units of the same names
            whose = f"{event['within']}/{whose}"
        terms = {f"loss_{number}": sum(values) / len(values) for number, values in enumerate(event["losses"])}
        return str(whose), 0, terms
    if kind == "teacher":
        return f"teacher-{event['name']}", 0, _plain(event.get("accuracy", {}), ())
    if kind == "cell":
        return f"{event['set']}, {event['labels']} labels, {event['budget']}", 0, _plain(event, ("time",))
    if kind == "row" and "error" not in event:
        whose = f"{event['method']}, ipc {event['ipc']}, {event['labels']} labels, {event['student']}"
        return whose, 0, _plain(event, ("time", "ipc"))
    return "", 0, {}


def _plain(event: dict[str, Any], without: tuple[str, ...]) -> dict[str, float]:
    found = {k: v for k, v in event.items() if k not in without and type(v) in (int, float)}
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


# How each package is spoken to: opened for a directory, it gives what sends and what closes.


def _open_tensorboard(package: Any, directory: Path) -> tuple[Send, Close]:
    writer = package.SummaryWriter(log_dir=str(directory / "tensorboard"))

    def send(numbers: dict[str, float], of: str, step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(f"{of}/{name}", value, step)

    return send, writer.close


def _open_tracker(package: Any, directory: Path, **settings: Any) -> tuple[Send, Close]:
    package.init(project=PROJECT, name=directory.resolve().name, **settings)

    def send(numbers: dict[str, float], of: str, step: int) -> None:
        # Each unit has its own course: their steps would not be one rising count, which is what these take for `step`.
        package.log({f"{of}/{name}": value for name, value in ({"step": float(step)} | numbers).items()})

    return send, package.finish


def _open_wandb(package: Any, directory: Path) -> tuple[Send, Close]:
    return _open_tracker(package, directory, dir=str(directory))


OPENERS: dict[str, Callable[[Any, Path], tuple[Send, Close]]] = {
    "tensorboard": _open_tensorboard,
    "wandb": _open_wandb,
    "trackio": _open_tracker,
}
