"""The floors that benchmarks are measured against."""

from __future__ import annotations

import pytest
from snac.layers import Decoder

from benchmarks.training_step import least_bytes
from shards.contract import TARGET_RATE
from trainer.decoder import RATES_48K


@pytest.mark.parametrize("bf16", [False, True])
def test_least_bytes_of_a_step(bf16: bool) -> None:
    latent, width = 12, 64
    decoder = Decoder(latent, width, RATES_48K, True, depthwise=True, attn_window_size=None)
    per_sample, passed, samples = 0.0, 2 if bf16 else 4, 512 * RATES_48K[-1]  # at 48 kHz for each latent frame
    per_sample += passed * (3 * latent + 2 * latent + 3 * latent + 2 * width) / samples
    for number, rate in enumerate(RATES_48K):
        if number == len(RATES_48K) - 1:
            passed = 4  # the new block and the head are float32 in any case
        per_sample += passed * 3 * width / samples
        width, samples = width // 2, samples // rate
        per_sample += passed * (2 + 3 * 5) * width / samples
    per_sample += passed * (3 * width + 2)
    assert least_bytes(decoder, bf16) == pytest.approx(per_sample * TARGET_RATE)
