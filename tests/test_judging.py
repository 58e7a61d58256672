"""Every limit rejects what breaks it, and on real speech planted faults are found while good targets pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.signal

from benchmarks.judging import faults, found, planted, resynthesised, run
from codec.audio import Samples
from configs.loader import load_settings
from demo.voice import synthesize
from pipeline.fidelity import speech_share
from pipeline.judging import judge
from pipeline.settings import TargetsSettings
from shards.contract import REJECTED, TARGET_RATE


def limits(**changes: Any) -> TargetsSettings:
    return load_settings(TargetsSettings, "shard_targets.json", []).model_copy(update=changes)


def lowpassed(samples: Samples, hertz: float) -> Samples:
    return scipy.signal.lfilter(scipy.signal.firwin(801, hertz, fs=TARGET_RATE), 1, np.roll(samples, -400)).astype("f4")


@pytest.fixture(scope="module")
def pair() -> tuple[Samples, Samples]:
    voice = synthesize(0, 0, 3.0)
    return voice, resynthesised(voice, 0)


def test_a_good_target_passes(pair: tuple[Samples, Samples]) -> None:
    source, target = pair
    row = judge(target, source, limits())
    assert "status" not in row
    assert abs(row["lag_samples"]) < 24
    assert abs(row["level_difference_db"]) < 0.5
    assert 0.3 < row["speech_share"] <= 1
    assert row["source_bandwidth_hz"] > 20_000


@pytest.mark.parametrize(
    ("change", "settings", "reason"),
    [
        (lambda target: target * np.float32(30), {}, "max_clipped_fraction=0.01"),
        (lambda target: target[::-1].copy(), {}, "min_correlation=0.8"),
        (lambda target: np.roll(target, 400), {"min_correlation": 0.0}, "max_lag_samples=240"),
        (lambda target: target * np.float32(0.3), {}, "max_level_difference_db=6"),
        (lambda target: target, {"min_speech_share": 1.0}, "min_speech_share=1"),
        (lambda target: lowpassed(target, 4000), {"min_target_bandwidth_hz": 8000.0}, "min_target_bandwidth_hz=8000"),
    ],
)
def test_each_limit_names_itself(
    change: Any, settings: dict[str, Any], reason: str, pair: tuple[Samples, Samples]
) -> None:
    source, target = pair
    row = judge(change(target), source, limits(**settings))
    assert row["status"] == REJECTED
    assert reason in row["reason"]


def test_a_recording_is_compared_with_nothing(pair: tuple[Samples, Samples]) -> None:
    row = judge(pair[0], None, limits())
    assert "lag_samples" not in row
    assert row["source_bandwidth_hz"] == row["target_bandwidth_hz"]


def test_of_a_mixed_target_sidons_part_is_judged(pair: tuple[Samples, Samples]) -> None:
    source, restored = pair
    row = judge(source, source, limits(), restored=np.roll(restored, 480))
    assert row["status"] == REJECTED
    assert abs(row["lag_samples"] - 480) < 24


def test_speech_share_counts_what_is_not_silence() -> None:
    voice = synthesize(0, 0, 2.0)
    padded = np.concatenate([voice, np.zeros(2 * len(voice), np.float32)])
    assert speech_share(padded) == pytest.approx(speech_share(voice) / 3, abs=0.02)
    assert speech_share(np.zeros(TARGET_RATE, np.float32)) == 0


def test_planted_faults_on_made_voices(pair: tuple[Samples, Samples]) -> None:
    source, target = pair
    for name, spoil in faults(resynthesised(synthesize(1, 0, 3.0), 1), 0).items():
        assert judge(spoil(target), source, limits())["status"] == REJECTED, name
    assert found(planted(source, target, 0))


def test_real_speech(real_speech: Path) -> None:
    """As benchmarks/results/judging.json, on fewer segments: no more than one of each kind may go wrong."""
    number = 24
    rows, _ = run(real_speech, number, seed=1)
    counts = {row["what"]: row["segments"] for row in rows}
    assert counts["good ones rejected"] <= 1
    assert counts["planted delay and gain found"] >= number - 1
    for what, rejected in counts.items():
        if what.startswith("bad"):
            assert rejected >= number - 1, what
