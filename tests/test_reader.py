"""One sample: tried again, taken apart and decoded, or refused by name."""

from __future__ import annotations

import errno
import io
import os
import tarfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from pipeline.targets import flac_bytes
from shards.contract import CODES_SUFFIX, META_SUFFIX, TARGET_SUFFIX, flatten_codes, npy_bytes
from shards.errors import ShardError
from shards.flac import Flac
from shards.index import load
from shards.reader import decode_sample, read_sample, split_members
from tests.shard_helpers import flip, some_members
from tests.test_contract import some_codes


def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_sample_that_cannot_be_read_is_tried_again_then_named(
    damage: str, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = load(shards, "train")
    row = index.table.slice(4, 1).to_pylist()[0]
    path = shards / "train" / f"{row['shard']:06d}.tar"
    if damage == "flip":
        flip(path, row["offset"] + row["length"] - 1, 0)
    elif damage == "cut":
        os.truncate(path, row["offset"] + row["length"] - 1)
    else:
        path.unlink()
    waits = no_waiting(monkeypatch)
    with pytest.raises(ShardError) as error:
        read_sample(index, 4)
    assert waits == [0.2, 0.4]
    assert str(path) in str(error.value)
    assert row["key"] in str(error.value)


def test_a_read_that_fails_once_costs_nothing(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = load(work / "shards", "train")
    expected = read_sample(index, 3)
    waits = no_waiting(monkeypatch)
    ordinary, reads = os.pread, []

    def unreliable(descriptor: int, length: int, offset: int) -> bytes:
        reads.append(offset)
        if len(reads) == 1:
            raise OSError(errno.EIO, "I/O error")
        return bytes(length) if len(reads) == 2 else ordinary(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", unreliable)
    assert read_sample(index, 3) == expected
    assert len(waits) == 2


def tar_bytes(members: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data) if kind == tarfile.REGTYPE else 0, kind, "/etc/hostname"
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


KEY = "000000-00007"
WHOLE = {f"{KEY}.{suffix}": data for suffix, data in some_members(7).items()}
FOREIGN = [
    {**WHOLE, f"{KEY}.pth": b"pickle"},
    {**WHOLE, f"{KEY}.codes.pyd": b"pickle"},
    {**WHOLE, "../x": b"outside"},
    {**WHOLE, "/tmp/x": b"outside"},
    {name.replace(KEY, f"../{KEY}"): data for name, data in WHOLE.items()},
    {name.replace(KEY, "000000-00008"): data for name, data in WHOLE.items()},
    dict(list(WHOLE.items())[:2]),
    {},
]


def test_members_are_taken_apart_by_suffix() -> None:
    found = split_members(tar_bytes(WHOLE), KEY, Path("some.tar"))
    assert found == {**some_members(7), "__key__": KEY, "__url__": "some.tar"}
    assert decode_sample(found)["meta"]["segment"] == 7


@pytest.mark.parametrize("members", FOREIGN, ids=[str(number) for number in range(len(FOREIGN))])
def test_other_members_than_the_three_are_refused(members: dict[str, bytes]) -> None:
    with pytest.raises(ShardError) as error:
        split_members(tar_bytes(members), KEY, Path("some.tar"))
    assert str(error.value).startswith(f"some.tar: {KEY}: ")
    assert "expected" in str(error.value)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_members_that_are_no_plain_files_are_refused(kind: bytes) -> None:
    with pytest.raises(ShardError, match="no plain file"):
        split_members(tar_bytes(WHOLE, kind), KEY, Path("some.tar"))


def test_a_member_that_stands_twice_is_refused() -> None:
    first = dict.fromkeys(list(WHOLE)[:1], b"other")
    data = tar_bytes(first)[:1024] + tar_bytes(WHOLE)
    with pytest.raises(ShardError, match="holds"):
        split_members(data, KEY, Path("some.tar"))


def test_a_cut_sample_is_refused_wherever_it_is_cut() -> None:
    data = tar_bytes(WHOLE)
    end = len(data.rstrip(b"\0"))
    for length in np.random.default_rng(0).integers(0, end, 60).tolist():
        with pytest.raises(ShardError, match=rf"^some\.tar: {KEY}: "):
            decode_sample(split_members(data[:length], KEY, Path("some.tar")))


def stereo_flac() -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros((4 * 4096, 2)), 48_000, format="FLAC")
    return buffer.getvalue()


def mono_wav() -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(4 * 4096), 48_000, format="WAV")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("suffix", "data", "message"),
    [
        (TARGET_SUFFIX, b"no audio", "target is not readable FLAC"),
        (TARGET_SUFFIX, stereo_flac(), "target has 2 channels, expected one"),
        (TARGET_SUFFIX, mono_wav(), "target is not readable FLAC: it begins with b'RIFF'"),
        (TARGET_SUFFIX, b"fLaC", "target is not readable FLAC"),
        (TARGET_SUFFIX, flac_bytes(np.zeros(4096, np.float32), 16), "4096 samples at 48000 Hz, expected 16384"),
        (CODES_SUFFIX, npy_bytes(flatten_codes(some_codes(7))), "7 coarse tokens, metadata says 1"),
        (META_SUFFIX, b"{}", "metadata field format_version"),
    ],
)
def test_a_sample_against_the_contract_is_refused_by_name(suffix: str, data: bytes, message: str) -> None:
    members = {**some_members(7), suffix: data, "__key__": KEY, "__url__": "some.tar"}
    with pytest.raises(ShardError, match=message) as error:
        decode_sample(members)
    assert str(error.value).startswith(f"some.tar: {KEY}: ")


@pytest.mark.parametrize("bits", [16, 24])
def test_any_part_of_a_target_is_that_of_the_whole(bits: int) -> None:
    target = np.random.default_rng(0).uniform(-0.5, 0.5, 4 * 4096).astype(np.float32)
    members = {**some_members(7), TARGET_SUFFIX: flac_bytes(target, bits), "__key__": KEY, "__url__": "some.tar"}
    whole = decode_sample(members)
    for first in range(4):
        for last in range(first + 1, 5):
            part = decode_sample(members, partial(lambda tokens, meta: tokens, range(first, last)))
            assert np.array_equal(part["target"], whole["target"][first * 4096 : last * 4096])
            assert np.array_equal(part["codes"], whole["codes"])


def speech_like(samples: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Loud and silent stretches, so that all kinds of subframes are there."""
    wav = 0.3 * np.cumsum(np.random.default_rng(1).normal(size=samples)) / np.sqrt(samples)
    wav[: samples // 5] = 0
    wav[samples // 5 : samples // 4] = 0.25
    return wav.astype(np.float32)


@pytest.mark.parametrize("bits", [16, 24])
def test_flac_is_decoded_as_by_libsndfile(bits: int) -> None:
    data = flac_bytes(speech_like(20_000), bits)
    expected, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    flac = Flac(data)
    assert (flac.frames, flac.rate) == (20_000, 48_000)
    for start, count in [(0, 20_000), (19_999, 1), (4096, 4096), (1, 9000), (0, 1), (4095, 2)]:
        assert np.array_equal(flac.read(start, count), expected[start : start + count])
    for start, count in [(0, 20_001), (20_000, 1), (50_000, 4), (19_000, 4096)]:
        with pytest.raises(ShardError, match=f"of {start + count} samples"):
            flac.read(start, count)


def test_damaged_flac_is_refused_or_unharmed() -> None:
    """crc32 of the sample finds all damage before; this is for tars that others made."""
    data, random = flac_bytes(speech_like(20_000), 16), np.random.default_rng(2)
    expected, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    refused = 0
    for place in random.integers(0, len(data), 300).tolist():
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(random.integers(8))
        try:
            whole = Flac(bytes(damaged)).read(0, 20_000)
            assert np.array_equal(whole, expected) or place < 42  # bits and rate in the header
        except ShardError:
            refused += 1
    assert refused > 200
    for length in random.integers(0, len(data), 100).tolist():
        with pytest.raises(ShardError):
            Flac(data[:length]).read(0, 20_000)
