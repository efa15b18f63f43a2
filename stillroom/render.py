"""A comparison's results as tables of texts, each column explained: for terminals, pages, papers and machines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stillroom.markup import one_line, to_latex, to_markdown


def caption_of(results: dict[str, Any]) -> str:
    """Return what a comparison's table is of, in a few sentences."""
    seeds = len(results["seeds"])
    spread = (
        "mean ± standard deviation of students on one draw of each set, differences paired by seed"
        if seeds > 1
        else "no spread"
    )
    networks = dict.fromkeys(row["student"] for row in results["rows"])
    known = ", ".join(f"{name} {top['top1']:.1f} %" for name, top in results["teachers"].items())
    whole = ", ".join(
        f"{name} {100 * reached:.1f} %"
        for name, reached in results.get("real", {}).items()
        if not isinstance(reached, str)
    )
    return (
        f"{results['dataset']['name']}, top-1 in % of the last epoch on the test split, {seeds} "
        f"seed{'s' if seeds > 1 else ''}: {spread}; students: {', '.join(networks)}; protocol: "
        f"{results['protocol'] or 'none'}; budgets by {results['budget']}."
        + (f" Teachers: {known}." if known else "")
        + (f" On all {results['dataset']['train']:,} real images, trained as teachers are: {whole}." if whole else "")
    )


# -- columns -------------------------------------------------------------------------------------------------------

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of the table: its name, what it says, and a row's text in it."""

    name: str
    what: str
    show: Callable[[Row], str]


def _size(part: str) -> Callable[[Row], str]:
    return lambda row: f"{row['bytes']['raw'][part]:,}"


def _share(ratio: str) -> Callable[[Row], str]:
    return lambda row: f"{100 * row['bytes'][ratio]:.2f} %"


def _show_ipc(row: Row) -> str:
    return str(row["ipc"]) if row["ipc"] == row["matched_ipc"] else f"{row['ipc']} (as bytes: {row['matched_ipc']})"


def _show_byte_budget(row: Row) -> str:
    if "byte_budget" not in row:
        return "-"
    return f"{sum(row['bytes']['raw'].values()) / row['byte_budget']:.0%} of {row['byte_budget']:,}"


def _show_seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"


def _show_label_bytes(row: Row) -> str:
    if row["labels"] == "dynamic":  # made by the teachers as they are needed
        return f"0 ({row['dynamic_label_bytes']:,} if stored)"
    return _size("labels")(row)


def _of_control(control: str, budget: str, key: str, sign: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        name = f"{control if '+' in control else f'{control} + ' + row['labels']}, {budget}"
        lost = {name, "controls"} & row.get("failed", {}).keys()
        return "failed" if lost else _spread(row.get(key, {}).get(name), sign)

    return show


def _of_score(name: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        lost = "failed" if "scores" in row.get("failed", {}) else "-"
        return f"{row['scores'][name]:.3f}" if name in row.get("scores", {}) else lost

    return show


FIRST = (
    Column(
        "method",
        "what made the set, by the settings named; set:FOLDER is one that was there already",
        lambda row: row["method"],
    ),
    Column(
        "ipc",
        "the budget: images per class, of random images too; of set:FOLDER its own. Where bytes are the budget: random "
        "images per class, whose bytes it is, and in brackets the ipc of the set that has as many",
        _show_ipc,
    ),
    Column(
        "labels",
        "hard: classes. static: logits of this table's teachers, stored once for every view. replayed: theirs on "
        "augmented batches, stored for some epochs. dynamic: theirs on every augmented batch. learned: the method's. "
        "Of a set with 'its own labels' they are those that it came with, and its random images have this table's",
        lambda row: row["labels"],
    ),
    Column("student", "network that is trained on the set alone", lambda row: row["student"]),
)

_CONTROLS = {
    "random + hard": "random real images, ipc a class, with hard labels",
    "random": "the same random images with the row's labels",
    "naturals": "the set's own images without compensators, with the row's labels",
}
_BUDGETS = {
    "equal epochs": "as many epochs as the row's student",
    "equal steps": "as many optimiser steps as the row's student",
}
# Columns of differences: the control's set, with the row's labels where it names none, and its budget of steps.
CONTROLS = {
    f"vs {control}, {budget}": (control, budget) for control in _CONTROLS for budget in ("equal epochs", "equal steps")
}

PARTS: dict[str, tuple[Column, ...]] = {
    "Accuracy, top-1 in %": (
        Column("steps", "optimiser steps of a student", lambda row: f"{row['steps']:,}"),
        Column(
            "top-1",
            "accuracy in % on the real test split after the last epoch, mean ± standard deviation over students' seeds",
            lambda row: _spread([row["mean"], row["std"]]),
        ),
        Column(
            "vs its hard labels", "top-1 less that of the same set with hard labels; paired by seed",
            lambda row: _spread(row.get("over_hard"), "+"),
        ),
        Column("paper", "what is published for this very cell, where it is one", lambda row: _spread(row["paper"])),
        Column(
            "protocol", "how students are trained, by name; own: by settings of this run",
            lambda row: row.get("protocol", "-"),
        ),
    ),
    "What its controls reach, top-1 in %": tuple(
        Column(
            f"{control}, {budget}",
            f"{_CONTROLS[control]}, trained for {_BUDGETS[budget]}",
            _of_control(control, budget, "controls", ""),
        )
        for control, budget in CONTROLS.values()
    ),
    "Ahead of its controls, in points of top-1": tuple(
        Column(name, f"top-1 less that of {_CONTROLS[pair[0]]}, {pair[1]}; paired by seed",
               _of_control(*pair, "differences", "+"))
        for name, pair in CONTROLS.items()
    ),
    "What it holds and costs": (
        Column(
            "images a class", "images that the set holds, over its classes; compensators apart",
            lambda row: f"{row['holds']['images_per_class']:g}" if "holds" in row else "-",
        ),
        Column("images, bytes", "raw bytes of its pixels", _size("images")),
        Column("compensators, bytes", "raw bytes of its compensators as stored", _size("compensators")),
        Column("labels, bytes", "raw bytes of stored soft labels; class indices count nothing", _show_label_bytes),
        Column(
            "byte budget", "raw bytes as a share of those of ipc random images a class with such labels",
            _show_byte_budget,
        ),
        Column(
            "stored, bytes", "bytes of its files: encoded images, compensators, labels",
            lambda row: f"{sum(row['bytes']['stored'].values()):,}",
        ),
    ),
    "How small it is, and what it took": (
        Column("ratio by bytes", "raw bytes over the raw bytes of the real training pixels", _share("raw_ratio")),
        Column("ratio as stored", "bytes of its files over those of the real set's", _share("stored_ratio")),
        Column(
            "ratio as the paper",
            "images and compensators over the number of real images, plus label bytes (dynamic ones as if stored) over "
            "the real set's stored bytes",
            _share("paper_ratio"),
        ),
        Column(
            "distil s",
            "seconds in which the set was made, teachers apart; what several budgets share counts for the first",
            lambda row: _show_seconds(row["seconds"]["distil"]),
        ),
        Column(
            "train s", "seconds of a student's training, mean over seeds",
            lambda row: _show_seconds(row["seconds"]["train"]),
        ),
        Column(
            "duplication",
            "mean cosine similarity of two views of a class in the first teacher's penultimate features, 1: all alike",
            lambda row: "-" if row["duplication"] is None else f"{row['duplication']:.3f}",
        ),
    ),
    "Scores": (
        Column(
            "LRS",
            "label-robust score, 0 to 1, higher is better: (e^a - e^-1) / (e - e^-1) with a = 0.5 IOR - 0.5 HLR",
            _of_score("LRS"),
        ),
        Column(
            "ARS",
            "augmentation-robust score, 0 to 1, higher is better: the same with a = 0.5 IOR + 0.5 IOR without "
            "augmentation and mixing",
            _of_score("ARS"),
        ),
        Column(
            "HLR",
            "hard-label recovery, as a share, lower is better: accuracy of this network trained on all real images (as "
            "teachers are: the column real) less that of the set with hard labels",
            _of_score("HLR"),
        ),
        Column(
            "IOR",
            "improvement over random, as a share, higher is better: top-1 less that of random images with the same "
            "labels, at equal steps",
            _of_score("IOR"),
        ),
        Column("real", "accuracy that HLR is measured from, as a share", _of_score("real_hard")),
    ),
}  # fmt: skip


def table_of(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a comparison's table as texts, all columns; `caption_of` says of what it is."""
    columns = [*FIRST, *(column for part in PARTS.values() for column in part)]
    rows = []
    for row in results["rows"]:
        if "error" in row:
            texts = {column.name: column.show(row) for column in FIRST} | {"top-1": "failed"}
            rows.append([texts.get(column.name, "-") for column in columns])
        else:
            rows.append([column.show(row) for column in columns])
    return [column.name for column in columns], rows


def parts_of(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return the table in parts that fit a page, each with its title, header and rows.

    A column that no row has is left out, and a row that has none of a part's; so is a student or a protocol that all
    rows share, which the caption says.
    """
    header, rows = table_of(results)
    place = {name: index for index, name in enumerate(header)}

    def differ(name: str) -> bool:
        return len({row[place[name]] for row in rows} - {"-"}) > 1

    parts = []
    for title, columns in PARTS.items():
        told = [c.name for c in columns if {row[place[c.name]] for row in rows} - {"-"}]
        told = [name for name in told if name != "protocol" or differ(name)]
        if told:
            names = [c.name for c in FIRST if c.name != "student" or differ("student")] + told
            having = [row for row in rows if {row[place[name]] for name in told} - {"-"}]
            parts.append((title, names, [[row[place[name]] for name in names] for row in having]))
    return parts


def columns_of(parts: Sequence[tuple[str, list[str], list[list[str]]]]) -> list[Column]:
    """Return the columns that are in any of the parts, in their order."""
    shown = {name for _, header, _ in parts for name in header}
    return [c for c in (*FIRST, *(column for part in PARTS.values() for column in part)) if c.name in shown]


def failures_of(results: dict[str, Any]) -> list[str]:
    """Return a sentence for every cell, control, score or training on real images of a comparison that failed."""
    said = [f"failed: {error}" for error in results.get("real", {}).values() if isinstance(error, str)]
    for row in results["rows"]:
        of = f"{row['method']}, ipc {row['ipc']}, {row['labels']}, {row['student']}"
        said += [f"failed: {of}: {row['error']}"] if "error" in row else []
        said += [f"failed: {what}, of {of}: {error}" for what, error in row.get("failed", {}).items()]
    return said


def render_markdown(results: dict[str, Any]) -> str:
    """Return a comparison's parts as Markdown: what they are of, pipe tables under titles, what failed, a legend."""
    parts = parts_of(results)
    return "\n".join(
        [
            one_line(caption_of(results)) + "\n",
            *(f"**{title}**\n\n{to_markdown(header, rows)}" for title, header, rows in parts),
            *(f"- {one_line(said)}\n" for said in failures_of(results)),
            "Columns:\n",
            *(f"- *{column.name}*: {column.what}" for column in columns_of(parts)),
            "",
        ]
    )


def render_latex(results: dict[str, Any]) -> str:
    """Return a comparison's parts as LaTeX: a tabular each, and as comments what it is of and a legend."""
    parts = parts_of(results)
    tables = [to_latex(header, rows, f"{title}. {caption_of(results)}") for title, header, rows in parts]
    said = [*failures_of(results), *(f"{column.name}: {column.what}" for column in columns_of(parts))]
    return "\n".join([*tables, *(f"% {one_line(text)}" for text in said), ""])


FORMATS: dict[str, Callable[[dict[str, Any]], str]] = {"md": render_markdown, "tex": render_latex}


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
