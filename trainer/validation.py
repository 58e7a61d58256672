"""Validation during training: losses and spectral distances on fixed crops of unseen groups."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trainer.data import Batch
from trainer.losses import base_losses
from trainer.metrics import log_spectral_distances
from trainer.settings import TrainSettings

DISTANCES = ("lsd", "lsd_hf", "lsd_lf")
VALIDATION_NAMES = ("loss", "l1", "stft", *DISTANCES)


def crop_losses(model: nn.Module, batch: Batch, settings: TrainSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """The decoded crops (B, samples) and the recipe's losses, one value per crop."""
    wav_BN = batch.select(model(batch.tokens_BT7))
    weights = (settings.l1_weight, settings.stft_weight, settings.n_ffts)
    return wav_BN, base_losses(wav_BN, batch.target_BN, batch.valid_B, *weights)


@torch.no_grad()
def validation_sums(
    model: nn.Module, batches: Iterable[Batch], settings: TrainSettings, device: torch.device
) -> Tensor:
    """The sum over all crops of each of VALIDATION_NAMES, float64."""
    sums = torch.zeros(len(VALIDATION_NAMES), dtype=torch.float64, device=device)
    for batch in batches:
        batch = batch.to(device)
        wav_BN, losses = crop_losses(model, batch, settings)
        distances = crop_distances(wav_BN, batch)
        rows = [losses[name] if name in losses else distances[name] for name in VALIDATION_NAMES]
        sums += torch.stack([row.double().sum() for row in rows])
    return sums


def crop_distances(wav_BN: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Log-spectral distances of each crop's real samples, shape B each."""
    rows = [
        log_spectral_distances(wav_N[:valid], target_N[:valid])
        for wav_N, target_N, valid in zip(wav_BN, batch.target_BN, batch.valid_B.tolist(), strict=True)
    ]
    return {name: torch.tensor([row[name] for row in rows], device=wav_BN.device) for name in DISTANCES}
