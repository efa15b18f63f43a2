"""What each figure shows, as plain arrays: computed in analysis/, drawn in figures/, kept as CSV beside the picture.

A field is a fact (text or a number), or an array of floats, integers or texts that names its axes:
`Annotated[np.ndarray, float, "set", "seed"]`. An array that has the name of an axis holds what stands along it.
`to_csv` writes facts and arrays as a block of a table for each combination of axes, `read_csv` reads them back.
"""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeVar, get_type_hints

import numpy as np

from stillroom.errors import StillroomError

DIGITS = 7  # of a float, here and in the CSV: what is drawn is what the file holds

# Control characters and halves of pairs, which neither a picture nor a file of text can hold.
_UNREADABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

Kind = TypeVar("Kind", bound="Arrays")


class Column(NamedTuple):
    """A field: its values' type, and its axes, none for a fact."""

    kind: type
    axes: tuple[str, ...]


def columns_of(kind: type) -> dict[str, Column]:
    """Return the fields of a class of arrays by name, facts first, then by the number of axes."""
    hints = get_type_hints(kind, include_extras=True)
    columns = {
        name: Column(*(hint.__metadata__[0], hint.__metadata__[1:]) if hasattr(hint, "__metadata__") else (hint, ()))
        for name, hint in hints.items()
    }
    return dict(sorted(columns.items(), key=lambda item: len(item[1].axes)))


@dataclass(frozen=True, eq=False)
class Arrays:
    """What a figure shows. Raises StillroomError where arrays disagree on the length of an axis.

    Class names and methods are whatever people call theirs: of texts, what cannot be shown is replaced.
    """

    def __post_init__(self) -> None:
        lengths: dict[str, int] = {}
        for name, (kind, axes) in columns_of(type(self)).items():
            if not axes:
                object.__setattr__(self, name, _readable(getattr(self, name)))
                continue
            values: np.ndarray = np.asarray(getattr(self, name)).astype(kind)
            if kind is str:
                values = np.array([_readable(text) for text in values.ravel().tolist()], str).reshape(values.shape)
            object.__setattr__(self, name, _rounded(values) if kind is float else values)
            known = [lengths.setdefault(axis, length) for axis, length in zip(axes, values.shape, strict=False)]
            if known != list(values.shape) or len(known) != len(axes):
                raise StillroomError(
                    f"{type(self).__name__}.{name} has shape {list(values.shape)}, but its axes {', '.join(axes)} have "
                    f"lengths {known}; give arrays that agree"
                )


def _readable(value: Any) -> Any:
    return _UNREADABLE.sub("\N{REPLACEMENT CHARACTER}", value) if isinstance(value, str) else value


def _rounded(values: np.ndarray) -> np.ndarray:
    flat = [float(f"{value:.{DIGITS}g}") for value in values.ravel().tolist()]
    return np.array(flat, np.float64).reshape(values.shape)


def to_csv(arrays: Arrays) -> str:
    """Return `arrays` as comma-separated values: the facts, then a block for each combination of axes.

    A row of a block holds the place along each axis (what stands there, or its index) and the values at it. An empty
    line ends a block.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, (_, axes) in columns_of(type(arrays)).items():
        groups.setdefault(axes, []).append(name)
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    for axes, names in groups.items():
        columns = {name: np.asarray(getattr(arrays, name)) for name in names if name not in axes}
        shape = np.asarray(getattr(arrays, names[0])).shape
        places = [_places(arrays, axis, length) for axis, length in zip(axes, shape, strict=True)]
        lists = [values.ravel().tolist() for values in columns.values()]
        rows.writerow([*axes, *columns])
        for flat, index in enumerate(np.ndindex(shape)):
            along = (place[i] for place, i in zip(places, index, strict=True))
            rows.writerow([*along, *(values[flat] for values in lists)])
        rows.writerow([])
    return text.getvalue()


def _places(arrays: Arrays, axis: str, length: int) -> list[Any]:
    return getattr(arrays, axis).tolist() if axis in columns_of(type(arrays)) else list(range(length))


def read_csv(text: str, kind: type[Kind]) -> Kind:
    """Return what `to_csv` wrote of an object of the class `kind`; raises StillroomError where a column is missing."""
    columns: dict[str, list[str]] = {}
    block: list[list[str]] = []
    for row in [*csv.reader(io.StringIO(text)), []]:
        if row:
            block.append(row)
        elif block:
            for name, *texts in zip(*block, strict=True):
                columns.setdefault(name, texts)
            block = []
    values: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for name, (of, axes) in columns_of(kind).items():
        if name not in columns:
            raise StillroomError(f"the CSV of a {kind.__name__} lacks the column {name!r}; make the figure again")
        read = [of(value) for value in columns[name]]
        if len(axes) == 1:
            sizes[axes[0]] = len(read)
        for axis in set(axes) - sizes.keys():  # along which nothing stands but its indices
            sizes[axis] = 1 + max(map(int, columns[axis]), default=-1)
        values[name] = np.array(read, of).reshape([sizes[axis] for axis in axes]) if axes else read[0]
    return kind(**values)


# -- of results ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Tradeoff(Arrays):
    """Accuracy against compression (Figure 1): top-1 in %, ratio in % of the bytes of the real training set's pixels.

    A point is a method, a kind of label and a budget. ratio: of images, compensators and labels, dynamic ones as if
    they were stored; deviation: of students' `seeds`, as many as there are, nan for one.
    """

    dataset: str
    student: str
    method: Annotated[np.ndarray, str, "point"]
    labels: Annotated[np.ndarray, str, "point"]
    ipc: Annotated[np.ndarray, int, "point"]
    steps: Annotated[np.ndarray, int, "point"]
    seeds: Annotated[np.ndarray, int, "point"]
    ratio: Annotated[np.ndarray, float, "point"]
    top1: Annotated[np.ndarray, float, "point"]
    deviation: Annotated[np.ndarray, float, "point"]


@dataclass(frozen=True, eq=False)
class Gain(Arrays):
    """What compensators add to the naturals alone (Figure 4, right), in points of top-1, paired by seed.

    A setting is a kind of label and a budget, of a method, student and run where there are several; at equal epochs and
    at equal optimiser steps. accuracy: of the whole set, in %; deviations are nan for one seed.
    """

    dataset: str
    setting: Annotated[np.ndarray, str, "setting"]
    seeds: Annotated[np.ndarray, int, "setting"]
    accuracy: Annotated[np.ndarray, float, "setting"]
    at_epochs: Annotated[np.ndarray, float, "setting"]
    at_epochs_deviation: Annotated[np.ndarray, float, "setting"]
    at_steps: Annotated[np.ndarray, float, "setting"]
    at_steps_deviation: Annotated[np.ndarray, float, "setting"]


# -- of features ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Duplication(Arrays):
    """Mean cosine similarity of two views of a class by budget (Figure 4, left); `real`: of two real images."""

    dataset: str
    teacher: str  # whose penultimate features
    real: float
    real_per_class: int  # images that this is measured on
    method: Annotated[np.ndarray, str, "point"]
    ipc: Annotated[np.ndarray, int, "point"]
    similarity: Annotated[np.ndarray, float, "point"]


@dataclass(frozen=True, eq=False)
class Boundaries(Arrays):
    """Test images of a few classes in a plane for each student, and the class it predicts there (Figure 2, right).

    x and y: t-SNE of the student's penultimate features, within [0, 1]. true and predicted: index along `name`, the
    prediction among these classes alone. region: the class that most of the nearest `neighbours` images are predicted
    as, on a grid of `down` (y) and `across` (x). accuracy: share of predictions that are right.
    """

    dataset: str
    student: str
    labels: str
    neighbours: int
    set: Annotated[np.ndarray, str, "set"]
    steps: Annotated[np.ndarray, int, "set"]
    accuracy: Annotated[np.ndarray, float, "set"]
    name: Annotated[np.ndarray, str, "name"]
    true: Annotated[np.ndarray, int, "image"]
    x: Annotated[np.ndarray, float, "set", "image"]
    y: Annotated[np.ndarray, float, "set", "image"]
    predicted: Annotated[np.ndarray, int, "set", "image"]
    down: Annotated[np.ndarray, float, "down"]
    across: Annotated[np.ndarray, float, "across"]
    region: Annotated[np.ndarray, int, "set", "down", "across"]


# -- of students ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Landscape(Arrays):
    """Students' cross-entropy around test images (Figure 5), mean over `images` of them, in nats.

    first and second: the way from an image towards images of two other classes, 0 at the image itself, 1 at the other.
    """

    dataset: str
    student: str
    labels: str
    images: int
    set: Annotated[np.ndarray, str, "set"]
    steps: Annotated[np.ndarray, int, "set"]
    first: Annotated[np.ndarray, float, "first"]
    second: Annotated[np.ndarray, float, "second"]
    loss: Annotated[np.ndarray, float, "set", "first", "second"]


@dataclass(frozen=True, eq=False)
class Difficulty(Arrays):
    """Right predictions on the test split by difficulty (Figure 8).

    Difficulty is the cross-entropy of `reference`, in nats: images in intervals of equal counts, from `low` to `high`.
    """

    dataset: str
    student: str
    labels: str
    reference: str
    set: Annotated[np.ndarray, str, "set"]
    steps: Annotated[np.ndarray, int, "set"]
    seed: Annotated[np.ndarray, int, "seed"]
    low: Annotated[np.ndarray, float, "interval"]
    high: Annotated[np.ndarray, float, "interval"]
    count: Annotated[np.ndarray, int, "interval"]
    right: Annotated[np.ndarray, int, "set", "seed", "interval"]


@dataclass(frozen=True, eq=False)
class Calibration(Arrays):
    """Students' confidence and accuracy on the test split, as shares, by intervals of confidence of equal width.

    error: the expected calibration error, the intervals' mean gap weighted by `count`; nan where no image is.
    """

    dataset: str
    student: str
    labels: str
    set: Annotated[np.ndarray, str, "set"]
    steps: Annotated[np.ndarray, int, "set"]
    seed: Annotated[np.ndarray, int, "seed"]
    error: Annotated[np.ndarray, float, "set", "seed"]
    confidence: Annotated[np.ndarray, float, "set", "seed", "interval"]
    accuracy: Annotated[np.ndarray, float, "set", "seed", "interval"]
    count: Annotated[np.ndarray, int, "set", "seed", "interval"]


@dataclass(frozen=True, eq=False)
class ClassAccuracy(Arrays):
    """Students' top-1 of each class on the test split, as shares."""

    dataset: str
    student: str
    labels: str
    set: Annotated[np.ndarray, str, "set"]
    steps: Annotated[np.ndarray, int, "set"]
    seed: Annotated[np.ndarray, int, "seed"]
    name: Annotated[np.ndarray, str, "name"]
    accuracy: Annotated[np.ndarray, float, "set", "seed", "name"]


@dataclass(frozen=True, eq=False)
class LabelDivergence(Arrays):
    """KL(dynamic label || static label) in nats, of augmented, mixed images as a student sees them (Figure 9).

    By percentile of the images, at temperatures 1 and that of the students.
    """

    dataset: str
    images: int
    set: Annotated[np.ndarray, str, "set"]
    temperature: Annotated[np.ndarray, float, "temperature"]
    mean: Annotated[np.ndarray, float, "set", "temperature"]
    percent: Annotated[np.ndarray, float, "percent"]
    divergence: Annotated[np.ndarray, float, "set", "temperature", "percent"]


# -- of compensators -----------------------------------------------------------------------------------------------


def spell_pixels(pictures: np.ndarray) -> np.ndarray:
    """Return uint8 [..., 3, height, width] as texts [..., height], a pixel six hexadecimal digits."""
    rows = np.moveaxis(pictures, -3, -1)  # [..., height, width, 3]
    texts = [row.tobytes().hex() for row in np.ascontiguousarray(rows).reshape(-1, *rows.shape[-2:])]
    return np.array(texts).reshape(rows.shape[:-2])


def read_pixels(texts: np.ndarray) -> np.ndarray:
    """Return uint8 [..., height, width, 3] of what `spell_pixels` wrote."""
    rows = [np.frombuffer(bytes.fromhex(text), np.uint8).reshape(-1, 3) for text in texts.ravel().tolist()]
    return np.stack(rows).reshape(*texts.shape, -1, 3)


@dataclass(frozen=True, eq=False)
class Compensators(Arrays):
    """Compensators as pictures (Figures 6 and 7).

    Each is stretched around mid-gray, which is nothing, so that its `largest` value (in [0, 1] pixel units) is black or
    white. pixels: six hexadecimal digits for each pixel of a row (red, green, blue), as `spell_pixels` writes them.
    """

    dataset: str
    teacher: Annotated[np.ndarray, str, "teacher"]
    slot: Annotated[np.ndarray, int, "slot"]
    largest: Annotated[np.ndarray, float, "teacher", "slot"]
    pixels: Annotated[np.ndarray, str, "teacher", "slot", "row"]


@dataclass(frozen=True, eq=False)
class Views(Arrays):
    """Naturals of one slot, its compensators, and their views (Figure 3), pixels as `Compensators` has them.

    The first line holds the compensators, and its first picture nothing; then a class a line: the natural and its view
    by each teacher.
    """

    dataset: str
    slot: int
    line: Annotated[np.ndarray, str, "line"]
    picture: Annotated[np.ndarray, str, "picture"]
    largest: Annotated[np.ndarray, float, "picture"]
    pixels: Annotated[np.ndarray, str, "line", "picture", "row"]


@dataclass(frozen=True, eq=False)
class Losses(Arrays):
    """Label loss and weighted statistics loss while compensators are optimised, before each step."""

    dataset: str
    statistics_weight: float
    teacher: Annotated[np.ndarray, str, "teacher"]
    slot: Annotated[np.ndarray, int, "slot"]
    step: Annotated[np.ndarray, int, "step"]
    label: Annotated[np.ndarray, float, "teacher", "slot", "step"]
    statistics: Annotated[np.ndarray, float, "teacher", "slot", "step"]


@dataclass(frozen=True, eq=False)
class Layers(Arrays):
    """Each BatchNorm's part of the statistics loss, weighted as in it: of the naturals, and with their compensator.

    A layer is one of a teacher; its number counts the teacher's BatchNorms in the order they run.
    """

    dataset: str
    teacher: Annotated[np.ndarray, str, "layer"]
    number: Annotated[np.ndarray, int, "layer"]
    slot: Annotated[np.ndarray, int, "slot"]
    before: Annotated[np.ndarray, float, "layer", "slot"]
    after: Annotated[np.ndarray, float, "layer", "slot"]
