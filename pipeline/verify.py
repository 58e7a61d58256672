"""`just verify`: every shard against its sidecar, the index and the contract."""

from __future__ import annotations

from tqdm import tqdm

from pipeline.settings import VerifySettings
from shards.contract import INDEX_NAME, SUMS_NAME
from shards.errors import ShardError
from shards.index import check_index, listed, problems, shard_list, unlisted


def verify(settings: VerifySettings) -> None:
    """Prints each problem as one line. Raises ShardError when there was one."""
    sums = check_index(settings.shards)
    shards = shard_list(settings.shards)
    found = 0
    if list(sums) != list(listed(shards)):
        tqdm.write(f"{settings.shards / SUMS_NAME}: its files are not those of {INDEX_NAME}")
        found += 1
    for split, shard in tqdm(shards, desc="verifying", unit="shard", disable=None):
        for problem in problems(settings.shards, split, shard, sums):
            tqdm.write(problem)
            found += 1
    for problem in unlisted(settings.shards, shards):
        tqdm.write(problem)
        found += 1
    if found:
        raise ShardError(
            f"{found} problem(s) in {len(shards)} shards: delete what is damaged, run `just shard-targets`"
        )
    tqdm.write(f"{settings.shards}: {len(shards)} shards are whole")
