"""The methods: each makes a distilled set of real data, given teachers and a budget of images per class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from stillroom.distilled import DistilledSet
from stillroom.methods import coreset, gvbsm, infer, rded, select, sre2l
from stillroom.methods.select import Content, whole_images


@dataclass(frozen=True)
class Method:
    """One way to distil.

    config: its settings, a dataclass. distill(real, teachers, ipc, config, seed, plan, run) returns the DistilledSet,
    without labels or with those that it learned. check(real, networks by name, ipc, config) returns how many real
    images per class it takes, and raises StillroomError for what it cannot do with these networks (weights do not
    matter), before any work is spent. content(real, teachers, ipc, config) returns what the set will hold.
    needs_teachers: whether it is made by teachers; for one that is not, none are trained where none label.
    """

    config: type[Any]
    distill: Callable[..., DistilledSet]
    check: Callable[..., int]
    content: Callable[..., Content] = whole_images
    needs_teachers: bool = True


MethodName = Literal["infer", "sre2l", "cda", "gvbsm", "rded", "herding", "k_center", "random"]

METHODS: dict[str, Method] = {
    "infer": Method(infer.InferConfig, infer.distill, infer.check, infer.content),
    "sre2l": Method(sre2l.Sre2lConfig, sre2l.distill, sre2l.check),
    "cda": Method(sre2l.CdaConfig, sre2l.distill, sre2l.check),
    "gvbsm": Method(gvbsm.GvbsmConfig, gvbsm.distill, gvbsm.check),
    "rded": Method(rded.RdedConfig, rded.distill, rded.check),
    "herding": Method(coreset.HerdingConfig, coreset.distill_herding, coreset.check_herding),
    "k_center": Method(coreset.KCenterConfig, coreset.distill_k_center, coreset.check_k_center),
    "random": Method(select.RandomConfig, select.distill_random, select.check_random, needs_teachers=False),
}
