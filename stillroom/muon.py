"""Muon: momentum whose step on a convolution's filters is orthogonal, for trainings of few epochs.

Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), with the scale of Liu et al., "Muon is
scalable for LLM training" (2025, Equation 4), by which one rate and one decay serve both kinds of parameters. torch has
it for matrices alone; a convolution's filters are one, seen as [filters, values of a filter].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Of the quintic iteration x <- a x + b x^3 + c x^5: after five steps singular values lie between about 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
UPDATE_SCALE = 0.2  # root mean square of an AdamW update, which the orthogonal one is brought to


class Muon(torch.optim.AdamW):
    """Orthogonal steps for filters [out, in > 1, height, width]; AdamW's for everything else.

    Depthwise filters mix no channels and matrices at the ends (classifiers) are known to want AdamW. Weight decay is
    decoupled in both. `dtype` is what the orthogonalisation is computed in.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        learning_rate: float,
        momentum: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(groups, learning_rate, fused=True)
        self.momentum, self.dtype = momentum, dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step; the gradients of filters are used up. A closure would compute them anew: there is none."""
        for group in self.param_groups:
            for parameter in filter(is_filter_bank, group["params"]):
                if parameter.grad is not None:
                    self._step_filters(parameter, parameter.grad, group["lr"], group["weight_decay"])
                    parameter.grad = None  # so that AdamW leaves these out
        super().step()

    def _step_filters(self, parameter: nn.Parameter, gradient: Tensor, rate: float, decay: float) -> None:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
            state["step"] = torch.zeros(())  # not used, but AdamW looks for it in whatever state it loads
        state["momentum"].lerp_(gradient, 1 - self.momentum)
        ahead = gradient.lerp(state["momentum"], self.momentum)  # Nesterov's
        update = orthogonalize(ahead.flatten(1).to(self.dtype)).to(parameter.dtype)
        scale = UPDATE_SCALE * max(update.shape) ** 0.5
        parameter.mul_(1 - rate * decay).add_(update.view(parameter.shape), alpha=-rate * scale)


def is_filter_bank(parameter: Tensor) -> bool:
    """Whether these are filters of a convolution that mixes channels."""
    return parameter.ndim == 4 and parameter.shape[1] > 1


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return nearly U V^T of ``matrix = U S V^T`` [rows, columns], by Newton and Schulz's iteration."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)  # singular values up to 1, where the iteration converges
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
