"""What reading, encoding and decoding an image takes on this machine, by a few dozen of them.

Seconds on the clock, and those of all processors together: what is drawn while a step runs may have to share them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from stillroom.artifact import decode_picture, encode_picture
from stillroom.compute import Plan, build_generator, map_in_threads, usable_cores
from stillroom.data import Images, LazyImages, RealData
from stillroom.manifest import PictureEncoding

TIMED_READS = 48  # images of a split that are decoded to learn what one takes
TIMED_FILES = 16  # of them that are encoded, and decoded again

Result = TypeVar("Result")


@dataclass(frozen=True)
class Cost:
    """Seconds on the clock, and of processors."""

    seconds: float = 0.0
    busy: float = 0.0

    @classmethod
    def computed(cls, seconds: float, plan: Plan) -> Cost:
        """The cost of tensor operations, which keep all of the plan's threads busy where there is no other device."""
        return cls(seconds, seconds * plan.threads if plan.device == "cpu" else 0.0)

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.busy + other.busy)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.seconds * times, self.busy * times)


@dataclass(frozen=True)
class ImageCosts:
    """What one image takes: to be read from either split (nothing, where that is in memory), to be encoded as the set
    stores it, and to be decoded from that; and the bytes of such a file."""

    train: Cost
    test: Cost
    encode: Cost
    decode: Cost
    file_bytes: float


def overlap(step: float, drawing: Cost, plan: Plan) -> float:
    """Seconds of a step while the next batch is drawn: those of the longer, or in which processors do both."""
    busy = Cost.computed(step, plan).busy + drawing.busy
    return max(step, drawing.seconds, busy / usable_cores())


def time_images(real: RealData, encoding: PictureEncoding) -> ImageCosts:
    """Return what an image of `real` takes, stored by `encoding`."""
    drawn = torch.randperm(len(real.train), generator=build_generator(0, "costs"))[:TIMED_READS]
    train, images = _time_reading(real.train, drawn)
    middle = max(0, len(real.test) - TIMED_READS) // 2  # of a split that is only ever gone through from end to end
    test, _ = _time_reading(real.test, torch.arange(len(real.test))[middle:][:TIMED_READS])
    pictures = images[:TIMED_FILES].cpu().unbind()
    side = real.image_size
    encode, files = _time(
        functools.partial(map_in_threads, functools.partial(encode_picture, encoding=encoding), pictures)
    )
    decode, _ = _time(
        functools.partial(map_in_threads, lambda file: decode_picture(file, encoding, (side, side)), files)
    )
    share = 1 / len(files)
    return ImageCosts(train, test, encode * share, decode * share, share * sum(map(len, files)))


def _time_reading(images: Images, rows: Tensor) -> tuple[Cost, Tensor]:
    cost, read = _time(functools.partial(images.batch, rows))
    return (cost * (1 / len(rows)) if isinstance(images, LazyImages) else Cost()), read


def _time(work: Callable[[], Result]) -> tuple[Cost, Result]:
    begun, busy = time.perf_counter(), time.process_time()
    made = work()
    return Cost(time.perf_counter() - begun, time.process_time() - busy), made
