"""What a reader keeps of a signal that it gets from front to back."""

from __future__ import annotations

import numpy as np

from codec.audio import Samples


class Held:
    """Consecutive stretches, the first from sample `start` on. `read(a, b)`, `a` never falling, drops what is past.

    What lies before sample 0 and beyond the last stretch is zero.
    """

    def __init__(self, start: int) -> None:
        self._start = self.end = start
        self._stretches = list[Samples]()

    def append(self, stretch: Samples) -> None:
        self._stretches.append(stretch)
        self.end += len(stretch)

    def drop_before(self, a: int) -> None:
        while self._stretches and self._start < a:
            first = self._stretches.pop(0)
            rest = first[a - self._start :]
            self._start += len(first) - len(rest)
            if len(rest):
                self._stretches.insert(0, rest)

    def read(self, a: int, b: int) -> Samples:
        assert self._start <= max(a, 0), "stretches must be read in order"
        self.drop_before(a)
        held = np.concatenate([np.zeros(0, np.float32), *self._stretches])
        self._stretches = [held]
        before = min(max(-a, 0), b - a)
        there = held[: max(b - self._start, 0)]
        return np.pad(there, (before, b - a - before - len(there)))
