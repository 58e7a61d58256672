"""What look-ahead costs and buys.

Exactness: SNR of the stream against the whole decode, with the stand-in SNAC on real speech (its tokens, its warm-start
decoder), and with random weights of the true size on random tokens. Speed: at the true size, frame by frame, on this
CPU, in wall-clock and in CPU seconds; first audio = the frames waited for (85.3 ms each where tokens come in real time)
+ computing until it left.
"""

from __future__ import annotations

import os
import statistics
import time
from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch

from benchmarks.decoding import true_size_48k
from benchmarks.harness import of_speech, readable, recordings_in, report
from codec.audio import Samples
from codec.resample import Resampler
from codec.snac import Window, coarse_length, encode, load_snac
from shards.contract import COARSE_24K, COARSE_48K, CODEC_RATE, TARGET_RATE
from trainer.decoder import warm_start
from trainer.inference import StepDecoder
from trainer.streaming import EXACT, StreamingDecoder

SNAC = "demo/snac_tiny_24khz"
RECORDINGS, SECONDS_EACH = 12, 1.4
FRAMES = 16  # of random tokens at the true size
FRAME_SECONDS = COARSE_48K / TARGET_RATE

Tokens = npt.NDArray[np.int16]


def speech_tokens(folder: Path) -> list[Tokens]:
    """Of RECORDINGS files spread over the folder, their first seconds."""
    snac = load_snac(SNAC)[0]
    files = recordings_in(folder)
    found = []
    for recording in islice(readable(files[:: max(len(files) // RECORDINGS, 1)]), RECORDINGS):
        total = min(coarse_length(recording.length(CODEC_RATE)), round(SECONDS_EACH / FRAME_SECONDS))
        audio = Resampler(recording, CODEC_RATE).read(0, total * COARSE_24K)
        found += encode(snac, [Window(0, total, total)], audio[None])
    return found


def snr_db(model: StepDecoder, tokens: list[Tokens], lookahead: int) -> float:
    """Energy of all whole decodes over that of all differences."""
    signal = error = 0.0
    for codes_T7 in tokens:
        exact, found = (decode(model, codes_T7, frames)[0] for frames in (EXACT, lookahead))
        signal += float((exact.astype(np.float64) ** 2).sum())
        error += float(((exact - found).astype(np.float64) ** 2).sum())
    return float("inf") if error == 0 else 10 * float(np.log10(signal / error))


def decode(model: StepDecoder, codes_T7: Tokens, lookahead: int) -> tuple[Samples, list[tuple[float, float]], int]:
    """Samples, seconds and CPU seconds for each frame, and the frames until the first samples."""
    stream = StreamingDecoder(model, lookahead_frames=lookahead)
    parts, seconds, waited = [], [], 0
    for frame_17 in codes_T7[:, None]:
        began, began_cpu = time.perf_counter(), time.process_time()
        parts.append(stream.push(frame_17))
        seconds.append((time.perf_counter() - began, time.process_time() - began_cpu))
        waited += not stream.sent
    return np.concatenate([*parts, stream.finish()], axis=1), seconds, waited + 1


def row(model: StepDecoder, tokens: list[Tokens], speech: tuple[StepDecoder, list[Tokens]], n: int) -> dict[str, Any]:
    _, _, waited = decode(model, tokens[0], n)
    _, seconds, _ = decode(model, tokens[0], n)
    each, cpu = (statistics.median(column) for column in zip(*seconds, strict=True))
    return {
        "lookahead_frames": n,
        "snr_db_speech_stand_in": _or_exact(snr_db(*speech, n)),
        "snr_db_random_true_size": _or_exact(snr_db(model, tokens, n)),
        "frames_waited": waited,
        "compute_ms_per_frame": 1000 * each,
        "cpu_ms_per_frame": 1000 * cpu,
        "real_time_factor": each / FRAME_SECONDS,
        "first_audio_seconds": waited * FRAME_SECONDS + each,
    }


def _or_exact(value: float) -> float | str:
    return "exact" if value == float("inf") else value


@torch.inference_mode()
@click.command(help=__doc__)
@of_speech
def main(speech: Path) -> None:
    snac = load_snac(SNAC)[0]
    spoken = StepDecoder(snac, warm_start(snac, "zero", 0)), speech_tokens(speech)
    codec = true_size_48k()
    model = StepDecoder(codec.snac, codec.decoder)
    tokens = [np.random.default_rng(0).integers(0, 4096, (FRAMES, 7)).astype(np.int16)]
    rows = [row(model, tokens, spoken, n) for n in range(EXACT + 1)]
    load = os.getloadavg()[0]  # of other work too, against which the timings are to be read
    report(
        "streaming",
        rows,
        load_average=load,
        recordings=len(spoken[1]),
        speech_codec="stand-in snac_tiny_24khz, warm start",
    )


if __name__ == "__main__":
    main()
