"""The statistics loss's gradient, which is written down and not left to autograd."""

from __future__ import annotations

import pytest
import torch

from stillroom.methods.recover import statistics_distance


@pytest.mark.parametrize("groups", [1, 3])
def test_written_down_gradient_is_the_derivative_of_the_distance(groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 2, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    mean = torch.randn(2, generator=generator, dtype=torch.float64)
    variance = torch.rand(2, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: statistics_distance(x, mean, variance, groups), x)
