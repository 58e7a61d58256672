"""After how many epochs has precomputing paid for itself? Against encoder, VQ and SIDON inside the training loop.

All models have their true size (random weights) and run as this project runs them on both sides, so the ratio holds
what precomputing spares and nothing else. A batch from shards is read, checked and decoded in this process; the other
way gets its samples at 24, 16 and 48 kHz for nothing, and keeps the encoder's and SIDON's weights in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from benchmarks.encoding import true_size
from benchmarks.harness import in_rounds, interleaved, of_crops, of_seconds, on_device, report
from benchmarks.loading import made, write
from benchmarks.sidon import HOST, RandomNative
from benchmarks.training_step import ours, random_batch
from codec.encoder import prepared
from codec.memory import keep_freed_memory
from codec.snac import Window, device_of, encode
from demo.voice import synthesize
from pipeline.judging import judge
from pipeline.sidon import FRAME, PADDING, UPSAMPLING, Sidon
from pipeline.targets import flac_bytes
from shards.contract import COARSE_48K, TARGET_RATE, coarse_tokens
from shards.index import load
from shards.reader import decode_sample, read_sample

EPOCHS = (1, 2, 15, 100)
PRECOMPUTE = "precomputing: both, judged, as FLAC"
FROM_SHARDS, ON_THE_FLY = "a step from shards", "a step with encoder and SIDON in it"


class InTheLoop:
    """What the other way computes for each batch, and precomputing once."""

    def __init__(self, device: torch.device, crops: int, length: int) -> None:
        precision = "bf16" if device.type == "cuda" else "fp32"
        self.encoder = prepared(true_size().to(device))
        self.sidon = Sidon(RandomNative(device, precision), device)
        samples = length * COARSE_48K
        self.target = synthesize(0, 0, samples / TARGET_RATE).astype(np.float32)[:samples]
        self.windows = [Window(0, length, length)] * crops
        self.heard_24k = np.tile(self.target[::2], (crops, 1))
        frames = -(-samples // (FRAME * UPSAMPLING))
        self.heard_16k = [np.resize(self.target[::UPSAMPLING], frames * FRAME + 2 * PADDING)] * crops
        self.threads = ThreadPoolExecutor()

    def codes(self) -> None:
        encode(self.encoder, self.windows, self.heard_24k)

    def targets(self) -> None:
        self.sidon.restore(self.heard_16k)

    def precompute(self) -> None:
        self.codes()
        self.targets()
        list(self.threads.map(self._finish, self.windows))

    def _finish(self, _: Window) -> None:
        judge(self.target, self.target, HOST)
        flac_bytes(self.target, 16)


def measured(device: torch.device, crops: int, length: int, rounds: int, folder: Path) -> dict[str, float]:
    """Seconds for a batch: of each part, and of both ways whole."""
    write(folder, made(length))
    index, loop = load(folder, "train"), InTheLoop(device, crops, length)
    step = ours(true_size(), random_batch(crops, length), device)

    def read() -> None:
        for number in range(crops):
            decode_sample(read_sample(index, number))

    return interleaved(
        {
            "encoder and VQ": loop.codes,
            "SIDON": loop.targets,
            "reading shards": read,
            "training step": step,
            PRECOMPUTE: loop.precompute,
            FROM_SHARDS: one_after_the_other(read, step),
            ON_THE_FLY: one_after_the_other(loop.codes, loop.targets, step),
        },
        rounds,
        warm_up=2,
    )


def one_after_the_other(*parts: Callable[[], None]) -> Callable[[], None]:
    def whole() -> None:
        for part in parts:
            part()

    return whole


@click.command(help=__doc__)
@on_device
@of_crops
@of_seconds
@in_rounds(3)
def main(gpu: str, crops: int, seconds: float, rounds: int) -> None:
    keep_freed_memory()
    device, length = device_of(gpu), coarse_tokens(seconds)
    with tempfile.TemporaryDirectory() as folder:
        took = measured(device, crops, length, rounds, Path(folder))
    each = length * COARSE_48K / TARGET_RATE
    once, shards, loop = took[PRECOMPUTE], took[FROM_SHARDS], took[ON_THE_FLY]
    rows: list[dict[str, Any]] = [
        {"what": name, "ms_per_audio_second": 1000 * n / (crops * each)} for name, n in took.items()
    ]
    rows += [
        {"what": f"{n} epochs, precomputing counted", "times_faster": n * loop / (once + n * shards)} for n in EPOCHS
    ]
    report("on_the_fly", rows, gpu, break_even_epochs=once / (loop - shards), crops=crops, seconds_each=each)


if __name__ == "__main__":
    main()
