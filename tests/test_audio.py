"""Recordings are read and resampled in stretches that equal the whole; what cannot be used says why."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from codec import audio
from codec.audio import BLOCK_FRAMES, AudioError, File, Header, Recording, Samples, output_length, probe
from codec.resample import BETA, KERNEL_WIDTH, ROLLOFF, Resampler, sinc_resampler
from shards.pieces import Skimmed
from tests.helpers import speechlike

RATES = [8_000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000, 192_000]


def noise(frames: int, seed: int = 0) -> Samples:
    return (0.2 * np.random.default_rng(seed).standard_normal(frames)).astype(np.float32)


def write(path: Path, audio: Samples, rate: int, subtype: str | None = "FLOAT") -> Path:
    soundfile.write(path, audio, rate, subtype)
    return path


def resampler(path: Path, rate: int, first: int = 0, frames: int | None = None) -> Resampler:
    return Resampler(Recording(path, probe(path), first, frames), rate)


def whole(path: Path, rate: int, first: int = 0, frames: int | None = None) -> Samples:
    reader = resampler(path, rate, first, frames)
    return reader.read(0, reader.recording.length(rate))


@pytest.mark.parametrize("rate_out", [16_000, 24_000, 48_000])
@pytest.mark.parametrize("rate", RATES)
def test_consecutive_windows_equal_the_whole(rate: int, rate_out: int, tmp_path: Path) -> None:
    audio = noise(rate // 2 + 7, rate)
    reader = resampler(write(tmp_path / "a.wav", audio, rate), rate_out)
    expected = torchaudio.functional.resample(
        torch.from_numpy(audio.astype(np.float64)),
        rate,
        rate_out,
        resampling_method="sinc_interp_kaiser",
        lowpass_filter_width=64,
        rolloff=0.9475937167399596,
        beta=14.769656459379492,
    ).numpy()
    length = reader.recording.length(rate_out)
    assert len(expected) == length == -(-len(audio) * rate_out // rate)
    cuts = np.random.default_rng(1).integers(0, length, 6)
    edges = sorted({-50, 0, 1, length, length + 5000, *cuts.tolist()})
    pieces = [reader.read(a, b) for a, b in pairwise(edges)]
    assert [len(piece) for piece in pieces] == np.diff(edges).tolist()
    found = np.concatenate(pieces)
    np.testing.assert_allclose(found[50 : 50 + length], expected, rtol=0, atol=1e-6)
    assert not found[:50].any()  # exact zeros around the recording, as SNAC pads it
    assert not found[50 + length :].any()


@pytest.mark.parametrize("rate_out", [16_000, 24_000, 48_000])
@pytest.mark.parametrize("rate", RATES)
def test_a_sine_stays_a_sine(rate: int, rate_out: int, tmp_path: Path) -> None:
    band = min(rate, rate_out) / 2
    for share in (0.03, 0.5, 0.85):
        frequency = share * band
        audio = 0.5 * np.sin(2 * np.pi * frequency * np.arange(rate // 4) / rate)
        found = whole(write(tmp_path / "a.wav", audio.astype(np.float32), rate), rate_out).astype(np.float64)
        expected = 0.5 * np.sin(2 * np.pi * frequency * np.arange(len(found)) / rate_out)
        inner = slice(rate_out // 20, -(rate_out // 20))
        snr = 10 * np.log10(np.square(expected[inner]).sum() / np.square(found - expected)[inner].sum())
        assert snr > 80, (frequency, snr)


@pytest.mark.parametrize("rate", [96_000, 48_000, 44_100])
def test_no_alias_of_what_lies_above_the_band(rate: int, tmp_path: Path) -> None:
    audio = 0.5 * np.sin(2 * np.pi * 12_700 * np.arange(rate // 4) / rate)
    found = whole(write(tmp_path / "a.wav", audio.astype(np.float32), rate), 24_000)
    assert np.abs(found[1200:-1200]).max() < 0.5 * 10 ** (-80 / 20)


@pytest.mark.parametrize(("extension", "subtype"), [("wav", "PCM_16"), ("flac", None), ("ogg", None), ("mp3", None)])
@pytest.mark.parametrize("rate", [24_000, 44_100])
def test_a_stretch_from_deep_inside_equals_reading_on(
    extension: str, subtype: str | None, rate: int, tmp_path: Path
) -> None:
    path = write(tmp_path / f"a.{extension}", np.stack([noise(6 * rate), noise(6 * rate, 1)], axis=1), rate, subtype)
    expected = whole(path, 48_000)
    assert len(expected) == 6 * 48_000
    for start in (1, 2 * 48_000 + 1, 200_003, len(expected) - 1, len(expected)):
        part = resampler(path, 48_000).read(start, start + 20_000)
        np.testing.assert_allclose(part[: len(expected) - start], expected[start : start + 20_000], rtol=0, atol=1e-6)
        assert len(part) == 20_000
    overlapping = resampler(path, 48_000)
    for start in range(0, 200_000, 50_000):
        np.testing.assert_allclose(overlapping.read(start, start + 80_000), expected[start : start + 80_000], atol=1e-6)


@pytest.mark.parametrize(("extension", "subtype"), [("wav", "FLOAT"), ("flac", None), ("ogg", None)])
@pytest.mark.parametrize(("first", "frames"), [(0, 1000), (1, 70_000), (70_001, 65_537), (99_999, None), (139_999, 1)])
def test_part_of_a_file_is_a_recording_of_its_own(
    extension: str, subtype: str | None, first: int, frames: int | None, tmp_path: Path
) -> None:
    path = write(tmp_path / f"a.{extension}", noise(140_000), 44_100, subtype)
    decoded = soundfile.read(path, dtype="float32")[0][first : None if frames is None else first + frames]
    alone = write(tmp_path / "alone.wav", decoded, 44_100)
    np.testing.assert_allclose(whole(path, 24_000, first, frames), whole(alone, 24_000), rtol=0, atol=1e-6)
    part = Recording(path, probe(path), first, frames)
    assert np.array_equal(np.concatenate(list(part.blocks())), decoded)


def test_channels_that_cancel_each_other_are_a_reason(tmp_path: Path) -> None:
    """For the stretches where they do; quiet rooms and wide sounds do not."""
    audio, other, n = noise(6 * BLOCK_FRAMES), noise(6 * BLOCK_FRAMES, 1), 2 * BLOCK_FRAMES
    right = np.concatenate([other[:n], -audio[n : 2 * n], audio[2 * n :]])
    stereo = np.stack([audio, right], axis=1)
    path = write(tmp_path / "a.wav", stereo, 24_000)
    file = File(path, probe(path))
    before = list(Recording(path, file.header, 0, n, file).blocks())
    with pytest.raises(AudioError, match=r"^its channels cancel each other near 5\.461 s: keep one of them alone$"):
        list(Recording(path, file.header, n, n, file).blocks())
    behind = list(Recording(path, file.header, 2 * n, n, file).blocks())
    assert sum(map(len, before)) == sum(map(len, behind)) == n
    quiet = write(tmp_path / "quiet.wav", np.stack([0.01 * audio, -0.01 * audio], axis=1), 24_000)
    assert not whole(quiet, 24_000).any()


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = noise(5000), noise(5000, 1)
    path = write(tmp_path / "a.wav", np.stack([left, right], axis=1), 48_000)
    assert probe(path) == Header(5000, 48_000, 2)
    np.testing.assert_allclose(whole(path, 48_000), (left + right) / 2, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("frames", "rate", "rate_out", "expected"),
    [
        (1, 8_000, 48_000, 6),
        (1, 192_000, 16_000, 1),
        (13, 192_000, 16_000, 2),
        (44_100, 44_100, 24_000, 24_000),
        (44_101, 44_100, 24_000, 24_001),
        (10**12 + 1, 44_100, 48_000, 1_088_435_374_151),
    ],
)
def test_output_length(frames: int, rate: int, rate_out: int, expected: int) -> None:
    assert output_length(frames, rate, rate_out) == expected


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3"])
def test_one_sample_is_a_recording(extension: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{extension}"
    soundfile.write(path, np.full(1, 0.5, np.float32), 24_000)
    assert probe(path).frames == 1
    assert whole(path, 48_000).shape == (2,)


def test_memory_stays_bounded(tmp_path: Path) -> None:
    minutes, rate, step = 30, 8_000, 5 * 16_000
    path, minute = tmp_path / "long.wav", noise(60 * rate)
    with soundfile.SoundFile(path, "w", rate, 1, "PCM_16") as file:
        for number in range(minutes):
            file.write(minute * (number + 1) / minutes)
    reader = resampler(path, 16_000)
    for start in range(0, minutes * 60 * 16_000, step):
        last = reader.read(start, start + step)
        assert reader._held is not None
        kept = [stretch if stretch.base is None else stretch.base for stretch in reader._held._stretches]
        assert sum(map(len, kept)) <= step // 2 + BLOCK_FRAMES + 1000
    expected = resampler(write(tmp_path / "end.wav", minute, rate), 16_000).read(55 * 16_000, 60 * 16_000)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(last[1000:], expected[1000:], rtol=0, atol=1e-4)


def test_a_wav_streamed_without_its_length_is_read_to_its_end(tmp_path: Path) -> None:
    data = bytearray(write(tmp_path / "a.wav", noise(5000), 24_000, "PCM_16").read_bytes())
    data[4:8] = data[40:44] = b"\xff" * 4
    assert data[36:40] == b"data"
    (tmp_path / "streamed.wav").write_bytes(data)
    assert np.array_equal(whole(tmp_path / "streamed.wav", 24_000), whole(tmp_path / "a.wav", 24_000))


def with_value(value: float) -> Callable[[Path], Path]:
    audio = noise(100_000)
    audio[90_000] = value
    return lambda folder: write(folder / "a.wav", audio, 24_000)


def cut(extension: str, share: float) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / f"a.{extension}"
        soundfile.write(path, noise(100_000), 24_000)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        return path

    return make


def holding(name: str, data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def directory(folder: Path) -> Path:
    (folder / "x.wav").mkdir()
    return folder / "x.wav"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (holding("a.wav", b""), "the file is empty"),
        (lambda folder: write(folder / "a.wav", noise(0), 24_000), "holds no audio"),
        (holding("a.wav", b"no sound at all, " * 50), "not readable as audio: Format not recognised"),
        (cut("flac", 0.6), r"broken near \d\.\d{3} s: .*flac decoder lost sync"),
        (cut("wav", 0.9), r"cut off: the header promises 200000 bytes of samples, the file holds 1799\d\d"),
        (cut("mp3", 0.9), r"ends at frame \d+, its header says 100000"),
        (cut("ogg", 0.9), "cut off: its last Ogg page is incomplete"),
        (cut("ogg", 0.02), "not readable as audio"),
        (with_value(np.nan), r"NaN or infinity near 3\.750 s"),
        (with_value(-np.inf), "NaN or infinity near"),
        (directory, "not readable as audio"),
        (lambda folder: write(folder / "a.wav", noise(9), 24_000).with_name("missing.wav"), "no such file"),
        (lambda folder: write(folder / "a.wav", noise(9000), 4_000), "sample rate 4000 Hz is outside 8000 … 192000 Hz"),
        (lambda folder: write(folder / "a.wav", noise(9000), 200_000), "sample rate 200000 Hz is outside"),
        (lambda folder: write(folder / "a.wav", noise(9000), 44_101), r"has no simple ratio to ours \(44101:48000\)"),
    ],
)
def test_what_cannot_be_used_says_why(make: Callable[[Path], Path], reason: str, tmp_path: Path) -> None:
    path = make(tmp_path)
    with pytest.raises(AudioError, match=reason):
        whole(path, 48_000)


@pytest.mark.parametrize(("frames", "rate", "channels"), [(999, 24_000, 1), (1000, 22_050, 1), (1000, 24_000, 2)])
def test_a_file_that_changed_is_refused(frames: int, rate: int, channels: int, tmp_path: Path) -> None:
    header = probe(write(tmp_path / "a.wav", noise(1000), 24_000))
    write(tmp_path / "a.wav", np.stack([noise(frames)] * channels, axis=1), rate)
    message = f"has {frames} frames at {rate} Hz in {channels} channels, planned were 1000 at 24000 Hz in 1"
    with pytest.raises(AudioError, match=message):
        next(Recording(tmp_path / "a.wav", header).blocks())


@pytest.mark.parametrize(("old", "new"), [(3, 1), (2, 1), (441, 160), (147, 80), (1, 2), (1, 3), (80, 147)])
@pytest.mark.parametrize("length", [1, 200, 48_001])
def test_resampling_is_torchaudio_s(old: int, new: int, length: int) -> None:
    stock = torchaudio.transforms.Resample(
        old, new, "sinc_interp_kaiser", KERNEL_WIDTH, rolloff=ROLLOFF, beta=BETA, dtype=torch.float64
    ).float()
    waves = torch.randn(2, length, generator=torch.Generator().manual_seed(length))
    torch.testing.assert_close(sinc_resampler(old, new)(waves), stock(waves), rtol=0, atol=1e-6)


def test_mp3_of_few_bits_has_no_seams(tmp_path: Path) -> None:
    """Its frames use what frames before have left of theirs: whoever begins to read amid them misses it."""
    path, rate = tmp_path / "a.mp3", 48_000
    audio = speechlike(6, rate, 0)
    soundfile.write(path, audio, rate, compression_level=0.95, bitrate_mode="CONSTANT")
    with soundfile.SoundFile(path) as file:
        expected = file.read(dtype="float32")
    assert len(expected) > 4 * BLOCK_FRAMES
    assert np.array_equal(whole(path, rate), expected)


class Remote:
    """An object's bytes, and of each request whether soundfile waited for it, which opens one file at a time."""

    def __init__(self, data: bytes) -> None:
        self.data, self.waited, self.opening = data, list[bool](), False

    def read_bytes(self, start: int, stop: int) -> bytes:
        self.waited.append(self.opening)
        return self.data[start:stop]


@pytest.mark.parametrize(
    ("suffix", "subtype", "requests"),
    [
        ("wav", "PCM_16", 1),
        ("flac", "PCM_16", 1),
        ("ogg", "VORBIS", 2),
        ("ogg", "OPUS", 2),
        ("mp3", "MPEG_LAYER_III", 2),
    ],
)
def test_a_remote_header_is_fetched_before_the_file_is_opened(
    subtype: str, suffix: str, requests: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a.{suffix}"
    wav = speechlike(20.0, 48_000, 0)
    with soundfile.SoundFile(path, "w", 48_000, 1, subtype) as file:
        for block in np.array_split(wav, 100):  # of more at once libsndfile's encoder of Vorbis dies
            file.write(block)
    remote = Remote(path.read_bytes())
    begin = audio._Onward.__init__

    def opened(self: audio._Onward, *args: Any) -> None:
        remote.opening = True
        begin(self, *args)
        remote.opening = False

    monkeypatch.setattr(audio._Onward, "__init__", opened)
    assert probe(Skimmed(remote, 0, len(remote.data))) == Header(len(wav), 48_000, 1)  # type: ignore[arg-type]
    assert remote.waited == [False] * requests
