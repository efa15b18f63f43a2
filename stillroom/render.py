"""A comparison's results as a table of texts, and such tables as Markdown, LaTeX or CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

Rows = Sequence[Sequence[str]]

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
}  # fmt: skip

_NUMERIC = re.compile(r"[-+]?[\d,.]+\b|-?$")  # a cell that begins with a number, or has none
_MINUS = re.compile(r"(?<![\w-])-(?=\d)")


def to_markdown(header: Sequence[str], rows: Rows, caption: str = "") -> str:
    """Return a pipe table, as GitHub and most readers of Markdown know it, and the caption below it."""
    cells = [[_plain(text).replace("|", r"\|") for text in row] for row in (header, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return (
        "\n".join([lines[0], f"| {' | '.join('---' for _ in header)} |", *lines[1:]])
        + "\n"
        + (f"\n{_plain(caption)}\n" if caption else "")
    )


def to_latex(header: Sequence[str], rows: Rows, caption: str = "") -> str:
    """Return a tabular with booktabs' rules (``\\usepackage{booktabs}``), every text escaped, numbers to the right.

    The caption stands before it, as a comment.
    """
    lines = [" & ".join(_escape(_plain(text)) for text in row) for row in (header, *rows)]
    head, *body = [f"{line} \\\\" for line in lines]
    columns = "".join("r" if all(_NUMERIC.match(cell) for cell in cells) else "l" for cells in zip(*rows, strict=True))
    begin, end = f"\\begin{{tabular}}{{{columns or 'l' * len(header)}}}", "\\end{tabular}"
    begin = f"% {_plain(caption)}\n% \\usepackage{{booktabs}}\n{begin}" if caption else begin
    return "\n".join([begin, "\\toprule", head, "\\midrule", *body, "\\bottomrule", end]) + "\n"


def to_csv(header: Sequence[str], rows: Rows) -> str:
    """Return comma-separated values with quotes where they are needed."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


FORMATS: dict[str, Callable[[Sequence[str], Rows, str], str]] = {"md": to_markdown, "tex": to_latex}


def _escape(text: str) -> str:
    return _MINUS.sub("$-$", "".join(_LATEX.get(c, c) for c in text))


def _plain(text: str) -> str:
    return " ".join(text.split())


def caption_of(results: dict[str, Any]) -> str:
    """Return what a comparison's table is of, in a few sentences."""
    seeds = len(results["seeds"])
    spread = (
        "mean ± standard deviation of students on one draw of each set, differences paired by seed"
        if seeds > 1
        else "no spread"
    )
    known = ", ".join(f"{name} {top['top1']:.1f} %" for name, top in results["teachers"].items())
    return (
        f"{results['dataset']['name']}, top-1 in % of the last epoch on the test split, {seeds} "
        f"seed{'s' if seeds > 1 else ''}: {spread}; protocol: {results['protocol'] or 'none'}; budgets by "
        f"{results['budget']}. "
        "Differences are to random images (with hard labels, with the same labels), to the method's naturals alone and "
        "to the same set with hard labels." + (f" Teachers: {known}." if known else "")
    )


# Columns of differences: the control's set, with the row's labels where it names none, and its budget of steps.
CONTROLS = {
    f"vs {control}, {budget}": (control, budget)
    for control in ("random + hard", "random", "naturals")
    for budget in ("equal epochs", "equal steps")
}

SCORES = ("LRS", "ARS", "HLR", "IOR")


def table_of(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a comparison's table as texts; `caption_of` says what the numbers are."""
    scored = any("scores" in row or "scores" in row.get("failed", {}) for row in results["rows"])
    several = ", " in results["protocol"]  # then it stands in every row
    header = [
        "method", "ipc", "labels", "student", "steps", "top-1", *CONTROLS, "vs its hard labels", "paper",
        "images a class", "images, bytes", "compensators, bytes", "labels, bytes",
        "ratio by bytes", "ratio as the paper", "distil s", "train s",
        "duplication", *(("protocol",) if several else ()), *(SCORES if scored else ()),
    ]  # fmt: skip
    rows = []
    for row in results["rows"]:
        ipc = str(row["ipc"]) if row["ipc"] == row["matched_ipc"] else f"{row['ipc']} (as bytes: {row['matched_ipc']})"
        if "byte_budget" in row:
            ipc += f", {sum(row['bytes']['raw'].values()) / row['byte_budget']:.0%} of the bytes"
        first = [row["method"], ipc, row["labels"], row["student"]]
        if "error" in row:
            rows.append([*first, "failed: " + row["error"], *[""] * (len(header) - 5)])
            continue
        names = [
            f"{control if '+' in control else f'{control} + ' + row['labels']}, {budget}"
            for control, budget in CONTROLS.values()
        ]
        lost = row.get("failed", {})
        differences = [
            "failed" if {n, "controls"} & lost.keys() else _spread(row["differences"].get(n), "+") for n in names
        ]
        size, scores = row["bytes"]["raw"], row.get("scores", {})
        labels = f"{size['labels']:,}"
        if row["labels"] == "dynamic":  # made by the teachers as they are needed
            labels = f"0 ({row['dynamic_label_bytes']:,} if stored)"
        distil = row["seconds"]["distil"]
        rows.append([
            *first, f"{row['steps']:,}", _spread([row["mean"], row["std"]]), *differences,
            _spread(row.get("over_hard"), "+"), _spread(row["paper"]),
            f"{row['holds']['images_per_class']:g}", f"{size['images']:,}", f"{size['compensators']:,}", labels,
            *(f"{100 * row['bytes'][ratio]:.2f} %" for ratio in ("raw_ratio", "paper_ratio")),
            "-" if distil is None else f"{distil:.0f}", f"{row['seconds']['train']:.0f}",
            "-" if row["duplication"] is None else f"{row['duplication']:.3f}",
            *((row["protocol"],) if several else ()), *(_show_scores(scores, lost) if scored else ()),
        ])  # fmt: skip
    return header, rows


def _show_scores(scores: dict[str, float], lost: dict[str, str]) -> list[str]:
    return [f"{scores[name]:.3f}" if name in scores else "failed" if "scores" in lost else "-" for name in SCORES]


def records_of(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a comparison for machines: a plain number a column, empty where there is none.

    Nested keys are joined by dots; means and deviations stand apart; each seed has a column of its own.
    """
    rows = [_flatten(row, results["seeds"]) for row in results["rows"]]
    header = list(dict.fromkeys(key for row in rows for key in row))
    return header, [[str(row.get(key, "")) for key in header] for row in rows]


def _flatten(row: dict[str, Any], seeds: Sequence[int], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= _flatten(value, seeds, f"{name}.")
        elif name in ("top1", "top5"):
            flat |= {f"{name}.seed{seed}": each for seed, each in zip(seeds, value, strict=True)}
        elif isinstance(value, list | tuple):
            flat |= {f"{name}.mean": value[0], f"{name}.std": value[1]}
        else:
            flat[name] = value
    return {name: value for name, value in flat.items() if value is not None}


def _spread(numbers: Sequence[float | None] | None, sign: str = "") -> str:
    """Return "mean ± deviation", without one that is not known."""
    if numbers is None or numbers[0] is None:
        return "-"
    mean = f"{round(numbers[0], 1) + 0.0:{sign}.1f}"  # no -0.0
    return mean if numbers[1] is None else f"{mean} ± {numbers[1]:.1f}"
