"""stillroom: dataset distillation, a large labelled image set made into a tiny one that trains almost as well.

import stillroom

real = stillroom.load_real("digits")
teachers = stillroom.load_teachers(real, ["convnet_thin", "resnet10_thin"], recipe="fast", epochs=6)
distilled = stillroom.distill("infer", real, teachers, ipc=10, steps=60)
distilled.save("digits-ipc10")
print(stillroom.evaluate(distilled, real, "convnet_thin", seeds=3, epochs=40))
"""

__version__ = "0.1.0"

from stillroom.api import distill, evaluate, load_real, load_teachers
from stillroom.distilled import DistilledSet, count_bytes, load_distilled, verify_distilled
from stillroom.errors import StillroomError, TimeLimitReached

__all__ = [
    "DistilledSet",
    "StillroomError",
    "TimeLimitReached",
    "count_bytes",
    "distill",
    "evaluate",
    "load_distilled",
    "load_real",
    "load_teachers",
    "verify_distilled",
]
