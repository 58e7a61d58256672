"""SIDON's targets stand at the recording's instant and level, whatever its rate, and across window seams."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from transformers import SeamlessM4TFeatureExtractor

from codec.audio import Samples
from pipeline.codes import shard_codes
from pipeline.sidon import FRAME, PADDING, Sidon, TorchScript, high_passed
from pipeline.targets import shard_targets
from pipeline.teachers import Pieces, Teacher
from shards.contract import OK, TARGET_RATE
from shards.errors import UserError
from shards.files import file_sha256
from shards.index import load
from shards.reader import decode_sample, read_sample
from tests.helpers import codes_settings, restored, targets_settings
from tests.sidon_standin import build, random_pattern, recording

WINDOW_SECONDS, OVERLAP_SECONDS = 4.0, 0.5


@pytest.fixture(scope="module")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sidon"
    build(folder)
    return folder


@pytest.fixture(scope="module")
def sidon(standin: Path) -> Sidon:
    return Sidon(TorchScript(str(standin), standin / "weights.json", torch.device("cpu")), torch.device("cpu"))


@pytest.fixture(scope="module")
def teacher(sidon: Sidon, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    windows = [f"window_seconds={WINDOW_SECONDS}", f"overlap_seconds={OVERLAP_SECONDS}", "batch_seconds=10"]
    return Teacher(targets_settings(tmp_path_factory.mktemp("work"), "teacher=sidon", *windows), sidon)


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
    rate: int, channels: int, amplitude: float, seconds: float, teacher: Teacher, tmp_path: Path
) -> None:
    pattern = random_pattern(seconds, seed=int(10 * seconds))
    audio = recording(pattern, rate, amplitude)
    soundfile.write(tmp_path / "a.wav", np.stack([audio] * channels, axis=1), rate, "FLOAT")
    found = restored(tmp_path / "a.wav", teacher)
    expected = recording(pattern, TARGET_RATE, amplitude)[: len(found)]
    assert len(found) == len(expected)
    assert lag(expected, found) == 0
    assert abs(level_db(expected, found)) < 0.1
    assert np.abs(found - expected).max() < 0.01 * amplitude  # no burst lost, doubled or moved, at a seam either


def test_a_stretch_is_the_same_whoever_asks(teacher: Teacher, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", recording(random_pattern(14.0, 1), 16_000, 0.5), 16_000, "FLOAT")
    whole = restored(tmp_path / "a.wav", teacher)
    for coarse in (1, 35, 36, 98, 150):
        part = restored(tmp_path / "a.wav", teacher, coarse)
        assert np.array_equal(part, whole[4096 * coarse :]), coarse


def test_a_rest_shorter_than_the_overlap_belongs_to_the_last_window(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audio = recording(random_pattern(7.0, 2), 16_000, 0.5)[: int(6.3 * 16_000)]
    soundfile.write(tmp_path / "a.wav", audio, 16_000, "FLOAT")
    assert teacher.sidon is not None
    calls: list[int] = []
    restore = teacher.sidon.restore

    def counted(windows: Sequence[Samples]) -> list[Samples]:
        calls.extend(map(len, windows))
        return restore(windows)

    monkeypatch.setattr(teacher.sidon, "restore", counted)
    whole = restored(tmp_path / "a.wav", teacher)
    windows = calls.copy()
    calls.clear()
    part = restored(tmp_path / "a.wav", teacher, 72)
    assert len(windows) == 2
    assert calls in ([windows[0]], [windows[1]])
    assert np.array_equal(part, whole[72 * 4096 :])


def test_what_calibration_cannot_see_stops_the_run_at_its_end(
    standin: Path, restored_work: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 ms, in all targets but those that were calibrated on."""
    work = tmp_path / "work"
    shutil.copytree(restored_work[1], work, ignore=shutil.ignore_patterns("shards"))
    read = Pieces.read

    def late(self: Pieces, a: int, b: int) -> tuple[Samples, Samples]:
        source, target = read(self, a, b)
        return source, np.roll(target, 480)

    monkeypatch.setattr(Pieces, "read", late)
    pair = [f"sidon={standin}", f"weights={standin / 'weights.json'}", "max_lag_samples=900"]
    settings = targets_settings(work, "teacher=sidon", "min_correlation=-1", *pair)
    with pytest.raises(UserError, match=r"typically 4[78]\d samples at 48 kHz behind"):
        shard_targets(settings)
    assert not (work / "shards" / "index.parquet").exists()


def test_silence_stays_silent(teacher: Teacher, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(16_000, np.float32), 16_000, "FLOAT")
    assert not restored(tmp_path / "a.wav", teacher).any()


@pytest.mark.parametrize("frames", [1, 7, 50])
def test_three_samples_for_one(frames: int, sidon: Sidon) -> None:
    (found,) = sidon.restore([np.zeros(frames * FRAME + 2 * PADDING, np.float32)])
    assert len(found) == 3 * frames * FRAME


def test_batched_is_single(sidon: Sidon) -> None:
    """TorchScript knows no mask: a batch is of equal lengths."""
    random = np.random.default_rng(0)
    windows = [(0.1 * random.standard_normal(20 * FRAME + 2 * PADDING)).astype(np.float32) for _ in range(3)]
    for window, found in zip(windows, sidon.restore(windows), strict=True):
        (alone,) = sidon.restore([window])
        assert np.square(found - alone).sum() <= 1e-6 * np.square(alone).sum()


def test_what_lies_below_50_hz_is_not_heard() -> None:
    impulse = np.eye(1, 16_000, dtype=np.float32)[0]
    response_db = 20 * np.log10(np.abs(np.fft.rfft(high_passed(impulse))))
    assert response_db[[10, 50, 200]] == pytest.approx([-28, -3, 0], abs=0.1)


def test_the_model_hears_the_reference_features(sidon: Sidon, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[torch.Tensor] = []

    def listen(features: torch.Tensor, frames: list[int]) -> torch.Tensor:
        heard.append(features)
        return torch.zeros(*features.shape[:2], 1024)

    monkeypatch.setattr(sidon.model, "encode", listen)
    audio = np.random.default_rng(0).standard_normal(20 * FRAME + 2 * PADDING, dtype=np.float32) / np.float32(10)
    sidon.restore([audio])
    reference = SeamlessM4TFeatureExtractor(feature_size=80, num_mel_bins=80, stride=2)
    expected = reference(audio, sampling_rate=16_000, return_tensors="pt")["input_features"]
    assert heard[0].shape == (1, 21, 160)
    assert torch.allclose(heard[0][:, :20], expected, rtol=0, atol=1e-4)
    assert torch.equal(heard[0][:, 20], heard[0][:, 19])  # the last frame, carried over


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
        TorchScript(str(folder), folder / "weights.json", torch.device("cpu"))


class OnFirstGpu(torch.nn.Module):
    """As tracing on a GPU leaves it: what is made on the way is made there."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.arange(x.shape[1], device=torch.device("cuda:0"))


def with_another_decoder(folder: Path, data: bytes) -> TorchScript:
    """The stand-in in `folder`, with `data` for a decoder."""
    (folder / "decoder_cpu.pt").write_bytes(data)
    files = {file.name: file_sha256(file) for file in folder.glob("*.pt")}
    (folder / "weights.json").write_text(json.dumps({str(folder): {"revision": None, "files": files}}))
    return TorchScript(str(folder), folder / "weights.json", torch.device("cpu"))


def test_a_gpu_that_a_graph_names_is_the_one_in_use(standin: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(standin, folder)
    torch.jit.freeze(torch.jit.script(OnFirstGpu().eval())).save(str(tmp_path / "pinned.pt"))
    model = with_another_decoder(folder, (tmp_path / "pinned.pt").read_bytes())
    assert model.decoder(torch.zeros(1, 3)).tolist() == [[0, 1, 2]]


def test_a_file_that_pytorch_cannot_load_is_named(standin: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(standin, folder)
    with pytest.raises(UserError, match=r"decoder_cpu\.pt: PyTorch \S+ cannot load it: "):
        with_another_decoder(folder, b"version https://git-lfs.github.com/spec/v1")


def test_an_unlisted_folder_shows_its_pin(standin: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not listed in .*empty\.json; if you trust these files, add .*decoder_cpu"):
        TorchScript(str(standin), tmp_path / "empty.json", torch.device("cpu"))


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
    read = Pieces.read
    monkeypatch.setattr(Pieces, "read", lambda self, a, b: (read(self, a, b)[0], others[a:b]))
    monkeypatch.setattr("pipeline.calibrate.check", lambda *_: None)
    settings = targets_settings(work, "teacher=sidon", f"sidon={standin}", f"weights={standin / 'weights.json'}")
    with pytest.raises(UserError, match="failed or were rejected"):
        shard_targets(settings)
    rows = [row for file in (work / "shards").glob("*/*.parquet") for row in pq.read_table(file).to_pylist()]
    assert {row["status"] for row in rows if row["n_samples"] > 0.3 * TARGET_RATE} == {"rejected"}
    assert all("min_correlation" in row["reason"] for row in rows if row["status"] == "rejected")
