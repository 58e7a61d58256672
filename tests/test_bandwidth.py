"""Where a spectrum ends is measured: no header and no resampler fools it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.interpolate
import scipy.signal
import torch
from torchaudio.functional import resample

from codec.audio import Samples
from demo.voice import synthesize
from pipeline.bandwidth import Spectrum, bandwidth_hz
from tests.real_speech import some_recordings

RATES = (8_000, 11_025, 16_000, 22_050, 24_000, 32_000)


def at(samples: Samples, rate: int) -> tuple[Any, Any]:
    """The instants of samples at `rate`, and those of 48 kHz, both in samples at `rate`."""
    return np.arange(len(samples)), np.arange(len(samples) * 48_000 // rate) * rate / 48_000


def polyphase(samples: Samples, rate: int) -> Samples:
    common = math.gcd(rate, 48_000)
    return scipy.signal.resample_poly(samples, 48_000 // common, rate // common)


def sinc(samples: Samples, rate: int) -> Samples:
    return resample(torch.from_numpy(samples), rate, 48_000).numpy()


def sharp_sinc(samples: Samples, rate: int) -> Samples:
    return resample(torch.from_numpy(samples), rate, 48_000, lowpass_filter_width=64, rolloff=0.945).numpy()


def lines(samples: Samples, rate: int) -> Samples:
    known, wanted = at(samples, rate)
    return np.interp(wanted, known, samples).astype(np.float32)


def hold(samples: Samples, rate: int) -> Samples:
    return samples[np.minimum(at(samples, rate)[1].astype(int), len(samples) - 1)]


def spline(samples: Samples, rate: int) -> Samples:
    known, wanted = at(samples, rate)
    return scipy.interpolate.CubicSpline(known, samples)(wanted)


def fourier(samples: Samples, rate: int) -> Samples:
    return scipy.signal.resample(samples, len(samples) * 48_000 // rate)


RESAMPLERS: list[Callable[[Samples, int], Samples]] = [polyphase, sinc, sharp_sinc, lines, hold, spline, fourier]


def upsampled(samples: Samples, rate: int, old: int, how: Callable[[Samples, int], Samples]) -> Samples:
    """Through rate `old` to 48 kHz, as 16-bit with dither: a file whose header promises 24 kHz."""
    low = resample(torch.from_numpy(samples), rate, old, lowpass_filter_width=32).numpy()
    high = np.clip(how(low, old), -1, 1)
    dither = np.random.default_rng(0).triangular(-1, 0, 1, len(high))
    return (np.round(high * 32_767 + dither) / 32_768).astype(np.float32)


def test_a_voice_that_reaches_24_khz() -> None:
    for speaker in range(3):
        found = bandwidth_hz(synthesize(speaker, 0, 3.0), 48_000)
        assert found is not None
        assert found >= 20_000


@pytest.mark.parametrize("how", RESAMPLERS, ids=lambda how: how.__name__)
@pytest.mark.parametrize("old", RATES)
def test_an_upsampled_voice_ends_where_it_did(old: int, how: Callable[[Samples, int], Samples]) -> None:
    found = bandwidth_hz(upsampled(synthesize(0, 1, 3.0), 48_000, old, how), 48_000)
    assert found is not None
    assert found < min(1.25 * old / 2, 20_000)
    if how not in (lines, hold):  # whose images of 32 kHz, folded at 24 kHz, look like those of 16 kHz
        assert found > 0.7 * old / 2


@pytest.mark.parametrize("cutoff", [4_000, 7_000, 11_000, 16_000, 19_000])
def test_a_low_pass_is_found(cutoff: int) -> None:
    taps = scipy.signal.firwin(801, cutoff, fs=48_000)
    found = bandwidth_hz(scipy.signal.lfilter(taps, 1, synthesize(1, 0, 3.0)).astype(np.float32), 48_000)
    assert found == pytest.approx(cutoff, abs=600)


def test_blocks_say_what_the_whole_says() -> None:
    voice = synthesize(0, 0, 3.0)[: 60 * 2048]
    spectrum = Spectrum(48_000)
    for n in range(0, len(voice), 20 * 2048):
        spectrum.add(voice[n : n + 20 * 2048])
    assert spectrum.bandwidth_hz() == pytest.approx(bandwidth_hz(voice, 48_000), abs=250)


@pytest.mark.parametrize("samples", [np.zeros(48_000, np.float32), np.ones(100, np.float32)])
def test_silence_and_scraps_have_none(samples: Samples) -> None:
    assert bandwidth_hz(samples, 48_000) is None


def test_no_real_recording_is_taken_for_more_than_it_was(real_speech: Path) -> None:
    """Full-band recordings, brought down to six rates and up again in seven ways: none reaches 20 kHz."""
    tried = 0
    for samples, rate in some_recordings(real_speech, 24, 1.2, min_rate=44_100):
        own = bandwidth_hz(samples[: 4 * rate], rate)
        if own is None or own < 18_000:
            continue
        for number, old in enumerate(RATES):
            how = RESAMPLERS[(tried + number) % len(RESAMPLERS)]
            found = bandwidth_hz(upsampled(samples[: 4 * rate], rate, old, how), 48_000)
            assert found is not None
            assert found < min(1.25 * old / 2, 20_000), (old, how.__name__)
        tried += 1
    assert tried >= 8
