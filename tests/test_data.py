"""Crops are aligned, whole and placed by their position alone; batches have one shape; damage is named."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import select
import shutil
import signal
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from shards.contract import COARSE_48K, CONTEXT_COARSE, FORMAT_VERSION, TOKENS, coarse_tokens, flatten_codes, npy_bytes
from shards.errors import ShardError
from shards.index import Index, load
from shards.order import Order
from shards.reader import read_sample
from shards.stream import Stage, Stream
from tests.helpers import ROOT
from trainer.data import Batch, Crop, collate, crop, fixed_batches, training_batches
from trainer.decoder import PADDING_TOKEN
from trainer.requests import requests

LENGTH = 3


def ramp_sample(n_coarse: int, before: int = 3, after: int = 3, missing: int = 0, position: int = 0) -> dict[str, Any]:
    """A segment that says where it is: token row t holds 7t … 7t + 6, target sample n holds n (16 bit, from −32768)."""
    rows = before + n_coarse + after
    codes_T7 = np.arange(rows * TOKENS, dtype=np.int16).reshape(rows, TOKENS)
    flac = io.BytesIO()
    target = np.arange(n_coarse * COARSE_48K) - 32768
    soundfile.write(flac, target.astype(np.int16), 48_000, format="FLAC", subtype="PCM_16")
    meta = {
        "format_version": FORMAT_VERSION, "recording": "r", "group": "g", "segment": 0, "start_seconds": 0.0,
        "n_coarse": n_coarse, "context_before": before, "context_after": after,
        "n_samples": n_coarse * COARSE_48K - missing, "sampling_rate": 48_000, "gain": 1.0, "teacher": "t", "snac": "s",
    }  # fmt: skip
    return {
        "__key__": "000000-00000",
        "__url__": "000000.tar",
        "codes.npy": npy_bytes(flatten_codes(codes_T7)),
        "target.flac": flac.getvalue(),
        "json": json.dumps(meta).encode(),
        "position": position,
    }


def place(item: Crop, before: int) -> int:
    """Where the crop begins in its segment, in coarse tokens, by what its tokens say; checked against its target."""
    first_row = int(item.codes_T7[0, 0]) // TOKENS
    np.testing.assert_array_equal(item.codes_T7.ravel(), np.arange(item.codes_T7.size) + TOKENS * first_row)
    start = first_row + item.before - before
    expected = np.arange(len(item.target)) + start * COARSE_48K - 32768
    np.testing.assert_array_equal(np.round(item.target * 32768), expected)
    return start


@pytest.mark.parametrize(("before", "after"), [(3, 3), (0, 0), (1, 2)])
def test_tokens_and_target_are_the_same_stretch_of_time(before: int, after: int) -> None:
    n_coarse, seen = 8, set()
    for position in range(100):
        item = crop(ramp_sample(n_coarse, before, after, position=position), LENGTH, seed=0)
        start = place(item, before)
        assert len(item.target) == LENGTH * COARSE_48K
        assert item.before == min(start + before, CONTEXT_COARSE)
        context_after = len(item.codes_T7) - item.before - LENGTH
        assert context_after == min(n_coarse - start - LENGTH + after, CONTEXT_COARSE)
        seen.add(start)
    assert seen == set(range(n_coarse - LENGTH + 1))


def test_the_place_depends_on_seed_and_position_alone() -> None:
    def starts(seed: int) -> list[int]:
        return [place(crop(ramp_sample(16, 0, 0, position=p), LENGTH, seed), 0) for p in range(40)]

    torch.manual_seed(0)
    np.random.seed(0)
    first = starts(7)
    torch.manual_seed(1)
    np.random.seed(1)
    assert starts(7) == first
    assert starts(8) != first


def test_a_short_segment_is_taken_whole() -> None:
    item = crop(ramp_sample(2, 1, 0), LENGTH, seed=0)
    assert place(item, 1) == 0
    assert (item.before, len(item.codes_T7), len(item.target)) == (1, 3, 2 * COARSE_48K)


def test_only_real_samples_are_compared() -> None:
    missing = 1000
    lengths = set()
    for position in range(40):
        item = crop(ramp_sample(5, missing=missing, position=position), LENGTH, seed=0)
        at_the_end = place(item, 3) == 5 - LENGTH
        assert len(item.target) == LENGTH * COARSE_48K - (missing if at_the_end else 0)
        lengths.add(len(item.target))
    assert len(lengths) == 2


def test_crops_are_whole_tokens() -> None:
    assert coarse_tokens(4.0) == 47
    assert coarse_tokens(0.001) == 1
    assert coarse_tokens(3.49 * COARSE_48K / 48_000) == 3


def test_batches_have_one_shape_and_say_what_is_real() -> None:
    sizes, context = (1, 2, 3), ((0, 0), (2, 3), (3, 1))
    samples = [ramp_sample(n, *around, missing=7) for n, around in zip(sizes, context, strict=True)]
    crops = [crop(members, LENGTH, 0) for members in samples]
    batch = collate(samples, LENGTH, 0)
    assert batch.tokens_BT7.shape == (3, LENGTH + 2 * CONTEXT_COARSE, TOKENS)
    assert batch.target_BN.shape == (3, LENGTH * COARSE_48K)
    assert batch.valid_B.tolist() == [n * COARSE_48K - 7 for n in sizes]
    for place, (item, n, (before, after)) in enumerate(zip(crops, sizes, context, strict=True)):
        given = torch.from_numpy(item.codes_T7.astype(np.int64))
        real = slice(CONTEXT_COARSE - before, CONTEXT_COARSE + n + after)
        assert torch.equal(batch.tokens_BT7[place, real], given)
        assert int((batch.tokens_BT7[place] != PADDING_TOKEN).sum()) == given.numel()
        assert torch.equal(batch.target_BN[place, : batch.valid_B[place]], torch.from_numpy(item.target))
        assert not batch.target_BN[place, batch.valid_B[place] :].any()
    one = collate(samples[:1], LENGTH, 0)
    assert one.tokens_BT7.shape[1:] == batch.tokens_BT7.shape[1:]
    assert one.target_BN.shape[1:] == batch.target_BN.shape[1:]


def test_what_is_not_real_is_silenced() -> None:
    valid = [LENGTH * COARSE_48K, 100, 2 * COARSE_48K]
    batch = Batch(
        keys=["a", "b", "c"],
        tokens_BT7=torch.zeros(3, LENGTH + 2 * CONTEXT_COARSE, TOKENS),
        target_BN=torch.zeros(3, LENGTH * COARSE_48K),
        valid_B=torch.tensor(valid),
    )
    wav_BN = torch.arange(1.0, 1 + 3 * LENGTH * COARSE_48K).reshape(3, -1)
    for wav_N, real_N, n in zip(wav_BN, batch.only_real(wav_BN), valid, strict=True):
        assert torch.equal(real_N[:n], wav_N[:n])
        assert not real_N[n:].any()
    parts = list(batch.split(2))
    assert [part.keys for part in parts] == [["a", "b"], ["c"]]
    assert torch.equal(parts[0].only_real(wav_BN[:2]), batch.only_real(wav_BN)[:2])


def contents(batches: list[Batch]) -> tuple[list[str], Tensor, Tensor]:
    keys = [key for batch in batches for key in batch.keys]
    return keys, torch.cat([b.tokens_BT7 for b in batches]), torch.cat([b.target_BN for b in batches])


def assert_same(a: tuple[list[str], Tensor, Tensor], b: tuple[list[str], Tensor, Tensor]) -> None:
    assert a[0] == b[0]
    assert torch.equal(a[1], b[1])
    assert torch.equal(a[2], b[2])


def stream_of(index: Index, seed: int, batch: int) -> Stream:
    return Stream((Order(index.counts, seed, 2),), (1,), (Stage(0, LENGTH, batch),), seed)


def test_validation_crops_are_fixed_whatever_the_batch_size_and_the_number_of_ranks(work: Path) -> None:
    index = load(work / "shards", "validation")
    whole = contents(list(fixed_batches(index, 4, 4, LENGTH, 0)))
    assert len(set(whole[0])) == 4
    assert_same(contents(list(fixed_batches(index, 4, 3, LENGTH, 0))), whole)
    ranks = [batch for rank in range(2) for batch in fixed_batches(index, 4, 1, LENGTH, 0, rank, 2)]
    assert_same(contents(ranks), whole)
    everything = contents(list(fixed_batches(index, 1000, 2, LENGTH, 0)))[0]
    assert len(everything) == len(set(everything)) == len(index)


def test_crops_follow_the_seed_of_the_stream(work: Path) -> None:
    index = load(work / "shards", "train")
    stream = stream_of(index, 7, 4)
    samples = [{**read_sample(index, place.sample), "position": place.position} for place in stream.batch(0)]
    expected, other = (contents([collate(samples, LENGTH, seed)]) for seed in (7, 0))
    assert_same(contents(list(training_batches((index,), stream, range(1), 0, 0, 1))), expected)
    assert not torch.equal(expected[1], other[1])


def test_validation_crops_come_from_all_shards(work: Path) -> None:
    index = load(work / "shards", "train")
    order, keys = Order(index.counts, 3, len(index.counts)), index.table["key"].to_pylist()
    chosen = [keys[order.sample_at(position)] for position in range(6)]
    assert len({key.partition("-")[0] for key in chosen}) > 1
    assert contents(list(fixed_batches(index, 6, 4, LENGTH, 3)))[0] == chosen


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_arrives_as_one_line_that_names_shard_and_key(work: Path, tmp_path: Path, workers: int) -> None:
    shutil.copytree(work / "shards", tmp_path / "shards")
    index = load(tmp_path / "shards", "train")
    row = index.table.slice(len(index) - 1, 1).to_pylist()[0]
    tar = tmp_path / "shards" / "train" / f"{row['shard']:06d}.tar"
    with tar.open("r+b") as file:
        file.seek(row["offset"] + row["length"] // 2)
        byte = file.read(1)
        file.seek(-1, io.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ShardError) as caught:
        list(training_batches((index,), stream_of(index, 0, 4), range(5), workers, 0, 1))
    message = str(caught.value)
    assert message.startswith(f"{tar}: {row['key']}: crc32")
    assert "\n" not in message
    assert "Traceback" not in message


def test_batches_for_a_gpu_are_pinned(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[int] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    index = load(work / "shards", "train")
    stream = stream_of(index, 0, 4)
    for batch in training_batches((index,), stream, range(2), 0, 0, 1, for_gpu=True):
        assert set(pinned) == {tensor.data_ptr() for tensor in batch.tensors}
        pinned.clear()
    list(training_batches((index,), stream, range(2), 0, 0, 1))
    assert not pinned


LEFT_BEHIND = """
import sys
from pathlib import Path
from shards.index import load
from shards.order import Order
from shards.stream import Stage, Stream
from trainer.data import training_batches

index = load(Path(sys.argv[1]) / "shards", "train")
stream = Stream((Order(index.counts, 0, 2),), (1,), (Stage(0, 3, 2),), 0)
batches = training_batches((index,), stream, range(1000), 2, 0, 1)
print(len(next(batches)))
sys.left_behind = batches
"""


def test_readers_left_behind_do_not_keep_a_process_from_ending(work: Path) -> None:
    """As a traceback leaves them: they ignore SIGTERM, by which Python ends them before it waits for them."""
    words = [sys.executable, "-W", "ignore", "-c", LEFT_BEHIND, str(work)]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    assert ended.stdout == "2\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_to_all_processes_are_the_trainers_to_answer(number: int, work: Path) -> None:
    """As Slurm and a terminal send them: the batches that are left are read. Also where Python's default is another."""
    others, index = multiprocessing.active_children(), load(work / "shards", "train")
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        with requests():
            batches = training_batches((index,), stream_of(index, 0, 4), range(8), 1, 0, 1)
            next(batches)
            (reader,) = (child for child in multiprocessing.active_children() if child not in others)
            assert reader.pid
            os.kill(reader.pid, number)
            assert len(list(batches)) == 7
    finally:
        multiprocessing.set_start_method(None, force=True)


def test_a_batch_of_any_size_is_a_message_that_a_pipe_takes_at_once() -> None:
    """Else a process killed amid it leaves the trainer to wait for its end for ever."""
    keys = [f"{number:06d}-00000" for number in range(1024)]
    sent = Batch(keys, torch.zeros(1024, 7, 7, dtype=torch.long), torch.rand(1024, 2), torch.ones(1024))
    assert all(tensor.is_shared() for tensor in (sent.shared()._packed_keys, *sent.tensors))
    message = ForkingPickler.dumps((0, sent))
    assert len(message) < select.PIPE_BUF // 2
    _, received = ForkingPickler.loads(message)
    assert received.keys == keys
    torch.testing.assert_close(received.tensors, sent.tensors)
