"""Docstrings as this code writes them, in plain text, made into reStructuredText: only `names` are markup.

A dataclass is followed by its fields, each with its default and the comment or docstring that stands by it.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from typing import Any

from sphinx.application import Sphinx


def to_rst(lines: list[str]) -> list[str]:
    """Plain lines as reStructuredText: `names` become literals, indented paragraphs code, the rest stays as it is."""
    found: list[str] = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines)):
        if not paragraph.strip():
            continue
        if all(line.startswith("    ") for line in paragraph.splitlines()):
            found += ["::", "", *paragraph.splitlines(), ""]
        else:
            found += [*escape(" ".join(line.strip() for line in paragraph.splitlines())).splitlines(), ""]
    return found


def escape(text: str) -> str:
    """One paragraph of plain text as reStructuredText."""
    pieces = re.split(r"``?([^`]+)``?", text)  # every second one stood between backticks
    # A literal must end before a space or punctuation; the escaped space after it is not shown.
    return "".join(
        rf"\ ``{piece}``\ " if i % 2 else re.sub(r"([\\*_|])", r"\\\1", piece) for i, piece in enumerate(pieces)
    ).strip()


def read_fields(kind: type) -> dict[str, tuple[str, str]]:
    """The fields that a dataclass's own source names: by name its default, as written, and what is said of it."""
    source = textwrap.dedent(inspect.getsource(kind))
    lines, body = source.splitlines(), ast.parse(source).body[0].body  # type: ignore[attr-defined]
    found = {}
    for statement, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        said = [comment for line in lines[statement.lineno - 1 : statement.end_lineno] if (comment := _comment(line))]
        above = statement.lineno - 2
        while lines[above].strip().startswith("#"):
            said.insert(0, lines[above].strip().lstrip("# "))
            above -= 1
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            said.append(" ".join(str(after.value.value).split()))
        default = "" if statement.value is None else ast.unparse(statement.value)
        found[statement.target.id] = (default, " ".join(said))
    return found


def _comment(line: str) -> str:
    return line.partition("  # ")[2]


def describe_fields(kind: type) -> list[str]:
    """The fields of a dataclass as a list in reStructuredText."""
    found = []
    for name, (default, said) in read_fields(kind).items():
        default = f" = ``{default}``" if default else ""
        found.append(f"* ``{name}``{default}{': ' + escape(said) if said else ''}")
    return [*found, ""]


def translate(app: Sphinx, what: str, name: str, of: Any, options: Any, lines: list[str]) -> None:
    """Sphinx's event: `lines`, a docstring, are changed in place."""
    lines[:] = to_rst(lines)
    if what == "class" and dataclasses.is_dataclass(of) and isinstance(of, type):
        lines += describe_fields(of)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", translate)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
