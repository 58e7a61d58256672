"""Targets have the level of their recording everywhere in it, though the model does not hear levels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import torch

from codec.audio import Samples
from pipeline.level import LEAST_DB, MOST_DB, PEAK, match
from pipeline.sidon import Sidon, TorchScript
from pipeline.teachers import Teacher
from tests.helpers import restored, targets_settings
from tests.sidon_standin import build, random_pattern, recording


@pytest.fixture(scope="module")
def sidon(tmp_path_factory: pytest.TempPathFactory) -> Sidon:
    """A stand-in that speaks at 0.9 of full scale, however loud what it hears is."""
    folder = tmp_path_factory.mktemp("level") / "sidon"
    pins, cpu = build(folder), torch.device("cpu")
    return Sidon(TorchScript(str(folder), pins, cpu), cpu)


@pytest.fixture
def teacher(sidon: Sidon, tmp_path: Path) -> Teacher:
    return Teacher(targets_settings(tmp_path, "teacher=sidon", "window_seconds=4", "overlap_seconds=0.5"), sidon)


def levels_db(found: Samples, expected: Samples) -> npt.NDArray[np.float64]:
    """Of each second, found against expected."""
    seconds = len(expected) // 48_000
    rms = [np.sqrt(np.square(x[: seconds * 48_000].reshape(seconds, -1)).mean(axis=1)) for x in (found, expected)]
    levels: npt.NDArray[np.float64] = 20 * np.log10(rms[0] / rms[1])
    return levels


@pytest.mark.parametrize("quieter_db", [5.0, 20.0])
def test_a_speaker_who_turns_away_stays_as_quiet(quieter_db: float, teacher: Teacher, tmp_path: Path) -> None:
    pattern, quieter = random_pattern(12.0, 0), 10 ** (-quieter_db / 20)
    from_6_s = np.arange(12 * 48_000) >= 6 * 48_000  # where a window begins
    whole = recording(pattern, 48_000, 0.5) * np.where(from_6_s, quieter, 1).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", whole, 48_000, "FLOAT")
    assert np.abs(levels_db(restored(tmp_path / "a.wav", teacher), whole)).max() < 0.2


def test_a_click_does_not_make_the_others_louder(teacher: Teacher, tmp_path: Path) -> None:
    whole = recording(random_pattern(9.0, 1), 48_000, 0.25)
    clicking = whole.copy()
    clicking[48_000 * 4 + 7] = 0.9
    soundfile.write(tmp_path / "a.wav", clicking, 48_000, "FLOAT")
    assert np.abs(levels_db(restored(tmp_path / "a.wav", teacher), whole)).max() < 0.2


@pytest.mark.parametrize("spoken_db", [-25.0, -3.0, 0.0, 12.0, 50.0])
def test_what_is_corrected_is_bounded(spoken_db: float) -> None:
    """Towards louder above all: what is left of noise must not be brought up to it."""
    heard = recording(random_pattern(3.0, 2), 48_000, 0.5)
    factor, found_db = match(heard, (heard * 10 ** (spoken_db / 20)).astype(np.float32), PEAK)
    assert found_db == pytest.approx(spoken_db, abs=0.01)
    assert 20 * np.log10(factor) == pytest.approx(min(max(-spoken_db, LEAST_DB), MOST_DB), abs=0.01)


def test_levels_are_compared_where_both_speak() -> None:
    """What only one of them has says nothing of the other's level."""
    whole = recording(random_pattern(3.0, 2), 48_000, 0.5)
    half = whole * (np.arange(len(whole)) < len(whole) // 2).astype(np.float32)
    for pair in ((whole, half), (half, whole)):
        assert match(*pair, PEAK) == pytest.approx((1.0, 0.0), abs=0.01)


def test_what_is_left_of_noise_is_not_speech() -> None:
    """A second of speech beside four of noise as loud, which the model took down by 30 dB: speech is as it was."""
    speech = recording(random_pattern(1.0, 2), 48_000, 0.5)
    level = np.sqrt(np.square(speech).mean())
    noise = (level * np.random.default_rng(0).standard_normal(4 * 48_000)).astype(np.float32)
    heard, spoken = (np.concatenate([speech, gain * noise]) for gain in (np.float32(1), np.float32(10**-1.5)))
    assert match(heard, spoken, PEAK) == pytest.approx((1.0, 0.0), abs=0.01)


def test_what_only_one_can_have_is_not_compared() -> None:
    """A rumble that the model took away, and a band that it put there."""
    speech = recording(random_pattern(3.0, 2), 48_000, 0.3)
    rumble, band = (0.2 * np.sin(2 * np.pi * hz * np.arange(len(speech)) / 48_000) for hz in (10, 12_000))
    heard, spoken = ((speech + other).astype(np.float32) for other in (rumble, band))
    assert match(heard, spoken, PEAK) == pytest.approx((1.0, 0.0), abs=0.2)


@pytest.mark.parametrize(("frames", "factor"), [(9, 1.0), (10, 0.5)])
def test_fewer_than_a_fifth_of_a_second_in_which_both_speak_say_nothing(frames: int, factor: float) -> None:
    heard = np.zeros(100 * 960, np.float32)
    heard[: frames * 960] = np.random.default_rng(0).standard_normal(frames * 960)
    assert match(heard, 2 * heard, PEAK)[0] == pytest.approx(factor)


def test_noise_that_was_removed_stays_removed() -> None:
    noise = (0.01 * np.random.default_rng(0).standard_normal(3 * 48_000)).astype(np.float32)
    factor, _ = match(noise, (1e-4 * noise).astype(np.float32), PEAK)
    assert factor <= 10 ** (MOST_DB / 20)
    assert match(np.zeros(48_000, np.float32), noise[:48_000], 0.0) == (0.0, 0.0)
    assert match(noise[:100], noise[:100], PEAK) == (1.0, 0.0)  # too short to be judged
