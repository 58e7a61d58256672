"""Recordings, stretches of frames in a file, as mono float32: read from front to back in bounded memory."""

from __future__ import annotations

import errno
import io
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import soundfile

from codec import mp3
from codec.whole import why_not
from shards.files import reason_of_one
from shards.pieces import END_BYTES, Stored

Samples = npt.NDArray[np.float32]

EXTENSIONS = {".wav", ".flac", ".ogg", ".oga", ".mp3", ".opus"}  # of the files that a folder is searched for
DECODED = ".48k.wav"  # how names end that `just decode` gives: they are no recordings
MIN_RATE, MAX_RATE = 8_000, 192_000
BLOCK_FRAMES = 1 << 16
AUDIBLE = 1e-5  # mean square of a block: −50 dB
LEFT_OF_OPPOSITES = 0.01  # of the channels' energy, in their mean: their correlation is below −0.98
MAX_HELD_FRAMES = 1 << 22  # that a decoder keeps: 87 s at 48 kHz, 16 MB
DECODERS = 3  # of one file: a long recording is surveyed, heard by a model and cut
SEEKABLE = {"WAV", "WAVEX", "RF64", "W64", "FLAC", "AIFF"}  # formats in which seeking is exact and quick
MISTAKEN = {"MP3", "FLAC"}  # whose length or places libsndfile may get wrong
ID3V1_BYTES = 128  # at the end of an MP3
SEEKABLE_EXTENSIONS = {".wav", ".flac"}  # of EXTENSIONS, those of such files


class AudioError(Exception):
    """Why a recording cannot be used; it becomes the reason in its rows."""


@dataclass(frozen=True)
class Header:
    frames: int
    rate: int
    channels: int


def probe(path: Stored) -> Header:
    """Length, rate and channels by the file's own word. Raises AudioError."""
    with _open(path) as file:
        if not MIN_RATE <= file.samplerate <= MAX_RATE:
            raise AudioError(f"sample rate {file.samplerate} Hz is outside {MIN_RATE} … {MAX_RATE} Hz")
        if reason := why_not(file, path):
            raise AudioError(reason)
        if file.frames <= 0:
            raise AudioError("holds no audio")
        return Header(file.frames, file.samplerate, file.channels)


def output_length(frames: int, rate: int, rate_out: int) -> int:
    """Samples of `frames` resampled: the whole of the last one counts."""
    return -(-frames * rate_out // rate)


class Decoder:
    """An open file as mono frames. It goes forward, or where its format can seek anywhere; the last frames are kept."""

    def __init__(self, path: Stored, header: Header) -> None:
        self._opened = ExitStack()
        self._file = self._opened.enter_context(_open(path))
        found = Header(self._file.frames, self._file.samplerate, self._file.channels)
        if found != header:
            raise AudioError(
                f"has {found.frames} frames at {found.rate} Hz in {found.channels} channels, planned were "
                f"{header.frames} at {header.rate} Hz in {header.channels}"
            )
        self._seekable = self._file.format in SEEKABLE
        self._kept = deque[Samples]()
        self._kept_from = self.position = 0
        self._problem: str | None = None

    def reaches(self, frame: int) -> bool:
        """Whether it can be asked for `frame`, which may lie behind it."""
        return self._problem is None if self._seekable else self._kept_from <= frame

    def read(self, a: int, b: int) -> Samples:
        """Frames [a, b), which it `reaches`; they are fewer than what is kept."""
        if not self._kept_from <= a <= self.position:
            self._go_to(a)
        while self.position < b:
            block = self._next(b)
            with self._ending():
                self._keep(_mono(block, (self.position - len(block)) / self._file.samplerate))
        start, pieces = self._kept_from, list[Samples]()
        for block in self._kept:
            pieces.append(block[max(a - start, 0) : max(b - start, 0)])
            start += len(block)
        return np.concatenate(pieces)

    def _go_to(self, frame: int) -> None:
        self._kept.clear()
        if self._seekable:
            with self._ending():
                self._file.seek(frame)
            self.position = frame
        while self.position < frame:
            self._next(frame)
        self._kept_from = frame

    def _next(self, stop: int) -> npt.NDArray[np.float32]:
        """A block that ends at `stop` or before it."""
        if self._problem is not None:
            raise AudioError(self._problem)
        with self._ending():
            block = _read(self._file, self.position, min(stop - self.position, BLOCK_FRAMES))
        self.position += len(block)
        return block

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """With an error, which leaves through `_open`. What is broken stays so for all that lies behind it."""
        try:
            yield
        except BaseException as error:
            self._problem = str(error)
            with self._opened:
                raise

    def _keep(self, block: Samples) -> None:
        self._kept.append(block)
        while self.position - self._kept_from > MAX_HELD_FRAMES:
            self._kept_from += len(self._kept.popleft())


class File:
    """A file whose recordings are read in order of their start, each several times if need be: it is decoded once.

    What is longer than a decoder keeps is decoded once for each time; DECODERS of them follow each other.
    """

    def __init__(self, path: Stored, header: Header) -> None:
        self.path, self.header = path, header
        self._decoders = deque[Decoder](maxlen=DECODERS)

    def read(self, a: int, b: int) -> Samples:
        """Mono frames [a, b), at most a block."""
        able = [decoder for decoder in self._decoders if decoder.reaches(a)]
        if not able:
            able = [Decoder(self.path, self.header)]
            self._decoders += able
        return max(able, key=attrgetter("position")).read(a, b)


class Recording:
    """Frames [first, first + frames) of a file. `blocks` may be asked for again; `file` is shared with its neighbours.

    Raises AudioError for what cannot be decoded, ends early, is not finite, or changed since it was measured.
    """

    def __init__(
        self, path: Stored, header: Header, first: int = 0, frames: int | None = None, file: File | None = None
    ) -> None:
        self.path, self.header, self.first = path, header, first
        self.frames = header.frames - first if frames is None else frames
        self._file = file

    def length(self, rate: int) -> int:
        return output_length(self.frames, self.header.rate, rate)

    def blocks(self, start: int = 0) -> Iterator[Samples]:
        """Mono blocks from frame `start` of the recording to its end."""
        file, end = self._file or File(self.path, self.header), self.first + self.frames
        for position in range(self.first + start, end, BLOCK_FRAMES):
            block = file.read(position, min(position + BLOCK_FRAMES, end))
            finite = np.isfinite(block)
            if not finite.all():
                raise AudioError(f"NaN or infinity near {(position + int(finite.argmin())) / self.header.rate:.3f} s")
            yield block


class _Onward(soundfile.SoundFile):
    """A file for libsndfile, through which no error passes: for it the file ends there; the error is kept.

    soundfile's own callbacks print errors, Ctrl-C among them, and go on. And it seeks after every read, to where it
    stands: MP3 would go on there without what its frames share.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._failures = list[BaseException]()
        try:
            super().__init__(file)
        finally:
            self.check()  # of an Ogg whose end cannot be read libsndfile says that it is endless

    def seekable(self) -> bool:
        return False

    def check(self) -> None:
        """Raises what was kept: libsndfile itself would not say which error of the system it was."""
        if self._failures:
            raise self._failures[0]

    def _init_virtual_io(self, file: Any) -> Any:
        ffi, failures = soundfile._ffi, self._failures

        def size(_: Any) -> int:
            place, end = file.tell(), file.seek(0, io.SEEK_END)
            file.seek(place)
            return int(end)

        calls = {
            "get_filelen": size,
            "seek": lambda offset, whence, _: file.seek(offset, whence),
            "read": lambda place, n, _: file.readinto(ffi.buffer(place, n)),
            "tell": lambda _: file.tell(),
        }
        self._virtual_io = {
            name: ffi.callback(f"sf_vio_{name}", call, onerror=lambda _kind, error, _trace: failures.append(error))
            for name, call in calls.items()
        }
        return ffi.new("SF_VIRTUAL_IO*", self._virtual_io)


@contextmanager
def _open(path: Stored) -> Iterator[_Onward]:
    try:
        if path.stat().st_size == 0:
            raise AudioError("the file is empty")
        with ExitStack() as stack:
            file = stack.enter_context(path.open("rb"))
            _fetch_ends(file)
            try:
                sound = stack.enter_context(_sound(file))
            except AudioError:
                if not (begun := mp3.begun(file)):
                    raise
                sound = stack.enter_context(_sound(begun))
            if sound.format in MISTAKEN:
                file = stack.enter_context(path.open("rb"))
                try:
                    told = mp3.whole(file, sound.frames)
                except ValueError as error:
                    raise AudioError(f"not readable as audio: {error}") from error
                if told is not file:
                    sound = stack.enter_context(_sound(told))
            yield sound
    except OSError as error:
        reason = reason_of_one(path, error)
        no_file = error.errno in (errno.ENOENT, errno.ELOOP)  # a link to nowhere, or to itself
        raise AudioError("no such file" if no_file else f"not readable as audio: {reason}") from error


def _fetch_ends(file: IO[bytes]) -> None:
    """What tells a file's length: its beginning, of Ogg its last page, of MP3 a tag.

    soundfile opens one file at a time: for what it had to fetch itself, from a server or a slow disk, all threads wait.
    """
    begin, size = file.read(4), file.seek(0, io.SEEK_END)
    if begin not in (b"RIFF", b"fLaC"):
        file.seek(max(size - (END_BYTES if begin == b"OggS" else ID3V1_BYTES), 0))
        file.read(1)
    file.seek(0)


@contextmanager
def _sound(file: IO[bytes]) -> Iterator[_Onward]:
    """Raises what `file` raises."""
    try:
        with _Onward(file) as sound:
            try:
                yield sound
            finally:
                sound.check()
    except soundfile.LibsndfileError as error:
        raise AudioError(f"not readable as audio: {_reason(error)}") from error


def _read(file: _Onward, position: int, frames: int) -> npt.NDArray[np.float32]:
    """Frames [position, position + frames); the file stands there already, and may be of a kind that cannot seek."""
    try:
        block: npt.NDArray[np.float32] = file.read(frames, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise AudioError(f"broken near {position / file.samplerate:.3f} s: {_reason(error)}") from error
    file.check()
    if len(block) < frames:
        raise AudioError(f"ends at frame {position + len(block)}, its header says {file.frames}")
    return block


def _mono(block: npt.NDArray[np.float32], seconds: float) -> Samples:
    """The channels' mean. Raises AudioError where they are one sound in opposite phase: that is silence."""
    if block.shape[1] == 1:
        return block[:, 0]
    with np.errstate(invalid="ignore", over="ignore"):  # whoever uses it looks for NaN
        mean: Samples = block.mean(axis=1, dtype=np.float64).astype(np.float32)
        energy = np.vdot(block, block) / block.size
        if energy > AUDIBLE and np.vdot(mean, mean) < LEFT_OF_OPPOSITES * energy * len(mean):
            raise AudioError(f"its channels cancel each other near {seconds:.3f} s: keep one of them alone")
    return mean


def _reason(error: soundfile.LibsndfileError) -> str:
    return str(error.error_string).strip().rstrip(".")
