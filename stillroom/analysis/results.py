"""What runs' results say by themselves: accuracy against bytes (Figure 1), what compensators add (Figure 4, right)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from stillroom.arrays import Gain, Tradeoff
from stillroom.errors import StillroomError
from stillroom.study import Study


def measure_tradeoff(study: Study) -> Tradeoff:
    """Return accuracy and bytes of every cell of the comparisons.

    Dynamic labels count as if they were stored, since students learn from them too. Where a method's student takes more
    steps than that of random images, random images in as many steps stand beside them as a point of their own.
    Raises StillroomError where no run is a comparison.
    """
    comparisons = study.results("comparison.json")
    rows = [row for results in comparisons for row in results["rows"] if "error" not in row]
    if not rows:
        raise StillroomError(
            f"{study.runs[0]} is no comparison with finished cells, which this figure is of; make one: "
            "stillroom compare RECIPE --grid.methods random sre2l infer"
        )
    if study.config.sets:
        rows = [row for row in rows if row["method"] in study.config.sets]
    if len({row["student"] for row in rows}) > 1:  # of each network a line of its own
        rows = [row | {"method": f"{row['method']}, {row['student']}"} for row in rows]
    points = [_point(row) for row in rows] + list(_matched_random(rows))
    return Tradeoff(
        dataset=comparisons[0]["dataset"]["name"],
        student=", ".join(sorted({row["student"] for row in rows})),
        seeds=len(comparisons[0]["seeds"]),
        **{name: [point[name] for point in points] for name in points[0]},  # type: ignore[arg-type]
    )


def _point(row: dict[str, Any]) -> dict[str, Any]:
    size = row["bytes"]
    stored = sum(size["raw"].values()) + row["dynamic_label_bytes"]
    return {
        "method": row["method"],
        "labels": row["labels"],
        "ipc": row["ipc"],
        "steps": row["steps"],
        "ratio": 100 * stored / size["real_raw_bytes"],
        "top1": row["mean"],
        "deviation": math.nan if row["std"] is None else row["std"],
    }


def _matched_random(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield random images in other methods' steps, where these are not their own; only differences to them are kept."""
    random = {(r["ipc"], r["labels"], r["student"]): r for r in rows if r["method"].split(", ")[0] == "random"}
    for row in rows:
        own = random.get((row["ipc"], row["labels"], row["student"]))
        difference = row["differences"].get(f"random + {row['labels']}, equal steps")
        if own is None or difference is None or own["steps"] == row["steps"]:
            continue
        as_long = own | {"dynamic_label_bytes": own["dynamic_label_bytes"] * row["steps"] / own["steps"]}
        changes = {"steps": row["steps"], "mean": row["mean"] - difference[0], "std": None}
        yield _point(as_long | changes | {"method": f"random in as many steps as {row['method']}"})


def measure_gain(study: Study) -> Gain:
    """Return what compensators add to the naturals alone under every setting of the runs, paired by seed.

    Raises StillroomError where no run has a set with compensators beside its naturals.
    """
    runs, comparisons = study.results("results.json"), study.results("comparison.json")
    settings = [found for results in comparisons for found in _gains_of_comparison(results)]
    settings += [found for results in runs for found in _gains_of_run(results)]
    if not settings:
        raise StillroomError(
            f"{study.runs[0]} has no set with compensators beside its naturals alone, which this figure compares; make "
            "one: stillroom run RECIPE --method infer, or stillroom compare RECIPE --grid.methods infer, with controls"
        )
    names, accuracies, epochs, steps = zip(*settings, strict=True)
    results = [*comparisons, *runs][0]
    return Gain(
        dataset=results["dataset"]["name"],
        seeds=len(results["seeds"]),
        setting=names,  # type: ignore[arg-type]
        accuracy=accuracies,  # type: ignore[arg-type]
        at_epochs=[mean for mean, _ in epochs],  # type: ignore[arg-type]
        at_epochs_deviation=[deviation for _, deviation in epochs],  # type: ignore[arg-type]
        at_steps=[mean for mean, _ in steps],  # type: ignore[arg-type]
        at_steps_deviation=[deviation for _, deviation in steps],  # type: ignore[arg-type]
    )


Setting = tuple[str, float, tuple[float, float], tuple[float, float]]


def _gains_of_comparison(results: dict[str, Any]) -> Iterator[Setting]:
    rows = [row for row in results["rows"] if "error" not in row]
    own = [row for row in rows if all(key in row["differences"] for key in _naturals_of(row))]  # a control may fail
    several = {key: len({row[key] for row in own}) > 1 for key in ("method", "student")}
    for row in own:
        name = ", ".join([f"ipc {row['ipc']}", row["labels"], *(row[key] for key in several if several[key])])
        found = [row["differences"][key] for key in _naturals_of(row)]
        epochs, steps = ((mean, math.nan if deviation is None else deviation) for mean, deviation in found)
        yield name, row["mean"], epochs, steps


def _naturals_of(row: dict[str, Any]) -> list[str]:
    return [f"naturals + {row['labels']}, equal {budget}" for budget in ("epochs", "steps")]


def _gains_of_run(results: dict[str, Any]) -> Iterator[Setting]:
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
                deviation = statistics.stdev(paired) if len(paired) > 1 else math.nan
                found.append((statistics.mean(paired), deviation))
        if len(found) == 2:
            yield f"ipc {results['ipc']}, {own['labels']}", own["mean"], found[0], found[1]
