"""Distances between spectra: log-spectral (LSD), multi-resolution STFT and mel. All are 0 for equal signals.

Both signals are mono at 48 kHz and of one length. Each definition says its floor: it decides what an empty band costs.
"""

from __future__ import annotations

import math

from torch import Tensor

from shards.contract import TARGET_RATE
from trainer.losses import MEL_FLOOR, mel, stft

N_FFT = 2048
FLOOR = 1e-8  # on |X|², of LSD
SPLIT_HZ = 12_000  # where the stock codec ends
STFT_N_FFTS = (1024, 2048, 4096)
STFT_FLOOR = 1e-7  # on |X|²
MEL_BANDS = {512: 40, 1024: 80, 2048: 160}  # n_fft → bands, none of them narrower than a bin


def log_spectral_distances(wav_N: Tensor, target_N: Tensor) -> dict[str, float]:
    """`lsd` over 0–24 kHz, `lsd_hf` from 12 kHz on, `lsd_lf` below. In log10 units; 0 for equal signals.

    As AP-BWE computes it (arXiv 2401.06387, github.com/yxlu-0102/AP-BWE): mean over frames of the root mean square
    over bins of log10 max(|X|², 1e-8) − log10 max(|Y|², 1e-8); Hann 2048, hop 512. Only the ends differ, padded with
    zeros here and mirrored there. Two independent noises of one envelope are 0.79 apart.
    """
    squared_FT = _squared_log_difference(wav_N, target_N)
    first_high = _first_bin(SPLIT_HZ)
    bands = {"lsd": squared_FT, "lsd_hf": squared_FT[first_high:], "lsd_lf": squared_FT[:first_high]}
    return {name: _mean_of_roots(band) for name, band in bands.items()}


def log_spectral_distance_in_band(wav_N: Tensor, target_N: Tensor, low_hz: float, high_hz: float) -> float:
    """LSD as above over the bins from `low_hz` up to, not including, `high_hz`. Raises ValueError for no bin."""
    first, last = _first_bin(low_hz), _first_bin(high_hz)
    if first >= last:
        raise ValueError(f"no bin between {low_hz} and {high_hz} Hz")
    return _mean_of_roots(_squared_log_difference(wav_N, target_N)[first:last])


def stft_distance(wav_N: Tensor, target_N: Tensor) -> float:
    """Mean over n_fft 1024, 2048, 4096 of ‖|X| − |Y|‖ / ‖|Y|‖ + mean |ln |X| − ln |Y||; Hann, hop n_fft / 4.

    Spectral convergence and log magnitude as in Parallel WaveGAN (arXiv 1910.11480), with the floor of the program
    github.com/kan-bayashi/ParallelWaveGAN: |X|² ≥ 1e-7.
    """
    distances = []
    for n_fft in STFT_N_FFTS:
        x, y = (_power(wav, n_fft).clamp(min=STFT_FLOOR).sqrt() for wav in (wav_N, target_N))
        distances.append(float((x - y).norm() / y.norm() + (x.log() - y.log()).abs().mean()))
    return sum(distances) / len(distances)


def mel_distance(wav_N: Tensor, target_N: Tensor) -> float:
    """Mean over n_fft 512, 1024, 2048 (40, 80, 160 bands, 0–24 kHz) of mean |log10 X − log10 Y|; Hann, hop n_fft / 4.

    X are mel magnitudes, floored at 1e-5, of Slaney's scale and area normalisation: the distance of DAC
    (arXiv 2306.06546), with windows and bands for which no band is empty at 48 kHz.
    """
    distances = []
    for n_fft, bands in MEL_BANDS.items():
        x, y = (mel(wav.float(), n_fft, bands).clamp(min=MEL_FLOOR).log10() for wav in (wav_N, target_N))
        distances.append(float((x - y).abs().mean()))
    return sum(distances) / len(distances)


def _first_bin(hz: float) -> int:
    return math.ceil(hz * N_FFT / TARGET_RATE)


def _squared_log_difference(wav_N: Tensor, target_N: Tensor) -> Tensor:
    x, y = (_power(wav, N_FFT).clamp(min=FLOOR).log10() for wav in (wav_N, target_N))
    return (x - y).square()


def _mean_of_roots(squared_FT: Tensor) -> float:
    return float(squared_FT.mean(dim=0).sqrt().mean())


def _power(wav_N: Tensor, n_fft: int) -> Tensor:
    """(bins, frames): |STFT|², not normalised."""
    return stft(wav_N.float(), n_fft).abs().square()
