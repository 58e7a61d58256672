"""Long recordings through a model of bounded reach: windows with overlap, their outputs joined.

Windows lie on a grid fixed by the recording alone, so a stretch of the output is the same whoever asks for it.
Positions are input samples at 16 kHz, or output samples at 48 kHz where a name says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from codec.audio import Samples
from pipeline.sidon import FRAME, INPUT_RATE, PADDING, UPSAMPLING

CROSSFADE = 960  # output samples over which neighbouring windows are blended at a seam (20 ms)


@dataclass(frozen=True)
class Window:
    """Input samples [start, stop) of a recording, heard with `left` and `right` more."""

    start: int
    stop: int
    left: int
    right: int

    @property
    def frames(self) -> int:
        return -(-(self.left + self.stop - self.start + self.right) // FRAME)

    @property
    def padded(self) -> tuple[int, int]:
        """The stretch that the model is given: whole feature frames and the front end's padding."""
        first = self.start - self.left
        return first - PADDING, first + self.frames * FRAME + PADDING

    @property
    def first_48k(self) -> int:
        """Where this window's stretch of the joined output begins."""
        return self.start * UPSAMPLING - (CROSSFADE // 2 if self.left else 0)


@dataclass(frozen=True)
class Grid:
    """Windows that own `hop` samples each and overlap their neighbours by `overlap` on each side."""

    hop: int
    overlap: int

    @classmethod
    def of(cls, window_seconds: float, overlap_seconds: float) -> Grid:
        window, overlap = (round(seconds * INPUT_RATE / FRAME) * FRAME for seconds in (window_seconds, overlap_seconds))
        return cls(window - 2 * overlap, overlap)

    def windows(self, total: int, a_48k: int, b_48k: int) -> list[Window]:
        """Those of a recording of `total` samples that output samples [a, b) need; a short rest joins the last one."""
        last = max(-(-(total - self.overlap) // self.hop), 1) - 1
        first = min(max((a_48k - CROSSFADE) // (self.hop * UPSAMPLING), 0), last)
        final = min(max((b_48k + CROSSFADE // 2 - 1) // (self.hop * UPSAMPLING), first), last)
        return [self._window(number, total, number == last) for number in range(first, final + 1)]

    def _window(self, number: int, total: int, is_last: bool) -> Window:
        start, stop = number * self.hop, total if is_last else (number + 1) * self.hop
        return Window(start, stop, min(self.overlap, start), min(self.overlap, total - stop))


class Joiner:
    """Consecutive windows' outputs → consecutive stretches from `first_48k` of the first one on.

    Each seam is blended over CROSSFADE samples.
    """

    def __init__(self) -> None:
        self._tail: Samples | None = None

    def add(self, window: Window, output: Samples) -> Samples:
        begin = window.left * UPSAMPLING - (CROSSFADE // 2 if window.left else 0)
        end = (window.left + window.stop - window.start) * UPSAMPLING - (CROSSFADE // 2 if window.right else 0)
        stretch = output[begin:end].copy()
        if self._tail is not None:
            rise = np.linspace(0, 1, CROSSFADE, dtype=np.float32)
            stretch[:CROSSFADE] = stretch[:CROSSFADE] * rise + self._tail * (1 - rise)
        self._tail = output[end : end + CROSSFADE].copy()
        return stretch
