"""Damage to files that stand complete: each must be noticed by `just verify` or where the file is read."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Damage = Callable[[bytes, random.Random], bytes]


def flip(data: bytes, chance: random.Random) -> bytes:
    """One bit."""
    place = chance.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]


def truncate(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def extend(data: bytes, chance: random.Random) -> bytes:
    return data + chance.randbytes(chance.randrange(1, 1024))


def blank(data: bytes, chance: random.Random) -> bytes:
    """A stretch of zeros, as a lost sector leaves it."""
    place = chance.randrange(len(data))
    return data[:place] + bytes(min(512, len(data) - place)) + data[place + 512 :]


def swap(data: bytes, chance: random.Random) -> bytes:
    """Two stretches of equal length change places."""
    length = chance.randrange(1, max(min(4096, len(data) // 2), 2))
    a, b = sorted(chance.randrange(len(data) - length + 1) for _ in range(2))
    b = max(b, a + length)
    if b + length > len(data):
        return data[length:] + data[:length]
    return data[:a] + data[b : b + length] + data[a + length : b] + data[a : a + length] + data[b + length :]


DAMAGES: tuple[Damage, ...] = (flip, truncate, extend, blank, swap)


@dataclass(frozen=True)
class Injury:
    """What was done to which file, and whether anything noticed."""

    file: str
    damage: str
    noticed: bool


def injuries(files: list[Path], notices: Callable[[Path], bool], count: int, seed: int, root: Path) -> Iterator[Injury]:
    """`count` times: damages one of `files`, asks whether it `notices`, and mends the file again.

    Damage that changes no byte (zeros over zeros) is drawn anew.
    """
    chance = random.Random(seed)
    done = 0
    while done < count:
        path, damage = chance.choice(files), DAMAGES[done % len(DAMAGES)]
        whole = path.read_bytes()
        broken = damage(whole, chance)
        if broken == whole:
            continue
        path.write_bytes(broken)
        try:
            yield Injury(str(path.relative_to(root)), damage.__name__, notices(path))
        finally:
            path.write_bytes(whole)
        done += 1
