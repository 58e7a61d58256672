"""The frozen SNAC 24 kHz: loaded verified, and run in windows that give the tokens of the whole recording.

A latent frame hears up to 5121 samples to each side, two and a half coarse tokens, so a window that overlaps its
neighbours by three on each side yields the same tokens as `SNAC.encode` of the whole. Windows are batched by equal
length only: padding one would change its last tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from snac import SNAC

from codec.audio import Recording
from codec.resample import Resampler
from codec.weights import SNAC_FILES, Weights, resolve
from shards.contract import COARSE_24K, CODEBOOK_SIZE, CODEC_RATE, TOKENS_PER_COARSE
from shards.errors import UserError, first_line

OVERLAP_COARSE = 3
GEOMETRY = {
    "sampling_rate": CODEC_RATE,
    "encoder_rates": [2, 4, 8, 8],
    "vq_strides": [4, 2, 1],
    "codebook_size": CODEBOOK_SIZE,
    "attn_window_size": None,
}

Item = TypeVar("Item")


def load_snac(name: str) -> tuple[SNAC, Weights]:
    """A hub name or a local directory → stock SNAC in eval mode, frozen. Raises UserError for another geometry."""
    weights = resolve(name, SNAC_FILES)
    try:
        config = json.loads(weights.paths["config.json"].read_text())
        found = {key: config.get(key) for key in GEOMETRY}
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{weights.paths['config.json']} is not the config of a SNAC: {error}") from error
    if found != GEOMETRY:
        raise UserError(f"{name} is not a SNAC 24 kHz: expected {GEOMETRY}, found {found}")
    return load_verified(weights.folder()).requires_grad_(False).eval(), weights


def load_verified(folder: Path) -> SNAC:
    """Stock `SNAC.from_pretrained`, which unpickles nothing but tensors. Raises UserError for what it cannot load."""
    try:
        return SNAC.from_pretrained(str(folder))
    except Exception as error:  # a damaged file makes torch raise many kinds
        path = folder / "pytorch_model.bin"
        raise UserError(f"{path} does not hold the weights of a SNAC: {first_line(error)}") from error


def device_of(gpu: str | int) -> torch.device:
    """`cpu`, or the number of a GPU. Raises UserError where there is none: nothing falls back to the CPU unasked."""
    if gpu == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"gpu={gpu}: no GPU is usable here ({_why_none()}); gpu=cpu runs on the CPU")
    if int(gpu) >= torch.cuda.device_count():
        raise UserError(f"gpu={gpu}: this machine has {torch.cuda.device_count()} GPUs, numbered from 0")
    torch.backends.cudnn.allow_tf32 = False  # what is called float32 here is: tokens and the top octave need it
    return torch.device("cuda", int(gpu))


def _why_none() -> str:
    """PyTorch's first sentence, such as that the driver is too old, and what it is built for."""
    try:
        torch.cuda.init()
        reason = "none is visible"
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error).split(". ")[0]
    return f"{reason}; this PyTorch is built for CUDA {torch.version.cuda}"


def visible(gpu: str | int) -> str:
    """What CUDA_VISIBLE_DEVICES calls it. Numbers count within what a scheduler has set there."""
    granted = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return granted[int(gpu)] if granted != [""] else str(gpu)


@dataclass(frozen=True)
class Window:
    """Coarse tokens [start, stop) of a recording of `total`, read with OVERLAP_COARSE more on each side."""

    start: int
    stop: int
    total: int

    @property
    def read_start(self) -> int:
        return max(self.start - OVERLAP_COARSE, 0)

    @property
    def read_stop(self) -> int:
        return min(self.stop + OVERLAP_COARSE, self.total)

    @property
    def samples(self) -> tuple[int, int]:
        return self.read_start * COARSE_24K, self.read_stop * COARSE_24K


def coarse_length(samples_24k: int) -> int:
    return -(-samples_24k // COARSE_24K)


def windows(total: int, window_coarse: int, start: int = 0, stop: int | None = None) -> Iterator[Window]:
    """The windows that hold coarse tokens [start, stop). They lie on a grid fixed by the recording alone."""
    for first in range(start // window_coarse * window_coarse, total if stop is None else stop, window_coarse):
        yield Window(first, min(first + window_coarse, total), total)


def bucketed(
    items: Iterable[tuple[int, Item]], batch_length: int, pending_length: int
) -> Iterator[tuple[int, list[Item]]]:
    """(length, item) pairs → batches of equal length, at most `batch_length` in sum (or one item).

    At most `pending_length` waits at a time; the fullest bucket leaves early. A function of the input order alone.
    """
    buckets: dict[int, list[Item]] = {}
    for length, item in items:
        bucket = buckets.setdefault(length, [])
        bucket.append(item)
        if (len(bucket) + 1) * length > batch_length:
            yield length, buckets.pop(length)
        elif sum(size * len(waiting) for size, waiting in buckets.items()) > pending_length:
            fullest = max(buckets, key=lambda size: (size * len(buckets[size]), size))
            yield fullest, buckets.pop(fullest)
    for length in sorted(buckets):
        yield length, buckets[length]


@torch.inference_mode()
def encode(model: SNAC, window: list[Window], audio_BT: npt.NDArray[np.float32]) -> list[npt.NDArray[np.int16]]:
    """Equal-length windows with their samples at 24 kHz → the (T, 7) tokens of each window's own part."""
    device = next(model.parameters()).device
    levels = model.encode(torch.from_numpy(audio_BT)[:, None].to(device))
    rows = [level.cpu().numpy().reshape(len(window), -1, n) for level, n in zip(levels, TOKENS_PER_COARSE, strict=True)]
    tokens = np.concatenate(rows, axis=2).astype(np.int16)
    return [t[w.start - w.read_start :][: w.stop - w.start] for w, t in zip(window, tokens, strict=True)]


def encode_whole(model: SNAC, recording: Recording, window_coarse: int) -> Iterator[npt.NDArray[np.int16]]:
    """The tokens of a whole recording, window by window, (T, 7) each. Raises AudioError."""
    resampler = Resampler(recording, CODEC_RATE)
    for window in windows(coarse_length(recording.length(CODEC_RATE)), window_coarse):
        yield encode(model, [window], resampler.read(*window.samples)[None])[0]


def snac_levels(codes_T7: npt.NDArray[np.int16]) -> list[torch.Tensor]:
    """(T, 7) → the list of (1, T), (1, 2T), (1, 4T) int64 tensors that stock `SNAC.decode` takes."""
    codes = torch.from_numpy(codes_T7.astype(np.int64))
    return [codes[None, :, 0], codes[:, 1:3].reshape(1, -1), codes[:, 3:].reshape(1, -1)]
