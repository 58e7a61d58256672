"""SIDON's front end: the log-mel features of SeamlessM4T, batched in torch on any device.

A Kaldi-style filter bank on the waveform × 2^15: frames of 25 ms every 10 ms without their mean, pre-emphasis 0.97,
povey window, power spectrum of 512 points, 80 Kaldi-mel bands, natural logarithm. Each band is then normalised over
the recording's own frames (variance with ddof 1), and two frames of 10 ms are stacked into one of 20 ms. Equal to
`transformers.SeamlessM4TFeatureExtractor` (tested); padding for the sake of a batch changes nothing.

Mean and pre-emphasis are linear, and the window's first sample is zero, so a frame is windowed as
w · (d − 0.03 m) from its second sample on: d the whole recording pre-emphasised once, m the frame's mean.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

RATE = 16_000
FRAME_LENGTH, HOP = 400, 160
N_FFT = 512
N_MELS = 80
STRIDE = 2  # frames of 10 ms in one feature frame
FULL_SCALE = 2.0**15
PREEMPHASIS = 0.97
FLOOR = 1.192092955078125e-07
EPSILON = 1e-7  # added to the variance
BLOCK_FRAMES = 256  # at once on a CPU, so that a block stays in its cache
BANDS_AT_ONCE = 16  # whose filters are one matrix: that of all bands would be zero for most bins


def features(wav_BN: Tensor, samples: list[int]) -> Tensor:
    """16 kHz waveforms, zero-padded to one length, with their real lengths → (B, T, 160) features, zero where padded.

    Normalised over the frames of 10 ms that lie wholly in the real samples, of which there must be two.
    """
    log_mel_BFM = log_mel(wav_BN)
    frames_B = torch.tensor([(n - FRAME_LENGTH) // HOP + 1 for n in samples], device=wav_BN.device)
    real_BF1 = (torch.arange(log_mel_BFM.shape[1], device=wav_BN.device) < frames_B[:, None])[..., None]
    count_B11 = frames_B[:, None, None]
    mean_B1M = real_BF1.mT.to(log_mel_BFM) @ log_mel_BFM / count_B11
    centred_BFM = log_mel_BFM.sub_(mean_B1M).mul_(real_BF1)
    variance_B1M = torch.linalg.vector_norm(centred_BFM, dim=1, keepdim=True).square_() / (count_B11 - 1)
    normal_BFM = centred_BFM.div_((variance_B1M + EPSILON).sqrt_())
    odd = normal_BFM.shape[1] % STRIDE
    return nn.functional.pad(normal_BFM, (0, 0, 0, odd)).reshape(len(samples), -1, N_MELS * STRIDE)


def log_mel(wav_BN: Tensor) -> Tensor:
    """(B, N) → (B, frames, 80) natural logarithms of the bands' power."""
    frames = (wav_BN.shape[1] - FRAME_LENGTH) // HOP + 1
    block = max(BLOCK_FRAMES // len(wav_BN), 1) if wav_BN.device.type == "cpu" else frames
    starts = range(0, frames * HOP, block * HOP)
    overlap = FRAME_LENGTH - HOP
    blocks = [_power(wav_BN[:, start : start + block * HOP + overlap]) for start in starts]
    return torch.cat(blocks, dim=1).clamp_(min=FLOOR).log_()


def _power(wav_BN: Tensor) -> Tensor:
    """(B, N) → (B, frames, 80) power of the bands.

    The spectrum is computed in float64: in float32 the bands above an old low-pass would drown in rounding noise.
    """
    window, filters = _constants(wav_BN.device)
    wav_BN = wav_BN.double()
    means_BF1 = _frame_means(wav_BN)[..., None]
    emphasised_BN = torch.sub(wav_BN[:, 1:], wav_BN[:, :-1], alpha=PREEMPHASIS)
    padded_BFN = wav_BN.new_zeros(len(wav_BN), means_BF1.shape[1], N_FFT)
    frames_BFN = padded_BFN[..., : len(window)]
    torch.mul(emphasised_BN.unfold(1, len(window), HOP), window, out=frames_BFN)
    frames_BFN.addcmul_(means_BF1, window, value=PREEMPHASIS - 1)
    spectrum_BFKc = torch.view_as_real(torch.fft.rfft(padded_BFN))
    squares_BFK = spectrum_BFKc.flatten(-2).float().square_()  # of real and imaginary parts, in turn
    return torch.cat([squares_BFK[..., first:last] @ bands for first, last, bands in filters], dim=-1)


def _frame_means(wav_BN: Tensor) -> Tensor:
    """(B, N) → (B, frames), from sums over the steps that length and hop of the frames have in common."""
    step = math.gcd(FRAME_LENGTH, HOP)
    sums_BS = wav_BN[:, : wav_BN.shape[1] // step * step].unflatten(1, (-1, step)).sum(2)
    return sums_BS.unfold(1, FRAME_LENGTH // step, HOP // step).sum(2) / FRAME_LENGTH


@lru_cache(maxsize=4)
def _constants(device: torch.device) -> tuple[Tensor, list[tuple[int, int, Tensor]]]:
    """Povey window without its first sample (399,), float64; mel filters × full scale², float32,
    BANDS_AT_ONCE each: the first of 514 rows that they weigh, the first after the last, and their weights.

    Filters are triangles on the scale 1127 ln(1 + f / 700) from 20 Hz to 8 kHz, as Kaldi makes them. Each row stands
    twice, for real and imaginary part.
    """
    window = np.hanning(FRAME_LENGTH) ** 0.85
    bins_K1 = _mel(np.arange(N_FFT // 2 + 1) * RATE / N_FFT)[:, None]
    low, high = _mel(np.array([20.0, RATE / 2]))
    corners = np.linspace(low, high, N_MELS + 2)
    rise = (bins_K1 - corners[:-2]) / (corners[1:-1] - corners[:-2])
    fall = (corners[2:] - bins_K1) / (corners[2:] - corners[1:-1])
    weights = np.repeat(np.minimum(rise, fall).clip(min=0) * FULL_SCALE**2, 2, axis=0).astype(np.float32)
    filters = []
    for bands in np.split(weights, N_MELS // BANDS_AT_ONCE, axis=1):
        first, *_, last = np.flatnonzero(bands.any(axis=1)).tolist()
        filters.append((first, last + 1, torch.from_numpy(bands[first : last + 1]).to(device)))
    return torch.from_numpy(window[1:]).to(device), filters


def _mel(hertz: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return 1127.0 * np.log1p(hertz / 700.0)
