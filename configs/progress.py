"""Progress of whatever takes long: a bar on a terminal; in a file, such as the log of a job, a line each minute."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 60


def progress_bar(*args: Any, **options: Any) -> Any:
    """tqdm's, with its arguments. In a file it says nothing of what is done within the first minute."""
    if not sys.stderr.isatty():
        intervals = dict.fromkeys(("mininterval", "maxinterval", "delay"), SECONDS_BETWEEN_LINES)
        options |= {"file": _Lines(), "position": 0, **intervals}  # else one within another moves the cursor
        options["miniters"] = 1  # else tqdm's monitor shows a state once more
        return _Once(*args, **options)
    return tqdm(*args, **options)


class _Once(tqdm):  # type: ignore[misc]  # untyped
    """Ends without a word where its last state was shown."""

    def close(self) -> None:
        self.leave = not self.disable and self.n > self.last_print_n
        super().close()


class _Lines:
    """Shows each state of a bar as a line of its own: a job's log shows none that has not ended."""

    def write(self, text: str) -> None:
        if state := text.strip():
            print(state, file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass
