"""Which groups train and which validate: by the hash of their names, so that it stays as recordings are added."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from configs.words import number_of
from shards.errors import UserError

ONE_VOICE = "To split the recordings of one speaker, set group_pattern='(.*)' and leave out the speaker in a manifest"


def assign_splits(
    given: Iterable[tuple[str, str | None]], fraction: float, seed: int, known: Mapping[str, str] | None = None
) -> dict[str, str]:
    """(group, the manifest's split for it) → split of each group, by the hash of its name where nothing is given.

    What is `known` stays. With two groups or more neither split is empty. Raises UserError when that cannot be, or
    when a group would be cut.
    """
    wanted: dict[str, str | None] = dict(known or {})
    for group, split in given:
        if wanted.setdefault(group, split) != split and not (group in (known or {}) and split is None):
            found = f"{wanted[group] or 'no split'} and {split or 'no split'}"
            raise UserError(
                f"group {group!r} stands in more than one split ({found}): it must stay in one. {ONE_VOICE}"
            )
    splits = {group: split or _by_hash(group, fraction, seed) for group, split in wanted.items()}
    free = sorted((group for group, split in wanted.items() if not split), key=lambda group: hashed(group, seed))
    for split, candidates in (("validation", free), ("train", free[::-1])):
        if split not in splits.values():
            if len(splits) < 2 or not candidates:
                found = f"{number_of(len(splits), 'group')}, such as {next(iter(splits))!r}"
                ways = "Put speakers into folders or name them in a manifest"
                raise UserError(f"no group is left for {split}: found {found}. {ways}. {ONE_VOICE}")
            splits[candidates[0]] = split
    return splits


def _by_hash(group: str, fraction: float, seed: int) -> str:
    return "validation" if hashed(group, seed) < fraction * 2**64 else "train"


def hashed(text: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{text}".encode()).digest()[:8], "big")
