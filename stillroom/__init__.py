"""stillroom: dataset distillation, a large labelled image set made into a tiny one that trains almost as well.

import stillroom

real = stillroom.load_real("digits")
teachers = stillroom.load_teachers(real, ["resnet10_thin", "convnet_thin"], recipe="fast", epochs=6)
distilled = stillroom.distill("infer", real, teachers, ipc=10, steps=60)
distilled.save("digits-ipc10")
print(stillroom.evaluate(distilled, real, "convnet_thin", seeds=3, epochs=40))
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Each name is imported when it is asked for: reading a distilled set needs no networks and no training code.
_HOME = {
    "distill": "api",
    "evaluate": "api",
    "load_real": "api",
    "load_teachers": "api",
    "DistilledSet": "distilled",
    "count_bytes": "distilled",
    "ReplayLoader": "replay",
    "load": "hub",
    "load_distilled": "distilled",
    "verify_distilled": "distilled",
    "StillroomError": "errors",
    "TimeLimitReached": "errors",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'stillroom' has no attribute {name!r}")
    return getattr(importlib.import_module(f"stillroom.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
