"""Measured recordings → segments → shards: which group is in which split, and in which order all is dealt out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.settings import CodesSettings
from pipeline.splits import assign_splits, hashed
from shards.contract import (
    COARSE_24K,
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

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shard:
    split: str
    number: int
    rows: pa.Table


def new_shards(
    recordings: pa.Table, settings: CodesSettings, known: Mapping[str, str], numbers: Mapping[str, int]
) -> Iterator[Shard]:
    """The shards of measured recordings, split by split."""
    usable = recordings.filter(pc.field("problem").is_null())
    pairs = (usable if len(usable) else recordings).group_by(["group", "split"]).aggregate([])
    given = zip(pairs["group"].to_pylist(), pairs["split"].to_pylist(), strict=True)
    try:
        splits = assign_splits(given, settings.validation_fraction, settings.seed, known)
    except UserError as error:
        if len(usable) == len(recordings):
            raise
        first = recordings.filter(pc.field("problem").is_valid()).slice(0, 1).to_pylist()[0]
        lost = f"{len(recordings) - len(usable)} of {len(recordings)} recordings cannot be used"
        raise UserError(f"{error}. {lost}, such as {first['recording']}: {first['problem']}") from error
    chosen = np.array([SPLITS.index(splits.get(group, "train")) for group in recordings["group"].to_pylist()])
    order = _order(recordings, settings.seed)
    for place, split in enumerate(SPLITS):
        members = order[chosen[order] == place]
        yield from _deal(recordings.take(pa.array(members)), split, numbers.get(split, 0), settings)


def _order(recordings: pa.Table, seed: int) -> npt.NDArray[np.intp]:
    """That in which the ids of each file's first recording hash, so that a file's stretches are read in one go.

    A file's recordings follow each other by their start; each one that cannot be used is for itself.
    """
    hashes = np.fromiter((hashed(id, seed) for id in recordings["recording"].to_pylist()), np.uint64)
    first, offset = recordings["first_frame"].to_numpy(), pc.fill_null(recordings["offset"], -1).to_numpy()
    path = recordings["path"].combine_chunks().dictionary_encode().indices.to_numpy()
    path = np.where(recordings["rate"].to_numpy() > 0, path, -1 - np.arange(len(path)))
    order = np.lexsort((first, offset, path))
    begins = (np.diff(path[order], prepend=path.size) != 0) | (np.diff(offset[order], prepend=-2) != 0)
    hashes[order] = hashes[order[begins]][np.cumsum(begins) - 1]
    return np.lexsort((first, hashes))


def _deal(recordings: pa.Table, split: str, first: int, settings: CodesSettings) -> Iterator[Shard]:
    """Segments of `recordings`, in their order, `segments_per_shard` at a time."""
    segments = Segments(recordings, coarse_tokens(settings.segment_length))
    for start in range(0, len(segments), settings.segments_per_shard):
        number = first + start // settings.segments_per_shard
        rows = segments.rows(start, start + settings.segments_per_shard, settings.min_seconds)
        rows = rows.drop_columns("split").append_column("split", pa.array([split] * len(rows)))
        rows = rows.append_column("shard", pa.array(np.full(len(rows), number)))
        rows = rows.append_column("row", pa.array(np.arange(len(rows))))
        yield Shard(split, number, rows.select(PLAN_SCHEMA.names).cast(PLAN_SCHEMA))


class Segments:
    """Every recording in stretches of `length` coarse tokens; one that cannot be used has one, empty, row."""

    def __init__(self, recordings: pa.Table, length: int) -> None:
        self._recordings, self._length = recordings, length
        frames = recordings["frames"].to_numpy()
        rate = np.maximum(recordings["rate"].to_numpy().astype(np.int64), 1)
        self._samples = _divided_up(frames * TARGET_RATE, rate)
        self._total = _divided_up(_divided_up(frames * CODEC_RATE, rate), COARSE_24K)
        self._counts = np.maximum(_divided_up(self._total, length), 1)
        self._ends = np.cumsum(self._counts)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def rows(self, start: int, stop: int, min_seconds: float) -> pa.Table:
        """Segments [start, stop), with all columns of the plan but split, shard and row."""
        places = np.arange(start, min(stop, len(self)))
        owners = np.searchsorted(self._ends, places, side="right")
        segment = places - (self._ends - self._counts)[owners]
        start_coarse = segment * self._length
        n_coarse = np.minimum(self._length, self._total[owners] - start_coarse)
        n_samples = np.minimum(n_coarse * COARSE_48K, self._samples[owners] - start_coarse * COARSE_48K)
        table = self._recordings.take(pa.array(owners))
        failed = pc.is_valid(table["problem"])
        short = pa.array(n_samples < min_seconds * TARGET_RATE)
        too_short = f"shorter than min_seconds={min_seconds:g}"
        reason = pc.if_else(pa.array(segment > 0), f"its end is {too_short}", too_short)
        reason = pc.if_else(short, reason, pa.scalar(None, pa.string()))
        columns: dict[str, Any] = {
            "segment": segment,
            "start_coarse": start_coarse,
            "n_coarse": n_coarse,
            "n_samples": n_samples,
            "status": pc.if_else(failed, FAILED, pc.if_else(short, TOO_SHORT, OK)),
            "reason": pc.if_else(failed, table["problem"], reason),
        }
        for name, values in columns.items():
            table = table.append_column(name, pa.array(values) if isinstance(values, np.ndarray) else values)
        return table


def _divided_up(numbers: Int64, by: Int64 | int) -> Int64:
    return -(-numbers // by)
