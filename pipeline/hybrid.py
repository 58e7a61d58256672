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
FRAME = 960  # samples, 20 ms
LOUD, QUIET = 0.1, 0.5  # shares of the frames, by SIDON's level in that band: fricatives, and what holds none
MAX_GAIN = 2.0  # of SIDON above the crossover, and its inverse the least: 6 dB


def hybrid(recording: Samples, restored: Samples, crossover_hz: float) -> Samples:
    """Equal stretches with HALF more samples on each side → recording below, SIDON above, without the margins.

    SIDON's level is matched to that of the recording's speech in the half octave below the crossover.
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
    """What makes SIDON as loud as the recording where SIDON is loud: in fricatives.

    SIDON takes noise out, which the recording holds all the time: the power of quiet frames is subtracted, of both.
    1.0 where the loud frames of one have less than twice that power: only a pause, or speech below its noise.
    """
    band = lowpass(crossover_hz) - lowpass(crossover_hz / 2**MATCHED_OCTAVES)
    powers = [_frame_powers(_filtered(samples, band)) for samples in (recording, restored)]
    order = powers[1].argsort()
    loud, quiet = order[-max(int(LOUD * len(order)), 1) :], order[: max(int(QUIET * len(order)), 1)]
    noise = [power[quiet].mean() for power in powers]
    speech = [power[loud].mean() - below for power, below in zip(powers, noise, strict=True)]
    if any(above <= below for above, below in zip(speech, noise, strict=True)):
        return 1.0
    return min(max(math.sqrt(speech[0] / speech[1]), 1 / MAX_GAIN), MAX_GAIN)


def _frame_powers(samples: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Mean squares."""
    frames = samples[: len(samples) // FRAME * FRAME].reshape(-1, FRAME)
    powers: npt.NDArray[np.float64] = np.square(frames).mean(axis=1)
    return powers
