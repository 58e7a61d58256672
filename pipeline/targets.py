"""Stage 2: each segment's codes next to its 48 kHz target, in tar shards with sidecars and an index."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import soundfile

from codec.audio import AudioError, Resampler
from codec.snac import device_of
from pipeline.codes import codes_path, open_recording
from pipeline.execute import run_shards, summarize
from pipeline.plan import PLAN_NAME, Plan, rows_sha256
from pipeline.settings import TargetsSettings
from shards.contract import (
    COARSE_48K,
    CODES_SUFFIX,
    FAILED,
    FORMAT_VERSION,
    META_SUFFIX,
    OK,
    TARGET_RATE,
    TARGET_SUFFIX,
    npy_bytes,
)
from shards.errors import ShardError, UserError
from shards.files import exclusive
from shards.index import compact, tar_path
from shards.writer import ShardWriter, is_done, read_metadata

Row = dict[str, Any]
Samples = npt.NDArray[np.float32]


class Teacher(Protocol):
    """Where targets come from: opens a plan row's recording as a reader of 48 kHz samples."""

    name: str
    provenance: dict[str, Any]

    def open(self, row: Row) -> tuple[Callable[[int, int], Samples], float]:
        """→ read(a, b) and the gain that the recording was given on its way through the model."""


class RecordingTeacher:
    """The recording is its own target."""

    name = "recording"
    provenance: dict[str, Any] = {"teacher": "recording"}  # noqa: RUF012

    def open(self, row: Row) -> tuple[Callable[[int, int], Samples], float]:
        return Resampler(open_recording(row), TARGET_RATE).read, 1.0


class SidonTeacher:
    """SIDON's restoration of the recording, at the recording's level and time."""

    def __init__(self, settings: TargetsSettings) -> None:
        from pipeline.sidon import Restorer, Sidon

        sidon = Sidon(settings.sidon, settings.weights, device_of(settings.gpu))
        self.name = f"sidon: {sidon.weights.describe()}"
        self.provenance = {
            "teacher": self.name,
            "sidon_sha256": sidon.weights.sha256,
            **settings.model_dump(include={"window_seconds", "overlap_seconds"}),
        }
        self._restorer = lambda row: Restorer(
            open_recording(row), sidon, settings.window_seconds, settings.overlap_seconds
        )

    def open(self, row: Row) -> tuple[Callable[[int, int], Samples], float]:
        restorer = self._restorer(row)
        return restorer.read, restorer.gain


def shard_targets(settings: TargetsSettings) -> None:
    """Writes `shards/SPLIT/000000.tar` with its sidecar for each shard of the plan, then `shards/index.parquet`."""
    plan = Plan(settings.work / PLAN_NAME)
    folder = settings.work / "shards"
    with exclusive(settings.work):
        teacher: Teacher = RecordingTeacher() if settings.teacher == "recording" else SidonTeacher(settings)
        settings.write(folder / "settings.json")

        def fingerprint(number: int) -> dict[str, Any]:
            codes = _codes_fingerprint(settings.work, plan, number)
            return {
                "format_version": FORMAT_VERSION,
                "target_bits": settings.target_bits,
                **codes,
                **teacher.provenance,
            }

        def done(number: int) -> bool:
            path = tar_path(folder, *plan.shards[number])
            sidecar = path.with_suffix(".parquet")
            if not is_done(sidecar, fingerprint(number)):
                return False
            return path.exists() and path.stat().st_size == read_metadata(sidecar)["tar_bytes"]

        def make(number: int) -> None:
            split, shard = plan.shards[number]
            codes = pq.read_table(codes_path(settings.work, split, shard)).to_pylist()
            with ShardWriter(folder / split, shard, fingerprint(number)) as writer:
                for row, members in samples(
                    plan.rows(number), codes, teacher, settings.target_bits, fingerprint(number)
                ):
                    writer.add(row, members) if members else writer.add_row(row)

        run_shards("writing targets", plan, done, make)
        paths = [tar_path(folder, *shard).with_suffix(".parquet") for shard in plan.shards]
        summarize(paths, settings.max_failed_fraction, f"shards in {folder}, targets by {teacher.name}")
        compact(folder, plan.shards)


def _codes_fingerprint(work: Path, plan: Plan, number: int) -> dict[str, Any]:
    path = codes_path(work, *plan.shards[number])
    if not path.exists():
        raise UserError(f"{path} is missing: run `just shard-codes` to its end first")
    found: dict[str, Any] = read_metadata(path)["fingerprint"]
    if found["plan_rows"] != rows_sha256(plan.rows(number)):
        raise ShardError(f"{path} was made for another plan: delete {path.parent.parent} and run `just shard-codes`")
    return found


def samples(
    plan_rows: list[Row], codes_rows: list[Row], teacher: Teacher, bits: int, provenance: Row
) -> Iterator[tuple[Row, dict[str, bytes] | None]]:
    """For every segment its sidecar row and, when it has a target, its members, in plan order."""
    pairs = zip(plan_rows, codes_rows, strict=True)
    for _, recording in groupby(pairs, key=lambda pair: pair[0]["recording"]):
        read, gain, problem = None, 1.0, None
        for plan, codes in recording:
            row = _sidecar_row(plan, codes)
            if row["status"] == OK and problem is None:
                try:
                    if read is None:
                        read, gain = teacher.open(plan)
                    start = plan["start_coarse"] * COARSE_48K
                    target = read(start, start + plan["n_samples"])
                except AudioError as error:
                    problem = str(error)
            if row["status"] == OK and problem is not None:
                row.update(status=FAILED, reason=problem)
            if row["status"] != OK:
                yield row, None
                continue
            row.update(measure(target))
            meta = {"gain": gain, "teacher": teacher.name, "snac": provenance["snac"]}
            yield row, _members(row, codes["codes"], target, bits, meta)


def _sidecar_row(plan: Row, codes: Row) -> Row:
    assert (plan["recording"], plan["segment"]) == (codes["recording"], codes["segment"]), "codes of another segment"
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
    return {
        CODES_SUFFIX: npy_bytes(np.asarray(codes, dtype=np.int16)),
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
