"""Spectral distances, levels, lags and bandwidths against SciPy, plain loops and planted values."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import scipy.signal
import torch

from codec.audio import Samples
from demo.voice import synthesize
from shards.contract import TARGET_RATE
from trainer import metrics, signals
from trainer.scores import METRICS, Metric, score
from trainer.signals import Undefined

Floats = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def pair() -> tuple[Samples, Samples]:
    """A voice, and the same with noise, both two seconds."""
    voice = synthesize(1, 0, 2.0)
    return (voice + 0.01 * noise(0, len(voice))).astype(np.float32), voice


def noise(seed: int, length: int) -> Samples:
    return np.random.default_rng(seed).standard_normal(length).astype(np.float32)


def magnitudes(wav: Samples, n_fft: int, hop: int) -> Floats:
    """(bins, frames) by a loop over zero-padded frames, float64."""
    padded = np.pad(wav.astype(np.float64), n_fft // 2)
    window = scipy.signal.get_window("hann", n_fft)
    starts = range(0, len(wav) + 1, hop)
    return np.stack([np.abs(np.fft.rfft(window * padded[start : start + n_fft])) for start in starts], axis=1)


def tensors(wav: Samples, reference: Samples) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(wav), torch.from_numpy(reference)


def test_lsd_in_a_band_is_that_of_a_loop(pair: tuple[Samples, Samples]) -> None:
    x, y = (np.log10(np.maximum(magnitudes(wav, 2048, 512) ** 2, 1e-8)) for wav in pair)
    frequency = np.fft.rfftfreq(2048, 1 / TARGET_RATE)
    for low, high in ((12_000, 16_000), (12_000, 24_000), (0, 12_000)):
        band = (frequency >= low) & (frequency < high)
        expected = np.sqrt(((x - y)[band] ** 2).mean(axis=0)).mean()
        found = metrics.log_spectral_distance_in_band(*tensors(*pair), low_hz=low, high_hz=high)
        assert found == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="no bin"):
        metrics.log_spectral_distance_in_band(*tensors(*pair), low_hz=12_000, high_hz=12_000)


@pytest.mark.parametrize("reaches_hz", [12_000, 18_000])
def test_lsd_ends_where_the_reference_does(reaches_hz: int) -> None:
    """Noise above that, which the reference lacks, costs nothing."""
    spectrum = np.fft.rfft(noise(0, 96_000))
    spectrum[2 * (reaches_hz - 220) :] = 0
    reference = (0.1 * np.fft.irfft(spectrum)).astype(np.float32)
    wav = reference + 0.01 * noise(1, 96_000)
    assert signals.bandwidth_hz(reference) == reaches_hz
    found = score(wav, reference, ["lsd_reached"])
    if reaches_hz == 12_000:
        undefined = ["lsd_reached: the reference ends at 12000 Hz"]
        assert found == {"lsd_hf_reached": None, "undefined": undefined}
    else:
        within = metrics.log_spectral_distance_in_band(*tensors(wav, reference), low_hz=12_000, high_hz=18_000)
        assert found["lsd_hf_reached"] == within


def test_each_metric_gets_the_output_first(pair: tuple[Samples, Samples], monkeypatch: pytest.MonkeyPatch) -> None:
    assert score(*pair, ["stft"])["stft"] == metrics.stft_distance(*tensors(*pair))
    assert score(*pair[::-1], ["stft"])["stft"] != metrics.stft_distance(*tensors(*pair))
    names = METRICS["dnsmos"].columns
    monkeypatch.setattr("trainer.perceptual.dnsmos", lambda wav: dict.fromkeys(names, float(wav[0])))
    assert score(*pair, ["dnsmos"]) == {**dict.fromkeys(names, float(pair[0][0])), "undefined": []}


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_is_no_value(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One would be all of a mean."""
    monkeypatch.setitem(METRICS, "level", Metric(("level_db",), lambda *_: {"level_db": value}, "planted"))
    found = score(noise(0, 9), noise(1, 9), ["level"])
    assert found == {"level_db": None, "undefined": [f"level: level_db is {value}"]}


def test_stft_distance_is_that_of_a_loop(pair: tuple[Samples, Samples]) -> None:
    expected = []
    for n_fft in (1024, 2048, 4096):
        x, y = (np.sqrt(np.maximum(magnitudes(wav, n_fft, n_fft // 4) ** 2, 1e-7)) for wav in pair)
        expected.append(np.linalg.norm(x - y) / np.linalg.norm(y) + np.abs(np.log(x) - np.log(y)).mean())
    assert metrics.stft_distance(*tensors(*pair)) == pytest.approx(np.mean(expected), rel=1e-4)


def test_mel_distance_is_that_of_librosas_filters(pair: tuple[Samples, Samples]) -> None:
    librosa = pytest.importorskip("librosa", reason="needs the extra eval: just extras")
    expected = []
    for n_fft, bands in ((512, 40), (1024, 80), (2048, 160)):
        filters = librosa.filters.mel(sr=TARGET_RATE, n_fft=n_fft, n_mels=bands, dtype=np.float64)
        assert (filters.sum(axis=1) > 0).all(), "no band is empty"
        x, y = (np.log10(np.maximum(filters @ magnitudes(wav, n_fft, n_fft // 4), 1e-5)) for wav in pair)
        expected.append(np.abs(x - y).mean())
    assert metrics.mel_distance(*tensors(*pair)) == pytest.approx(np.mean(expected), rel=1e-3)


@pytest.mark.parametrize("distance", [metrics.stft_distance, metrics.mel_distance])
def test_a_signal_is_no_distance_from_itself(distance: object, pair: tuple[Samples, Samples]) -> None:
    assert callable(distance)
    assert distance(*tensors(pair[1], pair[1])) == 0
    assert distance(*tensors(*pair)) > 0.01


@pytest.mark.parametrize("gain_db", [-12.0, 0.0, 3.0])
def test_planted_levels_are_found(gain_db: float) -> None:
    voice = synthesize(0, 0, 1.0)
    assert signals.level_db((voice * 10 ** (gain_db / 20)).astype(np.float32), voice) == pytest.approx(
        gain_db, abs=1e-4
    )


@pytest.mark.parametrize("delay", [-1000, -1, 0, 37, 2400])
def test_planted_delays_are_found(delay: int) -> None:
    voice = np.pad(synthesize(0, 0, 1.0), 2400)
    assert signals.lag_samples(np.roll(voice, delay), voice) == pytest.approx(delay, abs=0.05)


def test_half_a_sample_is_found() -> None:
    """Of a voice without its highest octave, where a parabola is close to the correlation's peak."""
    low = scipy.signal.sosfilt(scipy.signal.butter(8, 8000, fs=TARGET_RATE, output="sos"), synthesize(0, 0, 1.0))
    spectrum = np.fft.rfft(low)
    shift = np.exp(-2j * np.pi * np.fft.rfftfreq(len(low)) * 0.5)
    late = np.fft.irfft(spectrum * shift, len(low)).astype(np.float32)
    assert signals.lag_samples(late, low.astype(np.float32)) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("delay", [-1500, -480, 0, 97, 2000])
def test_the_lag_of_envelopes_does_not_need_phases(delay: int) -> None:
    """Noise in four bands, each with the envelope of that band of a voice: no waveform is left to correlate."""
    voice = np.pad(synthesize(0, 0, 2.0), 2400)
    vocoded = np.zeros(len(voice))
    for number, edges in enumerate(([200, 800], [800, 2500], [2500, 5000], [5000, 9000])):
        band = scipy.signal.butter(4, edges, "bandpass", fs=TARGET_RATE, output="sos")
        envelope = np.abs(scipy.signal.hilbert(scipy.signal.sosfiltfilt(band, voice)))
        vocoded += envelope * scipy.signal.sosfiltfilt(band, noise(number, len(voice)))
    late = np.roll(vocoded, delay).astype(np.float32)
    assert signals.envelope_lag_samples(late, voice) == pytest.approx(delay, abs=48)
    with pytest.raises(Undefined, match="hardly correlate"):
        signals.lag_samples(late, voice)


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_unrelated_waveforms_have_no_lag(offset: float) -> None:
    """Also where both lie as far from zero."""
    with pytest.raises(Undefined, match="hardly correlate"):
        signals.lag_samples(noise(1, 48_000) + np.float32(offset), noise(2, 48_000) + np.float32(offset))


def test_a_lag_takes_a_correlation_of_three_tenths() -> None:
    one, other = noise(1, 96_000), noise(2, 96_000)
    assert signals.lag_samples(0.34 * one + math.sqrt(1 - 0.34**2) * other, one) == pytest.approx(0, abs=0.2)
    with pytest.raises(Undefined, match="hardly correlate"):
        signals.lag_samples(0.26 * one + math.sqrt(1 - 0.26**2) * other, one)


def test_polarity_is_no_lag() -> None:
    voice = np.pad(synthesize(0, 0, 1.0), 2400)
    assert signals.lag_samples(-np.roll(voice, 37), voice) == pytest.approx(37, abs=0.05)


@pytest.mark.parametrize("snr_db", [0.0, 10.0, 30.0])
def test_si_sdr_is_the_planted_one_and_does_not_see_gain_or_the_new_band(snr_db: float) -> None:
    """Signal and error are tones below 12 kHz, orthogonal over the clip; another tone lies above."""
    time = np.arange(TARGET_RATE) / TARGET_RATE
    voice, error, above = (np.sin(2 * np.pi * hz * time) for hz in (440, 1000, 16_000))
    wav = 0.2 * voice + 0.2 * 10 ** (-snr_db / 20) * error + 0.1 * above
    found = signals.low_band_si_sdr_db(wav.astype(np.float32), (0.7 * voice).astype(np.float32))
    assert found == pytest.approx(snr_db, abs=0.1)


def test_si_sdr_is_le_rouxs_formula(pair: tuple[Samples, Samples]) -> None:
    x, y = (scipy.signal.resample_poly(wav.astype(np.float64), 1, 2) for wav in pair)
    x, y = x - x.mean(), y - y.mean()
    scaled = x @ y / (y @ y) * y
    expected = 10 * np.log10((scaled @ scaled) / ((x - scaled) @ (x - scaled)))
    assert signals.low_band_si_sdr_db(*pair) == pytest.approx(expected, abs=0.2)
    assert signals.low_band_si_sdr_db(pair[1], pair[1]) == 100


@pytest.mark.parametrize("cutoff", [4000, 12_000, 15_500, 20_000])
@pytest.mark.parametrize("quantised", [False, True])
def test_a_planted_bandwidth_is_reached(cutoff: int, quantised: bool) -> None:
    """White noise cut off sharply; the noise of 16 bit above the edge is not heard."""
    spectrum = np.fft.rfft(0.1 * noise(3, 96_000).astype(np.float64))
    spectrum[np.fft.rfftfreq(96_000, 1 / TARGET_RATE) > cutoff] = 0
    wav = np.fft.irfft(spectrum)
    if quantised:
        wav = np.round(wav * 32768) / 32768
    assert abs(signals.bandwidth_hz(wav.astype(np.float32)) - cutoff) <= 250


@pytest.mark.parametrize(("top_db", "expected"), [(-78, 18_000), (-82, 12_000)])
def test_what_lies_80_db_below_the_strongest_band_is_not_heard(top_db: float, expected: int) -> None:
    spectrum, hertz = np.fft.rfft(noise(3, 96_000).astype(np.float64)), np.fft.rfftfreq(96_000, 1 / TARGET_RATE)
    spectrum *= np.select([hertz <= 12_000, hertz <= 18_000], [1, 10 ** (top_db / 20)])
    assert signals.bandwidth_hz(np.fft.irfft(spectrum).astype(np.float32)) == pytest.approx(expected, abs=500)


@pytest.mark.parametrize(("per_bin_db", "expected"), [(-108, 24_000), (-112, 0)])
def test_noise_below_that_of_16_bits_is_no_bandwidth(per_bin_db: float, expected: int) -> None:
    """White noise of power 1 has 6 / 2048 in a bin of a Hann window, where a full-scale sine has 1."""
    rms = 10 ** (per_bin_db / 20) / math.sqrt(6 / 2048)
    assert signals.bandwidth_hz((rms * noise(4, 96_000)).astype(np.float32)) == expected


def test_the_high_bands_share_is_welchs(pair: tuple[Samples, Samples]) -> None:
    frequency, power = scipy.signal.welch(pair[0], TARGET_RATE, nperseg=2048, noverlap=1536, detrend=False)
    power[1:-1] /= 2  # one bin, not two
    expected = 10 * np.log10(power[frequency >= 12_000].sum() / power.sum())
    assert signals.high_band_db(pair[0])[1] == pytest.approx(expected, abs=0.05)
    sine = np.sin(2 * np.pi * 1000 / TARGET_RATE * np.arange(TARGET_RATE)).astype(np.float32)
    assert max(signals.high_band_db(sine)) < -100


@pytest.mark.parametrize("below_db", [-18.5, 0.0, 6.0])
@pytest.mark.parametrize("above_db", [-7.9, 0.0, 3.0])
def test_the_high_bands_level_is_the_planted_one_whatever_lies_below(below_db: float, above_db: float) -> None:
    """And the error of its share is that less the level's: of a weak voice, a weak high band is a large share."""
    spectrum = np.fft.rfft(synthesize(1, 0, 2.0))
    high = np.fft.rfftfreq(96_000, 1 / TARGET_RATE) >= 12_000
    voice, changed = (
        np.fft.irfft(spectrum * np.where(high, 10 ** (above / 20), 10 ** (below / 20))).astype(np.float32)
        for below, above in ((0, 0), (below_db, above_db))
    )
    found = score(changed, voice, ["high_band"])
    assert found["high_band_level_db"] == pytest.approx(above_db, abs=0.3)
    level_db = signals.level_db(changed, voice)
    assert found["high_band_share_error_db"] == pytest.approx(above_db - level_db, abs=0.3)


def test_the_high_bands_level_has_a_floor() -> None:
    """Both energies are at least −120 dB re a full-scale sine."""
    time = np.arange(TARGET_RATE) / TARGET_RATE
    high, faint = (
        (amplitude * np.sin(2 * np.pi * hz * time)).astype(np.float32)
        for amplitude, hz in ((0.5, 16_500), (0.003, 1500))
    )
    tone = 10 * np.log10(0.25 * 1.5)  # a Hann window spreads a sine's power of 1 to three bins: 1 + 1/4 + 1/4
    assert signals.high_band_db(high)[0] == pytest.approx(tone, abs=0.01)
    assert score(faint, high, ["high_band"])["high_band_level_db"] == pytest.approx(-120 - tone, abs=0.01)
    assert score(high, faint, ["high_band"])["high_band_level_db"] == pytest.approx(120 + tone, abs=0.01)


def test_silence_says_nothing() -> None:
    voice, silence = synthesize(0, 0, 1.0), np.zeros(TARGET_RATE, np.float32)
    for measure in (signals.lag_samples, signals.low_band_si_sdr_db):
        with pytest.raises(Undefined, match="output is silent"):
            measure(silence, voice)
    for measure in (signals.level_db, signals.lag_samples, signals.low_band_si_sdr_db):
        with pytest.raises(Undefined, match="reference is silent"):
            measure(voice, silence)
    assert score(voice, silence, ["high_band"])["undefined"] == ["high_band: the reference is silent"]
    for own in (signals.bandwidth_hz, signals.high_band_db):
        with pytest.raises(Undefined, match="fewer than a frame"):
            own(voice[35_000:36_000])


def test_silence_is_below_minus_90_db() -> None:
    voice, faint = synthesize(0, 0, 1.0), np.ones(TARGET_RATE, np.float32)
    assert signals.level_db(voice, faint * np.float32(10 ** (-89.9 / 20))) > 0
    with pytest.raises(Undefined, match="reference is silent"):
        signals.level_db(voice, faint * np.float32(10 ** (-90.1 / 20)))


def test_a_silent_output_counts() -> None:
    """In level and bands it has their floors: a mean over the clips that sound would call a dumb decoder perfect."""
    voice, silence = synthesize(0, 0, 1.0), np.zeros(TARGET_RATE, np.float32)
    found = score(silence, voice, ["level", "high_band", "bandwidth"])
    energy, share = signals.high_band_db(voice)
    assert found == {
        "level_db": pytest.approx(-120 - 10 * np.log10(np.square(voice, dtype=np.float64).mean())),
        "high_band_level_db": pytest.approx(-120 - energy),
        "high_band_share_db": -120,
        "high_band_share_error_db": pytest.approx(-120 - share),
        "bandwidth_hz": 0,
        "undefined": [],
    }
