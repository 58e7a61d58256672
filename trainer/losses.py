"""What a decoded crop is compared by. Every loss gives one value per crop (shape B).

It is averaged over the crop's real samples or frames only; so a batch's mean does not depend on how it was split into
micro-batches or over GPUs. Codes hold a recording's level, so neither codes nor targets may be scaled, filtered or
mixed for augmentation: only what changes both in the same way, such as another place of the crop, is allowed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor
from torchaudio.functional import melscale_fbanks

from shards.contract import TARGET_RATE

LOG_FLOOR = 1e-5  # of a normalised magnitude: white noise at −100 dB re full scale
MEL_SCALES = ((32, 5), (64, 10), (128, 20), (256, 40), (512, 80), (1024, 160), (2048, 320))  # window, mel bands
MEL_FLOOR = 1e-5


def waveform_l1(wav_BN: Tensor, target_BN: Tensor, valid_B: Tensor) -> Tensor:
    """Mean |x − y| over the real samples. Both inputs are zero after `valid_B` samples."""
    return (wav_BN - target_BN).abs().sum(dim=1) / valid_B


def stft(wav_BN: Tensor, n_fft: int) -> Tensor:
    """(B, n_fft / 2 + 1, frames), complex: Hann, hop n_fft / 4; frame t is centred on sample t · hop, the ends are
    padded with zeros.
    """
    window = _hann(n_fft, wav_BN.device, wav_BN.dtype)
    return torch.stft(wav_BN, n_fft, n_fft // 4, window=window, center=True, pad_mode="constant", return_complex=True)


def magnitudes(wav_BN: Tensor, n_fft: int) -> Tensor:
    """(B, n_fft / 2 + 1, frames): |STFT| with a Hann window and hop n_fft / 4, divided by the window's energy √Σw².

    White noise then has the same expected magnitude at every n_fft, so scales weigh alike.
    """
    return stft(wav_BN, n_fft).abs() / _hann(n_fft, wav_BN.device, wav_BN.dtype).square().sum().sqrt()


def stft_l1(wav_BN: Tensor, target_BN: Tensor, valid_B: Tensor, n_fft: int) -> Tensor:
    """Mean | |X| − |Y| | over bins and over the frames of the real samples: those of the crop when it is alone."""
    return real_mean((magnitudes(wav_BN, n_fft) - magnitudes(target_BN, n_fft)).abs(), valid_B, n_fft // 4)


def log_stft_l1(wav_BN: Tensor, target_BN: Tensor, valid_B: Tensor, n_fft: int) -> Tensor:
    """Mean | ln |X| − ln |Y| |, magnitudes not below LOG_FLOOR: L_mag of Parallel WaveGAN (arXiv 1910.11480).

    Quiet bins weigh as much as loud ones, so the band above 12 kHz counts for what it is: half of the bins.
    """
    x, y = (magnitudes(audio, n_fft).clamp(min=LOG_FLOOR).log() for audio in (wav_BN, target_BN))
    return real_mean((x - y).abs(), valid_B, n_fft // 4)


def mel_l1(wav_BN: Tensor, target_BN: Tensor, valid_B: Tensor) -> Tensor:
    """Σ over MEL_SCALES of the mean | log10 mel(x) − log10 mel(y) |, as DAC trains (arXiv 2306.06546).

    The definition is that of its code, audiotools' MelSpectrogramLoss with `mag_weight` 0 and `pow` 1: magnitudes
    that are not normalised, Slaney's filters up to 24 kHz, and a floor of 1e-5 before the logarithm.
    """
    total = torch.zeros_like(valid_B, dtype=wav_BN.dtype)
    for n_fft, n_mels in MEL_SCALES:
        x, y = (mel(audio, n_fft, n_mels).clamp(min=MEL_FLOOR).log10() for audio in (wav_BN, target_BN))
        total = total + real_mean((x - y).abs(), valid_B, n_fft // 4)
    return total


def mel(wav_BN: Tensor, n_fft: int, n_mels: int) -> Tensor:
    """(B, n_mels, frames): |STFT| through mel filters."""
    return _filters(n_fft, n_mels, wav_BN.device, wav_BN.dtype) @ stft(wav_BN, n_fft).abs()


def real_mean(values_BFT: Tensor, valid_B: Tensor, hop: int) -> Tensor:
    """Mean over bins and over the frames that a crop of `valid_B` samples has when it is alone."""
    values_BT = values_BFT.mean(dim=1)
    frames_B = valid_B.div(hop, rounding_mode="floor") + 1
    real_BT = torch.arange(values_BT.shape[1], device=values_BT.device) < frames_B[:, None]
    return (values_BT * real_BT).sum(dim=1) / frames_B


def reconstruction(
    wav_BN: Tensor, target_BN: Tensor, valid_B: Tensor, weights: Mapping[str, float], n_ffts: tuple[int, ...]
) -> dict[str, Tensor]:
    """Those of `l1`, `stft`, `log_stft` (means over `n_ffts`) and `mel` that have a weight; not yet weighted."""
    crops = wav_BN, target_BN, valid_B
    terms = {
        "l1": lambda: waveform_l1(*crops),
        "stft": lambda: torch.stack([stft_l1(*crops, n_fft) for n_fft in n_ffts]).mean(dim=0),
        "log_stft": lambda: torch.stack([log_stft_l1(*crops, n_fft) for n_fft in n_ffts]).mean(dim=0),
        "mel": lambda: mel_l1(*crops),
    }
    return {name: term() for name, term in terms.items() if weights[name]}


def weighted(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Σ weight · term, shape B."""
    return torch.stack([weights[name] * value_B for name, value_B in terms.items()]).sum(dim=0)


@lru_cache(maxsize=32)
def _hann(n_fft: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.hann_window(n_fft, device=device, dtype=dtype)


@lru_cache(maxsize=32)
def _filters(n_fft: int, n_mels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with warnings.catch_warnings():  # narrow filters may fall between two bins; DAC's do too
        warnings.filterwarnings("ignore", message="At least one mel filterbank has all zero values")
        filters = melscale_fbanks(n_fft // 2 + 1, 0.0, TARGET_RATE / 2, n_mels, TARGET_RATE, "slaney", "slaney")
    return filters.T.to(device, dtype)
