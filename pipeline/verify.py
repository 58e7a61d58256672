"""`just verify`: every shard against its sidecar, the index and the contract."""

from __future__ import annotations

import os
from collections.abc import Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from configs.granted import granted_cores
from configs.progress import progress_bar
from pipeline.settings import VerifySettings
from shards.cache import ShardCache
from shards.contract import INDEX_NAME, PLAN_NAME, SUMS_NAME, tar_path
from shards.damage import problems, unlisted
from shards.errors import ShardError, printable
from shards.files import exclusive
from shards.index import check_index, compact, listed, shard_list
from shards.pieces import Fetched
from shards.storage import Location, Url
from shards.writer import read_metadata

LEAST_THREADS = 4  # also on fewer cores: reading waits for disks
DAMAGED = "damaged"  # below the shards; of no split, so that nobody reads it
INDEX_BYTES = 8 << 30  # at most, of a remote one


def verify(settings: VerifySettings) -> None:
    """Prints each problem as one line. Raises ShardError when there was one, unless it is set aside."""
    with _no_run_beside(settings.shards) if settings.set_aside else nullcontext():
        _verify(settings)


def _no_run_beside(folder: Location) -> AbstractContextManager[None]:
    """A shard that is made anew meanwhile is another than its index says, and would be set aside."""
    if isinstance(folder, Path):
        for work in (folder.absolute().parent, folder.resolve().parent):  # either may be named by a link
            if (work / PLAN_NAME).exists():
                return exclusive(work)
    return nullcontext()


def _verify(settings: VerifySettings) -> None:
    folder = settings.shards
    sums, index = _index(folder)
    shards = shard_list(folder)
    found, left, damaged = 0, 0, []
    if list(sums) != list(listed(shards)):
        tqdm.write(f"{folder / SUMS_NAME}: its files are not those of {INDEX_NAME}")
        found += 1

    def of_shard(place: tuple[str, int]) -> tuple[list[str], bool]:
        """What is wrong, and whether that is damage: what its disk or server does not read now may be whole."""
        try:
            of_one = list(problems(folder, *place, sums, index))
            return of_one, bool(of_one)
        except OSError as error:
            if isinstance(folder, Url):  # of this machine, to which it was fetched
                raise
            return [f"{error.filename or tar_path(folder, *place)}: {os.strerror(error.errno or 0)}"], False

    with ThreadPoolExecutor(_threads(settings)) as pool, ExitStack() as left_early:
        left_early.callback(pool.shutdown, cancel_futures=True)  # Ctrl-C waits for the shards in hand alone
        each = pool.map(of_shard, shards)
        bar = progress_bar(each, desc="verifying", total=len(shards), unit="shard")
        for place, (of_one, is_damage) in zip(shards, bar, strict=True):
            said = _said(of_one)
            found, left = (found + said, left) if is_damage else (found, left + said)
            damaged += [place] if is_damage else []
    left += _said(list(unlisted(folder, shards)))
    if damaged and settings.set_aside and isinstance(folder, Path):
        found, shards = 0, set_aside(folder, set(damaged))
    found += left
    if found:
        raise ShardError(
            f"{found} problem(s) in {len(shards)} shards: delete what is damaged, run `just shard-targets`; where its "
            "recordings are gone, set_aside=true leaves damaged shards out of the index"
        )
    tqdm.write(f"{folder}: {len(shards)} shards are whole")


def set_aside(folder: Path, damaged: Set[tuple[str, int]]) -> list[tuple[str, int]]:
    """Writes an index of the other shards, then moves these; returns the others. Raises ShardError without any."""
    whole = [place for place in shard_list(folder) if place not in damaged]
    if not whole:
        raise ShardError(f"{folder}: no shard is whole, and nothing was set aside")
    compact(folder, whole, {"calibration": read_metadata(folder / INDEX_NAME).get("calibration")})
    for split, shard in damaged:
        aside = folder / DAMAGED / split
        aside.mkdir(parents=True, exist_ok=True)
        for path in (folder / split / f"{shard:06d}{suffix}" for suffix in (".tar", ".parquet")):
            if path.exists():
                path.replace(aside / path.name)
    tqdm.write(
        f"{len(damaged)} of {len(damaged) + len(whole)} shards are in {folder / DAMAGED} and no longer in the index: a "
        "training goes on with resume=other_samples; `just shard-targets` makes them anew from their recordings"
    )
    return whole


def _index(folder: Location) -> tuple[dict[str, str], Path | Fetched]:
    """What SHA256SUMS says, and the index; of a remote one no copy that was fetched before."""
    path = folder / INDEX_NAME
    with TemporaryDirectory() as empty:
        sums = check_index(folder, ShardCache(Path(empty), INDEX_BYTES))
    return sums, Fetched(path.read_bytes(), str(path)) if isinstance(path, Url) else path


def _said(problems: Sequence[str]) -> int:
    for problem in problems:
        tqdm.write(printable(problem))
    return len(problems)


def _threads(settings: VerifySettings) -> int:
    return max(granted_cores(), LEAST_THREADS) if settings.threads == "auto" else settings.threads
