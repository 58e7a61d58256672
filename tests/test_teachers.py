"""Which teacher a recording gets, what a bad one costs, and that batches and threads change nothing."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.signal
import soundfile
import torch
from torchaudio.functional import resample

from codec.audio import Recording, Samples, probe
from demo.voice import synthesize
from pipeline.codes import shard_codes
from pipeline.settings import TargetsSettings
from pipeline.sidon import FRAME, PADDING, Sidon
from pipeline.targets import shard_targets
from pipeline.teachers import Teacher
from shards.contract import OK, TARGET_RATE
from shards.errors import UserError
from shards.index import load
from shards.reader import decode_sample, read_sample
from tests.helpers import codes_settings, forget_contents, restored, targets_settings


class Upsampling:
    """Stands in for a restorer: what it hears, resampled to 48 kHz, so its targets end at 8 kHz."""

    class model:
        mixes_lengths = True
        weights = ()

    precision = "fp32"

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def describe(self) -> str:
        return "stand-in that only resamples"

    def sha256(self) -> dict[str, str]:
        return {"none": "0"}

    def restore(self, windows: Sequence[Samples]) -> list[Samples]:
        self.batches.append([len(window) for window in windows])
        full = [resample(torch.from_numpy(window), 16_000, 48_000).numpy() for window in windows]
        return [row[3 * PADDING : -3 * PADDING] for row in full]


@pytest.fixture
def sidon(monkeypatch: pytest.MonkeyPatch) -> Upsampling:
    standin = Upsampling()
    monkeypatch.setattr("pipeline.teachers.load_sidon", lambda *_: standin)
    return standin


def write(path: Path, samples: Samples, rate: int = TARGET_RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, "PCM_16")
    return path


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two voices of full band, two that were 16 kHz once but say 48 kHz, one at 16 kHz."""
    folder = tmp_path_factory.mktemp("audio")
    for speaker in range(3):
        voice = synthesize(speaker, 0, 3.0)
        write(folder / f"full_{speaker}" / "a.flac", voice)
        low = resample(torch.from_numpy(synthesize(speaker, 1, 3.0)), TARGET_RATE, 16_000)
        write(folder / f"upsampled_{speaker}" / "a.flac", resample(low, 16_000, TARGET_RATE).numpy())
    write(folder / "narrow" / "a.flac", low.numpy(), 16_000)
    return folder


@pytest.fixture(scope="module")
def coded(audio: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("coded") / "work"
    shard_codes(codes_settings(audio, work, "segment_length=1.5", "segments_per_shard=6"))
    return work


def made(coded: Path, work: Path, *more: str) -> list[dict[str, Any]]:
    shutil.copytree(coded, work)
    shard_targets(targets_settings(work, *more))
    return [row for row in pq.read_table(work / "shards" / "index.parquet").to_pylist() if row["status"] == OK]


def test_auto_keeps_what_truly_reaches_the_band(coded: Path, tmp_path: Path, sidon: Upsampling) -> None:
    rows = made(coded, tmp_path / "work", "teacher=auto", "min_bandwidth_hz=18000")
    assert len(rows) > 10
    for row in rows:
        is_full = row["recording"].startswith("full")
        assert row["teacher"] == ("recording" if is_full else "sidon")
        assert (row["source_bandwidth_hz"] > 18_000) == is_full
        assert (row["lag_samples"] is None) == is_full
    samples = [decode_sample(read_sample(index, n)) for index in _indices(tmp_path / "work") for n in range(len(index))]
    for sample in samples:
        meta = sample["meta"]
        assert meta["teacher"].startswith("recording" if meta["recording"].startswith("full") else "sidon: stand-in")
        assert (meta["gain"] == 1.0) == meta["recording"].startswith("full")


def _indices(work: Path) -> list[Any]:
    return [load(work / "shards", split) for split in ("train", "validation")]


def test_hybrid_mixes_where_the_recording_reaches_the_crossover(
    audio: Path, coded: Path, tmp_path: Path, sidon: Upsampling
) -> None:
    rows = made(coded, tmp_path / "work", "teacher=hybrid", "crossover_hz=11000")
    assert {row["recording"].split("_")[0]: row["teacher"] for row in rows} == {
        "full": "hybrid",
        "upsampled": "sidon",
        "narrow/a.flac": "sidon",
    }
    for row in rows:
        assert abs(row["lag_samples"]) < 24  # of SIDON's part
        assert row["target_bandwidth_hz"] < 12_000  # the stand-in has nothing above 8 kHz
    for index in _indices(tmp_path / "work"):
        for number in range(len(index)):
            sample = decode_sample(read_sample(index, number))
            meta = sample["meta"]
            if not meta["recording"].startswith("full"):
                continue
            assert meta["teacher"].startswith("recording below 11000 Hz, sidon: stand-in")
            whole, _ = soundfile.read(audio / meta["recording"], dtype="float32")
            first = round(meta["start_seconds"] * TARGET_RATE)
            low, target = (
                np.fft.rfft(x)[: len(x) * 10_000 // TARGET_RATE]
                for x in (whole[first : first + meta["n_samples"]], sample["target"][: meta["n_samples"]])
            )
            assert np.square(np.abs(low - target)).sum() < 1e-4 * np.square(np.abs(low)).sum()


class Hissing(Upsampling):
    """Restores white noise to white noise of full band and as much in each hertz."""

    def restore(self, windows: Sequence[Samples]) -> list[Samples]:
        random = np.random.default_rng(0)
        made = [random.standard_normal(3 * (len(window) - 2 * PADDING)) for window in windows]
        return [(3**0.5 * window.std() * noise).astype("f4") for window, noise in zip(windows, made, strict=True)]


HISS = 0.1


@pytest.mark.parametrize(
    ("rate", "used"), [(22_050, "sidon"), (23_600, "sidon"), (24_000, "hybrid"), (32_000, "hybrid"), (44_100, "hybrid")]
)
def test_no_hole_at_the_crossover(tmp_path: Path, rate: int, used: str) -> None:
    """White noise, which reaches half of its rate, but resampled not quite."""
    noise = np.random.default_rng(1).standard_normal(3 * rate)
    path = write(tmp_path / "a.wav", (HISS * np.sqrt(rate / TARGET_RATE) * noise).astype(np.float32), rate)
    teacher = Teacher(targets_settings(tmp_path, "teacher=hybrid", "crossover_hz=11000"), Hissing())  # type: ignore[arg-type]
    survey = teacher.survey(Recording(path, probe(path)))
    assert teacher.chosen(survey) == used
    target = restored(path, teacher)
    if used == "sidon":
        return
    hertz, power = scipy.signal.welch(target / np.float32(HISS), TARGET_RATE, nperseg=512)
    level_db = 10 * np.log10(power * TARGET_RATE / 2)
    assert level_db[(hertz > 9500) & (hertz < 12_500)].min() > -4.5  # −3 where both halve: their phases differ


def test_what_falls_just_below_the_crossover_does_not_reach_it(tmp_path: Path) -> None:
    """Bands of 500 Hz see something for a while beyond a cliff."""
    teacher = Teacher(targets_settings(tmp_path, "teacher=hybrid", "crossover_hz=11000"), Hissing())  # type: ignore[arg-type]
    noise = np.random.default_rng(1).standard_normal(3 * TARGET_RATE)
    for cutoff, used in ((10_700, "sidon"), (11_800, "hybrid")):
        low = HISS * scipy.signal.lfilter(scipy.signal.firwin(801, cutoff, fs=TARGET_RATE), 1, noise)
        path = write(tmp_path / "a.wav", low.astype(np.float32))
        assert teacher.chosen(teacher.survey(Recording(path, probe(path)))) == used


def test_batches_and_threads_change_nothing(
    coded: Path, tmp_path: Path, sidon: Upsampling, capsys: pytest.CaptureFixture[str]
) -> None:
    made(coded, tmp_path / "a", "teacher=sidon", "threads=1", "batch_seconds=1")
    assert re.search(r"[1-9]\d* s of audio restored in .* s, the device idle \d+% of them", capsys.readouterr().out)
    alone = sidon.batches.copy()
    sidon.batches.clear()
    made(coded, tmp_path / "b", "teacher=sidon", "threads=8", "batch_seconds=100")
    assert max(map(len, alone)) == 1
    assert max(map(len, sidon.batches)) > 1
    for file in sorted((tmp_path / "a" / "shards").rglob("*.tar")):
        other = tmp_path / "b" / file.relative_to(tmp_path / "a")
        assert file.read_bytes() == other.read_bytes()


def test_similar_lengths_go_together_where_masks_are_known(tmp_path: Path, sidon: Upsampling) -> None:
    lengths = [1.0, 1.02, 3.0, 1.01, 3.1]
    for number, seconds in enumerate(lengths):
        write(tmp_path / "audio" / f"v{number}" / "a.wav", synthesize(number % 3, 0, seconds))
    shard_codes(codes_settings(tmp_path / "audio", tmp_path / "work"))
    shard_targets(targets_settings(tmp_path / "work", "teacher=sidon"))
    assert sum(map(len, sidon.batches)) >= len(lengths)
    for batch in sidon.batches:
        assert max(batch) <= 1.125 * min(batch)


def test_a_bad_recording_costs_its_own_rows(audio: Path, tmp_path: Path, sidon: Upsampling) -> None:
    copy = tmp_path / "audio"
    for file in audio.rglob("*.flac"):
        samples, rate = soundfile.read(file, dtype="float32")
        write(copy / file.relative_to(audio), samples, rate)
    work = tmp_path / "work"
    shard_codes(codes_settings(copy, work, "segment_length=0.8"))
    damaged = copy / "full_1" / "a.flac"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    damaged.write_bytes(bytes(data))
    forget_contents(work)  # else the whole of it would be refused before it is read
    shard_targets(targets_settings(work, "teacher=sidon", "max_failed_fraction=1"))
    rows = pq.read_table(work / "shards" / "index.parquet").to_pylist()
    failed = [row for row in rows if row["status"] == "failed"]
    assert failed
    assert {row["recording"] for row in failed} == {"full_1/a.flac"}
    assert all("broken near" in row["reason"] or "ends at" in row["reason"] for row in failed)


def test_targets_that_are_not_finite_fail(
    coded: Path, tmp_path: Path, sidon: Upsampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.targets.calibrated", lambda *_: {})
    restore = sidon.restore
    monkeypatch.setattr(sidon, "restore", lambda windows: [output * np.nan for output in restore(windows)])
    with pytest.raises(UserError, match="no segment is usable"):
        made(coded, tmp_path / "work", "teacher=sidon", "max_failed_fraction=1")
    rows = [
        row for file in (tmp_path / "work" / "shards").glob("*/*.parquet") for row in pq.read_table(file).to_pylist()
    ]
    assert {row["reason"] for row in rows if row["status"] == "failed"} == {
        "the target (teacher: sidon) holds NaN or infinity"
    }


def test_a_stretch_does_not_depend_on_where_a_shard_begins(audio: Path, tmp_path: Path, sidon: Upsampling) -> None:
    teacher = Teacher(_windowed(tmp_path), sidon)  # type: ignore[arg-type]
    whole = restored(audio / "full_0" / "a.flac", teacher)
    for coarse in (7, 20):
        part = restored(audio / "full_0" / "a.flac", teacher, coarse)
        assert np.allclose(part, whole[coarse * 4096 :], atol=1e-4)  # levels at the crossover are matched per segment


def _windowed(work: Path) -> TargetsSettings:
    return targets_settings(work, "teacher=hybrid", "window_seconds=4", "overlap_seconds=1.25", "crossover_hz=5000")


def test_the_stand_in_has_sidons_interface() -> None:
    assert {name for name in vars(Upsampling) if not name.startswith("_")} <= {*dir(Sidon), "model"}
    assert FRAME == 2 * PADDING
