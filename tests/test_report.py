"""The report: one page that is whole, true to the files it was made of, and safe whatever names stand in these."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import Finished, build_toy_teacher

from stillroom import cli
from stillroom.arrays import Arrays, columns_of
from stillroom.claims import spell_grain
from stillroom.compute import Plan
from stillroom.distilled import load_distilled
from stillroom.errors import StillroomError
from stillroom.events import read_events, trainings_of
from stillroom.gallery import FIGURES
from stillroom.labels import PoolConfig, attach_labels
from stillroom.manifest import Manifest
from stillroom.page import element, escape, round_ticks, table
from stillroom.recipes import RECIPES, Recipe
from stillroom.report import Opened, build_report, open_run
from stillroom.report_command import CHEAP, draw_figure
from stillroom.run import Run
from stillroom.study import Study, StudyConfig, find_sets
from stillroom.watch import read_progress

RESULTS = Path(__file__).parents[1] / "docs" / "results"
VOID = {"meta", "img", "source", "br", "line", "circle", "polyline", "rect"}
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;\x00\x1b\ud800$\\frac$"
EVIL_SHORT = "<script>&\x00\x1b\ud800$\\frac$"  # as much as fits beside a picture


class Page(HTMLParser):
    """A page read strictly: every element that is opened is closed, and what is asked of all of them holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.inside.setdefault(tag, []).append(data)

    def text(self, tag: str = "body") -> str:
        return " ".join(" ".join(self.inside.get(tag, [])).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def check(text: str) -> Page:
    """Read a page; assert that it asks nobody for anything, that links and labels lead somewhere, images are told."""
    page = Page(text)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name != "style"
            if name in ("src", "srcset"):
                assert value is not None
                assert value.startswith("data:image/")
            if name == "href":
                assert value is not None
                assert value[:1] == "#"
                assert value[1:] in ids
            if name == "aria-labelledby":
                assert value in ids
        if tag == "img":
            assert attributes.get("alt")
        if tag == "svg":
            assert attributes.get("aria-hidden") == "true" or attributes.get("aria-label") or "viewbox" in attributes
    (policy,) = (m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; ")
    for tag in ("style", "script"):
        assert len(page.all(tag)) == 1
        digest = hashlib.sha256("".join(page.inside[tag]).encode()).digest()
        assert f"{tag}-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    return page


def write(words: list[str], out: Path) -> Page:
    assert cli.main(["report", *words, "--out", str(out)]) == 0
    return check(out.read_text("utf-8"))


def copy(finished: Finished, folder: Path) -> Path:
    shutil.copytree(finished.directory, folder)
    return folder


def test_a_runs_page_says_what_its_files_say(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = write([str(finished.directory)], tmp_path / "page.html")
    assert capsys.readouterr().out == f"report: {tmp_path / 'page.html'}\n"
    results = json.loads((finished.directory / "results.json").read_text())
    manifest = json.loads((finished.directory / "distilled/manifest.json").read_text())
    said = page.text()
    for part in results["bytes"]["raw"].values():
        assert f"{part:,}" in said
    for cell in results["cells"]:
        assert f"{sum(cell['top1']) / 2:.1f} ± {cell['std']:.1f}" in said
        assert cell["budget"] in said
    for fact in (
        results["provenance"]["commit"] or "an installed package",
        results["provenance"]["command"],
        f"torch {results['provenance']['libraries']['torch']}",
        f"{manifest['teachers'][0]['name']}: {manifest['teachers'][0]['accuracy']:.1f} %",
        manifest["teachers"][0]["hash"][:12],
        "seeds of students 0, 1",
        f"load_distilled('{finished.directory / 'distilled'}')",
        "learning_rate: 0.01",
        "2 seeds",
    ):
        assert fact in said, fact
    assert len(page.all("img")) >= 4
    assert sum("aria-label" in svg for svg in page.all("svg")) == 15  # curves: a teacher, and fourteen cells


def test_a_comparisons_page_has_every_cell_and_sheet(compared: Finished, tmp_path: Path) -> None:
    page = write([str(compared.directory)], tmp_path / "page.html")
    results, said = json.loads((compared.directory / "comparison.json").read_text()), page.text()
    for row in results["rows"]:
        assert f"{row['mean']:.1f} ± {row['std']:.1f}" in said
        assert f"{sum(row['bytes']['raw'].values()) / row['bytes']['real_raw_bytes']:.2%}".replace("%", " %") in said
    sheets = [image["alt"] for image in page.all("img") if (image["alt"] or "").startswith("Contact sheet")]
    assert len(sheets) == 6  # three methods at two budgets
    assert "to bottom red, green, blue sky and süd/ost" in str(sheets[0])


def test_several_runs_stand_beside_each_other_on_one_scale(
    finished: Finished, compared: Finished, tmp_path: Path
) -> None:
    page = write([str(finished.directory), str(compared.directory), "--no-pictures"], tmp_path / "page.html")
    said = page.text()
    assert "Beside each other" in said
    assert len(set(re.findall(r"from (\d+) to (\d+)[.;]", said))) == 1
    rows = len(json.loads((compared.directory / "comparison.json").read_text())["rows"])
    assert len(page.all("tr")) > 2 + rows


def test_the_same_files_give_the_same_page(finished: Finished, tmp_path: Path) -> None:
    for name in ("one.html", "two.html"):
        write([str(finished.directory)], tmp_path / name)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def poison(value: Any) -> Any:
    """Every text in a result made hostile, but for the words that the page's own logic goes by."""
    if isinstance(value, dict):
        own = {"labels", "budget", "differences", "kind"}
        return {key: each if key in own else poison(each) for key, each in value.items()}
    if isinstance(value, list):
        return [poison(each) for each in value]
    return value + EVIL if isinstance(value, str) else value


def poison_arrays(arrays: Arrays) -> Arrays:
    """Every text that a figure shows made hostile, but for pixels."""
    changes: dict[str, Any] = {}
    for name, (kind, axes) in columns_of(type(arrays)).items():
        if kind is str and name != "pixels":
            value = getattr(arrays, name)
            changes[name] = np.array([text + EVIL_SHORT for text in value.tolist()]) if axes else value + EVIL_SHORT
    return replace(arrays, **changes)


@pytest.mark.parametrize("name", ["results.json", "comparison.json"])
def test_hostile_names_are_shown_and_never_run(finished: Finished, compared: Finished, name: str) -> None:
    run = open_run((finished if name == "results.json" else compared).directory)
    assert run.results is not None

    def named(manifest: Manifest) -> Manifest:
        names = tuple(name + EVIL for name in manifest.class_names)
        return replace(manifest, class_names=names, method=EVIL, dataset=replace(manifest.dataset, name=EVIL))

    evil = Opened(
        Path(f"/{EVIL}"),
        poison(run.settings),
        poison(run.results),
        {f"{name}{EVIL}": (folder, named(manifest)) for name, (folder, manifest) in run.sets.items()},
        tuple(poison(event) | {"event": event["event"]} for event in run.events),
    )
    drawn = {}
    study = Study([run.directory], StudyConfig(), Run(None))
    for figure in CHEAP:
        with contextlib.suppress(StillroomError):  # a run is no comparison
            drawn[figure] = draw_figure(figure, poison_arrays(FIGURES[figure].compute(study)), evil.directory)
    assert len(drawn) == len(CHEAP) - (name == "results.json")
    for each in drawn.values():
        if each.kind == "svg+xml":
            assert not list(ElementTree.fromstring(each.light).iter("{http://www.w3.org/2000/svg}script"))
    page = check(build_report([evil, evil], {evil.directory: drawn}, [EVIL]).encode("utf-8", "replace").decode())
    assert page.text().count("<script>alert(1)</script>") > 50
    assert "alert" not in page.text("script")


def test_a_run_that_is_not_finished_claims_nothing(finished: Finished, tmp_path: Path) -> None:
    run = copy(finished, tmp_path / "run")
    (run / "results.json").unlink()
    said = write([str(run)], tmp_path / "page.html").text()
    assert f"Not finished: {run} has 14 finished cells yet, and nothing is claimed" in said
    assert "Cells that are finished so far." in said
    assert "students to" not in said
    shutil.rmtree(run / "distilled")
    (run / "events.jsonl").write_text('{"event": "epoch", "time": 1}\n{"half": \n[]\n{"event": "cell", "time": NaN}')
    said = write([str(run)], tmp_path / "page.html").text()
    assert "infer that has no set yet" in said
    assert "has no results yet" in said


def test_one_set_by_two_kinds_of_label_is_one_method_of_the_title(compared: Finished) -> None:
    run = open_run(compared.directory)
    assert run.results is not None
    assert run.title == "3 methods on toy"
    rows = [row | {"method": f"{row['method']}, its own labels"} for row in run.results["rows"]]
    both = replace(run, results=run.results | {"rows": [*run.results["rows"], *rows]})
    assert both.title == "3 methods on toy"


def test_a_stopped_comparison_and_failed_cells_are_said(compared: Finished, tmp_path: Path) -> None:
    run = copy(compared, tmp_path / "run")
    results = json.loads((run / "comparison.json").read_text())
    results["rows"][0] = {key: results["rows"][0][key] for key in ("method", "ipc", "matched_ipc", "labels", "student")}
    results["rows"][0] |= {"protocol": "", "error": "out of <memory>"}
    (run / "comparison.json").write_text(json.dumps(results))
    with open(run / "events.jsonl", "a") as events:
        events.write('{"event": "stopped", "time": 9e9, "reason": "time limit"}\n')
    said = write([str(run), "--no-pictures"], tmp_path / "page.html").text()
    assert "failed: random, ipc 3, static, toynet: out of <memory>" in said
    assert "It was stopped before its end" in said


def test_an_evaluations_students_have_a_page(finished: Finished, tmp_path: Path) -> None:
    run = tmp_path / "students"
    run.mkdir()
    (run / "config.json").write_text('{"settings": {"labels": "static"}, "plan": {}}')
    found = {"network": "convnet", "labels": "static", "steps": 300, "top1": [0.5, 0.625], "top5": [0.75, 1.0]}
    (run / "results.json").write_text(json.dumps({"evaluation": found, "protocol": "own", "provenance": {}}))
    said = write([str(run)], tmp_path / "page.html").text()
    assert "no control stands beside it" in said
    assert "62.50" in said


def test_an_evaluations_page_says_which_set_it_is_of_and_how_to_load_it(
    finished: Finished, toynet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLROOM_CACHE", str(finished.directory.parent / "cache"))
    words = ["evaluate", str(finished.directory), "--data.source", finished.recipe.data.source, "--seeds", "0", "1"]
    assert cli.main([*words, "--out", str(tmp_path / "students")]) == 0
    results = json.loads((tmp_path / "students" / "results.json").read_text())
    distilled = load_distilled(finished.directory / "distilled")
    assert results["set"]["fingerprint"] == distilled.fingerprint
    assert results["bytes"] == json.loads((finished.directory / "results.json").read_text())["bytes"]
    said = write([str(tmp_path / "students")], tmp_path / "page.html").text()
    for part in (
        "infer on toy, 4 images per class: students by static labels",
        f"4 images per class, in {finished.directory}: toynet students reach",
        f"The set takes {sum(results['bytes']['raw'].values()):,} bytes raw",
        f"load_distilled('{finished.directory / 'distilled'}')",
        "Bytes of the set.",
    ):
        assert part in said, part
    results["set"]["folder"] = str(tmp_path / "gone")
    (tmp_path / "students" / "results.json").write_text(json.dumps(results))
    assert "load_distilled" not in write([str(tmp_path / "students")], tmp_path / "page.html").text()


def test_runs_of_one_title_are_told_apart(finished: Finished) -> None:
    run = open_run(finished.directory)
    other = run.settings | {"infer": run.settings["infer"] | {"steps": 9}}
    steps = replace(run, directory=Path("/other"), settings=other)
    titles = check(build_report([run, steps], {})).text("h3")
    assert "infer on toy, 4 images per class: infer.steps 4" in titles
    assert "infer on toy, 4 images per class: infer.steps 9" in titles
    again = replace(run, directory=Path("/other"))
    titles = check(build_report([run, again], {})).text("h3")
    assert f"infer on toy, 4 images per class: {finished.directory}" in titles
    assert "infer on toy, 4 images per class: /other" in titles


@pytest.mark.parametrize(
    "name",
    [
        "ablations-laptop-cifar100-ipc10",
        "compare-laptop-cifar100-ipc10",
        "laptop-cifar100-ipc10",
        "laptop-tiny-imagenet-ipc10",
    ],
)
def test_published_results_can_be_reported(name: str) -> None:
    results = json.loads((RESULTS / f"{name}.json").read_text())
    run = Opened(Path("run"), results["settings"], results, {}, ())
    said = check(build_report([run], {})).text()
    for row in results.get("rows", results.get("cells")):
        assert f"{row['mean']:.1f} ± {row['std']:.1f}" in said


@pytest.mark.parametrize("kind", ["hard", "static", "replayed", "dynamic", "learned"])
def test_what_page_and_card_say_of_loading_works_for_every_kind_of_label(
    finished: Finished, tmp_path: Path, plan: Plan, toy_recipe: Recipe, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    static = load_distilled(finished.directory / "distilled")
    logits = static.soft_labels if kind in ("static", "learned") else None
    if kind == "replayed":
        train, by = toy_recipe.student.train, [build_toy_teacher()]
        distilled = attach_labels(static, "replayed", by, plan, Run(), pool=PoolConfig(1), train=train)
    else:
        distilled = static.with_labels(logits, kind)
    manifest = distilled.save(tmp_path / "set")
    run = replace(open_run(finished.directory), sets={"set": (tmp_path / "set", manifest)})
    page = Page(build_report([run], {}))
    shown = next(text for text in page.inside["code"] if "load_distilled" in text)
    card = (tmp_path / "set" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "set")
    for text in (shown, card):
        held: dict[str, Any] = {}
        exec(text, held)
        labels = next(held[name] for name in ("soft_labels", "soft_label", "one_hot") if name in held)
        assert labels.shape[1] == 4
        torch.testing.assert_close(labels.sum(1), torch.ones(len(labels)))


DAMAGES = {
    "config.json": (
        lambda path: path.write_text(path.read_text().replace("1", "2", 1)),
        "so nothing says of which settings",
    ),
    "results.json": (lambda path: path.write_text('{"cells": [{}]}'), "are not such as stillroom writes"),
    "distilled/manifest.json": (lambda path: path.write_text("{"), "manifest.json"),
    "distilled/contact_sheet.png": (lambda path: path.write_bytes(b"no picture" * 20_000), "is no picture"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_are_refused_by_name(
    finished: Finished, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(finished, tmp_path / "run")
    damage, said = DAMAGES[name]
    damage(run / name)
    assert cli.main(["report", str(run)]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert str(run) in error
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("key", ["dataset", "cells", "seeds", "teachers", "student", "ipc", "paper", "protocol"])
@pytest.mark.parametrize("value", [None, "text", -1, [[]]])
def test_results_with_something_else_in_a_place_are_refused_or_shown(finished: Finished, key: str, value: Any) -> None:
    run = open_run(finished.directory)
    results = {**(run.results or {}), key: value}
    try:
        check(build_report([replace(run, results=results)], {}))
    except StillroomError as error:
        assert "not such as stillroom writes" in str(error)  # noqa: PT017 - or it is a page


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "name a run: stillroom report runs/demo"),
        (["here", "here"], 2, "names a run twice"),
        (["here", "--out", "page.pdf"], 2, "--out page.pdf is no page"),
        (["nowhere"], 1, "nowhere holds no config.json, so it is no run"),
    ],
)
def test_wrong_words_are_refused(words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", *words]) == code
    assert message in capsys.readouterr().err


def test_who_reads_runs_refuses_what_is_none_in_the_same_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for read in (open_run, find_sets, lambda folder: read_progress(folder, [])):
        with pytest.raises(StillroomError, match=r"holds no config\.json, so it is no run; give the directory of one"):
            read(tmp_path)
    assert cli.main(["figure", "accuracy", str(tmp_path)]) == 1
    assert "holds no config.json, so it is no run; give the directory of one" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_page_says_how_to_get_the_figures(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = write([str(finished.directory)], tmp_path / "page.html")
    assert "pip install matplotlib" in page.text()
    assert len(page.all("img")) == 1  # the contact sheet


def test_the_demo_ends_by_writing_its_report(
    finished: Finished, tmp_path: Path, toynet: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(RECIPES, "digits", replace(finished.recipe, labels=("static",), seeds=(0,)))
    monkeypatch.setenv("STILLROOM_CACHE", str(finished.directory.parent / "cache"))
    assert cli.main(["demo", "--out", str(tmp_path / "demo")]) == 0
    assert f"report: {tmp_path / 'demo' / 'report.html'} (open it in a browser)" in capsys.readouterr().out
    assert "one seed, spread unknown" in check((tmp_path / "demo" / "report.html").read_text()).text()


def test_columns_of_numbers_sort_as_numbers() -> None:
    rows = [["a", "10 (as bytes: 8)", "+1.5 ± 0.1", "hard"], ["b", "1,200", "-", "3 kinds"], ["c", "-", "-0.5", "soft"]]
    page = Page(table(["name", "ipc", "vs", "labels"], rows, "caption", place="here"))
    values = [cell.get("data-value") for cell in page.all("td")]
    assert values == ["10", "1.5", None, "1200", None, None, None, "-0.5", None]


def test_text_is_escaped_unless_it_is_html() -> None:
    assert element("p", "a < b", element("b", "&"), title='"') == '<p title="&quot;">a &lt; b<b>&amp;</b></p>'
    assert escape("\x00\n\ud800") == "\N{REPLACEMENT CHARACTER}\n\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(("low", "high", "ticks"), [(75, 100, [75, 80, 85, 90, 95, 100]), (0, 2, [0, 0.5, 1, 1.5, 2])])
def test_ticks_are_round(low: float, high: float, ticks: list[float]) -> None:
    assert round_ticks(low, high) == ticks


def test_a_set_that_is_not_whole_is_told_on_the_page_and_on_standard_error(
    finished: Finished, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished.directory, tmp_path / "run"))
    (images,) = (run / "distilled").glob("images-*")
    damaged = bytearray(images.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    images.write_bytes(damaged)
    assert cli.main(["report", str(run)]) == 0
    told = "the set run is not whole, and cannot be loaded: "
    assert told in capsys.readouterr().err
    assert told in (run / "report.html").read_text()
    assert cli.main(["report", str(finished.directory), "--out", str(tmp_path / "whole.html")]) == 0
    assert "not whole" not in capsys.readouterr().err + (tmp_path / "whole.html").read_text()


def test_how_coarse_a_small_test_split_is_stands_beside_the_claims(finished: Finished, tmp_path: Path) -> None:
    draws = np.random.default_rng(0).binomial(40, 0.5, 100_000) / 40  # of accuracies of one half
    assert f"± {100 * 1.96 * draws.std():.0f} points" in spell_grain(40)
    assert spell_grain(1000) == ""
    said = spell_grain(json.loads((finished.directory / "results.json").read_text())["dataset"]["test"])
    page = build_report([open_run(finished.directory)], {})
    assert f"{said[:1].upper()}{said[1:]}." in page
    assert said in finished.out


def test_rows_whose_students_reached_the_same_are_told_apart_by_their_units(finished: Finished, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished.directory, tmp_path / "run"))
    results = json.loads((run / "results.json").read_text())
    units = {training.family for training in trainings_of(read_events(run)) if training.unit.startswith("student-")}
    assert {cell["unit"] for cell in results["cells"]} == units
    for cell in results["cells"]:
        cell["top1"] = [25.0] * len(cell["top1"])
    (run / "results.json").write_text(json.dumps(results))
    page = build_report([open_run(run)], {})
    for cell in results["cells"]:
        assert f"{cell['set']}, {cell['labels']} labels, {cell['steps']:,} steps" in page
