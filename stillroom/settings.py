"""Settings: words of the command line and YAML files, read into typed dataclasses and printed again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tyro
import yaml

from stillroom.errors import StillroomError


def parse_words(kind: type[Any], name: str, words: list[str], default: Any = None) -> Any:
    """Parse `words` by the dataclass `kind`; a YAML file named by --config is read as flags that stand before them."""
    file = None
    for index, word in enumerate(words):
        if word == "--config" and index + 1 < len(words):
            file = Path(words[index + 1])
        elif word.startswith("--config="):
            file = Path(word.partition("=")[2])
    positional = words[:1] if words and not words[0].startswith("-") else []
    if file is not None:
        words = positional + yaml_to_flags(file) + words[len(positional) :]
    options = {} if default is None else {"default": default}
    return tyro.cli(kind, prog=f"stillroom {name}", args=words, **options)


def yaml_to_flags(path: Path) -> list[str]:
    """Return a YAML file of nested settings as command-line flags, so that both obey the same types and checks."""
    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise StillroomError(f"--config {str(path)!r} cannot be read as YAML: {error}") from error
    if settings is None:
        return []
    if not isinstance(settings, dict):
        raise StillroomError(
            f"--config {str(path)!r} holds {type(settings).__name__}, not settings; see --print-config"
        )
    return list(_flags(settings, ""))


def _flags(settings: dict[Any, Any], prefix: str) -> Iterator[str]:
    for key, value in settings.items():
        flag = f"{prefix}{key}".replace("_", "-")
        if isinstance(value, dict):
            yield from _flags(value, f"{flag}.")
        elif isinstance(value, bool):
            group, dot, leaf = flag.rpartition(".")
            yield f"--{flag}" if value else f"--{group}{dot}no-{leaf}"
        elif isinstance(value, list):
            yield from (f"--{flag}", *map(str, value))
        else:
            yield from (f"--{flag}", str(value))


def to_yaml(settings: Any, without: tuple[str, ...] = ()) -> str:
    """Return a dataclass of settings as YAML that --config reads back."""
    plain = json.loads(json.dumps(asdict(settings), default=str))
    return yaml.safe_dump({k: v for k, v in plain.items() if k not in without}, sort_keys=False).rstrip()


def parse_duration(text: str | None) -> float | None:
    """Return seconds: "90", "90s", "9m", "1.5h" or "1h30m". Raises StillroomError for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s?)?", text.strip())
    try:
        if match is None or not any(match.groups()):
            raise ValueError
        hours, minutes, seconds = (float(part or 0) for part in match.groups())
    except ValueError:
        raise StillroomError(f"--time-limit is {text!r}; give a time such as 90s, 9m, 1.5h or 1h30m") from None
    return 3600 * hours + 60 * minutes + seconds
