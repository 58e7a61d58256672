"""What became of every segment: counts by status, and by reason with an example."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from shards.contract import FAILED
from shards.errors import printable

COLUMNS = ["recording", "n_coarse", "status", "reason"]
NUMBER = re.compile(r"\d+(\.\d+)?")


@dataclass
class Kind:
    """Reasons that are one but for their numbers."""

    reason: str  # the first
    recording: str
    segments: int = 0
    varies: bool = False

    def __str__(self) -> str:
        such_as = "such as " if self.segments > 1 else ""
        if self.varies:
            return f"{self.segments} × {NUMBER.sub('…', self.reason)} ({such_as}{self.recording}: {self.reason})"
        return f"{self.segments} × {self.reason} ({such_as}{self.recording})"


class Statuses:
    """Of tables that hold COLUMNS. What could not be read when it was planned, and stands elsewhere by extend=true,
    counts there alone.
    """

    def __init__(self) -> None:
        self._counts, self._kinds = Counter[str](), dict[str, Kind]()
        self._unusable: dict[str, str] = {}  # recording → why it could not be planned

    def add(self, table: pa.Table) -> None:
        unplanned = (pc.field("status") == FAILED) & pc.field("n_coarse").is_valid() & (pc.field("n_coarse") == 0)
        segments, without = table.filter(~unplanned), table.filter(unplanned)
        self._unusable |= dict(zip(without["recording"].to_pylist(), without["reason"].to_pylist(), strict=True))
        if self._unusable:
            for recording in self._unusable.keys() & set(segments["recording"].unique().to_pylist()):
                del self._unusable[recording]
        for row in sorted(segments["status"].value_counts().to_pylist(), key=lambda row: -row["counts"]):
            self._counts[row["values"]] += row["counts"]
        given = segments.filter(pc.field("reason").is_valid())
        found = given.group_by("reason", use_threads=False).aggregate([("recording", "first"), ("recording", "count")])
        for row in found.sort_by("reason").to_pylist():
            _count(self._kinds, row["reason"], row["recording_first"], row["recording_count"])

    @property
    def unplanned(self) -> int:
        """Recordings that could not be read when they were planned."""
        return len(self._unusable)

    def counts(self) -> Counter[str]:
        return self._counts + Counter({FAILED: len(self._unusable)})

    def reasons(self) -> Iterator[str]:
        """One line for each kind, the most frequent first."""
        kinds = {name: replace(kind) for name, kind in self._kinds.items()}
        for recording, reason in self._unusable.items():
            _count(kinds, reason, recording, 1)
        return (printable(str(kind)) for kind in sorted(kinds.values(), key=lambda kind: -kind.segments))


def _count(kinds: dict[str, Kind], reason: str, recording: str, segments: int) -> None:
    kind = kinds.setdefault(NUMBER.sub("…", reason), Kind(reason, recording))
    kind.segments += segments
    kind.varies |= reason != kind.reason
