"""What one clip of the page holds: each version's audio, its gain and its picture."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import soundfile
import torch
from PIL import Image

from codec.audio import Samples
from shards.contract import TARGET_RATE
from shards.errors import UserError
from trainer.evaluate import flac
from trainer.signals import rms_db
from trainer.systems import SOURCE

N_FFT = 2048
WIDTH, HEIGHT = 640, 256  # largest width; 1024 bins become 256 rows of 93.75 Hz
FLOOR_DB, CEILING_DB = -110.0, -20.0  # of the pictures, re a full-scale sine
PICTURE_QUALITY = 82  # of WebP


@dataclass(frozen=True)
class Version:
    """One system's output for a clip."""

    system: str
    flac_base64: str
    gain_db: float  # brings all versions of the clip to one level, none of them beyond full scale
    picture: str  # data: URL of the spectrogram


@dataclass(frozen=True)
class Listening:
    """A clip, or its first seconds."""

    key: str
    seconds: float
    whole_seconds: float
    versions: list[Version]


def listening(audio: Path, key: str, systems: Iterable[str], seconds: float) -> Listening:
    """Raises UserError for audio that is missing, elsewhere or no longer one length at 48 kHz."""
    wavs: dict[str, Samples] = {}
    for system in systems:
        path = audio / system / f"{key}.flac"
        if system == SOURCE and not path.exists():  # the recording is gone
            continue
        if not path.resolve().is_relative_to(audio.resolve()):
            raise UserError(f"{path} lies outside of {audio}: its name is none of `just eval`")
        wavs[system] = _read(path)
    lengths = {len(wav) for wav in wavs.values()}
    if len(lengths) != 1:
        raise UserError(f"{audio}: the versions of {key} have {sorted(lengths)} samples: run `just eval` again")
    whole = lengths.pop() / TARGET_RATE
    wavs = {system: wav[: round(seconds * TARGET_RATE)] for system, wav in wavs.items()}
    gains = matching_gains(wavs)
    versions = [
        Version(system, _base64(flac(wav)), gains[system], f"data:image/webp;base64,{_base64(spectrogram(wav))}")
        for system, wav in wavs.items()
    ]
    return Listening(key, min(seconds, whole), whole, versions)


def matching_gains(wavs: Mapping[str, Samples]) -> dict[str, float]:
    """dB for each version, so that all have one RMS: the loudest one's, or less where one would exceed full scale.

    Never the quietest's: beside a version that is all but silent nothing would be heard. 0 for silence.
    """
    levels = {name: rms_db(wav) for name, wav in wavs.items()}
    sounding = {name: level for name, level in levels.items() if level > -119}
    headroom = [sounding[name] - 20 * math.log10(float(np.abs(wavs[name]).max())) for name in sounding]
    common = min([*headroom, max(sounding.values(), default=0.0)])
    return {name: common - sounding[name] if name in sounding else 0.0 for name in wavs}


def spectrogram(wav: Samples) -> bytes:
    """WebP, 0–24 kHz from bottom to top, −110 … −20 dB re a full-scale sine in matplotlib's magma."""
    window = torch.hann_window(N_FFT)
    hop = max(len(wav) // WIDTH, 64)
    spectrum = torch.stft(torch.from_numpy(wav), N_FFT, hop, window=window, pad_mode="constant", return_complex=True)
    power = (spectrum.abs() * 2 / window.sum()).square()[:-1].reshape(HEIGHT, -1, spectrum.shape[1]).mean(dim=1)
    level_db = 10 * power.clamp(min=1e-20).log10()
    shade = ((level_db - FLOOR_DB) / (CEILING_DB - FLOOR_DB)).clamp(0, 1).numpy()[::-1]
    pixels = (matplotlib.colormaps["magma"](shade)[..., :3] * 255).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", quality=PICTURE_QUALITY, method=6)
    return file.getvalue()


def _read(path: Path) -> Samples:
    try:
        wav, rate = soundfile.read(path, dtype="float32")
    except soundfile.LibsndfileError as error:
        raise UserError(f"{path} is not readable ({error}): run `just eval` again") from error
    if rate != TARGET_RATE or wav.ndim != 1:
        raise UserError(f"{path} has {rate} Hz and {wav.ndim} dimensions, expected mono at {TARGET_RATE} Hz")
    samples: Samples = wav
    return samples


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
