"""`stillroom report RUN...`: one self-contained page of finished runs and comparisons, the gallery's figures in it."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from stillroom.arrays import Arrays
from stillroom.distilled import load_distilled
from stillroom.errors import StillroomError, UsageError
from stillroom.files import write_atomic
from stillroom.gallery import FIGURES, render
from stillroom.report import Figure, Opened, as_written, build_report, open_run
from stillroom.run import Run
from stillroom.settings import parse_words
from stillroom.study import Study, StudyConfig, find_sets

# Those that need neither real images nor teachers nor students, so that a report takes seconds: lines as SVG, which is
# sharp at every size, pixels as PNG.
CHEAP: dict[str, Literal["svg", "png"]] = {
    "accuracy": "svg",
    "gain": "svg",
    "views": "png",
    "compensators": "png",
    "losses": "svg",
}
FIGURE_BYTES = 150_000  # of one figure; an SVG of more is drawn as PNG


@dataclass(frozen=True)
class ReportCommand:
    """Write one HTML page of runs or comparisons: claims, bytes, pictures, curves, tables, settings, provenance."""

    runs: tyro.conf.Positional[tuple[Path, ...]]  # directories of runs, comparisons or evaluations
    out: Path | None = None  # the page; report.html in the first run if not given
    pictures: bool = True  # draw the gallery's cheap figures; --no-pictures leaves them out


def report_command(words: list[str]) -> int:
    """stillroom report: a page to be opened from disk."""
    command = parse_words(ReportCommand, "report", words)
    if not command.runs:
        raise UsageError("name a run: stillroom report runs/demo")
    if len(set(command.runs)) != len(command.runs):
        raise UsageError(f"{' '.join(map(str, command.runs))} names a run twice; name each once")
    out = command.out or command.runs[0] / "report.html"
    if out.suffix not in (".html", ".htm"):
        raise UsageError(f"--out {out} is no page; give a file that ends in .html")
    write_report(command.runs, out, command.pictures)
    print(f"report: {out}")
    return 0


def write_report(runs: Sequence[Path], out: Path, pictures: bool = True) -> None:
    """Write the page of `runs` to `out`. Raises StillroomError where one of them is no run, or is damaged."""
    opened = [open_run(run) for run in runs]
    build_report(opened, {})  # what is damaged is refused before anything is drawn
    figures, notes = {}, list(find_damage(opened))
    if pictures:
        with warnings.catch_warnings(record=True) as heard:
            try:
                figures = {run: draw_figures(run) for run in runs}
            except ImportError:
                notes.append(
                    "Figures are missing, since matplotlib is not installed: pip install matplotlib, then write it "
                    "anew."
                )
        notes += dict.fromkeys(str(one.message) for one in heard)
    for note in notes:
        print(f"stillroom: {note}", file=sys.stderr)
    write_atomic(out, build_report(opened, figures, notes).encode("utf-8", "replace"))


def find_damage(opened: Sequence[Opened]) -> Iterator[str]:
    """Yield what is wrong with the sets of runs, which the page would show as if they could be used."""
    for run in opened:
        for name, (folder, _) in run.sets.items():
            try:
                load_distilled(folder)
            except StillroomError as error:
                yield f"the set {name} is not whole, and cannot be loaded: {error}"


def draw_figures(run: Path) -> dict[str, Figure]:
    """Return the figures that a run has what is needed for, by name. Raises ImportError without matplotlib."""
    import matplotlib  # noqa: F401 - asked for before anything is computed

    try:
        find_sets(run)
    except StillroomError:  # no set yet, or an evaluation's students
        return {}
    found = {}
    with Run(None, show=False) as keep:
        study = Study([run], StudyConfig(), keep)
        for name in CHEAP:
            try:
                with as_written(run):
                    arrays = FIGURES[name].compute(study)
            except StillroomError:  # the run is of another kind: no comparison, or no compensators
                continue
            found[name] = draw_figure(name, arrays, run)
    return found


def draw_figure(name: str, arrays: Arrays, run: Path) -> Figure:
    """Return one of the cheap figures for light pages and for dark ones, with its sentence and how to get its data."""
    kind = CHEAP[name]
    light = render(name, arrays, kind)
    if len(light) > FIGURE_BYTES:
        kind, light = "png", render(name, arrays, "png")
    shows = re.sub(r" \(Figure.*?\)$", "", FIGURES[name].shows)
    return Figure(
        light,
        render(name, arrays, kind, dark=True),
        FIGURES[name].describe(arrays),
        f"{shows[:1].upper()}{shows[1:]}; its data by: stillroom figure {name} {run}",
        "svg+xml" if kind == "svg" else "png",
    )
