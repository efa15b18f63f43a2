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
from stillroom.compute import COMPILE_FROM_STEPS, Float32Conv2d, Plan, build_generator
from stillroom.errors import StillroomError
from stillroom.networks import batchnorm_layers
from stillroom.run import Checkpoint, Run, Task

# Of compiling a step on one AVX512-bf16 core (docs/log.md): what it saves for each number that a BatchNorm sees, and
# what it takes.
SAVED_SECONDS, COMPILE_SECONDS, COMPILE_SECONDS_PER_LAYER = 2.5e-9, 15.0, 1.5

# What a batch is for one BatchNorm: per group and channel the mean of its input's deviations from the running mean and
# the mean of their squares, float32 [groups, channels] both, and the layer's running variance [channels].
LayerMoments = tuple[Tensor, Tensor, Tensor]


def _statistic(value: Tensor | None) -> Tensor:
    if value is None:
        raise StillroomError("a BatchNorm of the teacher keeps no running statistics; use one with track_running_stats")
    return value.detach().float().clone()


class RecordingNorm(nn.Module):
    """A frozen BatchNorm that also measures its input's moments, which it appends to `sink`.

    Wraps the original, so that what subclasses add (timm's fused activations) stays.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: nn.BatchNorm2d, sink: list[LayerMoments], groups: int) -> None:
        super().__init__()
        self.norm = norm
        self.sink = sink
        self.groups = groups
        self.register_buffer("running_mean", _statistic(norm.running_mean))
        self.register_buffer("running_var", _statistic(norm.running_var))

    def forward(self, x: Tensor) -> Tensor:
        self.sink.append((*deviation_moments(x, self.running_mean, self.groups), self.running_var))
        return self.norm(x)


def deviation_moments(x: Tensor, center: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return ``E[x - center]`` and ``E[(x - center)^2]`` per group and channel, float32 [groups, channels] both.

    x: [groups * images, channels, height, width], any float dtype; expectations are over images, height and width, so
    those of a batch are the mean of its parts'. center: float32 [channels].
    """
    return _Moments.apply(x, center, groups)  # type: ignore[no-any-return]


def channel_moments(x: Tensor, center: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance per group and channel, float32 [groups, channels] both.

    As `deviation_moments`; `center`, near the means, is what cancellation is avoided by.
    """
    offset, square = deviation_moments(x, center, groups)
    return offset + center, square - offset * offset


def statistics_distance(moments: LayerMoments) -> Tensor:
    """Return, per group, ``||mean - running_mean||_2 + ||var - running_var||_2``, float32 [groups]: a layer of Eq. 4.

    The variance is the biased one, as in the published scripts, ``E[d^2] - E[d]^2`` of the deviations from the running
    mean: near that, where the data is, it does not cancel, as the textbook formula on x itself would.
    """
    offset, square, running_var = moments
    return offset.norm(dim=1) + (square - offset * offset - running_var).norm(dim=1)


class _Moments(torch.autograd.Function):
    """Of deviation_moments, with the gradient written down: ``offset' / n + square' 2 (x - center) / n``.

    One pass over x, where autograd would keep the deviations and their squares and walk through each. It halves the
    eager step and compiles as well.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, center: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        # float32 x bfloat16 gives float32. Images are averaged last: five-dimensional reductions are slow on a CPU.
        deviation = x - center[:, None, None]
        offset = deviation.mean((2, 3)).unflatten(0, (groups, -1)).mean(1)
        square = (deviation * deviation).mean((2, 3)).unflatten(0, (groups, -1)).mean(1)
        ctx.save_for_backward(x, center)
        return offset, square

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, center = ctx.saved_tensors
        of_offset, of_square = gradients
        images = x.shape[0] // of_offset.shape[0]  # of a group
        count = images * x.shape[2] * x.shape[3]
        slope = 2 / count * of_square  # [groups, channels]
        constant = of_offset / count - slope * center
        slope, constant = (value.repeat_interleave(images, 0)[:, :, None, None] for value in (slope, constant))
        return (x * slope + constant).to(x.dtype), None, None


class Recorder(nn.Module):
    """A teacher that returns its logits and what the batch is for each of its BatchNorms, in the order they run.

    forward(views [groups * images, 3, height, width]) -> (logits float32 [groups * images, classes], LayerMoments of
    each layer). A BatchNorm that is defined but never runs is simply not there.
    """

    def __init__(self, teacher: nn.Module, groups: int) -> None:
        super().__init__()
        self.sink: list[LayerMoments] = []
        self.body = copy.deepcopy(teacher).eval().requires_grad_(False)
        for name, norm in batchnorm_layers(self.body):
            recording = RecordingNorm(norm, self.sink, groups)
            parent, _, child = name.rpartition(".")
            setattr(self.body.get_submodule(parent), child, recording)
        # Rounding in the first layer shifts the statistics of all others; in float32 it costs a hundredth of a step.
        first = next((layer for layer in self.body.modules() if type(layer) is nn.Conv2d), None)
        if first is not None:
            first.__class__ = Float32Conv2d

    def forward(self, views: Tensor) -> tuple[Tensor, list[LayerMoments]]:
        self.sink.clear()
        logits = self.body(views)
        layers = list(self.sink)
        self.sink.clear()
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), layers


def statistics_loss(layers: Sequence[LayerMoments], first_layer_weight: float) -> Tensor:
    """Return Equation 4, float32 [groups]: the layers' distances, the first one's `first_layer_weight` times.

    That weight is 10 in the published scripts, and not in the paper.
    """
    first, *others = layers
    total = first_layer_weight * statistics_distance(first)
    for layer in others:
        total = total + statistics_distance(layer)
    return total


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
    if not 0 < settings.learning_rate < math.inf:
        raise StillroomError(f"{where}.learning_rate is {settings.learning_rate}; give a positive number such as 0.25")
    if not all(0 <= beta < 1 for beta in settings.betas):
        raise StillroomError(f"{where}.betas is {settings.betas}; give two numbers from 0 to below 1, such as 0.5 0.9")
    for name in ("statistics_weight", "first_layer_weight"):
        if not 0 <= getattr(settings, name) < math.inf:
            raise StillroomError(f"{where}.{name} is {getattr(settings, name)}; give 0 or more")
    if settings.shift_limit < 0:
        raise StillroomError(f"{where}.shift_limit is {settings.shift_limit}; give 0 or more pixels")


def cosine_rate(rate: float, step: int, steps: int) -> float:
    """Return the learning rate of `step` on half a cosine from `rate` to 0, changed every step."""
    return rate * 0.5 * (1 + math.cos(math.pi * step / steps))


# Views [groups * rows, 3, height, width] of `rows` of every group, formed of the tensor that is optimised.
Form = Callable[[Tensor, slice], Tensor]

# (tensor, form, labels int64 [groups, images]) -> (label loss [groups], weighted statistics loss [groups])
Objective = Callable[[Tensor, Form, Tensor], tuple[Tensor, Tensor]]


def build_objective(
    model: nn.Module, groups: int, first_layer_weight: float, statistics_weight: float, plan: Plan, calls: int
) -> Objective:
    """Return Equation 3's two terms of a batch of `groups` groups, to be summed and derived.

    Compiled where `calls` of them repay it. Where the plan has `chunk_images`, a group's images are passed so many at a
    time, twice: once for the statistics, once, in the backward pass, for the gradient, which is the whole batch's.
    Memory is then the chunk's, whatever the number of images.

    Confessed: Equation 3 sums the cross-entropy over the slot's images; the published scripts, and this, take its mean
    and add the statistics loss once per slot, so that the balance does not depend on the number of classes.
    """
    recorder = Recorder(model, groups)

    def measure(views: Tensor, labels: Tensor) -> tuple[Tensor, list[LayerMoments]]:
        with plan.autocast():
            logits, layers = recorder(views)
        each = nn.functional.cross_entropy(logits, labels.flatten(), reduction="none")
        return each.unflatten(0, (groups, -1)), layers

    def losses(views: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        each, layers = measure(views, labels)
        return each.mean(1), statistics_weight * statistics_loss(layers, first_layer_weight)

    function = measure if plan.chunk_images else losses
    fastest: list[Any] = []  # function itself, or compiled, as the first call's shapes decide

    def call(tensor: Tensor, form: Form, labels: Tensor) -> tuple[Tensor, Tensor]:
        if not fastest:
            with torch.no_grad():
                pays = repays_compiling(recorder, form(tensor, slice(0, 1)), calls * labels.numel(), plan, calls)
            fastest.append(plan.compiled(function, pays))
        if not plan.chunk_images:
            return fastest[0](form(tensor, slice(None)), labels)  # type: ignore[no-any-return]
        chunks = cut_chunks(labels.shape[1], plan.chunk_images)
        label_loss, distance = _InChunks.apply(tensor, form, labels, chunks, fastest[0], first_layer_weight)
        return label_loss, statistics_weight * distance

    return call


def repays_compiling(recorder: Recorder, views: Tensor, images: int, plan: Plan, calls: int) -> bool:
    """Whether compiling what passes `images` views like these through the teacher, in `calls` steps, saves time.

    By what its BatchNorms see, not by the clock, so that the same recovery is always carried out in the same way.
    """
    if not plan.device.startswith("cpu"):
        return calls >= COMPILE_FROM_STEPS["recovery"]
    sizes: list[int] = []
    hooks = [
        norm.register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].numel()))
        for norm in recorder.modules()
        if isinstance(norm, RecordingNorm)
    ]
    with torch.no_grad(), plan.autocast():
        recorder(views)
    for hook in hooks:
        hook.remove()
    compiling = COMPILE_SECONDS + COMPILE_SECONDS_PER_LAYER * len(sizes)
    return images / len(views) * sum(sizes) * SAVED_SECONDS > compiling


def cut_chunks(images: int, most: int) -> list[slice]:
    """Return slices of at most `most` images that cover `images`, all of one size but perhaps the last.

    All of one size where that costs less than twice as many: one shape to compile, and freed memory fits again (of
    ResNet-18 at 224 px, 100 images by 25 took 1.0 GiB, 250 by 32, the last 26, took 1.9).
    """
    size = max(size for size in range(1, min(most, images) + 1) if images % size == 0)
    if 2 * size <= min(most, images):
        size = -(-images // -(-images // most))
    return [slice(start, min(start + size, images)) for start in range(0, images, size)]


class _InChunks(torch.autograd.Function):
    """Label loss and statistics loss of a batch whose activations are never held at once; both [groups].

    The teacher is frozen, so images meet in the moments alone, and these are means over the images: a first pass sums
    them up; what the loss wants of each moment is then known, and a second pass lets it back through chunk by chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, form: Form, labels: Tensor, chunks: list[slice], measure: Any, first_weight: float
    ) -> tuple[Tensor, Tensor]:
        shares = [len(range(*rows.indices(labels.shape[1]))) / labels.shape[1] for rows in chunks]
        measured = (measure(form(tensor, rows), labels[:, rows]) for rows in chunks)
        each, layers = next(measured)
        label_loss = shares[0] * each.mean(1)
        moments = [shares[0] * value for value in _moments_of(layers)]
        for share, (each, layers) in zip(shares[1:], measured, strict=True):
            label_loss = label_loss + share * each.mean(1)
            moments = [total + share * value for total, value in zip(moments, _moments_of(layers), strict=True)]
        variances = [running_var for *_, running_var in layers]
        with torch.enable_grad():
            moments = [value.requires_grad_() for value in moments]
            distance = statistics_loss(list(zip(moments[::2], moments[1::2], variances, strict=True)), first_weight)
        ctx.form, ctx.chunks, ctx.shares, ctx.measure = form, chunks, shares, measure
        ctx.moments, ctx.distance = moments, distance
        ctx.save_for_backward(tensor, labels)
        return label_loss, distance.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tensor, labels = ctx.saved_tensors
        of_label, of_distance = gradients
        wanted = torch.autograd.grad(ctx.distance, ctx.moments, of_distance)
        gradient = torch.zeros_like(tensor)
        for rows, share in zip(ctx.chunks, ctx.shares, strict=True):
            with torch.enable_grad():
                own = tensor.detach().requires_grad_()
                each, layers = ctx.measure(ctx.form(own, rows), labels[:, rows])
                sources = [each.mean(1), *_moments_of(layers)]
            gradient += torch.autograd.grad(sources, own, [share * value for value in (of_label, *wanted)])[0]
        return gradient, None, None, None, None, None


def _moments_of(layers: Sequence[LayerMoments]) -> list[Tensor]:
    return [value for offset, square, _ in layers for value in (offset, square)]


Augmentation = Literal["none", "shift", "crop_shift", "resized_crop", "resized_crop_shift"]


# Augments some rows of a group's images, [rows, 3, height, width], by draws that were made for the whole group.
Augment = Callable[[Tensor, slice], Tensor]


def draw_augment(
    augmentation: Augmentation,
    generator: torch.Generator,
    images: int,
    image_size: int,
    *,
    shift_limit: int,
    per_image: bool = False,
    flip: bool = True,
    least_scale: float = 0.08,
    crop_padding: int = 0,
) -> Augment:
    """Return the augmentation of a group of `images` images of `image_size` px, drawn for that group and step alone.

    Crops are followed by a flip where `flip` allows it, and "_shift" by a circular shift of 0 to `shift_limit` pixels.
    `least_scale`: the smallest share of the area that a resized crop keeps; `crop_padding`: pixels of the mean colour
    (0, since images are normalised) around the image before a plain crop.
    """
    steps: list[Augment] = []
    if augmentation in ("resized_crop", "resized_crop_shift"):
        boxes = augment.draw_resized_crops(
            generator, images, image_size, image_size, scale=(least_scale, 1.0), per_image=per_image
        )
        steps.append(lambda own, rows: augment.apply_resized_crops(own, boxes[rows], image_size))
    if augmentation == "crop_shift":
        offsets = augment.draw_crops(generator, images, crop_padding, per_image=per_image)
        steps.append(lambda own, rows: augment.apply_crops(own, offsets[rows], crop_padding))
    if flip and augmentation in ("crop_shift", "resized_crop", "resized_crop_shift"):
        flips = augment.draw_flips(generator, images, per_image=per_image)
        steps.append(lambda own, rows: augment.apply_flips(own, flips[rows]))
    if augmentation in ("shift", "crop_shift", "resized_crop_shift"):
        if per_image:
            shifts = augment.draw_shifts(generator, images, shift_limit)
            steps.append(lambda own, rows: augment.apply_shifts(own, shifts[rows]))
        else:
            shift = augment.draw_shift(generator, shift_limit)
            steps.append(lambda own, rows: augment.apply_shift(own, shift))

    def apply(own: Tensor, rows: slice) -> Tensor:
        for step in steps:
            own = step(own, rows)
        return own

    return apply


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


def made_once(unit: str, made_by: dict[str, Any], what: str, make: Callable[[], dict[str, Tensor]]) -> Task:
    """Return the task of making tensors, whose finished unit is refused where it was made by others.

    made_by["hash"] is the hash of the teachers' weights, "images" that of what else it is made of, if there is such.
    """

    def fits(made: dict[str, Any]) -> bool:
        if made["hash"] != made_by["hash"]:
            raise StillroomError(
                f"the finished {what} were made with other weights of it "
                f"({made['hash'][:12]}, now {made_by['hash'][:12]}); give another directory with --out"
            )
        if made.get("images") != made_by.get("images"):
            raise StillroomError(f"the finished {what} were made for other images; give another directory with --out")
        return True

    return Task(unit, lambda: (made_by, make()), fits)
