"""Make the shards of a stage that are not done: here, in a process for each GPU, on Ray, or one slice of them.

Every executor is a function of (stage, numbers, progress) that makes those shards and tells `progress` of each.
What is skipped and what ends the run is decided here alone, in `attempt` and `Progress.finish`: a bad recording costs
its own rows, inside the stage; a shard that an unforeseen error kept from being made is left out, for the next run, and
the run goes on to fail at its end, or after MAX_IN_A_ROW of them; settings, shards of another run, storage, a full
disk, memory and Ctrl-C concern the whole run and end it at once.
"""

from __future__ import annotations

import sys
import traceback
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from codec.memory import ran_out
from configs.progress import progress_bar
from configs.words import number_of
from pipeline.plan import Plan
from pipeline.settings import ExecutionSettings
from pipeline.stage import Stage
from pipeline.statuses import COLUMNS, Statuses
from shards.contract import FAILED, OK, REJECTED
from shards.errors import UserError, first_line, last_line
from shards.files import exclusive, write_whole
from shards.storage import READERS, Location, Url
from shards.writer import AHEAD, finish, read_table

REASONS_SHOWN = 5
MAX_IN_A_ROW = 3  # shards that could not be made, one after the other: something is wrong with more than one shard
LEFT_BEHIND = timedelta(days=1)
FATAL = (UserError, OSError, MemoryError)


class Progress:
    """The bar over all processes, in seconds of audio; and the count of shards that could not be made."""

    def __init__(self, doing: str, plan: Plan, mine: Sequence[int], waiting: Sequence[int]) -> None:
        total, left = (sum(plan.seconds[number] for number in numbers) for numbers in (mine, waiting))
        shown = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s of audio, {rate_fmt}, {remaining} left"
        self._bar = progress_bar(total=total, desc=doing, initial=total - left, unit=" s", bar_format=shown)
        self._plan, self._advanced = plan, defaultdict[int, float](float)
        self._problems: dict[int, str] = {}
        self._in_a_row = 0

    def advance(self, number: int, seconds: float) -> None:
        """At most what the shard holds: windows overlap."""
        seconds = min(seconds, self._plan.seconds[number] - self._advanced[number])
        self._advanced[number] += seconds
        self._bar.update(min(seconds, self._bar.total - self._bar.n))  # sums of seconds are rounded

    def finish(self, number: int, problem: str | None) -> None:
        """Shard `number` stands, or an error kept it from being made. Raises UserError when that is the rule."""
        self.advance(number, self._plan.seconds[number])
        if problem is None:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        self._problems[number] = problem
        tqdm.write(f"{self.name(number)} could not be made:\n{problem}", file=sys.stderr)
        if self._in_a_row == MAX_IN_A_ROW:
            raise UserError(
                f"{MAX_IN_A_ROW} shards in a row could not be made, the last because of: {last_line(problem)}"
            )

    def close(self) -> None:
        self._bar.close()

    def check(self) -> None:
        """Raises UserError when a shard could not be made."""
        if self._problems:
            number, problem = next(iter(self._problems.items()))
            raise UserError(
                f"{len(self._problems)} shards could not be made, such as {self.name(number)}: {last_line(problem)}. "
                "All others stand; the same command tries these again"
            )

    def name(self, number: int) -> str:
        return "{}/{:06d}".format(*self._plan.shards[number])


def attempt(stage: Stage, number: int, advance: Any) -> str | None:
    """Makes a shard → None, or the traceback of what kept it from being made. Raises what concerns the whole run, and
    torch.AcceleratorError, after which no operation on the GPU succeeds in this process.
    """
    try:
        stage.make(number, advance)
    except (*FATAL, torch.AcceleratorError):
        raise
    except Exception as error:
        if ran_out(error):
            raise UserError(f"the GPU's memory ran out: lower batch_seconds ({first_line(error)})") from error
        return traceback.format_exc()
    return None


def here(stage: Stage, numbers: Iterable[int], progress: Progress) -> None:
    """One after the other, in this process."""
    try:
        for number in numbers:
            progress.finish(number, attempt(stage, number, partial(progress.advance, number)))
    except torch.AcceleratorError as error:
        raise UserError(f"the GPU failed: {first_line(error)}; the same command goes on") from error


def run(stage: Stage) -> bool:
    """Makes what is not done, and says what became of every segment. Returns whether all shards of the plan stand."""
    settings, plan = stage.settings, stage.plan
    mine = selected(len(plan.shards), settings)
    clean(stage.folder, [plan.shards[number] for number in mine])
    waiting = left_to_do(stage, mine)
    with alone(settings, stage.folder):
        settings.write(stage.folder / "settings.json")  # now that no other run's shards stand there
    progress = Progress(stage.doing, plan, mine, waiting)
    try:
        if waiting:
            _executor(settings)(stage, waiting, progress)
    except KeyboardInterrupt as error:
        raise UserError("stopped by Ctrl-C: finished shards stay, the same command makes the others") from error
    finally:
        progress.close()
    progress.check()
    complete = _others_are_done(stage, mine)
    numbers = range(len(plan.shards)) if complete else mine
    title = f"{stage.doing}: {stage.folder}"
    summarize([stage.table(number) for number in numbers], settings.max_failed_fraction, title)
    return complete


def _others_are_done(stage: Stage, mine: range) -> bool:
    """Says what of other slices is missing. Raises ShardError where another run's shard stands."""
    others = [number for number in range(len(stage.plan.shards)) if number not in mine]
    with ThreadPoolExecutor(READERS) as pool:
        found = list(_looked_at(pool.map(lambda number: stage.table(number).exists(), others), len(others)))
        made = list(pool.map(stage.made, others)) if all(found) else found
    missing = made.count(False)
    if missing:
        index, count = stage.settings.slice_index, stage.settings.slice_count
        tqdm.write(f"slice {index} of {count} is done; {missing} shards of other slices are missing")
    return not missing


def _executor(settings: ExecutionSettings) -> Any:
    if not makes_elsewhere(settings):
        return here
    if settings.execute == "ray":
        return import_module("pipeline.on_ray").actors
    return import_module("pipeline.processes").processes


def makes_elsewhere(settings: ExecutionSettings) -> bool:
    """Whether other processes than this one make the shards: several, or one that sees no GPU but its own."""
    first, *more = settings.devices()
    return settings.execute == "ray" or first not in ("cpu", "0") or bool(more) or (settings.workers or 1) > 1


def ask(kind: type[Stage], settings: ExecutionSettings) -> Any:
    """What a stage finds out with its model, from one of those that make shards: this process loads none."""
    return import_module("pipeline.on_ray" if settings.execute == "ray" else "pipeline.processes").ask(kind, settings)


def selected(shards: int, settings: ExecutionSettings) -> range:
    """Numbers of the shards that this run makes: all, or every n-th."""
    if settings.slice_index is None:
        return range(shards)
    return range(settings.slice_index, shards, settings.slice_count or 1)


def left_to_do(stage: Stage, numbers: Sequence[int]) -> list[int]:
    """Those that are not done. Raises ShardError where another run's shard stands."""
    with ThreadPoolExecutor(READERS) as pool:
        each = _looked_at(pool.map(stage.done, numbers), len(numbers))
        return [number for number, done in zip(numbers, each, strict=True) if not done]


def _looked_at(found: Iterable[Any], shards: int) -> Any:
    """Of a hundred thousand shards this takes minutes."""
    return progress_bar(found, total=shards, desc="looking at what is done", unit="shard", leave=False)


@contextmanager
def holding(settings: ExecutionSettings) -> Iterator[None]:
    """The work folder, for this run alone, or for slices of one run, each of them once. Remote folders have no locks:
    there, what two runs write at once is the same bytes, of which one is the last.
    """
    if isinstance(settings.work, Url):
        yield
        return
    if settings.execute != "slice":
        with exclusive(settings.work):
            yield
        return
    name = f".lock-{settings.slice_index}-of-{settings.slice_count}"
    with exclusive(settings.work, shared=True), exclusive(settings.work, name):
        yield


@contextmanager
def alone(settings: ExecutionSettings, what: Location) -> Iterator[None]:
    """What slices write together, settings and index, they write one after the other."""
    if settings.execute != "slice" or isinstance(settings.work, Url):
        yield
        return
    with one_slice(settings.work, what):
        yield


def one_slice(work: Path, what: Location) -> AbstractContextManager[None]:
    """At a time. A process that makes shards for a slice is one of it."""
    return exclusive(work, ".lock-common", waiting=f"another process writes {what}")


def clean(folder: Location, shards: Iterable[tuple[str, int]]) -> None:
    """Removes, or brings to its end, what killed processes left of these shards; in remote folders, which have no
    locks, what is so old that no other run is still at it.
    """
    ours = {f"{split}/{shard:06d}" for split, shard in shards}
    left = [
        path for path in (folder.files() if isinstance(folder, Url) else folder.glob("*/*.*"))
        if path.suffix in (".tmp", AHEAD) and f"{path.parent.name}/{path.name.partition('.')[0]}" in ours
    ]  # fmt: skip
    for path in _old_ones(folder, left) if isinstance(folder, Url) and left else left:
        finish(path) if path.suffix == AHEAD else path.unlink(missing_ok=True)


def _old_ones(folder: Url, left: Iterable[Any]) -> Iterator[Url]:
    """By the clock of the storage, which is that of their dates: this machine's may be days off."""
    settings = folder / "settings.json"
    with suppress(FileNotFoundError):  # there are settings where shards are, unless somebody has deleted them
        write_whole(settings, settings.read_bytes())
        now = settings.modified()
        for path in left:
            with suppress(FileNotFoundError):  # whose it is has just finished it
                if now - path.modified() > LEFT_BEHIND:
                    yield path


def summarize(paths: Sequence[Location], max_failed_fraction: float, title: str) -> None:
    """Prints counts by status and the commonest reasons. Raises UserError above `max_failed_fraction`."""
    found = Statuses()
    with ThreadPoolExecutor(READERS) as pool:
        for table in _looked_at(pool.map(partial(read_table, columns=COLUMNS), paths), len(paths)):
            found.add(table)
    statuses = found.counts()
    total = sum(statuses.values())
    each = ", ".join(f"{n:,} {name}" for name, n in statuses.most_common())
    tqdm.write(f"{title}: {number_of(total, 'segment')}, {each}")
    reasons = list(found.reasons())
    for line in reasons[:REASONS_SHOWN]:
        tqdm.write(f"  {line}")
    if more := len(reasons[REASONS_SHOWN:]):
        tqdm.write(f"  and {more} more {'reason' if more == 1 else 'reasons'}: `just inspect` shows them")
    lost = statuses[FAILED] + statuses[REJECTED]
    if lost > max_failed_fraction * total:
        ways = ["raise max_failed_fraction", *(f"mend {what} and add {key}" for what, key, n in (
            ("the recordings", "retry=failed", statuses[FAILED] - found.unplanned),
            ("what could not even be planned", "extend=true to shard-codes", found.unplanned),
        ) if n)]  # fmt: skip
        stays = " What was rejected stays so: docs/scale.md says how to try other limits" if statuses[REJECTED] else ""
        raise UserError(
            f"{lost} of {total} segments failed or were rejected, above max_failed_fraction={max_failed_fraction:g}; "
            f"the rows say why. What succeeded is kept: {', or '.join(ways)}.{stays}"
        )
    if total and not statuses[OK]:
        raise UserError(f"{title}: no segment is usable")
