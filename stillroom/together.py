"""One training by several processes: torchrun begins them, torch's DistributedDataParallel averages their gradients.

    torchrun --nproc-per-node 4 -m stillroom.cli run infer-imagenet-ipc50 ...

The process of rank 0, the leader, does what an ordinary process does: it alone reads, writes, holds the run directory's
lock, draws batches and measures. The others, its helpers, wait until it trains a network (`train.fit`), and then take
their share of every batch that it has drawn, augmented and labelled: they pass it forward and backward, and take the
same step. BatchNorms see the whole batch's statistics. So what is computed is what one process computes, but for the
order in which floats are summed; dropout, which each process draws for itself, is other draws of the same kind.
"""

from __future__ import annotations

import copy
import gc
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # before `join`: imported after it, its functions' defaults would keep the group alive
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stillroom.compute import Plan
from stillroom.errors import StillroomError

PATIENCE = timedelta(days=30)  # of helpers, while the leader does what it does alone

_is_midway = False  # whether the leader is within a step, where helpers cannot hear a word from it


@dataclass(frozen=True, eq=False)
class Job:
    """What helpers are told of a training: the network, the state of network and optimiser, and how it is trained.

    settings: a train.TrainConfig. loss_function: of a module, or a partial of one, so that it can be sent.
    """

    model: nn.Module
    state: dict[str, Tensor]
    settings: Any
    loss_function: Callable[[Tensor, Tensor], Tensor]
    plan: Plan


@dataclass(frozen=True, eq=False)
class Share:
    """What one process computes of a step: its part of the batch, whose mean loss counts by `weight`.

    The mean over processes of weighted losses is the mean loss of the batch. seed: of its dropout.
    """

    images: Tensor
    targets: Tensor
    weight: float
    rate: float
    seed: int


def launched() -> bool:
    """Whether torchrun began this process as one of several."""
    return dist.is_available() and dist.is_torchelastic_launched() and int(os.environ.get("WORLD_SIZE", "1")) > 1


def join() -> bool:
    """Meet the other processes that torchrun began; return whether this one leads."""
    rank, card = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    with_cards = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= torch.cuda.device_count()  # one for each
    if with_cards:
        torch.cuda.set_device(card)
    if rank > 0:  # torchrun passes signals on to all; the leader says when to end
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    dist.init_process_group("cpu:gloo,cuda:nccl" if with_cards else "gloo", timeout=PATIENCE)
    return rank == 0


def leave() -> None:
    """End the meeting, with gloo's threads: one that still held a tensor as Python ends would abort the process.

    The leader lets the helpers go first. Where these cannot hear it the group stays, since to end it would be to wait.
    """
    if _is_midway:
        return
    if dist.get_rank() == 0:
        _tell(None)
    gc.collect()  # networks within reference cycles hold the group
    dist.destroy_process_group()


@contextmanager
def lead(job: Job, batch: int) -> Iterator[nn.Module]:
    """Yield the network of a job to be called in training, while helpers take their shares of what `hand_out` is given.

    Raises StillroomError for a batch of fewer images than there are processes, and for a network whose BatchNorms
    cannot be kept in step.
    """
    if batch < job.plan.processes:
        raise StillroomError(
            f"a batch has {batch} images, but each of {job.plan.processes} processes needs one; give torchrun a "
            "smaller --nproc-per-node"
        )
    _refuse_others(job.model)
    state = {name: value.cpu() for name, value in job.state.items()}
    _tell(replace(job, model=copy.deepcopy(job.model).to("cpu"), state=state))
    try:
        with helping(job.model) as network:
            yield network
    finally:
        if not _is_midway:
            _tell(None)


def hand_out(images: Tensor, targets: Tensor, rate: float, seed: int) -> Share:
    """Give every process its share of a batch on the leader's device, and return the leader's own."""
    global _is_midway
    images, targets = images.contiguous(), targets.contiguous()
    _tell((images.shape, images.dtype, targets.shape, targets.dtype, rate, seed))
    _is_midway = True
    return _share(images, targets, rate, seed)


def average(loss: Tensor) -> Tensor:
    """Return the mean over processes of a share's weighted loss, the loss of the batch: a scalar. A step ends so."""
    global _is_midway
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    _is_midway = False
    return loss / dist.get_world_size()


def jobs() -> Iterator[tuple[Job, Plan]]:
    """Yield what the leader trains, one job after the other, and the plan by this process's card, until it leaves."""
    while (job := _hear()) is not None:
        device = job.plan.device
        yield job, replace(job.plan, device=f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device)


@contextmanager
def helping(model: nn.Module) -> Iterator[nn.Module]:
    """Yield a placed network as one whose gradients are averaged over processes, within this context."""
    with _synced(model):
        yield DistributedDataParallel(model)


def shares(device: str) -> Iterator[Share]:
    """Yield this process's share of every batch of a job until that is done."""
    while (word := _hear()) is not None:
        shape, dtype, target_shape, target_dtype, rate, seed = word
        images = torch.empty(shape, dtype=dtype, device=device)
        yield _share(images, torch.empty(target_shape, dtype=target_dtype, device=device), rate, seed)


def _share(images: Tensor, targets: Tensor, rate: float, seed: int) -> Share:
    for tensor in (images, targets):
        dist.broadcast(tensor, 0)
    rank, size, count = dist.get_rank(), dist.get_world_size(), len(images)
    own = slice(count * rank // size, count * (rank + 1) // size)
    weight = (own.stop - own.start) * size / count
    return Share(images[own], targets[own], weight, rate, seed + rank)


def _tell(word: Any) -> None:
    dist.broadcast_object_list([word], 0, device=torch.device("cpu"))


def _hear() -> Any:
    heard = [None]
    dist.broadcast_object_list(heard, 0, device=torch.device("cpu"))
    return heard[0]


# -- BatchNorm over all shares -------------------------------------------------------------------------------------


class _SumOverProcesses(torch.autograd.Function):
    """``sum_r x_r``: every process's loss depends on it, so the gradient is summed over processes, too."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the images of all processes (Ioffe & Szegedy, ICML 2015, Algorithm 1), in float32.

    Confessed: torch's SyncBatchNorm works on GPUs alone, and could not be tested on others. Mean first and squares of
    deviations then, as torch's own BatchNorm does, since the mean of squares less the square of the mean loses digits.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            values, shape = input.float(), (1, -1, 1, 1)
            count = values.new_tensor([values.numel() / values.shape[1]])
            sums = _SumOverProcesses.apply(torch.cat([values.sum((0, 2, 3)), count]))
            total = sums[-1].detach()
            mean = sums[:-1] / total
            deviations = values - mean.view(shape)
            variance = _SumOverProcesses.apply(deviations.square().sum((0, 2, 3))) / total
            self._remember(mean.detach(), variance.detach() * total / (total - 1).clamp_min(1))
            normal = deviations * (variance + self.eps).rsqrt().view(shape)
            if self.weight is not None:
                normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(input.dtype)

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


def _refuse_others(model: nn.Module) -> None:
    norms = {type(layer) for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)}
    for other in norms - {nn.BatchNorm2d}:
        raise StillroomError(
            f"the network has layers {other.__name__}, whose statistics several processes do not share; train it by "
            "one process, or take a network with plain BatchNorms, such as those of the table"
        )


@contextmanager
def _synced(model: nn.Module) -> Iterator[None]:
    """Let the model's BatchNorms be over all processes within this context; parameters and names stay as they are."""
    layers = [layer for layer in model.modules() if type(layer) is nn.BatchNorm2d]
    for layer in layers:
        layer.__class__ = SyncedBatchNorm2d
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.BatchNorm2d
