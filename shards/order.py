"""Which sample stands where in training: a pure function of seed, window, index and the position.

Shards are permuted once per epoch; samples are permuted inside windows of `window` consecutive shards, so a reader
needs at most that many shards at a time. Epochs follow each other without a gap: a batch may hold the end of one
and the beginning of the next, and every sample is seen exactly once per epoch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt


def random_words(n: int, *key: int | str) -> npt.NDArray[np.uint64]:
    """`n` random 64-bit words that depend on `key` alone. Philox is counter-based and its stream is stable in NumPy."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64)).random_raw(n)


@lru_cache(maxsize=32)
def permutation(n: int, *key: int | str) -> npt.NDArray[np.intp]:
    return np.argsort(random_words(n, *key), kind="stable")


@dataclass(frozen=True)
class Order:
    """`counts` holds the number of samples of each shard; a sample's number runs through the shards in that order."""

    counts: tuple[int, ...]
    seed: int
    window: int

    @cached_property
    def _counts(self) -> npt.NDArray[np.int64]:
        return np.asarray(self.counts, dtype=np.int64)

    @cached_property
    def _first_of_shard(self) -> npt.NDArray[np.int64]:
        return np.cumsum(self._counts) - self._counts

    @cached_property
    def samples_per_epoch(self) -> int:
        return sum(self.counts)

    def shards_from(self, position: int) -> list[int]:
        """The shards that hold the samples from `position` on: those of its window, then those of the next."""
        found: list[int] = []
        for _ in range(2):
            _, place, _, members, ends = self._window_of(position)
            found += members.tolist()
            position += int(ends[-1]) - place
        return found

    def sample_at(self, position: int) -> int:
        """Number of the sample at `position` of the endless stream."""
        epoch, place, window, members, ends = self._window_of(position)
        start = int(ends[0] - self._counts[members[0]])
        shuffled = permutation(int(ends[-1]) - start, self.seed, "samples", epoch, window)
        chosen = start + int(shuffled[place - start])
        member = int(np.searchsorted(ends, chosen, side="right"))
        row = chosen - int(ends[member] - self._counts[members[member]])
        return int(self._first_of_shard[members[member]]) + row

    def _window_of(self, position: int) -> tuple[int, int, int, npt.NDArray[np.intp], npt.NDArray[np.int64]]:
        """Epoch, place in it, number of the window there, the window's shards, and the places at which they end."""
        epoch, place = divmod(position, self.samples_per_epoch)
        shards = permutation(len(self.counts), self.seed, "shards", epoch)
        ends = np.cumsum(self._counts[shards])
        window = int(np.searchsorted(ends, place, side="right")) // self.window
        own = slice(window * self.window, (window + 1) * self.window)
        return epoch, place, window, shards[own], ends[own]


def rank_slice(n: int, rank: int, world_size: int) -> range:
    """The places of a global batch of `n` that belong to `rank`: contiguous, and all places belong to one rank."""
    return range(n * rank // world_size, n * (rank + 1) // world_size)
