"""The adversarial losses, with the discriminators and the optimizer that belong to them; all saved together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trainer.data import Batch
from trainer.discriminators import Discriminators
from trainer.settings import BETAS, TrainSettings

PEAK = 0.8  # to which the target is scaled, and the decoded crop as much; DAC scales each to this peak of its own
QUIET = 0.01  # a target below −40 dB is not raised as if it were loud


class Adversary:
    """Least squares (LSGAN, arXiv 1611.04076) and feature matching (MelGAN, arXiv 1910.06711), summed over all
    discriminators as in DAC (arXiv 2306.06546), per crop and over real frames only.
    """

    def __init__(self, settings: TrainSettings, device: torch.device, bf16: bool) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            discriminators = Discriminators(
                settings.mpd_periods, settings.mpd_channels, settings.mrd_n_ffts, settings.mrd_channels
            )
        self.discriminators = discriminators.to(device)
        self.bf16 = bf16
        self.optimizer = torch.optim.AdamW(
            self.discriminators.parameters(), settings.discriminator_learning_rate, BETAS, fused=True
        )

    def discriminator_loss(self, wav_BN: Tensor, batch: Batch) -> Tensor:
        """Σ over discriminators of E[(1 − D(y))²] + E[D(x)²], shape B."""
        losses = [
            _real_frames((1 - y[-1]).square() + x[-1].square(), batch) for x, y in self._maps(wav_BN.detach(), batch)
        ]
        return torch.stack(losses).sum(dim=0)

    def generator_terms(self, wav_BN: Tensor, batch: Batch) -> dict[str, Tensor]:
        """`adversarial` = Σ E[(1 − D(x))²] and `features` = Σ over layers of E|map(x) − map(y)|, shape B each."""
        with self._frozen():
            adversarial, features = list[Tensor](), list[Tensor]()
            for x, y in self._maps(wav_BN, batch):
                adversarial.append(_real_frames((1 - x[-1]).square(), batch))
                features += [_real_frames((a - b).abs(), batch) for a, b in zip(x[:-1], y[:-1], strict=True)]
        return {"adversarial": torch.stack(adversarial).sum(dim=0), "features": torch.stack(features).sum(dim=0)}

    def state_dict(self) -> dict[str, Any]:
        return {"discriminators": self.discriminators.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.discriminators.load_state_dict(state["discriminators"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _maps(self, wav_BN: Tensor, batch: Batch) -> list[tuple[list[Tensor], list[Tensor]]]:
        """For each discriminator its maps of the decoded and of the target crops, float32 (or wider).

        The decoded crop gets the gradient of the scaled one as it is. Times the scale, as the chain rule has it, the
        quietest crop of a batch would outweigh all others; DAC, whose crops all have one loudness, has no such crop.
        """
        scale_B1 = PEAK / batch.target_BN.abs().amax(dim=1, keepdim=True).clamp(min=QUIET)
        scaled_BN = (scale_B1 * wav_BN).detach() + (wav_BN - wav_BN.detach())
        both = torch.cat([scaled_BN, scale_B1 * batch.target_BN])
        with torch.autocast(wav_BN.device.type, torch.bfloat16, enabled=self.bf16):
            found = self.discriminators(both)
        exact = wav_BN.dtype
        split = [[map_.to(exact).chunk(2) for map_ in maps] for maps in found]
        return [([x for x, _ in maps], [y for _, y in maps]) for maps in split]

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        self.discriminators.requires_grad_(False)
        try:
            yield
        finally:
            self.discriminators.requires_grad_(True)


def _real_frames(values_BCTW: Tensor, batch: Batch) -> Tensor:
    """Mean over a map's real frames, shape B: the padded end of a short crop says nothing about the decoder."""
    frames, samples = values_BCTW.shape[2], batch.target_BN.shape[1]
    real_B = (batch.valid_B * frames).div(samples, rounding_mode="floor").clamp(1, frames)
    mask_BT = torch.arange(frames, device=values_BCTW.device) < real_B[:, None]
    return (values_BCTW.mean(dim=(1, 3)) * mask_BT).sum(dim=1) / real_B
