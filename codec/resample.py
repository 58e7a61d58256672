"""Recordings at any rate: windowed-sinc (Kaiser) by torchaudio.

A stretch of the output is computed from the frames that its kernel reaches, so it equals that stretch of the whole
resampled recording.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor, nn
from torchaudio.transforms import Resample

from codec.audio import AudioError, Recording, Samples, output_length
from codec.held import Held

KERNEL_WIDTH = 64  # zero crossings on each side; with ROLLOFF and BETA, resampy's "kaiser_best"
ROLLOFF = 0.9475937167399596
BETA = 14.769656459379492
PASSED = 0.98 * ROLLOFF  # of the lower rate's half: up to there it takes off less than 1 dB, at ROLLOFF 6 dB
MAX_KERNEL_ELEMENTS = 1 << 25
MIN_FILTERS = 32  # output channels of a convolution


class Resampler:
    """A recording at `rate`: `read(a, b)` returns its samples [a, b), zeros before its start and after its end."""

    def __init__(self, recording: Recording, rate: int) -> None:
        common = math.gcd(recording.header.rate, rate)
        self.old, self.new = recording.header.rate // common, rate // common
        self.recording = recording
        self.margin = 0 if self.old == self.new else -(-_kernel_width(self.old, self.new) // self.old)
        self._blocks: Iterator[Samples] = iter(())
        self._held: Held | None = None

    def read(self, a: int, b: int) -> Samples:
        first = a // self.new - self.margin
        last = -(-b // self.new) + self.margin
        native = self._native(first * self.old, last * self.old)
        if self.old == self.new:
            return native
        resampled = sinc_resampler(self.old, self.new)(torch.from_numpy(native)).numpy()
        skip = a - first * self.new
        stretch: Samples = resampled[skip : skip + b - a]
        stretch[: max(-a, 0)] = 0  # the kernel rings beyond both ends
        stretch[max(output_length(self.recording.frames, self.old, self.new) - a, 0) :] = 0
        return stretch

    def _native(self, a: int, b: int) -> Samples:
        """Frames [a, b) of the recording, with zeros before its start and after its end."""
        if self._held is None:
            start = max(a, 0)
            self._blocks, self._held = self.recording.blocks(start), Held(start)
        while self._held.end < min(b, self.recording.frames):
            self._held.append(next(self._blocks))
            self._held.drop_before(a)
        return self._held.read(a, b)


def passed_hz(old: int, new: int) -> float:
    """Up to where a recording at one rate keeps its level at the other."""
    return old / 2 if old == new else PASSED * min(old, new) / 2


def _kernel_width(old: int, new: int) -> int:
    return math.ceil(KERNEL_WIDTH * old / (min(old, new) * ROLLOFF))


class SincResampler:
    """torchaudio's `Resample` to rounding, (…, N) → (…, N · new / old); quicker, from 48 kHz to 24 or 16 kHz above all.

    Where `new` is small, its convolution has few output channels, at which libraries are slow. Copies of its kernels,
    each a period later, give MIN_FILTERS outputs at once.
    """

    def __init__(self, stock: Resample, old: int, new: int) -> None:
        self.old, self.new, self.width = old, new, stock.width
        copies = -(-MIN_FILTERS // new)
        taps = stock.kernel.shape[2]
        kernels = stock.kernel.new_zeros(copies, new, taps + old * (copies - 1))
        for copy in range(copies):
            kernels[copy, :, old * copy :][:, :taps] = stock.kernel[:, 0]
        self.kernels, self.stride = kernels.flatten(0, 1)[:, None], old * copies

    def __call__(self, wav: Tensor) -> Tensor:
        padded = nn.functional.pad(wav.reshape(-1, 1, wav.shape[-1]), (self.width, self.width + self.stride))
        outputs_BKT = nn.functional.conv1d(padded, self.kernels.to(wav.device), stride=self.stride)
        resampled = outputs_BKT.transpose(1, 2).reshape(*wav.shape[:-1], -1)
        return resampled[..., : -(-self.new * wav.shape[-1] // self.old)]


@lru_cache(maxsize=16)
def sinc_resampler(old: int, new: int) -> SincResampler:
    """old:new in lowest terms. Raises AudioError where they share so little that the kernels would fill gigabytes."""
    if new * (old + 2 * _kernel_width(old, new)) > MAX_KERNEL_ELEMENTS:
        raise AudioError(f"its rate has no simple ratio to ours ({old}:{new}): convert it to 48 kHz first")
    stock = Resample(
        old,
        new,
        resampling_method="sinc_interp_kaiser",
        lowpass_filter_width=KERNEL_WIDTH,
        rolloff=ROLLOFF,
        beta=BETA,
        dtype=torch.float64,  # computed in float32, the kernels of 11.025 kHz and its multiples lose 30 dB
    ).float()
    return SincResampler(stock, old, new)
