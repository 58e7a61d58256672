"""Run shard jobs one after the other, with progress; then say what became of every segment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from pipeline.plan import Plan
from shards.contract import FAILED, OK, REJECTED
from shards.errors import UserError
from shards.writer import read_table

REASONS_SHOWN = 5

Advance = Callable[[float], object]


def run_shards(what: str, plan: Plan, waiting: Sequence[int], make: Callable[[int, Advance], None]) -> None:
    """Calls `make` for each shard that is `waiting`, with a function that moves the bar by seconds of audio."""
    finished = sum(plan.seconds) - sum(plan.seconds[number] for number in waiting)
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s of audio, {rate_fmt}, {remaining} left"
    with tqdm(total=sum(plan.seconds), initial=finished, desc=what, unit=" s", bar_format=bar_format) as bar:
        for number in waiting:
            end = bar.n + plan.seconds[number]
            make(number, partial(_advance, bar, end))
            bar.update(end - bar.n)


def _advance(bar: tqdm, end: float, seconds: float) -> None:
    bar.update(min(seconds, end - bar.n))  # windows overlap what the shard holds


def has_failures(path: Path) -> bool:
    """Whether a segment of this codes file or sidecar failed: `retry=failed` makes such a shard again."""
    return FAILED in read_table(path, columns=["status"])["status"].to_pylist()


def summarize(paths: Sequence[Path], max_failed_fraction: float, title: str) -> None:
    """Prints counts by status and the commonest reasons. Raises UserError above `max_failed_fraction`."""
    statuses, reasons = Counter[str](), Counter[str]()
    for path in paths:
        table = read_table(path, columns=["status", "reason"])
        statuses.update(table["status"].to_pylist())
        reasons.update(reason for reason in table["reason"].to_pylist() if reason)
    total = sum(statuses.values())
    tqdm.write(f"{title}: {total} segments, {', '.join(f'{n} {name}' for name, n in statuses.most_common())}")
    for reason, n in reasons.most_common(REASONS_SHOWN):
        tqdm.write(f"  {n} × {reason}")
    lost = statuses[FAILED] + statuses[REJECTED]
    if lost / total > max_failed_fraction:
        raise UserError(
            f"{lost} of {total} segments failed or were rejected, above max_failed_fraction={max_failed_fraction:g}; "
            "the rows say why. What succeeded is kept: raise the limit, or mend the recordings and add retry=failed"
        )
    if not statuses[OK]:
        raise UserError(f"{title}: no segment is usable")
