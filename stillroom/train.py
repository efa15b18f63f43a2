"""The one training loop, for teachers on real images and for students on views.

A batch's order and augmentation derive from (seed, unit, epoch or step) alone, so a resumed training draws what the
uninterrupted one would have drawn. Nothing inside the loop waits for the device except once an epoch.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillroom import augment, together
from stillroom.augment import Mixing
from stillroom.compute import COMPILE_FROM_STEPS, Plan, build_generator, derive_seed, seed_global
from stillroom.data import Images
from stillroom.errors import StillroomError, check_choices
from stillroom.muon import Muon
from stillroom.run import Checkpoint, Run

EVALUATION_BATCH = 500  # images of up to 64 px that pass at once where nothing is kept for a backward pass


@dataclass(frozen=True)
class TrainConfig:
    """How a network is trained: optimiser, schedule and augmentation."""

    epochs: int = 200
    batch_size: int = 128
    optimizer: Literal["sgd", "adam", "adamw", "muon"] = "sgd"  # adam: decay in the gradient; adamw: apart from it
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    momentum: float = 0.9  # SGD and Muon only
    nesterov: bool = False  # SGD only
    schedule: Literal["cosine", "one_cycle"] = "cosine"  # cosine: set once an epoch; one_cycle: linear, every step
    cosine_slowdown: float = 1.0  # cosine: 2 goes half its way and ends at half the rate; EDC's zeta
    warmup_fraction: float = 0.2  # one_cycle: share of the steps in which the learning rate rises
    decay_norms: bool = True  # whether weight decay acts on normalisation parameters and biases too
    crop_padding: int = 4  # pixels of black around the image before a random crop; 0: no crop
    flip: bool = True  # random horizontal flip, where the dataset allows it
    resized_crop: bool = False  # RandomResizedCrop in place of the padded crop
    resized_crop_scale: tuple[float, float] = (0.08, 1.0)  # share of the area that a resized crop keeps
    shuffle_patches: int = 1  # n: the rows and the columns of n x n patches in random order, before any crop; 1: as is
    mixup_beta: float = 0.0  # Beta(b, b); 0: no mixup
    mixup_folded: bool = (
        False  # True: weight max(l, 1 - l) as in Algorithm 2; False: plain l as in the published scripts
    )
    cutmix_beta: float = 0.0  # Beta(b, b); 0: no CutMix

    def __post_init__(self) -> None:
        check_choices(self, "train")
        for name, low in (
            ("epochs", 1),
            ("batch_size", 1),
            ("crop_padding", 0),
            ("shuffle_patches", 1),
            ("mixup_beta", 0),
            ("cutmix_beta", 0),
            ("weight_decay", 0),
        ):
            if not getattr(self, name) >= low:
                raise StillroomError(f"train.{name} is {getattr(self, name)}; give {low} or more")
        if self.mixup_beta and self.cutmix_beta:
            raise StillroomError(
                f"train.mixup_beta is {self.mixup_beta} and train.cutmix_beta {self.cutmix_beta}, but a batch is mixed "
                "one way; set one of them to 0"
            )
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise StillroomError(f"train.learning_rate is {self.learning_rate}; give a positive number such as 0.1")
        if not (math.isfinite(self.cosine_slowdown) and self.cosine_slowdown >= 1):
            raise StillroomError(
                f"train.cosine_slowdown is {self.cosine_slowdown}; give 1 for a cosine down to 0, or more, such as 2"
            )
        if not 0 <= self.warmup_fraction < 1:
            raise StillroomError(f"train.warmup_fraction is {self.warmup_fraction}; give a share from 0 to below 1")


def schedule_rate(config: TrainConfig, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """Return the learning rate of one step.

    cosine: half a cosine from the configured rate towards 0, set once an epoch as the field's scripts do, of which a
    `cosine_slowdown` of zeta takes the first 1 / zeta: rate (1 + cos(pi epoch / (zeta epochs))) / 2 (Shao et al., EDC,
    NeurIPS 2024, Section 3.2). one_cycle: a straight line up over `warmup_fraction` of the steps, then down to 0.
    """
    if config.schedule == "cosine":
        epochs = math.ceil(total_steps / steps_per_epoch)
        angle = math.pi * (step // steps_per_epoch) / (config.cosine_slowdown * epochs)
        return config.learning_rate * 0.5 * (1 + math.cos(angle))
    peak = config.warmup_fraction * total_steps
    share = (step + 1) / peak if step < peak else (total_steps - step) / (total_steps - peak)
    return config.learning_rate * min(share, 1.0)


def fit_batch(images: int, image_size: int) -> int:
    """Return how many images of `image_size` px take the memory of `images` of 64 px; never more, and at least 1."""
    return max(1, min(images, images * 64**2 // image_size**2))


def apply_normalization(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return float32 ``(images - mean) / std`` per channel; images [batch, 3, h, w] in [0, 1], or uint8."""
    if images.dtype == torch.uint8:
        images = images.float() / 255
    offset, scale = (  # without waiting for the device, as a copy by new_tensor would
        torch.tensor(values, dtype=images.dtype).view(1, -1, 1, 1).to(images.device, non_blocking=True)
        for values in (mean, std)
    )
    return (images - offset) / scale


def augment_images(images: Tensor, config: TrainConfig, flip: bool, generator: torch.Generator) -> Tensor:
    """Return `images` [batch, 3, h, w] (pixels, black is 0, not normalised) shuffled, cropped, flipped at random."""
    batch, height, width = images.shape[0], images.shape[-2], images.shape[-1]
    if config.shuffle_patches > 1:
        images = augment.apply_patch_orders(images, augment.draw_patch_orders(generator, batch, config.shuffle_patches))
    if config.resized_crop:
        boxes = augment.draw_resized_crops(generator, batch, height, width, scale=config.resized_crop_scale)
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        images = augment.apply_resized_crops(images, boxes, height)
    elif config.crop_padding:
        offsets = augment.draw_crops(generator, batch, config.crop_padding)
        images = augment.apply_crops(images, offsets, config.crop_padding)
    if config.flip and flip:
        images = augment.apply_flips(images, augment.draw_flips(generator, batch))
    return images


def draw_mixing(config: TrainConfig, images: Tensor, generator: torch.Generator) -> Mixing | None:
    """Return one draw of the configured mixing for `images` [batch, 3, h, w], None where there is none."""
    batch, _, height, width = images.shape
    if config.mixup_beta:
        return augment.draw_mixup(generator, batch, config.mixup_beta, folded=config.mixup_folded)
    return augment.draw_cutmix(generator, batch, config.cutmix_beta, height, width) if config.cutmix_beta else None


def mix_images(images: Tensor, mixing: Mixing | None) -> Tensor:
    """Return `images` [batch, 3, h, w] mixed: a box of the partner pasted in (CutMix), or the weighted mean (mixup)."""
    if mixing is None:
        return images
    return augment.apply_mixup(images, mixing) if mixing.box is None else augment.apply_cutmix(images, mixing)


@dataclass(frozen=True)
class Epochs:
    """In what batches `count` items are visited: shuffled anew each epoch, the incomplete last batch left out.

    After `period` epochs order and augmentation begin anew: labels that are stored for so many are replayed.

    Confessed: the published scripts keep the incomplete batch. One shape for all steps compiles once, and no batch
    statistics come from a handful of images. Students are trained by steps that make up for it (`students.steps_for`).
    """

    count: int
    batch_size: int
    seed: int
    path: tuple[str | int, ...]
    period: int | None = None  # None: every epoch draws its own

    @property
    def batch(self) -> int:
        return min(self.batch_size, self.count)

    @property
    def steps(self) -> int:
        return self.count // self.batch

    def rows(self, epoch: int) -> Tensor:
        """Return the epoch's items, int64 [steps, batch], on the CPU."""
        order = torch.randperm(self.count, generator=build_generator(self.seed, *self.path, "order", epoch))
        return order[: self.steps * self.batch].view(self.steps, self.batch)

    def drawn_step(self, step: int) -> int:
        """Return the step whose order and augmentation the training's `step` takes: its own, or one before it."""
        return step if self.period is None else step % (self.period * self.steps)

    def generator(self, drawn_step: int) -> torch.Generator:
        """Return the CPU generator that augments and mixes the batch of `drawn_step`."""
        return build_generator(self.seed, *self.path, "augment", drawn_step)


Batch = tuple[Tensor, Tensor]  # images and targets
BatchFunction = Callable[[Tensor, torch.Generator, int], Batch]


def draw_ahead(draw: Callable[[int], Batch], steps: range, threads: ThreadPoolExecutor) -> Iterator[Batch]:
    """Yield ``draw(step)`` of all steps, each drawn by a thread while the one before is worked on.

    What drawing raises reaches whoever asks for that batch.
    """
    coming = [threads.submit(draw, step) for step in steps[:1]]
    for step in steps:
        batch = coming.pop().result()
        coming += [threads.submit(draw, next_step) for next_step in steps[step - steps.start + 1 :][:1]]
        yield batch


def fit(
    model: nn.Module,
    config: TrainConfig,
    epochs: Epochs,
    draw_batch: BatchFunction,
    loss_function: Callable[[Tensor, Tensor], Tensor],
    plan: Plan,
    run: Run,
    checkpoint: Checkpoint,
    *,
    label: str,
    total_steps: int | None = None,
    measure: Callable[[nn.Module], dict[str, float]] | None = None,
    measure_every_epochs: int = 0,
    ahead: bool = False,
) -> list[dict[str, float]]:
    """Train `model` in place and return one row per epoch: loss, learning rate, seconds, and what `measure` returned.

    The seconds are those of training since its first step, in whatever processes.

    `draw_batch(rows, generator, drawn_step)` returns normalised images float32 [batch, 3, h, w] and targets on the
    plan's device; by the last, a step of `Epochs.drawn_step`, stored labels are found.
    `loss_function(logits float32, targets)` returns a scalar. `total_steps` overrides the number of epochs.
    `measure` runs after the last epoch, and every `measure_every_epochs` epochs where that is above 0. `ahead`: whether
    the next batch is drawn in a thread while a step runs, for images that are decoded batch by batch; the same bits.

    Where the plan has several processes they share every batch (together.py), and nothing is compiled. Raises
    StillroomError where the loss is not finite (the last good checkpoint is kept), TimeLimitReached where the run is to
    stop; its state is saved then.
    """
    steps = total_steps or config.epochs * epochs.steps
    model = plan.place(model)
    dtype = torch.bfloat16 if plan.precision == "bfloat16" else torch.float32
    optimizer = build_optimizer(model, config, dtype)
    history: list[dict[str, float]] = []
    first = 0
    begun = time.monotonic()
    loss_sum = torch.zeros((), device=plan.device)
    if stored := checkpoint.load():
        tensors, state = stored
        load_training_state(model, optimizer, tensors)
        first, history, loss_sum = state["step"], state["history"], tensors["loss_sum"].to(plan.device)
        begun -= state["seconds"]

    network, shared = model, plan.processes > 1

    def compute_loss(images: Tensor, targets: Tensor) -> Tensor:
        with plan.autocast():
            logits = network(images)
        return loss_function(logits.float(), targets)

    compute_loss = compute_loss if shared else plan.compiled(compute_loss, steps >= COMPILE_FROM_STEPS["training"])
    model.train()
    rows_of = functools.lru_cache(1)(epochs.rows)

    def draw(step: int) -> Batch:
        drawn_step = epochs.drawn_step(step)
        epoch, within = divmod(drawn_step, epochs.steps)
        return draw_batch(rows_of(epoch)[within], epochs.generator(drawn_step), drawn_step)

    devices = [plan.device] if plan.device.startswith("cuda") else []
    with contextlib.ExitStack() as stack:
        if shared:
            job = together.Job(model, training_state(model, optimizer), config, loss_function, plan)
            network = stack.enter_context(together.lead(job, epochs.batch))
        stack.enter_context(torch.random.fork_rng(devices))
        advance = stack.enter_context(run.progress(label, steps, first))
        batches: Iterator[Batch] = map(draw, range(first, steps))
        if ahead:
            batches = draw_ahead(draw, range(first, steps), stack.enter_context(ThreadPoolExecutor(1, "draws")))
        for step in range(first, steps):
            epoch, within = divmod(step, epochs.steps)
            rate = schedule_rate(config, step, steps, epochs.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            images, targets = next(batches)
            # Dropout and stochastic depth draw from the global generator.
            seed, weight = derive_seed(epochs.seed, *epochs.path, "dropout", step), 1.0
            if shared:
                share = together.hand_out(images, targets, rate, seed)
                images, targets, weight = share.images, share.targets, share.weight
            seed_global(seed, plan.device)
            loss = compute_loss(images.contiguous(memory_format=plan.memory_format), targets)
            if shared:
                loss = loss * weight
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss_sum += together.average(loss) if shared else loss.detach()
            advance()
            if within == epochs.steps - 1 or step == steps - 1:
                row = {"epoch": epoch + 1, "step": step + 1, "learning_rate": rate}
                row["loss"] = float(loss_sum) / (within + 1)
                if not math.isfinite(row["loss"]):
                    raise StillroomError(
                        f"the loss of {label} is {row['loss']} in epoch {epoch + 1}; lower the learning rate "
                        f"(now {config.learning_rate}) or use --compute.precision float32, with a new --out"
                    )
                loss_sum.zero_()
                row["seconds"] = round(time.monotonic() - begun, 2)
                due = measure_every_epochs and (epoch + 1) % measure_every_epochs == 0
                if measure is not None and (due or step == steps - 1):
                    row |= measure(model)
                    model.train()
                history.append(row)
                run.event("epoch", unit=label, **row)
            if step < steps - 1 and (checkpoint.due or run.stopping) and bool(loss_sum.isfinite()):
                saved = training_state(model, optimizer) | {"loss_sum": loss_sum}
                so_far = {"step": step + 1, "history": history, "seconds": time.monotonic() - begun}
                checkpoint.save(saved, so_far)
                if run.stopping:
                    raise run.stop()
    return history


def help_others() -> None:
    """Take a share of every batch of what the leader trains until it leaves: what torchrun's other processes do."""
    for job, plan in together.jobs():
        plan.activate()
        model = plan.place(job.model).train()
        optimizer = build_optimizer(model, job.settings, plan.dtype)
        load_training_state(model, optimizer, job.state)
        with together.helping(model) as network:
            for share in together.shares(plan.device):
                for group in optimizer.param_groups:
                    group["lr"] = share.rate
                seed_global(share.seed, plan.device)
                with plan.autocast():
                    logits = network(share.images.contiguous(memory_format=plan.memory_format))
                loss = job.loss_function(logits.float(), share.targets) * share.weight
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                together.average(loss)


def build_optimizer(model: nn.Module, config: TrainConfig, dtype: torch.dtype = torch.float32) -> torch.optim.Optimizer:
    """Return the configured optimiser over all parameters of `model`; Muon orthogonalises in `dtype`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if config.decay_norms or p.ndim > 1]
    plain = [p for p in parameters if not config.decay_norms and p.ndim <= 1]
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((decayed, config.weight_decay), (plain, 0.0))
        if group
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            groups, config.learning_rate, momentum=config.momentum, nesterov=config.nesterov, fused=True
        )
    if config.optimizer == "muon":
        return Muon(groups, config.learning_rate, config.momentum, dtype)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return kind(groups, config.learning_rate, fused=True)


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return model and optimiser as one flat dictionary of tensors, fit for a safetensors file."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if value is not None:
                tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
    return {name: value.detach().contiguous() for name, value in tensors.items()}


def load_training_state(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put a state made by `training_state` back."""
    prefix = "model."
    model.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, field = name.split(".", 2)
            state.setdefault(int(index), {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    # A file keeps no memory format, and the fused optimisers pair elements by where they lie, not by index.
    for parameter, moments in optimizer.state.items():
        for field, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                moments[field] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


@torch.no_grad()
def measure_accuracy(
    model: nn.Module, images: Images, mean: tuple[float, ...], std: tuple[float, ...], plan: Plan
) -> dict[str, float]:
    """Return {"top1", "top5"}: shares in [0, 1] of `images` whose label has the highest logit, or one of five."""
    model.eval()
    images = images.to(plan.device)
    right = torch.zeros(2, device=plan.device)
    image_size = images.batch(torch.zeros(1, dtype=torch.int64)).shape[-1]
    for rows in torch.arange(len(images)).split(fit_batch(EVALUATION_BATCH, image_size)):
        batch = apply_normalization(images.batch(rows).to(plan.device), mean, std)
        with plan.autocast():
            logits = model(batch.contiguous(memory_format=plan.memory_format)).float()
        labels = images.labels[rows].to(plan.device)
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # [batch, 5]
        right += torch.stack([ranked[:, 0].sum(), ranked.sum()])
    top1, top5 = (right / len(images)).tolist()
    return {"top1": top1, "top5": top5}
