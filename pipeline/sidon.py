"""SIDON (arXiv 2509.17052, sarulab-speech/sidon-v0.1) as a restorer: 16 kHz samples in, 48 kHz samples out, in place.

The published model is a TorchScript pair: features (B, T, 160) at 50 Hz → hidden states (B, T, 1024) → 960 T − 26
samples. Around it stands what keeps targets true: the recording is scaled to 0.9 of its peak and scaled back, the
160 samples of left padding (480 at 48 kHz) are taken off again, and the output is exactly three times the input.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torchaudio.functional as F
from transformers import SeamlessM4TFeatureExtractor

from codec.audio import Recording, Resampler
from codec.weights import Weights, resolve

Samples = npt.NDArray[np.float32]

INPUT_RATE = 16_000
UPSAMPLING = 3
FRAME = 320  # input samples of one feature frame (20 ms)
PADDING = 160  # input samples on each side, so that a window of n frames gives n features
PEAK = 0.9
HIGH_PASS_HZ = 50.0
CROSSFADE = 960  # output samples over which neighbouring windows are blended at a seam (20 ms)


class Sidon:
    """The TorchScript pair with its front end. `restore` maps a stretch of 16 kHz samples to 48 kHz, same instant."""

    def __init__(self, name: str, pins: Path, device: torch.device) -> None:
        files = (f"feature_extractor_{device.type}.pt", f"decoder_{device.type}.pt")
        self.weights: Weights = resolve(name, files, pins, must_be_pinned=True)
        self.device = device
        self.features = SeamlessM4TFeatureExtractor(feature_size=80, num_mel_bins=80, stride=2)
        self.encoder, self.decoder = (
            torch.jit.load(self.weights.paths[file], map_location=device).eval() for file in files
        )

    @torch.inference_mode()
    def restore(self, padded: Samples) -> Samples:
        """PADDING + n + PADDING samples, n a multiple of FRAME → 3 n samples of the n in the middle.

        The last feature frame is carried over once more: its 960 samples cover what the delay pushes out.
        """
        waveform = torch.from_numpy(padded)[None]
        waveform = F.highpass_biquad(waveform, INPUT_RATE, HIGH_PASS_HZ)[0]
        features = self.features(waveform.numpy(), sampling_rate=INPUT_RATE, return_tensors="pt")["input_features"]
        features = torch.cat([features, features[:, -1:]], dim=1).to(self.device)
        hidden = self.encoder(features)["last_hidden_state"]
        restored = self.decoder(hidden.transpose(1, 2))[0, 0].float().cpu().numpy()
        delay, wanted = PADDING * UPSAMPLING, (len(padded) - 2 * PADDING) * UPSAMPLING
        assert len(restored) >= delay + wanted, f"SIDON gave {len(restored)} samples, {delay + wanted} are needed"
        aligned: Samples = restored[delay : delay + wanted]
        return aligned


class Restorer:
    """A recording restored to 48 kHz: `read(a, b)` returns samples [a, b); stretches must be asked for in order.

    Long recordings go through windows on a grid fixed by the recording alone, so a stretch is the same whoever asks.
    """

    def __init__(self, recording: Recording, sidon: Sidon, window_seconds: float, overlap_seconds: float) -> None:
        self.sidon = sidon
        self.source = Resampler(recording, INPUT_RATE)
        self.total = recording.length(INPUT_RATE)
        self.overlap = round(overlap_seconds * INPUT_RATE / FRAME) * FRAME
        self.hop = round(window_seconds * INPUT_RATE / FRAME) * FRAME - 2 * self.overlap
        peak = recording.peak()
        self.gain = PEAK / peak if peak > 0 else 1.0
        self._held = np.zeros(0, np.float32)
        self._held_from = 0
        self._pieces: Iterator[Samples] | None = None

    def read(self, a: int, b: int) -> Samples:
        if self._pieces is None:
            last = max(-(-(self.total - self.overlap) // self.hop), 1) - 1  # a short rest belongs to this window
            first = min(max((a - CROSSFADE) // (self.hop * UPSAMPLING), 0), last)
            self._pieces, self._held_from = (
                self._restored(first),
                max(first * self.hop * UPSAMPLING - CROSSFADE // 2, 0),
            )
        while self._held_from + len(self._held) < b:
            drop = min(max(a - self._held_from, 0), len(self._held))
            self._held = np.concatenate([self._held[drop:], next(self._pieces)])
            self._held_from += drop
        return self._held[a - self._held_from : b - self._held_from]

    def _restored(self, first: int) -> Iterator[Samples]:
        """Consecutive stretches from window `first` on, each seam blended over CROSSFADE samples."""
        rise = np.linspace(0, 1, CROSSFADE, dtype=np.float32)
        start, tail = first * self.hop, None
        while start < self.total:
            stop = start + self.hop
            if self.total - stop <= self.overlap:
                stop = self.total
            left, right = min(self.overlap, start), min(self.overlap, self.total - stop)
            restored = self._window(start - left, stop + right)
            begin = left * UPSAMPLING - (CROSSFADE // 2 if left else 0)
            end = (left + stop - start) * UPSAMPLING - (CROSSFADE // 2 if right else 0)
            if tail is not None:
                restored[begin : begin + CROSSFADE] *= rise
                restored[begin : begin + CROSSFADE] += tail * (1 - rise)
            tail = restored[end : end + CROSSFADE]
            yield restored[begin:end]
            start = stop

    def _window(self, start: int, stop: int) -> Samples:
        """Input samples [start, stop) of the recording, restored; whole feature frames, at the recording's level."""
        frames = -(-(stop - start) // FRAME) * FRAME
        padded = self.source.read(start - PADDING, start + frames + PADDING)
        return self.sidon.restore(padded * np.float32(self.gain)) / np.float32(self.gain)
