"""A running mean of the weights: what is validated, kept as the best and exported."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn


class Ema:
    """`model` holds decay · mean + (1 − decay) · weights after each step.

    The decay at update t is at most (1 + t) / (10 + t), so that the mean leaves the beginning behind
    (as TensorFlow's ExponentialMovingAverage does with num_updates). A decay of 0 follows the weights exactly.
    """

    def __init__(self, source: nn.Module, decay: float) -> None:
        self.source, self.decay = source, decay
        self.model = deepcopy(source).requires_grad_(False)
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(list(self.model.parameters()), list(self.source.parameters()), 1 - decay)
