"""The gallery: every figure by name, what computes it, draws it, and says in one sentence what it shows.

study = Study([Path("runs/demo")], StudyConfig(), Run(Path("runs/demo/figures")))
arrays = FIGURES["losses"].compute(study)
picture = FIGURES["losses"].draw(arrays)            # a matplotlib Figure; draw(arrays, dark=True) for dark pages
sentence = FIGURES["losses"].describe(arrays)       # alternative text
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stillroom.analysis import divergence, features, predictions, recovery, results
from stillroom.arrays import Arrays, to_csv
from stillroom.errors import StillroomError
from stillroom.figures import compensators as of_compensators
from stillroom.figures import results as of_results
from stillroom.figures import students as of_students
from stillroom.figures.style import Draw
from stillroom.files import write_atomic
from stillroom.study import Study

FORMATS = (".png", ".svg")


@dataclass(frozen=True)
class Figure:
    """One kind of figure. compute(study) raises StillroomError, which says what to run, where the runs lack something.

    shows: a few words, and the paper's figure. trains: whether students are trained for it where there are none yet.
    """

    compute: Callable[[Study], Any]
    draw: Draw[Any]
    describe: Callable[[Any], str]
    shows: str
    trains: bool = False


# fmt: off
FIGURES: dict[str, Figure] = {
    "accuracy":     Figure(results.measure_tradeoff, of_results.draw_tradeoff, of_results.describe_tradeoff,
                           "accuracy against compression by bytes (Figure 1)"),
    "gain":         Figure(results.measure_gain, of_results.draw_gain, of_results.describe_gain,
                           "what compensators add to their naturals (Figure 4, right)"),
    "duplication":  Figure(features.measure_duplication, of_results.draw_duplication, of_results.describe_duplication,
                           "feature duplication by budget (Figure 4, left)"),
    "boundaries":   Figure(features.map_boundaries, of_students.draw_boundaries, of_students.describe_boundaries,
                           "decision boundaries of students (Figure 2, right)", trains=True),
    "landscape":    Figure(predictions.measure_landscape, of_students.draw_landscape, of_students.describe_landscape,
                           "loss of students around test images (Figure 5)", trains=True),
    "difficulty":   Figure(predictions.measure_difficulty, of_students.draw_difficulty, of_students.describe_difficulty,
                           "right predictions by difficulty (Figure 8)", trains=True),
    "divergence":   Figure(divergence.measure_divergence, of_students.draw_divergence, of_students.describe_divergence,
                           "dynamic against static labels (Figure 9)"),
    "calibration":  Figure(predictions.measure_calibration, of_students.draw_calibration,
                           of_students.describe_calibration, "how sure and how right students are", trains=True),
    "classes":      Figure(predictions.measure_classes, of_students.draw_classes, of_students.describe_classes,
                           "accuracy of students class by class", trains=True),
    "compensators": Figure(recovery.show_compensators, of_compensators.draw_compensators,
                           of_compensators.describe_compensators, "compensators by teacher and slot (Figures 6, 7)"),
    "views":        Figure(recovery.show_views, of_compensators.draw_views, of_compensators.describe_views,
                           "naturals, compensators and the views they make (Figure 3)"),
    "losses":       Figure(recovery.read_losses, of_compensators.draw_losses, of_compensators.describe_losses,
                           "losses while compensators are optimised"),
    "layers":       Figure(recovery.measure_layers, of_compensators.draw_layers, of_compensators.describe_layers,
                           "what each layer's statistics contribute"),
}
# fmt: on


def render(name: str, arrays: Arrays, format: Literal["png", "svg"], dark: bool = False) -> bytes:
    """Return a figure as the bytes of a PNG or SVG file; equal arrays give equal bytes."""
    import matplotlib

    figure, buffer = FIGURES[name].draw(arrays, dark=dark), io.BytesIO()
    said = FIGURES[name].describe(arrays)
    options: dict[str, Any] = {"metadata": {"Description": said, "Date": None}}
    if format == "png":
        options = {"metadata": {"Description": said, "Software": None}, "pil_kwargs": {"optimize": True}}
    with warnings.catch_warnings(record=True) as said_of_letters:  # each of them, many times
        warnings.filterwarnings("always", "Glyph .* missing from")
        with matplotlib.rc_context({"svg.hashsalt": name}):  # else identifiers are drawn at random
            figure.savefig(buffer, format=format, **options)
    if said_of_letters:
        warnings.warn(
            f"{name}: letters that no font of this machine has are drawn as boxes; install one, such as Noto Sans CJK",
            stacklevel=2,
        )
    return buffer.getvalue()


def check_picture(path: Path) -> None:
    """Raise StillroomError unless `path` names a kind of picture that can be written."""
    if path.suffix not in FORMATS:
        raise StillroomError(f"--out {path} ends in {path.suffix!r}; give a file that ends in {' or '.join(FORMATS)}")


def write_figure(name: str, arrays: Arrays, path: Path, dark: bool = False) -> None:
    """Write a figure to `path`, as PNG or SVG by its ending, and its data beside it as CSV."""
    check_picture(path)
    content = render(name, arrays, path.suffix[1:], dark)  # type: ignore[arg-type]
    write_atomic(path, content)
    write_atomic(path.with_suffix(".csv"), to_csv(arrays).encode())
