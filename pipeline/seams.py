"""Do the seams of a long recording show? Its joined output against windows that have no seam there.

Around each seam, and around points between seams, the joined output is compared with that of a window of the same
length centred on the point. A seam that is heard would differ more than the points between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

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

    Levels are free on each side of a point: windows have their own, each brought to the recording's. Points whose
    window would reach beyond the recording, and silent ones, are left out.
    """
    source = Resampler(recording, INPUT_RATE)
    half = (grid.hop + 2 * grid.overlap) // 2 // FRAME * FRAME
    found = []
    for point in at:
        if point < half or point + half > recording.length(INPUT_RATE):
            continue
        padded = source.read(point - half - PADDING, point + half + PADDING) * np.float32(gain)
        (output,) = sidon.restore([high_passed(padded)])
        centred = output[half * UPSAMPLING - REACH : half * UPSAMPLING + REACH].astype(np.float64) / gain
        around = joined[point * UPSAMPLING - REACH : point * UPSAMPLING + REACH]
        if np.square(centred).mean() > 1e-9:
            sides = zip(np.split(centred, 2), np.split(around.astype(np.float64), 2), strict=True)
            apart, power = np.sum([_apart(expected, heard) for expected, heard in sides], axis=0)
            found.append(10 * math.log10(apart / max(power, 1e-20) + 1e-20))
    return found


def _apart(expected: npt.NDArray[np.float64], heard: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Energy of what is not `expected` at any level, and of what is."""
    energy = float(expected @ expected)
    level = float(expected @ heard) / energy if energy > 0 else 0.0
    return float(np.square(heard - level * expected).sum()), level**2 * energy
