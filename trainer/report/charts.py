"""Curves and histograms as numbers for SVG paths: the page draws them in its own colours."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

WIDTH, HEIGHT = 320, 150  # of the plotting area, in SVG units
POINTS = 400  # of a curve, at most; each is the mean of its neighbours
BINS = 48  # of a histogram, at most
DASH = 4.0  # SVG units
NOT_CURVES = {"kind", "step", "phase", "audio_seconds_per_second", "data_wait_share"}

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Line:
    name: str
    path: str  # SVG path data


@dataclass(frozen=True)
class Chart:
    """Ticks are (position in SVG units, label)."""

    title: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    note: str = ""
    filled: bool = False
    width: int = field(default=WIDTH, init=False)
    height: int = field(default=HEIGHT, init=False)


def training_curves(metrics: Path) -> list[Chart]:
    """A chart for each value of metrics.jsonl over steps: training and validation in one where both have it."""
    series: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for line in metrics.read_text().splitlines():
        try:
            values: dict[str, Any] = json.loads(line)
        except ValueError:  # the line that a kill cut off
            continue
        for name, value in values.items():
            if name not in NOT_CURVES and isinstance(value, int | float) and math.isfinite(value):
                series.setdefault(name, {}).setdefault(values["kind"], []).append((values["step"], value))
    return [_curve(name, kinds) for name, kinds in series.items()]


def _curve(title: str, kinds: Mapping[str, Sequence[tuple[float, float]]]) -> Chart:
    points = {kind: _thinned(np.array(pairs, dtype=np.float64)) for kind, pairs in kinds.items()}
    every = np.concatenate(list(points.values()))
    x, y = Axis.around(every[:, 0], WIDTH), Axis.around(every[:, 1], HEIGHT)
    lines = [Line(kind, _path(x.place(own[:, 0]), HEIGHT - y.place(own[:, 1]))) for kind, own in points.items()]
    last = "; ".join(f"{kind} {pairs[-1][1]:.4g}" for kind, pairs in kinds.items())
    return Chart(title, lines, x.ticks(), [(HEIGHT - place, label) for place, label in y.ticks()], f"last: {last}")


def _thinned(points_N2: Floats) -> Floats:
    if len(points_N2) <= POINTS:
        return points_N2
    return np.stack([part.mean(axis=0) for part in np.array_split(points_N2, POINTS)])


def histograms(values: Mapping[str, Floats]) -> list[Chart]:
    """The distribution of each; those without a finite value have none."""
    return [_histogram(name, own[np.isfinite(own)]) for name, own in values.items() if np.isfinite(own).any()]


def _histogram(title: str, values: Floats) -> Chart:
    counts, edges = np.histogram(values, min(BINS, 2 * math.isqrt(len(values)) + 1))
    x, y = Axis.around(edges, WIDTH), Axis(0.0, float(counts.max()), HEIGHT)
    corners = np.repeat(x.place(edges), 2)
    heights = HEIGHT - np.concatenate([[0], np.repeat(y.place(counts), 2), [0]])
    low, median, high = np.percentile(values, [5, 50, 95])
    note = f"{len(values):,} targets; median {median:.4g}; 5 … 95 %: {low:.4g} … {high:.4g}"
    line = Line("targets", _path(corners, heights))
    return Chart(title, [line], x.ticks(), [(HEIGHT - place, label) for place, label in y.ticks()], note, filled=True)


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` on `length` SVG units."""

    low: float
    high: float
    length: int

    @staticmethod
    def around(values: Floats, length: int) -> Axis:
        low, high = float(values.min()), float(values.max())
        if low == high:
            low, high = low - 0.5, high + 0.5
        return Axis(low, high, length)

    def place(self, values: npt.ArrayLike) -> Floats:
        return (np.asarray(values, dtype=np.float64) - self.low) / (self.high - self.low) * self.length

    def ticks(self) -> list[tuple[float, str]]:
        """Three to nine round values."""
        span = self.high - self.low
        step = 10.0 ** math.floor(math.log10(span / 3))
        step *= max(factor for factor in (1, 2, 5, 10) if span / (step * factor) >= 3.5 or factor == 1)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(float(self.place(n * step)), f"{n * step:.6g}") for n in range(first, last + 1)]


def _path(x: Floats, y: Floats) -> str:
    """A single point is a dash: a line from it to itself would not be seen."""
    if len(x) == 1:
        x, y = np.concatenate([x - DASH / 2, x + DASH / 2]), np.repeat(y, 2)
    return "M" + "L".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
