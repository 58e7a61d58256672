"""Stage 2: each segment's codes next to its 48 kHz target, in tar shards with sidecars and an index."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile

from codec.audio import AudioError
from pipeline.ahead import map_ahead
from pipeline.calibrate import calibrated
from pipeline.codes import codes_path
from pipeline.execute import Advance, has_failures, run_shards, summarize
from pipeline.fidelity import check_alignment
from pipeline.judging import judge
from pipeline.plan import PLAN_NAME, Plan, rows_sha256
from pipeline.settings import JudgeSettings, TargetsSettings
from pipeline.teachers import Taught, Teacher
from shards.contract import (
    COARSE_48K,
    CODES_SUFFIX,
    FAILED,
    FORMAT_VERSION,
    META_SUFFIX,
    OK,
    TARGET_RATE,
    TARGET_SUFFIX,
    check_sample,
    npy_bytes,
    unflatten_codes,
)
from shards.errors import ShardError, UserError
from shards.files import exclusive
from shards.index import compact, tar_path
from shards.writer import ShardWriter, is_done, read_metadata, read_table

Row = dict[str, Any]
FINISHED_AHEAD = 4  # segments that wait to be written, per thread
Samples = npt.NDArray[np.float32]


def shard_targets(settings: TargetsSettings) -> None:
    """Writes `shards/SPLIT/000000.tar` with its sidecar for each shard of the plan, then `shards/index.parquet`."""
    plan = Plan(settings.work / PLAN_NAME)
    folder = settings.work / "shards"
    with exclusive(settings.work):
        teacher = Teacher(settings)
        calibration = calibrated(settings, plan, teacher)
        limits = {"limits": settings.model_dump(include=set(JudgeSettings.model_fields))}

        def fingerprint(number: int) -> dict[str, Any]:
            codes = _codes_fingerprint(settings.work, plan, number)
            return {
                "format_version": FORMAT_VERSION,
                "target_bits": settings.target_bits,
                **codes,
                **teacher.provenance,
                **limits,
                **calibration,
            }

        def done(number: int) -> bool:
            path = tar_path(folder, *plan.shards[number])
            sidecar = path.with_suffix(".parquet")
            if not is_done(sidecar, fingerprint(number)) or (settings.retry == "failed" and has_failures(sidecar)):
                return False
            return path.exists() and path.stat().st_size == read_metadata(sidecar)["tar_bytes"]

        def make(number: int, advance: Advance) -> None:
            split, shard = plan.shards[number]
            codes = read_table(codes_path(settings.work, split, shard)).to_pylist()
            provenance = fingerprint(number)
            with ShardWriter(folder / split, shard, provenance) as writer:
                for row, members in samples(plan.rows(number), codes, teacher, settings, provenance["snac"]):
                    writer.add(row, members) if members else writer.add_row(row)
                    advance(row["n_samples"] / TARGET_RATE)

        waiting = [number for number in range(len(plan.shards)) if not done(number)]
        settings.write(folder / "settings.json")  # now that no other run's shards stand there
        run_shards("writing targets", plan, waiting, make)
        paths = [tar_path(folder, *shard).with_suffix(".parquet") for shard in plan.shards]
        summarize(paths, settings.max_failed_fraction, f"shards in {folder}, targets by {teacher.name}")
        check_alignment(paths)
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
    plan_rows: list[Row], codes_rows: list[Row], teacher: Teacher, settings: TargetsSettings, snac: str
) -> Iterator[tuple[Row, dict[str, bytes] | None]]:
    """For every segment its sidecar row and, when it has a target, its members, in plan order."""
    if len(plan_rows) != len(codes_rows):
        raise ShardError(f"{len(codes_rows)} rows of codes for {len(plan_rows)} of the plan: make the codes anew")
    pairs = zip(plan_rows, codes_rows, strict=True)
    jobs = [(plan, codes, _sidecar_row(plan, codes)) for plan, codes in pairs]
    wanted = [job for job in jobs if job[2]["status"] == OK]
    recordings = [[plan for plan, _, _ in group] for _, group in groupby(wanted, key=lambda job: job[0]["recording"])]
    names = teacher.names()

    def finish(job: tuple[tuple[Row, Row, Row], Taught | AudioError]) -> tuple[Row, dict[str, bytes] | None]:
        (_, codes, row), taught = job
        if isinstance(taught, AudioError):
            return {**row, "status": FAILED, "reason": str(taught)}, None
        if not np.isfinite(taught.target).all():
            return {**row, "status": FAILED, "reason": "SIDON gave NaN or infinity"}, None
        judged = judge(taught.target, taught.source, settings, taught.restored)
        row = {**row, "teacher": taught.used, **judged}
        if row["status"] != OK:
            return row, None
        meta = {"gain": taught.gain, "teacher": names[taught.used], "snac": snac}
        return row, _members(row, codes["codes"], taught.target, settings.target_bits, meta)

    taught = zip(wanted, teacher.segments(recordings), strict=True)
    finished = map_ahead(finish, taught, settings.threads, FINISHED_AHEAD * settings.threads)
    for _, _, row in jobs:
        yield next(finished) if row["status"] == OK else (row, None)


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
