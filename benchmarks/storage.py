"""What each way of storing a distilled set costs in accuracy and takes in bytes: students on one set, stored anew.

    python benchmarks/storage.py runs/laptop-cifar100-ipc10 --data data/cifar100.npz --out results.json

The set is that of a finished `stillroom run` of INFER. For every setting its images and compensators are stored so,
labelled again by its teachers from the views as they are read back, and students are trained as the recipe says.
Resumes where it stopped.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stillroom.compute import ComputeConfig, Plan, resolve_plan
from stillroom.data import DataConfig, load_real
from stillroom.distilled import DistilledSet, count_bytes, load_distilled, quantize_compensators
from stillroom.evaluate import evaluate
from stillroom.files import load_tensors, write_json
from stillroom.labels import attach_labels
from stillroom.pipeline import provenance
from stillroom.recipes import find_recipe
from stillroom.run import Run
from stillroom.teachers import load_teachers

# setting: (image encoding, bits of compensators, view encoding)
SETTINGS: dict[str, tuple[Any, Any, Any]] = {
    "png, 16 bits": ("png", 16, "exact"),
    "png, 8 bits": ("png", 8, "exact"),
    "jpeg95, 16 bits": ("jpeg95", 16, "exact"),
    "jpeg90, 16 bits": ("jpeg90", 16, "exact"),
    "jpeg75, 16 bits": ("jpeg75", 16, "exact"),
    "views as jpeg75": ("png", 16, "jpeg75"),
}


def store(distilled: DistilledSet, directory: Path, images: Any, bits: Any, views: Any) -> DistilledSet:
    """Return the set, without labels, as it is read back when it is stored so.

    The compensators are those of the run's finished units, before they were rounded.
    """
    manifest = distilled.manifest
    rows = []
    for teacher in manifest.teachers:
        packs = sorted(
            (directory / "units").glob(f"compensators-{teacher.name}-*.safetensors"),
            key=lambda path: int(path.stem.rsplit("-", 2)[1]),
        )
        rows.append(torch.cat([load_tensors(pack)[0]["compensators"] for pack in packs]))
    exact = torch.stack(rows) * torch.tensor(manifest.normalization.std).view(3, 1, 1)
    settings = replace(manifest.views, view_encoding=views)
    plain = replace(
        distilled,
        compensators=quantize_compensators(exact, bits),
        soft_labels=None,
        manifest=replace(manifest, views=settings, label_kind="hard", files={}),
    )
    return plain.with_image_encoding(images)


def measure(arguments: argparse.Namespace, plan: Plan, run: Run) -> list[dict[str, Any]]:
    real = load_real(DataConfig(source=arguments.data))
    recipe = find_recipe(arguments.recipe)
    teachers = load_teachers(real, recipe.teachers, plan, run)
    distilled = load_distilled(arguments.directory / "distilled")
    rows = []
    for name, setting in SETTINGS.items():
        stored = store(distilled, arguments.directory, *setting)
        unit = name.replace(", ", "-").replace(" ", "")
        stored = attach_labels(stored, "static", teachers, plan, run, f"labels-{unit}")
        result = evaluate(stored, real, recipe.student, tuple(arguments.seeds), plan, run, cell=unit)
        budget = count_bytes(stored)
        top1 = [round(100 * value, 3) for value in result.top1]
        rows.append({
            "setting": name, "steps": result.steps, "top1": top1, "mean": round(100 * result.mean, 2),
            "std": round(100 * result.std, 2), "image_bytes": budget.stored["images"],
            "compensator_bytes": budget.stored["compensators"],
        })  # fmt: skip
        print(f"{name:18} {100 * result.mean:5.2f} ± {100 * result.std:.2f}  {budget.stored}", flush=True)
    base = rows[0]["top1"]
    for row in rows:  # students of one seed draw alike, so that differences are paired
        row["difference"] = round(statistics.mean(a - b for a, b in zip(row["top1"], base, strict=True)), 2)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a finished run")
    parser.add_argument("--recipe", default="laptop-cifar100-ipc10")
    parser.add_argument("--data", default="cifar100")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="JSON file; each finished student is kept in a folder beside it")
    arguments = parser.parse_args()
    plan = resolve_plan(ComputeConfig(threads=arguments.threads), print)
    plan.activate()
    made_by = provenance(plan)
    with Run(arguments.out.with_suffix("") if arguments.out else None) as run:
        rows = measure(arguments, plan, run)
    if arguments.out:
        write_json(
            arguments.out,
            {"rows": rows, "provenance": made_by, "arguments": {k: str(v) for k, v in vars(arguments).items()}},
        )


if __name__ == "__main__":
    main()
