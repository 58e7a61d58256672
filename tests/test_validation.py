"""Validation: fixed crops of unseen groups, and means that do not depend on how the crops are batched or shared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from snac import SNAC

from shards.index import load
from tests.training_helpers import CPU, train_settings
from trainer.data import fixed_batches
from trainer.decoder import CodesToLatent, CropDecoder, warm_start
from trainer.metrics import log_spectral_distances
from trainer.validation import crop_losses, validate


@torch.no_grad()
def test_validation_is_the_mean_over_crops(work: Path, snac: SNAC, tmp_path: Path) -> None:
    index = load(work / "shards", "validation")
    model = CropDecoder(CodesToLatent(snac), warm_start(snac, "zero", 0))
    weights = {"log_stft_weight": 0.5, "mel_weight": 15.0}
    found = {}
    for size in (5, 2, 1):
        settings = train_settings(work, tmp_path, eval_samples=5, eval_batch_size=size, **weights)
        found[size] = validate(model, (index,), 2, settings, CPU)
        assert found[size] == pytest.approx(found[5], rel=1e-4)
    losses, distances = [], []
    for batch in fixed_batches(index, 5, 1, 2, 0):
        wav_BN, valid = batch.only_real(model(batch.tokens_BT7)), int(batch.valid_B)
        losses.append(float(crop_losses(wav_BN, batch, settings)["loss"]))
        distances.append(log_spectral_distances(wav_BN[0, :valid], batch.target_BN[0, :valid])["lsd_hf"])
    assert found[1]["loss"] == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert found[1]["lsd_hf"] == pytest.approx(sum(distances) / 5, rel=1e-5)
