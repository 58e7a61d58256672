"""Losses and metrics against SciPy and NumPy in float64, and against themselves when a batch is cut differently."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import scipy.signal
import torch
from torch import Tensor

from shards.contract import COARSE_48K, TARGET_RATE
from trainer.losses import (
    MEL_SCALES,
    log_stft_l1,
    magnitudes,
    mel,
    mel_l1,
    reconstruction,
    stft_l1,
    waveform_l1,
    weighted,
)
from trainer.metrics import FLOOR, N_FFT, log_spectral_distances

N_FFTS = (1024, 2048, 4096, 8192)
WEIGHTS = {"l1": 0.7, "stft": 1.3, "log_stft": 0.2, "mel": 15.0}
NAMES = ("loss", *WEIGHTS)
NOISE_DISTANCE = math.pi / math.sqrt(3) / math.log(10)  # LSD of two independent noises: 0.788


def noise(*shape: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def crops(valid: list[int], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two different noises of the given lengths, with zeros after them, and the lengths."""
    real = torch.arange(length) < torch.tensor(valid)[:, None]
    return noise(len(valid), length, seed=0) * real, noise(len(valid), length, seed=1) * real, torch.tensor(valid)


def losses(wav_BN: Tensor, target_BN: Tensor, valid_B: Tensor) -> dict[str, Tensor]:
    terms = reconstruction(wav_BN, target_BN, valid_B, WEIGHTS, N_FFTS)
    return {"loss": weighted(terms, WEIGHTS), **terms}


def test_nothing_lost_when_equal() -> None:
    wav_BN, _, valid_B = crops([9000, 20_000], 20_000)
    found = losses(wav_BN, wav_BN, valid_B)
    assert tuple(found) == NAMES
    assert all(torch.equal(value_B, torch.zeros(2)) for value_B in found.values())


def test_the_loss_is_the_weighted_sum() -> None:
    batch = crops([20_000, 15_000], 20_000)
    found = losses(*batch)
    stft = sum(stft_l1(*batch, n_fft) for n_fft in N_FFTS) / len(N_FFTS)
    torch.testing.assert_close(found["stft"], stft)
    log_stft = sum(log_stft_l1(*batch, n_fft) for n_fft in N_FFTS) / len(N_FFTS)
    torch.testing.assert_close(found["log_stft"], log_stft)
    expected = 0.7 * waveform_l1(*batch) + 1.3 * stft + 0.2 * log_stft + 15 * mel_l1(*batch)
    torch.testing.assert_close(found["loss"], expected)


def test_waveform_error_counts_real_samples_only() -> None:
    wav_BN, target_BN = torch.zeros(2, 10), torch.zeros(2, 10)
    wav_BN[0, :4], target_BN[1, :10] = 0.5, -0.25
    assert waveform_l1(wav_BN, target_BN, torch.tensor([4, 10])).tolist() == [0.5, 0.25]


@pytest.mark.parametrize("n_fft", N_FFTS)
def test_magnitudes_are_scipys(n_fft: int) -> None:
    signal = noise(12_345, seed=n_fft)
    window = scipy.signal.get_window("hann", n_fft)
    spectrum = scipy.signal.stft(
        signal.numpy(), window=window, nperseg=n_fft, noverlap=n_fft - n_fft // 4, boundary="zeros", padded=False
    )[2]
    expected = np.abs(spectrum) * window.sum() / np.sqrt(np.sum(window**2))
    np.testing.assert_allclose(magnitudes(signal[None], n_fft)[0].numpy(), expected, rtol=1e-9, atol=1e-12)


def test_log_magnitudes_are_compared_as_parallel_wavegan_does() -> None:
    """Frame by frame in NumPy, with silence at the floor."""
    n_fft, n = 512, 3000
    a, b = noise(n, seed=1).numpy(), 0.01 * noise(n, seed=2).numpy()
    b[1500:] = 0
    window = scipy.signal.get_window("hann", n_fft)

    def log_magnitudes(signal: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        padded = np.pad(signal, n_fft // 2)
        frames = [padded[start : start + n_fft] * window for start in range(0, n + 1, n_fft // 4)]
        return np.log(np.maximum(np.abs(np.fft.rfft(frames)) / np.sqrt(np.sum(window**2)), 1e-5))

    expected = np.abs(log_magnitudes(a) - log_magnitudes(b)).mean()
    pair = torch.from_numpy(a)[None], torch.from_numpy(b)[None], torch.tensor([n])
    assert float(log_stft_l1(*pair, n_fft)[0]) == pytest.approx(expected, rel=1e-9)


def slaney_filters(n_fft: int, n_mels: int) -> npt.NDArray[np.float64]:
    """Triangles between points evenly spaced in mel, each of area 1 (Slaney's Auditory Toolbox): (n_mels, bins)."""
    top = 15 + np.log(24_000 / 1000) * 27 / np.log(6.4)
    points = [mel * 200 / 3 if mel < 15 else 1000 * np.exp((mel - 15) * np.log(6.4) / 27) for mel in
              np.linspace(0, top, n_mels + 2)]  # fmt: skip
    hertz = np.fft.rfftfreq(n_fft, 1 / TARGET_RATE)
    rows = []
    for low, middle, high in zip(points, points[1:], points[2:], strict=False):
        rising, falling = (hertz - low) / (middle - low), (high - hertz) / (high - middle)
        rows.append(np.maximum(np.minimum(rising, falling), 0) * 2 / (high - low))
    return np.array(rows)


def test_mel_distance_is_dacs() -> None:
    n, expected = 5000, 0.0
    a, b = 0.3 * noise(n, seed=1).numpy(), 0.02 * noise(n, seed=2).numpy()
    for n_fft, n_mels in ((32 << scale, 5 << scale) for scale in range(7)):
        window, filters = scipy.signal.get_window("hann", n_fft), slaney_filters(n_fft, n_mels)
        mels = []
        for signal in (a, b):
            padded = np.pad(signal, n_fft // 2)
            frames = [padded[start : start + n_fft] * window for start in range(0, n + 1, n_fft // 4)]
            mels.append(np.log10(np.maximum(np.abs(np.fft.rfft(frames)) @ filters.T, 1e-5)))
        expected += np.abs(mels[0] - mels[1]).mean()
    pair = torch.from_numpy(a)[None], torch.from_numpy(b)[None], torch.tensor([n])
    assert float(mel_l1(*pair)[0]) == pytest.approx(expected, rel=1e-5)  # torchaudio makes filters in float32


def test_mel_filters_are_librosas() -> None:
    librosa = pytest.importorskip("librosa", reason="`just extras` installs librosa")
    for n_fft, n_mels in MEL_SCALES[2:6]:  # of the others, librosa warns that filters are empty
        expected = librosa.filters.mel(sr=TARGET_RATE, n_fft=n_fft, n_mels=n_mels)
        click_1N = torch.zeros(1, n_fft, dtype=torch.float64)
        click_1N[0, n_fft // 2] = 1  # in the middle of frame 2, where the window is 1: |X| is 1 in every bin
        np.testing.assert_allclose(mel(click_1N, n_fft, n_mels)[0, :, 2], expected.sum(axis=1), rtol=1e-4)


def test_only_what_has_a_weight_is_computed() -> None:
    batch = crops([9000], 9000)
    assert list(reconstruction(*batch, {**WEIGHTS, "l1": 0, "log_stft": 0}, N_FFTS)) == ["stft", "mel"]


def test_white_noise_is_equally_loud_at_every_scale() -> None:
    """Rayleigh: the mean magnitude of unit noise is √π / 2, whatever the window."""
    signal = noise(1, 400_000, seed=3)
    for n_fft in N_FFTS:
        inside = magnitudes(signal, n_fft)[0, 1:-1, 4:-4]
        assert float(inside.mean()) == pytest.approx(math.sqrt(math.pi) / 2, rel=0.02)


def test_a_crops_loss_is_the_one_it_has_alone() -> None:
    """Ends on a frame, between frames, shorter than the longest window, and a crop that fills the batch."""
    valid, length = [8192, 12_345, 1500, 5 * COARSE_48K], 5 * COARSE_48K
    wav_BN, target_BN, valid_B = crops(valid, length)
    together = losses(wav_BN, target_BN, valid_B)
    for place, n in enumerate(valid):
        alone = losses(wav_BN[place : place + 1, :n], target_BN[place : place + 1, :n], valid_B[place : place + 1])
        for name in NAMES:
            assert float(together[name][place]) == pytest.approx(float(alone[name][0]), rel=1e-12)


def test_the_mean_does_not_depend_on_how_a_batch_is_split() -> None:
    batch = crops([8000, 20_000, 1500, 12_288, 16_000], 20_000)
    whole = losses(*batch)
    for size in (1, 2, 3):
        parts = [losses(*part) for part in zip(*(tensor.split(size) for tensor in batch), strict=True)]
        for name in NAMES:
            torch.testing.assert_close(torch.cat([part[name] for part in parts]), whole[name], rtol=1e-12, atol=0)


def log_power(signal: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """As the metric's description says it, frame by frame: (frames, bins)."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(N_FFT) / N_FFT)
    padded = np.pad(signal, N_FFT // 2)
    starts = range(0, len(signal) + 1, N_FFT // 4)
    power = np.abs([np.fft.rfft(padded[start : start + N_FFT] * window) for start in starts]) ** 2
    return np.log10(np.maximum(power, 1e-8))


def test_log_spectral_distance_is_numpys() -> None:
    time = np.arange(30_000) / TARGET_RATE
    a = 0.3 * np.sin(2 * np.pi * 440 * time) + 0.01 * noise(30_000, seed=4).numpy()
    b = 0.2 * np.sin(2 * np.pi * 445 * time) * (time < 0.3)
    difference = (log_power(a) - log_power(b)) ** 2
    high = np.fft.rfftfreq(N_FFT, 1 / TARGET_RATE) >= 12_000
    bands = {"lsd": high | True, "lsd_hf": high, "lsd_lf": ~high}
    expected = {name: np.sqrt(difference[:, band].mean(axis=1)).mean() for name, band in bands.items()}
    found = log_spectral_distances(torch.from_numpy(a).float(), torch.from_numpy(b).float())
    assert found == pytest.approx(expected, rel=1e-3)
    assert expected["lsd_hf"] != pytest.approx(expected["lsd_lf"], rel=0.02), "the bands should differ here"


def test_distance_of_a_signal_to_itself_and_to_another_noise() -> None:
    a, b = (noise(4 * TARGET_RATE, seed=seed).float() for seed in (5, 6))
    assert set(log_spectral_distances(a, a).values()) == {0.0}
    for value in log_spectral_distances(a, b).values():
        assert value == pytest.approx(NOISE_DISTANCE, abs=0.01)


def test_silence_costs_the_distance_to_the_floor() -> None:
    """A click has |X|² = (a · w)² in every bin of the four frames that reach it; elsewhere both are at the floor."""
    click, amplitude, place = torch.zeros(2 * N_FFT), 0.1, N_FFT + 100
    click[place] = amplitude
    frames = np.arange(0, len(click) + 1, N_FFT // 4)
    inside = np.abs(place - frames) < N_FFT // 2
    window = np.cos(np.pi * (place - frames[inside]) / N_FFT) ** 2
    expected = np.log10((amplitude * window) ** 2 / FLOOR).sum() / len(frames)
    assert inside.sum() == 4
    for value in log_spectral_distances(torch.zeros_like(click), click).values():
        assert value == pytest.approx(expected, rel=1e-4)
