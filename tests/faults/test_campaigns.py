"""Small fault and fuzz campaigns; the whole ones are campaign.py and fuzz.py, run as commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # minutes: each starts a process of its own, which everything forks from


@pytest.mark.parametrize("words", [["campaign.py", "--trials", "8"], ["fuzz.py", "--inputs", "10"]])
def test_a_small_campaign_finds_no_wrong_set_and_no_crash(words: list[str]) -> None:
    script, *options = words
    told = subprocess.run(
        [sys.executable, str(Path(__file__).parent / script), *options], capture_output=True, text=True
    )
    assert told.returncode == 0, told.stdout[-3000:] + told.stderr[-3000:]
