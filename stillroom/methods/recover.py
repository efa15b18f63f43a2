"""What the methods that recover pixels from a teacher's statistics share: the statistics loss and its bookkeeping.

The published scripts hang a hook on every BatchNorm and reduce each input three times in float32. Here each BatchNorm
is wrapped once and hands out its input's statistics on the way, in eval mode and without hooks, so that the whole is
plain tensor code that compiles and fuses.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.compute import Float32Conv2d
from stillroom.errors import StillroomError
from stillroom.networks import batchnorm_layers

# One layer's distance: per group, the L2 norm of the mean's difference plus that of the variance's. float32 [groups]
LayerDistances = list[Tensor]


def _statistic(value: Tensor | None) -> Tensor:
    if value is None:
        raise StillroomError("a BatchNorm of the teacher keeps no running statistics; use one with track_running_stats")
    return value.detach().float().clone()


class RecordingNorm(nn.Module):
    """A frozen BatchNorm that also measures how far its input's statistics are from its running ones (Equation 4).

    Wraps the original, so that what subclasses add (timm's fused activations) stays. Distances are appended to `sink`.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: nn.BatchNorm2d, sink: LayerDistances, groups: int) -> None:
        super().__init__()
        self.norm = norm
        self.sink = sink
        self.groups = groups
        self.register_buffer("running_mean", _statistic(norm.running_mean))
        self.register_buffer("running_var", _statistic(norm.running_var))

    def forward(self, x: Tensor) -> Tensor:
        self.sink.append(statistics_distance(x, self.running_mean, self.running_var, self.groups))
        return self.norm(x)


def statistics_distance(x: Tensor, running_mean: Tensor, running_var: Tensor, groups: int) -> Tensor:
    """Return, per group, ``||mean(x) - running_mean||_2 + ||var(x) - running_var||_2`` (one layer of Equation 4).

    x: [groups * images, channels, height, width], any float dtype; statistics over images, height and width, the
    variance biased as in the published scripts, in float32. Returns float32 [groups].

    Both moments come from one pass over the deviations from the running mean: near the running mean, where the data
    is, ``E[d^2] - E[d]^2`` does not cancel, as the textbook formula on x itself would.
    """
    offset, variance = _Moments.apply(x, running_mean, groups)
    return offset.norm(dim=1) + (variance - running_var).norm(dim=1)


class _Moments(torch.autograd.Function):
    """Per group and channel: mean(x) - center, and the biased variance; float32 [groups, channels] both.

    The gradient is written down, ``offset' / n + variance' 2 (x - mean) / n``: one pass over x, where autograd would
    keep the deviations and their squares and walk through each. It halves the eager step and compiles as well.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, center: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        # float32 x bfloat16 gives float32. Images are averaged last: five-dimensional reductions are slow on a CPU.
        deviation = x - center[:, None, None]
        offset = deviation.mean((2, 3)).unflatten(0, (groups, -1)).mean(1)
        square = (deviation * deviation).mean((2, 3)).unflatten(0, (groups, -1)).mean(1)
        ctx.save_for_backward(x, offset + center)
        return offset, square - offset * offset

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, mean = ctx.saved_tensors
        of_offset, of_variance = gradients
        images = x.shape[0] // mean.shape[0]  # of a group
        count = images * x.shape[2] * x.shape[3]
        slope = 2 / count * of_variance  # [groups, channels]
        constant = of_offset / count - slope * mean
        slope, constant = (value.repeat_interleave(images, 0)[:, :, None, None] for value in (slope, constant))
        return (x * slope + constant).to(x.dtype), None, None


class Recorder(nn.Module):
    """A teacher that returns its logits and, per group of the batch, its statistics loss.

    forward(views [groups * images, 3, height, width]) -> (logits float32 [groups * images, classes],
    statistics loss float32 [groups]). The first layer's distance counts `first_layer_weight` times (10 in the published
    scripts, not in the paper).
    """

    def __init__(self, teacher: nn.Module, groups: int, first_layer_weight: float) -> None:
        super().__init__()
        self.sink: LayerDistances = []
        self.first_layer_weight = first_layer_weight
        self.body = copy.deepcopy(teacher).eval().requires_grad_(False)
        for name, norm in batchnorm_layers(self.body):
            recording = RecordingNorm(norm, self.sink, groups)
            parent, _, child = name.rpartition(".")
            setattr(self.body.get_submodule(parent), child, recording)
        # Rounding in the first layer shifts the statistics of all others; in float32 it costs a hundredth of a step.
        first = next((layer for layer in self.body.modules() if type(layer) is nn.Conv2d), None)
        if first is not None:
            first.__class__ = Float32Conv2d

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        self.sink.clear()
        logits = self.body(views)
        first, *others = self.sink  # a BatchNorm that is defined but never runs is simply not there
        total = self.first_layer_weight * first
        for distance in others:
            total = total + distance
        self.sink.clear()
        return logits.float(), total


def check_has_batchnorm(name: str, teacher: nn.Module) -> None:
    """Raise StillroomError for a teacher without BatchNorm statistics, which nothing can be recovered from."""
    if not batchnorm_layers(teacher):
        raise StillroomError(
            f"teacher {name!r} has no BatchNorm layers, but the statistics loss (Equation 4) compares with their "
            "running means and variances; use a network that has them, such as resnet18, mobilenet_v2 or convnet"
        )


def cosine_rate(rate: float, step: int, steps: int) -> float:
    """Return the learning rate of `step` on half a cosine from `rate` to 0, changed every step."""
    return rate * 0.5 * (1 + math.cos(math.pi * step / steps))


Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def build_objective(recorder: Recorder, groups: int, statistics_weight: float) -> Objective:
    """Return ``objective(views, labels) -> (label loss [groups], statistics loss [groups])``, to be summed and derived.

    Confessed: Equation 3 sums the cross-entropy over the slot's images; the published scripts, and this, take its mean
    and add the statistics loss once per slot, so that the balance does not depend on the number of classes.
    """

    def objective(views: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits, distance = recorder(views)
        label_loss = nn.functional.cross_entropy(logits, labels, reduction="none").unflatten(0, (groups, -1)).mean(1)
        return label_loss, statistics_weight * distance

    return objective
