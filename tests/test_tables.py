"""Tables: what the command line prints of results."""

from __future__ import annotations

import json

import pytest
from conftest import Finished

from stillroom.tables import show_results


def test_the_table_says_where_a_control_is_not_beaten(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    results = json.loads((finished.directory / "results.json").read_text())
    for own, control in ((50.0, 60.0), (60.0, 50.0)):
        for cell in results["cells"]:
            cell["mean"] = own if cell["budget"] == "own" else control
        show_results(results)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not beaten: ")]
        assert len(lines) == (12 if control > own else 0)
