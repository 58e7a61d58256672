"""What the page is made from: an evaluation, the runs behind it, and what was measured of the shards' targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from shards.contract import INDEX_NAME, OK
from shards.errors import UserError
from shards.storage import Location
from shards.writer import read_metadata, read_table
from trainer.evaluate import AUDIO, CLIPS, SUMMARY
from trainer.report.charts import Chart, histograms, training_curves
from trainer.summary import SCHEMA
from trainer.systems import SOURCE, TARGET, label

ABOUT = {"title", "snac", "teacher", "settings", "models", "versions"}


@dataclass(frozen=True)
class Evaluation:
    """What `just eval` left in `folder`."""

    folder: Path
    clips: pa.Table  # usable rows only
    failed: list[dict[str, Any]]
    summary: pa.Table
    about: dict[str, Any]  # its provenance

    @property
    def systems(self) -> dict[str, str]:
        """Name → label: the source first, the target last."""
        found = dict.fromkeys(self.clips["system"].to_pylist())
        ends = {SOURCE: 0, TARGET: 2}
        return {name: label(name, self.about["teacher"]) for name in sorted(found, key=lambda name: ends.get(name, 1))}

    @property
    def kept(self) -> list[str]:
        """Clips whose audio is there, in order. Raises UserError when there is none."""
        audio = self.folder / AUDIO / TARGET
        keys = [key for key in dict.fromkeys(self.clips["clip"].to_pylist()) if (audio / f"{key}.flac").exists()]
        if not keys:
            raise UserError(f"{audio} holds no audio to listen to: run `just eval` with keep_audio=12")
        return keys

    def curves(self, run: Path | None) -> dict[str, list[Chart]]:
        """Name of the run → its charts: of `run`, else of every model that is a run or a checkpoint in one."""
        models: Mapping[str, str] = self.about["settings"]["models"]
        paths = {run.name: run} if run else {name: Path(path) for name, path in models.items()}
        files = {name: [path / "metrics.jsonl", path.parent.parent / "metrics.jsonl"] for name, path in paths.items()}
        found = {name: next((file for file in pair if file.exists()), None) for name, pair in files.items()}
        if run and not found[run.name]:
            raise UserError(f"run={run} holds no metrics.jsonl")
        return {name: training_curves(file) for name, file in found.items() if file}


def read_evaluation(folder: Path) -> Evaluation:
    """Raises UserError for a folder that `just eval` did not make."""
    if not (folder / CLIPS).exists() or not (folder / SUMMARY).exists():
        raise UserError(f"eval={folder}: expected {CLIPS} and {SUMMARY}, as `just eval` writes them")
    table, about = read_table(folder / CLIPS), read_metadata(folder / CLIPS)
    summary = read_table(folder / SUMMARY)
    missing = ABOUT - about.keys()
    if missing:
        raise UserError(f"{folder / CLIPS} does not say its {', '.join(sorted(missing))}: run `just eval` again")
    if summary.column_names != SCHEMA.names:
        raise UserError(f"{folder / SUMMARY} is of another version of `just eval`: run it again")
    return Evaluation(
        folder=folder,
        clips=table.filter(pc.field("status") == OK),
        failed=table.filter(pc.field("status") != OK).to_pylist(),
        summary=summary,
        about=about,
    )


@dataclass(frozen=True)
class Targets:
    """Of all splits: (split, status with its reason, segments), and the distribution of all that was measured."""

    statuses: list[tuple[str, str, int]]
    charts: list[Chart]


def read_targets(shards: Location) -> Targets:
    """Raises UserError where there is no index."""
    path = shards / INDEX_NAME
    if not path.exists():
        raise UserError(f"shards={shards} has no {INDEX_NAME}: name where the shards lie now")
    table = read_table(path)
    by_reason = table.group_by(["split", "status", "reason"], use_threads=False).aggregate([([], "count_all")])
    statuses = [
        (
            row["split"],
            row["status"] if row["reason"] is None else f"{row['status']}: {row['reason']}",
            row["count_all"],
        )
        for row in by_reason.sort_by([("count_all", "descending")]).to_pylist()
    ]
    usable = table.filter(pc.field("status") == OK)
    measured = [field.name for field in table.schema if field.type == pa.float32()]
    values = {name: usable[name].drop_null().to_numpy() for name in measured}
    return Targets(statuses, histograms(values))
