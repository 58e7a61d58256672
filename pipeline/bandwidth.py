"""Where the spectrum of speech falls away, measured; what a header promises plays no part.

Each band of 500 Hz, in steps of 125 Hz, is judged by the level that it exceeds in 5 % of the frames: vowels show what
low bands hold, fricatives what high ones do. What stands out over less than PEAK_HZ, such as the whistle of a screen or
a power supply, is cut off down to what lies beside it, and what targets cannot hold, above 24 kHz, is not looked at.
The bandwidth is the lowest of three answers:

- a cliff: the levels fall by CLIFF_DB within CLIFF_HZ and never come back. Noise of rooms and microphones declines by a
  few decibels per kHz; resamplers and lossy codecs cut. Vowels that sink into noise fall by 15 to 25 dB too, so from
  LOWEST_HZ to VOWELS_HZ it takes VOWELS_CLIFF_DB; what was sampled at 8 kHz falls by more, or into nothing.
- nothing: from there on every band lies EMPTY_DB below the loudest one, or where dithered 16-bit rounding lies.
- a mirror: the fine structure above half of a common rate, or below that rate, is that of the recording's low bands,
  reflected. Upsampling without a proper filter (by repetition, by straight lines) leaves such images, not a cliff.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.stride_tricks import sliding_window_view

from codec.audio import Samples
from shards.contract import TARGET_RATE

Spectra = npt.NDArray[Any]
Bins = npt.NDArray[np.int64]

N_FFT = 2048
BAND_HZ, STEP_HZ, STEPS_OF_BAND = 500.0, 125.0, 4
PEAK_HZ = 1250.0  # of levels in bands, which widen a tone to 600 Hz, one that wavers to more
CLIFF_DB, CLIFF_HZ = 15.0, 750.0
EMPTY_DB, ROUNDING_DB = 80.0, -106.0  # below the loudest band; re full scale, in 500 Hz
LOWEST_HZ, VOWELS_HZ, VOWELS_CLIFF_DB = 3000.0, 7000.0, 30.0  # below 3 kHz vowels fall as steeply as that
LOUD_SHARE = 0.05  # of the frames: those in which a band is at its loudest
FLOOR_DB, LEVELS = -160, 200  # of the histograms of levels, in steps of 1 dB
MIRROR_RATES = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000)  # that recordings are upsampled from
MIRROR_HZ = 2000.0  # compared on each side of half the rate
MIRROR_CORRELATION = 0.2
MIRROR_FRAMES = 16  # fewer say too little
BLOCK_FRAMES = 64  # whose spectra are computed at once, so that they stay in a core's cache
SILENT_POWER = 1e-12  # of a frame, re full scale


class Spectrum:
    """What the bandwidth of a recording needs, gathered block by block in constant memory."""

    def __init__(self, rate: int) -> None:
        self._top = min(rate, TARGET_RATE) / 2
        bands = int((self._top - BAND_HZ) / STEP_HZ) + 1
        edges = np.arange(bands + STEPS_OF_BAND) * STEP_HZ
        self._edges = np.round(edges * N_FFT / rate).astype(int)  # of the steps: neighbours share them, four are a band
        self._counts = np.zeros((bands, LEVELS), np.int64)  # frames of each level, per band
        self._mirrors = Mirrors(rate)

    def add(self, block: Samples) -> None:
        """Whole frames of the block, half overlapping; what is left over at its end is not heard, nor is silence."""
        if len(block) < N_FFT:
            return
        for frames_TN in torch.from_numpy(block).unfold(0, N_FFT, N_FFT // 2).split(BLOCK_FRAMES):
            power_KT = _power(frames_TN)
            heard_KT = power_KT[:, power_KT.sum(axis=0) > SILENT_POWER]
            self._count(heard_KT)
            self._mirrors.add(np.log(heard_KT + 1e-20))

    def _count(self, power_KT: Spectra) -> None:
        steps_ST = np.add.reduceat(power_KT[: self._edges[-1]], self._edges[:-1], axis=0)
        bands_BT = sum(steps_ST[step : step + len(self._counts)] for step in range(STEPS_OF_BAND))
        level_BT = np.clip(10 * np.log10(bands_BT + 1e-20) - FLOOR_DB, 0, LEVELS - 1).astype(int)
        cells_BT = np.arange(len(self._counts))[:, None] * LEVELS + level_BT
        self._counts += np.bincount(cells_BT.ravel(), minlength=self._counts.size).reshape(self._counts.shape)

    def bandwidth_hz(self) -> float | None:
        """None where there is only silence."""
        frames = int(self._counts[0].sum())
        if not frames:
            return None
        above = self._counts[:, ::-1].cumsum(axis=1) >= max(LOUD_SHARE * frames, 1)
        loud_db = (LEVELS - 1 - above.argmax(axis=1) + FLOOR_DB).astype(np.float64)
        return min([_fall(loud_db, self._top), *(old / 2 for old in self._mirrors.seen())])


class Mirrors:
    """Correlation, over time, of each frequency's level with that of the frequency whose image it would be, for each
    mirror that a recording may have been upsampled through.

    The level of each frame is taken out first: all frequencies of speech rise and fall together.
    """

    def __init__(self, rate: int) -> None:
        self._places = mirrors(rate)
        self._lengths = np.array([len(below) for _, below, _ in self._places], dtype=int)
        self._starts = self._lengths.cumsum() - self._lengths
        none = np.zeros(0, dtype=int)
        self._below = np.concatenate([none, *(below for _, below, _ in self._places)])
        self._above = np.concatenate([none, *(above for *_, above in self._places)])
        self._count = 0
        self._sums = np.zeros((5, len(self._below)))

    def add(self, logarithms_KT: Spectra) -> None:
        below_MT, above_MT = (self._centred(logarithms_KT[bins]) for bins in (self._below, self._above))
        self._count += logarithms_KT.shape[1]
        pairs = ((below_MT, below_MT), (above_MT, above_MT), (below_MT, above_MT))
        products = (np.einsum("mt,mt->m", one, other) for one, other in pairs)
        self._sums += np.stack([below_MT.sum(axis=1), above_MT.sum(axis=1), *products])

    def _centred(self, levels_MT: Spectra) -> Spectra:
        """Without each mirror's own mean, frame by frame."""
        means = np.add.reduceat(levels_MT, self._starts, axis=0) / self._lengths[:, None].astype(np.float32)
        return levels_MT - means.repeat(self._lengths, axis=0)

    def seen(self) -> list[int]:
        """The rates whose images are there."""
        if self._count < MIRROR_FRAMES:
            return []
        x, y, xx, yy, xy = self._sums / self._count
        moments = np.stack([xy - x * y, xx - x * x, yy - y * y])
        covariance, below, above = np.add.reduceat(moments, self._starts, axis=1)
        correlation = covariance / np.sqrt(np.maximum(below * above, 1e-30))
        return [old for (old, _, _), found in zip(self._places, correlation, strict=True) if found > MIRROR_CORRELATION]


@lru_cache(maxsize=16)
def mirrors(rate: int) -> list[tuple[int, Bins, Bins]]:
    """Where images of recordings at lower rates would lie, around half of the rate and below the whole of it: the rate,
    bins below, bins above.
    """
    resolution = rate / N_FFT
    found = []
    for old in MIRROR_RATES:
        for low, high in ((old / 2, old / 2), (0.0, old)):
            distance = np.arange(BAND_HZ / 2, min(MIRROR_HZ, old / 4), resolution)
            below = np.round(np.abs(low - distance) / resolution).astype(int)
            above = np.round((high + distance if low else high - distance) / resolution).astype(int)
            inside = above < round((rate / 2 - BAND_HZ) / resolution)
            if distance[inside].size * resolution > BAND_HZ:
                found.append((old, below[inside], above[inside]))
    return found


@cache
def _window() -> torch.Tensor:
    """Hann's, scaled so that the sum of a band's power is its mean square."""
    window = torch.hann_window(N_FFT, periodic=False, dtype=torch.float64)
    return (window * (2 / (N_FFT * window.square().sum())).sqrt()).float()


def _power(frames_TN: torch.Tensor) -> Spectra:
    """(bins, frames)"""
    spectrum_TK = torch.fft.rfft(frames_TN * _window()).numpy()
    power_KT: Spectra = np.ascontiguousarray((spectrum_TK.real**2 + spectrum_TK.imag**2).T)
    return power_KT


def bandwidth_hz(samples: Samples, rate: int) -> float | None:
    """Of one stretch. None where there is only silence, or less than one frame."""
    spectrum = Spectrum(rate)
    spectrum.add(samples)
    return spectrum.bandwidth_hz()


def _fall(loud_db: Spectra, top: float) -> float:
    """Where the first cliff without return lies, or the emptiness above the last band that holds anything; Hz."""
    level_db = _without_peaks(loud_db)
    edges: Spectra = np.arange(len(level_db), dtype=np.float64) * STEP_HZ
    highest_from = np.maximum.accumulate(level_db[::-1])[::-1]  # the loudest band at this edge or above
    holds = level_db > max(loud_db.max() - EMPTY_DB, ROUNDING_DB)
    last_held = edges[np.flatnonzero(holds)[-1]] if holds.any() else 0.0
    found = [float(last_held + BAND_HZ) if last_held + BAND_HZ + STEP_HZ < top else top]
    reach = round(CLIFF_HZ / STEP_HZ)
    begins = edges[:-reach] + BAND_HZ
    is_deep = level_db[:-reach] - highest_from[reach:] > np.where(begins < VOWELS_HZ, VOWELS_CLIFF_DB, CLIFF_DB)
    cliffs = np.flatnonzero(is_deep & (begins >= LOWEST_HZ))
    if len(cliffs):
        found.append(_steepest(level_db, edges, int(cliffs[0]), reach))
    return min(found)


def _without_peaks(level_db: Spectra) -> Spectra:
    """Each band's level, at most what some stretch of PEAK_HZ around it keeps throughout (a morphological opening):
    plateaus, cliffs and slopes stay as they are.
    """
    width = round(PEAK_HZ / STEP_HZ)
    kept = sliding_window_view(level_db, width).min(axis=1)
    opened: Spectra = sliding_window_view(np.pad(kept, width - 1, constant_values=-np.inf), width).max(axis=1)
    return opened


def _steepest(level_db: Spectra, edges: Spectra, first: int, reach: int) -> float:
    """The frequency at which the spectrum has fallen by half of the cliff that begins within `reach` steps."""
    stretch = level_db[first : first + 2 * reach]
    middle = (stretch[0] + stretch.min()) / 2
    below = int(np.flatnonzero(stretch < middle)[0])
    return float(edges[first + below] + BAND_HZ / 2)
