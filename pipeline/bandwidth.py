"""Where the spectrum of speech falls away, measured; what a header promises plays no part.

Each band of 500 Hz, in steps of 125 Hz, is judged by the level that it exceeds in 5 % of the frames: vowels show what
low bands hold, fricatives what high ones do. The bandwidth is the lowest of three answers:

- a cliff: from 3 kHz on, the levels fall by CLIFF_DB within 1 kHz and never come back. Speech and the noise of rooms
  and microphones decline by a few decibels per kHz; resamplers and lossy codecs cut.
- nothing: from there on every band lies EMPTY_DB below the loudest one, or where dithered 16-bit rounding lies.
- a mirror: the fine structure above half of a common rate, or below that rate, is that of the recording's low bands,
  reflected. Upsampling without a proper filter (by repetition, by straight lines) leaves such images, not a cliff.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

Samples = npt.NDArray[np.float32]
Spectra = npt.NDArray[np.float64]

N_FFT = 2048
BAND_HZ, STEP_HZ = 500.0, 125.0
CLIFF_DB, CLIFF_HZ = 15.0, 1000.0
EMPTY_DB, ROUNDING_DB = 80.0, -106.0  # below the loudest band; re full scale, in 500 Hz
LOWEST_HZ = 3000.0  # below it vowels fall as steeply
LOUD_SHARE = 0.05  # of the frames: those in which a band is at its loudest
FLOOR_DB, LEVELS = -160, 200  # of the histograms of levels, in steps of 1 dB
MIRROR_RATES = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000)  # that recordings are upsampled from
MIRROR_HZ = 2000.0  # compared on each side of half the rate
MIRROR_CORRELATION = 0.2
MIRROR_FRAMES = 16  # fewer say too little
SILENT_POWER = 1e-12  # of a frame, re full scale


class Spectrum:
    """What the bandwidth of a recording needs, gathered block by block in constant memory."""

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self._window = np.hanning(N_FFT).astype(np.float32)
        edges = np.arange(0.0, rate / 2 - BAND_HZ + 1, STEP_HZ)
        self._first, self._last = (np.round((edges + more) * N_FFT / rate).astype(int) for more in (0.0, BAND_HZ))
        self._counts = np.zeros((len(edges), LEVELS), np.int64)  # frames of each level, per band
        self._mirrors = [mirror for old in MIRROR_RATES for mirror in mirrors(rate, old)]

    def add(self, block: Samples) -> None:
        """Whole frames of the block, half overlapping; what is left over at its end is not heard, nor is silence."""
        if len(block) < N_FFT:
            return
        frames = np.lib.stride_tricks.sliding_window_view(block, N_FFT)[:: N_FFT // 2]
        spectra = torch.fft.rfft(torch.from_numpy(frames * self._window)).abs().double().square().numpy()
        spectra *= 2 / (N_FFT * np.square(self._window).sum())  # so that a band's sum is its mean square
        spectra = spectra[spectra.sum(axis=1) > SILENT_POWER]
        sums = np.concatenate([np.zeros((len(spectra), 1)), spectra.cumsum(axis=1)], axis=1)
        power = sums[:, self._last] - sums[:, self._first]
        level = np.clip(10 * np.log10(power + 1e-20) - FLOOR_DB, 0, LEVELS - 1).astype(int)
        cells = np.arange(level.shape[1]) * LEVELS + level
        self._counts += np.bincount(cells.ravel(), minlength=self._counts.size).reshape(self._counts.shape)
        logarithms = np.log(spectra + 1e-20)
        for mirror in self._mirrors:
            mirror.add(logarithms)

    def bandwidth_hz(self) -> float | None:
        """None where there is only silence."""
        frames = int(self._counts[0].sum())
        if not frames:
            return None
        above = self._counts[:, ::-1].cumsum(axis=1) >= max(LOUD_SHARE * frames, 1)
        loud_db = (LEVELS - 1 - above.argmax(axis=1) + FLOOR_DB).astype(np.float64)
        mirrored = [mirror.rate_hz / 2 for mirror in self._mirrors if mirror.correlation() > MIRROR_CORRELATION]
        return min([_fall(loud_db, self.rate / 2), *mirrored])


class Mirror:
    """Correlation, over time, of each frequency's level with that of the frequency whose image it would be.

    The level of each frame is taken out first: all frequencies of speech rise and fall together.
    """

    def __init__(self, old: int, below: npt.NDArray[np.int64], above: npt.NDArray[np.int64]) -> None:
        self.rate_hz, self._below, self._above = old, below, above
        self._count = 0
        self._sums = np.zeros((5, len(below)))

    def add(self, logarithms: Spectra) -> None:
        below, above = (_centred(logarithms[:, bins]) for bins in (self._below, self._above))
        self._count += len(logarithms)
        products = (below, above, below * below, above * above, below * above)
        self._sums += np.stack([product.sum(axis=0) for product in products])

    def correlation(self) -> float:
        if self._count < MIRROR_FRAMES:
            return 0.0
        x, y, xx, yy, xy = self._sums / self._count
        covariance, power = (xy - x * y).sum(), (xx - x * x).sum() * (yy - y * y).sum()
        return float(covariance / math.sqrt(power)) if power > 0 else 0.0


def mirrors(rate: int, old: int) -> Iterable[Mirror]:
    """Where images of a recording at rate `old` would lie: around half of it, and below the whole of it."""
    resolution = rate / N_FFT
    for low, high in ((old / 2, old / 2), (0.0, old)):
        distance = np.arange(BAND_HZ / 2, min(MIRROR_HZ, old / 4), resolution)
        below = np.round(np.abs(low - distance) / resolution).astype(int)
        above = np.round((high + distance if low else high - distance) / resolution).astype(int)
        inside = above < round((rate / 2 - BAND_HZ) / resolution)
        if distance[inside].size * resolution > BAND_HZ:
            yield Mirror(old, below[inside], above[inside])


def _centred(levels: Spectra) -> Spectra:
    centred: Spectra = levels - levels.mean(axis=1, keepdims=True)
    return centred


def bandwidth_hz(samples: Samples, rate: int) -> float | None:
    """Of one stretch. None where there is only silence, or less than one frame."""
    spectrum = Spectrum(rate)
    spectrum.add(samples)
    return spectrum.bandwidth_hz()


def _fall(level_db: Spectra, nyquist: float) -> float:
    """Where the first cliff without return lies, or the emptiness above the last band that holds anything."""
    edges: Spectra = np.arange(len(level_db), dtype=np.float64) * STEP_HZ
    highest_from = np.maximum.accumulate(level_db[::-1])[::-1]  # the loudest band at this edge or above
    holds = level_db > max(level_db.max() - EMPTY_DB, ROUNDING_DB)
    last_held = edges[np.flatnonzero(holds)[-1]] if holds.any() else 0.0
    found = [float(last_held + BAND_HZ) if last_held + BAND_HZ + STEP_HZ < nyquist else nyquist]
    reach = round(CLIFF_HZ / STEP_HZ)
    drop = level_db[:-reach] - highest_from[reach:]
    cliffs = np.flatnonzero((drop > CLIFF_DB) & (edges[:-reach] + BAND_HZ >= LOWEST_HZ))
    if len(cliffs):
        found.append(_steepest(level_db, edges, int(cliffs[0]), reach))
    return min(found)


def _steepest(level_db: Spectra, edges: Spectra, first: int, reach: int) -> float:
    """The frequency at which the spectrum has fallen by half of the cliff that begins within `reach` steps."""
    stretch = level_db[first : first + 2 * reach]
    middle = (stretch[0] + stretch.min()) / 2
    below = int(np.flatnonzero(stretch < middle)[0])
    return float(edges[first + below] + BAND_HZ / 2)
