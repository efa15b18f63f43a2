"""Errors that teach: each names the argument, the value it got, and the fix."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin, get_type_hints


class StillroomError(ValueError):
    """Bad input or a state that the user can mend; the command line prints its message alone, without a traceback."""


class DamagedFileError(StillroomError):
    """A file that is not as it was written: cut short, edited, or spoilt on the way."""


class UsageError(StillroomError):
    """Words of the command line, or settings in a file, that cannot be understood or are out of range."""


class TimeLimitReached(Exception):  # noqa: N818 - it ends a run well
    """The time limit of a run has passed; everything done so far is saved and the same command goes on."""


def suggest(name: str, choices: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest of `choices`, or their list when nothing is near."""
    known = sorted(choices)
    return find_near(name, known) or " Choose from: " + ", ".join(known) + "."


def find_near(name: str, choices: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest of `choices`, "" when nothing is near."""
    near = difflib.get_close_matches(name, sorted(choices), n=3, cutoff=0.6)
    return " Did you mean " + " or ".join(repr(n) for n in near) + "?" if near else ""


def check_choices(settings: Any, where: str) -> None:
    """Raise StillroomError where a `Literal` field of the dataclass `settings` holds none of its choices.

    Python does not check these; without it a misspelt choice would quietly mean another one.
    """
    hints = get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, hint = getattr(settings, field.name), hints[field.name]
        if value is None and type(None) in get_args(hint):
            continue
        hint = next((kind for kind in (hint, *get_args(hint)) if get_origin(kind) is Literal), hint)
        choices = get_args(hint)
        if get_origin(hint) is Literal and value not in choices:
            fix = suggest(str(value), map(str, choices))
            raise StillroomError(f"{where}.{field.name} is {value!r}, which is not one of its choices.{fix}")
