"""Which group, best a speaker, a recording is of, where only its name says so."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import PurePosixPath

from shards.errors import UserError


def group_finder(pattern: str | None) -> Callable[[str], str]:
    """A name → the first group of `pattern` in it (None: the folder in which it lies). Raises UserError, also later."""
    if pattern is None:
        return _parent
    try:
        find_in = re.compile(pattern)
    except re.error as error:
        raise UserError(f"group_pattern={pattern}: {error}") from error

    def matched(name: str) -> str:
        match = find_in.search(name)
        if not match or not match.groups() or match[1] is None:
            raise UserError(
                f"group_pattern={pattern} names no group in {name!r}: it needs one pair of parentheses that match"
            )
        return str(match[1])

    return matched


def _parent(name: str) -> str:
    folder = name.rpartition("/")[0]
    is_plain = folder and "//" not in name and "/." not in f"/{folder}"
    return folder if is_plain else str(PurePosixPath(name).parent)
