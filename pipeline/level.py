"""SIDON speaks at a level of its own: its features are normalised, so it does not hear how loud a window is.

Each window's output is therefore brought to the level that the recording has there, measured where both speak. Scaling
by a recording's peak alone is right only for windows as loud as the loudest: not for a speaker who turns away, nor for
one who is heard beside a click.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from codec.audio import Samples
from shards.contract import TARGET_RATE

PEAK = 0.9  # of what SIDON hears; its output is scaled back
N_FFT = 960  # 20 ms
BAND_HZ = (100, 8_000)
LOUD_DB = 20.0  # below what 5 % of the frames exceed: a frame that speaks
MIN_FRAMES = 10  # fewer in which both speak say nothing
LEAST_DB, MOST_DB = -30.0, 6.0  # of what a level may be corrected by; noise must not be brought up to speech


def match(source: Samples, restored: Samples, heard_peak: float) -> tuple[float, float]:
    """Equal stretches at 48 kHz, `restored` from what was heard with that peak, and scaled back → the factor that it
    needs, and how much louder, in dB, the model spoke than at a peak of PEAK.
    """
    expected = heard_peak / PEAK  # of a model that always speaks as if what it hears peaked there
    if expected == 0 or len(source) < MIN_FRAMES * N_FFT:
        return expected, 0.0
    heard_T, spoken_T = _powers(source), _powers(restored)
    both_T = _loud(heard_T) & _loud(spoken_T)
    if int(both_T.sum()) < MIN_FRAMES:
        return expected, 0.0
    ratio = math.sqrt(float(heard_T[both_T].sum() / spoken_T[both_T].sum()))
    correction_db = 20 * math.log10(ratio / expected)
    return expected * 10 ** (min(max(correction_db, LEAST_DB), MOST_DB) / 20), -correction_db


def _powers(samples: Samples) -> Tensor:
    """Of each frame, in BAND_HZ, up to a factor."""
    first, last = (math.ceil(edge * N_FFT / TARGET_RATE) for edge in BAND_HZ)
    frames_TN = torch.from_numpy(samples[: len(samples) // N_FFT * N_FFT]).reshape(-1, N_FFT)
    spectrum_TK = torch.fft.rfft(frames_TN * torch.hann_window(N_FFT))[:, first:last]
    return torch.view_as_real(spectrum_TK).square().sum((1, 2)).double()


def _loud(power_T: Tensor) -> Tensor:
    return power_T > max(float(torch.quantile(power_T, 0.95)) * 10 ** (-LOUD_DB / 10), 1e-12)
