"""Lag, level and correlation of a re-synthesised target, whose waveform is not the recording's."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.judging import resynthesised
from codec.audio import Samples
from configs.loader import load_settings
from demo.voice import synthesize
from pipeline.fidelity import compare
from pipeline.judging import judge
from pipeline.settings import TargetsSettings
from shards.contract import REJECTED, TARGET_RATE


@pytest.fixture(scope="module")
def pairs() -> list[tuple[Samples, Samples]]:
    voices = [synthesize(speaker, utterance, 3.0) for speaker in range(4) for utterance in range(5)]
    return [(voice, resynthesised(voice, seed)) for seed, voice in enumerate(voices)]


def test_a_recording_is_itself() -> None:
    voice = synthesize(0, 0, 2.0)
    found = compare(voice, voice)
    assert found["lag_samples"] == pytest.approx(0, abs=0.01)
    assert found["level_difference_db"] == pytest.approx(0, abs=1e-6)
    assert found["correlation"] == pytest.approx(1, abs=1e-5)


def test_the_waveforms_have_nothing_in_common(pairs: list[tuple[Samples, Samples]]) -> None:
    assert np.median([abs(np.corrcoef(a, b)[0, 1]) for a, b in pairs]) < 0.3


def test_planted_delays_and_gains_are_found(pairs: list[tuple[Samples, Samples]]) -> None:
    random = np.random.default_rng(0)
    good = 0
    for source, target in pairs:
        delay, gain_db = int(random.integers(-1000, 1001)), random.uniform(-20, 10)
        found = compare(source, (np.roll(target, delay) * 10 ** (gain_db / 20)).astype(np.float32))
        own = compare(source, target)["level_difference_db"]
        assert found["lag_samples"] is not None
        assert found["level_difference_db"] is not None
        assert own is not None
        good += abs(found["lag_samples"] - delay) <= 24 and abs(found["level_difference_db"] - own - gain_db) < 0.5
    assert good >= 0.95 * len(pairs)


def test_what_is_said_decides_the_correlation(pairs: list[tuple[Samples, Samples]]) -> None:
    same = [compare(source, target)["correlation"] or 0 for source, target in pairs]
    others = [target for _, target in pairs[1:]] + [pairs[0][1]]
    other = [compare(source, target)["correlation"] or 0 for (source, _), target in zip(pairs, others, strict=True)]
    assert min(same) > 0.9
    assert max(other) < 0.8


def test_two_silences_have_nothing_to_compare() -> None:
    silence = np.zeros(TARGET_RATE, np.float32)
    assert set(compare(silence, silence).values()) == {None}


@pytest.mark.parametrize("silent", ["source", "target"])
def test_one_silence_says_nothing_of_the_other(silent: str) -> None:
    voice, silence = synthesize(0, 0, 1.0), np.zeros(TARGET_RATE, np.float32)
    found = compare(*((silence, voice) if silent == "source" else (voice, silence)))
    assert found["correlation"] == 0.0
    assert found["lag_samples"] is None
    assert found["level_difference_db"] is not None
    assert (found["level_difference_db"] > 0) == (silent == "source")


def at_level(samples: Samples, level_db: float, seed: int) -> Samples:
    """Of that RMS, dB re full scale, as 16-bit with dither."""
    dither = np.random.default_rng(seed).triangular(-1, 0, 1, len(samples))
    gain = 32_768 * 10 ** (level_db / 20) / np.sqrt(np.square(samples, dtype=np.float64).mean())
    return (np.round(gain * samples + dither) / 32_768).astype(np.float32)


@pytest.mark.parametrize("level_db", [-66.0, -80.0])
def test_quiet_speech_is_judged(pairs: list[tuple[Samples, Samples]], level_db: float) -> None:
    limits = load_settings(TargetsSettings, "shard_targets.json", [])
    quiet = [tuple(at_level(samples, level_db, n) for samples in pair) for n, pair in enumerate(pairs)]
    for n, (source, own) in enumerate(quiet):
        assert "status" not in judge(own, source, limits)
        assert judge(quiet[n - 1][1], source, limits)["status"] == REJECTED


def test_quiet_noise_is_nothing_to_compare() -> None:
    """Neither rounding, nor a pause that SIDON made quieter."""
    noise = np.random.default_rng(0).standard_normal((2, 4 * TARGET_RATE)).astype(np.float32)
    rounding = at_level(noise[0], -200, 0), at_level(noise[1], -200, 1)
    pause = at_level(noise[0], -75, 0), at_level(noise[1], -90, 1)
    for pair in (rounding, pause):
        assert set(compare(*pair).values()) == {None}
