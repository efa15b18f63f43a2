"""The six-line way: the stages as plain calls, with settings as keywords and nothing kept but what is returned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, Literal, TypeVar

from stillroom import data, teachers
from stillroom.compute import ComputeConfig, Plan, resolve_plan
from stillroom.data import DataConfig, RealData
from stillroom.distilled import DistilledSet
from stillroom.errors import StillroomError, suggest
from stillroom.labels import attach_labels
from stillroom.manifest import ImageEncoding
from stillroom.methods import METHODS
from stillroom.run import Run
from stillroom.students import Evaluation, StudentConfig
from stillroom.students import evaluate as evaluate_students
from stillroom.teachers import Teacher, TeachersConfig
from stillroom.train import TrainConfig

Config = TypeVar("Config")


def load_real(source: str, **settings: Any) -> RealData:
    """Load a real dataset by name, path or Hub id; `settings` are DataConfig's.

    Raises StillroomError for what cannot be read, naming the file and the fix.
    """
    return data.load_real(_with(DataConfig(source=source), settings, "load_real"))


def load_teachers(
    real: RealData, networks: Sequence[str], *, compute: ComputeConfig | None = None, **settings: Any
) -> list[Teacher]:
    """Train the networks on `real`, or take them from the cache; `settings` are TeachersConfig's."""
    config = _with(TeachersConfig(networks=tuple(networks)), settings, "load_teachers")
    return teachers.load_teachers(real, config, _plan(compute), Run())


def distill(
    method: str,
    real: RealData,
    teachers: list[Teacher],
    ipc: int,
    *,
    labels: str = "static",
    image_encoding: ImageEncoding | Literal["auto"] = "auto",
    seed: int = 0,
    compute: ComputeConfig | None = None,
    **settings: Any,
) -> DistilledSet:
    """Distil `real` to `ipc` images per class by a method of METHODS and label the result.

    labels: "hard", "static" or "dynamic"; image_encoding: see `DistilledSet.with_image_encoding`; `settings` are the
    method's own (InferConfig, ...).
    """
    kinds = ("hard", "static", "dynamic")
    if labels not in kinds:
        raise StillroomError(f"labels is {labels!r}." + suggest(labels, kinds))
    if method not in METHODS:
        raise StillroomError(f"there is no method {method!r}." + suggest(method, METHODS))
    config_type, function = METHODS[method]
    plan, run = _plan(compute, real.classes * real.image_size**2), Run()
    config = _with(config_type(), settings, f"distill({method!r})")
    distilled = function(real, teachers, ipc, config, seed, plan, run).with_image_encoding(image_encoding)
    return attach_labels(distilled, labels, teachers, plan, run)


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
    """
    train = {f.name for f in fields(TrainConfig)}
    config = StudentConfig(network=network)
    if "epochs" in settings:
        settings.setdefault("dynamic_epochs", settings["epochs"])
    config = replace(
        _with(config, {k: v for k, v in settings.items() if k not in train}, "evaluate", train),
        train=replace(config.train, **{k: v for k, v in settings.items() if k in train}),
    )
    which = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    return evaluate_students(distilled, real, config, which, _plan(compute), Run(), teachers=teachers)


def _plan(compute: ComputeConfig | None, slot_pixels: int = 0) -> Plan:
    plan = resolve_plan(compute or ComputeConfig(), slot_pixels=slot_pixels)
    plan.activate()
    return plan


def _with(config: Config, settings: dict[str, Any], where: str, also: set[str] | None = None) -> Config:
    known = {f.name for f in fields(config)}  # type: ignore[arg-type]
    for name in settings:
        if name not in known:
            raise StillroomError(f"{where} has no setting {name!r}." + suggest(name, known | (also or set())))
    return replace(config, **settings)  # type: ignore[type-var]
