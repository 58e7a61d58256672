"""A target that is the recording below a crossover and SIDON above it.

SIDON re-synthesises: its low band has phases of its own, and a waveform loss on them pulls towards dull output. Above
the crossover speech is noise-like. The two filters are symmetric and complementary: low(x) + high(x) = x delayed by
half a filter, and that delay is taken off.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torchaudio.functional import fftconvolve

from codec.audio import Samples
from shards.contract import TARGET_RATE

HALF = 384  # samples that the filters reach to each side (8 ms)
BETA = 8.0  # of the Kaiser window: 80 dB outside a transition of 500 Hz
TRANSITION_HZ = 100.0  # above the crossover, where the recording is 30 dB down: up to there it must reach
MATCHED_OCTAVES = 0.5  # below the crossover, where both have content: there the levels are made equal


def hybrid(recording: Samples, restored: Samples, crossover_hz: float) -> Samples:
    """Equal stretches with HALF more samples on each side → recording below, SIDON above, without the margins.

    SIDON's level is matched to the recording's over the half octave below the crossover.
    """
    low = lowpass(crossover_hz)
    gain = _matching_gain(recording, restored, crossover_hz)
    below = _filtered(recording, low)
    above = restored[HALF:-HALF] - _filtered(restored, low)
    mixed: Samples = (below + gain * above).astype(np.float32)
    return mixed


@cache
def lowpass(cutoff_hz: float) -> npt.NDArray[np.float64]:
    """2 HALF + 1 taps, symmetric, of unit sum; δ − lowpass is the complementary high-pass."""
    time = np.arange(-HALF, HALF + 1)
    taps: npt.NDArray[np.float64] = np.sinc(2 * cutoff_hz / TARGET_RATE * time) * np.kaiser(2 * HALF + 1, BETA)
    return taps / taps.sum()


def _filtered(samples: Samples, taps: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Without the margins, so that the filters' delay is gone."""
    filtered: npt.NDArray[np.float64] = fftconvolve(
        torch.from_numpy(samples).double(), torch.from_numpy(taps), mode="valid"
    ).numpy()
    return filtered


def _matching_gain(recording: Samples, restored: Samples, crossover_hz: float) -> float:
    band = lowpass(crossover_hz) - lowpass(crossover_hz / 2**MATCHED_OCTAVES)
    power = [float(np.square(_filtered(samples, band)).mean()) for samples in (recording, restored)]
    return math.sqrt(power[0] / power[1]) if min(power) > 0 else 1.0
