"""Stage 2: each segment's codes next to its 48 kHz target, in tar shards with sidecars and an index."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import soundfile

from codec.audio import AudioError, Resampler
from codec.snac import device_of
from pipeline.codes import codes_path, open_recording
from pipeline.execute import alone, holding, run
from pipeline.fidelity import check_alignment, compare
from pipeline.plan import PLAN_NAME, Plan
from pipeline.settings import TargetsSettings
from pipeline.stage import Advance, Stage
from shards.contract import (
    COARSE_48K,
    CODES_SUFFIX,
    FAILED,
    FORMAT_VERSION,
    META_SUFFIX,
    OK,
    REJECTED,
    TARGET_RATE,
    TARGET_SUFFIX,
    check_sample,
    npy_bytes,
    unflatten_codes,
)
from shards.errors import ShardError, UserError
from shards.index import compact
from shards.storage import Location
from shards.writer import ShardWriter, read_metadata, read_table

Row = dict[str, Any]
MAX_CLIPPED_FRACTION = 0.01
Samples = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Opened:
    """A recording as a teacher gives it: `read(a, b)` returns 48 kHz samples; stretches are asked for in order."""

    read: Callable[[int, int], Samples]
    gain: float = 1.0  # that the recording was given on its way through a model
    source: Callable[[int, int], Samples] | None = None  # the recording itself, where the target is not it


class Teacher(Protocol):
    """Where targets come from."""

    name: str
    provenance: dict[str, Any]  # what a shard's bytes depend on

    def open(self, row: Row) -> Opened: ...


class RecordingTeacher:
    """The recording is its own target."""

    name = "recording"

    def __init__(self) -> None:
        self.provenance = {"teacher": self.name}

    def open(self, row: Row) -> Opened:
        return Opened(Resampler(open_recording(row), TARGET_RATE).read)


class SidonTeacher:
    """SIDON's restoration of the recording, at the recording's level and time."""

    def __init__(self, settings: TargetsSettings) -> None:
        from pipeline.sidon import Restorer, Sidon

        sidon = Sidon(settings.sidon, settings.weights, device_of(settings.gpu))
        windows = settings.model_dump(include={"window_seconds", "overlap_seconds"})
        self.name = f"sidon: {sidon.weights.describe()}"
        self.provenance = {
            "teacher": self.name,
            "sidon_sha256": sidon.weights.sha256,
            "min_correlation": settings.min_correlation,
            **windows,
        }
        self._restorer = lambda row: Restorer(open_recording(row), sidon, **windows)

    def open(self, row: Row) -> Opened:
        restorer = self._restorer(row)
        return Opened(restorer.read, restorer.gain, Resampler(open_recording(row), TARGET_RATE).read)


def shard_targets(settings: TargetsSettings) -> None:
    """Writes `shards/SPLIT/000000.tar` with its sidecar for each shard of the plan, then `shards/index.parquet`."""
    Plan(settings.work / PLAN_NAME)  # before the teacher is loaded
    with holding(settings):
        stage = TargetsStage(settings)
        if run(stage):
            check_alignment([stage.table(number) for number in range(len(stage.plan.shards))])
            with alone(settings, stage.folder):
                compact(stage.folder, stage.plan.shards)


class TargetsStage(Stage):
    """Codes of a shard, and targets by a teacher → its tar and sidecar."""

    doing = "writing targets"
    settings: TargetsSettings

    def __init__(self, settings: TargetsSettings) -> None:
        super().__init__(settings)
        one = settings.model_copy(update={"gpu": settings.devices()[0]})
        self.teacher: Teacher = RecordingTeacher() if settings.teacher == "recording" else SidonTeacher(one)

    @property
    def folder(self) -> Location:
        return self.settings.work / "shards"

    def fingerprint(self, number: int) -> dict[str, Any]:
        codes = _codes_fingerprint(self.settings.work, self.plan, number)
        made = {"format_version": FORMAT_VERSION, "target_bits": self.settings.target_bits}
        return {**made, **codes, **self.teacher.provenance}

    def done(self, number: int) -> bool:
        sidecar = self.table(number)
        tar = sidecar.with_suffix(".tar")
        return super().done(number) and tar.exists() and tar.stat().st_size == read_metadata(sidecar)["tar_bytes"]

    def make(self, number: int, advance: Advance) -> None:
        split, shard = self.plan.shards[number]
        codes = read_table(codes_path(self.settings.work, split, shard)).to_pylist()
        made_from = self.fingerprint(number)
        with ShardWriter(self.folder / split, shard, made_from) as writer:
            for row, members in samples(self.plan.rows(number), codes, self.teacher, self.settings, made_from["snac"]):
                writer.add(row, members) if members else writer.add_row(row)
                advance(row["n_samples"] / TARGET_RATE)


def _codes_fingerprint(work: Location, plan: Plan, number: int) -> dict[str, Any]:
    path = codes_path(work, *plan.shards[number])
    if not path.exists():
        raise UserError(f"{path} is missing: run `just shard-codes` to its end first")
    found: dict[str, Any] = read_metadata(path)["fingerprint"]
    if found["plan_rows"] != plan.rows_sha256[number]:
        raise ShardError(f"{path} was made for another plan: delete {path.parent.parent} and run `just shard-codes`")
    return found


def samples(
    plan_rows: list[Row], codes_rows: list[Row], teacher: Teacher, settings: TargetsSettings, snac: str
) -> Iterator[tuple[Row, dict[str, bytes] | None]]:
    """For every segment its sidecar row and, when it has a target, its members, in plan order."""
    if len(plan_rows) != len(codes_rows):
        raise ShardError(f"{len(codes_rows)} rows of codes for {len(plan_rows)} of the plan: make the codes anew")
    pairs = zip(plan_rows, codes_rows, strict=True)
    for _, segments in groupby(pairs, key=lambda pair: pair[0]["recording"]):
        opened, problem = None, None
        for plan, codes in segments:
            row = _sidecar_row(plan, codes)
            if row["status"] == OK and problem is None:
                try:
                    opened = opened or teacher.open(plan)
                    target = _judged_target(row, opened, plan["start_coarse"] * COARSE_48K, settings.min_correlation)
                except AudioError as error:
                    problem = str(error)
            if row["status"] == OK and problem is not None:
                row.update(status=FAILED, reason=problem)
            if row["status"] != OK or opened is None:
                yield row, None
                continue
            meta = {"gain": opened.gain, "teacher": teacher.name, "snac": snac}
            yield row, _members(row, codes["codes"], target, settings.target_bits, meta)


def _judged_target(row: Row, opened: Opened, start: int, min_correlation: float) -> Samples:
    """The real samples of a segment's target; what was measured of it goes into `row`, a rejection too."""
    stop = start + row["n_samples"]
    target = opened.read(start, stop)
    row.update(measure(target))
    if row["clipped_samples"] > MAX_CLIPPED_FRACTION * len(target):
        row.update(status=REJECTED, reason=f"more than {MAX_CLIPPED_FRACTION:.0%} of it lies beyond full scale")
        return target
    if opened.source is not None:
        row.update(compare(opened.source(start, stop), target))
        if row["correlation"] is not None and row["correlation"] < min_correlation:
            row.update(status=REJECTED, reason=f"envelopes correlate less than min_correlation={min_correlation:g}")
    return target


def _sidecar_row(plan: Row, codes: Row) -> Row:
    if (plan["recording"], plan["segment"]) != (codes["recording"], codes["segment"]):
        raise ShardError(
            f"{codes['key']}: codes of {codes['recording']}, the plan says {plan['recording']}: make both anew"
        )
    copied = {name: codes[name] for name in ("key", "status", "reason", "context_before", "context_after")}
    return {
        **{name: plan[name] for name in ("recording", "group", "segment", "n_coarse", "n_samples")},
        "start_seconds": plan["start_coarse"] * COARSE_48K / TARGET_RATE,
        **copied,
    }


def measure(target: Samples) -> Row:
    """Peak, RMS level (dB re full scale, at least −120) and samples beyond full scale, which will be clipped."""
    rms = math.sqrt(float(np.mean(target.astype(np.float64) ** 2)))
    return {
        "peak": float(np.abs(target).max()),
        "level_db": 20 * math.log10(max(rms, 1e-6)),
        "clipped_samples": int((np.abs(target) > 1).sum()),
    }


def _members(row: Row, codes: list[int], target: Samples, bits: int, provenance: Row) -> dict[str, bytes]:
    names = (
        "recording",
        "group",
        "segment",
        "start_seconds",
        "n_coarse",
        "context_before",
        "context_after",
        "n_samples",
    )
    meta = {
        "format_version": FORMAT_VERSION,
        **{name: row[name] for name in names},
        "sampling_rate": TARGET_RATE,
        **provenance,
    }
    padded = np.pad(target, (0, row["n_coarse"] * COARSE_48K - len(target)))
    flat = np.asarray(codes, dtype=np.int16)
    check_sample(unflatten_codes(flat), len(padded), TARGET_RATE, meta)
    return {
        CODES_SUFFIX: npy_bytes(flat),
        TARGET_SUFFIX: flac_bytes(padded, bits),
        META_SUFFIX: json.dumps(meta, sort_keys=True).encode(),
    }


def flac_bytes(samples: Samples, bits: int) -> bytes:
    """Full scale is 2^(bits − 1); what lies beyond is clipped, never wrapped."""
    full = 2 ** (bits - 1)
    whole = np.clip(np.round(samples.astype(np.float64) * full), -full, full - 1).astype(np.int32) << (32 - bits)
    buffer = io.BytesIO()
    soundfile.write(buffer, whole, TARGET_RATE, format="FLAC", subtype=f"PCM_{bits}")
    return buffer.getvalue()
