"""The six-line way: the stages as plain calls, with settings as keywords and nothing kept but what is returned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch

from stillroom import data, teachers
from stillroom.compute import ComputeConfig, Plan, resolve_plan
from stillroom.data import DataConfig, RealData
from stillroom.distilled import DistilledSet
from stillroom.errors import StillroomError, suggest
from stillroom.labels import PoolConfig, attach_labels
from stillroom.manifest import ImageEncodingChoice, LabelKind
from stillroom.methods import METHODS
from stillroom.replay import with_batches_of
from stillroom.run import Run
from stillroom.students import CIFAR_STUDENT, Evaluation, StudentConfig
from stillroom.students import evaluate as evaluate_students
from stillroom.teachers import Teacher, TeachersConfig
from stillroom.train import TrainConfig

Config = TypeVar("Config")


def load_real(source: str, **settings: Any) -> RealData:
    """Load a real dataset by name, path or Hub id; `settings` are DataConfig's.

    Raises StillroomError for what cannot be read, naming the file and the fix.
    """
    source = str(source) if isinstance(source, Path) else source
    return data.load_real(_with(DataConfig(), {"source": source, **settings}, "load_real"))


def load_teachers(
    real: RealData, networks: Sequence[str], *, compute: ComputeConfig | None = None, **settings: Any
) -> list[Teacher]:
    """Train the networks on `real`, or take them from the cache; `settings` are TeachersConfig's."""
    _check("real", real, RealData, "what load_real returns")
    config = _with(TeachersConfig(), {"networks": networks, **settings}, "load_teachers")
    return teachers.load_teachers(real, config, _plan(compute), Run())


def distill(
    method: str,
    real: RealData,
    teachers: Sequence[Teacher],
    ipc: int,
    *,
    labels: str = "static",
    pool: PoolConfig | None = None,
    train: TrainConfig = CIFAR_STUDENT,
    image_encoding: ImageEncodingChoice = "auto",
    seed: int = 0,
    compute: ComputeConfig | None = None,
    **settings: Any,
) -> DistilledSet:
    """Distil `real` to `ipc` images per class by a method of METHODS and label the result.

    labels: "hard", "static", "dynamic", "learned" (of a method that learns them) or "replayed", of which `pool` says
    how many epochs are stored and how, and `train` for what batches of students; image_encoding: see
    `DistilledSet.with_image_encoding`; `settings` are the method's own (InferConfig, ...). `teachers` may be empty for
    a method and labels that need none.
    """
    _check("real", real, RealData, "what load_real returns")
    teachers = _check_teachers(teachers, real)
    for name, value in (("ipc", ipc), ("seed", seed)):
        _check(name, value, int, "a whole number")
    kinds = get_args(LabelKind)
    if labels not in kinds:
        raise StillroomError(f"labels is {labels!r}." + suggest(labels, kinds))
    if method not in METHODS:
        raise StillroomError(f"there is no method {method!r}." + suggest(method, METHODS))
    plan, run = _plan(compute, real), Run()
    config = _with(METHODS[method].config(), settings, f"distill({method!r})")
    distilled = (
        METHODS[method].distill(real, teachers, ipc, config, seed, plan, run).with_image_encoding(image_encoding)
    )
    return attach_labels(distilled, labels, teachers, plan, run, pool=pool, train=train)


def evaluate(
    distilled: DistilledSet,
    real: RealData,
    network: str = "resnet18",
    *,
    seeds: int | Sequence[int] = 3,
    teachers: list[Teacher] | None = None,
    compute: ComputeConfig | None = None,
    **settings: Any,
) -> Evaluation:
    """Train students on `distilled` and measure them on the real test split.

    seeds: how many (0, 1, ...) or which; `settings` are StudentConfig's or those of its TrainConfig (epochs, ...).
    Where labels are replayed, batches are those that the labels belong to.
    """
    _check("distilled", distilled, DistilledSet, "what distill or load_distilled returns")
    _check("real", real, RealData, "what load_real returns")
    train = {f.name for f in fields(TrainConfig)}
    config = StudentConfig(network=network)
    config = replace(config, train=with_batches_of(config.train, distilled))
    if "epochs" in settings:
        settings.setdefault("dynamic_epochs", settings["epochs"])
    # First, so that epochs out of range are called by the name that they were given by.
    trained = _with(config.train, {k: v for k, v in settings.items() if k in train}, "evaluate")
    config = _with(config, {k: v for k, v in settings.items() if k not in train}, "evaluate", train)
    config = replace(config, train=trained)
    which = _seeds(seeds)
    labelled_by = _check_teachers(teachers or [], real)
    return evaluate_students(distilled, real, config, which, _plan(compute), Run(), teachers=labelled_by)


def _plan(compute: ComputeConfig | None, real: RealData | None = None) -> Plan:
    slot = (0, 0) if real is None else (real.classes, real.image_size)
    plan = resolve_plan(compute or ComputeConfig(), slot=slot)
    plan.activate()
    return plan


def _with(config: Config, settings: dict[str, Any], where: str, also: set[str] | None = None) -> Config:
    hints = get_type_hints(type(config))
    for name in settings:
        if name not in hints:
            raise StillroomError(f"{where} has no setting {name!r}." + suggest(name, hints.keys() | (also or set())))
    return replace(config, **{name: _typed(name, value, hints[name]) for name, value in settings.items()})  # type: ignore[type-var]


def _typed(name: str, value: Any, hint: Any) -> Any:
    """Return `value` as the setting's type `hint` has it, a list as a tuple; raises StillroomError for another type."""
    kinds = get_args(hint)
    if get_origin(hint) is Literal or (NoneType in kinds and value is None):
        return value  # the dataclass itself knows its choices
    if NoneType in kinds:
        return _typed(name, value, kinds[0])
    if get_origin(hint) is tuple:
        values = [value] if isinstance(value, str) or not isinstance(value, Sequence) else value
        return tuple(_typed(name, item, kinds[0]) for item in values)
    expected = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}[hint]
    _check(name, value, (int, float) if hint is float else hint, expected)
    return value


def _check(name: str, value: Any, kind: type | tuple[type, ...], expected: str) -> None:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise StillroomError(f"{name} is {value!r:.80} ({type(value).__name__}); give {expected}")


def _check_teachers(teachers: Sequence[Teacher], real: RealData) -> list[Teacher]:
    """Return the teachers as a list, or raise StillroomError where one is none, or of other data."""
    if not isinstance(teachers, Sequence) or not all(isinstance(teacher, Teacher) for teacher in teachers):
        raise StillroomError(f"teachers is {teachers!r:.80}; give the list that load_teachers returns")
    for teacher in teachers:
        parameter = next(teacher.model.parameters())
        with torch.no_grad():
            found = teacher.model(parameter.new_zeros(1, 3, real.image_size, real.image_size)).shape[1]
        if found != real.classes:
            raise StillroomError(
                f"teacher {teacher.name!r} knows {found} classes, but {real.name!r} has {real.classes}; load the "
                "teachers of this dataset"
            )
    return list(teachers)


def _seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(seeds, int) and not isinstance(seeds, bool) and seeds >= 1:
        return tuple(range(seeds))
    if isinstance(seeds, str) or not isinstance(seeds, Sequence) or not seeds:
        raise StillroomError(f"seeds is {seeds!r:.80}; give how many, such as 3, or which, such as [0, 1, 2]")
    for seed in seeds:
        _check("seeds", seed, int, "whole numbers")
    if len(set(seeds)) != len(seeds):
        raise StillroomError(f"seeds {list(seeds)} has repeats; give each once")
    return tuple(seeds)
