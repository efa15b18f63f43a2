"""The published loop for one compensator, written from its description: what the step benchmark compares with.

float32, channels first, eager. A forward hook on every BatchNorm reduces the layer's input to its mean and biased
variance and takes the L2 norms of their differences from the running ones; the first layer counts ten times. The
teacher is in eval mode and frozen, so that only the compensator gets a gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn


class PublishedLoop:
    """One slot's optimisation: Adam (0.5, 0.9) on one compensator, cosine learning rate, one shift for the batch."""

    def __init__(self, teacher: nn.Module, images: Tensor, labels: Tensor, steps: int, alpha: float = 1.0) -> None:
        self.teacher = copy.deepcopy(teacher).to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
        self.images, self.labels, self.steps, self.alpha = images, labels, steps, alpha
        self.compensator = torch.zeros_like(images[:1], requires_grad=True)
        self.optimizer = torch.optim.Adam([self.compensator], lr=0.25, betas=(0.5, 0.9))
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.layers: list[Tensor] = []
        for module in self.teacher.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(self.record)

    def record(self, norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0]
        mean = x.mean([0, 2, 3])
        variance = x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1).var(1, unbiased=False)
        assert isinstance(norm.running_mean, Tensor)
        assert isinstance(norm.running_var, Tensor)
        self.layers.append(torch.norm(norm.running_var - variance, 2) + torch.norm(norm.running_mean - mean, 2))

    def losses(self, shift: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the label loss and alpha times the statistics loss, both scalars."""
        self.layers.clear()
        views = torch.roll(self.images + self.compensator, shift, dims=(2, 3))
        label_loss = nn.functional.cross_entropy(self.teacher(views), self.labels)
        statistics_loss = sum((10.0 if i == 0 else 1.0) * distance for i, distance in enumerate(self.layers))
        return label_loss, self.alpha * torch.as_tensor(statistics_loss)

    def step(self, draw_shift: Callable[[], tuple[int, int]]) -> float:
        """Take one step and return the statistics loss: the scripts, too, read a loss back at every step."""
        self.optimizer.zero_grad()
        label_loss, statistics_loss = self.losses(draw_shift())
        (label_loss + statistics_loss).backward()
        self.optimizer.step()
        self.scheduler.step()
        return statistics_loss.item()
