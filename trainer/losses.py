"""The base recipe: waveform L1 and multi-scale STFT magnitudes, each crop weighing alike.

Every loss returns one value per crop (shape B), averaged over its real samples or frames only; so a batch's mean does
not depend on how it was split into micro-batches or over GPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def waveform_l1(wav_BN: Tensor, target_BN: Tensor, valid_B: Tensor) -> Tensor:
    """Mean |x − y| over the real samples. Both inputs are zero after `valid_B` samples."""
    return (wav_BN - target_BN).abs().sum(dim=1) / valid_B


def magnitudes(wav_BN: Tensor, n_fft: int) -> Tensor:
    """(B, n_fft / 2 + 1, frames): |STFT| with a Hann window and hop n_fft / 4, divided by the window's energy √Σw².

    White noise then has the same expected magnitude at every n_fft, so scales weigh alike. Frame t is centred on
    sample t · hop; the ends are padded with zeros.
    """
    window = torch.hann_window(n_fft, device=wav_BN.device, dtype=wav_BN.dtype)
    spectrum = torch.stft(
        wav_BN, n_fft, n_fft // 4, window=window, center=True, pad_mode="constant", return_complex=True
    )
    return spectrum.abs() / window.square().sum().sqrt()


def stft_l1(wav_BN: Tensor, target_BN: Tensor, valid_B: Tensor, n_fft: int) -> Tensor:
    """Mean | |X| − |Y| | over bins and over the frames of the real samples: those of the crop when it is alone."""
    difference_BT = (magnitudes(wav_BN, n_fft) - magnitudes(target_BN, n_fft)).abs().mean(dim=1)
    frames_B = valid_B.div(n_fft // 4, rounding_mode="floor") + 1
    real_BT = torch.arange(difference_BT.shape[1], device=wav_BN.device) < frames_B[:, None]
    return (difference_BT * real_BT).sum(dim=1) / frames_B


def base_losses(
    wav_BN: Tensor, target_BN: Tensor, valid_B: Tensor, l1_weight: float, stft_weight: float, n_ffts: tuple[int, ...]
) -> dict[str, Tensor]:
    """`l1`, `stft` (mean over `n_ffts`) and their weighted sum `loss`, each of shape B."""
    l1 = waveform_l1(wav_BN, target_BN, valid_B)
    stft = torch.stack([stft_l1(wav_BN, target_BN, valid_B, n_fft) for n_fft in n_ffts]).mean(dim=0)
    return {"loss": l1_weight * l1 + stft_weight * stft, "l1": l1, "stft": stft}
