"""Settings: files that say in one line what is wrong with them, and durations as people write them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.errors import StillroomError
from stillroom.evaluate_command import NO_SETTINGS, EvaluateCommand
from stillroom.methods import METHODS, MethodName
from stillroom.methods.infer import InferConfig
from stillroom.recipes import Recipe, find_recipe
from stillroom.settings import parse_duration, read_config, to_yaml
from stillroom.teachers import TeachersConfig

EVALUATE = EvaluateCommand(Path("set"))


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(content: str, defaults: Any = None, without: tuple[str, ...] = ()) -> Any:
    """The settings that a file with this content gives, over those of a bare recipe."""
    Path("mine.yaml").write_text(content)
    return read_config(["small", "--config", "mine.yaml"], Recipe() if defaults is None else defaults, without)


def refusal(content: str) -> str:
    with pytest.raises(StillroomError) as refused:
        read(content)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def leaves(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of every setting that is no section."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        elif field.name not in NO_SETTINGS:
            yield f"{prefix}{field.name}", value


def nested(key: str, text: str) -> str:
    """YAML of one setting, a section to a line."""
    *sections, name = key.split(".")
    lines = ["  " * depth + f"{part}:" for depth, part in enumerate(sections)]
    return "\n".join([*lines, "  " * len(sections) + f"{name}: {text}"])


def value_of(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = getattr(settings, part)
    return settings


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("ipcs: 5", "line 1, has an unknown key ipcs. Did you mean 'ipc'?"),
        (
            "ipc: 5\nstudent:\n  train:\n    epocs: 3",
            "line 4, has an unknown key student.train.epocs. Did you mean 'epochs'?",
        ),
        ("infer: {step: 3}", "line 1, has an unknown key infer.step. Did you mean 'steps'?"),
        ("qqq: 1", "line 1, has an unknown key qqq. Choose from: cda, compute, controls, data,"),
        ("out: runs/mine", "line 1, has an unknown key out."),
        ("? [a, b]\n: 1", "line 1, has an unknown key"),
        ("ipc: 5\nseeds: [1]\nipc: 6", "line 3, has the key ipc a second time; keep one"),
    ],
)
def test_an_unknown_key_is_named_with_its_file_its_line_and_the_nearest_key(content: str, text: str) -> None:
    assert refusal(content).startswith(f"--config 'mine.yaml', {text}")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("student: resnet18", "line 1: student is 'resnet18'; give a section with any of the keys network, train,"),
        ("seeds: [0]\nstudent:\n  train: [1]", "line 3: student.train is [1]; give a section with any of the keys"),
        ("ipc: {a: 1}", "line 1: ipc is a section; give a whole number"),
        ("seeds: {a: 1}", "line 1: seeds is a section; give a list, each a whole number"),
        ("ipc: [5]", "line 1: ipc is [5]; give a whole number"),
    ],
)
def test_a_section_for_a_value_and_a_value_for_a_section_are_refused(content: str, text: str) -> None:
    assert refusal(content).startswith(f"--config 'mine.yaml', {text}")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("student:\n  train:\n    epochs: many", "line 3: student.train.epochs is 'many'; give a whole number"),
        ("ipc: 2.5", "line 1: ipc is '2.5'; give a whole number"),
        ("ipc: true", "line 1: ipc is 'true'; give a whole number"),
        ("ipc: null", "line 1: ipc is null; give a whole number"),
        ("teachers: {epochs: few}", "line 1: teachers.epochs is 'few'; give a whole number, or null"),
        ("infer: {learning_rate: high}", "line 1: infer.learning_rate is 'high'; give a number"),
        ("infer: {betas: [0.5]}", "line 1: infer.betas is [0.5]; give a list of 2, each a number"),
        ("infer: {compensator_bits: 4}", "line 1: infer.compensator_bits is '4'; give 16 or 8"),
        ("controls: 1", "line 1: controls is '1'; give true or false"),
        ("data: {root: }", "line 1: data.root is null; give text"),
        (
            "labels: [hard, soft]",
            "line 1: labels is [hard, soft]; give a list, each hard, static, replayed, dynamic or learned",
        ),
        ("seeds: &a [0, *a]", "line 1: seeds is [0, ...]; give a list, each a whole number"),
    ],
)
def test_a_value_of_another_type_is_named_with_its_key_and_what_is_expected(content: str, text: str) -> None:
    assert refusal(content) == f"--config 'mine.yaml', {text}"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("ipc: 0", "--config 'mine.yaml': ipc is 0; give 1 or more"),
        ("student: {train: {epochs: 0}}", "--config 'mine.yaml': train.epochs is 0; give 1 or more"),
        ("seeds: []", "--config 'mine.yaml': seeds is empty"),
        ("just text", "--config 'mine.yaml' holds 'just text', not settings; see --print-config"),
        ("- 1", "--config 'mine.yaml' holds [1], not settings; see --print-config"),
        ("ipc: [", "--config 'mine.yaml' cannot be read as YAML: "),
        ("ipc: 1\n---\nipc: 2", "--config 'mine.yaml' cannot be read as YAML: "),
        ("[" * 5000, "--config 'mine.yaml' cannot be read as YAML: "),
    ],
)
def test_what_the_settings_themselves_refuse_names_the_file_too(content: str, text: str) -> None:
    assert refusal(content).startswith(text)


@pytest.mark.parametrize("defaults", [Recipe(), EVALUATE])
def test_every_setting_can_stand_in_a_file_and_says_there_what_it_expects(defaults: Any) -> None:
    keys = dict(leaves(defaults))
    assert len(keys) > 40
    printed = to_yaml(defaults, NO_SETTINGS)
    assert read(printed, defaults, NO_SETTINGS) == defaults
    for key in keys:
        with pytest.raises(StillroomError, match=rf"line \d: {re.escape(key)} is a section; give "):
            read(nested(key, "{a: 1}"), defaults, NO_SETTINGS)


def test_null_in_a_file_takes_a_value_away_and_is_printed_as_null() -> None:
    base = find_recipe("small")
    assert base.teachers.epochs == 10
    for word in ("null", "~", "", "None"):
        settings = read(f"teachers: {{epochs: {word}}}", base)
        assert settings == replace(base, teachers=replace(base.teachers, epochs=None))
        assert "epochs: null" in to_yaml(settings)
        assert read(to_yaml(settings), base) == settings


def test_the_type_of_a_setting_decides_how_its_text_is_read() -> None:
    """YAML takes on for true, 1e-3 for text, 0123 for an octal number, and quoted numbers for text."""
    settings = read(
        "data: {source: 0123, flip: on, memory-limit-gib: 4}\ncompute: {compile: off}\ninfer: {learning_rate: 1e-3}\n"
        "ipc: '7'\ncontrols: no\nlabels: hard\nstudent:\nteachers: {networks: resnet18}\n"
    )
    assert (settings.data.source, settings.data.flip, settings.data.memory_limit_gib) == ("0123", "on", 4.0)
    assert (settings.compute.compile, settings.infer) == ("off", InferConfig(learning_rate=1e-3))
    assert (settings.ipc, settings.controls, settings.labels) == (7, False, ("hard",))
    assert (settings.student, settings.teachers) == (Recipe().student, TeachersConfig(("resnet18",)))


def test_an_empty_file_and_no_file_change_nothing() -> None:
    assert read("# nothing yet\n") == Recipe()
    for words in (["small"], ["small", "--config"], []):
        assert read_config(words, Recipe()) == Recipe()
    assert read_config(["--config=mine.yaml"], Recipe()) == Recipe()
    with pytest.raises(StillroomError, match=r"--config 'gone\.yaml' does not exist; --print-config writes"):
        read_config(["--config=mine.yaml", "--config", "gone.yaml"], Recipe())


# -- durations ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 99), st.integers(1, 59), st.integers(1, 59))
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
    if re.fullmatch(r"\s*(\d+h)?(\d+m)?(\d+s?)?\s*", text) and re.search(r"[^\D0]", text):
        assert (parse_duration(text) or 0) > 0
    elif "." not in text:
        with pytest.raises(StillroomError, match="give a time such as 90s"):
            parse_duration(text)
    assert parse_duration(None) is None


def test_the_choice_of_method_names_every_method_that_there_is() -> None:
    assert get_args(MethodName) == tuple(METHODS)


def test_every_method_with_settings_has_its_section_of_a_recipe() -> None:
    """Without it a method would run, by its defaults, and nothing could change them."""
    sections = {section.name: section.default_factory for section in fields(Recipe)}
    with_settings = {name: method.config for name, method in METHODS.items() if fields(method.config)}
    assert {name: sections.get(name) for name in with_settings} == with_settings
