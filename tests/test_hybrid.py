"""The recording below the crossover, SIDON above it, and nothing lost or moved between."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import scipy.signal

from codec.audio import Samples
from demo.voice import synthesize
from pipeline.hybrid import HALF, hybrid, lowpass

CROSSOVER = 11_000.0


def response_db(taps: npt.NDArray[np.float64], hertz: float) -> float:
    _, response = scipy.signal.freqz(taps, worN=[hertz], fs=48_000)
    return float(20 * np.log10(np.abs(response[0]) + 1e-12))


@pytest.mark.parametrize("cutoff", [2000.0, 11_000.0, 20_000.0])
def test_the_filters_are_complementary_and_symmetric(cutoff: float) -> None:
    low = lowpass(cutoff)
    delta = np.zeros(2 * HALF + 1)
    delta[HALF] = 1
    assert np.allclose(low, low[::-1], atol=1e-15)  # linear phase: the same delay at all frequencies
    assert np.allclose(low + (delta - low), delta)
    assert abs(response_db(low, cutoff - 500)) < 0.01
    assert response_db(low, cutoff + 500) < -75
    assert response_db(low, cutoff) == pytest.approx(-6, abs=0.1)


def test_a_recording_with_itself_is_itself() -> None:
    """The sum of both filters is a pure delay, and that delay is removed."""
    voice = synthesize(0, 0, 2.0)
    assert np.allclose(hybrid(voice, voice, CROSSOVER), voice[HALF:-HALF], atol=1e-6)


def test_each_side_of_the_crossover_comes_from_its_source() -> None:
    random = np.random.default_rng(0)
    a, b = (random.standard_normal(48_000 + 2 * HALF).astype(np.float32) for _ in range(2))
    mixed = hybrid(a, b, CROSSOVER)
    sos_low, sos_high = (
        scipy.signal.butter(12, f, kind, fs=48_000, output="sos") for f, kind in ((9_500, "low"), (12_500, "high"))
    )
    for sos, source in ((sos_low, a), (sos_high, b)):
        wanted, found = (scipy.signal.sosfiltfilt(sos, x)[1000:-1000] for x in (source[HALF:-HALF], mixed))
        assert np.corrcoef(wanted, found)[0, 1] > 0.9999


@pytest.mark.parametrize("gain_db", [-5.0, 4.0])
def test_levels_meet_at_the_crossover(gain_db: float) -> None:
    voice = synthesize(1, 0, 2.0)
    mixed = hybrid(voice, voice * np.float32(10 ** (gain_db / 20)), CROSSOVER)
    assert np.allclose(mixed, voice[HALF:-HALF], atol=1e-5)


def test_levels_are_compared_just_below_the_crossover() -> None:
    """Not where SIDON's voice has another timbre, nor above, where the recording ends."""
    voice = synthesize(1, 0, 2.0)
    spectrum, hertz = np.fft.rfft(voice), np.fft.rfftfreq(len(voice), 1 / 48_000)
    ends, tilted = (
        np.fft.irfft(spectrum * gain, len(voice)).astype(np.float32)
        for gain in (hertz < 11_500, np.where(hertz > 7000, 10 ** (4 / 20), 1))
    )
    mixed = hybrid(ends, tilted, CROSSOVER)
    assert high_band_db(mixed) == pytest.approx(high_band_db(voice[HALF:-HALF]), abs=0.2)


@pytest.mark.parametrize("gain_db", [-20.0, 20.0])
def test_sidon_is_raised_or_lowered_by_6_db_at_most(gain_db: float) -> None:
    voice = synthesize(1, 0, 2.0)
    restored = voice * np.float32(10 ** (gain_db / 20))
    change_db = high_band_db(hybrid(voice, restored, CROSSOVER)) - high_band_db(restored[HALF:-HALF])
    assert change_db == pytest.approx(-np.sign(gain_db) * 6, abs=0.1)


@pytest.mark.parametrize("snr_db", [30, 20, 10])
def test_noise_of_the_recording_does_not_raise_sidon(snr_db: int) -> None:
    """SIDON's part keeps its level: noise is no speech."""
    for speaker in range(3):
        voice = synthesize(speaker, 0, 3.0)
        noise = np.random.default_rng(speaker).standard_normal(len(voice)).astype(np.float32)
        noisy = voice + np.float32(voice.std() * 10 ** (-snr_db / 20)) * noise
        change_db = high_band_db(hybrid(noisy, voice, CROSSOVER)) - high_band_db(voice[HALF:-HALF])
        assert abs(change_db) < 0.5


def test_in_pauses_sidon_keeps_its_level() -> None:
    noise = np.random.default_rng(0).standard_normal((2, 100_000)).astype(np.float32)
    restored = np.float32(1e-5) * noise[1]
    mixed = hybrid(np.float32(1e-3) * noise[0], restored, CROSSOVER)
    assert high_band_db(mixed) == pytest.approx(high_band_db(restored[HALF:-HALF]), abs=0.5)


def test_what_is_loud_in_pauses_alone_does_not_change_sidon() -> None:
    """Speech that lies below the recording's noise has no level to match."""
    voice = synthesize(1, 0, 3.0)
    random = np.random.default_rng(0)
    noise = 0.1 * random.standard_normal(len(voice)) * (np.abs(voice) < 0.05)
    mixed = hybrid((voice + noise).astype(np.float32), voice, CROSSOVER)
    assert high_band_db(mixed) == pytest.approx(high_band_db(voice[HALF:-HALF]), abs=0.2)


def high_band_db(samples: Samples) -> float:
    """Energy from 13 kHz on, where only SIDON's part is."""
    return float(10 * np.log10(np.square(np.abs(np.fft.rfft(samples)[len(samples) * 13 // 48 :])).sum()))


def test_silence_stays_silent() -> None:
    silence = np.zeros(4800, np.float32)
    assert not hybrid(silence, silence, CROSSOVER).any()
