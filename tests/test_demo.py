"""The demo's voice is full-band, pauses and is the same every time; its picture shows what it should."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import matplotlib.image
import numpy as np
import numpy.typing as npt
import pytest
import scipy.signal
import soundfile

import demo.run
from demo.picture import draw
from demo.settings import DemoSettings
from demo.voice import NOISE_FLOOR, SAMPLE_RATE, synthesize, write_voices
from pipeline.plan import make_plan
from shards.contract import PLAN_NAME
from tests.helpers import TINY_SNAC, codes_settings, longest_file, speechlike

FRAME = 960  # 20 ms


@pytest.fixture(scope="module")
def voices() -> list[npt.NDArray[np.float32]]:
    return [synthesize(speaker, 0, 4.0) for speaker in range(3)]


def band_db(wav: npt.NDArray[np.float32], low: float, high: float) -> npt.NDArray[np.float64]:
    """Level of each frame in a band of frequencies."""
    frequency, _, spectrum = scipy.signal.stft(wav, SAMPLE_RATE, nperseg=FRAME, noverlap=0, boundary=None)
    band = (frequency >= low) & (frequency < high)
    level: npt.NDArray[np.float64] = 10 * np.log10(np.mean(np.abs(spectrum[band]) ** 2, axis=0))
    return level


def test_the_same_arguments_give_the_same_bytes(voices: list[npt.NDArray[np.float32]]) -> None:
    assert synthesize(1, 0, 4.0).tobytes() == voices[1].tobytes()
    assert synthesize(1, 1, 4.0).tobytes() != voices[1].tobytes()
    assert all(len(voice) == 4 * SAMPLE_RATE and voice.dtype == np.float32 for voice in voices)
    for voice in voices:
        assert 0.54 < np.abs(voice).max() < 0.76


def test_a_voice_that_does_not_fit_on_the_disk_does_not_stand(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"File too large: .*utterance_0\.wav"), longest_file(10_000):
        write_voices(tmp_path, 1, 1, 1.0)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_fricatives_reach_20_khz(voices: list[npt.NDArray[np.float32]]) -> None:
    floor = np.random.default_rng(0).normal(0, NOISE_FLOOR, SAMPLE_RATE).astype(np.float32)
    for voice in voices:
        for low, high in ((16_000, 20_000), (19_000, 20_000)):
            loudest = np.quantile(band_db(voice, low, high), 0.9)
            assert loudest > band_db(floor, low, high).mean() + 20


def test_it_pauses(voices: list[npt.NDArray[np.float32]]) -> None:
    for voice in voices:
        rms = np.sqrt(np.mean(voice[: len(voice) // FRAME * FRAME].reshape(-1, FRAME).astype(float) ** 2, axis=1))
        assert 0.05 < np.mean(rms < 2 * NOISE_FLOOR) < 0.6
        assert np.mean(rms > 0.01) > 0.3


def test_speakers_differ_in_pitch() -> None:
    """By the autocorrelation of their vowels."""
    pitches = []
    for speaker in range(4):
        low = scipy.signal.sosfilt(
            scipy.signal.butter(4, 900, fs=SAMPLE_RATE, output="sos"), synthesize(speaker, 0, 4.0)
        )
        found = []
        for start in range(0, len(low) - 4 * FRAME, 4 * FRAME):
            frame = low[start : start + 4 * FRAME]
            if frame.std() > 0.02:
                similarity = scipy.signal.correlate(frame, frame, method="fft")[len(frame) - 1 :]
                found.append(SAMPLE_RATE / (120 + np.argmax(similarity[120:700])))
        pitches.append(np.median(found))
    assert max(pitches) / min(pitches) > 1.3
    assert 60 < min(pitches) < max(pitches) < 300


def test_too_short_an_utterance_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 1 s, not 0\.5 s"):
        synthesize(0, 0, 0.5)


def test_voices_are_written_as_pcm_in_one_folder_each(tmp_path: Path) -> None:
    paths = write_voices(tmp_path, speakers=2, utterances=2, seconds=1.0)
    expected = [f"speaker_{s}/utterance_{u}.wav" for s in range(2) for u in range(2)]
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == expected
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(paths)
    for path in paths:
        info = soundfile.info(path)
        assert (info.samplerate, info.frames, info.channels, info.subtype) == (SAMPLE_RATE, SAMPLE_RATE, 1, "PCM_16")
    before = [path.read_bytes() for path in paths]
    assert len(set(before)) == 4
    assert [path.read_bytes() for path in write_voices(tmp_path, speakers=2, utterances=2, seconds=1.0)] == before


def test_own_recordings_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo has no setting that raises the limit, and one of few recordings is more than 5 %."""

    class Called(Exception):
        pass

    def called(*words: str) -> None:
        raise Called(*words)

    monkeypatch.setattr(demo.run, "_command", called)
    with pytest.raises(Called) as caught:
        demo.run.run(DemoSettings(audio=tmp_path, out=tmp_path, max_steps=40))
    words = dict(word.split("=", 1) for word in caught.value.args if "=" in word)
    for stage in ("codes", "targets"):
        assert json.loads(words[stage])["max_failed_fraction"] == 1


def test_a_recording_in_a_tar_is_heard_too(tmp_path: Path) -> None:
    write_voices(tmp_path / "recordings")
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "all.tar", "w") as tar:
        tar.add(tmp_path / "recordings", "voices")
    make_plan(codes_settings(tmp_path / "tars", tmp_path / "work"))
    found = demo.run._unseen_recording(tmp_path / "work" / PLAN_NAME, tmp_path)
    assert found.parent == tmp_path
    assert found.read_bytes() in [path.read_bytes() for path in (tmp_path / "recordings").rglob(found.name)]


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    """The panel of a decoded file that is silent differs from that of one that sounds, and only that panel does."""
    pictures = []
    for seconds, gain in ((1.5, 1.0), (1.5, 0.0)):
        recording, decoded = tmp_path / "voice.wav", tmp_path / "decoded.wav"
        soundfile.write(recording, speechlike(seconds, 44_100, 0), 44_100)
        soundfile.write(decoded, gain * speechlike(seconds, 48_000, 1), 48_000)
        draw(recording, decoded, Path(TINY_SNAC), tmp_path / "picture.png")
        pictures.append(matplotlib.image.imread(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    sounds, silent = pictures
    assert sounds.shape[:2] == silent.shape[:2] == (440, 1430)
    changed = np.flatnonzero((sounds != silent).any(axis=(0, 2)))
    assert len(changed) > 200
    assert changed.min() > 1430 / 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decoded.wav", "picture.png", "voice.wav"]
