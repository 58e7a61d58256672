"""What takes minutes is said while it does: a process that waits without a word looks like one that stands still."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SLOW_SECONDS = 300.0


class Watch:
    """A thread that looks now and then at what is being done. One for each thing would cost each step a millisecond.

    It keeps nothing alive, and ends with the object whose method `say` is.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = weakref.WeakMethod(say)
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
        while self._say() is not None and not self._closed.wait(SLOW_SECONDS / 10):
            said = self._tell(said)

    def _tell(self, said: tuple[str, float] | None) -> tuple[str, float] | None:
        """What was said last, now."""
        doing, say = self._doing, self._say()
        if say is None or doing is None or doing is said or time.monotonic() - doing[1] < SLOW_SECONDS:
            return said
        say(doing[0])
        return doing
