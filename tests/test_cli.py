"""The command line as people meet it: exit codes, tables, plans, settings from files, bad input, and stopping."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import TOY_COLOURS, Finished, draw_toy_colours, without_units, write_toy_npz
from PIL import Image

from stillroom import cli, engines, fitting, teachers
from stillroom.distilled import load_distilled
from stillroom.labels import PoolConfig
from stillroom.pipeline import run_recipe
from stillroom.protocols import protocol_student
from stillroom.recipes import RECIPES, Recipe
from stillroom.run import Run
from stillroom.settings import to_yaml
from stillroom.workers import Worker

Told = Callable[..., tuple[int, str, str]]

QUICK_STUDENT = ["--student.network", "toynet", "--student.train.epochs", "1", "--student.train.batch-size", "8"]
ON_CPU = ["--compute.device", "cpu", "--compute.precision", "float32", "--compute.compile", "off"]


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    """Give words to the command line, in an empty folder; get exit code, standard output and standard error.

    Less the lines that tell of finished units, as they do where there is no terminal.
    """
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def told(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        out, err = capsys.readouterr()
        return code, out, without_units(err)

    return told


@pytest.fixture
def own_run(finished: Finished, tmp_path: Path) -> Path:
    """A copy of the finished run, to be spoilt."""
    return Path(shutil.copytree(finished.directory, tmp_path / "own"))


def image_folder(root: Path) -> Path:
    for split, per_class, seed in (("train", 8, 1), ("test", 4, 2)):
        for number, (image, label) in enumerate(zip(*draw_toy_colours(per_class, seed), strict=True)):
            folder = root / split / TOY_COLOURS[label].replace("/", " ")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number}.png")
    return root


def parquet_folder(root: Path) -> Path:
    root.mkdir()
    for split, per_class, seed in (("train", 8, 1), ("test", 4, 2)):
        rows = []
        for image, label in zip(*draw_toy_colours(per_class, seed), strict=True):
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG")
            rows.append({"image": {"bytes": png.getvalue(), "path": None}, "label": TOY_COLOURS[label]})
        pq.write_table(pa.Table.from_pylist(rows), root / f"{split}-00000-of-00001.parquet")
    return root


# -- what a run says -------------------------------------------------------------------------------------------------


def test_a_run_ends_with_its_table_and_where_things_lie(finished: Finished) -> None:
    assert finished.code == 0
    assert finished.err.startswith("the training is short: students with dynamic labels see each class 6 times")
    assert finished.err.count("\n") == 1
    for text in ("toy, 4 images per class, student toynet", "infer", "naturals", "equal steps", "top-1: toynet"):
        assert text in finished.out, text
    for path in ("distilled", "distilled/contact_sheet.png", "results.json", "events.jsonl"):
        assert str(finished.directory / path) in finished.out
        assert (finished.directory / path).exists()


def test_inspect_shows_the_budget_and_verify_that_the_set_is_whole(finished: Finished, tell: Told) -> None:
    for directory in (finished.directory, finished.directory / "distilled"):
        code, out, err = tell("inspect", directory)
        assert (code, err) == (0, "")
        for text in ("infer of toy, ipc 4", "compensators", "real training set", "paper's convention", *TOY_COLOURS):
            assert text in out, text
        code, out, err = tell("verify", directory)
        assert (code, err) == (0, "")
        assert "whole" in out


def test_recipes_lists_every_recipe_with_what_it_should_reach(tell: Told) -> None:
    code, out, _ = tell("recipes")
    assert code == 0
    for name in RECIPES:
        assert name in out
    assert "45.2" in out
    assert "53.4" in out


def test_squeeze_trains_the_teachers_that_distill_and_run_go_on_from(
    toy_recipe: Recipe, tell: Told, tmp_path: Path, finished: Finished
) -> None:
    code, out, _ = tell("squeeze", "toy", "--out", tmp_path / "run")
    assert code == 0
    assert "toynet" in out
    assert not (tmp_path / "run" / "distilled").exists()
    code, out, _ = tell("distill", "toy", "--out", tmp_path / "run")
    assert code == 0
    assert "infer of toy, ipc 4" in out
    assert not (tmp_path / "run" / "results.json").exists()
    for path in (finished.directory / "distilled").iterdir():
        assert (tmp_path / "run" / "distilled" / path.name).read_bytes() == path.read_bytes(), path.name
    code, out, _ = tell("clean")
    assert code == 0
    assert "toynet-toy-" in out
    assert "add --yes" in out
    code, out, _ = tell("clean", "--yes")
    assert "deleted 1 teachers" in out
    code, out, _ = tell("clean")
    assert "toynet" not in out


def test_a_cache_given_by_flag_is_the_one_that_is_used_and_cleaned(
    toy_recipe: Recipe, tell: Told, tmp_path: Path, own_cache: Path
) -> None:
    cache = tmp_path / "teachers of mine"
    code, _, err = tell("squeeze", "toy", "--out", tmp_path / "run", "--teachers.cache", cache)
    assert (code, err) == (0, "")
    assert not list(own_cache.iterdir())
    assert "toynet" not in tell("clean")[1]
    assert "toynet-toy-" in tell("clean", "--cache", cache)[1]
    assert "deleted 1 teachers" in tell("clean", "--cache", cache, "--yes")[1]
    assert "toynet" not in tell("clean", "--cache", cache)[1]
    for words in (["--help"], ["clean", "--help"], ["squeeze", "--help"], ["evaluate", "--help"]):
        assert "STILLROOM_CACHE" in tell(*words)[1]


def test_clean_keeps_a_teacher_that_is_being_trained_and_says_so(tell: Told, own_cache: Path) -> None:
    busy, idle = (own_cache / "teachers" / name for name in ("busy", "idle"))
    idle.mkdir(parents=True)
    with teachers._entry_lock(busy, Run()):
        code, out, err = tell("clean", "--yes")
    assert (code, err) == (0, "")
    assert out.endswith("deleted 1 teachers\nkept busy: another process is training it\n")
    assert (busy.exists(), idle.exists()) == (True, False)


# -- settings ----------------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    toy_recipe: Recipe, tell: Told, tmp_path: Path, own_cache: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, out, err = tell("run", "toy", "--dry-run")
    assert (code, err) == (0, "")
    for text in ("teacher toynet", "compensators toynet", "static labels", "students, dynamic", "together", "time"):
        assert text in out, text
    assert sorted(tmp_path.rglob("*")) == before
    assert not list(own_cache.iterdir())


def test_printed_settings_are_read_back_as_the_same_settings(toy_recipe: Recipe, tell: Told, tmp_path: Path) -> None:
    words = ["--ipc", 7, "--no-controls", "--seeds", 3, 4, "--infer.betas", 0.1, 0.2, "--teachers.epochs", 9]
    code, printed, _ = tell("run", "toy", *words, "--print-config")
    assert code == 0
    settings = yaml.safe_load(printed)
    assert (settings["ipc"], settings["controls"], settings["seeds"]) == (7, False, [3, 4])
    (tmp_path / "mine.yaml").write_text(printed)
    for recipe in ("toy", "small", "infer-imagenet-ipc10"):
        assert tell("run", recipe, "--config", tmp_path / "mine.yaml", "--print-config") == (0, printed, "")
    _, overridden, _ = tell("run", "toy", f"--config={tmp_path / 'mine.yaml'}", "--ipc", 5, "--print-config")
    assert yaml.safe_load(overridden) == settings | {"ipc": 5}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_its_way_through_a_file(name: str, tell: Told, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(to_yaml(RECIPES[name]))
    code, printed, _ = tell("run", "small", "--config", tmp_path / "mine.yaml", "--print-config")
    assert code == 0
    assert yaml.safe_load(printed) == json.loads(json.dumps(asdict(RECIPES[name])))


def chosen_by(tell: Told, *words: object) -> tuple[dict[str, Any], str]:
    """The settings that `stillroom run own` would run with, and what it says of them."""
    code, printed, said = tell("run", "own", *words, "--print-config")
    assert code == 0, said
    return yaml.safe_load(printed), said


def test_own_is_fitted_to_the_images_and_what_words_and_files_say_stays(tell: Told, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "photos") / "train"
    shutil.rmtree(root.parent / "test")
    root = root.rename(tmp_path / "my photos")
    settings, said = chosen_by(tell, "--data.source", root)
    assert (settings["data"]["image_size"], settings["data"]["holdout_share"]) == (32, 0.2)
    assert "for 4 classes of 7 training images" in said
    assert "--data.holdout-share: there is no test split, so it is the last 20% of each class" in said
    more, said = chosen_by(tell, "--data.source", root, "--ipc", 4)
    assert more["ipc"] == 4 > settings["ipc"]
    assert more["student"]["train"]["epochs"] < settings["student"]["train"]["epochs"]  # as many steps
    assert "infer at ipc 4" in said
    (tmp_path / "mine.yaml").write_text("data:\n  image_size: 48\nteachers:\n  networks: [resnet10_thin]\n")
    filed, said = chosen_by(tell, "--data.source", root, "--config", tmp_path / "mine.yaml", "--ipc", 3)
    assert (filed["data"]["image_size"], filed["teachers"]["networks"], filed["ipc"]) == (48, ["resnet10_thin"], 3)
    assert "48 pixels, infer at ipc 3, teachers resnet10_thin (" in said
    held, said = chosen_by(tell, "--data.source", root, "--data.holdout-per-class", 2)
    assert (held["data"]["holdout_per_class"], held["data"]["holdout_share"]) == (2, 0)
    assert "there is no test split" not in said


def test_own_keeps_what_is_said_also_where_it_would_have_chosen_the_same(tell: Told, tmp_path: Path) -> None:
    root, networks = image_folder(tmp_path / "photos"), list(fitting.THIN)
    # Of two images per class two teachers' compensators would leave one: unless they are said, there is one teacher.
    alone, _ = chosen_by(tell, "--data.source", root, "--ipc", 2)
    assert len(alone["teachers"]["networks"]) == 1
    said, _ = chosen_by(tell, "--data.source", root, "--ipc", 2, "--teachers.networks", *networks)
    assert said["teachers"]["networks"] == networks
    assert said["student"]["train"]["epochs"] < alone["student"]["train"]["epochs"]  # of more views


def test_own_refuses_what_leaves_nothing_to_choose_by(tell: Told, tmp_path: Path) -> None:
    words = ["run", "own", "--data.source", image_folder(tmp_path / "photos"), "--print-config"]
    code, _, err = tell(*words, "--data.holdout-per-class", 1000)
    assert code == 1
    assert "has no training image left once some are held out; hold fewer out" in err
    code, _, err = tell(*words, "--data.image-size", "None")
    assert code == 1
    assert "data.image_size is None; give a number of pixels, or leave it out" in err


def test_a_comparison_of_own_images_takes_its_budgets_from_the_grid_and_goes_on_on_another_machine(
    tell: Told, tmp_path: Path, toynet: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = image_folder(tmp_path / "photos"), tmp_path / "run"
    monkeypatch.setattr(fitting, "SIDES", (8,))
    words = ["compare", "own", "--data.source", root, "--out", out, "--grid.methods", "random", "--grid.ipc", 1, 2]
    words += ["--labels", "hard", "--seeds", 0, "--teachers.networks", toynet, *QUICK_STUDENT, *ON_CPU]
    code, _, said = tell(*words)
    assert code == 0, said
    assert "infer at ipc 2" in said
    monkeypatch.setattr(fitting, "SIDES", (16,))
    code, _, said = tell(*words)
    assert code == 0, said
    assert f"{out} goes on with what was chosen for it: 8 pixels" in said
    (out / "config.json").write_text("{")
    code, _, err = tell(*words)
    assert code == 1
    assert "so nothing says of which settings the units of this run are; restore it" in err


def test_own_takes_its_students_from_a_protocol_where_one_is_named(tell: Told, tmp_path: Path) -> None:
    settings, _ = chosen_by(tell, "--data.source", image_folder(tmp_path / "photos"), "--protocol", "laptop")
    assert settings["student"] == json.loads(json.dumps(asdict(protocol_student("laptop", 32))))
    assert settings["data"]["holdout_share"] == 0


def test_own_goes_on_with_what_was_chosen_for_a_run_on_a_machine_of_other_speed(
    tell: Told, tmp_path: Path, toynet: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = image_folder(tmp_path / "photos"), tmp_path / "run"
    small = ["--teachers.networks", toynet, "--teachers.least-steps", 150, "--seeds", 0]
    words = ["own", "--data.source", root, "--out", out, *small, *QUICK_STUDENT, *ON_CPU]
    monkeypatch.setattr(fitting, "SIDES", (8,))
    monkeypatch.setattr(fitting, "RECOVERY_PASSES", 40)
    code, _, said = tell("distill", *words)
    assert code == 0, said
    assert "8 pixels, infer at ipc 2" in said
    monkeypatch.setattr(fitting, "RECOVERY_PASSES", 50_000)
    code, _, said = tell("run", *words)
    assert code == 0, said
    assert f"{out} goes on with what was chosen for it: 8 pixels, infer at ipc 2" in said
    assert json.loads((out / "results.json").read_text())["settings"]["infer"]["steps"] == 30
    code, _, said = tell("run", *words, "--engine", "shared")
    assert (code, "goes on with what was chosen" in said) == (0, True)
    code, _, said = tell("run", *words, "--ipc", 3)
    assert code == 1
    assert "ipc: 2 there, 3 now" in said


def test_evaluate_prints_its_settings_too(finished: Finished, tell: Told, toynet: str, tmp_path: Path) -> None:
    words = ["evaluate", finished.directory, "--data.source", finished.recipe.data.source]
    code, printed, _ = tell(*words, "--student.temperature", 5, "--print-config")
    assert code == 0
    (tmp_path / "mine.yaml").write_text(printed)
    assert tell(*words, "--config", tmp_path / "mine.yaml", "--print-config") == (0, printed, "")


def test_evaluate_trains_students_as_the_set_s_run_did_and_asks_where_its_images_lie(
    finished: Finished, tell: Told, toynet: str
) -> None:
    code, printed, _ = tell("evaluate", finished.directory, "--print-config")
    assert code == 0
    assert yaml.safe_load(printed)["student"] == json.loads(json.dumps(asdict(finished.recipe.student)))
    code, _, err = tell("evaluate", finished.directory, *ON_CPU)
    assert code == 2
    assert "the set was made of 'toy'; say where these images lie: --data.source PATH" in err


def test_evaluate_finds_images_on_the_hub_by_the_name_that_the_set_has_for_them(
    finished: Finished, tell: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # so that nothing is fetched
    distilled = load_distilled(finished.directory / "distilled")
    real = replace(distilled.manifest.dataset, name="owner/toy")
    replace(distilled, manifest=replace(distilled.manifest, dataset=real)).save("set")
    code, _, err = tell("evaluate", "set", *ON_CPU)
    assert code == 1
    assert "--data.source owner/toy is no existing path; to read it from the Hub, install stillroom[hub]" in err


@pytest.mark.parametrize("place", [".", "distilled"])
def test_evaluate_takes_data_students_and_teachers_from_the_run_whether_it_or_its_set_is_named(
    finished: Finished, own_run: Path, tell: Told, toynet: str, place: str
) -> None:
    config = json.loads((own_run / "config.json").read_text())
    data = {"holdout_per_class": 3, "train_per_class": 9, "flip": "on", "label_column": "kind", "skip_bad_images": True}
    config["settings"]["data"].update(data)
    del config["sha256"]  # as of before runs were sealed
    (own_run / "config.json").write_text(json.dumps(config))
    code, printed, err = tell("evaluate", own_run / place, "--print-config")
    assert (code, err) == (0, "")
    found, recipe = yaml.safe_load(printed), json.loads(json.dumps(asdict(finished.recipe)))
    assert found["student"] == recipe["student"]
    assert found["teachers"] == recipe["teachers"]
    assert found["data"] == recipe["data"] | data | {"source": "toy"}
    # Another version's run: what it lacks stays as it is by default, and what it has besides is told.
    del config["settings"]["teachers"], config["settings"]["data"]["flip"]
    config["settings"]["student"]["train"]["wobble"] = 3
    (own_run / "config.json").write_text(json.dumps(config))
    code, printed, err = tell("evaluate", own_run / place, "--print-config")
    assert (code, yaml.safe_load(printed)["data"]["flip"]) == (0, "auto")
    assert yaml.safe_load(printed)["teachers"]["networks"] == ["toynet"]
    assert err.endswith("config.json has train.wobble, which this version does not know; it is left out\n")


def test_the_plan_of_a_part_shows_that_part(toy_recipe: Recipe, tell: Told) -> None:
    shown = {name: tell(name, "toy", "--dry-run")[1] for name in ("squeeze", "distill", "run")}
    assert ["compensators" in shown[name] for name in shown] == [False, True, True]
    assert ["students" in shown[name] for name in shown] == [False, False, True]
    assert all("teacher toynet" in text for text in shown.values())


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["rnu", "digits"], 2, "there is no command 'rnu'. Did you mean 'run'?"),
        (["run", "digit"], 2, "there is no recipe 'digit'. Did you mean 'digits'?"),
        (["run", "digits", "--infer.step", "3"], 2, "--infer.steps"),
        (["run", "digits", "--infer.steps", "many"], 2, "--infer.steps"),
        (["run", "digits", "--labels", "soft"], 2, "--labels"),
        (["run", "digits", "--ipc", "0"], 2, "ipc is 0"),
        (["run", "digits", "--time-limit", "soon"], 2, "--time-limit is 'soon'; give a time such as 90s"),
        (["run", "digits", "--time-limit", "5x", "--dry-run"], 2, "--time-limit is '5x'"),
        (["run", "digits", "--time-limit", "0"], 2, "--time-limit is '0', in which nothing can be done"),
        (["demo", "--time-limit", "0m"], 2, "--time-limit is '0m', in which nothing can be done"),
        (["run", "digits", "--data.image-size", "0"], 2, "--data.image-size is 0"),
        (["run", "digits", "--compute.threads", "0"], 2, "compute.threads is 0"),
        (["run", "digits", "--compute.pack-slots", "0"], 2, "compute.pack_slots is 0"),
        (["run", "digits", "--teachers.epochs", "0"], 2, "train.epochs is 0"),
        (["run", "digits", "--infer.steps", "0"], 2, "infer.steps is 0"),
        (["run", "digits", "--student.train.epochs", "0"], 2, "train.epochs is 0"),
        (["run", "digits", "--teachers.least-steps", "-1"], 2, "teachers.least_steps is -1"),
        (["run", "digits", "--seeds", "1", "1"], 2, "seeds 1 1 has repeats"),
        (["run", "digits", "--compute.device", "tpu"], 1, "compute.device is 'tpu'"),
        (["run", "digits", "--config", "missing.yaml"], 2, "--config 'missing.yaml' does not exist"),
        (["run", "small", "--data.source", "cifra10"], 1, "Did you mean 'cifar10'"),
        (["evaluate"], 2, ""),
        (["inspect"], 2, ""),
        (["inspect", "nowhere"], 1, "nowhere is not a distilled set"),
        (["verify", "nowhere"], 1, "nowhere is not a distilled set"),
        (["evaluate", "nowhere"], 1, "nowhere is not a distilled set"),
        (["recipes", "--everything"], 2, ""),
    ],
)
def test_wrong_words_are_answered_with_the_nearest_right_ones(
    tell: Told, words: list[str], code: int, text: str
) -> None:
    found, _, err = tell(*words)
    assert found == code
    assert text in re.sub(r"[\s│]+", " ", err)
    assert err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "content",
    [
        "just text",
        "word " * 999,
        f"- {'x' * 999}",
        f"{'k' * 999}: 1",
        f"'{'x' * 999}",
        "- 1",
        "ipc: [",
        "infer: {step: 3}",
        "ipc: many",
    ],
)
def test_a_settings_file_that_is_none_is_refused_in_one_line_before_anything_is_written(
    finished: Finished, tell: Told, tmp_path: Path, content: str
) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    for words in (["run", "digits"], ["evaluate", finished.directory]):
        code, out, err = tell(*words, "--config", tmp_path / "mine.yaml")
        assert (code, out) == (2, "")
        assert err.startswith(f"stillroom: --config '{tmp_path / 'mine.yaml'}'")
        assert len(err) < len(str(tmp_path)) + 400
        assert err.count("\n") == 1
        assert "Traceback" not in err
    assert not list(Path().iterdir())


@pytest.mark.parametrize("words", [["--help"], ["-h"], *([name, "--help"] for name in cli.COMMANDS), ["--version"]])
def test_help_and_version_leave_with_0_and_nothing_without_a_command_with_2(tell: Told, words: list[str]) -> None:
    code, out, err = tell(*words)
    assert (code, err) == (0, "")
    assert out
    if words[0] in ("--help", "-h"):
        assert all(re.search(rf"\b{name}\b", out) for name in cli.COMMANDS)
    assert tell()[0] == 2


# -- stopping and going on ---------------------------------------------------------------------------------------------


def test_a_time_limit_stops_with_3_and_the_same_command_goes_on_to_the_same_bits(
    toy_recipe: Recipe, finished: Finished, tell: Told, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for limit in ("0.001s", "0.002", "0.3s"):
        code, _, err = tell("run", "toy", "--out", run, "--time-limit", limit, "--data.source", toy_recipe.data.source)
        assert code == 3
        said = "stillroom: stopped (time limit); what a run directory keeps is saved, the same command goes on"
        assert err.splitlines()[-1] == said
    assert not (run / "results.json").exists()
    assert tell("run", "toy", "--out", run)[0] == 0
    old, new = (json.loads((d / "results.json").read_text())["cells"] for d in (finished.directory, run))
    for before, after in zip(old, new, strict=True):
        assert before | {"seconds": 0} == after | {"seconds": 0}
    for path in (finished.directory / "distilled").iterdir():
        assert (run / "distilled" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
def test_a_process_killed_at_random_moments_goes_on_to_the_bits_of_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npz = write_toy_npz(tmp_path / "toy.npz")
    words = ["run", "small", "--data.source", npz, "--ipc", "4", "--teachers.networks", "convnet_thin", "--no-controls"]
    words += ["--teachers.epochs", "12", "--teachers.batch-size", "16", "--teachers.learning-rate", "0.05"]
    words += ["--infer.steps", "150", "--student.network", "convnet_thin", "--student.train.epochs", "20"]
    words += ["--student.dynamic-epochs", "20", "--seeds", "0", "1", *ON_CPU, "--compute.threads", "1"]

    def start(name: str) -> subprocess.Popen[bytes]:
        monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path / f"cache-{name}"))
        command = [sys.executable, "-m", "stillroom.cli", *map(str, words), "--out", str(tmp_path / name)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)

    assert start("whole").wait() == 0
    seconds = np.random.default_rng()
    for _ in range(3):
        process = start("killed")
        while not (tmp_path / "killed" / "config.json").exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(seconds.uniform(0, 4))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start("killed").wait() == 0
    for path in (tmp_path / "whole" / "distilled").iterdir():
        assert (tmp_path / "killed" / "distilled" / path.name).read_bytes() == path.read_bytes(), path.name
    old, new = (json.loads((tmp_path / n / "results.json").read_text())["cells"] for n in ("whole", "killed"))
    assert [c["top1"] for c in old] == [c["top1"] for c in new]


# -- data of the user's own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [image_folder, parquet_folder])
def test_images_of_the_users_own_go_through_distill_and_evaluate(
    toy_recipe: Recipe, tell: Told, tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    source = write(tmp_path / "my images")
    words = ["--data.source", source, "--teachers.epochs", "10"]
    code, out, err = tell("distill", "toy", *words, "--out", tmp_path / "run")
    assert code == 0, err
    assert err.startswith("the set is not much smaller: it takes 59% of the bytes of 'my images'")
    assert err.count("\n") == 1
    manifest = load_distilled(tmp_path / "run" / "distilled").manifest
    names = (name.replace("/", " ") if write is image_folder else name for name in TOY_COLOURS)
    assert manifest.class_names == tuple(sorted(names))
    assert manifest.dataset.name == "my images"
    assert manifest.class_names[-1] in out
    words = ["evaluate", tmp_path / "run", "--data.source", source, "--seeds", 0, 1, *QUICK_STUDENT, *ON_CPU]
    code, out, err = tell(*words, "--out", tmp_path / "students")
    assert (code, err) == (0, ""), err
    result = json.loads((tmp_path / "students" / "results.json").read_text())["evaluation"]
    assert len(result["top1"]) == 2
    assert result["labels"] == "static"


def test_a_log_tells_of_every_finished_unit(
    finished: Finished,
    toynet: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setitem(RECIPES, "toy", finished.recipe)
    cache = str(finished.directory.parent / "cache")
    words = ["distill", "toy", "--teachers.cache", cache, "--out", str(tmp_path / "r")]
    assert cli.main(words) == 0
    said = re.findall(r"^\d\d:\d\d:\d\d finished (.*)$", capsys.readouterr().err, re.MULTILINE)
    assert sorted(said) == sorted(path.stem for path in (tmp_path / "r/units").iterdir())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main([*words[:-1], str(tmp_path / "shown")]) == 0
    assert " finished " not in capsys.readouterr().err


def test_students_of_a_set_are_units_that_workers_share(
    finished: Finished, tell: Told, toynet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["evaluate", finished.directory, "--data.source", finished.recipe.data.source, "--seeds", 0, 1]
    words += [*QUICK_STUDENT, *ON_CPU, "--compute.threads", 1]
    assert tell(*words, "--out", tmp_path / "one")[0] == 0
    claimed: list[str] = []
    claim = Worker.claim
    monkeypatch.setattr(Worker, "claim", lambda self, unit: (claimed.append(unit), claim(self, unit))[1])
    code, _, err = tell(*words, "--out", tmp_path / "two", "--engine", "shared")
    assert (code, err) == (0, "")
    assert claimed[1:] == ["student-student-toynet-0", "student-student-toynet-1"]
    one, two = (
        json.loads((tmp_path / name / "results.json").read_text())["evaluation"] | {"seconds": 0}
        for name in ("one", "two")
    )
    assert one == two
    assert len(list((tmp_path / "two" / "workers").glob("*.jsonl"))) == 1


def test_students_of_a_set_go_to_ray_s_workers_and_what_these_return_is_shown(
    finished: Finished, tell: Told, toynet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def spread(work: Any, directory: Path, compute: Any, cache: Path, **options: Any) -> Any:
        asked.update(options | {"directory": directory, "cache": cache})
        with Run(directory, worker="ray-0") as run:
            return work(replace(compute, threads=1), run)

    monkeypatch.setattr(engines, "spread", spread)
    words = ["evaluate", finished.directory, "--data.source", finished.recipe.data.source, "--seeds", 0]
    words += [*QUICK_STUDENT, *ON_CPU, "--teachers.cache", tmp_path / "cache", "--out", tmp_path / "out"]
    code, out, _ = tell(*words, "--engine", "ray", "--workers", 2, "--ray-address", "10.0.0.1:6379")
    assert code == 0
    assert "toynet" in out
    assert asked == {
        "directory": tmp_path / "out", "cache": tmp_path / "cache",
        "address": "10.0.0.1:6379", "workers": 2, "time_limit": None,
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "config.json").read_text())["plan"]["threads"] == 1


@pytest.mark.parametrize("engine", ["shared", "ray"])
def test_workers_at_a_set_need_a_directory_to_share(finished: Finished, tell: Told, engine: str) -> None:
    words = ["evaluate", finished.directory, "--data.source", finished.recipe.data.source, *ON_CPU]
    code, _, err = tell(*words, "--engine", engine)
    assert code == 2
    assert "--engine leaves what is done to others or to later, in a run directory: give --out too" in err
    assert "give --engine ray too" in tell(*words, "--workers", 2)[2]


def test_students_of_one_set_are_never_taken_for_those_of_another(
    finished: Finished, own_run: Path, tell: Told, toynet: str, tmp_path: Path
) -> None:
    distilled = load_distilled(own_run / "distilled")
    distilled.with_labels(None).save(own_run / "distilled")
    words = ["--data.source", finished.recipe.data.source, "--seeds", 0, *QUICK_STUDENT, *ON_CPU]
    assert tell("evaluate", finished.directory, *words, "--out", tmp_path / "students")[0] == 0
    assert tell("evaluate", finished.directory, *words, "--out", tmp_path / "students")[0] == 0
    code, _, err = tell("evaluate", own_run, *words, "--out", tmp_path / "students")
    assert code == 1
    assert "holds another configuration" in err
    assert "distilled.images" not in err
    assert "distilled.labels" in err


def test_evaluate_with_dynamic_labels_takes_the_teachers_from_the_cache(
    finished: Finished, tell: Told, toynet: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLROOM_CACHE", str(finished.directory.parent / "cache"))
    words = ["evaluate", finished.directory, "--data.source", finished.recipe.data.source, "--labels", "dynamic"]
    words += ["--teachers.networks", "toynet", "--teachers.recipe", "fast", "--teachers.epochs", 4, "--seeds", 0]
    words += ["--teachers.batch-size", 16, "--teachers.learning-rate", 0.05, "--student.dynamic-epochs", 1]
    code, out, err = tell(*words, *QUICK_STUDENT, *ON_CPU, "--compute.threads", 1)
    assert (code, err) == (0, "")
    assert "dynamic" in out


def test_evaluate_labels_with_the_weights_that_the_set_was_made_with_or_says_how_to_name_others(
    finished: Finished, tell: Told, toynet: str, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["evaluate", finished.directory, "--data.source", finished.recipe.data.source, "--labels", "dynamic"]
    words += ["--student.dynamic-epochs", 1, "--seeds", 0, *QUICK_STUDENT, *ON_CPU, "--compute.precision", "bfloat16"]
    with monkeypatch.context() as patch:  # bfloat16 would train other weights: these are found by their hash
        patch.setenv("STILLROOM_CACHE", str(finished.directory.parent / "cache"))
        patch.setattr(teachers, "fit", lambda *_, **__: pytest.fail("trained another teacher"))
        code, out, err = tell(*words)
    assert (code, err) == (0, "")
    assert "dynamic" in out
    refused(tell(*words), "'toynet' that the set was made with", str(own_cache), "--teachers.networks toynet")
    assert not list(own_cache.iterdir())
    code, out, err = tell(*words, "--teachers.networks", "toynet")
    assert code == 0
    assert err.startswith("not in the cache, and trained before the students: toynet (4 epochs of 96 images")


def test_evaluate_keeps_its_students_out_of_the_set_s_own_directory(
    own_run: Path, finished: Finished, tell: Told, toynet: str
) -> None:
    for place in (own_run, own_run / "distilled"):
        code, _, err = tell("evaluate", own_run, "--data.source", finished.recipe.data.source, "--out", place)
        assert (code, err) == (
            2,
            f"stillroom: --out {place} holds the set itself; give its students a directory of their own\n",
        )


def test_evaluate_asks_for_the_set_s_directory_first(finished: Finished, tell: Told) -> None:
    for words in (["--seeds", 0, finished.directory], ["--data.source", "digits"]):
        code, _, err = tell("evaluate", *words)
        assert (code, err) == (2, "stillroom: name the set's directory first: stillroom evaluate DIR ...\n")


# -- replayed labels, and protocols ------------------------------------------------------------------------------------


def test_evaluate_replays_a_stored_pool_without_teachers_and_makes_another_with_them(
    toy_recipe: Recipe,
    tell: Told,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool, student = PoolConfig(epochs=2, encoding="uint8"), replace(toy_recipe.student, dynamic_epochs=1)
    recipe = replace(toy_recipe, labels=("replayed",), pool=pool, student=student, controls=False, seeds=(0,))
    with Run(tmp_path / "run") as run:
        run_recipe(recipe, run)
    shutil.copytree(tmp_path / "run" / "distilled", tmp_path / "alone")
    stored = {"epochs": 2, "encoding": "uint8", "seed": 0}
    words = ["--data.source", recipe.data.source, "--seeds", 0, "--student.network", "toynet", *ON_CPU]
    words += ["--student.dynamic-epochs", 1]
    with monkeypatch.context() as patch:
        patch.setattr("stillroom.evaluate_command.load_teachers", lambda *_: pytest.fail("teachers are not needed"))
        for folder in (tmp_path / "run", tmp_path / "alone"):  # alone, it says itself what batches it needs
            code, printed, _ = tell("evaluate", folder, *words, "--print-config")
            assert (code, yaml.safe_load(printed)["pool"]) == (0, stored)
            assert yaml.safe_load(printed)["student"]["train"]["batch_size"] == 8
            code, out, err = tell("evaluate", folder, *words, "--labels", "replayed")
            assert (code, err) == (0, "")
            assert "384" in out
        code, _, err = tell("evaluate", tmp_path / "alone", *words, "--student.train.batch-size", 6)
        assert code == 1
        assert "batch_size 6 here, 8 there" in err
        code, out, _ = tell("inspect", tmp_path / "alone")
        assert (code, "labels: replayed, 2 epochs of batches of 8, as uint8; views: 24" in out) == (0, True)
    words += ["--teachers.recipe", "fast", "--teachers.epochs", 4, "--teachers.batch-size", 16]
    words += ["--teachers.learning-rate", 0.05, "--compute.threads", 1, "--labels", "replayed"]
    code, out, err = tell("evaluate", tmp_path / "alone", *words, "--pool.epochs", 3, "--pool.encoding", "float16")
    assert (code, err) == (0, "")
    assert "576" in out  # 3 epochs of 24 rows of 4 classes in float16


def settings_of(told: tuple[int, str, str]) -> dict[str, Any]:
    code, printed, _ = told
    assert code == 0
    return yaml.safe_load(printed)


def test_a_recipe_takes_the_protocol_below_the_file_and_the_flags(
    tell: Told,
    toy_recipe: Recipe,
    tmp_path: Path,
) -> None:
    words = ["run", "toy", "--data.image-size", 8, "--protocol", "unified", "--print-config"]
    plain = settings_of(tell(*words))
    unified = json.loads(json.dumps(asdict(protocol_student("unified", 8))))
    assert plain["student"] == unified
    assert plain["labels"] == ["dynamic"]
    assert plain["teachers"]["networks"] == ["toynet"]  # they make the set
    assert "has labels of resnet18 alone, which is not among the teachers; here all of them label" in tell(*words)[2]
    paper = settings_of(tell("run", "infer-cifar100-ipc10", "--protocol", "unified", "--print-config"))
    assert paper["labelled_by"] == ["resnet18"]
    assert plain["labelled_by"] is None
    theirs = tell("run", "laptop-cifar100-ipc10", *words[4:], "--teachers.networks", "resnet18", "convnet_thin")
    assert settings_of(theirs)["labelled_by"] == ["resnet18"]  # which is among the teachers that the user names
    others = ["--teachers.networks", "mobilenet_v2", "convnet"]
    own = tell("run", "infer-cifar100-ipc10", "--protocol", "unified", *others, "--print-config")
    assert settings_of(own)["labelled_by"] is None
    (tmp_path / "mine.yaml").write_text("student:\n  temperature: 7\n  train: {epochs: 9}\nlabels: [hard]\n")
    changed = settings_of(tell(*words, "--config", tmp_path / "mine.yaml", "--student.train.epochs", 3))
    assert changed["labels"] == ["hard"]
    assert (changed["student"]["temperature"], changed["student"]["train"]["epochs"]) == (7, 3)
    assert changed["student"]["train"] == unified["train"] | {"epochs": 3}
    tiny = settings_of(tell("run", "infer-tiny-imagenet-ipc10", "--protocol", "paper", "--print-config"))
    assert tiny["student"]["train"]["optimizer"] == "sgd"
    code, _, err = tell("run", "toy", "--protocol", "paper", "--print-config")
    assert code == 2
    assert "give --data.image-size" in err


def test_evaluate_takes_students_labels_and_teachers_of_the_protocol_and_names_it_in_its_results(
    tell: Told,
    finished: Finished,
    toynet: str,
    tmp_path: Path,
) -> None:
    words = ["evaluate", finished.directory, "--data.source", finished.recipe.data.source]
    unified = settings_of(tell(*words, "--protocol", "unified", "--print-config"))
    assert unified["student"] == json.loads(json.dumps(asdict(protocol_student("unified", 8))))
    assert unified["labels"] == "dynamic"
    assert unified["teachers"]["networks"] == ["resnet18"]
    laptop = settings_of(tell(*words, "--protocol", "laptop", "--teachers.seed", 3, "--print-config"))
    assert (laptop["labels"], laptop["teachers"]["networks"]) == ("stored", ["toynet"])
    assert laptop["teachers"]["seed"] == 3
    words += [
        "--protocol",
        "laptop",
        "--student.network",
        "toynet",
        "--seeds",
        0,
        *ON_CPU,
        "--student.train.batch-size",
        8,
    ]
    for name, change in (("own", ["--student.train.epochs", 1]),):
        code, out, _ = tell(*words, *change, "--out", tmp_path / name)
        assert code == 0
        assert f"protocol: {name}" in out
        assert json.loads((tmp_path / name / "results.json").read_text())["protocol"] == name


# -- bad input: one clear message, exit code 1, nothing half written ---------------------------------------------------


def refused(told: tuple[int, str, str], *texts: str) -> None:
    code, out, err = told
    assert code == 1
    assert out == ""
    assert err.startswith("stillroom: ")
    assert "Traceback" not in err
    for text in texts:
        assert text in err, err


def test_one_class_is_refused(toy_recipe: Recipe, tell: Told, tmp_path: Path) -> None:
    zeros = {"train_labels": np.zeros(96, np.int64), "test_labels": np.zeros(40, np.int64)}
    npz = write_toy_npz(tmp_path / "one.npz", **zeros, class_names=np.array(["all"]))
    refused(tell("run", "toy", "--data.source", npz), "class")


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (["--ipc", "40"], ("class 'red' has 24 training images", "ipc 40", "needs 32", "lower --ipc")),
        (["--ipc", "1"], ("ipc 1 is too small for INFER", "smallest that works is --ipc 2")),
        (["--teachers.networks", "convnet_in"], ("'convnet_in' has no BatchNorm layers", "use a network that has")),
        (["--teachers.networks", "toynet", "toynet"], ("names 'toynet' twice",)),
        (["--data.source", "missing"], ("--data.source missing is no existing path",)),
        (["--data.image-size", "16"], ("16",)),
    ],
)
def test_what_cannot_work_is_refused_before_work_and_the_mended_command_is_not(
    toy_recipe: Recipe, tell: Told, tmp_path: Path, own_cache: Path, words: list[str], texts: tuple[str, ...]
) -> None:
    refused(tell("distill", "toy", "--out", tmp_path / "run", *words), *texts)
    assert not list(own_cache.iterdir())
    code, _, err = tell("squeeze", "toy", "--out", tmp_path / "run", "--teachers.epochs", 4)
    assert code == 0, err


def test_a_run_directory_with_another_configuration_is_refused_and_the_fields_shown(
    finished: Finished, own_run: Path, tell: Told, toynet: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "toy", finished.recipe)
    told = tell("run", "toy", "--out", own_run, "--ipc", 5, "--infer.steps", 9)
    refused(told, "ipc: 4 there, 5 now", "infer.steps: 4 there, 9 now", "--out")
    assert "student" not in told[2]


@pytest.mark.parametrize("role", ["images", "compensators", "labels", "manifest", "README"])
def test_one_flipped_byte_is_found_by_every_command_that_reads_the_set(
    finished: Finished, own_run: Path, tell: Told, toynet: str, role: str
) -> None:
    (path,) = (own_run / "distilled").glob(f"{role}*")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    refused(tell("verify", own_run), path.name)
    refused(tell("inspect", own_run), path.name)
    refused(tell("evaluate", own_run, "--data.source", finished.recipe.data.source), path.name)


def test_a_missing_file_of_the_set_is_named(own_run: Path, tell: Told) -> None:
    (path,) = (own_run / "distilled").glob("compensators*")
    path.unlink()
    refused(tell("verify", own_run), path.name, "missing")


def test_data_with_another_order_of_classes_is_refused(
    finished: Finished, tell: Told, toynet: str, tmp_path: Path
) -> None:
    npz = write_toy_npz(tmp_path / "toy.npz", class_names=np.array(TOY_COLOURS[::-1]))
    words = ["evaluate", finished.directory, "--data.source", npz, "--out", tmp_path / "students", *ON_CPU]
    refused(tell(*words), "another order", "label 0 is 'red' in the set and 'süd/ost' in the data")
    assert not (tmp_path / "students" / "config.json").exists()


def test_a_full_disk_is_told_and_what_was_there_stays(
    finished: Finished, own_run: Path, tell: Told, toynet: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stillroom import files

    (own_run / "results.json").unlink()
    monkeypatch.setitem(RECIPES, "toy", finished.recipe)
    monkeypatch.setenv("STILLROOM_CACHE", str(finished.directory.parent / "cache"))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        refused(tell("run", "toy", "--out", own_run), "disk is full", "results.json")
    assert not (own_run / "results.json").exists()
    assert tell("run", "toy", "--out", own_run)[0] == 0
