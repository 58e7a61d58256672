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
    found = bandwidth_hz(lowpassed(synthesize(1, 0, 3.0), cutoff), 48_000)
    assert found == pytest.approx(cutoff, abs=600)


def tone(hertz: float, level_db: float, samples: int, rate: int = 48_000) -> Samples:
    """A sine, dB re full scale."""
    return (10 ** (level_db / 20) * np.sin(2 * np.pi * hertz / rate * np.arange(samples))).astype(np.float32)


def lowpassed(samples: Samples, cutoff: float, rate: int = 48_000) -> Samples:
    return scipy.signal.lfilter(scipy.signal.firwin(801, cutoff, fs=rate), 1, samples).astype(np.float32)


@pytest.mark.parametrize(("hertz", "level_db"), [(15_625, -60), (20_500, -60), (22_000, -70), (23_900, -60)])
def test_a_tone_is_no_speech(hertz: float, level_db: float) -> None:
    voice = lowpassed(synthesize(1, 0, 3.0), 12_000)
    assert bandwidth_hz(voice + tone(hertz, level_db, len(voice)), 48_000) == pytest.approx(12_000, abs=600)


def test_of_ultrasound_nothing_is_heard() -> None:
    full = resample(torch.from_numpy(synthesize(1, 0, 3.0)), 48_000, 96_000).numpy()
    noise = np.random.default_rng(0).standard_normal(len(full)).astype(np.float32)
    ultrasound = lowpassed(noise, 8000, 96_000) * tone(38_000, -50, len(full), 96_000)
    assert bandwidth_hz(lowpassed(full, 12_000, 96_000) + ultrasound, 96_000) == pytest.approx(12_000, abs=600)
    found = bandwidth_hz(full + ultrasound, 96_000)
    assert found is not None
    assert 20_000 <= found <= 24_000


SINKING_DB = {0: -10, 2000: -25, 3400: -28, 4400: -49, 9000: -70, 24_000: -70}  # vowels, then noise of a room


def test_vowels_that_sink_into_noise_are_no_cliff() -> None:
    noise = np.random.default_rng(0).standard_normal(3 * 48_000)
    shape = scipy.signal.firwin2(801, list(SINKING_DB), [10 ** (db / 20) for db in SINKING_DB.values()], fs=48_000)
    found = bandwidth_hz(scipy.signal.lfilter(shape, 1, noise).astype(np.float32), 48_000)
    assert found is not None
    assert found >= 20_000


@pytest.mark.parametrize("fall_db", [20, 28])
def test_a_cliff_that_ends_in_noise_is_found(fall_db: int) -> None:
    levels = {0: -20, 11_800: -60, 12_200: -60 - fall_db, 24_000: -60 - fall_db}
    noise = np.random.default_rng(0).standard_normal(3 * 48_000)
    shape = scipy.signal.firwin2(801, list(levels), [10 ** (db / 20) for db in levels.values()], fs=48_000)
    found = bandwidth_hz(scipy.signal.lfilter(shape, 1, noise).astype(np.float32), 48_000)
    assert found == pytest.approx(12_000, abs=600)


def test_a_quiet_voice_ends_above_its_own_rounding() -> None:
    voice = 0.003 * synthesize(0, 1, 3.0)
    assert bandwidth_hz(upsampled(voice, 48_000, 24_000, sharp_sinc), 48_000) == pytest.approx(12_000, abs=1500)


def test_a_telephone_in_noise_is_found() -> None:
    voice = upsampled(synthesize(0, 1, 3.0), 48_000, 8000, sharp_sinc)
    noise = np.random.default_rng(0).standard_normal(len(voice)).astype(np.float32)
    assert bandwidth_hz(voice + np.float32(1e-4) * noise, 48_000) == pytest.approx(4000, abs=500)


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
    """Full-band recordings, brought down to six rates and up again in seven ways, and a whistle put on them: none
    reaches 20 kHz.
    """
    tried = 0
    for samples, rate in some_recordings(real_speech, 24, 1.2, min_rate=44_100):
        own = bandwidth_hz(samples[: 4 * rate], rate)
        if own is None or own < 18_000:
            continue
        for number, old in enumerate(RATES):
            how = RESAMPLERS[(tried + number) % len(RESAMPLERS)]
            plain = upsampled(samples[: 4 * rate], rate, old, how)
            for changed in (plain, plain + tone(20_500, -60, len(plain))):
                found = bandwidth_hz(changed, 48_000)
                assert found is not None
                assert found < min(1.25 * old / 2, 20_000), (old, how.__name__)
        tried += 1
    assert tried >= 8
