"""G-VBSM: images recovered from several teachers in turn, by more statistics than BatchNorm's (Shao et al., CVPR 2024).

paper                                   here
data densification (DD)                 densification_loss
generalized backbone matching (GBM)     a step's teacher: each in turn
generalized statistical matching (GSM)  MatchedLayer of BatchNorms and convolutions, within Matcher
its score-distillation form, alpha      the moving average in `matching_loss`: `momentum`
its drop rate, beta_dr                  drop_rate, of convolutions
ensemble of labels, norms made equal    labels.ensemble_logits; `teachers.equal_norms`, for ImageNet
MSE + gamma GT (students)               students.mse_hard_loss

The statistics that convolutions are matched to are gathered over the real training images once (`gather_statistics`).

Confessed: of the paper itself its overview figure and Tables 4 and 5 were read, and of its equations what EDC repeats
(Shao et al., NeurIPS 2024: Equation 2, the distance, and 4, the mean of logits); all else is that of its published
scripts. There a convolution's statistics are its input's, and teachers take turns where the figure draws one at random.
Two accidents of theirs are left out: averages begin at 0, and they go on from one block to the next. A class that is
parted between blocks is densified part by part; there, over the blocks of all GPUs at once.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from stillroom.compute import COMPILE_FROM_STEPS, Float32Conv2d, Plan, build_generator
from stillroom.data import RealData
from stillroom.distilled import DistilledSet
from stillroom.errors import StillroomError, check_choices
from stillroom.files import sha256_bytes
from stillroom.methods.pixels import class_blocks, recover_images, recover_set
from stillroom.methods.recover import Terms, channel_moments, check_descent, draw_augment, made_once
from stillroom.run import Run, Task
from stillroom.teachers import Teacher
from stillroom.train import apply_normalization

DENSIFIED_SIDE = 32  # pixels that images are averaged down to before their Gram matrix


@dataclass(frozen=True)
class GvbsmConfig:
    """The settings of the recovery; the defaults are those of the published command for CIFAR-10."""

    method: ClassVar[str] = "gvbsm"

    steps: int = 4000
    learning_rate: float = 0.05  # 0.1 for ImageNet; in units of the channels' standard deviation
    betas: tuple[float, float] = (0.5, 0.9)
    statistics_weight: float = 0.01
    first_layer_weight: float = 10.0
    densification_weight: float = 1.0
    densification_temperature: float = 4.0  # tau
    momentum: float = 0.8  # alpha, of the statistics' moving average; 0.4 for ImageNet; 0: this step's alone
    drop_rate: float = 0.4  # beta_dr: the chance that a convolution is not matched in a step; 0 for ImageNet
    patch_side: int = 4  # pixels of a patch, in each layer's own resolution; 16 for ImageNet
    augmentation: Literal["none", "shift", "crop_shift", "resized_crop", "resized_crop_shift"] = "crop_shift"
    crop_padding: int = 4  # pixels; 8 for Tiny-ImageNet
    shift_limit: int = 32  # pixels, circular: on CIFAR an image may land anywhere, as in the scripts
    per_image: bool = False  # whether each image has a draw of its own; the scripts draw once per batch
    # That share their statistics, class by class: one GPU's; 50 for CIFAR-100 and Tiny-ImageNet, 40 for ImageNet.
    images_per_batch: int = 100
    rounds: int = 1  # over all classes, each of a share of the slots; 10 for Tiny-ImageNet

    def __post_init__(self) -> None:
        check_choices(self, self.method)
        check_descent(self, self.method)
        for name in ("densification_weight", "crop_padding"):
            if getattr(self, name) < 0:
                raise StillroomError(f"gvbsm.{name} is {getattr(self, name)}; give 0 or more")
        for name in ("momentum", "drop_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise StillroomError(f"gvbsm.{name} is {getattr(self, name)}; give a share from 0 to below 1")
        for name in ("patch_side", "images_per_batch", "rounds"):
            if getattr(self, name) < 1:
                raise StillroomError(f"gvbsm.{name} is {getattr(self, name)}; give 1 or more")
        if not self.densification_temperature > 0:
            raise StillroomError(
                f"gvbsm.densification_temperature is {self.densification_temperature}; give a positive number such as 4"
            )


def patch_moments(x: Tensor, groups: int, side: int) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each patch, over the group's images, all channels and the patch's pixels.

    x: [groups * images, channels, height, width], any float dtype; patches of `side` pixels tile it, after bilinear
    resizing up to a multiple of it where that is needed. Returns float32 [groups, patches] both.
    """
    height, width = (-(-length // side) * side for length in x.shape[2:])
    x = x.float()
    if (height, width) != tuple(x.shape[2:]):
        x = nn.functional.interpolate(x, (height, width), mode="bilinear")
    # Images and channels first: what is left to cut into patches is one map per group.
    mean = x.mean(1).unflatten(0, (groups, -1)).mean(1)  # [groups, height, width]
    square = (x * x).mean(1).unflatten(0, (groups, -1)).mean(1)
    mean, square = (nn.functional.avg_pool2d(value[:, None], side).flatten(1) for value in (mean, square))
    return mean, square - mean * mean


class MatchedLayer(nn.Module):
    """A frozen BatchNorm or convolution that also hands out its input's statistics, [groups, ...] each, to `sink`.

    BatchNorm: mean and variance per channel. Convolution: these, and mean and variance per patch.
    """

    center: Tensor

    def __init__(self, layer: nn.Module, sink: list[tuple[Tensor, ...]], groups: int, patch_side: int) -> None:
        super().__init__()
        self.layer, self.sink, self.groups, self.patch_side = layer, sink, groups, patch_side
        self.is_convolution = isinstance(layer, nn.Conv2d)
        # What moments are taken around; it does not change them.
        if isinstance(layer, nn.Conv2d):
            center = torch.zeros(layer.in_channels, device=layer.weight.device)
        else:
            assert isinstance(layer.running_mean, Tensor)
            center = layer.running_mean.float().clone()
        self.register_buffer("center", center)

    @property
    def known(self) -> tuple[Tensor | None, ...]:
        """What the layer itself knows of the real images: running statistics, or nothing of a convolution's four."""
        return (None,) * 4 if self.is_convolution else (self.layer.running_mean, self.layer.running_var)  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        moments = channel_moments(x, self.center, self.groups)
        patches = patch_moments(x, self.groups, self.patch_side) if self.is_convolution else ()
        self.sink.append(moments + patches)
        return self.layer(x)


@dataclass(frozen=True, eq=False)
class StatisticsLayout:
    """How a teacher's statistics stand side by side: layers in the order in which they run, each in pieces.

    lengths: of the pieces. owners: int64 [pieces], the layer of each; columns: int64 [total], the layer of each value.
    convolutions: bool [layers]. known: float32 [total], the running statistics of BatchNorms, and NaN where a
    convolution's are to be gathered.
    """

    lengths: tuple[int, ...]
    owners: Tensor
    columns: Tensor
    convolutions: Tensor
    known: Tensor


class Matcher(nn.Module):
    """A teacher that returns its logits and all its layers' statistics side by side.

    forward(views [groups * images, 3, height, width]) -> (logits float32 [groups * images, classes], statistics float32
    [groups, total], laid out as `find_layout` says).
    """

    def __init__(self, teacher: nn.Module, groups: int, patch_side: int) -> None:
        super().__init__()
        self.groups = groups
        self.sink: list[tuple[Tensor, ...]] = []
        self.body = copy.deepcopy(teacher).eval().requires_grad_(False)
        first = next((layer for layer in self.body.modules() if type(layer) is nn.Conv2d), None)
        if first is not None:
            first.__class__ = Float32Conv2d  # as in Recorder
        for name, layer in matched_layers(self.body):
            parent, _, child = name.rpartition(".")
            setattr(self.body.get_submodule(parent), child, MatchedLayer(layer, self.sink, groups, patch_side))

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        self.sink.clear()
        logits = self.body(views)
        statistics = torch.cat([piece for pieces in self.sink for piece in pieces], dim=1)
        self.sink.clear()
        return logits.float(), statistics

    @torch.no_grad()
    def find_layout(self, image_size: int) -> StatisticsLayout:
        """Return the layout of the statistics, found by one pass of black images."""
        ran: list[MatchedLayer] = []
        hooks = [
            layer.register_forward_pre_hook(lambda layer, _: ran.append(layer))
            for layer in self.modules()
            if isinstance(layer, MatchedLayer)
        ]
        device = next(self.parameters()).device
        self.sink.clear()
        self.body(torch.zeros(self.groups, 3, image_size, image_size, device=device))
        for hook in hooks:
            hook.remove()
        pieces = [(index, piece) for index, pieces in enumerate(self.sink) for piece in pieces]
        self.sink.clear()
        known = [value for layer in ran for value in layer.known]
        return StatisticsLayout(
            tuple(piece.shape[1] for _, piece in pieces),
            torch.tensor([index for index, _ in pieces], device=device),
            torch.tensor([index for index, piece in pieces for _ in range(piece.shape[1])], device=device),
            torch.tensor([layer.is_convolution for layer in ran]),
            torch.cat(
                [
                    piece.new_full(piece.shape[1:], float("nan")) if value is None else value.float()
                    for (_, piece), value in zip(pieces, known, strict=True)
                ]
            ),
        )


def matched_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the BatchNorms that keep running statistics and the convolutions of `model`, with their names."""
    return [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d) or (isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None)
    ]


def matching_loss(
    statistics: Tensor,
    average: Tensor,
    target: Tensor,
    keep: Tensor,
    layout: StatisticsLayout,
    momentum: float,
    first_layer_weight: float,
) -> tuple[Tensor, Tensor]:
    """Return GSM's loss, float32 [groups], and the moving average of the statistics after this step.

    statistics, average: float32 [groups, total]; an average of NaN has not begun. target: float32 [total]. keep:
    float32 [groups, layers], 0 for a layer that is dropped in this step, whose average stays.

    The distance is of the average, the gradient this step's alone ("score distillation"):
    ``|| target - (average + s - stop_gradient(s)) ||_2`` for each piece, the first layer's times `first_layer_weight`.
    With momentum 0 that is EDC's Equation 2.
    """
    now = statistics.detach()
    mixed = torch.where(average.isnan(), now, momentum * average + (1 - momentum) * now)
    apart = mixed + (statistics - now) - target
    distances = torch.stack([piece.norm(dim=1) for piece in apart.split(layout.lengths, dim=1)], dim=1)
    weights = torch.where(layout.owners == 0, first_layer_weight, 1.0)  # [pieces]
    distance = (distances * weights * keep[:, layout.owners]).sum(1)
    return distance, torch.where(keep[:, layout.columns] > 0, mixed, average)


# For each number of images: rows int64 [classes, images] of a pack's images, and each class's block, int64 [classes].
Classmates = list[tuple[Tensor, Tensor]]


def find_classmates(positions: Tensor, classes: int, device: str) -> Classmates:
    """Return which images of a pack, positions int64 [blocks, images], are of one block and class; none are alone."""
    by_size: dict[int, list[tuple[int, Tensor]]] = {}
    for block, labels in enumerate(positions % classes):
        for label in labels.unique():
            rows = (labels == label).nonzero().flatten() + block * positions.shape[1]
            by_size.setdefault(len(rows), []).append((block, rows))
    return [
        (torch.stack([rows for _, rows in found]).to(device), torch.tensor([block for block, _ in found]).to(device))
        for size, found in by_size.items()
        if size > 1
    ]


def densification_loss(views: Tensor, classmates: Classmates, blocks: int, temperature: float) -> Tensor:
    """Return DD's loss, float32 [blocks]: images of a class are pushed apart.

    views: float32 [blocks * images, 3, height, width]. Of each class, ``KL(softmax(e / tau) || softmax(e))``, e the
    eigenvalues of the Gram matrix of its images (so in the paper's overview figure). As in the scripts the images are
    averaged down to 32 pixels, and the softened side is without gradient.

    The eigenvalues are found on the device, which on a GPU is waited for: torch looks whether they were found.
    """
    side = min(DENSIFIED_SIDE, views.shape[-1])
    flat = nn.functional.adaptive_avg_pool2d(views, side).flatten(1)
    total = torch.zeros(blocks, device=views.device)
    for rows, owners in classmates:
        own = flat[rows]  # [classes, images, values]
        eigenvalues = torch.linalg.eigvalsh(own @ own.mT)  # [classes, images]
        softened = (eigenvalues.detach() / temperature).log_softmax(1)
        divergence = (softened.exp() * (softened - eigenvalues.log_softmax(1))).sum(1)
        total = total.index_add(0, owners, divergence)
    return total


GATHER_BATCH = 64  # images of a pass


def square_means(statistics: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return, laid out like `statistics` [total], 0 for each mean and its square where the variance stands.

    Pieces of `lengths` alternate, mean and variance, as MatchedLayer hands them out.
    """
    means = statistics.split(list(lengths))[::2]
    return torch.cat([piece for mean in means for piece in (torch.zeros_like(mean), mean * mean)])


def gather_statistics(
    teachers: list[Teacher], real: RealData, config: GvbsmConfig, seed: int, plan: Plan, run: Run
) -> list[Tensor]:
    """Return what each teacher's statistics are to be, float32 [total] on the CPU.

    A unit of work is one teacher; sets of one comparison share it, whatever their budgets.
    """
    tasks = [gathering(teacher, real, config, seed, plan, run.shared) for teacher in teachers]
    return [tensors["statistics"] for _, tensors in run.shared.carry_out(tasks)]


def gathering(teacher: Teacher, real: RealData, config: GvbsmConfig, seed: int, plan: Plan, run: Run) -> Task:
    """Return the task of gathering one teacher's statistics.

    BatchNorms have theirs; of convolutions the real training images', cropped and flipped, in one pass of batches. In
    float32, whatever the plan. Confessed: the published scripts average the variances of shuffled batches; these are
    the variances of all images, so that images may be read in their order, class by class as it may be.
    """
    of = [config.patch_side, config.augmentation, config.crop_padding, seed]
    unit = f"statistics-{teacher.name.replace(':', '-')}-{sha256_bytes(json.dumps(of).encode())[:8]}"

    def make() -> dict[str, Tensor]:
        matcher = Matcher(teacher.model, 1, config.patch_side)
        layout = matcher.find_layout(real.image_size)
        total, first, checkpoint = torch.zeros_like(layout.known), 0, run.checkpoint(unit, teacher.hash)
        if stored := checkpoint.load():
            total, first = stored[0]["total"].to(plan.device), stored[1]["batch"]
        batches = torch.arange(len(real.train)).split(GATHER_BATCH)
        with torch.no_grad(), run.progress(f"statistics {teacher.name}", len(batches), first) as advance:
            for index in range(first, len(batches)):
                images = real.train.batch(batches[index]).to(plan.device).float() / 255
                augment = draw_augment(  # before normalisation: padded by black, as teachers saw them
                    config.augmentation, build_generator(seed, "statistics", teacher.name, index), len(images),
                    real.image_size, shift_limit=0, per_image=True, flip=real.flip, crop_padding=config.crop_padding,
                )  # fmt: skip
                images = apply_normalization(augment(images, slice(None)), real.mean, real.std)
                _, statistics = matcher(images.contiguous(memory_format=plan.memory_format))
                moments = statistics[0] + square_means(statistics[0], layout.lengths)  # E[x] and E[x^2]
                total += moments * (len(images) / len(real.train))
                advance()
                if index < len(batches) - 1 and (checkpoint.due or run.stopping):
                    checkpoint.save({"total": total}, {"batch": index + 1})
                    if run.stopping:
                        raise run.stop()
        found = total - square_means(total, layout.lengths)
        return {"statistics": torch.where(layout.known.isnan(), found, layout.known).cpu()}

    made_by = {"teacher": teacher.name, "hash": teacher.hash}
    return made_once(unit, made_by, f"statistics of {teacher.name!r}", make)


# (views, labels, average, keep) -> (label loss [groups], weighted statistics loss [groups], average after this step)
Matching = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def build_matching(
    teacher: nn.Module, target: Tensor, groups: int, image_size: int, config: GvbsmConfig, plan: Plan, calls: int
) -> tuple[Matching, StatisticsLayout]:
    """Return label loss and GSM's loss of one teacher for `groups` groups, compiled where `calls` repay it."""
    matcher = Matcher(teacher, groups, config.patch_side)
    layout = matcher.find_layout(image_size)
    target = target.to(plan.device)

    def compute(views: Tensor, labels: Tensor, average: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with plan.autocast():
            logits, statistics = matcher(views)
        label_loss = nn.functional.cross_entropy(logits, labels, reduction="none").unflatten(0, (groups, -1)).mean(1)
        distance, average = matching_loss(
            statistics, average, target, keep, layout, config.momentum, config.first_layer_weight
        )
        return label_loss, config.statistics_weight * distance, average

    return plan.compiled(compute, calls >= COMPILE_FROM_STEPS["recovery"]), layout


def build_terms(
    positions: Tensor,
    real: RealData,
    config: GvbsmConfig,
    plan: Plan,
    matchings: Sequence[tuple[Matching, StatisticsLayout]],
) -> tuple[Terms, list[Tensor]]:
    """Return the terms of G-VBSM's loss for blocks of `positions` int64 [blocks, images], and each teacher's averages.

    Label loss, weighted statistics loss and weighted densification loss, all of the augmented images; the first two by
    the teacher whose turn it is.
    """
    labels = (positions % real.classes).flatten().to(plan.device)
    classmates = find_classmates(positions, real.classes, plan.device)
    memory = [layout.known.new_full((len(positions), len(layout.known)), float("nan")) for _, layout in matchings]

    def terms(step: int, pixels: Tensor, generators: Sequence[torch.Generator]) -> tuple[Tensor, ...]:
        turn = step % len(matchings)
        compute, layout = matchings[turn]
        views = torch.cat(
            [
                draw_augment(
                    config.augmentation, draws, len(own), real.image_size, shift_limit=config.shift_limit,
                    per_image=config.per_image, flip=real.flip, crop_padding=config.crop_padding,
                )(own, slice(None))
                for own, draws in zip(pixels, generators, strict=True)
            ]
        )  # fmt: skip
        keep = torch.stack([draw_kept(layout, config.drop_rate, draws) for draws in generators])
        batch = views.contiguous(memory_format=plan.memory_format)
        label_loss, statistics_loss, average = compute(
            batch, labels, memory[turn], keep.to(plan.device, non_blocking=True)
        )
        memory[turn].copy_(average)
        density = densification_loss(views, classmates, len(positions), config.densification_temperature)
        return label_loss, statistics_loss, config.densification_weight * density

    return terms, memory


def draw_kept(layout: StatisticsLayout, drop_rate: float, generator: torch.Generator) -> Tensor:
    """Return which layers are matched in a step, float32 [layers]: BatchNorms always, convolutions by chance."""
    drawn = torch.rand(len(layout.convolutions), generator=generator) >= drop_rate
    return (drawn | ~layout.convolutions).float()


def check(real: RealData, networks: Mapping[str, nn.Module], ipc: int, config: GvbsmConfig) -> int:
    """Return 0, the real images that are kept, or raise StillroomError for a teacher that nothing can be matched in."""
    if not networks:
        raise StillroomError("gvbsm needs at least one teacher; see teachers.networks")
    for name, network in networks.items():
        if not matched_layers(network):
            raise StillroomError(
                f"teacher {name!r} has neither BatchNorm layers nor convolutions, whose statistics G-VBSM matches; use "
                "a network that has them, such as resnet18, mobilenet_v2 or convnet"
            )
    return 0


def distill(
    real: RealData, teachers: list[Teacher], ipc: int, config: GvbsmConfig, seed: int, plan: Plan, run: Run
) -> DistilledSet:
    """Return `ipc` images per class recovered from `teachers` in turn, without labels.

    Raises StillroomError for bad input and where a loss is not finite, TimeLimitReached where the run is to stop.
    """
    check(real, {teacher.name: teacher.model for teacher in teachers}, ipc, config)
    targets = gather_statistics(teachers, real, config, seed, plan, run)
    blocks = class_blocks(ipc, real.classes, config.images_per_batch, config.rounds)

    @functools.cache  # compiled once per number of blocks, and worth it by all of the run's steps
    def matchings_of(count: int, calls: int) -> list[tuple[Matching, StatisticsLayout]]:
        return [
            build_matching(teacher.model, target, count, real.image_size, config, plan, calls // len(teachers))
            for teacher, target in zip(teachers, targets, strict=True)
        ]

    def prepare(positions: Tensor, calls: int) -> tuple[Terms, list[Tensor]]:
        return build_terms(positions, real, config, plan, matchings_of(len(positions), calls))

    images = recover_images(config, real, teachers, blocks, seed, plan, run, prepare)
    return recover_set(config, real, teachers, ipc, seed, images)
