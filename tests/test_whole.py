"""Of a recording everything is read, also where its header says less, or nothing; else there is a reason."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from codec.audio import BLOCK_FRAMES, AudioError, File, Recording, Samples, probe
from codec.mp3 import _frame
from codec.whole import _of_ogg
from shards.pieces import Fetched
from tests.helpers import speechlike

RATE = 44_100
LAME_DELAY = 576  # samples that LAME puts before the first one; its header lets a decoder take them off
TAG_BEHIND = b"TAG" + bytes(125)
STEREO, MONO = 2, 1


def encoded(audio: Samples, rate: int, format: str, subtype: str | None = None, **more: object) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, audio, rate, format=format, subtype=subtype, **more)
    return buffer.getvalue()


def mp3(rate: int = RATE, channels: int = MONO, seed: int = 0, mode: str = "VARIABLE") -> bytes:
    """Loud, then so quiet that a guess by the first frames ends early; or the other way round."""
    audio = speechlike(4, rate, seed) * np.where(np.arange(4 * rate) < 2 * rate, 1, 1e-3).astype(np.float32)
    stereo = np.stack([audio[:: -1 if seed else 1]] * channels, axis=1)
    return encoded(stereo, rate, "MP3", bitrate_mode=mode, compression_level=0.6)


def frames(data: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(data):
        length = _frame(data[at : at + 4])[1]
        found.append(data[at : at + length])
        at += length
    assert all(found)
    return found


def unstated(data: bytes) -> bytes:
    """Without the first frame, which says how many there are."""
    first, *others = frames(data)
    assert b"Xing" in first or b"Info" in first
    return b"".join(others)


def tag(size: int) -> bytes:
    """ID3v2, such as one that holds a picture."""
    return b"ID3\4\0\0" + bytes([size >> 21, size >> 14 & 127, size >> 7 & 127, size & 127]) + bytes(size)


def decoded(data: bytes) -> Samples:
    whole: Samples = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)[0]
    return whole.mean(axis=1, dtype=np.float64).astype(np.float32)


def read(path: Path | Fetched) -> Samples:
    return np.concatenate(list(Recording(path, probe(path)).blocks()))


def written(folder: Path, extension: str, data: bytes) -> Path:
    path = folder / f"a.{extension}"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("rate", "channels"), [(RATE, MONO), (48_000, STEREO), (24_000, MONO), (8_000, STEREO)])
@pytest.mark.parametrize(
    "put",
    [
        lambda data: data,
        lambda data: tag(300_000) + data + TAG_BEHIND,
        lambda data: data + max(frames(data), key=len)[:-1],
    ],
)
def test_an_mp3_without_a_length_is_read_to_its_end(
    put: Callable[[bytes], bytes], rate: int, channels: int, seed: int, tmp_path: Path
) -> None:
    data = mp3(rate, channels, seed)
    expected = decoded(data)
    path = written(tmp_path, "mp3", put(unstated(data)))
    for place in (path, Fetched(path.read_bytes())):
        found = read(place)
        np.testing.assert_allclose(found[LAME_DELAY:][: len(expected)], expected, rtol=0, atol=1e-6)
        assert len(found) >= len(expected) + LAME_DELAY - 1152


@pytest.mark.parametrize(
    "before",
    [
        lambda data: data[-20:],
        lambda data: bytes(20_000),
        lambda data: b"\xff" * 999,
        lambda data: data[:4] + bytes(999),  # as if frames began there
    ],
)
def test_an_mp3_that_begins_late_is_read_to_its_end(before: Callable[[bytes], bytes], tmp_path: Path) -> None:
    """Behind a scrap of a frame, as what was cut out of a stream does, or behind padding."""
    data = unstated(mp3())
    expected = read(written(tmp_path, "mp3", data))
    path = written(tmp_path, "mp3", before(data) + data)
    for place in (path, Fetched(path.read_bytes())):
        assert np.array_equal(read(place), expected)


@pytest.mark.parametrize("tag_behind", [b"APETAGEX", b"LYRICSBEGIN"])
def test_large_tags_behind_an_mp3_are_no_damage(tag_behind: bytes, tmp_path: Path) -> None:
    data = unstated(mp3())
    expected = read(written(tmp_path, "mp3", data))
    assert np.array_equal(read(written(tmp_path, "mp3", data + tag_behind + bytes(9000))), expected)


def test_an_mp3_of_few_frames_is_read_to_its_end(tmp_path: Path) -> None:
    """Of which the first are loud, the others quiet."""
    few = frames(unstated(mp3()))[66:86]
    assert len(few[0]) > 2 * len(few[-1])
    assert len(read(written(tmp_path, "mp3", b"".join(few)))) >= 20 * 1152 - LAME_DELAY


def test_its_stretches_are_cut_from_the_whole(tmp_path: Path) -> None:
    path = written(tmp_path, "mp3", tag(5000) + unstated(mp3(seed=1)))
    whole, header = read(path), probe(path)
    assert header.frames == len(whole) > 2 * BLOCK_FRAMES
    file = File(path, header)
    for first, end in np.sort(np.random.default_rng(0).integers(0, len(whole), (30, 2)), axis=1).tolist():
        parts = Recording(path, header, first, end - first, file).blocks()
        assert np.array_equal(np.concatenate([np.zeros(0, np.float32), *parts]), whole[first:end])


@pytest.mark.parametrize("between", [b"", tag(700)])
def test_joined_mp3_are_read_to_the_end_of_the_last(between: bytes, tmp_path: Path) -> None:
    """Though the first frame tells of the first alone."""
    one, two = mp3(seed=0), mp3(seed=1)
    found = read(written(tmp_path, "mp3", one + between + two))
    before = 1152 * len(frames(one))  # of `one` all but its first frame, and the first of `two`, are heard
    for data, place in ((one, LAME_DELAY), (two, before + LAME_DELAY)):
        settled = slice(4 * 1152, None)  # the first frames of `two` follow on those of `one`
        expected = decoded(data)
        np.testing.assert_allclose(found[place : place + len(expected)][settled], expected[settled], atol=1e-5)
    with pytest.raises(AudioError, match=r"frames end or change at byte \d+ of \d+: it is damaged, or several in one"):
        probe(written(tmp_path, "mp3", one + mp3(channels=STEREO)))


def test_a_hole_in_an_mp3_without_a_length_is_said(tmp_path: Path) -> None:
    data = unstated(mp3(seed=1))
    for place in (len(data) // 2, len(data) - 1500):
        with pytest.raises(AudioError, match=r"frames end or change at byte"):
            probe(written(tmp_path, "mp3", data[:place] + bytes(1000) + data[place:]))


def test_an_mp3_whose_length_is_known_is_left_to_libsndfile(tmp_path: Path) -> None:
    for mode in ("CONSTANT", "AVERAGE", "VARIABLE"):
        data = mp3(48_000, mode=mode)
        for bytes_of_it in (data, tag(5000) + data + TAG_BEHIND):
            assert np.array_equal(read(written(tmp_path, "mp3", bytes_of_it)), decoded(data))


def test_a_flac_behind_a_tag_keeps_its_places(tmp_path: Path) -> None:
    data = encoded(speechlike(8, 24_000, 1), 24_000, "FLAC")
    path, whole = written(tmp_path, "flac", tag(2000) + data), decoded(data)
    for first in np.random.default_rng(0).integers(0, len(whole) - 5000, 200).tolist():
        assert np.array_equal(next(Recording(path, probe(path), first, 5000).blocks()), whole[first : first + 5000])


def test_a_flac_without_a_length_is_said(tmp_path: Path) -> None:
    data = bytearray(encoded(speechlike(1, RATE, 0), RATE, "FLAC"))
    data[21] &= 0xF0  # the 36 bits of STREAMINFO that hold it
    data[22:26] = bytes(4)
    with pytest.raises(AudioError, match="its header states no length"):
        probe(written(tmp_path, "flac", bytes(data)))


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_several_ogg_streams_in_one_file_are_said(subtype: str, tmp_path: Path) -> None:
    one, two = (encoded(speechlike(1, 48_000, seed), 48_000, "OGG", subtype) for seed in (0, 1))
    assert probe(written(tmp_path, "ogg", one)).frames == 48_000
    with pytest.raises(AudioError, match="holds several Ogg streams"):
        probe(written(tmp_path, "ogg", one + two))


def test_an_ogg_page_may_be_as_large_as_it_gets(tmp_path: Path) -> None:
    serial, sizes = b"mine", bytes([255])
    last = b"OggS\0" + bytes(9) + serial + bytes(8) + sizes + 255 * sizes + 255 * 255 * sizes
    (tmp_path / "a.ogg").write_bytes(b"OggS\0" + bytes(9) + serial + last)
    assert _of_ogg(tmp_path / "a.ogg") is None
    (tmp_path / "a.ogg").write_bytes(b"OggS\0" + bytes(9) + serial + last[:-1])
    assert _of_ogg(tmp_path / "a.ogg") == "cut off: its last Ogg page is incomplete"


def wav(told: int, behind: bytes = b"") -> bytes:
    data = bytearray(encoded(speechlike(1, 24_000, 0), 24_000, "WAV"))
    assert data[36:40] == b"data"
    data[40:44] = struct.pack("<I", told)
    return bytes(data) + behind


@pytest.mark.parametrize("told", [0, 10_000, 20_000])
def test_a_wav_that_holds_more_than_its_header_tells_is_said(told: int, tmp_path: Path) -> None:
    more = 48_000 - told
    with pytest.raises(AudioError, match=f"tells of {told} bytes of samples, {more} more follow, .*ignore_length"):
        probe(written(tmp_path, "wav", wav(told)))


@pytest.mark.parametrize("behind", [b"LIST" + struct.pack("<I", 9000) + bytes(9000), b"garbage" * 99])
def test_chunks_and_scraps_behind_a_wav_are_no_samples(behind: bytes, tmp_path: Path) -> None:
    assert len(read(written(tmp_path, "wav", wav(48_000, behind)))) == 24_000


def test_behind_an_odd_number_of_bytes_one_more_is_no_sample(tmp_path: Path) -> None:
    """RIFF fills chunks up to an even number of bytes; what follows is a chunk all the same."""
    data = encoded(speechlike(1, 24_000, 0)[:23_999], 24_000, "WAV", "PCM_U8")
    data += b"\0" * (len(data) % 2) + b"LIST" + struct.pack("<I", 9000) + bytes(9000)
    assert len(read(written(tmp_path, "wav", data))) == 23_999


@pytest.mark.parametrize("told", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000, 0x7FFFF000 // 6 * 6])
def test_a_wav_from_a_pipe_is_read_to_its_end(told: int, tmp_path: Path) -> None:
    assert np.array_equal(read(written(tmp_path, "wav", wav(told))), decoded(wav(48_000)))
