"""Shards → batches, written and checked: how fast, and what stands between that and the disk?

A folder of shards of made voices (segments of 4 s, random tokens; crops of all of it and of 1 s), in one process.
Loading is compared with plain webdataset and DataLoader on the same tars, and with decoding their FLAC alone, by the
same decoder, which is its floor, and by libsndfile; writing with copying the bytes to disk, checking with reading them.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import soundfile
import torch
import webdataset
from torch.utils.data import DataLoader

from benchmarks.harness import interleaved, report
from codec.memory import keep_freed_memory
from demo.voice import synthesize
from pipeline.settings import VerifySettings
from pipeline.targets import flac_bytes
from pipeline.verify import verify
from shards.contract import (
    COARSE_48K,
    CODEBOOK_SIZE,
    CODES_SUFFIX,
    FORMAT_VERSION,
    META_SUFFIX,
    OK,
    TARGET_RATE,
    TARGET_SUFFIX,
    TOKENS,
    coarse_tokens,
    npy_bytes,
    sample_key,
)  # fmt: skip
from shards.flac import Flac
from shards.index import Index, compact, load
from shards.order import Order
from shards.reader import read_sample
from shards.stream import Stage, Stream
from shards.writer import ShardWriter
from trainer.data import training_batches

SHARDS, PER_SHARD, BATCH, ROUNDS = 4, 96, 32, 5
COARSE, SHORT = coarse_tokens(4.0), coarse_tokens(1.0)
VOICES = 8
Sample = tuple[dict[str, Any], dict[str, bytes]]


def made(coarse: int) -> list[Sample]:
    """Sidecar rows and members of all samples, so many coarse tokens each."""
    random = np.random.default_rng(0)
    targets = [
        flac_bytes(
            synthesize(voice, 0, coarse * COARSE_48K / TARGET_RATE + 1)[: coarse * COARSE_48K].astype(np.float32), 16
        )
        for voice in range(VOICES)
    ]
    samples = []
    for number in range(SHARDS * PER_SHARD):
        place = {"recording": f"{number}", "group": f"{number % 7}", "segment": 0, "start_seconds": 0.0}
        size = {"n_coarse": coarse, "context_before": 0, "context_after": 0, "n_samples": coarse * COARSE_48K}
        meta = {**place, **size, "format_version": FORMAT_VERSION, "sampling_rate": TARGET_RATE}
        codes = random.integers(0, CODEBOOK_SIZE, coarse * TOKENS).astype(np.int16)
        members = {
            CODES_SUFFIX: npy_bytes(codes),
            TARGET_SUFFIX: targets[number % VOICES],
            META_SUFFIX: json.dumps({**meta, "gain": 1.0, "teacher": "recording", "snac": "none"}).encode(),
        }
        key = sample_key(number // PER_SHARD, number % PER_SHARD)
        samples.append(({**place, **size, "key": key, "status": OK, "teacher": "recording"}, members))
    return samples


def write(folder: Path, samples: list[Sample]) -> None:
    for shard in range(SHARDS):
        with ShardWriter(folder / "train", shard, {"teacher": "recording"}) as writer:
            for row, members in samples[shard * PER_SHARD : (shard + 1) * PER_SHARD]:
                writer.add(row, members)
    compact(folder, [("train", shard) for shard in range(SHARDS)])


def copy(folder: Path, tars: list[bytes]) -> None:
    for number, data in enumerate(tars):
        with (folder / f"copy_{number}").open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def ours(index: Index, coarse: int) -> None:
    stream = Stream((Order(index.counts, 0, 16),), (1,), (Stage(0, coarse, BATCH),), 0)
    for batch in training_batches((index,), stream, range(stream.steps(1)), 0, 0, 1):
        assert batch.target_BN.shape == (BATCH, coarse * COARSE_48K)


def plain(folder: Path, coarse: int) -> None:
    """What one would write: nothing is checked, and the order is the tars'; crops are cut from what was decoded."""
    urls = [str(path) for path in sorted((folder / "train").glob("*.tar"))]
    dataset = webdataset.WebDataset(urls, shardshuffle=False).map(partial(_decoded, coarse=coarse)).batched(BATCH)
    for codes, target in DataLoader(dataset, batch_size=None):
        assert codes.shape[1:] == (COARSE * TOKENS,)
        assert target.shape[1:] == (coarse * COARSE_48K,)


def _decoded(sample: dict[str, Any], coarse: int) -> tuple[torch.Tensor, torch.Tensor]:
    target, _ = soundfile.read(io.BytesIO(sample[TARGET_SUFFIX]), dtype="float32")
    return torch.from_numpy(
        np.load(io.BytesIO(sample[CODES_SUFFIX]), allow_pickle=False).astype(np.int64)
    ), torch.from_numpy(target[: coarse * COARSE_48K])


def flac_alone(samples: list[Sample]) -> None:
    for _, members in samples:
        flac = Flac(members[TARGET_SUFFIX])
        flac.read(0, flac.frames)


def flac_by_libsndfile(samples: list[Sample]) -> None:
    for _, members in samples:
        soundfile.read(io.BytesIO(members[TARGET_SUFFIX]), dtype="float32")


@click.command(help=__doc__)
def main() -> None:
    torch.set_num_threads(1)
    samples = made(COARSE)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(folder, samples)
        tars = [path.read_bytes() for path in sorted((folder / "train").glob("*.tar"))]
        index, shards = load(folder, "train"), VerifySettings(shards=folder, threads=1)
        stock: dict[str, tuple[str, Callable[[], object]]] = {
            "batches: plain webdataset": ("loading", partial(plain, folder, COARSE)),
            "batches of short crops: plain webdataset": ("short crops", partial(plain, folder, SHORT)),
        }
        ways: dict[str, tuple[str, Callable[[], object]]] = {
            "batches: ours": ("loading", partial(ours, index, COARSE)),
            "batches of short crops: ours": ("short crops", partial(ours, index, SHORT)),
            "floor: their FLAC decoded": ("loading", partial(flac_alone, samples)),
            "their FLAC decoded by libsndfile": ("loading", partial(flac_by_libsndfile, samples)),
            "samples read and checked": ("reading", lambda: [read_sample(index, n) for n in range(len(index))]),
            "just verify": ("checking", partial(verify, shards)),
        }
        writing: dict[str, tuple[str, Callable[[], object]]] = {
            "shards written": ("writing", partial(write, folder, samples)),
            "floor: the same bytes to disk": ("writing", partial(copy, folder, tars)),
        }
        seconds = interleaved({name: way for name, (_, way) in stock.items()}, ROUNDS)
        keep_freed_memory()  # as training does; there is no way back, so what is stock comes first
        for group in (ways, writing):  # what is written reaches the disk while the next way is timed
            seconds |= interleaved({name: way for name, (_, way) in group.items()}, ROUNDS)
    audio, megabytes = len(samples) * COARSE * COARSE_48K / TARGET_RATE, sum(map(len, tars)) / 1e6
    floors = {"loading": seconds["floor: their FLAC decoded"], "writing": seconds["floor: the same bytes to disk"]}
    rows = [
        {
            "way": name,
            "audio_s_per_s": audio * (SHORT / COARSE if kind == "short crops" else 1) / seconds[name],
            "mb_per_s": megabytes / seconds[name],
            "share_of_floor": floors[kind] / seconds[name] if kind in floors else None,
        }
        for name, (kind, _) in (stock | ways | writing).items()
    ]
    report("loading", rows, samples=len(samples), megabytes=megabytes, batch=BATCH)


if __name__ == "__main__":
    main()
