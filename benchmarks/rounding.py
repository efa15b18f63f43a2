"""What rounding costs in accuracy: students on one distilled set, stored in other ways, or optimised in float32.

    python benchmarks/rounding.py runs/laptop-cifar100-ipc10 --data data/cifar100.npz --out results.json

The set is that of a finished `stillroom run` of INFER. For every setting its images and compensators are stored so,
labelled again by its teachers from the views as they are read back, and students are trained as the recipe says. The
last setting optimises the compensators again, in float32 and without compilation. Resumes where it stopped.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from measure import run_students
from torch import Tensor

from stillroom.compute import Plan
from stillroom.data import DataConfig, RealData, load_real
from stillroom.distilled import DistilledSet, count_bytes, load_distilled, quantize_compensators
from stillroom.files import load_tensors
from stillroom.labels import attach_labels
from stillroom.manifest import ImageEncoding
from stillroom.methods.infer import recover_compensators
from stillroom.recipes import Recipe, find_recipe
from stillroom.run import Run
from stillroom.students import evaluate
from stillroom.teachers import Teacher, load_teachers


class Setting(NamedTuple):
    """How images and compensators are stored, how views are, and how compensators were optimised."""

    images: ImageEncoding = "png"
    bits: Literal[16, 8] = 16
    views: Literal["exact", "jpeg75"] = "exact"
    float32: bool = False  # else as the run optimised them


SETTINGS = {
    "as run": Setting(),
    "8 bits": Setting(bits=8),
    "jpeg95": Setting(images="jpeg95"),
    "jpeg90": Setting(images="jpeg90"),
    "jpeg75": Setting(images="jpeg75"),
    "views as jpeg75": Setting(views="jpeg75"),
    "optimised in float32": Setting(float32=True),
}


def store(distilled: DistilledSet, exact: Tensor, setting: Setting) -> DistilledSet:
    """Return the set with the compensators `exact`, without labels, as it is read back when it is stored so."""
    views = replace(distilled.manifest.views, view_encoding=setting.views)
    plain = replace(
        distilled,
        compensators=quantize_compensators(exact, setting.bits),
        soft_labels=None,
        manifest=replace(distilled.manifest, views=views, label_kind="hard", files={}),
    )
    return plain.with_image_encoding(setting.images)


def finished_compensators(directory: Path, name: str) -> Tensor:
    """Return a teacher's compensators of the run's finished units, before they were rounded."""
    packs = (directory / "units").glob(f"compensators-{name}-*.safetensors")
    ordered = sorted(packs, key=lambda path: int(path.stem.rsplit("-", 2)[1]))
    return torch.cat([load_tensors(pack)[0]["compensators"] for pack in ordered])


def optimise_in_float32(
    distilled: DistilledSet, teachers: list[Teacher], real: RealData, recipe: Recipe, plan: Plan, run: Run
) -> list[Tensor]:
    exact = replace(plan, precision="float32", compile="off")
    seed = distilled.manifest.seeds["distill"]
    return list(recover_compensators(teachers, distilled.images, real, recipe.infer, seed, exact, run))


def measure(arguments: argparse.Namespace, plan: Plan, run: Run) -> list[dict[str, Any]]:
    real = load_real(DataConfig(source=arguments.data))
    recipe = find_recipe(arguments.recipe)
    teachers = load_teachers(real, recipe.teachers, plan, run)
    distilled = load_distilled(arguments.directory / "distilled")
    deviation = torch.tensor(real.std).view(3, 1, 1)  # units hold them in units of it, sets in pixels
    as_run = torch.stack([finished_compensators(arguments.directory, t.name) for t in teachers]) * deviation
    rows = []
    for name in arguments.settings:
        setting, compensators = SETTINGS[name], as_run
        if setting.float32:
            found = optimise_in_float32(distilled, teachers, real, recipe, plan, run)
            compensators = torch.stack(found) * deviation
        stored = store(distilled, compensators, setting)
        unit = name.replace(" ", "-")
        stored = attach_labels(stored, "static", teachers, plan, run, f"labels-{unit}")
        result = evaluate(stored, real, recipe.student, tuple(arguments.seeds), plan, run, cell=unit)
        budget = count_bytes(stored)
        top1 = [round(100 * value, 3) for value in result.top1]
        rows.append({
            "setting": name, "steps": result.steps, "top1": top1, "mean": round(100 * result.mean, 2),
            "std": round(100 * result.std, 2), "image_bytes": budget.stored["images"],
            "compensator_bytes": budget.stored["compensators"],
        })  # fmt: skip
        print(f"{name:20} {100 * result.mean:5.2f} ± {100 * result.std:.2f}  {budget.stored}", flush=True)
    base = rows[0]["top1"]
    for row in rows:  # students of one seed draw alike, so that differences are paired
        row["difference"] = round(statistics.mean(a - b for a, b in zip(row["top1"], base, strict=True)), 2)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a finished run")
    parser.add_argument("--recipe", default="laptop-cifar100-ipc10")
    parser.add_argument("--data", default="cifar100")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    run_students(parser, measure)


if __name__ == "__main__":
    main()
