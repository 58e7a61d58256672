"""What is asked of a running training by signals: SIGTERM or Ctrl-C to save and leave, SIGUSR1 to save and go on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Requests:
    """What the loop answers within its step. A second Ctrl-C does not wait for that."""

    def __init__(self) -> None:
        self.leave = False
        self._saves = self._answered = 0

    def hear(self, number: int, frame: Any) -> None:
        if number == signal.SIGUSR1:
            self._saves += 1
            return
        self.leave = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def save(self) -> bool:
        """Whether SIGUSR1 came since the last call."""
        before, self._answered = self._answered, self._saves  # what comes from here on is the next call's
        return self._answered > before


@contextmanager
def requests() -> Iterator[Requests]:
    asked = Requests()
    before = {number: signal.signal(number, asked.hear) for number in HEARD}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
