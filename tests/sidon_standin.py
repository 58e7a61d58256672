"""A stand-in for SIDON's TorchScript pair with the published interface, whose delay and level are known exactly.

Features carry neither phase nor level, so it speaks a language in which both follow from timing alone: every slot of
20 ms holds one 10 ms burst of 1 kHz or none. The first module hears from the normalised log-mel of each feature frame
whether its slot holds a burst; the second puts a burst of peak 0.9 where it lies when 40 samples at 16 kHz stand before
the recording, as they do in SIDON's training. Restored to its own level and instant, a recording comes back as it was.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank

SLOT_SECONDS = 0.02
BURST_SECONDS = 0.01
BURST_HZ = 1000
# In padded time a burst lies 120 … 280 samples after its feature frame begins (at 16 kHz): wholly inside the frame's
# first analysis window of 400 samples, outside those of the frames before and after.
BURST_IN_FRAME = 120 / 16_000
PADDING_SECONDS = 160 / 16_000
TRAINED_PADDING_SECONDS = 40 / 16_000


def burst(seconds: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """A Hann-windowed tone that begins at 0."""
    inside = (seconds >= 0) & (seconds < BURST_SECONDS)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * seconds / BURST_SECONDS)
    return inside * window * np.sin(2 * np.pi * BURST_HZ * seconds)


def recording(pattern: npt.NDArray[np.bool_], rate: int, amplitude: float) -> npt.NDArray[np.float32]:
    """The bursts of `pattern`, one slot each, exact at any rate."""
    time = np.arange(round(len(pattern) * SLOT_SECONDS * rate)) / rate
    audio = np.zeros(len(time))
    for slot in np.flatnonzero(pattern):
        begin = slot * SLOT_SECONDS + BURST_IN_FRAME - PADDING_SECONDS
        near = slice(max(int(begin * rate) - 1, 0), int((begin + BURST_SECONDS) * rate) + 2)
        audio[near] += burst(time[near] - begin)
    return (amplitude * audio).astype(np.float32)


def random_pattern(seconds: float, seed: int) -> npt.NDArray[np.bool_]:
    """Half of the slots, none at the very ends."""
    pattern = np.random.default_rng(seed).random(round(seconds / SLOT_SECONDS)) < 0.5
    pattern[:2] = pattern[-3:] = False
    return pattern


class HearsBursts(nn.Module):
    def __init__(self, mel_bin: int) -> None:
        super().__init__()
        self.mel_bin = mel_bin

    def forward(self, input_features: Tensor) -> dict[str, Tensor]:
        hidden = torch.zeros(input_features.shape[0], input_features.shape[1], 1024)
        hidden[:, :, 0] = (input_features[:, :, self.mel_bin] > 0).float()
        return {"last_hidden_state": hidden}


class SpeaksBursts(nn.Module):
    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        wave = burst(np.arange(960) / 48_000 - BURST_IN_FRAME + TRAINED_PADDING_SECONDS)
        wave *= 0.9 / np.abs(burst(np.arange(4800) / 480_000)).max()
        self.register_buffer("kernel", torch.tensor(wave, dtype=torch.float32)[None, None])

    def forward(self, hidden: Tensor) -> Tensor:
        wav = torch.nn.functional.conv_transpose1d(hidden[:, :1], self.kernel, stride=960)
        return wav[:, :, : wav.shape[2] - 26]


def build(folder: Path) -> Path:
    """Writes the pair and a list of weights that pins it; returns the list."""
    folder.mkdir(parents=True)
    filters = mel_filter_bank(257, 80, 20, 8000, 16_000, norm=None, mel_scale="kaldi", triangularize_in_mel_space=True)
    modules = {
        "feature_extractor_cpu.pt": HearsBursts(int(filters[round(BURST_HZ / 31.25)].argmax())),
        "decoder_cpu.pt": SpeaksBursts(),
    }
    for file, module in modules.items():
        torch.jit.script(module).save(str(folder / file))
    hashes = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in modules}
    pins = folder / "weights.json"
    pins.write_text(json.dumps({str(folder): {"revision": None, "files": hashes}}))
    return pins
