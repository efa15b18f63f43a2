"""What results allow to be said: a method's accuracy beside each of its controls, and nothing that they do not carry.

    for claim in claims_of(results):            # of results.json or comparison.json, as plain dictionaries
        print(claim.sentence)

A control counts as beaten by three seeds or more where the 95 % interval of the mean difference, paired by seed
(Student's t), lies above 0. That interval is of students of one set: another draw of images, or another distillation,
is not in it.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

FEW_TEST_IMAGES = 1000  # below which chance in drawing them is worth more than most differences of methods

# Two-sided 95 % quantiles of Student's t by degrees of freedom, from 1; beyond them the last one, which is wider.
STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)

LEAST_SEEDS = 3  # that a control can be beaten by
SAME = 1e-6  # points: deviations below it are of differences that are all the same, but for the rounding of floats

Verdict = Literal["not beaten", "one seed", "too close to call", "beaten"]  # from the worst

SETS = {"naturals": "its naturals alone"}
BUDGETS = {"equal epochs": "at equal epochs", "equal steps": "in as many steps"}


@dataclass(frozen=True)
class Against:
    """A method beside one control: mean and standard deviation of top-1 minus the control's, in points, over seeds."""

    control: str
    mean: float
    deviation: float | None  # None: of one seed
    seeds: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean difference; None of one seed, which has none."""
        if self.deviation is None or self.seeds < 2:
            return None
        half = STUDENT_T[min(self.seeds - 1, len(STUDENT_T)) - 1] * self.deviation / self.seeds**0.5
        return self.mean - half, self.mean + half

    @property
    def verdict(self) -> Verdict:
        """Whether the control is beaten; never by fewer than three seeds, nor by differences that are all the same.

        Student's t supposes differences that vary continuously. Accuracies are counts of a finite test split, so a few
        differences can be the same by chance: their deviation of 0 says nothing of the noise, but would make an
        interval of no width, which lies above 0 whatever the mean. Two seeds have but one deviation to tell by.
        """
        if self.mean <= 0:
            return "not beaten"
        if self.interval is None or self.deviation is None:
            return "one seed"
        if self.seeds < LEAST_SEEDS or self.deviation < SAME:
            return "too close to call"
        return "beaten" if self.interval[0] > 0 else "too close to call"

    @property
    def said(self) -> str:
        """The difference and its verdict, to stand behind the control's name."""
        points = f"{spell_spread(self.mean, self.deviation, '+')} points"
        words = {
            "beaten": "beaten",
            "too close to call": f"ahead, but too close to call with {self.seeds} seeds",
            "not beaten": "not beaten",
            "one seed": "ahead in its one seed, which proves nothing",
        }
        return f"{points}: {words[self.verdict]}"


@dataclass(frozen=True)
class Claim:
    """Top-1 in % of students of one set, by one kind of label, beside its controls."""

    method: str
    ipc: int
    labels: str
    student: str
    steps: int
    top1: tuple[float, ...]  # by seed
    against: tuple[Against, ...] = ()
    lost: tuple[str, ...] = ()  # controls that failed
    paper: float | None = None
    base: str = ""  # the method without its settings, by whatever name: METHODS has it
    made: str = ""  # what tells the set from others, whatever its labels

    @property
    def mean(self) -> float:
        return spread_of(self.top1)[0]

    @property
    def deviation(self) -> float | None:
        return spread_of(self.top1)[1]

    @property
    def reached(self) -> str:
        """The accuracy with its uncertainty, such as "35.3 ± 0.6 % (3 seeds)"."""
        return spell_reached(self.top1)

    @property
    def hardest(self) -> Against | None:
        """The control that is hardest to beat: of the worst verdict, and of these the one that is least behind."""
        order = get_args(Verdict)
        return min(self.against, key=lambda each: (order.index(each.verdict), each.mean), default=None)

    @property
    def verdict(self) -> str:
        """What the control that is hardest to beat leaves of the claim, in one clause."""
        lost = f"; failed: {len(self.lost)} of its controls" if self.lost else ""
        if self.base == "random":
            return f"these are random images themselves, which others are to beat{lost}"
        if (control := self.hardest) is None:
            return f"no control stands beside it, so nothing says that it is better than random images{lost}"
        words = {
            "beaten": "it is ahead of",
            "too close to call": f"{len(self.top1)} seeds are too few to tell it from",
            "not beaten": "it is not ahead of",
            "one seed": "one seed cannot tell it from",
        }
        count = len(self.against)
        among = f", the hardest to beat of {count} controls" if count > 1 else ", its only control"
        points = spell_spread(control.mean, control.deviation, "+")
        return f"{words[control.verdict]} {control.control}{among} ({points} points){lost}"

    @property
    def sentence(self) -> str:
        """The whole claim in one line."""
        return (
            f"{self.method} at {self.ipc} images per class takes {self.student} students to {self.reached} with "
            f"{self.labels} labels in {self.steps:,} steps; {self.verdict}."
        )


def claims_of(results: dict[str, Any]) -> list[Claim]:
    """Return the claims of a run's results.json, or of a comparison's or an evaluation's, in the order of its rows.

    Raises KeyError, TypeError or ValueError for a dictionary that no such file holds.
    """
    if "rows" in results:
        return [_of_row(row) for row in results["rows"] if "error" not in row]
    if "evaluation" in results:
        return []
    cells = results["cells"]
    return [_of_cell(own, cells, results) for own in cells if own["budget"] == "own"]


def _of_cell(own: dict[str, Any], cells: Sequence[dict[str, Any]], results: dict[str, Any]) -> Claim:
    against = []
    for cell in cells:
        for budget, labels in re.findall(r"(equal epochs|equal steps) \((\w+)\)", cell["budget"]):
            if labels == own["labels"]:
                paired = [a - b for a, b in zip(own["top1"], cell["top1"], strict=True)]
                control = spell_control(cell["set"], cell["labels"], budget, labels)
                against.append(Against(control, *spread_of(paired), len(paired)))
    return Claim(
        own["set"], results["ipc"], own["labels"], results["student"], own["steps"], tuple(own["top1"]),
        tuple(against), paper=results["paper"].get(own["labels"]), base=own["set"], made=own["set"],
    )  # fmt: skip


def _of_row(row: dict[str, Any]) -> Claim:
    against, lost = [], []
    for name, difference in (row["differences"] | row.get("failed", {})).items():
        found = re.fullmatch(r"(.+?) \+ (.+), (equal epochs|equal steps)", name)
        if found is None:
            lost += [name] if name == "controls" else []  # what else may fail is no control
            continue
        control = spell_control(found[1], found[2], found[3], row["labels"])
        if isinstance(difference, str):
            lost.append(control)
        else:
            mean, deviation = difference
            against.append(Against(control, mean, deviation, len(row["top1"])))
    asked = row.get("asked", row["method"])  # which older rows do not say, nor the method and the set
    return Claim(
        row["method"], row["ipc"], row["labels"], row["student"], row["steps"], tuple(row["top1"]), tuple(against),
        tuple(lost), row["paper"][0] if row["paper"] else None, row.get("base", asked.partition(":")[0]),
        row.get("fingerprint", asked),
    )  # fmt: skip


def spell_control(name: str, labels: str, budget: str, own: str) -> str:
    """Return a control in words: the set `name` with `labels` where the claim's are `own`, and its budget of steps."""
    what = SETS.get(name, f"{name} images")
    return f"{what} with {'the same' if labels == own else labels} labels {BUDGETS[budget]}"


def headline(results: dict[str, Any]) -> str:
    """Return what the results say in one line, its uncertainty and the control hardest to beat included.

    Of a run: its first kind of label, since a choice of the best would flatter. Of a comparison: the highest of its
    first kind of label, and that it was chosen so. Raises what `claims_of` raises.
    """
    claims = claims_of(results)
    if "evaluation" in results:
        found = results["evaluation"]
        top1 = [100 * value for value in found["top1"]]
        its = results.get("set")  # which older ones do not say
        of = "" if its is None else f"{describe_set(its, results['dataset']['name'])}, in {its['folder']}: "
        return (
            f"{of}{found['network']} students reach {spell_reached(top1)} with {found['labels']} labels in "
            f"{found['steps']:,} steps; no control stands beside it, so nothing says that it is better than random "
            "images."
        )
    name = results["dataset"]["name"]
    if not claims:
        return f"{name}: no cell is finished, so there is nothing to claim."
    if "rows" not in results:
        return f"On {name}, {claims[0].sentence}"
    first = claims[0]
    alike = [c for c in claims if (c.labels, c.ipc, c.student) == (first.labels, first.ipc, first.student)]
    highest = max(alike, key=lambda claim: claim.mean)
    if len(alike) == 1:
        return f"On {name}, {highest.sentence}"
    verdict = "no method is above random images" if highest.base == "random" else highest.verdict
    sets = len({claim.made for claim in alike})
    chosen_of = f"{sets} sets" if sets == len(alike) else f"{len(alike)} rows of {sets} set{'s' if sets > 1 else ''}"
    return (
        f"{name}, {first.ipc} images per class, {first.labels} labels, {first.student} students: the highest of "
        f"{chosen_of}, chosen afterwards, is {highest.method} with {highest.reached} in {highest.steps:,} steps; "
        f"{verdict}."
    )


def describe_set(facts: dict[str, Any], dataset: str) -> str:
    """Return in words which set an evaluation was of, by its `facts` in results.json."""
    return f"{facts['method']} on {dataset}, {facts['ipc']} images per class"


def spread_of(values: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and standard deviation; one value has no deviation."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def spell_reached(top1: Sequence[float]) -> str:
    """Return accuracies in % with their uncertainty, such as "35.3 ± 0.6 % (3 seeds)"."""
    return f"{spell_spread(*spread_of(top1))} % ({count_seeds(len(top1))})"


def spell_spread(mean: float, deviation: float | None, sign: str = "") -> str:
    """Return "mean ± deviation" to one digit, without a deviation that is not known."""
    text = f"{round(mean, 1) + 0.0:{sign}.1f}"  # no -0.0
    return text if deviation is None else f"{text} ± {deviation:.1f}"


def count_seeds(count: int) -> str:
    """Return the number of seeds in words; of one, that it has no spread."""
    return f"{count} seeds" if count > 1 else "one seed, spread unknown"


def spell_grain(test: int) -> str:
    """Return how coarse a small test split of so many images is, which spreads over seeds do not tell; "" of others."""
    if test >= FEW_TEST_IMAGES:
        return ""
    chance = 100 * 1.96 * math.sqrt(0.25 / test)  # of an accuracy of one half, the worst case of the binomial
    return (
        f"measured on {test:,} test images: one is {100 / test:.1f} points, and chance in drawing them is worth up to "
        f"± {chance:.0f} points (95 %), which spreads over seeds do not show"
    )
