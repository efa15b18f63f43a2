"""What the methods that recover pixels from a teacher share: the statistics loss, and the loop that lowers it.

The published scripts hang a hook on every BatchNorm and reduce each input three times in float32. Here each BatchNorm
is wrapped once and hands out its input's statistics on the way, in eval mode and without hooks, so that the whole is
plain tensor code that compiles and fuses.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillroom import augment
from stillroom.compute import Float32Conv2d, Plan, build_generator
from stillroom.errors import StillroomError
from stillroom.networks import batchnorm_layers
from stillroom.run import Checkpoint, Run

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


def channel_moments(x: Tensor, center: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance per group and channel, float32 [groups, channels] both.

    x: as in `statistics_distance`; `center` float32 [channels], near the means, is what cancellation is avoided by.
    """
    offset, variance = _Moments.apply(x, center, groups)
    return offset + center, variance


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


def check_descent(settings: Any, where: str) -> None:
    """Raise StillroomError for settings of a descent that are out of range; `where` is the section they stand in."""
    if settings.steps < 1:
        raise StillroomError(f"{where}.steps is {settings.steps}; give 1 or more")
    if not settings.learning_rate > 0:
        raise StillroomError(f"{where}.learning_rate is {settings.learning_rate}; give a positive number such as 0.25")
    if settings.statistics_weight < 0 or settings.first_layer_weight < 0:
        raise StillroomError(f"{where}.statistics_weight and {where}.first_layer_weight must be 0 or more")
    if settings.shift_limit < 0:
        raise StillroomError(f"{where}.shift_limit is {settings.shift_limit}; give 0 or more pixels")


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


def build_losses(
    model: nn.Module, groups: int, first_layer_weight: float, statistics_weight: float, plan: Plan, calls: int
) -> Objective:
    """Return Equation 3's two terms as a function of a batch of `groups` groups, compiled where `calls` repay it."""
    objective = build_objective(Recorder(model, groups, first_layer_weight), groups, statistics_weight)

    def compute_losses(views: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with plan.autocast():
            return objective(views, labels)

    return plan.compiled(compute_losses, calls, "recovery")


Augmentation = Literal["none", "shift", "crop_shift", "resized_crop", "resized_crop_shift"]


def augment_group(
    images: Tensor,
    augmentation: Augmentation,
    generator: torch.Generator,
    *,
    shift_limit: int,
    per_image: bool = False,
    flip: bool = True,
    least_scale: float = 0.08,
    crop_padding: int = 0,
) -> Tensor:
    """Return one group's `images` [images, 3, height, width], augmented by draws of that group and step alone.

    Crops are followed by a flip where `flip` allows it, and "_shift" by a circular shift of 0 to `shift_limit` pixels.
    `least_scale`: the smallest share of the area that a resized crop keeps; `crop_padding`: pixels of the mean colour
    (0, since images are normalised) around the image before a plain crop.
    """
    batch, height, width = images.shape[0], images.shape[-2], images.shape[-1]
    if augmentation in ("resized_crop", "resized_crop_shift"):
        boxes = augment.draw_resized_crops(
            generator, batch, height, width, scale=(least_scale, 1.0), per_image=per_image
        )
        images = augment.apply_resized_crops(images, boxes, height)
    if augmentation == "crop_shift":
        offsets = augment.draw_crops(generator, batch, crop_padding, per_image=per_image)
        images = augment.apply_crops(images, offsets, crop_padding)
    if flip and augmentation in ("crop_shift", "resized_crop", "resized_crop_shift"):
        images = augment.apply_flips(images, augment.draw_flips(generator, batch, per_image=per_image))
    if augmentation in ("shift", "crop_shift", "resized_crop_shift"):
        if per_image:
            return augment.apply_shifts(images, augment.draw_shifts(generator, batch, shift_limit))
        return augment.apply_shift(images, augment.draw_shift(generator, shift_limit))
    return images


# The terms of the loss, each [groups] and weighted, of what is optimised in one step: (step, tensor, generators).
Terms = Callable[[int, Tensor, Sequence[torch.Generator]], tuple[Tensor, ...]]


class Descent:
    """Adam on one tensor of several groups at once, on a cosine: what every method that recovers pixels does.

    start: float32 [groups, ...] on the plan's device, in units of the channels' standard deviation. `terms` gives the
    losses of each group, whose sum is lowered: groups do not touch each other, so packing changes only the rounding.
    limits: least and greatest value, kept to after every step (broadcast over the tensor). memory: tensors that `terms`
    changes in place from step to step; they belong to the state. `name` is what the tensor is called where it is kept.
    """

    def __init__(
        self,
        name: str,
        start: Tensor,
        terms: Terms,
        steps: int,
        learning_rate: float,
        betas: tuple[float, float],
        plan: Plan,
        limits: tuple[Tensor, Tensor] | None = None,
        memory: Sequence[Tensor] = (),
    ) -> None:
        self.name, self.terms, self.steps, self.learning_rate = name, terms, steps, learning_rate
        self.limits, self.memory, self.device = limits, memory, plan.device
        self.tensor = start.detach().requires_grad_()
        self.optimizer = torch.optim.Adam([self.tensor], learning_rate, betas=betas, fused=plan.device != "mps")

    def step(self, step: int, generators: Sequence[torch.Generator]) -> Tensor:
        """Take step number `step` and return its losses [terms, groups], without waiting for the device."""
        self.optimizer.param_groups[0]["lr"] = cosine_rate(self.learning_rate, step, self.steps)
        terms = self.terms(step, self.tensor, generators)
        sum(terms[1:], terms[0]).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.limits is not None:
            with torch.no_grad():
                self.tensor.clamp_(*self.limits)
        return torch.stack(terms).detach()

    def state(self) -> dict[str, Tensor]:
        """Return what `load_state` needs to go on."""
        moments = {k: torch.as_tensor(v) for k, v in self.optimizer.state[self.tensor].items()}
        memory = {f"memory.{index}": value for index, value in enumerate(self.memory)}
        return {self.name: self.tensor.detach(), **moments, **memory}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put a state back."""
        with torch.no_grad():
            self.tensor.copy_(state[self.name])
            for index, value in enumerate(self.memory):
                value.copy_(state[f"memory.{index}"])
        moments = {k: v for k, v in state.items() if k != self.name and not k.startswith("memory.")}
        self.optimizer.load_state_dict(
            {"state": {0: moments}, "param_groups": self.optimizer.state_dict()["param_groups"]}
        )


def descend(
    descent: Descent,
    draws: Sequence[tuple[str | int, ...]],
    seed: int,
    run: Run,
    checkpoint: Checkpoint,
    label: str,
    remedy: str,
) -> Tensor:
    """Take all steps of `descent` and return their losses, float32 [steps, terms, groups], on the device.

    draws: for each group the path that its draws derive from. Unfinished work goes on from its `checkpoint`. Raises
    StillroomError, with `remedy`, where a loss is not finite, TimeLimitReached where the run is to stop.
    """
    losses = torch.zeros(0, device=descent.device)  # its number of terms is known after the first step
    first = 0
    if stored := checkpoint.load():
        tensors, state = stored
        losses = tensors.pop("losses").to(descent.device)
        descent.load_state(tensors)
        first = state["step"]
    with run.progress(label, descent.steps, first) as advance:
        for step in range(first, descent.steps):
            found = descent.step(step, [build_generator(seed, *path, step) for path in draws])
            if step == 0:
                losses = torch.zeros(descent.steps, *found.shape, device=descent.device)
            losses[step] = found
            advance()
            if step < descent.steps - 1 and (checkpoint.due or run.stopping):
                _check_finite(losses[: step + 1], label, remedy)
                checkpoint.save({**descent.state(), "losses": losses}, {"step": step + 1})
                if run.stopping:
                    raise run.stop()
    _check_finite(losses, label, remedy)
    return losses


def _check_finite(losses: Tensor, label: str, remedy: str) -> None:
    bad = (~losses.isfinite()).any(dim=1).nonzero()
    if len(bad):
        step, group = bad[0].tolist()
        raise StillroomError(
            f"the loss of {label} is not finite from step {step} on (slot {group} of this unit); check the teacher, "
            f"{remedy} or use --compute.precision float32, with a new --out"
        )


def make_once(
    run: Run, unit: str, made_by: dict[str, Any], what: str, make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the unit's tensors: those that `make` makes, or those of the finished unit.

    made_by["hash"] is the hash of the teachers' weights, "images" that of what else it is made of, if there is such.
    Raises StillroomError where a finished unit has others.
    """
    if not run.unit_done(unit):
        tensors = make()
        run.finish_unit(unit, made_by, tensors)
        run.check_time()
        return tensors
    made, tensors = run.load_unit(unit)
    if made["hash"] != made_by["hash"]:
        raise StillroomError(
            f"the finished {what} were made with other weights of it "
            f"({made['hash'][:12]}, now {made_by['hash'][:12]}); give another directory with --out"
        )
    if made.get("images") != made_by.get("images"):
        raise StillroomError(f"the finished {what} were made for other images; give another directory with --out")
    return tensors
