"""`just decode`: a recording or a codes file → a 48 kHz WAV of exactly its length, in bounded memory."""

from __future__ import annotations

import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from codec.audio import AudioError, Recording, Resampler, probe
from codec.snac import coarse_length, device_of, encode, windows
from shards.contract import COARSE_48K, CODEC_RATE, CONTEXT_COARSE, TARGET_RATE, coarse_tokens, load_codes
from shards.errors import ShardError, UserError
from shards.files import replacing
from trainer.checkpoint import Codec48k, load_codec
from trainer.decoder import CodesToLatent, CropDecoder
from trainer.settings import DecodeSettings

Tokens = npt.NDArray[np.int16]
Samples = npt.NDArray[np.float32]


def decode(settings: DecodeSettings) -> None:
    """Raises UserError for an input that is neither, with what was found."""
    if not settings.input.is_file():
        raise UserError(f"input={settings.input}: no such file")
    output = settings.output or settings.input.with_suffix(".48k.wav")
    if output.exists():
        raise UserError(f"output={output} exists: choose another file or delete it")
    codec = load_codec(settings.model, settings.pretrained_model)
    device = device_of(settings.gpu)
    codec.snac.to(device)
    codec.decoder.to(device)
    window_coarse = coarse_tokens(settings.window_seconds)
    try:
        if settings.input.suffix == ".npy":
            codes_T7 = load_codes(settings.input.read_bytes())
            length, pieces = len(codes_T7) * COARSE_48K, iter([codes_T7])
        else:
            recording = Recording(settings.input, probe(settings.input))
            length, pieces = recording.length(TARGET_RATE), encode_stream(codec, recording, window_coarse)
        blocks = decode_stream(codec, pieces, window_coarse)
        write_wav(output, blocks, length)
    except (AudioError, ShardError) as error:
        raise UserError(f"input={settings.input}: {error}") from error
    tqdm.write(
        f"{output}: {length} samples at {TARGET_RATE} Hz ({length / TARGET_RATE:.2f} s); codes by {codec.snac_name}"
    )


def encode_stream(codec: Codec48k, recording: Recording, window_coarse: int) -> Iterator[Tokens]:
    """The tokens of a whole recording, window by window, (T, 7) each."""
    resampler = Resampler(recording, CODEC_RATE)
    for window in windows(coarse_length(recording.length(CODEC_RATE)), window_coarse):
        yield encode(codec.snac, [window], resampler.read(*window.samples)[None])[0]


@torch.inference_mode()
def decode_stream(codec: Codec48k, pieces: Iterator[Tokens], window_coarse: int) -> Iterator[Samples]:
    """Tokens in pieces of any length → 48 kHz audio in pieces; together equal to decoding the whole.

    Each window is decoded with CONTEXT_COARSE tokens of its neighbours, which cover the decoder's receptive field.
    """
    device = next(codec.decoder.parameters()).device
    model = CropDecoder(CodesToLatent(codec.snac), codec.decoder).to(device)
    held = np.zeros((0, 7), np.int16)  # tokens from `before` context tokens on
    before, ended = 0, False
    while not ended:
        while not ended and len(held) < before + window_coarse + CONTEXT_COARSE:
            piece = next(pieces, None)
            ended = piece is None
            held = held if piece is None else np.concatenate([held, piece])
        own = len(held) - before if ended else window_coarse
        for start in range(before, before + own, window_coarse):
            stop = min(start + window_coarse, before + own)
            left, right = max(start - CONTEXT_COARSE, 0), min(stop + CONTEXT_COARSE, len(held))
            tokens_BT7 = torch.from_numpy(held[left:right].astype(np.int64))[None].to(device)
            wav = model(tokens_BT7)[0, (start - left) * COARSE_48K :][: (stop - start) * COARSE_48K]
            if not wav.isfinite().all():
                raise UserError("the decoder's output is not finite: its weights are damaged; take another checkpoint")
            yield wav.float().cpu().numpy()
        drop = max(before + own - CONTEXT_COARSE, 0)
        held, before = held[drop:], before + own - drop


def write_wav(path: Path, blocks: Iterator[Samples], length: int) -> None:
    """The first `length` samples of `blocks` as 16 bit PCM; beyond full scale they are clipped, never wrapped."""
    left = length
    with replacing(path) as temporary:
        with (
            wave.open(str(temporary), "wb") as wav,
            tqdm(total=length / TARGET_RATE, desc="decoding", unit=" s", disable=None) as bar,
        ):
            wav.setparams((1, 2, TARGET_RATE, length, "NONE", "not compressed"))
            for block in blocks:
                kept = block[:left]
                wav.writeframes(np.clip(np.round(kept * 32768), -32768, 32767).astype("<i2").tobytes())
                left -= len(kept)
                bar.update(len(kept) / TARGET_RATE)
        if left:
            raise UserError(f"{path}: {left} of {length} samples were not decoded")
