"""What takes minutes is said while it does: a process that waits without a word looks like one that stands still."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SLOW_SECONDS = 300.0


class Watch:
    """A thread that looks now and then at what is being done. One for each thing would cost each step a millisecond."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._doing: tuple[str, float] | None = None  # and since when
        self._closed = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        self._doing = what, time.monotonic()
        try:
            yield
        finally:
            self._doing = None

    def close(self) -> None:
        self._closed.set()

    def _look(self) -> None:
        said = None
        while not self._closed.wait(SLOW_SECONDS / 10):
            doing = self._doing
            if doing is not None and doing is not said and time.monotonic() - doing[1] >= SLOW_SECONDS:
                said = doing
                self._say(doing[0])
