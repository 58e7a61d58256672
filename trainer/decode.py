"""`just decode`: a recording or a codes file → a 48 kHz WAV of exactly its length, in bounded memory."""

from __future__ import annotations

import time
import wave
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from codec.audio import DECODED, AudioError, Recording, Samples, probe
from codec.snac import device_of, encode_whole
from configs.progress import progress_bar
from shards.contract import COARSE_48K, TARGET_RATE, coarse_tokens, load_codes
from shards.errors import ShardError, UserError
from shards.files import replacing
from trainer import kernels
from trainer.checkpoint import load_codec
from trainer.inference import StepDecoder, draws_noise
from trainer.settings import DecodeSettings
from trainer.streaming import EXACT, StreamingDecoder, to_int16

__all__ = ["StreamingDecoder", "decode", "decode_stream", "write_wav"]

Tokens = npt.NDArray[np.int16]
MAX_WAV_SAMPLES = (2**32 - 1 - 36) // 2  # of 16 bit: the header counts bytes in 32 bit
STEP_COARSE = 4  # on a CPU: weights are read once for so many tokens, and signals still fit in the cache


def decode(settings: DecodeSettings) -> None:
    """Raises UserError for an input that is neither, with what was found."""
    if not settings.input.is_file():
        what = "a folder: name a file" if settings.input.is_dir() else "no such file"
        raise UserError(f"input={settings.input}: {what}")
    if settings.lookahead_frames < EXACT and not settings.stream:
        raise UserError(f"lookahead_frames={settings.lookahead_frames} is for stream=true; otherwise decoding is exact")
    out = settings.out or settings.input.with_suffix(DECODED)
    if out.exists():
        raise UserError(f"out={out} exists: choose another file or delete it")
    if out.suffix.lower() != ".wav":
        raise UserError(f"out={out}: what is written is a WAV; name it {out.with_suffix('.wav').name}")
    codec = load_codec(settings.model, settings.pretrained_model)
    device = device_of(settings.gpu)
    codec.snac.to(device)
    codec.decoder.to(device)
    window_coarse = coarse_tokens(settings.window_seconds)
    try:
        if settings.input.suffix == ".npy":
            codes_T7 = load_codes(settings.input.read_bytes())
            length, pieces = len(codes_T7) * COARSE_48K, in_pieces(codes_T7, window_coarse)
        else:
            recording = Recording(settings.input, probe(settings.input))
            length, pieces = recording.length(TARGET_RATE), encode_whole(codec.snac, recording, window_coarse)
        with torch.inference_mode():
            model = StepDecoder(codec.snac, codec.decoder)
        if settings.stream:
            blocks = Clocked(model, settings.lookahead_frames)
            write_wav(out, blocks.run(pieces), length)
            tqdm.write(blocks.summary())
        else:
            step_coarse = STEP_COARSE if device.type == "cpu" else window_coarse
            write_wav(out, decode_stream(model, pieces, step_coarse), length)
    except (AudioError, ShardError) as error:
        raise UserError(f"input={settings.input}: {error}") from error
    if draws_noise(codec.decoder):
        tqdm.write("the decoder's noise blocks were left out: they would make each decode differ")
    tqdm.write(
        f"{out}: {length} samples at {TARGET_RATE} Hz ({length / TARGET_RATE:.2f} s); {codec.described}; "
        f"decoded step by step, weight norm folded, {kernels.description(device)}"
    )


def in_pieces(codes_T7: Tokens, window_coarse: int) -> Iterator[Tokens]:
    for start in range(0, len(codes_T7), window_coarse):
        yield codes_T7[start : start + window_coarse]


def decode_stream(model: StepDecoder, pieces: Iterator[Tokens], step_coarse: int) -> Iterator[Samples]:
    """Tokens in pieces of any length → 48 kHz audio in pieces; together equal to decoding the whole."""
    stream = StreamingDecoder(model, step_coarse=step_coarse)
    for piece in pieces:
        yield stream.push(piece)[0]
    yield stream.finish()[0]


class Clocked:
    """Tokens one frame at a time, as a speech model gives them, and how long the decoder takes for each."""

    def __init__(self, model: StepDecoder, lookahead_frames: int) -> None:
        self.stream = StreamingDecoder(model, lookahead_frames=lookahead_frames)
        self.frames, self.seconds = 0, 0.0
        self.first: tuple[int, float] | None = None  # frames and seconds of computing until the first samples

    def run(self, pieces: Iterator[Tokens]) -> Iterator[Samples]:
        for piece in pieces:
            for frame_17 in piece[:, None]:
                self.frames += 1
                yield self._timed(partial(self.stream.push, frame_17))
        yield self._timed(self.stream.finish)

    def _timed(self, decode_more: Callable[[], Samples]) -> Samples:
        began = time.perf_counter()
        (block,) = decode_more()
        self.seconds += time.perf_counter() - began
        if len(block) and self.first is None:
            self.first = self.frames, self.seconds
        return block

    def summary(self) -> str:
        assert self.first is not None, "a stream of at least one frame has samples"
        frames, computing = self.first
        waiting = frames * COARSE_48K / TARGET_RATE
        duration = self.frames * COARSE_48K / TARGET_RATE
        exact = "exact" if self.stream.lookahead == EXACT else "not exact"
        return (
            f"lookahead_frames={self.stream.lookahead} ({exact}): first audio after {frames} frames and "
            f"{computing:.3f} s of computing ({waiting + computing:.3f} s where tokens come in real time); "
            f"real-time factor {self.seconds / duration:.3f}"
        )


def write_wav(path: Path, blocks: Iterator[Samples], length: int) -> None:
    """The first `length` samples of `blocks` as 16 bit PCM; beyond full scale they are clipped, never wrapped."""
    if length > MAX_WAV_SAMPLES:
        hours = f"{length / TARGET_RATE / 3600:.1f} hours, a WAV holds {MAX_WAV_SAMPLES / TARGET_RATE / 3600:.1f}"
        raise UserError(f"{path}: {hours}: decode it in parts")
    left = length
    with replacing(path) as temporary:
        with (
            wave.open(str(temporary), "wb") as wav,
            progress_bar(total=length / TARGET_RATE, desc="decoding", unit=" s") as bar,
        ):
            wav.setparams((1, 2, TARGET_RATE, length, "NONE", "not compressed"))
            for block in blocks:
                kept = block[:left]
                wav.writeframes(to_int16(kept).tobytes())
                left -= len(kept)
                bar.update(len(kept) / TARGET_RATE)
        if left:
            raise UserError(f"{path}: {left} of {length} samples were not decoded")
