"""Watching: what a run says of itself while it goes on, and that looking does not change it."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished

from stillroom import cli, watch
from stillroom.run import ASKING_SECONDS, Run, is_held
from stillroom.watch import Tail, read_progress
from stillroom.workers import Worker


@pytest.fixture
def run(finished: Finished, tmp_path: Path) -> Path:
    """A copy of the finished run, whose lock names no living process."""
    folder = tmp_path / "run"
    shutil.copytree(finished.directory, folder)
    (folder / ".lock").write_text("")
    return folder


def say(run: Path, kind: str, **fields: Any) -> None:
    with open(run / "events.jsonl", "a") as events:
        events.write(json.dumps({"time": 9e9, "event": kind, **fields}) + "\n")


def look(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["watch", str(run), "--once"]) == 0
    return capsys.readouterr().out


def test_a_finished_run_shows_its_stages_and_every_result(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    said = look(run, capsys)
    assert said.startswith(f"{run}: ended, results.json is there\n")
    assert "teachers: 1 of 1: toynet " in said
    assert "distilled set: done" in said
    students = len(list(run.glob("units/student-*")))
    assert f"students: {students} trained of {students}\n" in said
    for cell in json.loads((run / "results.json").read_text())["cells"]:
        spelt = f"{cell['set']}, {cell['labels']}, {cell['budget']}: {cell['mean']:.1f} ± {cell['std']:.1f} %"
        assert spelt in said
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_rows_of_a_comparison_are_counted_among_those_that_it_is_to_have(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"method": "infer", "labels": "hard", "student": "net", "mean": 1.0, "std": None, "top1": [1.0]}
    say(run, "row", ipc=1, **row)  # of a table before
    say(run, "planned", rows=3)
    assert "rows: 0 of 3" in look(run, capsys)
    for ipc in (2, 2, 3):
        say(run, "row", ipc=ipc, **row)
    assert "rows: 2 of 3" in look(run, capsys)


def test_a_run_is_running_while_its_process_holds_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = Run(run)
    say(run, "epoch", unit="student-x-hard-9-net-0", epoch=3, loss=0.25)
    said = look(run, capsys)
    assert f"{run}: running (process {os.getpid()})" in said
    assert "now: student-x-hard-9-net-0: epoch 3, loss 0.25" in said
    say(run, "unit_finished", unit="student-x-hard-9-net-0")
    assert "now:" not in look(run, capsys)
    held.close()
    assert ": running (" not in look(run, capsys)
    assert (run / ".lock").read_text() == ""


def test_a_run_that_several_share_is_running_until_the_last_one_leaves(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = Run(run, worker="one"), Run(run, worker="two")
    second.close()
    assert ": running (another process)" in look(run, capsys)
    first.close()
    assert ": running (" not in look(run, capsys)


def test_another_process_with_the_number_of_one_that_was_killed_is_not_the_run(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / ".lock").write_text(str(os.getpid()))
    assert look(run, capsys).startswith(f"{run}: ended, results.json is there")


def test_who_asks_whether_a_run_is_held_does_not_keep_another_from_it(run: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    asking = open(run / ".lock", "rb")  # noqa: SIM115 - let go of by a thread
    fcntl.flock(asking, fcntl.LOCK_EX)
    threading.Timer(ASKING_SECONDS / 4, asking.close).start()
    with Run(run):
        assert is_held(run)
    assert not is_held(run)


def test_it_says_why_a_run_is_not_finished(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "results.json").unlink()
    assert "it has a distilled set and no results" in look(run, capsys)
    shutil.rmtree(run / "distilled")
    assert "it is not finished; the same command goes on" in look(run, capsys)
    say(run, "stopped", reason="time limit")
    assert "stopped (time limit); the same command goes on" in look(run, capsys)


def test_workers_say_what_they_are_at_and_dead_ones_do_not(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worker = Worker(run, "one")
    worker.report("student 3", 40, 100, 2.0, "loss 0.5")
    report = json.loads((run / "workers/one.json").read_text())
    dead = report | {"process": report["process"].rpartition("-")[0] + "-99999999999"}
    (run / "workers/dead.json").write_text(json.dumps(dead))
    (run / "workers/broken.json").write_text("{")
    (run / "workers/far.json").write_text(json.dumps(report | {"process": "elsewhere-1"}))
    (run / "workers/old.json").write_text(json.dumps(report | {"process": "elsewhere-2"}))
    os.utime(run / "workers/old.json", (1e9, 1e9))
    said = look(run, capsys)
    assert "running (2 workers)" in said
    assert "now: one: student 3 40 of 100 loss 0.5" in said
    assert "now: far:" in said
    worker.close()


def test_it_follows_a_run_until_this_ends(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Run(run)
    turns = []

    def sleep(seconds: float) -> None:
        turns.append(seconds)
        say(run, "unit_finished", unit=f"unit-{len(turns)}")
        say(run, "epoch", unit="student-1", epoch=1, loss=1.0)
        if len(turns) == 3:
            held.close()

    monkeypatch.setattr(watch.time, "sleep", sleep)
    assert cli.main(["watch", str(run), "--every", "0.5"]) == 0
    said = capsys.readouterr().out
    assert turns == [0.5, 0.5, 0.5]
    for turn in (1, 2, 3):
        assert said.count(f"finished unit-{turn}\n") == 1
    assert said.endswith("ended, results.json is there\n")


def test_on_a_terminal_it_shows_the_same(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Run(run)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: held.close())
    assert cli.main(["watch", str(run)]) == 0
    said = re.sub(r"\x1b\[[\d;?]*\w", "", capsys.readouterr().out)
    assert f"{run}: running (process {os.getpid()})" in said
    assert "random, hard, equal epochs (static)" in said
    assert f"{run}: ended, results.json is there" in said


def test_a_line_that_is_half_written_is_read_when_it_is_whole(run: Path) -> None:
    tail = Tail(run)
    assert len(tail.look()) > 20
    with open(run / "events.jsonl", "a") as events:
        events.write('{"time": 5, "event": ')
        events.flush()
        assert tail.look() == []
        events.write('"notice", "message": "here"}\nno event\n{"time": 1e300, "event": "notice"}\n')
    assert [event["message"] for event in tail.look()] == ["here"]
    assert tail.look() == []


def test_a_comparison_shows_its_sets_and_rows(compared: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    said = look(compared.directory, capsys)
    assert "sets: 6 of 6 begun" in said
    for row in json.loads((compared.directory / "comparison.json").read_text())["rows"]:
        spelt = f"{row['mean']:.1f} ± {row['std']:.1f} %"
        assert f"\n{row['method']}, static, toynet, ipc {row['ipc']}: {spelt}" in said


def test_a_terminal_is_not_given_what_it_would_obey(run: Path) -> None:
    evil = "\x1b[2J\x07\r\n"
    tail = Tail(run)
    old = tail.look()
    events = [
        {"time": 1, "event": "notice", "message": evil},
        {"time": 2, "event": "cell", "set": evil, "labels": "hard", "top1": [1.0]},
        {"time": 3, "event": "row", "method": "infer", "error": evil},
        {"time": 4, "event": "teacher", "name": evil, "accuracy": {"top1": 0.5}},
        {"time": time.time(), "event": "stopped", "reason": evil},
    ]
    said = watch.draw_text(read_progress(run, [*old, *events]))
    assert "\x1b" not in said
    assert "\r" not in said
    assert said.count("\N{REPLACEMENT CHARACTER}[2J") >= 4


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["nowhere"], 1, "nowhere holds no config.json, so it is no run"),
        (["nowhere", "--every", "0"], 2, "--every is 0; give seconds"),
        (["nowhere", "--every", "nan"], 2, "--every is nan; give seconds"),
    ],
)
def test_wrong_words_are_refused(words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["watch", *words]) == code
    assert message in capsys.readouterr().err
