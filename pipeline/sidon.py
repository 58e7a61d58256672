"""SIDON (arXiv 2509.17052) as a restorer of windows: 16 kHz samples in, 48 kHz samples out, in place.

Features (B, T, 160) at 50 Hz → hidden states (B, T, 1024) → 960 T − 26 samples. The two modules come as the published
TorchScript pair, or as raw weights on stock classes. Around them stands what keeps targets true: what 160 samples of
left padding delay the output by is taken off again, and the output is exactly three times the input.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torchaudio.functional as F
from torch import Tensor, nn

from codec.audio import Samples
from codec.encoder import quicken
from codec.weights import Weights, resolve
from pipeline.settings import SidonSettings
from pipeline.sidon_features import features
from shards.errors import UserError, last_line

INPUT_RATE = 16_000
UPSAMPLING = 3
FRAME = 320  # input samples of one feature frame (20 ms)
PADDING = 160  # input samples on each side, so that a window of n frames gives n features
TRAINED_PADDING = 40  # in its training (github.com/sarulab-speech/Sidon), where its output is in time
DELAY = (PADDING - TRAINED_PADDING) * UPSAMPLING  # output samples
HIGH_PASS_HZ = 50.0
NATIVE_FILES = ("adapter_config.json", "adapter_model.safetensors", "decoder_state_dict.pt")
BASE_FILES = ("config.json", "model.safetensors")
NEW_BAND_HZ = 12_000
BF16_LIMITS_DB = (-40.0, -20.0)  # what bfloat16 may lose where it is not asked for by name: of all, of the new band
SAMPLES_LOST = 26  # of 960 T, by the odd strides of DAC's decoder


class Model(Protocol):
    """The two modules, whatever form their weights have."""

    weights: tuple[Weights, ...]
    precision: str  # fp32 or bf16
    mixes_lengths: bool  # whether a batch may hold members of several lengths

    def encode(self, features_BTF: Tensor, frames: list[int]) -> Tensor:
        """(B, T, 160) with the real frames of each member → (B, T, C)."""

    def decode(self, hidden_BTC: Tensor, frames: list[int]) -> Tensor:
        """(B, T, C) → (B, samples): the first 960 n − 26 of a member of n frames are its own."""


class TorchScript:
    """The published pair, checked against its pins before it is loaded: loading runs code."""

    mixes_lengths = False
    precision = "fp32"

    def __init__(self, name: str, pins: Path, device: torch.device) -> None:
        files = (f"feature_extractor_{device.type}.pt", f"decoder_{device.type}.pt")
        weights = resolve(name, files, pins, must_be_pinned=True)
        self.weights: tuple[Weights, ...] = (weights,)
        self.encoder, self.decoder = (_loaded(weights, file, device) for file in files)

    def encode(self, features_BTF: Tensor, frames: list[int]) -> Tensor:
        assert len(set(frames)) == 1, "these modules know no mask"
        hidden: Tensor = self.encoder(features_BTF)["last_hidden_state"]
        return hidden

    def decode(self, hidden_BTC: Tensor, frames: list[int]) -> Tensor:
        wav: Tensor = self.decoder(hidden_BTC.transpose(1, 2))[:, 0]
        return wav


def _loaded(weights: Weights, file: str, device: torch.device) -> torch.jit.ScriptModule:
    """On this device, also where the graph names another GPU, as tracing leaves it. Raises UserError."""
    try:
        module = torch.jit.load(io.BytesIO(weights.read(file)), map_location=device).eval()
        constants = module.graph.findAllNodes("prim::Constant")
    except RuntimeError as error:
        reason = last_line(str(error))
        raise UserError(f"{weights.paths[file]}: PyTorch {torch.__version__} cannot load it: {reason}") from error
    for constant in constants:
        if constant.output().type().kind() == "DeviceObjType" and constant.s("value").startswith("cuda"):
            constant.s_("value", str(device))
    return module


class Native:
    """w2v-BERT 2.0 with SIDON's adapter, and its decoder, on stock classes: any lengths in a batch, bf16 if asked."""

    mixes_lengths = True

    def __init__(self, name: str, base: str, pins: Path, device: torch.device, precision: str) -> None:
        from pipeline.sidon_decoder import load_decoder
        from pipeline.sidon_encoder import load_encoder

        adapter = resolve(name, NATIVE_FILES, pins, must_be_pinned=True)
        below = resolve(base, BASE_FILES, pins, must_be_pinned=True)
        self.weights: tuple[Weights, ...] = (below, adapter)
        paths = {**below.paths, **adapter.paths}
        self.encoder: nn.Module = load_encoder(*(paths[file] for file in (*BASE_FILES, *NATIVE_FILES[:2]))).to(device)
        self.decoder: nn.Module = load_decoder(paths[NATIVE_FILES[2]]).to(device)
        if device.type == "cpu":
            quicken(self.decoder)
        self.precision: str = precision
        self._device_type = device.type

    def encode(self, features_BTF: Tensor, frames: list[int]) -> Tensor:
        position = torch.arange(features_BTF.shape[1], device=features_BTF.device)
        mask_BT = position < torch.tensor(frames, device=features_BTF.device)[:, None]
        with self._precision():
            hidden: Tensor = self.encoder(
                features_BTF, attention_mask=None if len(set(frames)) == 1 else mask_BT
            ).last_hidden_state
        return hidden

    def decode(self, hidden_BTC: Tensor, frames: list[int]) -> Tensor:
        hidden_BCT = hidden_BTC.transpose(1, 2)
        with self._precision():
            if self._device_type == "cpu":  # a batch leaves the cache between one layer and the next
                alone = [
                    self.decoder(member[None, :, :n], [n])[0] for member, n in zip(hidden_BCT, frames, strict=True)
                ]
                return nn.utils.rnn.pad_sequence(alone, batch_first=True)
            wav: Tensor = self.decoder(hidden_BCT, frames)
        return wav

    def _precision(self) -> torch.autocast | nullcontext[None]:
        return torch.autocast(self._device_type, torch.bfloat16) if self.precision == "bf16" else nullcontext()


class Sidon:
    """A model with its front end. `restore` maps windows of 16 kHz samples to 48 kHz, same instants."""

    def __init__(self, model: Model, device: torch.device, delay_samples: int = DELAY) -> None:
        self.model, self.device, self.delay_samples = model, device, delay_samples

    @property
    def precision(self) -> str:
        return self.model.precision

    def describe(self) -> str:
        return " + ".join(weights.describe() for weights in self.model.weights)

    def sha256(self) -> dict[str, str]:
        """File → hash."""
        return {file: digest for weights in self.model.weights for file, digest in weights.sha256.items()}

    @torch.inference_mode()
    def restore(self, windows: Sequence[Samples]) -> list[Samples]:
        """Each PADDING + n + PADDING high-passed samples, n a multiple of FRAME → 3 n samples of the n in the middle.

        The last feature frame is carried over once more: its 960 samples cover what the delay pushes out.
        """
        frames = [len(window) // FRAME for window in windows]  # with the one carried over
        hidden = self.model.encode(self._features(windows), frames)
        restored = self.model.decode(hidden, frames).float().cpu().numpy()
        if restored.shape[1] < max(frames) * FRAME * UPSAMPLING - SAMPLES_LOST:
            raise UserError(f"SIDON's decoder gave {restored.shape[1]} samples for {max(frames)} frames of 960")
        cut = [slice(self.delay_samples, self.delay_samples + (n - 1) * FRAME * UPSAMPLING) for n in frames]
        return [row[part] for row, part in zip(restored, cut, strict=True)]

    def _features(self, windows: Sequence[Samples]) -> Tensor:
        """(B, T + 1, 160), each member's last frame twice."""
        wav_BN = nn.utils.rnn.pad_sequence([torch.from_numpy(window) for window in windows], batch_first=True)
        features_BTF = features(wav_BN.to(self.device), [len(window) for window in windows])
        carried_BTF = nn.functional.pad(features_BTF, (0, 0, 0, 1))
        last_B = torch.tensor([len(window) // FRAME - 1 for window in windows], device=self.device)
        members_B = torch.arange(len(windows), device=self.device)
        carried_BTF[members_B, last_B] = carried_BTF[members_B, last_B - 1]
        return carried_BTF


def high_passed(padded: Samples) -> Samples:
    """What SIDON hears of a window: without what lies below 50 Hz."""
    filtered: Samples = F.highpass_biquad(torch.from_numpy(padded), INPUT_RATE, HIGH_PASS_HZ).numpy()
    return filtered


def load_sidon(settings: SidonSettings, device: torch.device) -> Sidon:
    """The backend, weights and precision that `settings` ask for. Raises UserError for files that are not trusted."""
    if settings.sidon_backend == "torchscript":
        return Sidon(TorchScript(settings.sidon, settings.weights, device), device, settings.delay_samples)
    asked = settings.sidon_precision
    native = Native(
        settings.sidon_raw, settings.sidon_base, settings.weights, device, "fp32" if asked == "auto" else asked
    )
    sidon = Sidon(native, device, settings.delay_samples)
    if asked == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        native.precision = "bf16" if stays_near_fp32(native, sidon) else "fp32"
    return sidon


def stays_near_fp32(native: Native, sidon: Sidon) -> bool:
    errors = bf16_errors_db(native, sidon)
    return all(error <= limit for error, limit in zip(errors, BF16_LIMITS_DB, strict=True))


def bf16_errors_db(native: Native, sidon: Sidon) -> tuple[float, float]:
    """How far bfloat16 is from float32 on seconds of noise that rises and falls and declines like speech: dB of the
    output, and of what the output has from NEW_BAND_HZ on.
    """
    time = np.arange(2 * INPUT_RATE + 2 * PADDING) / INPUT_RATE
    noise = torch.from_numpy(0.1 * np.random.default_rng(0).standard_normal(len(time)))
    pole, zero = torch.tensor([1, -0.9], dtype=torch.float64), torch.tensor([1, 0], dtype=torch.float64)
    made = (F.lfilter(noise, pole, zero, clamp=False).numpy() * np.sin(np.pi * 4 * time) ** 2).astype(np.float32)
    spectra = {}
    for native.precision in ("fp32", "bf16"):
        spectra[native.precision] = np.fft.rfft(sidon.restore([made])[0].astype(np.float64))
    apart, power = (np.square(np.abs(x)) for x in (spectra["bf16"] - spectra["fp32"], spectra["fp32"]))
    new_band = len(power) * 2 * NEW_BAND_HZ // (INPUT_RATE * UPSAMPLING)
    of_all, of_new = (
        float(10 * np.log10(apart[first:].sum() / max(power[first:].sum(), 1e-20) + 1e-20)) for first in (0, new_band)
    )
    return of_all, of_new
