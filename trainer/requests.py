"""What is asked of a running training by signals: SIGTERM to save and leave, SIGUSR1 to save and go on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Requests:
    """`leave` and `save` become true when their signal arrives; the loop answers within its step."""

    def __init__(self) -> None:
        self.leave = self.save = False

    def hear(self, number: int, frame: Any) -> None:
        if number == signal.SIGTERM:
            self.leave = True
        else:
            self.save = True


@contextmanager
def requests() -> Iterator[Requests]:
    asked = Requests()
    before = {number: signal.signal(number, asked.hear) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
