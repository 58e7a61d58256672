"""Where targets come from: the recordings themselves, SIDON, or both; read, restored in batches, cut into segments.

Threads read recordings ahead; the device restores a bounded number of windows at a time, batched by length; their
outputs are put back in the plan's order and joined per recording. A recording that fails costs its own segments.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from codec.audio import AudioError, Recording, Samples, output_length, probe
from codec.held import Held
from codec.resample import Resampler, passed_hz
from codec.snac import device_of
from pipeline.ahead import Ahead, Clock, chained_ahead, thread_count
from pipeline.bandwidth import BAND_HZ, Spectrum
from pipeline.hybrid import HALF, TRANSITION_HZ, hybrid
from pipeline.level import PEAK, match
from pipeline.recordings import Opener, by_file, check_content
from pipeline.settings import TargetsSettings
from pipeline.sidon import INPUT_RATE, UPSAMPLING, Sidon, high_passed, load_sidon
from pipeline.windows import Grid, Joiner, Window
from shards.contract import COARSE_48K, TARGET_RATE, TEACHERS, Row

RECORDING, SIDON, HYBRID = TEACHERS
WINDOWS_AHEAD = 2  # of each recording that is read ahead
PENDING_BATCHES = 8  # audio that waits for company of its own length, in batches
LENGTH_RATIO = 1.25  # of the longest to the shortest in a batch of a model that knows masks
GROUPS_AHEAD = 1  # gathered and restored: one is read and one is judged while one is restored


@dataclass(frozen=True)
class Survey:
    """What a pass over a whole recording says of it."""

    gain: float = 1.0
    bandwidth_hz: float | None = None
    passed_hz: float = 0.0  # up to where its level outlasts resampling

    @property
    def full_to_hz(self) -> float:
        """Up to where it has its full level at 48 kHz: where a band measures a cliff it has already fallen."""
        return min((self.bandwidth_hz or 0.0) - BAND_HZ, self.passed_hz)


@dataclass(frozen=True)
class Read:
    """A window of recording number `job` as it was read, or why no more of it can be."""

    job: int
    window: Window
    used: str = RECORDING
    gain: float = 1.0
    source: Samples | None = None  # the window's own part, at 48 kHz
    padded: Samples | None = None  # what SIDON hears; None where the recording is its own target
    problem: str | None = None


Restored = tuple[Read, Samples | None]  # with SIDON's output for it


@dataclass(frozen=True)
class Taught:
    """A segment's target, and what it was made from."""

    used: str
    gain: float
    target: Samples
    source: Samples | None = None  # the recording, where the target is not it
    restored: Samples | None = None  # SIDON's part, where the target is more than it
    model_level_db: float = 0.0  # how much louder SIDON spoke than what it heard, before its level was matched


def _names(settings: TargetsSettings, sidon: str) -> dict[str, str]:
    restored = f"sidon: {sidon}"
    mixed = f"recording below {settings.crossover_hz:g} Hz, {restored}"
    return {RECORDING: RECORDING, SIDON: restored, HYBRID: mixed}


def asked_of_sidon(settings: TargetsSettings, sidon: str) -> Row:
    """What is known of the provenance of targets before SIDON is loaded, but for what it is called."""
    names = _names(settings, sidon)
    auto = f"recording from {settings.min_bandwidth_hz:g} Hz of bandwidth, else {names[SIDON]}"
    windows = ("window_seconds", "overlap_seconds", "delay_samples")
    return {
        "teacher": names.get(settings.teacher, auto),
        **{name: getattr(settings, name) for name in windows},
    }


class Teacher:
    """Targets as `settings` ask for them; `sidon` is loaded unless recordings are all that is used."""

    def __init__(self, settings: TargetsSettings, sidon: Sidon | None = None) -> None:
        self.settings = settings
        self.grid = Grid.of(settings.window_seconds, settings.overlap_seconds)
        self.sidon = sidon
        if sidon is None and settings.teacher != RECORDING:
            self.sidon = load_sidon(settings, device_of(settings.devices()[0]))

    def names(self) -> dict[str, str]:
        """What `used` says, in full: for the json of each sample."""
        return {RECORDING: RECORDING} if self.sidon is None else _names(self.settings, self.sidon.describe())

    @property
    def provenance(self) -> Row:
        """What a target's samples depend on, but for what stays below −60 dB: how windows were batched. So a run that
        ran out of memory goes on with a smaller batch_seconds.
        """
        if self.sidon is None:
            return {"teacher": RECORDING}
        of_sidon = {"sidon_sha256": self.sidon.sha256(), "sidon_precision": self.sidon.precision}
        return {**asked_of_sidon(self.settings, self.sidon.describe()), **of_sidon}

    def segments(self, recordings: Sequence[list[Row]]) -> Generator[Taught | AudioError, None, None]:
        """For each plan row of each recording, in order: its target, or why there is none."""
        files = groupby(enumerate(recordings), key=lambda job: by_file(job[1][0]))
        reading = (self._read_file(list(jobs)) for _, jobs in files)
        read = chained_ahead(reading, thread_count(self.settings.threads), WINDOWS_AHEAD)
        gathered = Ahead(self._gathered(read), GROUPS_AHEAD, cores=1)
        restored: Generator[list[Restored], None, None] | Ahead[list[Restored]] = self._restored(gathered)
        if self.settings.gpu != "cpu":  # whose cores serve this thread best: OpenMP wakes others late for a second one
            restored = Ahead(restored, GROUPS_AHEAD, torch.get_num_threads())
        try:
            items = chain.from_iterable(restored)
            for job, group in groupby(items, key=lambda item: item[0].job):
                yield from self._cut(recordings[job], group)
        finally:
            restored.close()
            gathered.close()

    def survey(self, recording: Recording) -> Survey:
        """Raises AudioError for what cannot be read to its end."""
        if self.settings.teacher == RECORDING:
            return Survey()
        spectrum = Spectrum(recording.header.rate) if self.settings.teacher != SIDON else None
        peak = 0.0
        for block in recording.blocks():
            peak = max(peak, float(np.abs(block).max()))
            if spectrum:
                spectrum.add(block)
        return Survey(
            PEAK / peak if peak > 0 else 1.0,
            spectrum.bandwidth_hz() if spectrum else None,
            passed_hz(recording.header.rate, TARGET_RATE),
        )

    def chosen(self, survey: Survey) -> str:
        """Which teacher a recording gets."""
        if self.settings.teacher == "auto":
            return RECORDING if (survey.bandwidth_hz or 0.0) >= self.settings.min_bandwidth_hz else SIDON
        if self.settings.teacher == HYBRID:
            return HYBRID if survey.full_to_hz >= self.settings.crossover_hz + TRANSITION_HZ else SIDON
        return self.settings.teacher

    def _read_file(self, jobs: list[tuple[int, list[Row]]]) -> Iterator[Read]:
        """The windows that the segments of numbered recordings of one file need."""
        opener = Opener(jobs[0][1][0])
        for job, rows in jobs:
            yield from self._read(job, rows, opener)

    def _read(self, job: int, rows: list[Row], opener: Opener) -> Iterator[Read]:
        """The windows that these segments of one recording need."""
        window = Window(0, 0, 0, 0)
        try:
            recording = opener.recording(rows[0])
            check_content(recording, rows)
            survey = self.survey(recording)
            used = self.chosen(survey)
            heard, source = Resampler(recording, INPUT_RATE), Resampler(recording, TARGET_RATE)
            margin = HALF if used == HYBRID else 0
            first, last = (row["start_coarse"] * COARSE_48K for row in (rows[0], rows[-1]))
            reach = first - margin, last + rows[-1]["n_samples"] + margin
            for window in self.grid.windows(recording.length(INPUT_RATE), *reach):
                padded = None
                if used != RECORDING:
                    padded = high_passed(heard.read(*window.padded) * np.float32(survey.gain))
                part = source.read(window.start * UPSAMPLING, window.stop * UPSAMPLING)
                opener.check()
                yield Read(job, window, used, survey.gain if used != RECORDING else 1.0, part, padded)
        except AudioError as error:
            yield Read(job, window, problem=str(error))

    def _gathered(self, items: Iterable[Read]) -> Iterator[list[Read]]:
        """In groups: what waits for company of its length is bounded."""
        group, seconds = list[Read](), 0.0
        for item in items:
            group.append(item)
            seconds += (item.window.stop - item.window.start) / INPUT_RATE
            if self.sidon is None or seconds >= PENDING_BATCHES * self.settings.batch_seconds:
                yield group
                group, seconds = [], 0.0
        yield group

    def _restored(self, groups: Iterable[list[Read]]) -> Generator[list[Restored], None, None]:
        """In order."""
        clock = Clock()
        for items in groups:
            yield list(self._restore_all(items, clock))
        audio, took, idle = clock.figures()
        if audio:
            tqdm.write(f"  {audio:.0f} s of audio restored in {took:.1f} s, the device idle {idle:.0%} of them")

    def _restore_all(self, items: list[Read], clock: Clock) -> Iterator[Restored]:
        outputs: dict[int, Samples] = {}
        for chosen in self._batches({i: len(item.padded) for i, item in enumerate(items) if item.padded is not None}):
            assert self.sidon is not None
            given = [item.padded for i in chosen if (item := items[i]).padded is not None]
            with clock.busy(sum(len(padded) for padded in given) / INPUT_RATE):
                outputs.update(zip(chosen, self.sidon.restore(given), strict=True))
        for i, item in enumerate(items):
            yield item, outputs[i] / np.float32(item.gain) if i in outputs else None

    def _batches(self, lengths: Mapping[int, int]) -> Iterator[list[int]]:
        """Longest first; in a batch all are of one length, or of similar ones where the model knows masks."""
        ratio = LENGTH_RATIO if self.sidon is not None and self.sidon.model.mixes_lengths else 1.0
        batch = list[int]()
        for i in sorted(lengths, key=lengths.__getitem__, reverse=True):
            longest = lengths[batch[0]] if batch else lengths[i]
            too_much = (len(batch) + 1) * longest > self.settings.batch_seconds * INPUT_RATE
            if batch and (too_much or lengths[i] * ratio < longest):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _cut(self, rows: list[Row], group: Iterator[Restored]) -> Iterator[Taught | AudioError]:
        """The segments of one recording from its windows, whose outputs are joined; after a problem, the problem."""
        pieces = Pieces(group)
        problem: AudioError | None = None
        for row in rows:
            if problem is None:
                try:
                    start = row["start_coarse"] * COARSE_48K
                    yield self._taught(pieces, start, start + row["n_samples"])
                    continue
                except AudioError as error:
                    problem = error
            yield problem

    def _taught(self, pieces: Pieces, start: int, stop: int) -> Taught:
        used, gain = pieces.first.used, pieces.first.gain
        if used == HYBRID:
            source, restored = pieces.read(start - HALF, stop + HALF)
            mixed = hybrid(source, restored, self.settings.crossover_hz)
            return Taught(used, gain, mixed, source[HALF:-HALF], restored[HALF:-HALF], pieces.model_level_db)
        source, restored = pieces.read(start, stop)
        if used == RECORDING:
            return Taught(used, gain, source)
        return Taught(used, gain, restored, source, model_level_db=pieces.model_level_db)


def whole_recording(path: Path) -> dict[str, Any]:
    """A file as one row without a plan: what opening it takes, and its length. Raises AudioError."""
    header = probe(path)
    return {
        "recording": str(path),
        "path": str(path),
        "offset": None,
        "first_frame": 0,
        "frames": header.frames,
        "rate": header.rate,
        "channels": header.channels,
        "file_frames": header.frames,
        "file_bytes": path.stat().st_size,
        "start_coarse": 0,
        "n_samples": output_length(header.frames, header.rate, TARGET_RATE),
    }


class Pieces:
    """One recording's windows as two streams that are read together: the recording and its joined restoration, at the
    recording's level.
    """

    def __init__(self, group: Iterator[Restored]) -> None:
        self.first, output = next(group)
        self._group = chain([(self.first, output)], group)
        self._source = Held(self.first.window.start * UPSAMPLING)
        self._restored = Held(self.first.window.first_48k)
        self._joiner = Joiner()
        self.model_level_db = 0.0  # of the window that came last, as `level.match` says it

    def read(self, a: int, b: int) -> tuple[Samples, Samples]:
        """Samples [a, b) of the recording and of its restoration, which is zero where there is none.

        Raises AudioError where the recording could not be read so far.
        """
        is_restored = self.first.padded is not None
        while min(self._source.end, self._restored.end if is_restored else b) < b:
            item, output = next(self._group, (None, None))
            if item is None:
                break  # beyond the recording's end
            if item.problem is not None:
                raise AudioError(item.problem)
            assert item.source is not None
            self._source.append(item.source)
            if output is not None:
                own = slice(item.window.left * UPSAMPLING, item.window.left * UPSAMPLING + len(item.source))
                assert item.padded is not None
                heard_peak = float(np.abs(item.padded).max())
                factor, self.model_level_db = match(item.source, output[own], heard_peak)
                self._restored.append(self._joiner.add(item.window, output * np.float32(factor)))
        return self._source.read(a, b), self._restored.read(a, b) if is_restored else np.zeros(0, np.float32)
