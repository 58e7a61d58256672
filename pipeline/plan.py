"""Recordings → segments → shards, frozen in plan.parquet before any model runs.

So what a shard holds does not depend on how many workers ran, or on when they died. A plan may be extended by
recordings that it does not know: their shards follow those that stand, of which nothing changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import IO, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, NonNegativeInt
from tqdm import tqdm

from configs.words import lasting, number_of
from pipeline.dealing import Shard, new_shards
from pipeline.measure import END_TOLERANCE_SECONDS, measure
from pipeline.settings import CodesSettings
from pipeline.sources import counted, find, listed_sha256
from shards.contract import FAILED, OK, PLAN_NAME, PLAN_SCHEMA, SPLITS, TARGET_RATE
from shards.errors import ShardError, UserError, printable
from shards.files import exclusive, replacing
from shards.storage import Location, Url
from shards.writer import check_columns, differences, encode_metadata, naming, parquet_source, read_table, told_by

PLANNED_BY = ("audio", "segment_length", "min_seconds", "segments_per_shard", "validation_fraction", "seed")


class Told(BaseModel):
    """What plan.parquet says of itself."""

    settings: dict[str, Any]
    shards: list[tuple[Literal["train", "validation"], NonNegativeInt]]  # in the order of the row groups
    seconds: list[float]
    rows_sha256: list[str]
    listed_sha256: str | None


METADATA = Told.model_fields.keys()
PLANNED = ["recording", "path", "offset", "group", "split", "first_frame", "frames", "rate", "file_frames"]


class Plan:
    """plan.parquet: one row group per shard, so a worker holds only the rows of the shard that it makes."""

    def __init__(self, path: Location) -> None:
        if not path.exists():
            raise UserError(f"{path} is missing: run `just shard-codes` first")
        with naming(path):
            self._file = pq.ParquetFile(parquet_source(path), page_checksum_verification=True)
        metadata = told_by(path, self._file.metadata)
        if not metadata.keys() >= METADATA:
            raise UserError(f"{path} is no plan: delete it and run `just shard-codes` again")
        check_columns(path, self._file.schema_arrow, PLAN_SCHEMA)
        self._path = path
        with naming(path):
            told = Told.model_validate({name: metadata[name] for name in METADATA})
            if not len(told.shards) == len(told.seconds) == len(told.rows_sha256) == self._file.num_row_groups:
                raise ValueError(f"{self._file.num_row_groups} row groups for {len(told.shards)} shards")
        self.shards: list[tuple[str, int]] = [*told.shards]
        self.seconds, self.rows_sha256 = told.seconds, told.rows_sha256
        self.settings, self.listed_sha256 = told.settings, told.listed_sha256

    def table(self, number: int) -> pa.Table:
        """The rows of the shard that is `number` in `shards`."""
        with naming(self._path):
            rows = self._file.read_row_group(number)
            rows.validate(full=True)  # pyarrow takes any bytes for text
        if rows_sha256(rows) != self.rows_sha256[number]:
            raise ShardError(f"{self._path}: damaged: shard {number} is not what was planned; delete it and plan again")
        return rows

    def rows(self, number: int) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.table(number).to_pylist()
        return rows


def rows_sha256(rows: pa.Table) -> str:
    """Identifies a shard's plan; where its files lie is no part of it."""
    digest = hashlib.sha256()
    for name in sorted(set(rows.column_names) - {"path"}):
        column = rows[name]
        digest.update(name.encode())
        if pa.types.is_string(column.type):
            digest.update("".join(pc.fill_null(column, "").to_pylist()).encode())
            column = pc.binary_length(column)
        digest.update(column.is_valid().to_numpy(zero_copy_only=False).tobytes())
        digest.update(pc.fill_null(column, 0).to_numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def make_plan(settings: CodesSettings) -> Plan:
    """The plan in `work`, made now if there is none. Raises UserError when it was made with other settings.

    Slices make it once: the first to come holds a lock, the others wait for it. If it dies, the next one plans.
    """
    path = settings.work / PLAN_NAME
    with _planning(settings):
        asked = settings.model_dump(mode="json", include={*PLANNED_BY, "group_pattern"})
        tqdm.write(f"listing {settings.audio}")
        listed = listed_sha256(settings.audio)
        metadata = {"settings": asked, "listed_sha256": listed}
        if not path.exists():
            _write(path, [], new_shards(measure(_found(settings)), settings, {}, {}), metadata)
            tqdm.write(_splits_of(path, settings.group_pattern))
            return Plan(path)
        plan = Plan(path)
        changed = differences(plan.settings, asked)
        if changed:
            moved = asked | {"audio": plan.settings["audio"]} == plan.settings
            hint = "; where recordings only moved, a link at their old place will do" if moved else ""
            raise UserError(f"{path} was made with other settings ({changed}): use another work= or delete it{hint}")
        if not settings.audio.exists():
            tqdm.write(f"audio={settings.audio} does not exist: {path} is used as it is")
            return plan
        if listed == plan.listed_sha256 and not settings.extend:
            return plan
        new = _to_add(settings, path)
        if not len(new):
            return plan
        groups, numbers = _known(plan, path)
        _write(path, [plan], new_shards(new, settings, groups, numbers), metadata)
        extended = Plan(path)
        added = len(extended.shards) - len(plan.shards)
        tqdm.write(f"new: {len(new)} of the plan's recordings, {added} of its shards")
        tqdm.write(_splits_of(path, settings.group_pattern))
        return extended


def _to_add(settings: CodesSettings, path: Location) -> pa.Table:
    """Measured recordings that the plan does not know, and those that it could not use and now can.

    Raises UserError where there are new ones, unless extend=true.
    """
    found, _ = find(settings.audio, settings.group_pattern)
    planned = read_table(path, columns=PLANNED, filters=pc.field("segment") == 0)
    usable = planned.filter(pc.field("rate") > 0)
    _check_unchanged(found, usable, settings.audio, path)
    is_planned, is_usable = (pc.is_in(found["recording"], rows["recording"]) for rows in (planned, usable))
    new = found.filter(pc.invert(is_planned))
    if settings.extend:
        again = measure(found.filter(pc.and_not(is_planned, is_usable)))
        return pa.concat_tables([measure(new), again.filter(pc.field("problem").is_null())])
    if len(new):
        raise UserError(
            f"{len(new)} recordings such as {new['recording'][0].as_py()!r} were added to {settings.audio} after "
            f"{path} was made: extend=true puts them into new shards; without them, take another work="
        )
    return new


def _planning(settings: CodesSettings) -> AbstractContextManager[None]:
    if settings.execute != "slice" or isinstance(settings.work, Url):
        return nullcontext()  # one process plans; or several do, and every plan is the same bytes
    return exclusive(settings.work, ".lock-plan", waiting=f"another slice is making {settings.work / PLAN_NAME}")


def _found(settings: CodesSettings) -> pa.Table:
    found, ignored = find(settings.audio, settings.group_pattern)
    if ignored:
        tqdm.write(printable(f"ignored: {counted(ignored)}"))
    return found


def _check_unchanged(found: pa.Table, planned: pa.Table, audio: Location, path: Location) -> None:
    """Raises UserError where `audio` says something else of a recording than the plan, which stands."""
    place = pc.index_in(found["recording"], planned["recording"].combine_chunks())
    gone = len(planned) - pc.count(place).as_py()
    if gone:
        stay = "they stay planned, and what was made of them stays"
        tqdm.write(f"{gone} recordings of {path} are no longer in {audio}: {stay}")
    now, then = found.filter(place.is_valid()), planned.take(place.drop_null())
    rate, first, frames, whole = (then[name].to_numpy() for name in ("rate", "first_frame", "frames", "file_frames"))
    start, end = (now[name].to_numpy() for name in ("start", "end"))
    start, end = np.nan_to_num(start) * rate, np.where(np.isnan(end), whole, end * rate)
    differing = {
        "path": pc.not_equal(now["path"], then["path"]),
        "place in its tar": pc.not_equal(pc.fill_null(now["offset"], -1), pc.fill_null(then["offset"], -1)),
        "speaker": pc.not_equal(now["group"], then["group"]),
        "split": pc.not_equal(pc.coalesce(now["split"], then["split"]), then["split"]),
        "start": np.rint(start) != first,
        "end": (np.rint(np.minimum(end, whole)) != first + frames) | (end > whole + END_TOLERANCE_SECONDS * rate),
        "frames": pc.not_equal(pc.coalesce(now["frames"], then["file_frames"]), then["file_frames"]),
        "rate": pc.not_equal(pc.coalesce(now["rate"], then["rate"]), then["rate"]),
    }
    for name, differs in differing.items():
        if (row := pc.index(pa.array(differs, pa.bool_()), True).as_py()) >= 0:
            raise UserError(
                f"{audio} has another {name} for {now['recording'][row].as_py()!r} than {path}, which cannot change: "
                "undo that, or take another work="
            )


def _splits_of(path: Location, group_pattern: str | None) -> str:
    """Which groups a plan puts into which split, in a line."""
    rows = read_table(path, columns=["split", "group", "n_samples"], filters=pc.field("status") == OK)
    found = rows.group_by(["split", "group"]).aggregate([("n_samples", "sum")]).to_pylist()
    parts = []
    for split in SPLITS:
        seconds = {row["group"]: row["n_samples_sum"] / TARGET_RATE for row in found if row["split"] == split}
        such = f", such as {min(seconds)!r}" if seconds else ""
        parts.append(f"{split}: {number_of(len(seconds), 'group')}{such}, {lasting(sum(seconds.values()))}")
    hint = "" if group_pattern else ". A group should be a speaker: group_pattern= says which"
    return f"planned: {'; '.join(parts)}{hint}"


def _known(plan: Plan, path: Location) -> tuple[dict[str, str], dict[str, int]]:
    """The split of each group that has one, and the number of the next shard of each split."""
    rows = read_table(path, columns=["group", "split", "status"])
    usable = rows.filter(pc.field("status") != FAILED)
    pairs = usable.group_by(["group", "split"]).aggregate([])
    numbers = {split: 1 + max((n for s, n in plan.shards if s == split), default=-1) for split in SPLITS}
    return dict(zip(pairs["group"].to_pylist(), pairs["split"].to_pylist(), strict=True)), numbers


def _writer(file: IO[bytes]) -> pq.ParquetWriter:
    few = ["split", "group", "status", "reason"]
    return pq.ParquetWriter(file, PLAN_SCHEMA, compression="zstd", use_dictionary=few, write_page_checksum=True)


def _write(path: Location, plans: list[Plan], shards: Iterable[Shard], metadata: dict[str, Any]) -> None:
    """The shards of `plans`, then `shards`, into one file."""
    names, seconds, digests = list[tuple[str, int]](), list[float](), list[str]()
    with replacing(path) as temporary, temporary.open("wb") as file, _writer(file) as writer:
        for plan in plans:
            names += plan.shards
            seconds += plan.seconds
            digests += plan.rows_sha256
            for number in range(len(plan.shards)):
                writer.write_table(plan.table(number).replace_schema_metadata(None))
        for shard in shards:
            names.append((shard.split, shard.number))
            seconds.append(pc.sum(shard.rows["n_samples"]).as_py() / TARGET_RATE)
            digests.append(rows_sha256(shard.rows))
            writer.write_table(shard.rows)
        of_shards = {"shards": names, "seconds": seconds, "rows_sha256": digests}
        writer.add_key_value_metadata(encode_metadata({**metadata, **of_shards}))
