"""Do the seams of a long recording show? Its joined output against windows that have no seam there.

Around each seam, and around points between seams, the joined output is compared with that of a window of the same
length centred on the point. A seam that is heard would differ more than the points between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from codec.audio import Recording, Samples
from codec.resample import Resampler
from pipeline.sidon import FRAME, INPUT_RATE, PADDING, UPSAMPLING, Sidon, high_passed
from pipeline.windows import Grid

REACH = 4800  # output samples compared on each side of a point (100 ms)


def points(grid: Grid, total: int) -> tuple[list[int], list[int]]:
    """Seams of a recording of `total` input samples, and points between them, a quarter of a window on."""
    last = max(-(-(total - grid.overlap) // grid.hop), 1) - 1
    seams = [number * grid.hop for number in range(1, last + 1)]
    return seams, [seam + grid.hop // 4 // FRAME * FRAME for seam in seams]


def differences_db(
    joined: Samples, recording: Recording, gain: float, sidon: Sidon, grid: Grid, at: Sequence[int]
) -> list[float]:
    """How far `joined` is from a window centred on each input sample of `at` (rising), in dB of the window's power.

    Points whose window would reach beyond the recording, and silent ones, are left out.
    """
    source = Resampler(recording, INPUT_RATE)
    half = (grid.hop + 2 * grid.overlap) // 2 // FRAME * FRAME
    found = []
    for point in at:
        if point < half or point + half > recording.length(INPUT_RATE):
            continue
        heard = source.read(point - half - PADDING, point + half + PADDING) * np.float32(gain)
        (output,) = sidon.restore([high_passed(heard)])
        centred = output[half * UPSAMPLING - REACH : half * UPSAMPLING + REACH].astype(np.float64) / gain
        around = joined[point * UPSAMPLING - REACH : point * UPSAMPLING + REACH]
        power, apart = np.square(centred).mean(), np.square(around - centred).mean()
        if power > 1e-9:
            found.append(10 * math.log10(apart / power + 1e-20))
    return found
