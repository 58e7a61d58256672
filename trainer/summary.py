"""Means over clips with bootstrap intervals over voices, for each system and metric, and paired against a baseline."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from configs.words import number_of
from shards.contract import OK
from trainer.scores import COLUMNS

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

COVERAGE = 95.0  # percent
MIN_GROUPS = 5  # of an interval: fewer voices do not say how much voices differ
SCHEMA = pa.schema(
    [
        ("system", pa.string()),
        ("metric", pa.string()),
        ("clips", pa.int32()),  # in which the metric is defined
        ("groups", pa.int32()),  # voices of these clips
        ("mean", pa.float64()),
        ("low", pa.float64()),  # the 95 % interval; null for fewer than MIN_GROUPS groups
        ("high", pa.float64()),
        ("pairs", pa.int32()),  # clips in which it is defined for the baseline too
        ("pair_groups", pa.int32()),
        ("difference", pa.float64()),  # from the baseline, clip by clip; null for the baseline itself
        ("difference_low", pa.float64()),
        ("difference_high", pa.float64()),
    ]
)
OWN = ("clips", "groups", "mean", "low", "high")
PAIRED = ("pairs", "pair_groups", "difference", "difference_low", "difference_high")


def interval(
    values: Floats, groups: Ints, resamples: int, seed: int
) -> tuple[float | None, float | None, float | None]:
    """Mean and its 95 % interval: percentiles of the means of `resamples` draws of as many groups with replacement.

    `groups` says whose each value is. Clips of one voice resemble each other, so that drawing clips would make the
    interval too narrow: voices are drawn, each with all its clips. Percentiles are those of `percent_below`; how often
    it holds the true mean, `benchmarks/intervals.py` simulates. The draws depend on the seed and the number of groups
    only. No values: no mean; fewer than MIN_GROUPS groups: no interval.
    """
    if not len(values):
        return None, None, None
    mean = float(values.mean())
    _, places = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(places, weights=values), np.bincount(places)
    if len(sums) < MIN_GROUPS:
        return mean, None, None
    random = np.random.Generator(np.random.Philox(seed))
    draws = (random.integers(len(sums), size=len(sums)) for _ in range(resamples))
    means = [sums[drawn].sum() / counts[drawn].sum() for drawn in draws]
    below = percent_below(len(sums))
    low, high = np.percentile(means, [below, 100 - below])
    return mean, float(low), float(high)


@lru_cache(maxsize=1024)
def percent_below(groups: int) -> float:
    """Of the draws, below the interval's lower end: 2.5 % of many groups, 0.1 % of five.

    Draws of n differ less than n groups do, and as if their spread were known. Hesterberg's expanded percentiles (The
    American Statistician 69, 2015, p. 371; arXiv 1411.5279) make up for both: Φ(−√(n / (n − 1)) · t), where t is what
    Student's t of n − 1 degrees of freedom stays within in 95 % of cases; here by summing up its density.
    """
    t = np.arange(0.5e-4, 60, 1e-4)
    area = np.cumsum((1 + t**2 / (groups - 1)) ** (-groups / 2))
    within = float(np.interp(COVERAGE / 100, area / area[-1], t))
    return 100 * NormalDist().cdf(-math.sqrt(groups / (groups - 1)) * within)


def summarise(clips: pa.Table, baseline: str, resamples: int, seed: int) -> pa.Table:
    """Rows of SCHEMA: systems in the order in which they stand in `clips`, metrics in that of its columns."""
    usable = clips.filter(pc.field("status") == OK)
    systems = list(dict.fromkeys(usable["system"].to_pylist()))
    metrics = [name for name in clips.column_names if name in COLUMNS]
    voices = dict(zip(usable["clip"].to_pylist(), usable["group"].to_pylist(), strict=True))
    places, groups = {clip: place for place, clip in enumerate(voices)}, _numbered(voices.values())
    values = {system: _values(usable.filter(pc.field("system") == system), metrics, places) for system in systems}
    rows = []
    for system in systems:
        for metric in metrics:
            own, other = values[system][metric], values[baseline][metric]
            row: dict[str, Any] = {"system": system, "metric": metric}
            row |= dict(zip(OWN, _estimate(own, groups, resamples, seed), strict=True))
            if system != baseline:
                row |= dict(zip(PAIRED, _estimate(own - other, groups, resamples, seed), strict=True))
            rows.append(row)
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _numbered(names: Iterable[str]) -> Ints:
    """Equal names have equal numbers, which rise in the order of their first."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)


def _estimate(values: Floats, groups: Ints, resamples: int, seed: int) -> tuple[float | None, ...]:
    """How many clips have a value, of how many groups, and `interval` of these values."""
    defined = np.isfinite(values)
    values, groups = values[defined], groups[defined]
    return (len(values), len(np.unique(groups)), *interval(values, groups, resamples, seed))


def _values(rows: pa.Table, metrics: Sequence[str], places: Mapping[str, int]) -> dict[str, Floats]:
    """Metric → a value for each clip in the order of `places`, NaN where it is undefined or the system has no clip."""
    own = [places[clip] for clip in rows["clip"].to_pylist()]
    values = {name: np.full(len(places), np.nan) for name in metrics}
    for name in metrics:
        values[name][own] = rows[name].to_numpy(zero_copy_only=False)
    return values


def lines(summary: pa.Table, labels: Sequence[tuple[str, str]]) -> Iterator[str]:
    """A table for people: a line for each metric, a column for each (system, label).

    `*` marks a mean whose paired difference from the baseline is not 0 by its interval; where a mean is over fewer
    clips than others, it says over how many.
    """
    rows = {(row["system"], row["metric"]): row for row in summary.to_pylist()}
    metrics = list(dict.fromkeys(metric for _, metric in rows))
    most = max(row["clips"] for row in rows.values())
    cells = {place: cell(row, most) for place, row in rows.items()}
    titles = {metric: title(metric) for metric in metrics}
    first = max(map(len, titles.values()))
    widths = {
        system: max([len(label), *(len(cells[system, metric]) for metric in metrics)]) for system, label in labels
    }
    yield " " * first + "".join(f"  {label:>{widths[system]}}" for system, label in labels)
    for metric in metrics:
        yield f"{titles[metric]:{first}}" + "".join(
            f"  {cells[system, metric]:>{widths[system]}}" for system, _ in labels
        )


def title(metric: str) -> str:
    column = COLUMNS[metric]
    arrow = {"less": "\u00a0↓", "more": "\u00a0↑", "zero": "\u00a0→\u00a00", "target": ""}[column.better]
    return column.label + (f" ({column.unit})" if column.unit else "") + arrow


def cell(row: Mapping[str, Any], most: int) -> str:
    """`1.293 [1.250, 1.341]*`, `of 3: 1.293 ` for fewer clips than `most`, or a dash where no clip has a value."""
    digits = COLUMNS[row["metric"]].digits
    if row["mean"] is None:
        return "–"
    text = fixed(row["mean"], digits)
    if row["low"] is not None:
        text += f" [{fixed(row['low'], digits)}, {fixed(row['high'], digits)}]"
    return (f"of {row['clips']}: " if row["clips"] < most else "") + text + ("*" if differs(row) else " ")


@dataclass(frozen=True)
class Voices:
    """Whom clips are of: groups, which are voices, or recordings where each is a group of its own."""

    number: int
    noun: str

    def __str__(self) -> str:
        return f"{number_of(self.number, self.noun)} ({'group' if self.number == 1 else 'groups'})"

    @property
    def why_no_intervals(self) -> str | None:
        """None where there are intervals."""
        if self.number >= MIN_GROUPS:
            return None
        return f"no intervals and no *: they take {MIN_GROUPS} {self.noun}s, and these clips are of {self}"


def voices_of(rows: Iterable[Mapping[str, Any]]) -> Voices:
    found = {(row["group"], row["recording"]) for row in rows}
    noun = "recording" if all(group == recording for group, recording in found) else "voice"
    return Voices(len({group for group, _ in found}), noun)


def fixed(value: float, digits: int) -> str:
    """Never -0."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def differs(row: Mapping[str, Any]) -> bool:
    """Whether the interval of the paired difference leaves out 0."""
    low, high = row["difference_low"], row["difference_high"]
    return low is not None and high is not None and not low <= 0 <= high
