"""`stillroom figure NAME RUN...`: a figure of finished runs, as a picture with its data as CSV beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from stillroom.errors import StillroomError, UsageError, suggest
from stillroom.events import require_run
from stillroom.gallery import FIGURES, check_picture, write_figure
from stillroom.run import Run
from stillroom.settings import parse_duration, parse_words, reading_words
from stillroom.study import Study, StudyConfig


@dataclass(frozen=True)
class FigureCommand:
    """Draw a figure of finished runs or comparisons; without a name, list the figures there are."""

    name: tyro.conf.Positional[str]
    runs: tyro.conf.Positional[tuple[Path, ...]]  # directories of runs or comparisons of one dataset
    settings: Annotated[StudyConfig, tyro.conf.arg(name="")] = field(default_factory=StudyConfig)
    out: Path | None = None  # the picture, .png or .svg; figures/NAME.png in the first run if not given
    dark: bool = False  # for dark pages
    keep: Path | None = None  # where students trained for figures are kept; figures/ in the first run if not given
    time_limit: str | None = None  # stop cleanly after this time (90s, 9m, 2h); the same command goes on


def figure_command(words: list[str]) -> int:
    """stillroom figure: the paper's figures, of one's own runs."""
    if not words:
        width = max(map(len, FIGURES))
        for name, figure in FIGURES.items():
            print(f"{name:<{width}}  {figure.shows}{'; trains students' if figure.trains else ''}")
        return 0
    command = parse_words(FigureCommand, "figure", words)
    if command.name not in FIGURES:
        raise UsageError(f"there is no figure {command.name!r}.{suggest(command.name, FIGURES)}")
    if not command.runs:
        raise UsageError(f"name a run, too: stillroom figure {command.name} runs/demo")
    folder = command.runs[0] / "figures"
    out = command.out or folder / f"{command.name}.png"
    with reading_words():
        check_picture(out)
    limit = parse_duration(command.time_limit)
    require_run(command.runs[0])  # before a folder is made in it
    figure = FIGURES[command.name]
    try:
        kept = Run(command.keep or folder, time_limit=limit)
    except StillroomError as error:  # in use, or not to be written
        raise StillroomError(str(error).replace("--out", "--keep")) from error
    with kept as keep, keep.stop_on_signals():
        arrays = figure.compute(Study(command.runs, command.settings, keep))
    write_figure(command.name, arrays, out, command.dark)
    print(figure.describe(arrays))
    print(f"picture: {out}; its data: {out.with_suffix('.csv')}")
    return 0
