"""Does a target say the same as its recording, at the same instant and level?

SIDON re-synthesises: phases differ even where the speech is the same, so waveforms are not compared, envelopes are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor
from tqdm import tqdm

from codec.audio import Samples
from shards.contract import TARGET_RATE
from shards.errors import UserError
from shards.storage import READERS, Location
from shards.writer import read_table

HOP = 96  # samples of one envelope step: 2 ms
N_FFT = 960  # 20 ms
BAND_EDGES_HZ = np.geomspace(200, 10_000, 13)  # twelve bands, whose envelopes are aligned together
LEVEL_BAND_HZ = (100, 8_000)
MAX_LAG_STEPS = 30
COMPRESSION = 0.25
SMOOTHING_STEPS = 25
BLOCK_STEPS = 128  # whose spectra are computed at once, so that they stay in a core's cache
SPEECH_RANGE_DB = 35.0
SPEECH_FLOOR_DB = -70.0  # RMS of a frame: below it, nobody speaks in a recording of usual level
SILENCE_DB = -96.0  # RMS from 100 Hz to 8 kHz: 5 dB above dithered 16-bit rounding
HEARD_DB, QUIET_SPEECH_DB = -64.0, -90.0  # above which anything, and what rises and falls as speech does, is compared
SPEECH_SWING_DB = 6.0  # of the 50 ms envelopes, from what 10 % do not reach to what 5 % exceed; noise has 1 dB


def compare(source: Samples, target: Samples) -> dict[str, float | None]:
    """Equal stretches at 48 kHz → `lag_samples`, `level_difference_db` and `correlation` of target against source.

    Lag is the shift at which the bands' envelopes correlate best, positive when the target is late. Level is RMS from
    100 Hz to 8 kHz. Correlation is Pearson's, of the 50 ms RMS envelopes in that band; 0 where only one is silent.
    Where both are silent, or hold only quiet noise, there is nothing to compare: all None.
    """
    a_CT, b_CT = _band_powers(source), _band_powers(target)
    level_a, level_b = (10 * math.log10(max(float(power_CT[0].mean()), 1e-20)) for power_CT in (a_CT, b_CT))
    louder_T = (a_CT if level_a > level_b else b_CT)[0]
    if max(level_a, level_b) < (QUIET_SPEECH_DB if _swing_db(louder_T) > SPEECH_SWING_DB else HEARD_DB):
        return {"lag_samples": None, "level_difference_db": None, "correlation": None}
    if min(level_a, level_b) < SILENCE_DB:
        return {"lag_samples": None, "level_difference_db": level_b - level_a, "correlation": 0.0}
    smoothed = torch.stack([_smooth(a_CT[0]), _smooth(b_CT[0])]).sqrt()
    return {
        "lag_samples": _lag_steps(_envelopes(a_CT[1:]), _envelopes(b_CT[1:])) * HOP,
        "level_difference_db": level_b - level_a,
        "correlation": float(torch.corrcoef(smoothed)[0, 1].nan_to_num()),
    }


def speech_share(samples: Samples) -> float:
    """Share of frames of 20 ms above SPEECH_FLOOR_DB and within SPEECH_RANGE_DB of what 5 % of them exceed."""
    frames = samples[: len(samples) // N_FFT * N_FFT].reshape(-1, N_FFT)
    if not len(frames):
        return 0.0
    level_db = 10 * np.log10(np.square(frames, dtype=np.float64).mean(axis=1) + 1e-20)
    return float((level_db > max(np.percentile(level_db, 95) - SPEECH_RANGE_DB, SPEECH_FLOOR_DB)).mean())


def check_alignment(sidecars: Sequence[Location], max_median_lag: float) -> None:
    """Prints lag and level over all targets that were compared. Raises UserError when the typical lag is not small."""
    columns = ["lag_samples", "level_difference_db"]
    read = partial(read_table, columns=columns, filters=pc.field("lag_samples").is_valid())
    with ThreadPoolExecutor(READERS) as pool:
        tables = list(pool.map(read, sidecars))
    for name, values in ((name, np.concatenate([table[name].to_numpy() for table in tables])) for name in columns):
        if not len(values):
            return
        low, median, high = np.percentile(values, [5, 50, 95])
        tqdm.write(f"  {name} of targets against recordings: median {median:.1f}, 5 … 95 %: {low:.1f} … {high:.1f}")
        if name == "lag_samples" and abs(median) > max_median_lag:
            raise UserError(
                f"targets are typically {median:.0f} samples at 48 kHz behind their recordings (limit: "
                f"{max_median_lag:g}): the model's delay is not the one removed, so its targets cannot be trained on"
            )


def _band_powers(samples: Samples) -> Tensor:
    """(1 + bands, steps): mean squares from 100 Hz to 8 kHz, then in each band; full scale = 1."""
    window, weights_KC = _window_and_bands()
    wav_N = torch.nn.functional.pad(torch.from_numpy(samples), (N_FFT // 2, N_FFT // 2))
    powers = []
    for frames_TN in wav_N.unfold(0, N_FFT, HOP).split(BLOCK_STEPS):
        spectrum_TK = torch.view_as_real(torch.fft.rfft(frames_TN * window)).flatten(1)
        powers.append(spectrum_TK[:, : len(weights_KC)].square() @ weights_KC)
    return torch.cat(powers).T


@cache
def _window_and_bands() -> tuple[Tensor, Tensor]:
    """Hann's (N_FFT,); what the squares of a bin's real and imaginary part add to each band, (2 × bins, 1 + bands)."""
    window = torch.hann_window(N_FFT)
    edges = [LEVEL_BAND_HZ, *itertools.pairwise(BAND_EDGES_HZ)]
    bins = [[math.ceil(edge * N_FFT / TARGET_RATE) for edge in band] for band in edges]
    weights_KC = torch.zeros(max(last for _, last in bins), len(bins))
    for band, (first, last) in enumerate(bins):
        weights_KC[first : max(last, first + 1), band] = 2 / (window.square().sum() * N_FFT)
    return window, weights_KC.repeat_interleave(2, dim=0)


def _smooth(power_T: Tensor) -> Tensor:
    kernel = torch.full((1, 1, SMOOTHING_STEPS), 1 / SMOOTHING_STEPS)
    return torch.nn.functional.conv1d(power_T[None, None], kernel, padding=SMOOTHING_STEPS // 2)[0, 0]


def _swing_db(power_T: Tensor) -> float:
    """Between loud and quiet of the 50 ms envelope."""
    quiet, loud = np.percentile(_smooth(power_T).numpy(), [10, 95])
    return 10 * math.log10(max(float(loud), 1e-20) / max(float(quiet), 1e-20))


def _envelopes(power_CT: Tensor) -> Tensor:
    """(bands, steps − 1): rises and falls of the compressed power, of no mean and unit norm: every band has one voice.

    COMPRESSION lets quiet onsets count; of the exponents tried on real speech, with noise and without, it finds most.
    """
    envelope_CT = (power_CT + 1e-12).pow(COMPRESSION).diff(dim=1)
    centred = envelope_CT - envelope_CT.mean(dim=1, keepdim=True)
    return centred / centred.norm(dim=1, keepdim=True).clamp(min=1e-9)


def _lag_steps(source_CT: Tensor, target_CT: Tensor) -> float:
    """The shift of best correlation, summed over bands; a parabola finds it between the steps."""
    size = 2 * source_CT.shape[1]
    product = torch.fft.rfft(target_CT, size) * torch.fft.rfft(source_CT, size).conj()
    correlation = torch.fft.irfft(product, size).sum(dim=0)
    reach = min(MAX_LAG_STEPS, source_CT.shape[1] - 1)
    around = torch.cat([correlation[size - reach :], correlation[: reach + 1]])
    best = int(around.argmax())
    if not 0 < best < 2 * reach:
        return float(best - reach)
    left, middle, right = around[best - 1 : best + 2].tolist()
    curvature = left - 2 * middle + right
    return best - reach + (0.5 * (left - right) / curvature if curvature else 0.0)
