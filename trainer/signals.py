"""Level, lag, bandwidth, band energies and SI-SDR of a mono signal at 48 kHz against its reference.

Both have one length. Raises Undefined where a figure would have no meaning, saying why.
"""

from __future__ import annotations

import itertools
import math
from operator import itemgetter

import numpy as np
import numpy.typing as npt
import torch

from codec.audio import Samples
from codec.resample import sinc_resampler
from shards.contract import TARGET_RATE
from trainer.metrics import SPLIT_HZ

Floats = npt.NDArray[np.float64]

SILENT_DB = -90.0  # RMS re full scale
MAX_LAG = 2400  # samples: 50 ms
ENVELOPE_HOP = 48  # samples: 1 ms
MIN_CORRELATION = 0.3
RATIO_FLOOR = 1e-12  # of energies: −120 dB
N_FFT, HOP = 2048, 512
FREQUENCIES_HZ = np.fft.rfftfreq(N_FFT, 1 / TARGET_RATE)
BAND_HZ = 250  # resolution of the bandwidth
BELOW_PEAK_DB = 80.0
BAND_FLOOR_DB = -110.0  # per bin re a full-scale sine: above the noise of 16 bit PCM (−128)


class Undefined(Exception):
    """Why this metric says nothing of these signals."""


def rms_db(wav: Samples) -> float:
    """RMS in dB re full scale, at least −120."""
    return 20 * float(np.log10(max(np.sqrt(np.mean(np.square(wav, dtype=np.float64))), 1e-6)))


def check_sounds(**signals: Samples) -> None:
    """Raises Undefined, with its name, for a signal that is silent (RMS below −90 dB)."""
    for name, signal in signals.items():
        if rms_db(signal) < SILENT_DB:
            raise Undefined(f"the {name} is silent")


def level_db(wav: Samples, reference: Samples) -> float:
    """RMS over that of the reference, dB; 0 is right. A silent output counts with its −120 dB: were it left out, a
    decoder would gain by every clip in which it says nothing."""
    check_sounds(reference=reference)
    return rms_db(wav) - rms_db(reference)


def lag_samples(wav: Samples, reference: Samples) -> float:
    """Samples by which the output is late: the peak of the cross-correlation within ±50 ms, means removed, of either
    polarity (no ear and no magnitude knows it), between samples by a parabola. Undefined where the normalised peak is
    below 0.3: re-synthesised speech has phases of its own."""
    check_sounds(reference=reference, output=wav)
    x, y = (signal[None] - signal.mean(dtype=np.float64) for signal in (wav, reference))
    lag, correlation = max((_best_shift(either, y, MAX_LAG) for either in (x, -x)), key=itemgetter(1))
    if correlation < MIN_CORRELATION:
        raise Undefined(f"the waveforms hardly correlate ({correlation:.2f})")
    return lag


def envelope_lag_samples(wav: Samples, reference: Samples) -> float:
    """Samples by which the output is late, by what is heard and not by phase: within ±50 ms, to about half a
    millisecond. The shift at which the rises and falls of twelve bands (200 Hz to 10 kHz; power^0.25 of Hann 960 every
    millisecond) correlate best in sum."""
    check_sounds(reference=reference, output=wav)
    if len(wav) < N_FFT:
        raise Undefined(f"{len(wav)} samples are fewer than a frame of {N_FFT}")
    x, y = (_onsets(signal) for signal in (wav, reference))
    return ENVELOPE_HOP * _best_shift(x, y, MAX_LAG // ENVELOPE_HOP)[0]


def _onsets(wav: Samples) -> Floats:
    """(bands, steps): each of no mean and unit norm, so that every band has one voice."""
    window = torch.hann_window(960)
    spectrum = torch.stft(
        torch.from_numpy(wav), 960, ENVELOPE_HOP, window=window, pad_mode="constant", return_complex=True
    )
    edges = np.geomspace(200, 10_000, 13) * 960 / TARGET_RATE
    power = spectrum.abs().double().square().numpy()
    bands = [power[math.ceil(a) : math.ceil(b)].sum(axis=0) for a, b in itertools.pairwise(edges)]
    rises = np.diff((np.stack(bands) + 1e-9) ** 0.25, axis=1)
    rises -= rises.mean(axis=1, keepdims=True)
    onsets: Floats = rises / np.maximum(np.linalg.norm(rises, axis=1, keepdims=True), 1e-9)
    return onsets


def _best_shift(x_CN: Floats, y_CN: Floats, reach: int) -> tuple[float, float]:
    """The shift of x behind y, within ±reach, at which they correlate best, and that correlation; −1 … 1.

    Between samples a parabola through the three highest values finds it.
    """
    reach = min(reach, x_CN.shape[1] - 1)
    size = 1 << (2 * x_CN.shape[1] - 1).bit_length()
    product = np.fft.rfft(x_CN, size) * np.fft.rfft(y_CN, size).conj()
    correlation = np.fft.irfft(product, size).sum(axis=0) / np.sqrt(np.square(x_CN).sum() * np.square(y_CN).sum())
    around = np.concatenate([correlation[size - reach :], correlation[: reach + 1]])
    best = int(around.argmax())
    if not 0 < best < 2 * reach:
        return float(best - reach), float(around[best])
    left, middle, right = around[best - 1 : best + 2]
    curvature = left - 2 * middle + right
    between = float(0.5 * (left - right) / curvature) if curvature else 0.0
    return best - reach + between, float(middle)


def low_band_si_sdr_db(wav: Samples, reference: Samples) -> float:
    """SI-SDR (Le Roux et al., 2019) of both resampled to 24 kHz, the codec's band, means removed; at most 100 dB."""
    check_sounds(reference=reference, output=wav)
    resample = sinc_resampler(2, 1)
    x, y = (resample(torch.from_numpy(signal)).double().numpy() for signal in (wav, reference))
    x, y = x - x.mean(), y - y.mean()
    projected = np.dot(x, y) / np.dot(y, y) * y
    signal, noise = float(np.dot(projected, projected)), float(np.square(x - projected).sum())
    return 10 * float(np.log10(max(signal, 1e-20) / max(noise, 1e-10 * signal, 1e-20)))


def high_band_db(wav: Samples) -> tuple[float, float]:
    """Energy from 12 kHz on, dB re a full-scale sine, and its share of all energy, dB; each at least −120, as of
    silence."""
    power = mean_power(wav)
    high, whole = power[FREQUENCIES_HZ >= SPLIT_HZ].sum(), power.sum()
    energy, share = (10 * float(np.log10(max(ratio, RATIO_FLOOR))) for ratio in (high, high / max(whole, 1e-20)))
    return energy, share


def bandwidth_hz(wav: Samples) -> float:
    """The upper edge of the highest 250 Hz band that carries something; 0 where none does.

    The mean power per bin of that band lies at most 80 dB below the strongest band's, and above −110 dB re a
    full-scale sine, where the noise of 16 bit PCM ends.
    """
    power, band = mean_power(wav)[1:-1], FREQUENCIES_HZ[1:-1] // BAND_HZ
    in_band = [power[band == number].mean() for number in range(TARGET_RATE // 2 // BAND_HZ)]
    level = 10 * np.log10(np.maximum(in_band, 1e-20))
    heard = np.flatnonzero(level >= max(level.max() - BELOW_PEAK_DB, BAND_FLOOR_DB))
    return float((heard[-1] + 1) * BAND_HZ) if len(heard) else 0.0


def mean_power(wav: Samples) -> Floats:
    """Of each bin, over Hann frames of 2048 with hop 512 that lie inside the signal; a full-scale sine has 1.

    Frames that reach over the ends would see a cut there, which sounds at all frequencies.
    """
    if len(wav) < N_FFT:
        raise Undefined(f"{len(wav)} samples are fewer than a frame of {N_FFT}")
    window = torch.hann_window(N_FFT)
    spectrum = torch.stft(torch.from_numpy(wav), N_FFT, HOP, window=window, center=False, return_complex=True)
    power: Floats = (spectrum.abs() * 2 / window.sum()).double().square().mean(dim=1).numpy()
    return power
