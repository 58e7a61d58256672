"""Recordings → segments → shards, frozen in plan.parquet before any model runs.

So what a shard holds does not depend on how many workers ran, or on when they died.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from codec.audio import AudioError, Header, output_length, probe
from codec.snac import coarse_length
from pipeline.settings import CodesSettings
from pipeline.sources import Source, find
from shards.contract import (
    COARSE_48K,
    CODEC_RATE,
    FAILED,
    OK,
    PLAN_SCHEMA,
    SPLITS,
    TARGET_RATE,
    TOO_SHORT,
    coarse_tokens,
)
from shards.errors import UserError
from shards.files import replacing
from shards.writer import differences, encode_metadata, naming, read_metadata, read_table

PLAN_NAME = "plan.parquet"
PROBE_THREADS = 8
END_TOLERANCE_SECONDS = 0.01  # a manifest's end may lie this far after the file's: people round
PLANNED_BY = ("audio", "segment_length", "min_seconds", "segments_per_shard", "validation_fraction", "seed")


@dataclass(frozen=True)
class Measured:
    """A source with its header and the frames that it takes, or with the reason why it cannot be used."""

    source: Source
    header: Header = Header(0, 0, 0)  # noqa: RUF009 (frozen)
    first_frame: int = 0
    frames: int = 0
    file_bytes: int = 0
    problem: str | None = None


class Plan:
    """plan.parquet: one row group per shard, so a worker holds only the rows of the shard that it makes."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise UserError(f"{path} is missing: run `just shard-codes` first")
        metadata = read_metadata(path)
        if not {"settings", "shards", "seconds"} <= metadata.keys():
            raise UserError(f"{path} is no plan: delete it and run `just shard-codes` again")
        self._path, self._file = path, pq.ParquetFile(path)
        self.shards: list[tuple[str, int]] = [(split, shard) for split, shard in metadata["shards"]]
        self.seconds: list[float] = metadata["seconds"]

    def rows(self, number: int) -> list[dict[str, Any]]:
        """The rows of the shard that is `number` in `shards`."""
        with naming(self._path):
            rows: list[dict[str, Any]] = self._file.read_row_group(number).to_pylist()
        return rows


def rows_sha256(rows: Iterable[dict[str, Any]]) -> str:
    """Identifies a shard's plan; where its files lie is no part of it."""
    stripped = [{name: value for name, value in row.items() if name != "path"} for row in rows]
    return hashlib.sha256(json.dumps(stripped, sort_keys=True).encode()).hexdigest()


def make_plan(settings: CodesSettings) -> Plan:
    """The plan in `work`, made now if there is none. Raises UserError when it was made with other settings."""
    path = settings.work / PLAN_NAME
    asked = {**settings.model_dump(mode="json", include={*PLANNED_BY, "group_pattern"})}
    if path.exists():
        changed = differences(read_metadata(path)["settings"], asked)
        if changed:
            raise UserError(f"{path} was made with other settings ({changed}): use another work= or delete it")
        _check_nothing_is_new(path, settings)
        return Plan(path)
    sources, ignored = find(settings.audio, settings.group_pattern)
    if ignored:
        tqdm.write(f"ignored: {', '.join(f'{n} × {name}' for name, n in ignored.most_common())}")
    measured = _measure_all(sources)
    usable = [recording.source for recording in measured if not recording.problem]
    splits = assign_splits(usable or sources, settings.validation_fraction, settings.seed)
    _write(path, measured, splits, settings, asked)
    return Plan(path)


def _check_nothing_is_new(path: Path, settings: CodesSettings) -> None:
    """Raises UserError for recordings that were added since; where the audio is gone, the plan stands alone."""
    if not settings.audio.exists():
        return
    planned = set(read_table(path, columns=["recording"])["recording"].unique().to_pylist())
    new = [source.id for source in find(settings.audio, settings.group_pattern)[0] if source.id not in planned]
    if new:
        raise UserError(
            f"{len(new)} recordings such as {new[0]!r} were added to {settings.audio} after {path} was made: "
            "take another work= for them, or delete this one to plan anew"
        )


def assign_splits(sources: Iterable[Source], fraction: float, seed: int) -> dict[str, str]:
    """Group → split, by the hash of the group's name; the manifest's own word comes first.

    With two groups or more neither split is empty. Raises UserError when that cannot be, or a group would be cut.
    """
    given: dict[str, str | None] = {}
    for source in sources:
        if given.setdefault(source.group, source.split) != source.split:
            found = f"{given[source.group] or 'no split'} and {source.split or 'no split'}"
            raise UserError(f"group {source.group!r} stands in more than one split ({found}): it must stay in one")
    splits = {group: split or _by_hash(group, fraction, seed) for group, split in given.items()}
    free = sorted((group for group, split in given.items() if not split), key=lambda group: _hash(group, seed))
    for split, candidates in (("validation", free), ("train", free[::-1])):
        if split not in splits.values():
            if len(splits) < 2 or not candidates:
                raise UserError(
                    f"no group is left for {split}: found {len(splits)} group(s) such as {next(iter(splits))!r}. Put "
                    "speakers into folders, name them in a manifest, or set group_pattern='(.*)' to split by recording"
                )
            splits[candidates[0]] = split
    return splits


def _by_hash(group: str, fraction: float, seed: int) -> str:
    return "validation" if _hash(group, seed) < fraction * 2**64 else "train"


def _hash(text: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{text}".encode()).digest()[:8], "big")


def _measure_all(sources: list[Source]) -> list[Measured]:
    with ThreadPoolExecutor(PROBE_THREADS) as pool:
        results = pool.map(_measure, sources)
        return list(tqdm(results, total=len(sources), desc="reading headers", unit="file", disable=None))


def _measure(source: Source) -> Measured:
    if source.problem:
        return Measured(source, problem=source.problem)
    try:
        path = Path(source.path)
        header = probe(path)
        seconds = header.frames / header.rate
        first = round(min(source.start_seconds, seconds) * header.rate)
        end = round(min(seconds if source.end_seconds is None else source.end_seconds, seconds) * header.rate)
        if first >= end or (source.end_seconds or 0) > seconds + END_TOLERANCE_SECONDS:
            asked = f"{source.start_seconds:g} … {source.end_seconds} s"
            raise AudioError(f"{asked} is not inside its {seconds:g} s, or holds no sample")
        return Measured(source, header, first, end - first, path.stat().st_size)
    except (AudioError, OSError) as error:
        return Measured(source, problem=str(error))


def _write(
    path: Path, recordings: list[Measured], splits: dict[str, str], settings: CodesSettings, asked: dict[str, Any]
) -> None:
    shards, seconds = [], []
    with replacing(path) as temporary, pq.ParquetWriter(temporary, PLAN_SCHEMA, compression="zstd") as writer:
        for split in SPLITS:
            chosen = [recording for recording in recordings if splits.get(recording.source.group, "train") == split]
            chosen.sort(key=lambda recording: _hash(recording.source.id, settings.seed))
            for shard, rows in enumerate(_deal(chosen, settings)):
                for number, row in enumerate(rows):
                    row.update(split=split, shard=shard, row=number)
                writer.write_table(pa.Table.from_pylist(rows, schema=PLAN_SCHEMA))
                shards.append((split, shard))
                seconds.append(sum(row["n_samples"] for row in rows) / TARGET_RATE)
        writer.add_key_value_metadata(encode_metadata({"settings": asked, "shards": shards, "seconds": seconds}))


def _deal(recordings: Iterable[Measured], settings: CodesSettings) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    for recording in recordings:
        for row in _segments(recording, coarse_tokens(settings.segment_length), settings.min_seconds):
            rows.append(row)
            if len(rows) == settings.segments_per_shard:
                yield rows
                rows = []
    if rows:
        yield rows


def _segments(recording: Measured, length: int, min_seconds: float) -> Iterator[dict[str, Any]]:
    """The rows of one recording; a recording that cannot be used has one row, with the reason."""
    source, header = recording.source, recording.header
    common = {
        "recording": source.id,
        "group": source.group,
        "path": source.path,
        "first_frame": recording.first_frame,
        "frames": recording.frames,
        "rate": header.rate,
        "channels": header.channels,
        "file_frames": header.frames,
        "file_bytes": recording.file_bytes,
    }
    if recording.problem:
        nothing = {"segment": 0, "start_coarse": 0, "n_coarse": 0, "n_samples": 0}
        yield {**common, **nothing, "status": FAILED, "reason": recording.problem}
        return
    total = coarse_length(output_length(recording.frames, header.rate, CODEC_RATE))
    samples = output_length(recording.frames, header.rate, TARGET_RATE)
    for segment, start in enumerate(range(0, total, length)):
        n_coarse = min(length, total - start)
        n_samples = min(n_coarse * COARSE_48K, samples - start * COARSE_48K)
        short = n_samples < min_seconds * TARGET_RATE
        yield {
            **common,
            "segment": segment,
            "start_coarse": start,
            "n_coarse": n_coarse,
            "n_samples": n_samples,
            "status": TOO_SHORT if short else OK,
            "reason": f"shorter than min_seconds={min_seconds:g}" if short else None,
        }
