"""SIDON's targets stand at the recording's instant and level, whatever its rate, and across window seams."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from torchaudio.functional import highpass_biquad
from transformers import SeamlessM4TFeatureExtractor

from codec.audio import Recording, probe
from pipeline.codes import shard_codes
from pipeline.sidon import FRAME, PADDING, Restorer, Sidon
from pipeline.targets import shard_targets
from shards.contract import OK, TARGET_RATE
from shards.errors import UserError
from shards.index import load
from shards.reader import decode_sample, read_sample
from tests.helpers import codes_settings, targets_settings
from tests.sidon_standin import build, random_pattern, recording

Samples = npt.NDArray[np.float32]
WINDOW_SECONDS, OVERLAP_SECONDS = 4.0, 0.5


@pytest.fixture(scope="module")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sidon"
    build(folder)
    return folder


@pytest.fixture(scope="module")
def sidon(standin: Path) -> Sidon:
    return Sidon(str(standin), standin / "weights.json", torch.device("cpu"))


def restorer(path: Path, sidon: Sidon) -> Restorer:
    return Restorer(Recording(path, probe(path)), sidon, WINDOW_SECONDS, OVERLAP_SECONDS)


def lag(a: Samples, b: Samples) -> int:
    """Samples by which `b` is later than `a`."""
    size = 2 * len(a)
    correlation = np.fft.irfft(np.fft.rfft(b, size) * np.fft.rfft(a, size).conj(), size)
    best = int(correlation.argmax())
    return best - size if best > len(a) else best


def level_db(a: Samples, b: Samples) -> float:
    return float(10 * np.log10(np.square(b, dtype=np.float64).sum() / np.square(a, dtype=np.float64).sum()))


@pytest.mark.parametrize(
    ("rate", "channels", "amplitude", "seconds"),
    [
        (48_000, 1, 0.9, 3.0),
        (44_100, 2, 0.05, 3.0),
        (16_000, 2, 0.5, 3.0),
        (8_000, 1, 0.5, 3.0),
        (48_000, 1, 0.5, 16.0),  # five windows
        (44_100, 2, 0.3, 10.36),
        (8_000, 1, 0.7, 7.62),  # what is left after the last seam is shorter than an overlap
    ],
)
def test_restored_at_its_instant_and_level(
    rate: int, channels: int, amplitude: float, seconds: float, sidon: Sidon, tmp_path: Path
) -> None:
    pattern = random_pattern(seconds, seed=int(10 * seconds))
    audio = recording(pattern, rate, amplitude)
    soundfile.write(tmp_path / "a.wav", np.stack([audio] * channels, axis=1), rate, "FLOAT")
    reader = restorer(tmp_path / "a.wav", sidon)
    restored = reader.read(0, reader.source.recording.length(TARGET_RATE))
    expected = recording(pattern, TARGET_RATE, amplitude)[: len(restored)]
    assert len(restored) == len(expected)
    assert lag(expected, restored) == 0
    assert abs(level_db(expected, restored)) < 0.1
    assert np.abs(restored - expected).max() < 0.01 * amplitude  # no burst lost, doubled or moved, at a seam either


def test_a_stretch_is_the_same_whoever_asks(sidon: Sidon, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", recording(random_pattern(14.0, 1), 16_000, 0.5), 16_000, "FLOAT")
    whole = restorer(tmp_path / "a.wav", sidon).read(0, 14 * TARGET_RATE)
    for start in (1, 3 * TARGET_RATE - 300, 3 * TARGET_RATE + 100, 400_001, 13 * TARGET_RATE):
        part = restorer(tmp_path / "a.wav", sidon).read(start, 14 * TARGET_RATE)
        assert np.array_equal(part, whole[start:]), start


def test_a_rest_shorter_than_the_overlap_belongs_to_the_last_window(sidon: Sidon, tmp_path: Path) -> None:
    audio = recording(random_pattern(7.0, 2), 16_000, 0.5)[: int(6.3 * 16_000)]
    soundfile.write(tmp_path / "a.wav", audio, 16_000, "FLOAT")
    end = int(6.3 * TARGET_RATE)
    calls: list[int] = []
    restore = sidon.restore

    def counted(padded: Samples) -> Samples:
        calls.append(len(padded))
        return restore(padded)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sidon, "restore", counted)
        whole = restorer(tmp_path / "a.wav", sidon).read(0, end)
        windows = calls.copy()
        calls.clear()
        part = restorer(tmp_path / "a.wav", sidon).read(int(6.1 * TARGET_RATE), end)
    assert len(windows) == 2
    assert calls == windows[-1:]
    assert np.array_equal(part, whole[int(6.1 * TARGET_RATE) :])


def test_late_targets_stop_the_run(
    standin: Path, restored_work: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    shutil.copytree(restored_work[1], work, ignore=shutil.ignore_patterns("shards"))
    read = Restorer.read
    monkeypatch.setattr(Restorer, "read", lambda self, a, b: np.roll(read(self, a, b), 480))  # the 10 ms of the padding
    pair = [f"sidon={standin}", f"weights={standin / 'weights.json'}"]
    settings = targets_settings(work, "teacher=sidon", "min_correlation=-1", *pair)
    with pytest.raises(UserError, match=r"typically 4[78]\d samples at 48 kHz behind"):
        shard_targets(settings)
    assert not (work / "shards" / "index.parquet").exists()


def test_silence_stays_silent(sidon: Sidon, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(16_000, np.float32), 16_000, "FLOAT")
    reader = restorer(tmp_path / "a.wav", sidon)
    assert reader.gain == 1.0
    assert not reader.read(0, TARGET_RATE).any()


@pytest.mark.parametrize("frames", [1, 7, 50])
def test_three_samples_for_one(frames: int, sidon: Sidon) -> None:
    assert len(sidon.restore(np.zeros(frames * FRAME + 2 * PADDING, np.float32))) == 3 * frames * FRAME


def test_the_model_hears_the_reference_features(sidon: Sidon, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[torch.Tensor] = []

    def listen(features: torch.Tensor) -> dict[str, torch.Tensor]:
        heard.append(features)
        return {"last_hidden_state": torch.zeros(1, features.shape[1], 1024)}

    monkeypatch.setattr(sidon, "encoder", listen)
    audio = np.random.default_rng(0).standard_normal(20 * FRAME + 2 * PADDING, dtype=np.float32) / np.float32(10)
    sidon.restore(audio)
    filtered = highpass_biquad(torch.from_numpy(audio), 16_000, 50.0)
    reference = SeamlessM4TFeatureExtractor(feature_size=80, num_mel_bins=80, stride=2)
    expected = reference(filtered.numpy(), sampling_rate=16_000, return_tensors="pt")["input_features"]
    assert heard[0].shape == (1, 21, 160)
    assert torch.equal(heard[0][:, :20], expected)
    assert torch.equal(heard[0][:, 20], expected[:, 19])  # the last frame, carried over


def test_a_wrong_hash_is_refused_before_loading(standin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(standin, folder)
    pins = json.loads((standin / "weights.json").read_text())
    (folder / "weights.json").write_text(json.dumps({str(folder): pins[str(standin)]}))
    with (folder / "decoder_cpu.pt").open("r+b") as file:
        file.seek(100)
        file.write(b"x")
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("loaded an unverified file"))
    with pytest.raises(UserError, match=r"decoder_cpu\.pt: sha256 is \w{64}, expected \w{64}.*weights\.json"):
        Sidon(str(folder), folder / "weights.json", torch.device("cpu"))


def test_an_unlisted_folder_shows_its_pin(standin: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not listed in .*empty\.json; if you trust these files, add .*decoder_cpu"):
        Sidon(str(standin), tmp_path / "empty.json", torch.device("cpu"))


@pytest.fixture(scope="module")
def restored_work(standin: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Recordings of bursts, and the shards that the stand-in's targets went to."""
    audio, work = tmp_path_factory.mktemp("bursts"), tmp_path_factory.mktemp("sidon") / "work"
    for number, (rate, channels) in enumerate([(48_000, 1), (44_100, 2), (8_000, 1), (16_000, 2)]):
        (audio / f"voice_{number}").mkdir()
        bursts = recording(random_pattern(2.0 + number, number), rate, 0.1 + 0.2 * number)
        soundfile.write(audio / f"voice_{number}" / "a.wav", np.stack([bursts] * channels, axis=1), rate, "FLOAT")
    shard_codes(codes_settings(audio, work))
    settings = targets_settings(work, "teacher=sidon", f"sidon={standin}", f"weights={standin / 'weights.json'}")
    shard_targets(settings)
    return audio, work


@pytest.mark.parametrize("split", ["train", "validation"])
def test_targets_in_shards_are_aligned_and_level(split: str, restored_work: tuple[Path, Path]) -> None:
    audio, work = restored_work
    index = load(work / "shards", split)
    assert len(index)
    for number in range(len(index)):
        sample = decode_sample(read_sample(index, number))
        meta, voice = sample["meta"], int(sample["meta"]["recording"][6])
        amplitude = 0.1 + 0.2 * voice
        whole = recording(random_pattern(2.0 + voice, voice), TARGET_RATE, amplitude)
        first = round(meta["start_seconds"] * TARGET_RATE)
        expected = whole[first : first + meta["n_samples"]]
        target = sample["target"][: meta["n_samples"]]
        assert lag(expected, target) == 0
        assert abs(level_db(expected, target)) < 0.1
        peak = np.abs(soundfile.read(audio / meta["recording"], always_2d=True)[0].mean(axis=1)).max()
        assert meta["gain"] == pytest.approx(0.9 / peak, rel=1e-6)
        assert meta["teacher"].startswith("sidon: stand-in")


def test_fidelity_stands_in_the_sidecars(restored_work: tuple[Path, Path]) -> None:
    rows = pq.read_table(restored_work[1] / "shards" / "index.parquet").to_pylist()
    usable = [row for row in rows if row["status"] == OK]
    assert usable
    for row in usable:
        assert abs(row["lag_samples"]) < 3
        assert abs(row["level_difference_db"]) < 0.1
        assert row["correlation"] > 0.99


def test_another_recordings_target_is_rejected(
    standin: Path, restored_work: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    shutil.copytree(restored_work[1], work, ignore=shutil.ignore_patterns("shards"))
    others = recording(random_pattern(30.0, seed=99), TARGET_RATE, 0.5)
    monkeypatch.setattr(Restorer, "read", lambda self, a, b: others[a:b])
    settings = targets_settings(work, "teacher=sidon", f"sidon={standin}", f"weights={standin / 'weights.json'}")
    with pytest.raises(UserError, match="failed or were rejected"):
        shard_targets(settings)
    rows = [row for file in (work / "shards").glob("*/*.parquet") for row in pq.read_table(file).to_pylist()]
    assert {row["status"] for row in rows if row["n_samples"] > 0.3 * TARGET_RATE} == {"rejected"}
    assert all("min_correlation" in row["reason"] for row in rows if row["status"] == "rejected")
