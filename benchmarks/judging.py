"""Are good targets let through and bad ones found? Real speech, a stand-in that re-synthesises, faults planted.

The stand-in keeps the magnitudes of a recording and draws its phases anew, so that waveforms have nothing in common; it
says nothing of how SIDON itself scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from tqdm import tqdm

from benchmarks.harness import of_speech, report
from codec.audio import AudioError, Recording, Samples, probe
from codec.resample import Resampler
from configs.loader import load_settings
from pipeline.judging import judge
from pipeline.settings import JudgeSettings, TargetsSettings
from pipeline.sources import find
from shards.contract import REJECTED, TARGET_RATE

SECONDS = 4.0  # of the longest segment
PEAK = 0.5  # of the recordings, so that what is clipped was planted
MAX_DELAY = 1000  # samples at 48 kHz
GAINS_DB = (-20.0, 10.0)
LAG_TOLERANCE, LEVEL_TOLERANCE_DB = 24, 0.5
LIMITS = load_settings(TargetsSettings, "shard_targets.json", [])
ANY_TIME_AND_LEVEL = LIMITS.model_copy(update={"max_lag_samples": 2400.0, "max_level_difference_db": 60.0})


def resynthesised(samples: Samples, seed: int, iterations: int = 8) -> Samples:
    """Magnitudes kept, phases drawn anew and made consistent (Griffin and Lim, 1984)."""
    window = torch.hann_window(960)
    magnitude = torch.stft(torch.from_numpy(samples), 960, 240, window=window, return_complex=True).abs()
    angle = torch.rand(magnitude.shape, generator=torch.Generator().manual_seed(seed)) * 2 * np.pi
    phase = torch.polar(torch.ones_like(angle), angle)
    for _ in range(iterations):
        wav = torch.istft(magnitude * phase, 960, 240, window=window, length=len(samples))
        spectrum = torch.stft(wav, 960, 240, window=window, return_complex=True)
        phase = spectrum / spectrum.abs().clamp(min=1e-9)
    resynthesis: Samples = torch.istft(magnitude * phase, 960, 240, window=window, length=len(samples)).numpy()
    return resynthesis


def segments(speech: Path, number: int, seed: int) -> Iterator[tuple[str, Samples]]:
    """Group and samples at 48 kHz of the first segment of `number` recordings of 1 s or more, drawn at random."""
    sources = find(speech, "^[^/]+/([^/]+)/")[0]
    drawn = np.random.default_rng(seed).permutation(len(sources))
    for source in sources.take(drawn).to_pylist():
        if not number:
            return
        try:
            recording = Recording(Path(source["path"]), probe(Path(source["path"])))
            length = min(recording.length(TARGET_RATE), int(SECONDS * TARGET_RATE))
            samples = Resampler(recording, TARGET_RATE).read(0, length)
        except AudioError:
            continue
        if length >= TARGET_RATE:
            number -= 1
            yield source["group"], samples * np.float32(PEAK / np.abs(samples).max())


def faults(other: Samples, seed: int) -> dict[str, Callable[[Samples], Samples]]:
    """Name → what makes a bad target of a good one. `other` is another recording's target."""
    random = np.random.default_rng(seed)

    def noise(good: Samples) -> Samples:
        rms = np.sqrt(np.mean(np.square(good, dtype=np.float64)))
        return (rms * random.standard_normal(len(good))).astype(np.float32)

    return {
        "another recording's": lambda good: np.resize(other, len(good)),
        "silence": np.zeros_like,
        "noise": noise,
        "clipped": lambda good: np.clip(good * (6 / np.abs(good).max()), -1, 1).astype(np.float32),
        "50 ms late": lambda good: np.roll(good, TARGET_RATE // 20),
        "50 ms early": lambda good: np.roll(good, -TARGET_RATE // 20),
        "10 dB too loud": lambda good: good * np.float32(10**0.5),
    }


def planted(source: Samples, target: Samples, seed: int) -> dict[str, Any]:
    """A delay and a gain put on the target, and whether the judge, its limits on both lifted, finds them."""
    random = np.random.default_rng(seed)
    delay, gain_db = int(random.integers(-MAX_DELAY, MAX_DELAY + 1)), float(random.uniform(*GAINS_DB))
    changed = (np.roll(target, delay) * 10 ** (gain_db / 20)).astype(np.float32)
    row = judge(changed, source, ANY_TIME_AND_LEVEL)
    rejected = row.get("status") == REJECTED
    measured = row["lag_samples"] is not None and row["level_difference_db"] is not None
    return {
        "lag_error": row["lag_samples"] - delay if measured else None,
        "level_error": row["level_difference_db"] - gain_db if measured else None,
        "rejected": rejected,
    }


def found(result: dict[str, Any]) -> bool:
    errors = result["lag_error"], result["level_error"]
    return None not in errors and abs(errors[0]) <= LAG_TOLERANCE and abs(errors[1]) <= LEVEL_TOLERANCE_DB


def run(speech: Path, number: int, seed: int = 0) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the table, and what they rest on."""
    drawn = list(segments(speech, number, seed))
    targets = [resynthesised(samples, i) for i, (_, samples) in enumerate(tqdm(drawn, desc="re-synthesising"))]
    good, bad, alignments = list[dict[str, Any]](), Counter[str](), []
    for i, ((group, source), target) in enumerate(zip(tqdm(drawn, desc="judging"), targets, strict=True)):
        good.append(judge(target, source, LIMITS))
        alignments.append(planted(source, target, seed + i))
        others = [other for (name, _), other in zip(drawn, targets, strict=True) if name != group]
        for name, spoil in faults(others[i % len(others)], seed + i).items():
            bad[name] += judge(spoil(target), source, LIMITS).get("status") == REJECTED
    missed = [result for result in alignments if not found(result)]
    counts = {
        "good ones rejected": sum("status" in row for row in good),
        **{f"bad ones rejected: {name}": bad[name] for name in faults(targets[0], 0)},
        "planted delay and gain found": len(drawn) - len(missed),
        "not found, and rejected": sum(result["rejected"] for result in missed),
        "not found, and let through": sum(not result["rejected"] for result in missed),
    }
    through = [result for result in missed if not result["rejected"]]
    rows = [{"what": name, "segments": n, "share": n / len(drawn)} for name, n in counts.items()]
    context = {
        "segments": len(drawn),
        "seconds": round(sum(len(source) for _, source in drawn) / TARGET_RATE),
        "reasons": Counter(row["reason"] for row in good if "reason" in row),
        "limits": LIMITS.model_dump(include={*JudgeSettings.model_fields}),
        "errors let through": sorted(round(abs(result["lag_error"]), 1) for result in through),
        "tolerances": {"lag_samples": LAG_TOLERANCE, "level_db": LEVEL_TOLERANCE_DB},
    }
    return rows, context


@click.command(help=__doc__)
@of_speech
@click.option("--segments", type=click.IntRange(min=1), default=400, show_default=True, help="Of speech, at most.")
def main(speech: Path, segments: int) -> None:
    rows, context = run(speech, segments)
    report("judging", rows, **context)


if __name__ == "__main__":
    main()
