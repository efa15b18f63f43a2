"""Tables: what the command line prints of results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Finished, build_toy_teacher

from stillroom.data import RealData
from stillroom.distilled import load_distilled
from stillroom.students import Evaluation, StudentConfig
from stillroom.tables import show_budget, show_evaluation, show_results, show_teachers


def columns(out: str, *names: str) -> list[tuple[str, ...]]:
    """The cells under these names, row by row, of the one table in `out`."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    (head,) = (line for line in out.splitlines() if line.startswith("┃"))
    places = [[cell.strip() for cell in head.split("┃")[1:-1]].index(name) for name in names]
    return [tuple(row[place] for place in places) for row in rows]


def test_the_table_says_where_a_control_is_not_beaten(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    results = json.loads((finished.directory / "results.json").read_text())
    for own, control in ((50.0, 60.0), (60.0, 50.0)):
        for cell in results["cells"]:
            cell["mean"] = own if cell["budget"] == "own" else control
        show_results(results)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not beaten: ")]
        assert len(lines) == (12 if control > own else 0)


@pytest.mark.parametrize("classes", [5, 6])
@pytest.mark.parametrize("every_epochs", [0, 1])
def test_the_table_shows_top_5_and_best_only_where_they_say_something(
    finished: Finished, capsys: pytest.CaptureFixture[str], classes: int, every_epochs: int
) -> None:
    results = json.loads((finished.directory / "results.json").read_text())
    results["dataset"]["classes"] = classes
    results["settings"]["student"]["measure_every_epochs"] = every_epochs
    for cell in results["cells"]:
        cell |= {"top5": [99.0, 100.0], "best": [61.0, 62.5]}  # kept in any case; the table is another matter
    show_results(results)
    expected = ("99.5 ± 0.7" if classes > 5 else "-", "62.5" if every_epochs else "-")
    assert columns(capsys.readouterr().out, "top-5", "best") == [expected] * 14


@pytest.mark.parametrize("classes", [5, 6])
@pytest.mark.parametrize("every_epochs", [0, 1])
def test_evaluate_and_squeeze_leave_out_what_says_nothing_too(
    toy: RealData, capsys: pytest.CaptureFixture[str], classes: int, every_epochs: int
) -> None:
    real = replace(toy, class_names=tuple(map(str, range(classes))))
    result = Evaluation("toynet", "hard", 6, (0.5,), (0.75,), (0.625,), (1.0,), 0)
    show_evaluation(real.name, real.classes, StudentConfig(measure_every_epochs=every_epochs), result, "own")
    expected = ("50.0", "75.0" if classes > 5 else "-", "62.5" if every_epochs else "-")
    assert columns(capsys.readouterr().out, "top-1", "top-5", "best top-1") == [expected]
    show_teachers({"dataset": real.name, "classes": classes, "teachers": [build_toy_teacher().facts()]})
    assert columns(capsys.readouterr().out, "top-1", "top-5") == [("90.0 %", "100.0 %" if classes > 5 else "-")]


def test_names_with_brackets_and_colons_are_shown_as_they_are(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    results = json.loads((finished.directory / "results.json").read_text())
    results["dataset"]["name"] = "my [bold]:apple: photos"
    show_results(results)
    assert "my [bold]:apple: photos" in capsys.readouterr().out


def test_class_names_with_commas_are_told_apart_by_quotes(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distilled = load_distilled(finished.directory / "distilled")
    names = ("tench, Tinca tinca", "cock", "hen's egg, brown", "ostrich")
    quoted = """'tench, Tinca tinca', 'cock', "hen's egg, brown", 'ostrich'"""
    for own, expected in (
        (names, quoted),
        (("tench", "cock", "hen's egg", "ostrich"), "tench, cock, hen's egg, ostrich"),
    ):
        replace(distilled, manifest=replace(distilled.manifest, class_names=own)).save(tmp_path / "set")
        show_budget(tmp_path / "set")
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("classes: "))
        assert line == f"classes: {expected}"
