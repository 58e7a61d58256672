"""A wrong delay or level, or recordings that disagree, stop a run before it writes anything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

from benchmarks.judging import resynthesised
from codec.audio import Samples
from demo.voice import synthesize
from pipeline.calibrate import FILE, calibrate, calibrated, check, choose, coherence, summary, words
from pipeline.codes import shard_codes
from pipeline.plan import Plan
from pipeline.settings import CalibrateSettings
from pipeline.sidon import Sidon
from pipeline.targets import shard_targets
from pipeline.teachers import Pieces, Teacher
from shards.contract import OK, PLAN_NAME, TARGET_RATE, Row
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


def test_a_damaged_calibration_is_made_anew(settings: Callable[..., CalibrateSettings]) -> None:
    path, plan, teacher = settings().work / FILE, Plan(settings().work / PLAN_NAME), Teacher(settings())
    made = calibrated(settings(), plan, teacher)
    whole = path.read_bytes()
    for damaged in (b"", whole[:-9], bytes(len(whole)), b"\xff" + whole):
        path.write_bytes(damaged)  # type: ignore[union-attr]
        assert calibrated(settings(), plan, teacher) == made
        assert path.read_bytes() == whole


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


@pytest.mark.parametrize("left", [0, 120, 600])
def test_a_wrong_delay_stops_the_run(left: int, settings: Callable[..., CalibrateSettings]) -> None:
    """Not all of the delay taken off, or more: no shard is written, and the message mends it."""
    wrong = settings(f"delay_samples={left}", "min_correlation=-1")
    with pytest.raises(UserError, match=r"all targets are -?\d+ samples .* set delay_samples=3[56]\d") as error:
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


GOOD = {"recordings": 3, "correlation": [0.9] * 3} | dict.fromkeys(
    ("lag_samples", "level_difference_db", "model_level_db"), [0.0] * 3
)


@pytest.mark.parametrize(
    ("found", "refusal"),
    [
        ({}, ""),
        ({"recordings": 2}, "only 2 stretches hold 1 s with speech and need SIDON, 3 are needed"),
        ({"lag_samples": [60, 60, 60]}, ""),
        ({"lag_samples": [61, 61, 61]}, "all targets are 61 samples at 48 kHz behind .* set delay_samples=541"),
        ({"lag_samples": [-61, -61, -61]}, "all targets are -61 samples at 48 kHz behind .* set delay_samples=419"),
        ({"lag_samples": [455, 455, 455]}, "all targets are 455 samples .*: the model is not the one expected"),
        ({"lag_samples": [-20, 0, 100]}, ""),
        ({"lag_samples": [-20, 0, 101]}, "recordings disagree: lag_samples is -20.0 … 101.0 samples at 48 kHz"),
        ({"level_difference_db": [1.5, 1.5, 1.5]}, ""),
        ({"level_difference_db": [1.6, 1.6, 1.6]}, "typically 1.6 dB above .* max_level_difference_db=4"),
        ({"level_difference_db": [-1.6, -1.6, -1.6]}, "typically -1.6 dB above"),
        ({"level_difference_db": [-1.5, 0, 1.5]}, ""),
        ({"level_difference_db": [-1.5, 0, 1.6]}, "recordings disagree: level_difference_db is -1.5 … 1.6 dB"),
        ({"model_level_db": [-9, 1.5, 9]}, ""),
        ({"model_level_db": [-9, 1.6, 9]}, "typically speaks 1.6 dB louder"),
        ({"model_level_db": [-9, -1.6, 9]}, "typically speaks -1.6 dB louder"),
        ({"correlation": [0.1, 0.5, 0.9]}, ""),
        ({"correlation": [0.1, 0.49, 0.9]}, "typically correlate by 0.49"),
    ],
)
def test_what_a_calibration_may_be(found: Row, refusal: str, tmp_path: Path) -> None:
    limits = ["max_lag_samples=120", "max_level_difference_db=3", "min_correlation=0.5", "delay_samples=480"]
    for teacher in ("sidon", "auto"):
        chosen = targets_settings(tmp_path, f"teacher={teacher}", *limits)
        if not refusal or (teacher == "auto" and "recordings" in found):
            check(GOOD | found, chosen)
        else:
            with pytest.raises(UserError, match=refusal):
                check(GOOD | found, chosen)


def test_stretches_that_are_measured_end_with_their_recording_or_after_ten_seconds() -> None:
    """Of segments of 4 s, the second begins at 47 coarse tokens."""
    seconds, starts = [12, 12, 12, 0.9, 1, 0], [0, 47, 130, 0, 0, 0]
    rows: list[Row] = [
        {"path": f"{n}.wav", "offset": None, "status": OK, "start_coarse": start, "frames": round(s * 24_000)}
        | {"rate": 24_000 if s else 0, "n_samples": 7}
        for n, (s, start) in enumerate(zip(seconds, starts, strict=True))
    ]
    rows += [{**rows[0], "path": "9.wav", "status": "too_short"}, {**rows[0], "path": "0.wav", "offset": 512}]
    plan: Any = SimpleNamespace(shards=[0, 1], rows=[rows[:3], rows[3:]].__getitem__)
    found = [(row["path"], row["offset"], row["n_samples"]) for row in choose(plan, 9)]
    assert found == [
        ("0.wav", None, 480_000),
        ("1.wav", None, 576_000 - 47 * 4096),
        ("4.wav", None, 48_000),
        ("0.wav", 512, 480_000),
    ]
    assert [row["path"] for row in choose(plan, 2)] == ["0.wav", "1.wav"]


def test_a_summary_is_of_percentiles() -> None:
    found = summary({"lag_samples": n + 0.4, "level_db": n / 10 + 0.004} for n in range(11))
    assert found == {"recordings": 11, "lag_samples": [1, 5, 9], "level_db": [0.1, 0.5, 0.9]}


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


def test_in_place_is_judged_below_4_khz() -> None:
    noise = np.random.default_rng(0).standard_normal(3 * TARGET_RATE)
    spectrum, hz = np.fft.rfft(noise), np.fft.rfftfreq(len(noise), 1 / TARGET_RATE)
    for turned, expected in ((hz > 4_000, 1), ((hz > 1_000) & (hz < 4_000), 1 / 4 - 3 / 4), (hz < 4_000, -1)):
        moved = np.fft.irfft(np.where(turned, -spectrum, spectrum)).astype(np.float32)
        assert coherence(noise.astype(np.float32), moved)["in_place"] == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    ("low", "in_place", "said"),
    [
        (0.8, 0.8, "teacher=sidon and L1 suit"),
        (0.8, 0.79, "but not in place"),
        (0.79, 0.79, "teacher=hybrid keeps L1 meaningful"),
        (0.41, 0.2, "teacher=hybrid keeps L1 meaningful"),
        (0.4, 0.2, "the phases are the model's own"),
    ],
)
def test_what_is_said_of_coherence(low: float, in_place: float, said: str) -> None:
    found = {"coherence_0_1_khz": [0, 0.9, 1], "coherence_1_4_khz": [0, low, 1], "in_place": [0, in_place, 1]}
    assert said in words(found)


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
