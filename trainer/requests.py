"""What is asked of a running training by signals: SIGTERM or Ctrl-C to save and leave, SIGUSR1 to save and go on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Requests:
    """`leave` and `save` become true when their signal arrives; the loop answers within its step.

    A second Ctrl-C does not wait for that.
    """

    def __init__(self) -> None:
        self.leave = self.save = False

    def hear(self, number: int, frame: Any) -> None:
        if number == signal.SIGUSR1:
            self.save = True
            return
        self.leave = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def requests() -> Iterator[Requests]:
    asked = Requests()
    before = {number: signal.signal(number, asked.hear) for number in HEARD}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
