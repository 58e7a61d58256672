"""`just inspect`: what a plan, codes file, sidecar, index, shard or folder of shards holds."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.compute as pc

from configs.words import lasting, number_of
from pipeline.plan import Plan
from pipeline.settings import InspectSettings
from pipeline.statuses import COLUMNS, Statuses
from shards.contract import FAILED, INDEX_NAME, OK, PLAN_NAME, REJECTED, SIDECAR_SCHEMA, TARGET_RATE, TOO_SHORT
from shards.errors import ShardError, UserError, printable
from shards.index import wrong_place
from shards.reader import decode_sample, sample_at
from shards.writer import check_columns, read_metadata, read_table


def inspect(settings: InspectSettings) -> None:
    """Raises UserError for a path that is none of these."""
    path = settings.path
    if settings.picture:
        from pipeline.gallery import draw

        draw(path if (path / INDEX_NAME).exists() else path / "shards", settings.picture)
        click.echo(f"{settings.picture}")
    if path.is_dir():
        inside = [path / INDEX_NAME, path / "shards" / INDEX_NAME]
        _unfinished(path, settings.rows)
        path = next((file for file in inside if file.exists()), path)
    if (path / PLAN_NAME).exists():
        return
    if path.suffix == ".parquet" and path.is_file():
        _table(path, settings.rows)
    elif path.suffix == ".tar" and path.is_file():
        _tar(path, settings.rows)
    else:
        raise UserError(
            f"{settings.path}: expected a .parquet or .tar of ours, or a folder with {PLAN_NAME} or {INDEX_NAME}"
        )


def _unfinished(work: Path, rows: int) -> None:
    """Says what of a work folder's plan its index does not hold yet; without an index, what became of it so far, and
    `rows` of the recordings that failed.
    """
    path, index = work / PLAN_NAME, work / "shards" / INDEX_NAME
    if not path.exists():
        return
    planned = read_table(path, columns=["status"]).num_rows
    if index.exists():
        if planned > (made := read_table(index, columns=["status"]).num_rows):
            click.echo(f"{path}: {number_of(planned, 'segment')}, {planned - made:,} of them not in the index yet")
        return
    shards = [f"{split}/{shard:06d}.parquet" for split, shard in Plan(path).shards]
    stages = [[work / stage / name for name in shards] for stage in ("shards", "codes")]
    targets, codes = (sum(table.exists() for table in tables) for tables in stages)
    whole = f"{number_of(planned, 'segment')} in {number_of(len(shards), 'shard')}"
    click.echo(f"{path}: {whole}; codes of {codes}, targets of {targets}")
    statuses, failed = Statuses(), list[dict[str, Any]]()
    for either in zip(*stages, strict=True):
        if made := next((table for table in either if table.exists()), None):
            table = read_table(made, columns=COLUMNS)
            statuses.add(table)
            bad = table.filter(pc.field("status").isin([FAILED, REJECTED]))
            bad = bad.group_by(["recording", "status", "reason"], use_threads=False).aggregate([])
            failed += bad.slice(0, rows - len(failed)).to_pylist()
    _statuses(statuses)
    _rows(failed)


def _table(path: Path, rows: int) -> None:
    try:
        metadata, table = read_metadata(path), read_table(path)
        click.echo(f"{path}: {number_of(table.num_rows, 'row')}")
        for key, value in metadata.items():
            _entry("  ", key, value)
        if {*COLUMNS} <= {*table.column_names}:
            statuses = Statuses()
            statuses.add(table)
            _statuses(statuses)
            _usable(table)
            in_turn = (FAILED, REJECTED, TOO_SHORT, OK)
            table = pa.concat_tables([table.filter(pc.field("status") == status) for status in in_turn])
        _rows(table.slice(0, rows).to_pylist())
    except (pa.ArrowException, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ShardError(f"{path}: not a table of ours: {error}") from error


def _entry(indent: str, key: str, value: Any) -> None:
    if isinstance(value, dict):
        click.echo(f"{indent}{printable(key)}:")
        for name, inner in value.items():
            _entry(f"{indent}  ", name, inner)
    elif value is not None:
        text = printable(str(value))
        click.echo(f"{indent}{printable(key)}: {text if len(text) < 400 else f'{len(value)} entries'}")


def _statuses(statuses: Statuses) -> None:
    click.echo(f"  statuses: {dict(statuses.counts())}")
    for line in statuses.reasons():
        click.echo(f"    {line}")


def _usable(table: pa.Table) -> None:
    usable = table.filter(pc.field("status") == OK)
    if "n_samples" in table.column_names and usable.num_rows:
        seconds = pc.sum(usable["n_samples"]).as_py() / TARGET_RATE
        click.echo(f"  usable: {number_of(usable.num_rows, 'segment')}, {lasting(seconds)}")


def _rows(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        click.echo("  " + ", ".join(f"{key}={_short(value)}" for key, value in row.items() if value is not None))


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 6:
        return f"[{', '.join(map(str, value[:6]))}, … {len(value)}]"
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))


def _tar(path: Path, rows: int) -> None:
    sidecar = path.with_suffix(".parquet")
    if not sidecar.exists():
        raise ShardError(f"{path}: expected its sidecar {sidecar.name} beside it; a tar without one is not complete")
    table = read_table(sidecar)
    check_columns(sidecar, table.schema.remove_metadata(), SIDECAR_SCHEMA)
    samples = table.filter(pc.field("status") == OK)
    if wrong := wrong_place(samples):
        raise ShardError(f"{sidecar}: {wrong}")
    try:
        with tarfile.open(path, "r:") as tar:
            names = tar.getnames()
    except (tarfile.TarError, OverflowError) as error:
        raise ShardError(f"{path}: not a whole tar: {error}") from error
    members, usable = number_of(len(names), "member"), number_of(samples.num_rows, "sample")
    click.echo(f"{path}: {path.stat().st_size:,} bytes, {members}, {usable}")
    with path.open("rb") as file:
        for row in samples.slice(0, rows).to_pylist():
            sample = decode_sample(sample_at(file, row, path))
            meta = sample["meta"]
            click.echo(f"  {row['key']}: codes {sample['codes'].shape}, target {sample['target'].shape}, {meta}")
