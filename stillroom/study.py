"""Study: finished runs opened for reading, and students trained anew whose weights figures look at.

A run keeps its students' accuracies, not their weights. A student that a figure needs is trained by the run's own
protocol and kept as a unit of work of its own, so that the next figure finds it. Runs are read as they are: whatever
version made them, no setting must equal one of today.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillroom.compute import ComputeConfig, Plan, resolve_plan
from stillroom.data import DataConfig, RealData, load_real
from stillroom.distilled import DistilledSet, load_distilled
from stillroom.errors import StillroomError, check_choices, suggest
from stillroom.events import read_config, require_run
from stillroom.files import read_json, sha256_bytes
from stillroom.grid import OWN_LABELS, slug
from stillroom.images import Images
from stillroom.labels import attach_labels
from stillroom.manifest import read_manifest
from stillroom.networks import build_network
from stillroom.run import Run
from stillroom.settings import Settings, read_plain
from stillroom.students import StudentConfig, check_matches, hash_labels, steps_for, train_student
from stillroom.teachers import Teacher, TeachersConfig, load_teachers
from stillroom.train import apply_normalization, fit_batch

REAL = "real"  # the student trained on all real images, as teachers are
NATURALS = "naturals"  # a set with compensators, without these
USUAL = (REAL, "random", "sre2l", "infer")  # whose students figures show where nobody says
TEST_BATCH = 500


@dataclass(frozen=True)
class Place:
    """Where the real images lie."""

    source: str | None = None  # None: the named dataset of which the run's sets were made
    root: str = "data"  # folder where named datasets are looked for


@dataclass(frozen=True)
class TeacherPlace:
    """Where the teachers lie."""

    cache: str | None = None  # folder of trained teachers; None: $STILLROOM_CACHE, or else ~/.cache/stillroom
    checkpoints: tuple[str, ...] = ()  # NETWORK=FILE: your weights


@dataclass(frozen=True)
class StudyConfig:
    """What of the runs is looked at."""

    sets: tuple[str, ...] = ()  # methods of the runs; also real (all real images), naturals; none: the figure's choice
    ipc: int | None = None  # of the sets, where the runs have several budgets
    # That students are trained with; None: static, or what the first run has instead.
    labels: Literal["hard", "static", "dynamic"] | None = None
    seeds: tuple[int, ...] = (0,)  # of the students
    steps: int | None = None  # optimiser steps of every student of a set; None: the most that a shown set's epochs take
    own_steps: bool = (
        False  # every student takes the steps of its own set's epochs, which sets with more views have more of
    )
    draw: int = 0  # seed of the classes and images that are shown
    data: Place = field(default_factory=Place)
    teachers: TeacherPlace = field(default_factory=TeacherPlace)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        check_choices(self, "figure")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise StillroomError(f"seeds is {list(self.seeds)}; give at least one, each once, such as 0 1 2")
        if self.steps is not None and self.steps < 1:
            raise StillroomError(f"steps is {self.steps}; give 1 or more, or leave it out")
        if self.steps is not None and self.own_steps:
            raise StillroomError(f"steps is {self.steps}, and own_steps gives every student its own; leave one out")


@dataclass(frozen=True)
class Made:
    """A distilled set: its method as the run calls it, its budget, the run that made it, and that it is looked at in.

    given: a set that was there before the comparison, whose labels may be others'.
    """

    method: str
    ipc: int
    run: Path
    within: Path
    folder: Path
    given: bool = False

    @functools.cached_property
    def distilled(self) -> DistilledSet:
        found = load_distilled(self.folder)
        foreign = self.given and found.manifest.label_kind not in ("hard", "learned")
        return found.with_labels(None) if foreign else found


class Study:
    """Some runs of one dataset, and what figures want of them.

    `runs` are directories of `stillroom run`, `distill` or `compare`; the first one says how students are trained.
    `keep` holds the students that are trained for figures. Of two runs that have a set of the same method and budget
    the method is called RUN/METHOD. Raises StillroomError for a directory that is no run or has neither a set nor
    results yet, and for runs of several datasets.
    """

    def __init__(self, runs: Sequence[Path], config: StudyConfig, keep: Run) -> None:
        if not runs:
            raise StillroomError("runs is empty; give the directory of a run or of a comparison, such as runs/demo")
        if len({run.resolve() for run in runs}) != len(runs):
            raise StillroomError(f"{' '.join(map(str, runs))} names a run twice; name each once")
        self.runs, self.config, self.keep = tuple(runs), config, keep
        self.called = name_runs(self.runs)  # run -> its name beside the others
        found = [made for run in runs for made in find_sets(run)]
        clashing = find_clashes((made.within, made.method, made.ipc) for made in found)
        found = [
            replace(made, method=f"{self.called[made.within]}/{made.method}") if made.method in clashing else made
            for made in found
        ]
        self.made = tuple(made for made in found if (made.folder / "manifest.json").exists())
        self.gone = tuple(made for made in found if made not in self.made)
        settings = [read_config(run)["settings"] for run in runs]
        self.settings: dict[str, Any] = settings[0]
        first, *others = (own.get("data_fingerprint") for own in settings)
        if set(others) - {first}:
            raise StillroomError(
                f"{', '.join(map(str, runs))} are runs of different data; make their figures one by one"
            )

    # -- what the runs have --------------------------------------------------------------------------------------

    def set_of(self, method: str) -> Made:
        """Return the set of a method; raises StillroomError where there is none, or several and no ipc is given."""
        budgets = {made.ipc: made for made in self.made if made.method == method}
        if not budgets:
            self._check_there(method)
            known = {made.method for made in self.made}
            raise StillroomError(f"{self.runs[0]} has no set of {method!r}.{suggest(method, known)}")
        if self.config.ipc is None and len(budgets) > 1:
            raise StillroomError(f"{method!r} has sets of {sorted(budgets)} images per class; choose one by --ipc")
        ipc = self.config.ipc if self.config.ipc is not None else next(iter(budgets))
        if ipc not in budgets:
            raise StillroomError(f"{method!r} has no set of ipc {ipc}, but of {sorted(budgets)}; give one of these")
        return budgets[ipc]

    def compensated(self) -> Made:
        """Return the set with compensators: the one that is asked for, or the first; StillroomError without any."""
        self._check_there()
        asked = [name for name in self.config.sets if name not in (REAL, NATURALS)]
        found = [
            made
            for made in [self.set_of(name) for name in asked] or self.made
            if made.distilled.compensators is not None and self.config.ipc in (None, made.ipc)
        ]
        if len({made.within for made in found}) > 1:
            raise StillroomError(
                f"{listed_sets(found)} have compensators, but this figure is of one run's; choose by --sets and --ipc, "
                "or give one run"
            )
        if found:
            return found[0]
        raise StillroomError(
            f"{', '.join(asked) or self.runs[0]} has no compensators, which this figure is of; make a set that has: "
            "stillroom distill RECIPE --method infer, or stillroom compare RECIPE --grid.methods infer"
        )

    def choose(self, usual: Sequence[str]) -> list[str]:
        """Return the sets to show: those that are asked for, or the `usual` ones that there are, else all."""
        self._check_there()
        there = list(dict.fromkeys(made.method for made in self.made))
        if any(made.distilled.compensators is not None for made in self.made):
            there.append(NATURALS)
        known = [REAL, *there]
        for name in self.config.sets:
            if name not in known:
                self._check_there(name)
                raise StillroomError(f"sets has {name!r}, which {self.runs[0]} has not.{suggest(name, known)}")
        found = [name for one in usual for name in known if name == one or name.endswith(f"/{one}")]
        if set(found) <= {REAL, NATURALS}:
            found += [name for name in there if name != NATURALS][:4]
        return list(self.config.sets) or found

    @functools.cached_property
    def shown(self) -> list[str]:
        """The sets whose students a figure shows."""
        return self.choose(USUAL)

    def _check_there(self, method: str | None = None) -> None:
        """Raise StillroomError where the set of `method` (None: every set of the runs) is not where it was."""
        gone = [made for made in self.gone if method in (None, made.method)]
        if gone and (method is not None or not self.made):
            raise StillroomError(
                f"{gone[0].method!r} of {gone[0].within} lay in {str(gone[0].folder)!r}, where it is no longer; put it "
                "back, or, of a relative path, begin from where the comparison began"
            )
        if not self.made:
            raise StillroomError(f"{self.runs[0]} has results, but no distilled set is left in it; its command goes on")

    def results(self, name: str) -> list[tuple[Path, dict[str, Any]]]:
        """Return the runs that have a file `name` (comparison.json, results.json), each with what it holds."""
        return [(run, read_results(run / name)) for run in self.runs if (run / name).exists()]

    # -- data, teachers, sets ------------------------------------------------------------------------------------

    @functools.cached_property
    def plan(self) -> Plan:
        plan = resolve_plan(self.config.compute, self.keep.notice)
        plan.activate()
        return plan

    @functools.cached_property
    def real(self) -> RealData:
        """The real data of the runs; raises StillroomError where it is not what their sets were made of."""
        self._check_there()
        # A set that was given may have been made of other files, and tell of other images.
        distilled = next((made for made in self.made if not made.given), self.made[0]).distilled
        place, manifest = self.config.data, distilled.manifest
        default = DataConfig(image_size=manifest.image_size[0], resize=manifest.dataset.resize)
        had = replace(self._section("data", default), source=place.source or manifest.dataset.name, root=place.root)
        real = load_real(had)
        check_matches(distilled, real)
        if real.fingerprint != manifest.dataset.fingerprint:
            self.keep.notice(f"the images of {real.name!r} are not byte for byte those that the sets were made of")
        return real

    @functools.cached_property
    def teachers(self) -> list[Teacher]:
        """The teachers that made the sets, by their weights."""
        config = self._section("teachers", TeachersConfig())
        return self._load(replace(config, **asdict(self.config.teachers)))

    def _load(self, config: TeachersConfig) -> list[Teacher]:
        own = [made for made in self.made if not made.given]  # another's teachers may have the same names
        known = {t.name: t.hash for made in own for t in made.distilled.manifest.teachers if t.hash}
        hashes = {name: weights for name, weights in known.items() if name in config.networks}
        return load_teachers(self.real, config, self.plan, self.keep, hashes)

    @functools.cached_property
    def labellers(self) -> list[Teacher]:
        """Those of the teachers that label."""
        chosen = self.settings.get("labelled_by")
        return [teacher for teacher in self.teachers if chosen is None or teacher.name in chosen]

    def labelled(self, name: str, kind: str) -> DistilledSet:
        """Return the set of a method, or the naturals of one, with labels of this kind; its own where it has such."""
        distilled = self._unlabelled(name)
        if distilled.manifest.label_kind == kind:
            return distilled
        teachers = [] if kind == "hard" else self.labellers
        unit = f"labels-{distilled.fingerprint[:12]}"
        return attach_labels(distilled, kind, teachers, self.plan, self.keep, unit)

    def _unlabelled(self, name: str) -> DistilledSet:
        """Return the set of a method as it is, or the naturals of one."""
        if name != NATURALS:
            return self.set_of(name).distilled
        made = self.compensated().distilled.with_labels(None)
        views = replace(made.manifest.views, naturals_as_views=True)
        return replace(made, compensators=None, manifest=replace(made.manifest, views=views))

    # -- students ------------------------------------------------------------------------------------------------

    @functools.cached_property
    def student_config(self) -> StudentConfig:
        return self._section("student", StudentConfig())

    @functools.cached_property
    def labels(self) -> str:
        """The kind of label that students are trained with."""
        if self.config.labels is not None:
            return self.config.labels
        results = self.runs[0] / "comparison.json"
        kinds = self.settings.get("labels", ())
        if results.exists():
            kinds = [row["labels"] for row in read_results(results)["rows"]]
        fitting = [kind for kind in ("static", "hard", "dynamic") if kind in kinds]
        return (fitting or ["static"])[0]

    def steps(self, name: str) -> int:
        """Return the optimiser steps of a set's student: as many for all that are shown, or as the settings say.

        Else a set with more views would be shown at its best: epochs of it have more steps. Of the student on real
        images they are those of the recipe by which teachers are trained.
        """
        if name == REAL:
            return self._real_config.steps_for(len(self.real.train))
        if self.config.steps is not None:
            return self.config.steps
        among = [name] if self.config.own_steps else [name, *(other for other in self.shown if other != REAL)]
        train = self.student_config.train_for(self.labels)
        return max(steps_for(self._unlabelled(other), train) for other in among)

    @functools.cached_property
    def _real_config(self) -> TeachersConfig:
        config = self._section("teachers", TeachersConfig())
        config = replace(config, networks=(self.student_config.network,), source="train", checkpoints=())
        return replace(config, cache=self.config.teachers.cache)

    @functools.cached_property
    def _students(self) -> dict[tuple[str, int], nn.Module]:
        return {}

    def student(self, name: str, seed: int) -> nn.Module:
        """Return a student of a set, frozen, in eval mode: trained now, or as a figure before it left it.

        "real": the student's network, trained on all real images as teachers are; it has one seed, the teachers'.
        """
        self.keep.check_time()
        key = (name, 0 if name == REAL else seed)
        if key not in self._students:
            model = self._train_on_real() if name == REAL else self._train(name, seed)
            self._students[key] = model.eval().requires_grad_(False)
        return self._students[key]

    def _train_on_real(self) -> nn.Module:
        return self._load(self._real_config)[0].model

    def _train(self, name: str, seed: int) -> nn.Module:
        kind, config = self.labels, self.student_config
        distilled = self.labelled(name, kind)
        train, steps = config.train_for(kind), self.steps(name)
        teachers = self.labellers if kind == "dynamic" else []
        said = [distilled.fingerprint, hash_labels(distilled, teachers), asdict(config), kind, steps]
        made_by = sha256_bytes(json.dumps(said).encode())
        unit = f"student-{made_by[:16]}-{seed}"
        if not self.keep.unit_done(unit):
            where = self.keep.directory or "memory"
            self.keep.notice(f"a student is trained on {name!r}, {kind} labels, {steps:,} steps, and kept in {where}")
            model, history = train_student(
                distilled, self.real, config, train, steps, seed, teachers, self.plan, self.keep, unit, made_by=made_by
            )
            facts = {"set": name, "labels": kind, "steps": steps, "seed": seed, "top1": history[-1]["top1"]}
            self.keep.finish_unit(unit, facts, model.state_dict())
            return model
        model = build_network(config.network, self.real.classes, self.real.image_size)
        model.load_state_dict(self.keep.load_unit(unit)[1])
        return self.plan.place(model)

    @functools.cached_property
    def _logits(self) -> dict[tuple[str, int], Tensor]:
        return {}

    def logits(self, name: str, seed: int) -> Tensor:
        """Return a student's logits of the test split, float32 [images, classes], on the CPU."""
        key = (name, 0 if name == REAL else seed)
        if key not in self._logits:
            self._logits[key] = self.predict(self.student(name, seed), self.real.test)
        return self._logits[key]

    @torch.no_grad()
    def predict(self, model: nn.Module, images: Images, rows: Tensor | None = None) -> Tensor:
        """Return a network's logits of `rows` of `images` (all if None), float32 [images, classes], on the CPU."""
        parts = []
        batch_size = fit_batch(TEST_BATCH, self.real.image_size)
        for some in (torch.arange(len(images)) if rows is None else rows).split(batch_size):
            batch = apply_normalization(images.batch(some).to(self.plan.device), self.real.mean, self.real.std)
            with self.plan.autocast():
                parts.append(model(batch.contiguous(memory_format=self.plan.memory_format)).float().cpu())
        return torch.cat(parts)

    def _section(self, name: str, default: Settings) -> Settings:
        """Return a section of the first run's settings, of whatever version; what it lacks is as in `default`."""
        file = str(self.runs[0] / "config.json")
        return read_plain(self.settings.get(name, {}), default, file, self.keep.notice)  # type: ignore[no-any-return]


def name_runs(runs: Sequence[Path]) -> dict[Path, str]:
    """Return what each run is called: its folder's name, or where two have the same name their paths."""
    names = [run.resolve().name for run in runs]
    return {run: name if names.count(name) == 1 else str(run) for run, name in zip(runs, names, strict=True)}


def find_clashes(found: Iterable[tuple[Path, str, Any]]) -> set[str]:
    """Return the methods that two runs both have at the same key; found: run, method and key of each."""
    runs: dict[tuple[str, Any], set[Path]] = {}
    for run, method, key in found:
        runs.setdefault((method, key), set()).add(run)
    return {method for (method, _), having in runs.items() if len(having) > 1}


def listed_sets(found: Iterable[Made]) -> str:
    """Return sets with their budgets and runs, for a sentence."""
    return " and ".join(f"{made.method} (ipc {made.ipc}, {made.within})" for made in found)


def read_results(path: Path) -> dict[str, Any]:
    """Return results.json of a run or comparison.json; raises StillroomError where it is not what these write."""
    results, rows = read_json(path), "rows" if path.name == "comparison.json" else "cells"
    if not isinstance(results, dict) or not isinstance(results.get(rows), list):
        raise StillroomError(f"{path} has no {rows}, so it was edited or damaged; its command writes it anew")
    return results


def find_sets(run: Path) -> list[Made]:
    """Return the distilled sets of a run or comparison, those of a comparison named and ordered by its table.

    Sets that were there before the comparison are among them, whether they are still there or not. Raises
    StillroomError where `run` is neither, or has neither a set nor finished rows yet.
    """
    require_run(run)
    made = []
    results = run / "comparison.json"
    rows = read_results(results)["rows"] if results.exists() else []
    if (run / "sets").is_dir():
        called: dict[str, str] = {}
        # One set may have several rows; those of older versions do not say which it is.
        for row in (row for row in rows if row.get("set", "") is not None):
            called.setdefault(row.get("set", f"{slug(row['method'])}-ipc{row['matched_ipc']}"), row["method"])
        for row in rows:
            called.setdefault(row.get("random_set"), "random")
        folders = {path.name: path for path in (run / "sets").iterdir() if (path / "distilled/manifest.json").exists()}
        for name in [name for name in called if name in folders] or sorted(folders):  # what the table is of
            method, _, ipc = name.rpartition("-ipc")
            made.append(Made(called.get(name, method), int(ipc), folders[name], run, folders[name] / "distilled"))
    elif (run / "distilled/manifest.json").exists():
        manifest = read_manifest(run / "distilled")
        made.append(Made(manifest.method, manifest.ipc, run, run, run / "distilled"))
    given = {
        row["folder"]: row for row in reversed(rows) if row.get("folder") and not row["method"].endswith(OWN_LABELS)
    }
    for text, row in reversed(given.items()):
        folder = Path(text)
        maker = folder.parent if folder.name == "distilled" else folder
        made.append(Made(row["method"], row["matched_ipc"], maker, run, folder, given=True))
    if not made and not rows:
        raise StillroomError(f"{run} has no distilled set yet; the command that began it goes on")
    return made
