"""How often do the intervals of `just eval` hold the true mean? Simulated voices, beside SciPy's plain bootstrap.

95 % is what they claim. CASES evaluations for each line; the share's own standard error is below 0.8 points.
"""

from __future__ import annotations

import click
import numpy as np
from scipy import stats

from benchmarks.harness import report
from trainer.summary import COVERAGE, Floats, interval

CASES, RESAMPLES, SEED = 2000, 1000, 0
VOICES = (5, 10, 20)
TRUE_MEAN = 1.0
DRAWN = {
    "normal": lambda random, number: random.normal(TRUE_MEAN, 1.0, number),
    "exponential": lambda random, number: random.exponential(TRUE_MEAN, number),
}


def ours(values: Floats, case: int) -> bool:
    _, low, high = interval(values, np.arange(len(values)), RESAMPLES, case)
    assert low is not None
    assert high is not None
    return low <= TRUE_MEAN <= high


def plain(values: Floats, case: int) -> bool:
    """By 2.5 and 97.5 % of the means of voices drawn with replacement."""
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, confidence_level=COVERAGE / 100, method="percentile", rng=case
    )
    return bool(found.confidence_interval.low <= TRUE_MEAN <= found.confidence_interval.high)


@click.command(help=__doc__)
def main() -> None:
    random = np.random.default_rng(SEED)
    rows = []
    for name, draw in DRAWN.items():
        for number in VOICES:
            cases = [draw(random, number) for _ in range(CASES)]
            row: dict[str, object] = {"voices_are": name, "voices": number}
            for way in (ours, plain):
                share = sum(way(values, case) for case, values in enumerate(cases)) / CASES
                row[f"{way.__name__}_percent"] = 100 * share
            rows.append(row)
    report("intervals", rows, cases=CASES, resamples=RESAMPLES)


if __name__ == "__main__":
    main()
