"""What runs' results say by themselves: accuracy against bytes (Figure 1), what compensators add (Figure 4, right)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from stillroom.arrays import Gain, Tradeoff
from stillroom.errors import StillroomError, suggest
from stillroom.study import Study, find_clashes


def measure_tradeoff(study: Study) -> Tradeoff:
    """Return accuracy and bytes of every cell of the comparisons, and of their random controls.

    Dynamic labels count as if they were stored, since students learn from them too. Where a method's student takes more
    steps than that of random images, random images in as many steps stand beside them as a point of their own.
    Raises StillroomError where no run is a comparison.
    """
    comparisons = study.results("comparison.json")
    rows = [row | {"run": run} for run, results in comparisons for row in results["rows"] if "error" not in row]
    if not rows:
        raise StillroomError(
            f"{study.runs[0]} is no comparison with finished cells, which this figure is of; make one: "
            "stillroom compare RECIPE --grid.methods random sre2l infer"
        )
    rows = name_rows(study, rows)
    wanted = set(study.config.sets)
    shown = [row for row in rows if not wanted or {row["method"], row["name"]} & wanted]
    if not shown:
        known = {row["name"] for row in rows}
        raise StillroomError(f"sets has {list(wanted)}, of which {study.runs[0]} has no row.{suggest('', known)}")
    points = [_point(row) for row in shown] + list(_random_points(shown, rows))
    return Tradeoff(
        dataset=comparisons[0][1]["dataset"]["name"],
        student=", ".join(sorted({row["student"] for row in shown})),
        **{name: [point[name] for point in points] for name in points[0]},  # type: ignore[arg-type]
    )


def name_rows(study: Study, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of comparisons with a `name`, a line of the figure.

    It is the method, before it the run where two runs have the same row, after it the network where there are several.
    """
    clashing = find_clashes((row["run"], row["method"], (row["ipc"], row["labels"], row["student"])) for row in rows)
    several = len({row["student"] for row in rows}) > 1
    named = []
    for row in rows:
        before = f"{study.called[row['run']]}/" if row["method"] in clashing else ""
        after = f", {row['student']}" if several else ""
        named.append(row | {"name": f"{before}{row['method']}{after}", "of_random": f"{before}random{after}"})
    return named


def _point(row: dict[str, Any]) -> dict[str, Any]:
    size = row["bytes"]
    stored = sum(size["raw"].values()) + row["dynamic_label_bytes"]
    return {
        "method": row["name"],
        "labels": row["labels"],
        "ipc": row["ipc"],
        "steps": row["steps"],
        "seeds": len(row["top1"]),
        "ratio": 100 * stored / size["real_raw_bytes"],
        "top1": row["mean"],
        "deviation": math.nan if row["std"] is None else row["std"],
    }


def _random_points(shown: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the random controls of the rows that are shown, where these are no rows that are shown themselves.

    At equal epochs, and in as many steps where these are others. What a control costs stands in the row; in those of
    older versions it is known by the random images' own row alone, which may be one that is not shown.
    """
    drawn = {(row["name"], row["ipc"], row["labels"]) for row in shown}
    for row in shown:
        own = next((other for other in rows if _is_random_of(other, row)), None)
        if own is row:
            continue
        at_epochs, at_steps = (_random_point(row, own, budget) for budget in ("epochs", "steps"))
        key = (row["of_random"], row["ipc"], row["labels"])
        if at_epochs is not None and key not in drawn:
            drawn.add(key)
            yield at_epochs | {"method": row["of_random"]}
        if at_steps is not None and (at_epochs is None or at_steps["steps"] != at_epochs["steps"]):
            yield at_steps | {"method": f"random in as many steps as {row['name']}"}


def _is_random_of(other: dict[str, Any], row: dict[str, Any]) -> bool:
    same = all(other[key] == row[key] for key in ("run", "ipc", "labels", "student"))
    return same and other["method"] == "random" and row.get("random_set") in (None, other.get("set"))


def _random_point(row: dict[str, Any], own: dict[str, Any] | None, budget: str) -> dict[str, Any] | None:
    """Return a row's random control at equal `budget`; None where it was not trained, or nothing says what it costs."""
    name = f"random + {row['labels']}, equal {budget}"
    if name not in row["differences"]:
        return None
    # Older versions kept differences alone.
    mean, deviation = row.get("controls", {}).get(name, (row["mean"] - row["differences"][name][0], None))
    point = _point(row) | {"top1": mean, "deviation": math.nan if deviation is None else deviation}
    if cost := row.get("control_costs", {}).get(name):
        return point | {"steps": cost["steps"], "ratio": 100 * cost["bytes"] / row["bytes"]["real_raw_bytes"]}
    if own is None:
        return None
    steps = row["steps"] if budget == "steps" else own["steps"]
    as_long = own | {"steps": steps, "dynamic_label_bytes": own["dynamic_label_bytes"] * steps / own["steps"]}
    return point | {key: _point(as_long)[key] for key in ("steps", "ratio")}


def measure_gain(study: Study) -> Gain:
    """Return what compensators add to the naturals alone under every setting of the runs, paired by seed.

    Raises StillroomError where no run has a set with compensators beside its naturals.
    """
    comparisons, runs = study.results("comparison.json"), study.results("results.json")
    settings = [found | {"run": study.called[run]} for run, results in comparisons for found in _of_comparison(results)]
    settings += [found | {"run": study.called[run]} for run, results in runs for found in _of_run(results)]
    if not settings:
        raise StillroomError(
            f"{study.runs[0]} has no set with compensators beside its naturals alone, which this figure compares; make "
            "one: stillroom run RECIPE --method infer, or stillroom compare RECIPE --grid.methods infer, with controls"
        )
    several = [key for key in ("method", "student", "run") if len({found[key] for found in settings}) > 1]
    columns = ("seeds", "accuracy", "at_epochs", "at_epochs_deviation", "at_steps", "at_steps_deviation")
    return Gain(
        dataset=[*comparisons, *runs][0][1]["dataset"]["name"],
        setting=[
            ", ".join([f"ipc {found['ipc']}", found["labels"], *(found[key] for key in several)]) for found in settings
        ],  # type: ignore[arg-type]
        **{name: [found[name] for found in settings] for name in columns},  # type: ignore[arg-type]
    )


def _of_comparison(results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for row in (row for row in results["rows"] if "error" not in row):
        found = [
            row["differences"].get(f"naturals + {row['labels']}, equal {budget}") for budget in ("epochs", "steps")
        ]
        if None not in found:  # a control may fail
            facts = {key: row[key] for key in ("ipc", "labels", "method", "student")}
            yield facts | _gains(row["top1"], row["mean"], *found)


def _of_run(results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for own in (cell for cell in results["cells"] if cell["budget"] == "own"):
        found = []
        for budget in ("epochs", "steps"):
            naturals = [
                cell["top1"]
                for cell in results["cells"]
                if cell["set"] == "naturals" and f"equal {budget} ({own['labels']})" in cell["budget"]
            ]
            if naturals:
                paired = [a - b for a, b in zip(own["top1"], naturals[0], strict=True)]
                found.append([statistics.mean(paired), statistics.stdev(paired) if len(paired) > 1 else None])
        if len(found) == 2:
            facts = {"ipc": results["ipc"], "labels": own["labels"], "method": own["set"]}
            yield facts | {"student": results.get("student", "")} | _gains(own["top1"], own["mean"], *found)


def _gains(top1: list[float], mean: float, at_epochs: list[Any], at_steps: list[Any]) -> dict[str, Any]:
    deviations = [math.nan if found[1] is None else found[1] for found in (at_epochs, at_steps)]
    return {
        "seeds": len(top1),
        "accuracy": mean,
        "at_epochs": at_epochs[0],
        "at_epochs_deviation": deviations[0],
        "at_steps": at_steps[0],
        "at_steps_deviation": deviations[1],
    }
