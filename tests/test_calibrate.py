"""A wrong delay or level, or recordings that disagree, stop a run before it writes anything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from benchmarks.judging import resynthesised
from codec.audio import Samples
from demo.voice import synthesize
from pipeline.calibrate import FILE, calibrate, check, coherence, words
from pipeline.codes import shard_codes
from pipeline.settings import CalibrateSettings
from pipeline.sidon import Sidon
from pipeline.targets import shard_targets
from pipeline.teachers import Pieces, Teacher
from shards.contract import TARGET_RATE
from shards.errors import UserError
from shards.writer import read_metadata
from tests.helpers import codes_settings, targets_settings
from tests.sidon_standin import random_pattern, recording
from tests.test_execute import contents
from tests.test_sidon import standin

__all__ = ["standin"]


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plan and codes of six recordings of bursts."""
    audio, work = tmp_path_factory.mktemp("bursts"), tmp_path_factory.mktemp("coded") / "work"
    for number in range(6):
        (audio / f"voice_{number}").mkdir()
        bursts = recording(random_pattern(1.6, number), 16_000, 0.1 + 0.1 * number)
        soundfile.write(audio / f"voice_{number}" / "a.wav", bursts, 16_000, "FLOAT")
    shard_codes(codes_settings(audio, work, "segment_length=1.5"))
    return work


@pytest.fixture
def settings(standin: Path, coded: Path, tmp_path: Path) -> Callable[..., CalibrateSettings]:
    shutil.copytree(coded, tmp_path / "work")

    def make(*more: str) -> CalibrateSettings:
        pair = [f"sidon={standin}", f"weights={standin / 'weights.json'}"]
        made = targets_settings(tmp_path / "work", "teacher=sidon", *pair, *more)
        return CalibrateSettings.model_validate(made.model_dump())

    return make


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[Pieces, Samples], Samples]) -> None:
    read = Pieces.read

    def spoilt(self: Pieces, a: int, b: int) -> tuple[Samples, Samples]:
        source, restored = read(self, a, b)
        return source, change(self, restored)

    monkeypatch.setattr(Pieces, "read", spoilt)


def test_the_stand_in_is_in_time_and_level(
    settings: Callable[..., CalibrateSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    calibrate(settings())
    shown = capsys.readouterr().out
    assert "calibration on 6 recordings" in shown
    assert "lag_samples" in shown
    assert "coherence_8_12_khz" in shown
    kept = json.loads((settings().work / FILE).read_bytes())["result"]
    assert abs(kept["lag_samples"][1]) <= 5
    assert abs(kept["level_difference_db"][1]) < 0.1


def test_a_run_keeps_its_calibration_in_the_index(
    settings: Callable[..., CalibrateSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    shard_targets(settings())
    work = settings().work
    kept = json.loads((work / FILE).read_bytes())["result"]
    assert read_metadata(work / "shards" / "index.parquet")["calibration"] == kept
    monkeypatch.setattr("pipeline.calibrate.measure", lambda *_: pytest.fail("measured twice"))
    shard_targets(settings())


def test_too_few_recordings_are_measured_again_when_there_may_be_more(
    settings: Callable[..., CalibrateSettings],
) -> None:
    path = settings().work / FILE
    calibrate(settings("calibrate_recordings=4"))
    few = json.loads(path.read_bytes())
    few["result"]["recordings"] = 2
    path.write_text(json.dumps(few))  # type: ignore[union-attr]
    with pytest.raises(UserError, match="set calibrate_recordings higher, or add recordings"):
        shard_targets(settings("calibrate_recordings=4"))
    shard_targets(settings("calibrate_recordings=5"))
    assert json.loads(path.read_bytes())["result"]["recordings"] == 5


@pytest.mark.parametrize("left", [0, 240])
def test_a_wrong_delay_stops_the_run(left: int, settings: Callable[..., CalibrateSettings]) -> None:
    """The 10 ms of the padding not taken off, or half of them: no shard is written, and the message mends it."""
    wrong = settings(f"delay_samples={left}", "min_correlation=-1")
    with pytest.raises(UserError, match=r"all targets are \d+ samples .* behind .* set delay_samples=4[78]\d") as error:
        shard_targets(wrong)
    assert not list(Path(str(wrong.work)).rglob("*.tar"))
    shard_targets(settings(str(error.value).split("set ")[1]))


@pytest.mark.parametrize("gain_db", [-6.0, 6.0])
def test_a_wrong_level_stops_the_run(
    gain_db: float, settings: Callable[..., CalibrateSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda _, restored: restored * np.float32(10 ** (gain_db / 20)))
    with pytest.raises(UserError, match=rf"typically {gain_db:.1f} dB above their recordings"):
        shard_targets(settings())


def test_the_model_s_level_is_not_the_recordings(
    settings: Callable[..., CalibrateSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forgetting to scale back leaves every target at 0.9 of full scale, so recordings disagree."""
    spoil(monkeypatch, lambda self, restored: restored * np.float32(self.first.gain))
    with pytest.raises(UserError, match=r"recordings disagree: level_difference_db is .* max_level_difference_db="):
        shard_targets(settings())


def test_recordings_that_disagree_in_time_stop_the_run(
    settings: Callable[..., CalibrateSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda self, restored: np.roll(restored, int(2000 * self.first.gain) % 960 - 480))
    with pytest.raises(UserError, match=r"recordings disagree: lag_samples is .* of 6 recordings.*max_lag_samples="):
        shard_targets(settings())


def test_other_targets_stop_the_run(
    settings: Callable[..., CalibrateSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).standard_normal(10 * TARGET_RATE).astype(np.float32)
    spoil(monkeypatch, lambda _, restored: noise[: len(restored)] * np.float32(restored.std()))
    with pytest.raises(UserError, match=r"calibration: (recordings disagree|envelopes|all targets)"):
        shard_targets(settings())


def test_targets_that_do_not_rise_and_fall_as_their_recordings_stop_the_run(
    settings: Callable[..., CalibrateSettings],
) -> None:
    fine = {name: [0.0, 0.0, 0.0] for name in ("lag_samples", "level_difference_db", "model_level_db")}
    check({"recordings": 6, **fine, "correlation": [0.9, 0.9, 0.9]}, settings())
    with pytest.raises(UserError, match=r"typically correlate by 0\.20"):
        check({"recordings": 6, **fine, "correlation": [0.2, 0.2, 0.9]}, settings())


def test_recordings_as_they_are_have_nothing_to_calibrate(work: Path) -> None:
    with pytest.raises(UserError, match="teacher=recording has nothing to calibrate"):
        calibrate(CalibrateSettings.model_validate(targets_settings(work).model_dump()))


def test_auto_is_not_stopped_by_the_few_that_need_sidon(
    settings: Callable[..., CalibrateSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All six recordings are looked at, and only one of them is not its own target."""
    chosen = iter(["recording"] * 5 + ["sidon"] * 100)
    monkeypatch.setattr(Teacher, "chosen", lambda self, survey: next(chosen))
    calibrate(settings("teacher=auto", "calibrate_recordings=4"))
    assert json.loads((settings().work / FILE).read_bytes())["result"]["recordings"] == 1
    with pytest.raises(UserError, match="only 1 stretches hold"):
        check({"recordings": 1}, settings())


def test_coherence_tells_a_copy_from_a_resynthesis() -> None:
    voice = synthesize(0, 0, 3.0)
    copy, resynthesis = coherence(voice, voice), coherence(voice, resynthesised(voice, 0))
    assert min(copy.values()) == pytest.approx(1)
    assert max(resynthesis.values()) < 0.5
    spread = {name: [value] * 3 for name, value in copy.items()}
    assert "teacher=sidon and L1 suit" in words(spread)
    assert "teacher=hybrid" in words({name: [value] * 3 for name, value in resynthesis.items()})


@pytest.mark.parametrize(
    ("moved", "in_place"),
    [(lambda voice: -voice, (-1.01, -0.99)), (lambda voice: np.roll(voice, 24), (-0.5, 0.79))],
    ids=["turned over", "half a millisecond late"],
)
def test_l1_is_not_said_to_suit_waveforms_out_of_place(
    moved: Callable[[Samples], Samples], in_place: tuple[float, float]
) -> None:
    voice = synthesize(0, 0, 3.0)
    found = coherence(voice, moved(voice))
    assert found["coherence_0_1_khz"] > 0.95
    assert in_place[0] < found["in_place"] < in_place[1]
    assert "not in place" in words({name: [value] * 3 for name, value in found.items()})


@pytest.mark.parametrize("gain_db", [-9.0, 9.0])
def test_a_model_that_speaks_at_another_level_stops_the_run(
    gain_db: float, settings: Callable[..., CalibrateSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its targets would be brought to their recordings' level."""
    restore = Sidon.restore
    louder = np.float32(10 ** (gain_db / 20))
    monkeypatch.setattr(Sidon, "restore", lambda self, windows: [louder * found for found in restore(self, windows)])
    with pytest.raises(UserError, match=rf"speaks {gain_db:.1f} dB louder than what it hears|typically -3.0 dB above"):
        shard_targets(settings())


def assert_same_without_a_model(
    settings: Callable[..., CalibrateSettings], elsewhere: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever hands out shards loads none; calibration and shards are those of one process."""
    work = settings().work
    assert isinstance(work, Path)
    shard_targets(settings())
    alone = contents(work)
    shutil.rmtree(work / "shards")
    (work / FILE).unlink()
    monkeypatch.setattr("pipeline.teachers.load_sidon", lambda *_: pytest.fail("a model was loaded here"))
    shard_targets(settings(*elsewhere))
    assert contents(work) == alone


def test_who_hands_out_shards_loads_no_model(
    settings: Callable[..., CalibrateSettings], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_same_without_a_model(settings, ["workers=2"], monkeypatch)
    assert capsys.readouterr().out.count("calibration on 6 recordings") == 2


def test_a_model_that_cannot_be_loaded_elsewhere_is_one_line(settings: Callable[..., CalibrateSettings]) -> None:
    with pytest.raises(UserError, match=r"decoder_cpu\.pt"):
        shard_targets(settings("workers=2", "weights=configs/weights.json"))
