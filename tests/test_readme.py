"""The README is true: its Python runs as shown, its commands are understood, its file tree is the one there is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RECIPE, commands_of, fenced, resolved, understand

import stillroom

PACKAGE = Path(stillroom.__file__).parent
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def read_tree(text: str) -> set[str]:
    """The files that a tree of indented names lists, as paths below its first line."""
    files, folder = set(), ""
    for line in text.splitlines()[1:]:
        indent = len(line) - len(line.lstrip())
        if line.lstrip().startswith("#") or not line.strip():
            continue
        name = line.split()[0]
        if indent == 4:
            folder = name if name.endswith("/") else ""
        if not name.endswith("/"):
            files.add(folder + name)
    return files


def test_the_file_tree_names_exactly_the_files_there_are() -> None:
    (tree,) = (block for block in fenced(README, "text") if block.startswith("stillroom/\n"))
    named = read_tree(tree)
    there = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    # A folder's own __init__.py is what the tree says of the folder.
    assert named == {path for path in there if path == "__init__.py" or not path.endswith("/__init__.py")}


def test_a_tree_is_read_with_its_folders() -> None:
    assert read_tree("stillroom/\n    a.py  A\n    # words\n    f/  F\n        b.py  B\n    c.py\n") == {
        "a.py", "f/b.py", "c.py",
    }  # fmt: skip


def test_the_readme_shows_commands() -> None:
    assert len(commands_of(README)) >= 20


@pytest.mark.parametrize("line", [line for line in commands_of(README) if not RECIPE.search(line)])
def test_every_other_command_of_the_readme_is_understood(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    understand(line, monkeypatch)


@pytest.mark.parametrize("line", [line for line in commands_of(README) if RECIPE.search(line)])
def test_every_command_of_the_readme_is_understood(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "ipc: 10" in resolved(line, capsys)


def test_the_example_is_the_one_in_the_package() -> None:
    """Six lines, the same in both places."""
    (shown,) = (block for block in fenced(README, "python") if "stillroom.distill(" in block)
    statements = [line for line in shown.splitlines() if line.strip()]
    assert len(statements) == 6
    for line in statements:
        assert line in str(stillroom.__doc__)


def test_every_public_name_is_there_and_no_module_shares_it() -> None:
    assert all(callable(getattr(stillroom, name)) for name in stillroom.__all__)
    assert set(stillroom.__all__) <= set(dir(stillroom))
    assert not set(stillroom.__all__) & {path.stem for path in Path(stillroom.__file__).parent.iterdir()}


def test_every_file_that_the_documents_and_comments_name_is_there() -> None:
    texts = [ROOT / "README.md", ROOT / "docs" / "log.md"]
    texts += [*(ROOT / "stillroom").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    named = {
        (text.name, found)
        for text in texts
        for found in re.findall(r"\b(?:docs|benchmarks|tests)/[\w./-]+\.(?:json|md|py)\b", text.read_text())
    }
    assert len(named) > 10
    assert [(text, path) for text, path in sorted(named) if not (ROOT / path).exists()] == []


@pytest.mark.slow
def test_every_python_block_runs_as_shown(tmp_path: Path) -> None:
    shown = ""
    for block in fenced(README, "python"):
        (tmp_path / "example.py").write_text(block)
        done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        shown += done.stdout
    assert re.search(r"convnet_thin, static labels: \d+\.\d% ± \d+\.\d% over 3 seeds", shown)
