"""Discriminators at 48 kHz: multi-period on the waveform, multi-band on complex spectrograms of several resolutions.

Each maps audio (B, N) to feature maps (B, channels, frames, width), of which the last is its score.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, pad
from torch.nn.utils.parametrizations import weight_norm

SLOPE = 0.1  # of the leaky ReLU
BANDS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # edges, as parts of 24 kHz


class PeriodDiscriminator(nn.Module):
    """Sees every `period`-th sample as one column (HiFi-GAN, arXiv 2010.05646 §2.3; layers as there and in DAC)."""

    def __init__(self, period: int, channels: int) -> None:
        super().__init__()
        self.period = period
        widths = [1, channels, 4 * channels, 16 * channels, 32 * channels]
        strided = [_conv(a, b, (5, 1), (3, 1)) for a, b in itertools.pairwise(widths)]
        self.convs = nn.ModuleList([*strided, _conv(widths[-1], widths[-1], (5, 1))])
        self.score = _conv(widths[-1], 1, (3, 1))

    def forward(self, wav_BN: Tensor) -> list[Tensor]:
        missing = -wav_BN.shape[1] % self.period
        x = pad(wav_BN[:, None], (0, missing), mode="reflect").unflatten(2, (-1, self.period))
        maps = _activations(self.convs, x)
        return [*maps, self.score(maps[-1])]


class SpectrogramDiscriminator(nn.Module):
    """Sees real and imaginary part of an STFT, each of five bands by convolutions of its own.

    The multi-band complex discriminator of DAC (arXiv 2306.06546): Hann window, hop n_fft / 4.
    """

    window: Tensor

    def __init__(self, n_fft: int, channels: int) -> None:
        super().__init__()
        self.n_fft = n_fft
        edges = [round(edge * (n_fft // 2 + 1)) for edge in BANDS]
        self.bands = [slice(low, high) for low, high in itertools.pairwise(edges)]
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        self.stacks = nn.ModuleList(nn.ModuleList(_band_layers(channels)) for _ in self.bands)
        self.score = _conv(channels, 1, (3, 3))

    def forward(self, wav_BN: Tensor) -> list[Tensor]:
        with torch.autocast(wav_BN.device.type, enabled=False):
            spectrum = torch.stft(
                wav_BN.to(self.window.dtype), self.n_fft, self.n_fft // 4, window=self.window, return_complex=True
            )
        x_B2TF = torch.view_as_real(spectrum).permute(0, 3, 2, 1)
        maps, ends = list[Tensor](), list[Tensor]()
        for band, stack in zip(self.bands, self.stacks, strict=True):
            assert isinstance(stack, nn.ModuleList)
            maps += _activations(stack, x_B2TF[..., band])
            ends.append(maps[-1])
        return [*maps, self.score(torch.cat(ends, dim=3))]


class Discriminators(nn.Module):
    """All of them: one list of feature maps each."""

    def __init__(self, periods: tuple[int, ...], period_channels: int, n_ffts: tuple[int, ...], channels: int) -> None:
        super().__init__()
        by_period = [PeriodDiscriminator(period, period_channels) for period in periods]
        self.members = nn.ModuleList([*by_period, *(SpectrogramDiscriminator(n_fft, channels) for n_fft in n_ffts)])

    def forward(self, wav_BN: Tensor) -> list[list[Tensor]]:
        return [member(wav_BN) for member in self.members]


def _band_layers(channels: int) -> list[nn.Module]:
    wide = [_conv(channels, channels, (3, 9), (1, 2)) for _ in range(3)]
    return [_conv(2, channels, (3, 9)), *wide, _conv(channels, channels, (3, 3))]


def _conv(inputs: int, outputs: int, kernel: tuple[int, int], stride: tuple[int, int] = (1, 1)) -> nn.Module:
    padding = (kernel[0] // 2, kernel[1] // 2)
    return weight_norm(nn.Conv2d(inputs, outputs, kernel, stride, padding))


def _activations(layers: nn.ModuleList, x: Tensor) -> list[Tensor]:
    maps = []
    for layer in layers:
        x = leaky_relu(layer(x), SLOPE)
        maps.append(x)
    return maps
