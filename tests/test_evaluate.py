"""Validation: fixed crops of unseen groups, and means that do not depend on the batch size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from snac import SNAC

from shards.index import load
from tests.training_helpers import train_settings
from trainer.data import fixed_batches
from trainer.decoder import CodesToLatent, CropDecoder, warm_start
from trainer.metrics import log_spectral_distances
from trainer.validation import VALIDATION_NAMES, crop_losses, validation_sums


@torch.no_grad()
def test_validation_is_the_mean_over_crops(work: Path, snac: SNAC, tmp_path: Path) -> None:
    index, settings = load(work / "shards", "validation"), train_settings(work, tmp_path)
    model = CropDecoder(CodesToLatent(snac), warm_start(snac, "zero", 0))
    cpu = torch.device("cpu")
    sums = {size: validation_sums(model, fixed_batches(index, 5, size, 2, 0), settings, cpu) for size in (5, 2, 1)}
    torch.testing.assert_close(sums[2], sums[5], rtol=1e-4, atol=0)
    torch.testing.assert_close(sums[1], sums[5], rtol=1e-4, atol=0)
    found = dict(zip(VALIDATION_NAMES, (sums[1] / 5).tolist(), strict=True))
    losses, distances = [], []
    for batch in fixed_batches(index, 5, 1, 2, 0):
        wav_BN, values = crop_losses(model, batch, settings)
        valid = int(batch.valid_B)
        losses.append(float(values["loss"]))
        distances.append(log_spectral_distances(wav_BN[0, :valid], batch.target_BN[0, :valid])["lsd_hf"])
    assert found["loss"] == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert found["lsd_hf"] == pytest.approx(sum(distances) / 5, rel=1e-5)
