"""The methods: each makes a distilled set of real data, given teachers and a budget of images per class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stillroom.distilled import DistilledSet
from stillroom.methods import infer, select

# name -> (settings, distill(real, teachers, ipc, config, seed, plan, run) -> DistilledSet without labels)
METHODS: dict[str, tuple[type[Any], Callable[..., DistilledSet]]] = {
    "infer": (infer.InferConfig, infer.distill),
    "random": (select.RandomConfig, select.distill_random),
}
