"""What figures show, as arrays and as CSV: the one is the other."""

from __future__ import annotations

import csv
import io
from typing import Any

import numpy as np
import pytest

from stillroom import arrays
from stillroom.arrays import Arrays, Landscape, columns_of, read_csv, read_pixels, spell_pixels, to_csv
from stillroom.errors import StillroomError

KINDS = [
    kind for kind in vars(arrays).values() if isinstance(kind, type) and issubclass(kind, Arrays) and kind != Arrays
]


def invent(kind: type[Arrays]) -> Arrays:
    """An object of the class with axes of 2, 3, ... places, awkward texts and numbers among its values."""
    generator = np.random.default_rng(3)
    sizes: dict[str, int] = {}
    values: dict[str, Any] = {}
    for name, (of, axes) in columns_of(kind).items():
        shape = tuple(sizes.setdefault(axis, 2 + len(sizes) % 3) for axis in axes)
        if of is str:
            texts = np.array(["süd/ost", 'a "b", c', "line\nbreak", "", " x "])
            found: Any = texts[np.arange(np.prod(shape, dtype=int)) % 5].reshape(shape)
        elif of is int:
            found = generator.integers(-5, 10**6, shape)
        else:
            found = generator.normal(size=shape) * 10.0 ** generator.integers(-9, 9, shape)
        if of is float and axes and name not in axes:
            found.ravel()[0] = np.nan
        values[name] = found if axes else of(found.item() if isinstance(found, np.ndarray) else found)
    return kind(**values)


def test_there_are_arrays_for_every_figure() -> None:
    assert len(KINDS) == 13


@pytest.mark.parametrize("kind", KINDS)
def test_a_csv_read_back_equals_the_arrays(kind: type[Arrays]) -> None:
    made = invent(kind)
    back = read_csv(to_csv(made), kind)
    for name in columns_of(kind):
        np.testing.assert_array_equal(getattr(back, name), getattr(made, name))
        assert type(getattr(back, name)) is type(getattr(made, name))


def test_a_block_has_a_row_for_every_place_by_what_stands_there() -> None:
    loss = np.arange(8.0).reshape(2, 2, 2)
    made = Landscape("toy", "net", "static", 3, ["real", "infer"], [0, 5], [-1, 1], [-0.5, 0.5], loss)  # type: ignore[arg-type]
    rows = list(csv.DictReader(io.StringIO(to_csv(made).split("\n\n")[-2])))
    assert len(rows) == 8
    assert rows[6] == {"set": "infer", "first": "1.0", "second": "-0.5", "loss": "6.0"}


def test_arrays_that_disagree_are_refused() -> None:
    loss = np.zeros((2, 2, 3))
    with pytest.raises(StillroomError, match=r"Landscape.loss has shape \[2, 2, 3\]"):
        Landscape("toy", "net", "static", 3, ["real", "infer"], [0, 5], [-1, 1], [-1, 1], loss)  # type: ignore[arg-type]


def test_a_csv_without_a_column_is_refused() -> None:
    text = to_csv(invent(Landscape)).replace("loss", "lost")
    with pytest.raises(StillroomError, match="lacks the column 'loss'"):
        read_csv(text, Landscape)


def test_pixels_are_spelt_and_read() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5), dtype=np.uint8)
    texts = spell_pixels(pictures)
    assert texts.shape == (2, 4)
    assert texts[1, 2][6:12] == bytes(pictures[1, :, 2, 1]).hex()
    np.testing.assert_array_equal(read_pixels(texts), np.moveaxis(pictures, 1, -1))
