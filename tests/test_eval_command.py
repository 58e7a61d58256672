"""`just eval`: rows, files and refusals, on shards and on a folder of recordings."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from snac import SNAC

from codec.audio import Recording, probe
from codec.resample import Resampler
from codec.snac import encode_whole, load_snac, snac_levels
from shards.contract import FAILED, OK, TARGET_RATE
from shards.errors import UserError, printable
from shards.index import Index, load
from shards.writer import read_metadata
from tests.helpers import TINY_SNAC, longest_file
from tests.training_helpers import call
from trainer import checkpoint, clips
from trainer.decoder import warm_start
from trainer.evaluate import _choose
from trainer.scores import METRICS, columns_of
from trainer.settings import MetricName
from trainer.systems import Stock, decode_clip, decoded_systems, external_systems, rounded_to_16_bits

QUICK = ["metrics=lsd,level,bandwidth", "num_workers=0", "gpu=cpu", f"pretrained_model={TINY_SNAC}"]


@pytest.fixture(scope="module")
def model(snac: SNAC, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the warm start of seed 5."""
    path = tmp_path_factory.mktemp("model") / "seed_5.pt"
    frozen = {"snac": TINY_SNAC, "snac_sha256": load_snac(TINY_SNAC)[1].sha256}
    checkpoint.save(path, {"decoder": warm_start(snac, "zero", 5).state_dict(), **frozen})
    return path


@pytest.fixture(scope="module")
def judged(work: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of the validation split; all audio kept. Read only."""
    out = tmp_path_factory.mktemp("eval") / "eval"
    code, output = call("eval", f"shards={work / 'shards'}", f"models={model}", f"out={out}", "seed=5", *QUICK)
    assert code == 0, output
    return out


def rows_of(folder: Path, name: str = "clips.parquet") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / name).to_pylist()
    return rows


def test_every_clip_has_a_row_for_every_system(judged: Path, work: Path) -> None:
    index = pq.read_table(work / "shards" / "index.parquet").to_pylist()
    expected = {row["key"]: row for row in index if row["split"] == "validation" and row["status"] == OK}
    rows = rows_of(judged)
    assert {(row["clip"], row["system"]) for row in rows} == {
        (key, system) for key in expected for system in ("stock", "warm_start", "seed_5", "target")
    }
    for row in rows:
        segment = expected[row["clip"]]
        assert row["seconds"] == segment["n_samples"] / TARGET_RATE
        assert (row["group"], row["start_seconds"]) == (segment["group"], segment["start_seconds"])
        assert row["undefined"] == []
    assert json.loads((judged / "settings.json").read_text())["seed"] == 5
    assert read_metadata(judged / "clips.parquet")["snac"].startswith("stand-in")


def test_the_seed_chooses_the_clips_which_keep_their_order() -> None:
    many: Any = SimpleNamespace(entries=range(100))
    some, others = (_choose(many, 9, seed) for seed in (0, 1))
    assert some != others
    assert some == sorted(set(some))
    assert len(some) == 9
    assert set(_choose(many, 4, 0)) < set(some), "the audio that is kept is of clips that are judged"


@pytest.mark.parametrize("lacking", [1, 3000])
def test_audio_that_does_not_fit_on_the_disk(
    lacking: int, judged: Path, work: Path, model: Path, tmp_path: Path
) -> None:
    """libsndfile itself leaves a file cut off without a word where its last bytes have no room."""
    size = max(path.stat().st_size for path in (judged / "audio").rglob("*.flac"))
    words = [f"shards={work / 'shards'}", f"models={model}", f"out={tmp_path / 'eval'}", "seed=5", *QUICK]
    with longest_file(size - lacking):
        code, output = call("eval", *words)
    assert code == 1
    (error,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert re.fullmatch(rf"error: File too large: {tmp_path}/.*/audio/.*\.flac", error)
    assert not list(tmp_path.iterdir())


def test_figures_are_in_the_order_that_they_must_have(judged: Path) -> None:
    means = {(row["system"], row["metric"]): row["mean"] for row in rows_of(judged, "summary.parquet")}
    assert means["seed_5", "lsd"] == means["warm_start", "lsd"], "the same decoder"
    assert means["target", "lsd"] == means["target", "level_db"] == 0
    assert means["stock", "lsd_hf"] > means["warm_start", "lsd_hf"] > 0.5, "nothing above 12 kHz costs most"
    assert means["stock", "lsd_lf"] == pytest.approx(means["warm_start", "lsd_lf"], abs=0.2), "the same speech"
    assert means["stock", "bandwidth_hz"] <= 12_250 < means["warm_start", "bandwidth_hz"]


def test_differences_are_taken_clip_by_clip(judged: Path) -> None:
    rows = rows_of(judged)
    values = {system: [row["lsd"] for row in rows if row["system"] == system] for system in ("stock", "warm_start")}
    paired = np.subtract(values["warm_start"], values["stock"])
    (row,) = (
        row for row in rows_of(judged, "summary.parquet") if (row["system"], row["metric"]) == ("warm_start", "lsd")
    )
    assert (row["pairs"], row["clips"]) == (len(paired), len(paired))
    assert row["difference"] == pytest.approx(paired.mean())
    assert (row["groups"], row["pair_groups"]) == (1, 1)
    assert (row["low"], row["difference_low"], row["difference_high"]) == (None, None, None)
    stock = [row for row in rows_of(judged, "summary.parquet") if row["system"] == "stock"]
    assert {row["difference"] for row in stock} == {None}


def test_the_same_on_two_processes(judged: Path, work: Path, model: Path, tmp_path: Path) -> None:
    words = [f"shards={work / 'shards'}", f"models={model}", "seed=5", *QUICK[:1], *QUICK[2:]]
    code, output = call("eval", *words, f"out={tmp_path / 'two'}", "num_workers=2")
    assert code == 0, output
    first, *_, last = output.splitlines()
    assert first.startswith(f"{len({row['clip'] for row in rows_of(judged)})} clips of 1 voice (group), ")
    assert first.endswith("targets by recording")
    few = (
        "mean over clips; no intervals and no *: they take 5 voices, and these clips are of 1 voice (group). Undefined"
    )
    assert last.startswith(few)
    for name in ("clips.parquet", "summary.parquet"):
        assert rows_of(tmp_path / "two", name) == rows_of(judged, name)


@torch.no_grad()
def test_a_clip_is_that_stretch_of_the_whole_recording(snac: SNAC, work: Path) -> None:
    """Decoded from a shard with its context, it equals the decoding of the whole recording's tokens."""
    decoder = warm_start(snac, "zero", 0)
    shards = clips.ShardClips(work / "shards", load_snac(TINY_SNAC)[1].describe())
    shards.plan = clips._plan_rows(work / "plan.parquet")
    system = decoded_systems(Stock(snac, "stand-in"), {}, torch.device("cpu"), 0)["warm_start"]
    middle = 0
    for place in range(len(shards.entries)):
        clip = shards.load(place)
        row = shards.plan[clip.key]
        recording = Recording(Path(row["path"]), probe(Path(row["path"])))
        levels = snac_levels(np.concatenate(list(encode_whole(snac, recording, 1000))))
        whole = decoder(snac.quantizer.from_codes(levels))[0, 0]
        start = row["start_coarse"] * 4096
        found = torch.from_numpy(system(clip))
        torch.testing.assert_close(found, whole[start : start + len(found)], rtol=0, atol=1e-5)
        middle += start > 0 and clip.before == 3
        assert clip.source is not None
        np.testing.assert_allclose(clip.source, clip.target, rtol=0, atol=2**-15)  # recordings are these targets
        expected = Resampler(recording, TARGET_RATE).read(start, start + len(found))
        np.testing.assert_array_equal(clip.source, expected)
    assert middle, "some clip has real context before it"
    assert {row["split"] for row in shards.plan.values()} == {"validation"}, "keys are of one split"
    tenth = row["rate"] // 10
    shards.plan[clip.key] = {**row, "first_frame": tenth, "frames": row["frames"] - tenth, "start_coarse": 0}
    source, expected = shards.load(place).source, Resampler(recording, TARGET_RATE).read(4800, 14_800)
    assert source is not None
    np.testing.assert_allclose(source[1000:9000], expected[1000:9000], rtol=0, atol=1e-3)
    shards.plan[clip.key] = {**row, "file_frames": row["file_frames"] + 1}
    assert shards.load(place).source is None, "the file is not the one that was planned"


@torch.no_grad()
def test_windows_change_nothing(snac: SNAC, monkeypatch: pytest.MonkeyPatch, recordings: Path) -> None:
    system = decoded_systems(Stock(snac, "stand-in"), {}, torch.device("cpu"), 0)["warm_start"]
    clip = clips.RecordingClips(recordings, snac, 60).load(7)
    whole = system(clip)
    monkeypatch.setattr("trainer.systems.WINDOW_COARSE", 4)
    np.testing.assert_allclose(system(clip), whole, rtol=0, atol=1e-5)
    assert len(whole) == len(clip.target) > 8 * 4096


def test_a_recording_that_stands_there_twice_is_refused(snac: SNAC, tmp_path: Path) -> None:
    """Its outputs would be one file."""
    for name in ("a.wav", "a.flac"):
        soundfile.write(tmp_path / name, [0.1, 0.2], 48_000)
    with pytest.raises(UserError, match="a stands there with several suffixes: keep one of them"):
        clips.RecordingClips(tmp_path, snac, 60)


def test_a_pattern_says_whose_voice_a_recording_is(recordings: Path, snac: SNAC) -> None:
    found = clips.RecordingClips(recordings, snac, 60, r"^speaker_(\d)/")
    assert [found.load(place).group for place in (0, 7)] == ["0", "3"]
    with pytest.raises(UserError, match=r"group_pattern=\(x\) names no group in 'speaker_0/"):
        clips.RecordingClips(recordings, snac, 60, "(x)")


def test_a_folder_of_recordings(recordings: Path, model: Path, tmp_path: Path) -> None:
    """Each its own target; what cannot be used has a row that says why."""
    audio = tmp_path / "audio"
    shutil.copytree(recordings, audio)
    (audio / "broken\x1b.wav").write_text("no audio")
    (audio / "notes.txt").write_text("no recording")
    shutil.copy(audio / "speaker_3" / "take_0.wav", audio / "speaker_3" / "take_0.48k.wav")  # as `just decode` names it
    code, output = call(
        "eval", f"audio={audio}", f"models.mine={model}", f"out={tmp_path / 'eval'}", "max_seconds=3", *QUICK
    )
    assert code == 0, output
    rows = rows_of(tmp_path / "eval")
    failed = {row["clip"]: row["reason"] for row in rows if row["status"] == FAILED}
    assert failed.keys() == {"broken\x1b", "speaker_3/take_1"}
    assert "not readable as audio" in failed["broken\x1b"]
    assert failed["speaker_3/take_1"] == "lasts 3.2 s, more than max_seconds=3"
    assert all(f"not judged: {printable(clip)}: {reason}" in output for clip, reason in failed.items())
    systems = {row["system"] for row in rows if row["status"] == OK}
    assert systems == {"stock", "warm_start", "mine", "target"}
    assert len(rows) == 2 + 7 * 4
    low = [row["bandwidth_hz"] for row in rows if row["system"] == "target" and row["clip"] == "speaker_3/take_0"]
    assert low[0] <= 8250, "a recording at 16 kHz"


def test_where_no_clip_can_be_used_nothing_is_left(recordings: Path, model: Path, tmp_path: Path) -> None:
    words = (f"audio={recordings}", f"models.mine={model}", f"out={tmp_path / 'eval'}", "max_seconds=0.1")
    code, output = call("eval", *words, *QUICK)
    assert code == 1
    assert "error: no clip could be used; the first because: lasts 0.4 s, more than max_seconds=0.1" in output
    assert not list(tmp_path.glob("eval*"))


def test_another_systems_folder(judged: Path, work: Path, tmp_path: Path) -> None:
    """The stock rows' own audio, as another system: the same figures but for 16 bit."""
    words = [f"shards={work / 'shards'}", f"systems.other={judged / 'audio' / 'stock'}", "seed=5", *QUICK]
    code, output = call("eval", *words, f"out={tmp_path / 'eval'}", "baseline=other", "keep_audio=0")
    assert code == 0, output
    assert "warning: other is judged from 16-bit files" in output
    rows = rows_of(tmp_path / "eval")
    values = {system: [row["lsd_lf"] for row in rows if row["system"] == system] for system in ("stock", "other")}
    assert values["other"] == pytest.approx(values["stock"], abs=0.02)
    assert not (tmp_path / "eval" / "audio").exists()


@pytest.mark.parametrize(("subtype", "found"), [("PCM_16", ["other"]), ("PCM_24", []), ("FLOAT", [])])
def test_files_of_16_bits_are_known(subtype: str, found: list[str], tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", [0.1, 0.2], 48_000, subtype)
    soundfile.write(tmp_path / "b.flac", [0.1, 0.2], 48_000, "PCM_24")
    assert rounded_to_16_bits({"other": tmp_path}, ["a", "b"]) == found


def test_what_is_not_finite_is_no_output_of_another_system(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", [0.1, np.nan], 48_000, "FLOAT")
    read = external_systems({"other": tmp_path}, [clips.Entry("a", 2)])["other"]
    clip: Any = SimpleNamespace(key="a", target=np.zeros(2))
    with pytest.raises(UserError, match=r"a\.wav: changed while it was judged, or is not finite"):
        read(clip)


def test_the_recording_behind_a_restored_target_is_judged_too(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the targets were SIDON's: the source is read by the plan, and by nothing where the plan is gone."""

    def load_as_sidon(folder: Path, split: str) -> Index:
        index = load(folder, split)
        return replace(index, fingerprint={**index.fingerprint, "teacher": "sidon\x1b"})

    monkeypatch.setattr("trainer.clips.load", load_as_sidon)
    code, output = call("eval", f"shards={work / 'shards'}", f"out={tmp_path / 'eval'}", *QUICK)
    assert code == 0, output
    assert ("targets by sidon\\x1b" in output, "\x1b" in output) == (True, False)
    rows = rows_of(tmp_path / "eval")
    assert list(dict.fromkeys(row["system"] for row in rows)) == ["stock", "warm_start", "source", "target"]
    sources = [row for row in rows if row["system"] == "source"]
    assert max(row["lsd_lf"] for row in sources) < 0.1, "but for 16 bit they are these targets"
    assert max(abs(row["level_db"]) for row in sources) < 1e-3
    shutil.copytree(work / "shards", tmp_path / "alone" / "shards")
    code, output = call("eval", f"shards={tmp_path / 'alone' / 'shards'}", f"out={tmp_path / 'eval2'}", *QUICK)
    assert code == 0, output
    assert "no plan.parquet beside the shards: the recordings behind the targets are not judged" in output
    assert {row["system"] for row in rows_of(tmp_path / "eval2")} == {"stock", "warm_start", "target"}


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("missing", "{key}.wav is missing"),
        ("short", "{key}.wav has 100 samples at 48000 Hz in 1 channels, expected"),
        ("rate", "samples at 44100 Hz"),
        ("stereo", "in 2 channels"),
        ("text", "{key}.wav is not readable"),
        ("twice", "{key} stands there as .wav and as .flac"),
    ],
)
def test_another_systems_folder_must_fit(harm: str, message: str, judged: Path, work: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(judged / "audio" / "target", other)
    flac = sorted(other.glob("*.flac"))[0]
    wav, key = flac.with_suffix(".wav"), flac.stem
    samples = soundfile.read(flac, dtype="float32")[0]
    if harm != "twice":
        flac.unlink()
    if harm == "text":
        wav.write_text("no audio")
    elif harm != "missing":
        stereo = np.stack([samples, samples], axis=1) if harm == "stereo" else samples
        soundfile.write(wav, stereo[:100] if harm == "short" else stereo, 44_100 if harm == "rate" else 48_000)
    out = tmp_path / "eval"
    code, output = call("eval", f"shards={work / 'shards'}", f"systems={other}", f"out={out}", *QUICK)
    assert code == 1
    assert output.startswith(f"error: systems.other={other}: ")
    assert message.format(key=key) in output
    assert not out.exists()


def test_an_export_is_judged_as_its_checkpoint(judged: Path, work: Path, model: Path, tmp_path: Path) -> None:
    assert call("export", f"model={model}", f"out={tmp_path / 'export'}")[0] == 0
    words = [f"shards={work / 'shards'}", f"models={tmp_path / 'export'}", f"out={tmp_path / 'eval'}", "seed=5"]
    code, output = call("eval", *words, *QUICK[:-1])
    assert code == 1
    assert "name the SNAC by pretrained_model=" in output
    code, output = call("eval", *words, *QUICK)
    assert code == 0, output
    exported = [row["lsd"] for row in rows_of(tmp_path / "eval") if row["system"] == "export"]
    assert exported == [row["lsd"] for row in rows_of(judged) if row["system"] == "seed_5"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "give either shards="),
        (["shards={shards}", "audio={shards}"], 2, "give either shards="),
        (["shards={shards}", "group_pattern=(.*)"], 2, "group_pattern=(.*) is for audio="),
        (["shards={shards}", "models=a/b,c/b"], 2, "two share a name"),
        (["shards={shards}", "systems.stock=x"], 2, "the name stock is taken"),
        (["shards={shards}", "models.x=a", "systems.x=b"], 2, "the name x is taken"),
        (["shards={shards}", "systems.../x=b"], 2, "systems"),
        (["shards={shards}", "baseline=nobody"], 2, "baseline=nobody is none of stock, warm_start"),
        (["shards={shards}", "metrics=lsd,loudness"], 2, "given: 'loudness'"),
        (["shards={shards}", "out={shards}"], 1, "exists: choose another folder"),
        (["audio={shards}/nowhere"], 1, "no such folder"),
        (["audio={shards}"], 1, "holds no recordings"),
        (["shards={shards}", "models=nowhere"], 1, "nowhere: no checkpoint there"),
    ],
)
def test_what_cannot_be_judged_is_refused(
    words: list[str], code: int, message: str, work: Path, tmp_path: Path
) -> None:
    given = [word.format(shards=work / "shards") for word in words]
    defaults = {"out": f"out={tmp_path / 'eval'}", **{word.split("=")[0]: word for word in QUICK}}
    merged = {**defaults, **{word.split("=")[0]: word for word in given}}
    found, output = call("eval", *merged.values())
    assert found == code, output
    assert message in output
    assert output.startswith("error: ")
    assert not (tmp_path / "eval").exists()


def test_codes_of_another_snac_are_refused(work: Path, tmp_path: Path) -> None:
    other = tmp_path / "other_snac"
    shutil.copytree(TINY_SNAC, other)
    state = torch.load(other / "pytorch_model.bin", weights_only=True)
    name = next(name for name in state if "codebook" in name)
    torch.save({**state, name: state[name] + 1}, other / "pytorch_model.bin")
    words = [f"shards={work / 'shards'}", f"out={tmp_path / 'eval'}", *QUICK[:-1]]
    code, output = call("eval", *words, f"pretrained_model={other}")
    assert code == 1
    assert "holds codes by" in output


def test_a_model_of_other_tokens_is_refused(snac: SNAC) -> None:
    other = load_snac(TINY_SNAC)[0]
    other.quantizer.quantizers[1].codebook.weight.data += 1
    codec = checkpoint.Codec48k(other, {}, warm_start(other, "zero", 0), {"snac": "another"})
    with pytest.raises(UserError, match="the model mine speaks the tokens of another"):
        decoded_systems(Stock(snac, "stand-in"), {"mine": codec}, torch.device("cpu"), 0)


class Noise(torch.nn.Linear):
    def __init__(self) -> None:
        super().__init__(1, 1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.randn(1, tokens.shape[1] * 4096)


def test_noise_of_a_clip_follows_from_the_seed(snac: SNAC, recordings: Path) -> None:
    clip = clips.RecordingClips(recordings, snac, 60).load(0)
    one, same, other = (decode_clip(Noise(), "mine", seed, clip) for seed in (0, 0, 1))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_damaged_weights_are_refused(snac: SNAC, recordings: Path) -> None:
    clip = clips.RecordingClips(recordings, snac, 60).load(0)

    class Broken(Noise):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return super().forward(tokens) * torch.nan

    with pytest.raises(UserError, match="mine: its output for speaker_0/take_0 is not finite"):
        decode_clip(Broken(), "mine", 0, clip)


def test_settings_and_scores_know_the_same_metrics() -> None:
    assert get_args(MetricName) == tuple(METRICS)
    written = [column for metric in METRICS.values() for column in metric.columns]
    assert sorted(written) == sorted(columns_of(METRICS))
    assert len(written) == len(set(written))
    assert all(len(metric.definition) > 20 for metric in METRICS.values())
