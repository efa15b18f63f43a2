"""Grids: methods x budgets x labels x students, the distilled sets that they come to, and the cells that cannot be.

    comparison = comparison_of(find_recipe("small"), Grid(methods=("random", "infer:steps=50"), ipc=(5, 10)))
    entries, refused = plan_entries(comparison, real)

Nothing here trains or writes: what a grid asks for is known, and refused, before any work.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from stillroom.data import RealData
from stillroom.distilled import DistilledSet, count_bytes, find_set, load_distilled
from stillroom.errors import StillroomError, check_choices, suggest
from stillroom.labels import PoolConfig, count_label_bytes
from stillroom.manifest import LabelKind
from stillroom.methods import METHODS
from stillroom.networks import build_network
from stillroom.pipeline import check_recipe, doubt_budget, learns_labels
from stillroom.recipes import Recipe
from stillroom.replay import with_batches_of
from stillroom.settings import read_plain
from stillroom.students import check_matches

FOLDER = "set:"  # begins what says where a set lies that is there already
OWN_LABELS = ", its own labels"  # ends the name of the row of a set by the soft labels that it came with


@dataclass(frozen=True)
class Grid:
    """What is compared with what. Labels, seeds and everything else are the recipe's.

    A method is METHOD, METHOD:setting=value,... for one with other settings (labelled_by=[...] and distill_seed=... are
    any method's), or set:FOLDER for a distilled set that is there already, such as an imported one. NAME=METHOD... is
    called NAME in the table.
    """

    methods: tuple[str, ...] = ()  # [NAME=]METHOD[:setting=value,...], [NAME=]set:FOLDER; none: random, the recipe's
    ipc: tuple[int, ...] = ()  # budgets in images per class; none: the recipe's
    students: tuple[str, ...] = ()  # networks; none: the recipe's
    budget: Literal["ipc", "bytes"] = "ipc"  # bytes: every method gets the bytes of so many real images and labels
    real: bool = False  # also each student trained on all real images, as teachers are: what no set is expected to pass
    scores: bool = False  # label- and augmentation-robust scores: adds hard labels, and trainings without augmentation

    def __post_init__(self) -> None:
        check_choices(self, "grid")
        for name in ("methods", "ipc", "students"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise StillroomError(f"grid.{name} {' '.join(map(str, values))} has repeats; give each once")
        names = [read_name(text)[0] for text in self.methods]
        for name, text in map(read_name, self.methods):
            if name != text and name in (*METHODS, "naturals", "real"):
                raise StillroomError(f"grid.methods calls {text!r} {name!r}, which is another set's name; give another")
        if repeated := {name for name in names if names.count(name) > 1}:
            raise StillroomError(f"grid.methods calls several {', '.join(sorted(repeated))}; give each its own name")
        if self.scores and self.budget == "bytes":
            raise StillroomError(
                "grid.scores compares hard with soft labels of one set; give --grid.budget ipc with it"
            )
        if any(ipc < 1 for ipc in self.ipc):
            raise StillroomError(f"grid.ipc is {self.ipc}; give budgets of 1 or more images per class")


@dataclass(frozen=True)
class Comparison(Recipe):
    """A recipe, of which the grid varies method, budget and student."""

    grid: Grid = field(default_factory=Grid)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid.scores and not self.controls:
            raise StillroomError("grid.scores are made of the random control; leave --no-controls out")
        if self.grid.scores and set(self.labels) == {"hard"}:
            raise StillroomError("grid.scores are of soft labels; give another kind too, such as --labels hard static")

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods of the grid, or random images and the recipe's own method."""
        return self.grid.methods or tuple(dict.fromkeys(("random", self.method)))


@dataclass(frozen=True)
class Entry:
    """One distilled set of the grid."""

    name: str  # in the table
    text: str  # by which the grid asks for it, without its name
    budget_ipc: int  # the row's budget; the recipe's ipc differs from it where budgets are matched by bytes
    recipe: Recipe  # of this set and its labels
    folder: Path | None = None  # of a set that is there already
    own_labels: bool = False  # whether these are the soft labels that the set came with, not those of the teachers here

    @property
    def needs_teachers(self) -> bool:
        """Whether teachers make this set or label it."""
        made = self.folder is None and METHODS[self.recipe.method].needs_teachers
        return made or not set(self.recipe.labels) <= {"hard", "learned"}


def comparison_of(recipe: Recipe, grid: Grid) -> Comparison:
    """Return `recipe` with a grid."""
    return Comparison(**{f.name: getattr(recipe, f.name) for f in fields(Recipe)}, grid=grid)


def read_name(text: str) -> tuple[str, str]:
    """Return the name of a method in the table, and what it is: of "NAME=METHOD..." both, else the text twice."""
    name, equals, rest = text.partition("=")
    return (name, rest) if equals and name and rest and ":" not in name else (text, text)


def read_method(text: str, recipe: Recipe) -> Recipe:
    """Return `recipe` by another method: "METHOD", or "METHOD:setting=value,setting=[a,b]".

    The settings labelled_by, which names the teachers that label, and distill_seed, by which the set is drawn, are any
    method's. Raises StillroomError for an unknown method or setting and for a value of another type.
    """
    method, _, rest = text.partition(":")
    if method not in METHODS:
        raise StillroomError(f"grid.methods: there is no method {method!r}.{suggest(method, METHODS)}")
    chosen = replace(recipe, method=method)  # type: ignore[arg-type]
    if text.endswith(":"):
        raise StillroomError(f"grid.methods: {text!r} ends where a setting=value should be; give {method!r}")
    given: dict[str, Any] = {}
    for part in filter(None, re.split(r",(?![^\[]*\])", rest)):
        name, equals, value = part.partition("=")
        if not equals:
            raise StillroomError(f"grid.methods: {text!r} has {part!r} where a setting=value should be")
        listed = value.startswith("[") and value.endswith("]")
        given[name.strip()] = [v.strip() for v in value[1:-1].split(",")] if listed else value.strip()
    if "labelled_by" in given:
        named = given.pop("labelled_by")
        chosen = replace(chosen, labelled_by=tuple(named) if isinstance(named, list) else (named,))
    if "distill_seed" in given:
        seed = given.pop("distill_seed")
        if not re.fullmatch(r"\d+", str(seed)):
            raise StillroomError(f"grid.methods: {text!r} has distill_seed {seed!r}; give a whole number from 0")
        chosen = replace(chosen, distill_seed=int(seed))
    if not given:
        return chosen
    if not hasattr(recipe, method):
        raise StillroomError(f"grid.methods: {method!r} has no settings, but {text!r} gives some")
    config = read_plain(given, chosen.method_config, f"grid.methods {text!r}")
    return replace(chosen, **{method: config})


def check_grid(comparison: Comparison, real: RealData) -> list[Entry]:
    """Return the distilled sets of the grid; raises StillroomError with the list of all cells that cannot be."""
    entries, refused = plan_entries(comparison, real)
    if refused:
        raise StillroomError("these cells cannot be:\n  " + "\n  ".join(refused) + "\nleave them out of the grid")
    return entries


def plan_entries(comparison: Comparison, real: RealData) -> tuple[list[Entry], list[str]]:
    """Return the distilled sets of the grid, and a sentence for each that cannot be."""
    base = Recipe(**{f.name: getattr(comparison, f.name) for f in fields(Recipe)})
    grid = comparison.grid
    entries: list[Entry] = []
    refused: list[str] = []
    if grid.scores and "hard" not in base.labels:
        base = replace(base, labels=("hard", *base.labels))
    named = [read_name(text) for text in comparison.methods]
    for ipc in grid.ipc or (base.ipc,):
        for name, text in named:
            if text.startswith(FOLDER):
                continue
            try:
                entries += plan_method(name, text, replace(base, ipc=ipc), grid, real, entries)
            except StillroomError as error:
                said = str(error).replace("--ipc", "--grid.ipc")
                refused.append(f"{name}, ipc {ipc}{'' if grid.ipc else ' (the recipe has it)'}: {said}")
    for name, text in named:
        if text.startswith(FOLDER):
            try:
                entries += plan_folder(name, text, base, grid, real)
            except StillroomError as error:
                refused.append(f"{name}: {error}")
    if "learned" in base.labels and not any("learned" in entry.recipe.labels for entry in entries):
        refused.append("learned labels: no method or set of the grid has them")
    for network in grid.students:
        try:
            build_network(network, real.classes, real.image_size)
        except StillroomError as error:
            refused.append(f"student {network}: {error}")
    return entries, refused


def plan_method(name: str, text: str, base: Recipe, grid: Grid, real: RealData, known: Sequence[Entry]) -> list[Entry]:
    """Return the sets of one method at the budget of `base`: one, or one for each count that labels' bytes leave.

    Raises StillroomError for what cannot be made of this data, and for what is among `known` by another name.
    """
    recipe = read_method(text, base)
    learned = "learned" in base.labels and learns_labels(recipe, real)
    matched: dict[int, list[LabelKind]] = {}
    for labels in kinds_of(base.labels, learned):
        count = base.ipc if grid.budget == "ipc" else match_bytes(recipe, real, labels)
        matched.setdefault(count, []).append(labels)
    entries = []
    for count, kinds in matched.items():
        own = replace(recipe, ipc=count, labels=tuple(kinds))
        check_recipe(own, real, control_ipc=base.ipc)
        same = next((e for e in known if e.name != name and e.recipe == own and e.budget_ipc == base.ipc), None)
        if same is not None:
            raise StillroomError(f"it is the same as {same.name!r}; leave one of them out")
        entries.append(Entry(name, text, base.ipc, own))
    return entries


def kinds_of(labels: tuple[LabelKind, ...], learned: bool) -> tuple[LabelKind, ...]:
    """Return the kinds of label that a set is compared by: those of the grid, learned ones only where it has `learned`.

    Raises StillroomError where none is left.
    """
    kinds = tuple(kind for kind in labels if kind != "learned" or learned)
    if not kinds:
        raise StillroomError("it has no learned labels; give --labels static, too")
    return kinds


def plan_folder(name: str, text: str, base: Recipe, grid: Grid, real: RealData) -> list[Entry]:
    """Return the entries of a distilled set in a folder: its own budget, and the recipe's labels and students.

    One that came with soft labels stands there by these, too, where soft labels are compared: static ones, and replayed
    ones where students are trained by the batches that these belong to. By bytes, a set's budget
    is what it holds, and its random control has as many. Raises StillroomError where the folder holds none, or one of
    other data.
    """
    folder = find_set(Path(text.removeprefix(FOLDER)))
    distilled = load_distilled(folder)
    check_matches(distilled, real, held_out=base.data.holds_out)
    ipc, its = distilled.manifest.ipc, distilled.manifest.label_kind
    # Its method may be nobody's here; the recipe says who labels it, and that random images stand beside it.
    base = replace(base, method=base.method if base.method != "random" else "infer", ipc=ipc)
    entries = []
    matched: dict[int, list[LabelKind]] = {}
    for kind in kinds_of(base.labels, its == "learned"):
        matched.setdefault(count_random(distilled, base, grid, real, kind, own=kind == "learned"), []).append(kind)
    for count, kinds in matched.items():
        entries.append(Entry(name, text, count, replace(base, labels=tuple(kinds)), folder))
    fits = with_batches_of(base.student.train, distilled) == base.student.train
    if its in ("static", "replayed") and fits and not set(base.labels) <= {"hard", "learned"}:
        recipe, stored = replace(base, labels=(its,)), distilled.manifest.pool
        if stored is not None:
            recipe = replace(recipe, pool=PoolConfig(stored.epochs, stored.encoding, stored.seed))
        count = count_random(distilled, recipe, grid, real, its, own=True)
        entries.append(Entry(name + OWN_LABELS, text, count, recipe, folder, own_labels=True))
    for entry in entries:
        others = tuple(kind for kind in entry.recipe.labels if kind != "learned") or ("hard",)
        check_recipe(replace(entry.recipe, method="random", ipc=entry.budget_ipc, labels=others), real)
    return entries


def count_random(
    distilled: DistilledSet, recipe: Recipe, grid: Grid, real: RealData, labels: LabelKind, own: bool
) -> int:
    """Return how many random images per class a set that is there already is compared with: as many as its ipc says,
    or, by bytes, as many as its raw bytes with such labels would hold; `own`: with the labels that it has."""
    if grid.budget == "ipc":
        return distilled.manifest.ipc
    held = distilled_bytes(distilled, recipe, labels, own)
    counts = range(1, len(real.train) // real.classes + 1)
    fitting = [n for n in counts if raw_bytes(replace(recipe, method="random", ipc=n), real, labels) <= held]
    return max(fitting, default=1)


def distilled_bytes(distilled: DistilledSet, recipe: Recipe, labels: LabelKind, own: bool) -> int:
    """Return the raw bytes of a set with labels of a kind: its `own`, or those that the recipe would store."""
    parts = count_bytes(distilled).raw
    if own:
        return sum(parts.values())
    classes, batch = len(distilled.manifest.class_names), recipe.student.train.batch_size
    stored = count_label_bytes(labels, distilled.view_count, classes, recipe.pool, batch)
    return parts["images"] + parts["compensators"] + stored


def match_bytes(recipe: Recipe, real: RealData, labels: LabelKind) -> int:
    """Return the largest ipc of the recipe's method whose raw bytes stay within those of `recipe.ipc` random images.

    Counted are pixels, compensators and stored labels; dynamic labels are made as they are needed, and count nothing.
    Raises StillroomError where not even the smallest set of the method stays within them.
    """
    budget = raw_bytes(replace(recipe, method="random"), real, labels)
    # A natural takes up to 1 + teachers of the ipc that its bytes pay for: where classes are few, compensators many.
    most = (1 + len(recipe.teachers.networks)) * (1 + budget // (3 * real.image_size**2 * real.classes))
    fitting = None
    for ipc in range(1, most + 1):
        try:
            if raw_bytes(replace(recipe, ipc=ipc), real, labels) <= budget:
                fitting = ipc
        except StillroomError:  # too small for the method
            continue
    if fitting is None:
        raise StillroomError(
            f"{recipe.method} with {labels} labels has no set of at most {budget:,} bytes, those of {recipe.ipc} "
            "random images per class; raise --ipc"
        )
    return fitting


def raw_bytes(recipe: Recipe, real: RealData, labels: LabelKind) -> int:
    """Return the raw bytes of a set of the recipe: pixels, compensators, and the labels that are stored with it.

    Random images have no learned labels, but are granted the bytes of static ones, to match such sets by.
    """
    content = METHODS[recipe.method].content(real, len(recipe.teachers.networks), recipe.ipc, recipe.method_config)
    pixels = 3 * real.image_size**2
    scale = 3 * 4 if content.compensator_bits == 8 else 0  # float32 per channel, which 8-bit values are read by
    stored = count_label_bytes(labels, content.views, real.classes, recipe.pool, recipe.student.train.batch_size)
    compensators = content.compensators * (pixels * content.compensator_bits // 8 + scale)
    return content.images * pixels * content.image_bits // 8 + compensators + stored


def slug(name: str) -> str:
    """Return a method's name in the table as part of a file name, another for every other name."""
    if re.fullmatch(r"[a-z0-9_]+", name):
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:6]
    return f"{re.sub(r'[^a-zA-Z0-9_.]+', '-', name)[:60]}-{digest}"


def random_entry(entry: Entry, usual_seed: int) -> Entry:
    """Return the entry of the random images beside a set: of its budget and draw; `usual_seed`: the grid's draw."""
    recipe = replace(entry.recipe, method="random", ipc=entry.budget_ipc)  # of equal bytes, where those count
    text = "random" if recipe.distill_seed == usual_seed else f"random:distill_seed={recipe.distill_seed}"
    return Entry(text, text, entry.budget_ipc, recipe)


def doubt_grid(entries: Sequence[Entry], real: RealData) -> list[str]:
    """Return why budgets of the grid may not be worth their work, a sentence each, with the sets that it is said of.

    As `doubt_budget`; sets that are there already are not doubted, nor what is said of all sets said again for each.
    """
    doubted: dict[str, list[str]] = {}
    for entry in entries:
        for doubt in doubt_budget(entry.recipe, real) if entry.folder is None else []:
            doubted.setdefault(doubt, []).append(f"{entry.name} at ipc {entry.budget_ipc}")
    return [f"{', '.join(dict.fromkeys(names))}: {doubt}" for doubt, names in doubted.items()]


def set_name(entry: Entry) -> str:
    """Return the name of the folder of an entry's set: one for all that differ in who labels it."""
    method = re.sub(r",?\blabelled_by=(\[[^\]]*\]|[^,]*)", "", entry.text).replace(":,", ":").removesuffix(":")
    return f"{slug(method)}-ipc{entry.recipe.ipc}"
