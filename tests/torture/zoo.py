"""Broken and strange recordings, made by code: each must end in codes or in a reason, whatever it is.

An exhibit's `fate` says what must become of it: OK, FAILED, TOO_SHORT, or ANY where libraries may differ.
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile

from shards.contract import FAILED, OK, REJECTED, TOO_SHORT
from tests.helpers import speechlike

ANY = "any"
RATE = 16_000
VOICE = speechlike(0.6, RATE, 7)
Samples = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Exhibit:
    name: str  # path below the zoo's folder, as the pipeline will call it
    fate: str
    make: Callable[[Path], object]


def build(folder: Path) -> list[Exhibit]:
    """Makes every exhibit below `folder`, with a few healthy recordings of another speaker for the other split."""
    shown = list(exhibits())
    for exhibit in shown:
        path = folder / exhibit.name
        path.parent.mkdir(parents=True, exist_ok=True)
        exhibit.make(path)
    return shown


def exhibits() -> Iterator[Exhibit]:
    for number in range(4):
        yield Exhibit(f"healthy/{number}.wav", OK, written(speechlike(0.6, RATE, number)))
    yield from _encodings()
    yield from _rates_and_channels()
    yield from _lengths()
    yield from _values()
    yield from _wav_headers()
    yield from _damaged()
    yield from _impostors()
    yield from _names()


def written(
    audio: Samples, rate: int = RATE, format: str = "WAV", subtype: str | None = None
) -> Callable[[Path], object]:
    """By file descriptor, so that the name's extension does not choose the format."""

    def make(path: Path) -> None:
        with path.open("w+b") as file:
            soundfile.write(file, audio, rate, format=format, subtype=subtype)

    return make


def raw(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def _bytes(audio: Samples, rate: int = RATE, format: str = "WAV", subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, audio, rate, format=format, subtype=subtype)
    return buffer.getvalue()


def _encodings() -> Iterator[Exhibit]:
    """Whatever libsndfile writes, under a name that we take for audio."""
    for format in ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "OGG", "MP3", "NIST", "VOC", "IRCAM"):
        for subtype in soundfile.available_subtypes(format):
            rate = (
                8_000
                if "GSM" in subtype or subtype.startswith(("G7", "NMS", "VOX"))
                else 48_000
                if subtype == "OPUS"
                else RATE
            )
            if soundfile.check_format(format, subtype):
                extension = {"FLAC": "flac", "OGG": "ogg", "MP3": "mp3"}.get(format, "wav")
                yield Exhibit(f"encoding/{format}_{subtype}.{extension}", ANY, _tried(format, subtype, rate))


def _tried(format: str, subtype: str, rate: int) -> Callable[[Path], object]:
    """Some pairs pass libsndfile's check and fail when written: what is left of the file is an exhibit all the same."""

    def make(path: Path) -> None:
        try:
            written(speechlike(0.6, rate, 3), rate, format, subtype)(path)
        except soundfile.LibsndfileError:
            path.touch()

    return make


def _rates_and_channels() -> Iterator[Exhibit]:
    for rate in (1, 3, 100, 7_999, 192_001, 384_000, 1_000_000, 2**31 - 1):
        yield Exhibit(f"rate/{rate}.wav", FAILED, written(VOICE, rate))
    for rate in (
        8_000,
        11_025,
        12_000,
        22_050,
        24_000,
        32_000,
        37_800,
        44_100,
        48_000,
        64_000,
        88_200,
        96_000,
        192_000,
    ):
        yield Exhibit(f"rate/{rate}.wav", OK, written(speechlike(0.6, rate, 5), rate))
    for rate in (8_001, 44_056, 47_999, 191_999):  # share little or nothing with 24 kHz
        yield Exhibit(f"rate/{rate}.wav", ANY, written(speechlike(0.6, rate, 5), rate))
    for channels in (2, 3, 5, 6, 8, 12, 24, 64, 255):
        yield Exhibit(f"channels/{channels}.wav", OK, written(np.tile(VOICE[:, None], channels)))


def _lengths() -> Iterator[Exhibit]:
    yield Exhibit("length/0.wav", FAILED, written(VOICE[:0]))
    for samples in (1, 2, 3, 159, 160, 1365, 1366, 2047, 2048, 2049, 4095, 4096, 4097):
        yield Exhibit(f"length/{samples}.wav", TOO_SHORT, written(VOICE[:samples]))
    for tokens in (7, 8, 9):
        for more in (-1, 0, 1):
            audio = speechlike(1, 24_000, 1)[: tokens * 2048 + more]
            yield Exhibit(f"length/{tokens}_tokens_{more:+d}.wav", OK, written(audio, 24_000))


def _values() -> Iterator[Exhibit]:
    n, time = len(VOICE), np.arange(len(VOICE)) / RATE
    harmless = {
        "zeros": np.zeros(n), "dc": np.full(n, 0.5), "nyquist": np.where(np.arange(n) % 2, 1.0, -1.0),
        "click": np.eye(1, n, n // 2)[0], "denormal": np.full(n, 1e-42), "step": np.where(time < 0.3, 0.0, 0.9),
        "one_lsb": np.random.default_rng(0).integers(-1, 2, n) / 32768,
    }  # fmt: skip
    beyond_full_scale = {
        "full_scale": np.ones(n), "minus_full_scale": -np.ones(n), "square": np.sign(np.sin(440 * time)),
        "loud": 8 * VOICE, "very_loud": 1e6 * VOICE,
    }  # fmt: skip
    for name, audio in harmless.items():
        yield Exhibit(f"values/{name}.wav", OK, written(audio, subtype="FLOAT"))
    for name, audio in beyond_full_scale.items():  # at 48 kHz at the latest
        yield Exhibit(f"values/{name}.wav", REJECTED, written(audio, subtype="FLOAT"))
    for name, value in (("nan", np.nan), ("inf", np.inf), ("minus_inf", -np.inf)):
        for place in (0, n // 2, n - 1):
            yield Exhibit(f"values/{name}_{place}.wav", FAILED, written(_with(place, value), subtype="FLOAT"))
            stereo = np.stack([VOICE, _with(place, value)], axis=1)
            yield Exhibit(f"values/{name}_{place}_right.wav", FAILED, written(stereo, subtype="DOUBLE"))
    largest = np.full(n, np.finfo(np.float32).max)  # finite in the file, and nowhere else
    yield Exhibit("values/largest.wav", FAILED, written(largest, subtype="FLOAT"))
    yield Exhibit("values/beyond_float32.wav", FAILED, written(np.full(n, 1e300), subtype="DOUBLE"))


def _with(place: int, value: float) -> Samples:
    return np.where(np.arange(len(VOICE)) == place, value, VOICE)


def _wav_headers() -> Iterator[Exhibit]:
    """A canonical 44 byte header with one field that lies."""
    data = (VOICE * 32767).astype("<i2").tobytes()
    fields = {
        "riff_size": (4, "<I"), "fmt_size": (16, "<I"), "format": (20, "<H"), "channels": (22, "<H"),
        "rate": (24, "<I"), "byte_rate": (28, "<I"), "block_align": (32, "<H"), "bits": (34, "<H"),
        "data_size": (40, "<I"),
    }  # fmt: skip
    for name, (offset, kind) in fields.items():
        largest = 2 ** (8 * struct.calcsize(kind)) - 1
        for value in (0, 1, 7, 4097, largest // 2, largest):
            header = bytearray(wav_header(len(data)))
            struct.pack_into(kind, header, offset, value)
            yield Exhibit(f"header/{name}_{value}.wav", ANY, raw(bytes(header) + data))
    for size in (1, 4, 8, 12, 20, 36, 40, 43, 44, 45):
        yield Exhibit(f"header/only_{size}_bytes.wav", FAILED, raw((wav_header(len(data)) + data)[:size]))
    junk = b"junk" + struct.pack("<I", 1 << 20)
    yield Exhibit(
        "header/junk_chunk_lies.wav", FAILED, raw(wav_header(len(data))[:12] + junk + wav_header(len(data))[12:] + data)
    )
    yield Exhibit("header/garbage_after.wav", OK, raw(wav_header(len(data)) + data + b"garbage" * 99))
    yield Exhibit(
        "header/data_before_fmt.wav", FAILED, raw(b"RIFF\0\0\0\0WAVEdata" + struct.pack("<I", len(data)) + data)
    )


def wav_header(data_bytes: int) -> bytes:
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", 36 + data_bytes, b"WAVE") + form + struct.pack("<4sI", b"data", data_bytes)


def _damaged() -> Iterator[Exhibit]:
    """Cut off, and with a stretch of zeros in the middle."""
    kinds = {
        "wav": ("WAV", "PCM_16"),
        "flac": ("FLAC", "PCM_16"),
        "ogg": ("OGG", "VORBIS"),
        "mp3": ("MP3", "MPEG_LAYER_III"),
    }
    for extension, (format, subtype) in {**kinds, "opus": ("OGG", "OPUS")}.items():
        whole = _bytes(speechlike(2, 48_000, 2), 48_000, format, subtype)
        for percent in (10, 50, 90, 99):
            fate = FAILED if extension != "mp3" else ANY  # an MP3 is frames without a length: any prefix is one
            yield Exhibit(f"damaged/cut_{percent}.{extension}", fate, raw(whole[: len(whole) * percent // 100]))
        middle = len(whole) // 2
        holed = whole[:middle] + bytes(400) + whole[middle + 400 :]
        fate = {"wav": OK, "flac": FAILED}.get(extension, ANY)
        yield Exhibit(f"damaged/hole.{extension}", fate, raw(holed))
        yield Exhibit(f"damaged/twice.{extension}", ANY, raw(whole + whole))


def _impostors() -> Iterator[Exhibit]:
    """Named .wav, and something else."""
    contents = {
        "text": b"no audio\n" * 999,
        "html": b"<script>alert(1)</script>" * 99,
        "json": b'{"path": "x"}',
        "zeros": bytes(10_000),
        "bytes": bytes(range(256)) * 99,
        "gzip": gzip.compress(_bytes(VOICE)),
        "elf": Path("/proc/self/exe").read_bytes()[:9999],
        "pickle": pickle.dumps(print),
        "png": b"\x89PNG\r\n\x1a\n" + bytes(999),
        "avi": b"RIFF\x10\0\0\0AVI " + bytes(999),
    }
    for name, data in contents.items():
        yield Exhibit(f"impostor/{name}.wav", FAILED, raw(data))
    yield Exhibit("impostor/empty.wav", FAILED, raw(b""))
    yield Exhibit("impostor/dangling.wav", FAILED, lambda path: path.symlink_to("nowhere"))
    yield Exhibit("impostor/loop.wav", FAILED, lambda path: path.symlink_to(path.name))
    yield Exhibit("impostor/linked.wav", OK, lambda path: path.symlink_to("../healthy/0.wav"))
    yield Exhibit("impostor/zero_device.wav", FAILED, lambda path: path.symlink_to("/dev/zero"))
    yield Exhibit("impostor/pipe.wav", FAILED, os.mkfifo)
    yield Exhibit("impostor/socket.wav", FAILED, _bind)
    yield Exhibit("impostor/sparse.wav", FAILED, _sparse)


def _bind(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path has at most 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(here)


def _sparse(path: Path) -> None:
    """Ten gigabytes that hold nothing."""
    path.touch()
    os.truncate(path, 10 << 30)


def _names() -> Iterator[Exhibit]:
    stems = [
        "line\nbreak", "tab\ttab", "it's", 'a "quote"', "$(touch x)", "`id`", "a;b|c&d", "%s%n", "back\\slash", "-rf",
        "--help", ".hidden", "two.dots.", "trailing ", " leading", "ÜBER", "é", "e\u0301", "声", "\U0001f600",
        "\u202egnp", "\u200b", "#1", "a,b", "a=b", "?*[x]", "<b>bold</b>", "CON", "{x}", "~", "x" * 251, "声" * 83,
    ]  # fmt: skip
    for number, stem in enumerate(stems):
        yield Exhibit(f"name/{stem}.wav", OK, written(speechlike(0.6, RATE, number)))
    yield Exhibit("name/same.wav", OK, written(VOICE))
    yield Exhibit("name/same.flac", OK, written(VOICE, format="FLAC"))
    yield Exhibit("name/same.WAV", OK, written(VOICE))
    yield Exhibit("name/folder.wav/same.wav", OK, written(VOICE))
    yield Exhibit(
        "name/caf\\xe9.wav", FAILED, lambda path: Path(os.fsdecode(os.fsencode(path.parent) + b"/caf\xe9.wav")).touch()
    )
