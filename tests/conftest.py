"""Shared by all tests: one thread (two test processes on two cores would starve each other), and a toy world."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
