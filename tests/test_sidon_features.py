"""The front end in torch against `transformers.SeamlessM4TFeatureExtractor`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torchaudio.functional import resample
from transformers import SeamlessM4TFeatureExtractor

from demo.voice import synthesize
from pipeline.sidon_features import FRAME_LENGTH, HOP, features
from tests.real_speech import some_recordings

REFERENCE = SeamlessM4TFeatureExtractor(feature_size=80, num_mel_bins=80, stride=2)


def reference(wav: npt.NDArray[np.float32]) -> torch.Tensor:
    found: torch.Tensor = REFERENCE(wav, sampling_rate=16_000, return_tensors="pt")["input_features"][0]
    return found


def speech(seconds: float, seed: int = 0) -> npt.NDArray[np.float32]:
    wav: npt.NDArray[np.float32] = resample(torch.from_numpy(synthesize(seed, 0, seconds)), 48_000, 16_000).numpy()
    return wav


@pytest.mark.parametrize("samples", [560, 719, 720, 880, 1039, 16_000, 16_079, 16_080, 47_999])
def test_equal_to_the_reference_at_any_length(samples: int) -> None:
    wav = speech(3.0)[:samples]
    (found,) = features(torch.from_numpy(wav)[None], [samples])
    frames = (samples - FRAME_LENGTH) // HOP + 1
    assert found.shape == (-(-frames // 2), 160), "an odd frame of 10 ms at the end is joined by zeros"
    assert torch.allclose(found, reference(wav), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "wav",
    [
        np.full(8000, 0.3, np.float32),  # nothing but an offset
        (0.5 + 0.1 * np.random.default_rng(0).standard_normal(8000)).astype(np.float32),
        (1e-5 * np.random.default_rng(1).standard_normal(8000)).astype(np.float32),
        np.zeros(8000, np.float32),
    ],
    ids=["constant", "offset", "faint", "silence"],
)
def test_equal_on_strange_signals(wav: npt.NDArray[np.float32]) -> None:
    (found,) = features(torch.from_numpy(wav)[None], [len(wav)])
    assert torch.isfinite(found).all()
    if wav.std() > 0:  # else the bands' variance is rounding noise
        assert torch.allclose(found, reference(wav), rtol=0, atol=1e-4)


def test_padding_changes_nothing() -> None:
    wavs = [torch.from_numpy(speech(2.0, seed)[:n]) for seed, n in enumerate((32_000, 4_960, 22_448))]
    lengths = [len(wav) for wav in wavs]
    batched = features(torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True), lengths)
    for wav, row in zip(wavs, batched, strict=True):
        (alone,) = features(wav[None], [len(wav)])
        assert torch.allclose(row[: len(alone)], alone, rtol=0, atol=1e-5)
        assert not row[len(alone) :].any()


def test_equal_on_real_speech(real_speech: Path) -> None:
    random = np.random.default_rng(0)
    for wav, rate in some_recordings(real_speech, 40):
        heard = resample(torch.from_numpy(wav), rate, 16_000).numpy()
        cut = heard[: int(random.integers(720, len(heard) + 1))]
        (found,) = features(torch.from_numpy(cut)[None], [len(cut)])
        assert torch.allclose(found, reference(cut), rtol=0, atol=1e-4)
