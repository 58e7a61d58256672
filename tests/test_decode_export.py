"""What training leaves works without this project: the stock package decodes it, and WAVs have the right length."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from snac import SNAC

from codec.snac import snac_levels
from shards.contract import COARSE_48K, flatten_codes
from shards.errors import UserError
from tests.helpers import ROOT, TINY_SNAC, speechlike
from tests.training_helpers import call, small_training
from trainer import checkpoint
from trainer.card import snac_card
from trainer.checkpoint import load_codec
from trainer.decode import decode_stream, write_wav
from trainer.decoder import RATES_48K
from trainer.inference import StepDecoder
from trainer.streaming import EXACT

NO_NOTICE = "the package snac is installed without its LICENSE, which exports have to hold: install its wheel"
STOCK_ONLY = """
import sys
import torch
from safetensors.torch import load_file
from snac import SNAC
folder, original, codes, audio, out = sys.argv[1:]
torch.set_num_threads(1)
model, stock = SNAC.from_pretrained(folder), SNAC.from_pretrained(original)
codes, audio = (torch.load(path, weights_only=True) for path in (codes, audio))
with torch.inference_mode():
    torch.save([model.decode(codes), model.encode(audio), stock.encode(audio)], out)
ours = {"trainer", "codec", "shards", "configs", "pipeline"} & {name.split(".")[0] for name in sys.modules}
assert not ours, ours
"""


@pytest.fixture(scope="module")
def run(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of three steps, large ones, so that its decoder is not the warm start."""
    folder = tmp_path_factory.mktemp("decode") / "run"
    small_training(work, folder, max_steps=3, phase1_steps=0, learning_rate=1e-3)
    shutil.copy(checkpoint.step_path(folder, 3), checkpoint.folder(folder) / checkpoint.BEST)
    return folder


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    out = run.parent / "export"
    assert call("export", f"model={run}", f"out={out}")[0] == 0
    return out


def random_codes(coarse: int, seed: int = 0) -> npt.NDArray[np.int16]:
    return np.random.default_rng(seed).integers(0, 4096, (coarse, 7)).astype(np.int16)


def whole(model: Path, codes_T7: npt.NDArray[np.int16]) -> npt.NDArray[np.float32]:
    codec = load_codec(model)
    with torch.inference_mode():
        wav: npt.NDArray[np.float32] = codec.decoder(codec.snac.quantizer.from_codes(snac_levels(codes_T7)))[
            0, 0
        ].numpy()
    return wav


def step_decoder(model: Path) -> StepDecoder:
    codec = load_codec(model)
    return StepDecoder(codec.snac, codec.decoder)


def test_the_stock_package_loads_and_decodes_it(run: Path, exported: Path, tmp_path: Path) -> None:
    codes_T7, audio = random_codes(5), torch.from_numpy(speechlike(0.7, 24_000, 1))[None, None]
    torch.save(snac_levels(codes_T7), tmp_path / "codes")
    torch.save(audio, tmp_path / "audio")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    arguments = [str(exported), TINY_SNAC, *(str(tmp_path / name) for name in ("codes", "audio", "out"))]
    subprocess.run([sys.executable, "-c", STOCK_ONLY, *arguments], cwd=tmp_path, env=environment, check=True)
    wav, tokens, expected_tokens = torch.load(tmp_path / "out", weights_only=True)
    assert wav.shape == (1, 1, 5 * COARSE_48K)
    np.testing.assert_allclose(wav[0, 0].numpy(), whole(run, codes_T7), atol=1e-6)
    assert np.abs(wav.numpy()).max() > 1e-2
    for level, expected in zip(tokens, expected_tokens, strict=True):
        assert torch.equal(level, expected)


def test_an_export_holds_what_the_stock_package_expects(exported: Path) -> None:
    assert {path.name for path in exported.iterdir()} == {
        "config.json", "pytorch_model.bin", "provenance.json", "README.md",
        "model.safetensors", "decoder_only.safetensors", "LICENSE.snac",
    }  # fmt: skip
    assert (exported / "LICENSE.snac").read_text().startswith("MIT License\n\nCopyright (c) 2023, Descript\n")
    config = json.loads((exported / "config.json").read_text())
    stock = json.loads((Path(TINY_SNAC) / "config.json").read_text())
    assert config == {**stock, "decoder_rates": RATES_48K}
    provenance = json.loads((exported / "provenance.json").read_text())
    assert provenance["step"] == 3
    assert provenance["settings"]["learning_rate"] == 1e-3
    assert provenance["settings"]["shards"] == "shards", "where that lay is nobody's business"
    assert "stand-in" in provenance["snac"]
    assert provenance["data"]["teacher"] == "recording"
    assert str(Path(TINY_SNAC).parent) not in (exported / "README.md").read_text()


def test_without_the_notice_of_snac_nothing_is_exported(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.Distribution.files", None)
    code, output = call("export", f"model={run}", f"out={tmp_path / 'out'}")
    assert (code, output) == (1, f"error: {NO_NOTICE}\n")
    assert not any(tmp_path.iterdir())


def test_the_safetensors_hold_the_same_weights(exported: Path) -> None:
    state = torch.load(exported / "pytorch_model.bin", weights_only=True)
    found = load_file(exported / "model.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize("fold", [True, False])
def test_the_decoder_alone_decodes(run: Path, tmp_path: Path, fold: bool) -> None:
    """As the model card says: into a stock SNAC of random weights, encoder and in_proj left out."""
    out = tmp_path / "export"
    assert call("export", f"model={run}", f"out={out}", f"fold={str(fold).lower()}")[0] == 0
    codec, weights = SNAC.from_config(out / "config.json").eval(), load_file(out / "decoder_only.safetensors")
    assert not [name for name in weights if name.startswith("encoder.") or ".in_proj." in name]
    if fold:
        assert not [name for name in weights if "parametrizations" in name]
        card = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[1]
        exec(card.replace('"decoder_only', f'"{out}/decoder_only'), {"codec": codec})
    else:
        missing, unexpected = codec.load_state_dict(weights, strict=False)
        assert not unexpected
        assert all(name.startswith("encoder.") or ".in_proj." in name for name in missing)
    codes_T7 = random_codes(3)
    with torch.inference_mode():
        wav = codec.decode(snac_levels(codes_T7))[0, 0].numpy()
    np.testing.assert_allclose(wav, whole(run, codes_T7), atol=1e-6)


def test_the_card_says_what_it_is(run: Path, exported: Path, tmp_path: Path) -> None:
    card = (exported / "README.md").read_text()
    assert "**A stand-in**" in card
    assert "base_model" not in card
    for words in (
        'license: "other"',
        "| teacher | recording |",
        "| learning\\_rate | 0.001 |",
        "3 steps",
        "not stated",
        "the decoder began as its decoder, so its licence applies to all three",
        "# this folder, or USER/NAME of this page",
    ):
        assert words in card
    code, _ = call("export", f"model={run}", f"out={tmp_path / 'b'}", "license=mit")
    assert code == 0
    assert 'license: "mit"' in (tmp_path / "b" / "README.md").read_text()
    codec = load_codec(exported)
    published = replace(codec, provenance={**codec.provenance, "snac": "hubertsiuzdak/snac_24khz"})
    assert "\nbase_model: hubertsiuzdak/snac_24khz\n---\n" in snac_card(published, "a", True, None)
    judged = replace(codec, provenance={**codec.provenance, "validation": {"lsd": 1.25}})
    chosen = "never saw; the step was chosen by these same crops, which flatters it:\n\n| | |\n|-|-|\n| lsd |"
    assert chosen in snac_card(judged, "a", True, None)
    assert "chosen" not in card, "nothing was validated"


def test_what_a_strangers_export_says_of_itself_is_text(exported: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(exported, tmp_path / "model"))
    about = json.loads((model / "provenance.json").read_text())
    about |= {"snac": "a\n<b>\x1b[2J", "step": "3\n---\n<i>", "data": {"from": "<img>\x1b[2J"}}
    (model / "provenance.json").write_text(json.dumps(about))
    code, output = call("export", f"model={model}", f"out={tmp_path / 'again'}")
    assert (code, "\x1b" in output) == (0, False)
    card = (tmp_path / "again" / "README.md").read_text()
    assert "\x1b" not in card
    assert not re.search(r"(?<!\\)<(b|i|img)", card)
    assert card.splitlines().count("---") == 2


def test_buckets_are_nobodys_business() -> None:
    told = {"shards": ["s3://customer/x/shards", "gs://b/corpus", "hf://datasets/me/corpus", "/data/b"], "seed": 0}
    found = {"shards": ["shards", "corpus", "hf://datasets/me/corpus", "b"], "seed": 0}
    assert checkpoint._without_folders(told) == found


def test_a_stream_writes_the_same_wav_and_reports_its_latency(run: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", flatten_codes(random_codes(9)))
    wavs: list[npt.NDArray[np.int64]] = []
    for words in (["stream=true"], ["stream=false"], ["stream=true", "lookahead_frames=1"]):
        out = tmp_path / f"{len(wavs)}.wav"
        code, output = call("decode", f"model={run}", f"input={tmp_path / 'a.npy'}", f"out={out}", *words)
        assert code == 0, output
        assert "weight norm folded" in output
        assert ("first audio after" in output) == (words[0] == "stream=true")
        wavs.append(soundfile.read(out, dtype="int16")[0].astype(int))
    assert "lookahead_frames=1 (not exact): first audio after 2 frames" in output
    assert [len(wav) for wav in wavs] == [9 * COARSE_48K] * 3
    assert np.abs(wavs[0] - wavs[1]).max() <= 1
    assert np.abs(wavs[0] - wavs[2]).max() > 1
    code, output = call("decode", f"model={run}", f"input={tmp_path / 'a.npy'}", "lookahead_frames=1")
    assert (code, "is for stream=true" in output) == (1, True)


def snippet(text: str, exported: Path) -> str:
    """The first python block that loads an export, with its directory's name replaced."""
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    block = next(block for block in blocks if "SNAC.from_pretrained" in block)
    (name,) = re.findall(r'from_pretrained\("([^"]+)"\)', block)
    assert name in ("snac_48khz", exported.name)
    return block.replace(f'"{name}"', repr(str(exported)))


def test_the_readme_snippet_runs(exported: Path) -> None:
    names: dict[str, Any] = {}
    exec(snippet((ROOT / "README.md").read_text(), exported), names)
    coarse = names["codes"][0].shape[1]
    assert names["wav_48k"].shape == (1, 1, COARSE_48K * coarse)
    assert coarse == -(-names["audio_24k"].shape[-1] // 2048)


def test_the_export_says_how_to_use_it(exported: Path) -> None:
    names: dict[str, Any] = {}
    exec(snippet((exported / "README.md").read_text(), exported), names)
    assert names["wav_48k"].shape == (1, 1, names["codes"][0].shape[1] * COARSE_48K)
    assert not names["wav_48k"].requires_grad


def test_an_export_never_overwrites(run: Path, tmp_path: Path) -> None:
    for place in (tmp_path / "folder", tmp_path / "file"):
        if place.name == "folder":
            place.mkdir()
        else:
            place.write_text("mine")
        code, output = call("export", f"model={run}", f"out={place}")
        assert (code, output) == (1, f"error: out={place} exists: choose another folder or delete it\n")
    assert (tmp_path / "file").read_text() == "mine"
    assert not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize("coarse", [1, 5, 6, 7, 12, 13, 18])
def test_windows_and_pieces_change_nothing(run: Path, coarse: int) -> None:
    """Windows of 6 coarse tokens over 1 to 3 windows, tokens arriving in pieces of random size, some empty."""
    codes_T7, random = random_codes(coarse, coarse), np.random.default_rng(coarse)
    expected, model = whole(run, codes_T7), step_decoder(run)
    for _ in range(3):
        cuts = np.sort(random.integers(0, coarse + 1, random.integers(0, 6)))
        blocks = list(decode_stream(model, iter(np.split(codes_T7, cuts)), 6))
        assert len(np.concatenate(blocks)) == coarse * COARSE_48K
        np.testing.assert_allclose(np.concatenate(blocks), expected, atol=1e-5)


def test_audio_leaves_before_the_tokens_end(run: Path) -> None:
    taken = 0

    def tokens() -> Iterator[npt.NDArray[np.int16]]:
        nonlocal taken
        for row in random_codes(20):
            taken += 1
            yield row[None]

    first = next(block for block in decode_stream(step_decoder(run), tokens(), 1) if len(block))
    assert taken == EXACT
    assert len(first) == EXACT * COARSE_48K - 9551


@pytest.mark.parametrize(
    ("rate", "frames"),
    [(8000, 1), (11_025, 5003), (16_000, 16_001), (22_050, 7777), (24_000, 2048), (44_100, 44_101), (48_000, 60_007),
     (96_000, 9_999)],
)  # fmt: skip
def test_a_wav_has_exactly_the_recordings_length(run: Path, tmp_path: Path, rate: int, frames: int) -> None:
    audio = speechlike(frames / rate, rate, 0)
    assert len(audio) == frames
    soundfile.write(tmp_path / "in.wav", np.stack([audio, audio], axis=1) if rate < 12_000 else audio, rate)
    code, output = call("decode", f"model={run}", f"input={tmp_path / 'in.wav'}", "window_seconds=1")
    assert code == 0
    assert "; decoder of step 3, codes by stand-in or custom weights" in output
    assert "stand-in" in output
    info = soundfile.info(tmp_path / "in.48k.wav")
    assert (info.frames, info.samplerate, info.channels) == (-(-frames * 48_000 // rate), 48_000, 1)
    assert info.subtype == "PCM_16"


def test_codes_and_recording_run_and_export_give_one_wav(run: Path, exported: Path, tmp_path: Path, snac: SNAC) -> None:
    audio = speechlike(2.5, 24_000, 3)
    soundfile.write(tmp_path / "a.wav", audio, 24_000, "FLOAT")
    levels = snac.encode(torch.from_numpy(audio)[None, None])
    np.save(tmp_path / "a.npy", torch.cat(levels, dim=1)[0].numpy().astype(np.int16))
    wavs: list[npt.NDArray[np.int64]] = []
    for model, name in (
        (run, "a.wav"),
        (exported, "a.wav"),
        (run, "a.npy"),
        (checkpoint.step_path(run, 3), "a.npy"),
    ):
        out = tmp_path / f"{len(wavs)}.wav"
        code, _ = call("decode", f"model={model}", f"input={tmp_path / name}", f"out={out}", "window_seconds=1.1")
        assert code == 0
        wavs.append(soundfile.read(out, dtype="int16")[0].astype(int))
    assert [len(wav) for wav in wavs] == [120_000, 120_000, 30 * COARSE_48K, 30 * COARSE_48K]
    for wav in wavs[1:]:
        assert np.abs(wav[:120_000] - wavs[0]).max() <= 1
    assert np.abs(wavs[0]).max() > 300


def test_a_wav_clips_and_never_wraps(tmp_path: Path) -> None:
    samples = np.array([0, 1, -1, 1.5, -1.5, 100, -100, 32767 / 32768, 0.5 / 32768 + 1e-6, -1e-6], np.float32)
    write_wav(tmp_path / "a.wav", iter([samples[:4], samples[4:]]), len(samples))
    expected = [0, 32767, -32768, 32767, -32768, 32767, -32768, 32767, 1, 0]
    assert soundfile.read(tmp_path / "a.wav", dtype="int16")[0].tolist() == expected


def test_a_wav_longer_than_its_header_can_say_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a.wav: 12.4 hours, a WAV holds 12.4: decode it in parts"):
        write_wav(tmp_path / "a.wav", iter([]), 2**31 - 18)
    with pytest.raises(UserError, match=f"{2**31 - 19} of {2**31 - 19} samples were not decoded"):
        write_wav(tmp_path / "a.wav", iter([]), 2**31 - 19)


def test_a_wav_that_would_be_too_short_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="5 of 15 samples were not decoded"):
        write_wav(tmp_path / "a.wav", iter([np.zeros(10, np.float32)]), 15)
    assert not list(tmp_path.iterdir())
    write_wav(tmp_path / "a.wav", iter([np.zeros(10, np.float32), np.ones(10, np.float32)]), 15)
    assert soundfile.info(tmp_path / "a.wav").frames == 15
