"""The site is true: its commands are understood, its equations lead to functions, its pages run what they show."""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RECIPE, commands_of, resolved, understand

import stillroom
from stillroom.data import DataConfig
from stillroom.methods.infer import InferConfig

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))
plain_docstrings = importlib.import_module("plain_docstrings")

PAGES = sorted(DOCS.glob("*.md"))


def commands() -> list[str]:
    return sorted({line for page in PAGES for line in commands_of(page.read_text())})


def test_the_pages_show_commands() -> None:
    assert len(commands()) >= 16


@pytest.mark.parametrize("line", [line for line in commands() if not RECIPE.search(line)])
def test_every_other_command_of_the_pages_is_understood(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    understand(line, monkeypatch)


@pytest.mark.parametrize("line", [line for line in commands() if RECIPE.search(line)])
def test_every_command_of_the_pages_is_understood(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "ipc: " in resolved(line, capsys)


def resolve(name: str) -> object:
    """What a dotted name below `stillroom` stands for; AttributeError where it is nothing."""
    words = name.split(".")
    for end in range(len(words) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(words[:end]))
        except ModuleNotFoundError:
            continue
        for word in words[end:]:
            found = getattr(found, word)
        return found
    raise AttributeError(name)


def test_every_name_that_a_page_links_to_is_there_and_in_the_reference() -> None:
    reference = (DOCS / "api.md").read_text()
    shown = set(re.findall(r"^\.\. auto\w+:: ([\w.]+)$", reference, re.M))
    shown |= {
        f"{owner}.{member}"
        for owner, members in re.findall(r"^\.\. autoclass:: ([\w.]+)\n   :members: (.*)$", reference, re.M)
        for member in members.split(", ")
    }
    linked = {name for page in PAGES for name in re.findall(r"\{py:\w+\}`([\w.]+)`", page.read_text())}
    assert len(linked) > 30
    assert linked - shown == set()
    assert all(resolve(name) is not None for name in shown)


def test_a_name_that_is_not_there_is_not_resolved() -> None:
    with pytest.raises(AttributeError):
        resolve("stillroom.methods.infer.no_such_function")


def test_every_public_name_is_in_the_reference() -> None:
    reference = (DOCS / "api.md").read_text()
    assert [name for name in stillroom.__all__ if f":: stillroom.{name}\n" not in reference] == []


def test_every_page_is_on_the_way_from_the_first() -> None:
    named = re.findall(r"^[a-z-]+$", (DOCS / "index.md").read_text(), re.M)
    assert sorted({*named, "index"}) == [page.stem for page in PAGES]


def test_every_result_is_on_the_page_of_results() -> None:
    page = (DOCS / "results.md").read_text()
    assert [path.name for path in (DOCS / "results").glob("*.json") if f"(results/{path.name})" not in page] == []


@pytest.mark.parametrize(
    ("plain", "rst"),
    [
        ("the best * of all_ |x|", r"the best \* of all\_ \|x\|"),
        ("see `view_table`, or ``a * b``.", r"see \ ``view_table``\ , or \ ``a * b``\ ."),
        ("one\ntwo", "one two"),
    ],
)
def test_nothing_in_a_docstring_is_markup_but_names(plain: str, rst: str) -> None:
    assert plain_docstrings.to_rst(plain.splitlines()) == [rst, ""]


def test_indented_lines_of_a_docstring_are_code() -> None:
    found = plain_docstrings.to_rst(["words", "", "    a = b_", "    c", "", "more"])
    assert found == ["words", "", "::", "", "    a = b_", "    c", "", "more", ""]


@pytest.mark.parametrize("kind", [InferConfig, DataConfig])
def test_every_setting_is_shown_with_its_default_and_what_is_said_of_it(kind: type) -> None:
    shown = plain_docstrings.read_fields(kind)
    assert list(shown) == [field.name for field in dataclasses.fields(kind)]
    if kind is InferConfig:
        assert shown["shift_limit"] == ("4", "pixels")
    else:
        assert shown["download"] == ("False", "Download cifar10 or cifar100 into `root` when it is not there.")


def build(folder: Path, page: str) -> subprocess.CompletedProcess[str]:
    """Build a site of one page that runs what it shows."""
    settings = f"import sys\nsys.path.insert(0, {str(DOCS)!r})\nextensions = ['myst_parser', 'executed']\n"
    (folder / "conf.py").write_text(settings + "exclude_patterns = ['_executed']\n")
    (folder / "index.md").write_text(page)
    command = [sys.executable, "-m", "sphinx", "-W", "-q", str(folder), str(folder / "html")]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_blocks_of_a_page_are_one_program_shown_with_what_it_prints(tmp_path: Path) -> None:
    first = "```{executed}\nfrom pathlib import Path\nanswer = 6 * 7\n```\n"
    second = "```{executed}\nPath('kept').touch()\nprint('the answer is', answer + 958)\n```\n"
    done = build(tmp_path, f"# Page\n\n{first}\n{second}")
    assert done.returncode == 0, done.stderr
    assert "the answer is 1000" in (tmp_path / "html" / "index.html").read_text()
    assert (tmp_path / "_executed" / "index" / "kept").exists()


def test_code_that_fails_fails_the_build_by_its_page_and_line(tmp_path: Path) -> None:
    done = build(tmp_path, "# Page\n\n```{executed}\nraise ValueError('of no use')\n```\n")
    assert done.returncode != 0
    assert "index, line 3: the code failed" in done.stderr
    assert "of no use" in done.stderr
