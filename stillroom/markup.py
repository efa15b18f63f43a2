"""Tables of texts as Markdown, LaTeX or CSV, every text escaped."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

Rows = Sequence[Sequence[str]]

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
}  # fmt: skip

_NUMERIC = re.compile(r"[-+]?[\d,.]+\b|-?$")  # a cell that begins with a number, or has none
_MINUS = re.compile(r"(?<![\w-])-(?=\d)")


def to_markdown(header: Sequence[str], rows: Rows, caption: str = "") -> str:
    """Return a pipe table, as GitHub and most readers of Markdown know it, and the caption below it."""
    cells = [[one_line(text).replace("|", r"\|") for text in row] for row in (header, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return (
        "\n".join([lines[0], f"| {' | '.join('---' for _ in header)} |", *lines[1:]])
        + "\n"
        + (f"\n{one_line(caption)}\n" if caption else "")
    )


def to_latex(header: Sequence[str], rows: Rows, caption: str = "") -> str:
    """Return a tabular with booktabs' rules (``\\usepackage{booktabs}``), every text escaped, numbers to the right.

    The caption stands before it, as a comment.
    """
    lines = [" & ".join(_escape(one_line(text)) for text in row) for row in (header, *rows)]
    head, *body = [f"{line} \\\\" for line in lines]
    columns = "".join("r" if all(_NUMERIC.match(cell) for cell in cells) else "l" for cells in zip(*rows, strict=True))
    begin, end = f"\\begin{{tabular}}{{{columns or 'l' * len(header)}}}", "\\end{tabular}"
    begin = f"% {one_line(caption)}\n% \\usepackage{{booktabs}}\n{begin}" if caption else begin
    return "\n".join([begin, "\\toprule", head, "\\midrule", *body, "\\bottomrule", end]) + "\n"


def to_csv(header: Sequence[str], rows: Rows) -> str:
    """Return comma-separated values with quotes where they are needed."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def _escape(text: str) -> str:
    return _MINUS.sub("$-$", "".join(_LATEX.get(c, c) for c in text))


def one_line(text: str) -> str:
    """Return a text without line breaks."""
    return " ".join(text.split())
