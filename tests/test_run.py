"""A run directory: one configuration, one process, units that are done once, and a clean way to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from stillroom import files
from stillroom import run as run_module
from stillroom.errors import StillroomError, TimeLimitReached
from stillroom.events import seconds_within
from stillroom.run import Run, Task

PLAN = {"device": "cpu", "threads": 1, "processor": "abacus", "torch_version": "2", "seed_scheme": 1, "compile": "auto"}


def events(directory: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]


def test_another_configuration_is_refused_and_every_differing_field_shown(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        run.bind_config({"ipc": 10, "infer": {"steps": 5, "clip": True}, "seeds": (0, 1)}, PLAN)
        run.finish_unit("unit", {})
    with Run(tmp_path) as run, pytest.raises(StillroomError, match="holds another configuration") as refusal:
        run.bind_config({"ipc": 20, "infer": {"steps": 6, "clip": True}, "seeds": (0, 1), "new": 1}, PLAN)
    for line in ("ipc: 10 there, 20 now", "infer.steps: 5 there, 6 now", "new: None there, 1 now", "--out"):
        assert line in str(refusal.value)
    assert "clip" not in str(refusal.value)
    assert "seeds" not in str(refusal.value)


def test_a_run_in_which_no_unit_is_begun_takes_another_configuration(tmp_path: Path) -> None:
    """Or the advice to train a teacher longer, whose work lies in the cache, could not be followed there."""
    with Run(tmp_path) as run:
        run.bind_config({"epochs": 1}, PLAN)
    with Run(tmp_path) as run:
        run.bind_config({"epochs": 2}, PLAN)
        run.checkpoint("unit").save({}, {})
    with Run(tmp_path) as run, pytest.raises(StillroomError, match="epochs: 2 there, 3 now"):
        run.bind_config({"epochs": 3}, PLAN)


def test_the_stored_plan_is_used_again_and_what_cannot_be_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Run(tmp_path) as run:
        assert run.bind_config({"seeds": (0,)}, PLAN) == PLAN
    now = {**PLAN, "threads": 8, "processor": "slide rule"}
    with Run(tmp_path) as run:
        assert run.bind_config({"seeds": (0,)}, now) == {**PLAN, "processor": "slide rule"}
    (told,) = [e for e in events(tmp_path) if e["event"] == "plan_differs"]
    assert (told["field"], told["stored"], told["now"]) == ("processor", "abacus", "slide rule")
    said = "the run goes on with processor 'slide rule' (it began with 'abacus'): what is made from now on may differ"
    assert capsys.readouterr().err.startswith(said)
    # Compilation that cannot be had here, or is not wanted any more, is not asked for again.
    with Run(tmp_path) as run:
        assert run.bind_config({"seeds": (0,)}, PLAN | {"compile": "off"})["compile"] == "off"
        assert "goes on with compile 'off' (it began with 'auto')" in capsys.readouterr().err
        assert run.bind_config({"seeds": (0,)}, PLAN | {"compile": "on"})["compile"] == "auto"
        assert not capsys.readouterr().err


def test_what_a_run_and_those_within_it_go_on_with_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path, tmp_path / "sets" / "one", tmp_path / "sets" / "two"]
    for folder in folders:
        with Run(folder) as run:
            run.bind_config({}, PLAN)
    with Run(folders[0]) as outer, Run(folders[1], parent=outer) as one, Run(folders[2], parent=outer) as two:
        for run in (outer, one, two):
            assert run.bind_config({}, PLAN | {"torch_version": "3"})["torch_version"] == "3"
    assert capsys.readouterr().err.count("torch_version '3'") == 1
    assert all("plan_differs" in (folder / "events.jsonl").read_text() for folder in folders)


def test_a_directory_in_which_nothing_was_begun_goes_and_others_stay(tmp_path: Path) -> None:
    with Run(tmp_path / "new" / "run"):
        assert (tmp_path / "new" / "run" / "units").is_dir()
    assert not (tmp_path / "new" / "run").exists()
    (tmp_path / "mine").mkdir()
    with Run(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()
    with Run(tmp_path / "begun") as run:
        run.bind_config({"ipc": 1}, PLAN)
    assert (tmp_path / "begun" / "config.json").exists()


def test_another_card_of_the_same_kind_goes_on_and_another_kind_is_refused(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        run.bind_config({}, PLAN | {"device": "cuda:1"})
        assert run.bind_config({}, PLAN | {"device": "cuda"})["device"] == "cuda"
        with pytest.raises(StillroomError, match="was begun on cuda:1, this run is on cpu"):
            run.bind_config({}, PLAN | {"device": "cpu"})


def test_a_second_process_on_the_same_directory_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    code = "import fcntl, os, sys, time; lock = open(sys.argv[1], 'w'); fcntl.flock(lock, fcntl.LOCK_EX)"
    code += "; lock.write(str(os.getpid())); lock.flush(); print('locked', flush=True); time.sleep(60)"
    lock = str(tmp_path / ".lock")
    other = subprocess.Popen([sys.executable, "-c", code, lock], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(StillroomError, match=f"in use by process {other.pid}; wait for it"):
            Run(tmp_path)
    finally:
        other.kill()
        other.communicate()
    Run(tmp_path).close()  # a killed process leaves no lock behind
    with Run(tmp_path), pytest.raises(StillroomError, match=f"in use by process {os.getpid()}"):
        Run(tmp_path)


def test_events_are_one_json_object_per_line(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        run.event("first", text="two\nlines, süd", number=1.5)
        run.event("second", values=[1, 2])
    first, second = events(tmp_path)
    assert (first["event"], first["text"], first["number"]) == ("first", "two\nlines, süd", 1.5)
    assert second["values"] == [1, 2]
    assert abs(float(str(first["time"])) - time.time()) < 60


def test_a_finished_unit_is_kept_and_its_checkpoint_removed(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        for name, tensors in (("plain", None), ("tensors", {"x": torch.arange(3)})):
            assert not run.unit_done(name)
            run.checkpoint(name).save({"x": torch.zeros(1)}, {"step": 3})
            stored = run.checkpoint(name).load()
            assert stored is not None
            assert stored[1] == {"step": 3}
            run.finish_unit(name, {"value": 1}, tensors)
            assert run.unit_done(name)
            assert run.checkpoint(name).load() is None
    assert not list((tmp_path / "checkpoints").iterdir())
    with Run(tmp_path) as run:
        assert run.load_unit("plain") == ({"value": 1}, {})
        result, tensors = run.load_unit("tensors")
        assert result == {"value": 1}
        assert torch.equal(tensors["x"], torch.arange(3))
    assert [e["unit"] for e in events(tmp_path)] == ["plain", "tensors"]


@pytest.mark.parametrize("name", ["units/plain.json", "units/tensors.safetensors", "checkpoints/begun.safetensors"])
def test_one_changed_byte_of_a_unit_or_checkpoint_is_found_and_the_file_to_delete_named(
    tmp_path: Path, name: str
) -> None:
    with Run(tmp_path) as run:
        run.finish_unit("plain", {"top1": 0.125, "rows": (1, 2), "by_epoch": {2: 0.5, 10: 0.25}})
        run.finish_unit("tensors", {"value": 125}, {"x": torch.arange(125, 130), "y": torch.ones(2).bfloat16()})
        run.checkpoint("begun").save({"x": torch.arange(125)}, {"step": 125})
        reads = {"units": run.load_unit, "checkpoints": lambda unit: run.checkpoint(unit).load()}
        folder, unit = name.split(".")[0].split("/")
        reads[folder](unit)
        whole = (tmp_path / name).read_bytes()
        # The number in a result or state, and the last byte of the tensors.
        for place in (whole.index(b"125"), *([] if name.endswith("json") else [len(whole) - 1])):
            content = bytearray(whole)
            content[place] ^= 3  # a digit that stays one
            (tmp_path / name).write_bytes(content)
            with pytest.raises(
                StillroomError, match=rf"{name} was damaged .* Delete it: the same command makes it again"
            ):
                reads[folder](unit)


def test_units_of_before_there_were_hashes_are_read(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        files.write_json(tmp_path / "units" / "plain.json", {"top1": 0.5})
        files.save_tensors(tmp_path / "units" / "tensors.safetensors", {"x": torch.arange(3)}, {"value": 1})
        assert run.load_unit("plain") == ({"top1": 0.5}, {})
        assert run.load_unit("tensors")[0] == {"value": 1}


def test_a_run_without_a_directory_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Run() as run:
        assert run.bind_config({"a": 1}, PLAN) == PLAN
        run.event("anything")
        run.checkpoint("unit").save({}, {})
        assert run.checkpoint("unit").load() is None
        assert not run.checkpoint("unit").due
        run.finish_unit("unit", {})
        assert not run.unit_done("unit")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_other_weights_is_refused_and_the_file_named(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        run.checkpoint("unit", "weights a").save({"x": torch.arange(3)}, {"step": 2})
        tensors, state = run.checkpoint("unit", "weights a").load() or ({}, {})
        assert (tensors["x"].tolist(), state) == ([0, 1, 2], {"step": 2})
        with pytest.raises(
            StillroomError, match=r"unit\.safetensors' was begun with other .*; delete it to begin anew"
        ):
            run.checkpoint("unit", "weights b").load()


def test_checkpoints_are_due_once_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(run_module.time, "monotonic", lambda: clock[0])
    with Run(tmp_path) as run:
        checkpoint = run.checkpoint("unit")
        assert not checkpoint.due
        clock[0] += 60
        assert checkpoint.due
        checkpoint.save({}, {})
        assert not checkpoint.due


def test_the_time_limit_stops_between_units_and_is_told(tmp_path: Path) -> None:
    with Run(tmp_path, time_limit=3600) as run:
        assert not run.stopping
        run.check_time()
    with Run(tmp_path, time_limit=0) as run:
        assert run.stopping
        with pytest.raises(TimeLimitReached, match="time limit"):
            run.check_time()
    assert events(tmp_path)[-1]["reason"] == "time limit"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_run_as_the_time_limit_does(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Run(tmp_path) as run, run.stop_on_signals():
        assert not run.stopping
        signal.raise_signal(number)
        assert run.stopping
        with pytest.raises(TimeLimitReached, match=number.name):
            run.check_time()
        with pytest.raises(KeyboardInterrupt):  # who asks twice will not wait
            signal.raise_signal(number)
    assert signal.getsignal(number) == before
    assert events(tmp_path)[-1]["reason"] == number.name


def test_progress_is_silent_where_standard_error_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Run() as run, run.progress("work", 10) as advance:
        advance()
        advance(3, loss=1.0)
    assert capsys.readouterr() == ("", "")


def test_progress_shows_rate_and_count_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module.sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with Run() as run, run.progress("work", 10, start=4) as advance:
        advance(3, loss=1.0)
    out, err = capsys.readouterr()
    assert out == ""
    assert "work" in err
    assert Run(show=False).show is False


def test_a_notice_goes_to_standard_error_and_into_the_events(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Run(tmp_path) as run:
        run.notice("three images were left out")
    assert capsys.readouterr() == ("", "three images were left out\n")
    assert events(tmp_path)[-1]["message"] == "three images were left out"


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StillroomError, match=r"cannot be written .*give another with --out"):
        Run(tmp_path / "file")
    with pytest.raises(StillroomError, match=r"cannot be written .*give another with --out"):
        Run(tmp_path / "file" / "below")


@pytest.mark.parametrize("name", [".lock", "events.jsonl", "workers/claims", "workers/me.jsonl", "workers/new.jsonl"])
def test_a_link_in_the_place_of_a_file_that_is_written_in_place_is_refused_and_what_it_leads_to_stays(
    tmp_path: Path, name: str
) -> None:
    mine, run = tmp_path / "mine", tmp_path / "run"
    if "new" not in name:
        mine.write_text("years of work")
    (run / name).parent.mkdir(parents=True)
    (run / name).symlink_to(mine)
    worker = Path(name).stem if "workers" in name else None
    refused = pytest.raises(StillroomError, match=f"{name} is a symbolic link.*delete it")
    with refused, Run(run, worker="me" if worker == "claims" else worker) as opened:
        opened.event("opened")
    assert not mine.exists() if "new" in name else mine.read_text() == "years of work"


def test_who_asks_whether_a_run_is_held_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(StillroomError, match="is a symbolic link"):
        run_module.is_held(tmp_path / "run")


@pytest.mark.parametrize("name", ["units", "checkpoints", "workers", "sets", "distilled"])
def test_a_link_in_the_place_of_a_folder_of_a_run_is_refused_but_a_run_may_be_linked_itself(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with Run(tmp_path / "link") as run:
        run.finish_unit("one", {})
    path = tmp_path / "run" / name
    if path.exists():
        path.rename(tmp_path / "away")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StillroomError, match=f"{name} is a symbolic link"):
        Run(tmp_path / "run")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_set_of_a_comparison_may_not_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    with Run(tmp_path / "run") as run:
        (tmp_path / "run" / "sets").mkdir()
        (tmp_path / "run" / "sets" / "one").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(StillroomError, match="one is a symbolic link"):
            Run(tmp_path / "run" / "sets" / "one", parent=run)


def test_a_damaged_configuration_is_refused_and_not_computed_by(tmp_path: Path) -> None:
    plan = {"seed_scheme": 1, "device": "cpu", "compile": "off", "chunk": 3} | dict.fromkeys(
        ("processor", "torch_version")
    )
    with Run(tmp_path) as run:
        run.bind_config({"steps": 5}, plan)
        assert run.bind_config({"steps": 5}, plan) == plan
        path = tmp_path / "config.json"
        whole = path.read_text()
        for old, new in (('"chunk": 3', '"chunk": 2'), ('"plan"', '"plbn"'), ("{", "[{")):
            path.write_text(whole.replace(old, new, 1))
            with pytest.raises(StillroomError, match=r"damaged or edited .* restore it, or give another directory"):
                run.bind_config({"steps": 5}, plan)


@pytest.mark.parametrize(
    ("old", "new"), [(b'"sha256"', b'"sha25v"'), (b"sha256\\", b"sha25v\\"), (b'"meta"', b'"mfta"')]
)
def test_a_unit_whose_seal_has_lost_its_name_is_refused(tmp_path: Path, old: bytes, new: bytes) -> None:
    with Run(tmp_path) as run:
        run.finish_unit("small", {"loss": 0.5})
        run.finish_unit("large", {"loss": 0.5}, {"x": torch.ones(2)})
        for path in (tmp_path / "units").iterdir():
            path.write_bytes(path.read_bytes().replace(old, new))
        with pytest.raises(StillroomError, match="damaged or edited"):
            run.load_unit("large" if b"meta" in old or b"\\" in old else "small")


def test_a_damaged_unit_is_put_aside_and_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = [Task("small", lambda: ({"loss": 0.5}, None)), Task("large", lambda: ({}, {"x": torch.arange(3)}))]
    with Run(tmp_path) as run:
        first = run.carry_out(tasks)
        for path in list((tmp_path / "units").iterdir()):
            path.write_bytes(path.read_bytes()[:-5])
        again = run.carry_out(tasks)
        assert first[0] == again[0]
        assert torch.equal(first[1][1]["x"], again[1][1]["x"])
        assert capsys.readouterr().err.count("made anew") == 2
        run.carry_out(tasks)
    assert {path.name for path in (tmp_path / "units").iterdir()} == {
        f"{name}{end}" for name in ("small.json", "large.safetensors") for end in ("", ".damaged")
    }
    assert not capsys.readouterr().err


@pytest.mark.parametrize("tensors", [None, {"x": torch.arange(3)}])
def test_a_unit_that_is_gone_when_it_is_read_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensors: dict[str, torch.Tensor] | None
) -> None:
    with Run(tmp_path) as run:
        run.finish_unit("unit", {}, tensors)
        exists = Path.exists

        def exists_until_it_was_asked(path: Path) -> bool:
            there = exists(path)
            if path.parent.name == "units":
                path.unlink(missing_ok=True)
            return there

        monkeypatch.setattr(Path, "exists", exists_until_it_was_asked)
        assert run.finished("unit") is None


def test_a_damaged_unit_keeps_the_checkpoint_that_it_may_be_made_anew_from(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        run.finish_unit("unit", {"loss": 0.5})
        (tmp_path / "units" / "unit.json").write_text("{")
        run.checkpoint("unit").save({}, {"step": 3})  # of another worker, which makes it anew
        assert run.finished("unit") is None
        assert run.checkpoint("unit").load() == ({}, {"step": 3})


def test_units_without_their_configuration_are_of_no_settings_and_refused(tmp_path: Path) -> None:
    plan = {"seed_scheme": 1, "device": "cpu", "compile": "off"} | dict.fromkeys(("processor", "torch_version"))
    with Run(tmp_path) as run:
        run.bind_config({"steps": 5}, plan)
        run.finish_unit("small", {"loss": 0.5})
        path = tmp_path / "config.json"
        path.write_text(path.read_text()[:-9])
        with pytest.raises(StillroomError, match=r"config\.json' was damaged .*restore it, or give another directory"):
            run.bind_config({"steps": 6}, plan)
        path.unlink()
        with pytest.raises(StillroomError, match=r"config\.json' is gone.*restore it, or give another directory"):
            run.bind_config({"steps": 6}, plan)


def test_damaged_events_and_a_clock_set_back_do_not_stop_a_run(tmp_path: Path) -> None:
    lines = [
        '{"time": 9.0, "event": "opened"}',
        '{"time": 4.0, "event": "unit_finished"}',
        '{"event": "opened"}',
        "[]",
        "\udcff",
    ]
    lines += [
        '{"time": 5.0, "event": "opened"}',
        '{"time": "late", "event": "stopped"}',
        '{"time": 7.0, "event": "stopped"}',
    ]
    with Run(tmp_path) as run:
        (tmp_path / "events.jsonl").write_bytes("\n".join(lines).encode(errors="surrogateescape"))
        assert run.seconds_spent() == 2.0


@pytest.mark.parametrize(
    ("told", "seconds"),
    [
        (["1 notice", "5 opened", "9 epoch"], 4),
        (["5 opened", "9 stopped", "500 notice", "501 opened", "503 unit_finished"], 6),
        (["5 epoch", "7 unit_finished", "20 opened", "21 epoch"], 3),  # its beginning was lost
        (["5 notice"], 0),
        ([], 0),
    ],
)
def test_time_between_processes_is_not_time_spent(told: list[str], seconds: float) -> None:
    spelt = [(float(at), kind) for at, kind in (line.split() for line in told)]
    assert seconds_within({"time": 1e9 + at, "event": kind} for at, kind in spelt) == seconds


def test_a_refusal_for_other_images_says_that_they_are_others(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        run.bind_config({"data_fingerprint": "a"}, PLAN)
        run.finish_unit("one", {})
        with pytest.raises(StillroomError, match=r"data_fingerprint: 'a' there, 'b' now \(other images"):
            run.bind_config({"data_fingerprint": "b"}, PLAN)
