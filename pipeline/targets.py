"""Stage 2: each segment's codes next to its 48 kHz target, in tar shards with sidecars and an index."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import soundfile

from codec.audio import AudioError, Samples
from configs.progress import progress_bar
from pipeline.ahead import map_ahead, thread_count
from pipeline.calibrate import FILE as CALIBRATION
from pipeline.calibrate import calibrated, check, show
from pipeline.codes import codes_path
from pipeline.execute import alone, ask, holding, makes_elsewhere, one_slice, run, selected
from pipeline.fidelity import check_alignment
from pipeline.judging import judge
from pipeline.plan import Plan
from pipeline.settings import JudgeSettings, TargetsSettings
from pipeline.stage import Advance, Stage, made_with
from pipeline.teachers import RECORDING, Taught, Teacher, asked_of_sidon
from pipeline.twins import say_twins
from shards.contract import (
    COARSE_48K,
    CODES_SUFFIX,
    FAILED,
    FORMAT_VERSION,
    META_SUFFIX,
    OK,
    PLAN_NAME,
    SAID_TWICE,
    TARGET_RATE,
    TARGET_SUFFIX,
    Row,
    check_sample,
    npy_bytes,
    sample_key,
    unflatten_codes,
)
from shards.errors import ShardError, UserError
from shards.index import compact, forget
from shards.reader import split_members
from shards.storage import Location
from shards.stretch import read_at
from shards.writer import ShardWriter, fingerprint_of, may_hold, naming, read_footer, read_table, told_by

# Raise it when the same recordings, codes and settings give other shards than before: read, resampled, restored, judged
# or compressed anew. What is read and resampled otherwise gives other codes too: CODES_VERSION.
TARGETS_VERSION = 1

FINISHED_AHEAD = 4  # segments that wait to be written, per thread


def shard_targets(settings: TargetsSettings) -> list[str] | None:
    """Writes `shards/SPLIT/000000.tar` with its sidecar for each shard of the plan, then `shards/index.parquet`.
    Returns the command that follows once all stand.
    """
    plan = Plan(settings.work / PLAN_NAME)
    with holding(settings):
        if settings.teacher != RECORDING:
            _check_first(settings, plan)
        stage = TargetsStage(settings, known_to(settings), plan)
        if stage.known.calibration:
            show(stage.known.calibration)
            check(stage.known.calibration, settings)
        complete = run(stage)
        if complete:
            sidecars = [stage.table(number) for number in range(len(stage.plan.shards))]
            check_alignment(sidecars, settings.max_lag_samples / 2)
            shards, calibration = stage.plan.shards, {"calibration": stage.known.calibration}
            bar = progress_bar(total=len(shards), desc="index", unit="shard", leave=False)
            with alone(settings, stage.folder), bar:
                compact(stage.folder, shards, calibration, bar.update)
                say_twins(stage.folder)
    return ["just", "train", f"shards={stage.folder}", "run=RUN", f"gpu={settings.gpu}"] if complete else None


def _check_first(settings: TargetsSettings, plan: Plan) -> None:
    """Raises UserError, before the hub is asked for SIDON, where the first shard lacks its codes or was made with other
    settings. The SIDON that made it is taken for that of this run.
    """
    for number in selected(len(plan.shards), settings)[:1]:
        stage = TargetsStage(settings, Known({}, None), plan)
        path = stage.table(number)
        footer = read_footer(path)
        found = fingerprint_of(path, told_by(path, footer)) if footer else {}
        asked = asked_of_sidon(settings, str(found.get("teacher")).partition("sidon: ")[2] or "…")
        same: Row = {name: found[name] for name in ("sidon_sha256", "sidon_precision") if name in found}
        stage.known = Known({**asked, **same}, None)
        stage.made(number)


@dataclass(frozen=True)
class Known:
    """What a run must know of its teacher, wherever that is loaded."""

    provenance: Row
    calibration: Row | None  # None without SIDON


def known_to(settings: TargetsSettings) -> Known | None:
    """Found out elsewhere, where other processes restore; None where this one may find out itself."""
    if settings.teacher == RECORDING or not makes_elsewhere(settings):
        return None
    with alone(settings, settings.work / CALIBRATION):
        found: Known = ask(TargetsStage, settings)
    return found


class TargetsStage(Stage):
    """Codes of a shard, and targets by a teacher → its tar and sidecar."""

    doing = "writing targets"
    mendable = pc.field("context_before").is_valid()  # it has codes
    settings: TargetsSettings

    known: Known

    def __init__(self, settings: TargetsSettings, known: Known | None = None, plan: Plan | None = None) -> None:
        super().__init__(settings)
        if plan:  # of 90 million rows it takes a while
            self.plan = plan
        self.known = known or self._find_out()
        if precision := self.known.provenance.get("sidon_precision"):  # the same wherever else shards are made
            self.settings = settings.model_copy(update={"sidon_precision": precision})

    def _find_out(self) -> Known:
        with alone(self.settings, self.settings.work / CALIBRATION):
            return Known(self.teacher.provenance, calibrated(self.settings, self.plan, self.teacher))

    @cached_property
    def teacher(self) -> Teacher:
        return Teacher(self.settings)

    @property
    def folder(self) -> Location:
        return self.settings.work / "shards"

    def fingerprint(self, number: int) -> dict[str, Any]:
        codes = _codes_fingerprint(self.settings.work, self.plan, number)
        made = {
            "format_version": FORMAT_VERSION,
            "targets_version": TARGETS_VERSION,
            "target_bits": self.settings.target_bits,
        }
        limits = self.settings.model_dump(include=set(JudgeSettings.model_fields))
        return {**made, **codes, **self.known.provenance, "limits": limits}

    def footer(self, number: int) -> pq.FileMetaData | None:
        sidecar, footer = self.table(number), super().footer(number)
        with suppress(FileNotFoundError):
            if footer and sidecar.with_suffix(".tar").stat().st_size == told_by(sidecar, footer)["tar_bytes"]:
                return footer
        return None

    def can_be_mended(self, number: int, footer: pq.FileMetaData) -> bool:
        with naming(self.table(number)):
            failed = may_hold(footer, "status", FAILED)
        return super().can_be_mended(number, footer) or (failed and self._codes_came_later(number))

    def _codes_came_later(self, number: int) -> bool:
        """Whether stage 1 has mended segments since the shard was made."""
        paths = codes_path(self.settings.work, *self.plan.shards[number]), self.table(number)
        now, then = (read_table(path, columns=["context_before"])["context_before"] for path in paths)
        return bool(pc.any(pc.and_(pc.is_valid(now), pc.is_null(then))).as_py())

    def make(self, number: int, advance: Advance) -> None:
        split, shard = self.plan.shards[number]
        planned = self.plan.rows(number)
        codes = read_table(codes_path(self.settings.work, split, shard)).to_pylist()
        made_from, kept = self.fingerprint(number), self.kept(number)
        again, theirs = ([row for place, row in enumerate(rows) if place not in kept] for rows in (planned, codes))
        restoring = samples(again, theirs, self.teacher, self.settings, made_from["snac"])
        fresh: Iterator[tuple[Row, dict[str, bytes] | None]] = restoring
        if kept:
            made = list(fresh)
            places = [place for place in range(len(planned)) if place not in kept]
            if self.holds(number, dict(zip(places, (row for row, _ in made), strict=True))):
                return
            fresh = iter(made)
        standing = self._standing(number, kept, codes)
        with (
            closing(restoring),
            ExitStack() as together,
            ShardWriter(self.split_folder(number), shard, made_from, {"made_with": made_with()}) as writer,
        ):
            for place in range(len(planned)):
                row, members = next(standing if place in kept else fresh)
                writer.add(row, members) if members else writer.add_row(row)
                advance(row["n_samples"] / TARGET_RATE)
            if read_footer(self.table(number)):
                if self.settings.slice_count and isinstance(self.settings.work, Path):
                    together.enter_context(one_slice(self.settings.work, self.folder))  # no index of what is replaced
                forget(self.folder)

    def _standing(
        self, number: int, kept: Mapping[int, Row], codes: Sequence[Row]
    ) -> Iterator[tuple[Row, dict[str, bytes] | None]]:
        """The `kept` rows of the shard that is made again, with their samples as they are."""
        path = self.table(number).with_suffix(".tar")
        with path.open("rb") as tar:
            for place, row in kept.items():
                if row["status"] != OK:
                    yield row, None
                    continue
                data = read_at(tar, row["offset"], row["length"])
                if zlib.crc32(data) != row["crc32"]:
                    raise ShardError(f"{path}: {row['key']} is damaged: delete the tar, its shard is made anew")
                members = split_members(data, row["key"], path)
                now = codes[place]["codes"]
                if now is not None and npy_bytes(np.asarray(now, np.int16)) != members[CODES_SUFFIX]:
                    raise ShardError(
                        f"{path}: {row['key']} has other codes than codes/: delete the tar, its shard is made anew"
                    )
                yield row, {suffix: members[suffix] for suffix in (CODES_SUFFIX, TARGET_SUFFIX, META_SUFFIX)}


def _codes_fingerprint(work: Location, plan: Plan, number: int) -> dict[str, Any]:
    path = codes_path(work, *plan.shards[number])
    footer = read_footer(path)
    if footer is None:
        raise UserError(f"{path} is missing: run `just shard-codes` to its end first")
    found = fingerprint_of(path, told_by(path, footer))
    if found.get("plan_rows") != plan.rows_sha256[number]:
        raise ShardError(f"{path} was made for another plan: delete {path.parent.parent} and run `just shard-codes`")
    return found


def samples(
    plan_rows: list[Row], codes_rows: list[Row], teacher: Teacher, settings: TargetsSettings, snac: str
) -> Generator[tuple[Row, dict[str, bytes] | None], None, None]:
    """For every segment its sidecar row and, when it has a target, its members, in plan order."""
    if len(plan_rows) != len(codes_rows):
        raise ShardError(f"{len(codes_rows)} rows of codes for {len(plan_rows)} of the plan: make the codes anew")
    pairs = zip(plan_rows, codes_rows, strict=True)
    jobs = [(plan, codes, _sidecar_row(plan, codes)) for plan, codes in pairs]
    wanted = [job for job in jobs if job[2]["status"] == OK]
    rows = ({**plan, "content_crc32": codes.get("content_crc32")} for plan, codes, _ in wanted)
    recordings = [list(group) for _, group in groupby(rows, key=itemgetter("recording"))]
    names = teacher.names()

    def finish(job: tuple[tuple[Row, Row, Row], Taught | AudioError]) -> tuple[Row, dict[str, bytes] | None]:
        (_, codes, row), taught = job
        if isinstance(taught, AudioError):
            return {**row, "status": FAILED, "reason": str(taught)}, None
        if not np.isfinite(taught.target).all():
            reason = f"the target (teacher: {taught.used}) holds NaN or infinity"
            return {**row, "status": FAILED, "reason": reason}, None
        judged = judge(taught.target, taught.source, settings, taught.restored)
        row = {**row, "teacher": taught.used, **judged}
        if row["status"] != OK:
            return row, None
        meta = {"gain": taught.gain, "teacher": names[taught.used], "snac": snac}
        return row, _members(row, codes["codes"], taught.target, settings.target_bits, meta)

    threads = thread_count(settings.threads)
    with closing(teacher.segments(recordings)) as segments:
        taught = zip(wanted, segments, strict=True)
        with closing(map_ahead(finish, taught, threads, FINISHED_AHEAD * threads)) as finished:
            for _, _, row in jobs:
                yield next(finished) if row["status"] == OK else (row, None)


def _sidecar_row(plan: Row, codes: Row) -> Row:
    if (plan["recording"], plan["segment"]) != (codes["recording"], codes["segment"]):
        raise ShardError(
            f"{codes['key']}: codes of {codes['recording']}, the plan says {plan['recording']}: make both anew"
        )
    if codes["key"] != (key := sample_key(plan["shard"], plan["row"])):
        raise ShardError(
            f"codes of {plan['recording']} have the key {codes['key']!r}, planned is {key}: make both anew"
        )
    copied = {name: codes[name] for name in ("key", "status", "reason", "context_before", "context_after")}
    return {
        **{name: plan[name] for name in ("recording", "group", "segment", "n_coarse", "n_samples")},
        "start_seconds": plan["start_coarse"] * COARSE_48K / TARGET_RATE,
        **copied,
    }


def _members(row: Row, codes: list[int], target: Samples, bits: int, provenance: Row) -> dict[str, bytes]:
    meta = {
        "format_version": FORMAT_VERSION,
        **{name: row[name] for name in SAID_TWICE},
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
