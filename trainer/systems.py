"""What is compared: the stock decoder, the warm start, trained decoders, other people's outputs, the target itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import soundfile
import torch
from snac import SNAC
from torch import Tensor, nn

from codec.audio import Samples
from codec.resample import sinc_resampler
from codec.snac import load_snac
from codec.weights import PINS, read_pins
from shards.contract import COARSE_24K, COARSE_48K, CONTEXT_COARSE, TARGET_RATE
from shards.errors import UserError
from trainer.checkpoint import Codec48k
from trainer.clips import Clip, Entry
from trainer.decoder import CodesToLatent, CropDecoder, padded, warm_start

STOCK, WARM_START, SOURCE, TARGET = "stock", "warm_start", "source", "target"
OURS = {  # names that a model or another system cannot have
    STOCK: "stock 24 kHz + sinc",
    WARM_START: "warm start, untrained",
    SOURCE: "source recording",
    TARGET: "target",
}
RECORDING_IS_TARGET = "target: the recording"
WINDOW_COARSE = 234  # tokens decoded at once: 20 s
EXTERNAL_SUFFIXES = (".wav", ".flac")

System = Callable[[Clip], Samples]


def label(name: str, teacher: str) -> str:
    """What people read for a system's name."""
    return RECORDING_IS_TARGET if name == TARGET and teacher == "recording" else OURS.get(name, name)


@dataclass(frozen=True)
class Stock:
    """The SNAC 24 kHz behind the codes."""

    snac: SNAC
    name: str


def find_stock(pretrained_model: str | None, codecs: Mapping[str, Codec48k]) -> Stock:
    """What `pretrained_model` names, else what a run brings along, else the published SNAC that an export names."""
    if pretrained_model is None:
        for codec in codecs.values():
            if codec.snac.decoder is not codec.decoder:  # an export holds the new decoder only
                return Stock(codec.snac, codec.snac_name)
        published = [codec.snac_name for codec in codecs.values() if codec.snac_name in read_pins(PINS)]
        if not published:
            raise UserError("the 24 kHz decoder to compare with is not known: name the SNAC by pretrained_model=")
        pretrained_model = published[0]
    snac, weights = load_snac(pretrained_model)
    return Stock(snac, weights.describe())


def decoded_systems(stock: Stock, codecs: Mapping[str, Codec48k], device: torch.device, seed: int) -> dict[str, System]:
    """Stock + sinc, warm start and each of `codecs`. Raises UserError for one that speaks other tokens."""
    to_latent = CodesToLatent(stock.snac)  # compared as the CPU makes it: a GPU rounds otherwise
    decoders = {STOCK: stock.snac.decoder, WARM_START: warm_start(stock.snac, "zero", seed)}
    for name, codec in codecs.items():
        if not to_latent.same_tokens(CodesToLatent(codec.snac)):
            raise UserError(f"the model {name} speaks the tokens of {codec.snac_name}, not of {stock.name}")
        decoders[name] = codec.decoder
    models = {name: CropDecoder(to_latent, decoder).eval().to(device) for name, decoder in decoders.items()}
    return {name: partial(decode_clip, model, name, seed) for name, model in models.items()}


@torch.inference_mode()
def decode_clip(model: nn.Module, name: str, seed: int, clip: Clip) -> Samples:
    """The clip at 48 kHz, decoded with its context; the stock decoder's 24 kHz resampled by a windowed sinc."""
    torch.manual_seed(seed)  # of noise blocks
    device = next(model.parameters()).device
    wav_N = decode_whole(model, torch.from_numpy(clip.codes_T7.astype("int64")).to(device))
    if len(wav_N) == len(clip.codes_T7) * COARSE_24K:
        wav_N = sinc_resampler(1, 2)(wav_N.cpu())
    start = clip.before * COARSE_48K
    wav_N = wav_N[start : start + len(clip.target)]
    if not wav_N.isfinite().all():
        raise UserError(f"{name}: its output for {clip.key} is not finite: its weights are damaged")
    samples: Samples = wav_N.float().cpu().numpy()
    return samples


def decode_whole(model: nn.Module, tokens_T7: Tensor) -> Tensor:
    """In windows with context, equal to decoding all tokens at once."""
    tokens_1T7, size = padded(tokens_T7[None]), WINDOW_COARSE + 2 * CONTEXT_COARSE
    return torch.cat([model(tokens_1T7[:, start:][:, :size])[0] for start in range(0, len(tokens_T7), WINDOW_COARSE)])


def external_systems(folders: Mapping[str, Path], entries: Sequence[Entry]) -> dict[str, System]:
    """Each folder holds FOLDER/KEY.wav (or .flac), mono at 48 kHz and as long as its clip.

    Raises UserError for missing or other files, naming them, before anything is computed.
    """
    for name, folder in folders.items():
        problems = [problem for entry in entries if (problem := _problem(folder, entry))]
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise UserError(f"systems.{name}={folder}: {'; '.join(problems[:3])}{more}; clips need one file each")
    return {name: partial(_read_external, folder) for name, folder in folders.items()}


def rounded_to_16_bits(folders: Mapping[str, Path], keys: Iterable[str]) -> list[str]:
    """Which hold such files: rounding is noise above LSD's floor, where the outputs of models have none."""
    return [
        name
        for name, folder in folders.items()
        if any(soundfile.info(path).subtype == "PCM_16" for key in keys for path in _files(folder, key))
    ]


def _files(folder: Path, key: str) -> list[Path]:
    return [path for suffix in EXTERNAL_SUFFIXES if (path := folder / f"{key}{suffix}").is_file()]


def _problem(folder: Path, entry: Entry) -> str | None:
    found = _files(folder, entry.key)
    if len(found) != 1:
        return f"{entry.key}.wav is missing" if not found else f"{entry.key} stands there as .wav and as .flac"
    try:
        info: Any = soundfile.info(found[0])
    except soundfile.LibsndfileError as error:
        return f"{found[0].name} is not readable: {error}"
    if (info.frames, info.samplerate, info.channels) == (entry.n_samples, TARGET_RATE, 1):
        return None
    return (
        f"{found[0].name} has {info.frames} samples at {info.samplerate} Hz in {info.channels} channels, expected "
        f"{entry.n_samples} at {TARGET_RATE} Hz in 1"
    )


def _read_external(folder: Path, clip: Clip) -> Samples:
    (path,) = _files(folder, clip.key)
    wav: Samples = soundfile.read(path, dtype="float32")[0]
    if len(wav) != len(clip.target) or not abs(wav).max() < float("inf"):
        raise UserError(f"{path}: changed while it was judged, or is not finite")
    return wav
