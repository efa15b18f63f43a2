"""Settings: durations as people write them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.errors import StillroomError
from stillroom.settings import parse_duration


@given(st.integers(0, 99), st.integers(0, 59), st.integers(0, 59))
def test_durations_are_read_as_people_write_them(hours: int, minutes: int, seconds: int) -> None:
    expected = 3600 * hours + 60 * minutes + seconds
    assert parse_duration(f"{hours}h{minutes}m{seconds}s") == expected
    assert parse_duration(f"{hours}h{minutes}m{seconds}") == expected
    assert parse_duration(f"{hours}h") == 3600 * hours
    assert parse_duration(f" {minutes}m ") == 60 * minutes
    assert parse_duration(f"{minutes}.5m") == 60 * minutes + 30
    assert parse_duration(f"{seconds}") == parse_duration(f"{seconds}s") == seconds


@given(st.text(max_size=6))
def test_other_durations_are_refused_in_words(text: str) -> None:
    if re.fullmatch(r"\s*(\d+h)?(\d+m)?(\d+s?)?\s*", text) and text.strip():
        assert (parse_duration(text) or 0) >= 0
    elif "." not in text:
        with pytest.raises(StillroomError, match="give a time such as 90s"):
            parse_duration(text)
    assert parse_duration(None) is None
