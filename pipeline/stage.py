"""What a stage is: shards of a plan, each of them done or to be made. Any process builds it again from its settings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import soundfile
import torch

from codec.memory import keep_freed_memory
from pipeline.plan import Plan
from pipeline.settings import CodesSettings, TargetsSettings
from shards.contract import FAILED, OK, PLAN_NAME, REJECTED, Row
from shards.errors import UserError
from shards.storage import Location
from shards.writer import read_table, standing

Advance = Callable[[float], object]  # seconds of audio that are done


def made_with() -> dict[str, str]:
    """What decodes and compresses, and what resamples and runs the models: told in each file, and part of no
    fingerprint. Most of their releases change no byte, and a shard that was refused for one would cost days.
    """
    return {"libsndfile": soundfile.__libsndfile_version__, "torch": torch.__version__}


class Stage(ABC):
    """Models are loaded once, where shards are made. It holds no state: shards may be made in any order, anywhere."""

    doing: ClassVar[str]  # as the progress bar says it
    mendable: ClassVar[pc.Expression]  # of the rows that failed, those that a second try may mend
    known: Any = None  # what it takes the model to find out, for processes that do not load it

    def __init__(self, settings: CodesSettings | TargetsSettings) -> None:
        self.settings = settings
        keep_freed_memory()

    @cached_property
    def plan(self) -> Plan:
        return Plan(self.settings.work / PLAN_NAME)

    @property
    @abstractmethod
    def folder(self) -> Location:
        """Where its shards stand, in a folder for each split."""

    @abstractmethod
    def fingerprint(self, number: int) -> dict[str, Any]:
        """What the bytes of shard `number` of the plan depend on."""

    @abstractmethod
    def make(self, number: int, advance: Advance) -> None:
        """Writes shard `number`, whole or not at all."""

    def table(self, number: int) -> Location:
        """The shard's codes or sidecar, which is written last."""
        split, shard = self.plan.shards[number]
        return self.folder / split / f"{shard:06d}.parquet"

    def split_folder(self, number: int) -> Location:
        """Where shard `number` is written. Made in one that stands: what is written below the mount point of a disk
        that is gone fills another, and is not seen once the disk is back.
        """
        folder = self.folder / self.plan.shards[number][0]
        if isinstance(folder, Path):
            try:
                folder.mkdir(exist_ok=True)
            except FileNotFoundError as error:
                raise UserError(f"{self.folder} is gone: is it mounted? Then the same command goes on") from error
        return folder

    def footer(self, number: int) -> pq.FileMetaData | None:
        """Of the table of a shard that stands, with failures or without. Raises ShardError where another run's does."""
        return standing(self.table(number), self.fingerprint(number))

    def made(self, number: int) -> bool:
        return self.footer(number) is not None

    def done(self, number: int) -> bool:
        """Whether this run leaves it as it is."""
        footer = self.footer(number)
        return footer is not None and not self.can_be_mended(number, footer)

    def can_be_mended(self, number: int, footer: pq.FileMetaData) -> bool:
        """Whether this run makes a shard again that stands, because a segment failed that a second try may mend."""
        if self.settings.retry != "failed":
            return False
        failed = (pc.field("status") == FAILED) & self.mendable
        return len(read_table(self.table(number), columns=["status"], filters=failed)) > 0

    def kept(self, number: int) -> dict[int, Row]:
        """Of a shard that stands and is made again: its rows that stay as they are, by their place."""
        if not self.made(number):
            return {}
        rows = read_table(self.table(number)).to_pylist()
        return {place: row for place, row in enumerate(rows) if row["status"] in (OK, REJECTED)}

    def holds(self, number: int, rows: Mapping[int, Row]) -> bool:
        """Whether a shard that stands has these rows, by their place: then it is left as it is."""
        found = read_table(self.table(number)).take(pa.array(rows, pa.int64()))
        return bool(found.equals(pa.Table.from_pylist([*rows.values()], found.schema)))
