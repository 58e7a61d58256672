"""Weights of losses as shares of the gradient that reaches the audio."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

DECAY = 0.999  # of the running mean of a loss's gradient norm
PREFIX = "gradient_"  # of a loss's norm among the logged values


class Balancer:
    """EnCodec's (arXiv 2210.13438 §3.4): ĝᵢ = λᵢ / Σλ · gᵢ / ⟨‖gᵢ‖⟩, where gᵢ is the gradient by the decoded audio.

    ⟨‖gᵢ‖⟩ is the running mean over the crops of earlier steps, not of this one: so it does not depend on how a batch
    is split. The first step has no earlier ones and takes λᵢ gᵢ as it is.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = weights
        self.sums: dict[str, float] = {}
        self.mass = 0.0  # Σ of the running mean's weights: corrects its start at zero

    def gradient(self, terms: Mapping[str, Tensor], wav_BN: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The balanced gradient of each crop (B, N), and each loss's norms (B) by name."""
        total_BN, norms = torch.zeros_like(wav_BN), {}
        share = 1 / sum(self.weights[name] for name in terms)
        for name, value_B in terms.items():
            (gradient_BN,) = torch.autograd.grad(value_B.sum(), wav_BN, retain_graph=True)
            norms[PREFIX + name] = gradient_BN.norm(dim=1)
            mean = self.sums.get(name, 0.0) / self.mass if self.mass else 0.0
            total_BN += self.weights[name] * (share / mean if mean else 1.0) * gradient_BN
        return total_BN, norms

    def update(self, means: Mapping[str, float]) -> None:
        """Takes the global batch's mean norms into the running means."""
        for name, value in means.items():
            if name.startswith(PREFIX):
                key = name.removeprefix(PREFIX)
                self.sums[key] = DECAY * self.sums.get(key, 0.0) + (1 - DECAY) * value
        self.mass = DECAY * self.mass + (1 - DECAY)

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "mass": self.mass}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.mass = dict(state["sums"]), state["mass"]
