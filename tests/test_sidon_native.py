"""SIDON from raw weights: equal to plain references, batched or alone, and clear about files that do not fit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel

from pipeline.sidon import FRAME, PADDING, Native, Sidon, bf16_errors_db, stays_near_fp32
from pipeline.sidon_decoder import load_decoder
from pipeline.sidon_encoder import load_encoder
from shards.errors import UserError
from tests import sidon_native_standin as upstream
from tests.helpers import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    upstream.build(folder)
    return folder


@pytest.fixture(scope="module")
def native(folder: Path) -> Native:
    return Native(
        str(folder / "raw"), str(folder / "base"), folder / "base" / "weights.json", torch.device("cpu"), "fp32"
    )


def files(folder: Path) -> tuple[Path, Path, Path, Path]:
    base, raw = folder / "base", folder / "raw"
    return (
        base / "config.json",
        base / "model.safetensors",
        raw / "adapter_config.json",
        raw / "adapter_model.safetensors",
    )


def difference_db(found: Any, expected: Any) -> float:
    found, expected = (np.asarray(x, dtype=np.float64) for x in (found, expected))
    return float(10 * np.log10(np.square(found - expected).sum() / np.square(expected).sum() + 1e-30))


def windows(*frames: int) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    random = np.random.default_rng(0)
    return [(0.1 * random.standard_normal(n * FRAME + 2 * PADDING)).astype(np.float32) for n in frames]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_the_encoder_is_what_peft_makes_of_the_files(folder: Path) -> None:
    """peft loads the adapter onto stock eager attention; ours merges it and attends by the fused kernel."""
    peft = pytest.importorskip("peft", reason="the reference loads the adapter by peft")
    config = Wav2Vec2BertConfig.from_pretrained(folder / "base", num_hidden_layers=2, layerdrop=0.0)
    base = Wav2Vec2BertModel.from_pretrained(folder / "base", config=config, attn_implementation="eager")
    reference = peft.PeftModel.from_pretrained(base, folder / "raw").eval()
    encoder = load_encoder(*files(folder))
    features = torch.randn(2, 40, 160, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(40) < torch.tensor([[40], [23]])
    with torch.inference_mode():
        plain = Wav2Vec2BertModel.from_pretrained(folder / "base", config=config).eval()(features).last_hidden_state
        for given in (None, mask):
            expected = reference(features, attention_mask=given).last_hidden_state
            found = encoder(features, attention_mask=given).last_hidden_state
            real = mask if given is not None else torch.ones_like(mask)
            assert difference_db(found[real], expected[real]) < -110
        merged = encoder(features).last_hidden_state
    assert difference_db(plain, merged) > -40  # the adapter is no decoration


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_biases_that_were_trained_are_merged_or_missed_aloud(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """peft 0.21 writes them beside A and B; older ones trained them and did not."""
    peft = pytest.importorskip("peft", reason="the reference saves and loads the adapter by peft")
    shutil.copytree(folder, tmp_path / "copy")
    config = Wav2Vec2BertConfig.from_pretrained(folder / "base", num_hidden_layers=2, layerdrop=0.0)
    base = Wav2Vec2BertModel.from_pretrained(folder / "base", config=config)
    reference = peft.PeftModel.from_pretrained(base, folder / "raw").eval()
    load_encoder(*files(folder))
    assert "says that biases were trained (lora_only)" in capsys.readouterr().out
    for name, parameter in reference.named_parameters():
        if "base_layer.bias" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    reference.save_pretrained(tmp_path / "copy" / "raw")
    features = torch.randn(1, 40, 160, generator=torch.Generator().manual_seed(0))
    encoder = load_encoder(*files(tmp_path / "copy"))
    assert "biases" not in capsys.readouterr().out
    with torch.inference_mode():
        expected = reference(features).last_hidden_state
        assert difference_db(encoder(features).last_hidden_state, expected) < -110


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("base/config.json", {"position_embeddings_type": "absolute"}, "not the config of a w2v-BERT: .*absolute"),
        ("base/config.json", {"position_embeddings_type": "rotary"}, "2 unexpected .*distance_embedding"),
        ("base/config.json", {"hidden_act": "sigmoid_linear"}, "not the config of a w2v-BERT: .*sigmoid_linear"),
        ("base/config.json", {"add_adapter": True}, r"missing \(adapter\."),
        ("raw/adapter_config.json", {"r": 32}, r"ffn1\.output_dense has ranks 64 and 64, .* says 32"),
        ("raw/adapter_config.json", {"lora_alpha": None}, "not a plain LoRA adapter with r and lora_alpha"),
        ("raw/adapter_config.json", {"alpha_pattern": {"ffn1.output_dense": 64}}, "not a plain LoRA .*alpha_pattern"),
        ("raw/adapter_config.json", {"use_dora": True}, "not a plain LoRA .*use_dora"),
        ("raw/adapter_config.json", None, "adapter_config.json is not JSON of keys and values"),
        ("base/config.json", None, "config.json is not JSON of keys and values"),
    ],
)
def test_configs_that_do_not_fit(
    file: str, change: dict[str, Any] | None, message: str, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / file
    path.write_text(json.dumps([1] if change is None else json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load_encoder(*files(tmp_path / "copy"))


def test_a_published_config_is_read(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What transformers 4.37 and peft 0.18 wrote, and later versions do not know or write otherwise."""
    shutil.copytree(folder, tmp_path / "copy")
    more = {
        "base/config.json": {"torch_dtype": "float32", "num_negatives": 100, "_name_or_path": "x", "vocab_size": None},
        "raw/adapter_config.json": {
            "rank_pattern": None,
            "alpha_pattern": {},
            "use_qalora": False,
            "lora_bias": None,
            "bias": "none",
        },
    }
    for file, keys in more.items():
        path = tmp_path / "copy" / file
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    found = load_encoder(*files(tmp_path / "copy")).state_dict()
    assert "biases" not in capsys.readouterr().out
    expected = load_encoder(*files(folder)).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_decoder_is_dacs_to_the_last_sample(tmp_path: Path) -> None:
    reference = upstream.write_decoder(tmp_path, 16, 64)
    decoder = load_decoder(tmp_path / "decoder_state_dict.pt")
    hidden = torch.randn(3, 16, 30, generator=torch.Generator().manual_seed(0))
    frames = [30, 17, 1]
    with torch.inference_mode():
        found = decoder(hidden, frames)
        for member, n in enumerate(frames):
            expected = reference(hidden[member : member + 1, :, :n])[0, 0]
            assert expected.shape == (960 * n - 26,)
            assert difference_db(found[member, : len(expected)], expected) < -100
            assert not found[member, len(expected) :].any()


def test_the_decoder_is_the_published_package_s(tmp_path: Path) -> None:
    site = Path(os.environ.get("DAC_REFERENCE", ROOT / ".reference"))
    if not (site / "dac").exists():
        pytest.skip("its dependencies exclude ours: uv pip install --no-deps --target .reference descript-audio-codec")
    (tmp_path / "sizes.json").write_text(json.dumps([16, 64, upstream.RATES]))
    words = [sys.executable, "-m", "tests.dac_reference", str(site), str(tmp_path)]
    subprocess.run(words, cwd=ROOT, check=True)
    pair = torch.load(tmp_path / "pair.pt", weights_only=True)
    decoder = load_decoder(tmp_path / "decoder_state_dict.pt")
    plain = upstream.PlainDac(16, 64, upstream.RATES).eval()
    plain.load_state_dict(torch.load(tmp_path / "decoder_state_dict.pt", weights_only=True))
    with torch.inference_mode():
        found = decoder(pair["hidden"], [25, 25])[:, : 960 * 25 - 26]
        assert difference_db(found, pair["output"][:, 0]) < -110
        assert difference_db(plain(pair["hidden"]), pair["output"]) < -110  # the tests' own reference is one


def test_batched_is_single(native: Native) -> None:
    sidon = Sidon(native, torch.device("cpu"))
    given = windows(50, 31, 3, 44)
    batched = sidon.restore(given)
    for window, found in zip(given, batched, strict=True):
        (alone,) = sidon.restore([window])
        assert len(found) == 3 * (len(window) - 2 * PADDING)
        assert difference_db(found, alone) < -60


def test_bf16_stays_near_fp32(folder: Path, native: Native) -> None:
    pins = folder / "base" / "weights.json"
    half = Native(str(folder / "raw"), str(folder / "base"), pins, torch.device("cpu"), "bf16")
    device, given = torch.device("cpu"), windows(40, 25)
    for found, expected in zip(Sidon(half, device).restore(given), Sidon(native, device).restore(given), strict=True):
        assert -100 < difference_db(found, expected) < -25  # random weights; what the real ones lose, doctor measures


def test_auto_takes_bf16_only_where_it_stays_near(native: Native, monkeypatch: pytest.MonkeyPatch) -> None:
    sidon = Sidon(native, torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(native, "precision", "fp32")
        assert all(-100 < error < -20 for error in bf16_errors_db(native, sidon))
        patch.setattr("pipeline.sidon.BF16_LIMITS_DB", (0.0, -90.0))
        assert not stays_near_fp32(native, sidon)  # in the new band
        patch.setattr(native, "_precision", nullcontext)
        assert bf16_errors_db(native, sidon) == (-200, -200)
        assert stays_near_fp32(native, sidon)


def test_bf16_does_not_round_the_output(folder: Path) -> None:
    """Rounded to 8 bits it would carry noise of its own, louder than speech is above 12 kHz."""
    pins, cpu = folder / "base" / "weights.json", torch.device("cpu")
    half = Native(str(folder / "raw"), str(folder / "base"), pins, cpu, "bf16")
    (found,) = Sidon(half, cpu).restore(windows(30))
    heard = torch.from_numpy(found)
    assert (heard != heard.bfloat16().float()).float().mean() > 0.9


def test_the_true_sizes_fit(tmp_path: Path) -> None:
    """Shapes only, on the meta device: w2v-BERT's defaults give the 1024 channels that the decoder takes."""
    with torch.device("meta"):
        encoder = Wav2Vec2BertModel(Wav2Vec2BertConfig(num_hidden_layers=8, layerdrop=0.0))
        decoder = upstream.PlainDac(1024, 1536, upstream.RATES)
    parameters = [sum(p.numel() for p in module.parameters()) for module in (encoder, decoder)]
    assert parameters[0] == pytest.approx(193.6e6, rel=0.01)
    assert parameters[1] == pytest.approx(52.4e6, rel=0.01)
    keys = {f"encoder.layers.{n}.ffn{part}.output_dense.weight" for n in range(8) for part in (1, 2)}
    assert {tuple(encoder.state_dict()[key].shape) for key in keys} == {(1024, 4096)}


ADAPTED = "base_model.model.encoder.layers.0.ffn1.output_dense"


def spoil(path: Path, change: Any) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def drop(tensors: dict[str, Tensor], part: str) -> None:
    tensors.pop(next(name for name in sorted(tensors) if part in name))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("base/model.safetensors", lambda t: drop(t, "layers.0.ffn1"), r"model\.safetensors: .* 1 missing \(encoder"),
        ("base/model.safetensors", lambda t: t.update(x=torch.ones(1)), r"1 unexpected \(x\)"),
        (
            "base/model.safetensors",
            lambda t: t.update({"feature_projection.projection.bias": torch.ones(7)}),
            "1 of another shape",
        ),
        ("raw/adapter_model.safetensors", lambda t: t.update(y=torch.ones(1)), "unexpected key y"),
        ("raw/adapter_model.safetensors", lambda t: drop(t, "lora_B"), "lacks lora_A or lora_B"),
        (
            "raw/adapter_model.safetensors",
            lambda t: t.update({n: v[:, :9].clone() for n, v in t.items() if "lora_A" in n}),
            "does not fit",
        ),
        (
            "raw/adapter_model.safetensors",
            lambda t: t.update({n: v[:, :9].clone() for n, v in t.items() if "lora_B" in n}),
            r"ffn1\.output_dense has ranks 64 and 9, .* says 64",
        ),
        (
            "raw/adapter_model.safetensors",
            lambda t: t.update({f"{ADAPTED}.base_layer.bias": torch.ones(7)}),
            r"raw/adapter_model\.safetensors: .* 1 of another shape \(encoder\.layers\.0\.ffn1\.output_dense\.bias\)",
        ),
    ],
)
def test_encoder_files_that_do_not_fit(file: str, change: Any, message: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    spoil(tmp_path / "copy" / file, change)
    with pytest.raises(UserError, match=message):
        load_encoder(*files(tmp_path / "copy"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("model.1.block.0.alpha"), r"1 missing \(model\.1\.block\.0\.alpha\)"),
        (lambda state: state.update(extra=torch.ones(1)), r"1 unexpected \(extra\)"),
        (lambda state: state.pop("model.0.weight_v"), "no decoder of DAC"),
        (lambda state: state.update(step=3), "not a state dict of plain tensors"),
    ],
)
def test_decoder_files_that_do_not_fit(change: Any, message: str, tmp_path: Path) -> None:
    state = upstream.write_decoder(tmp_path, 8, 32).state_dict()
    change(state)
    torch.save(state, tmp_path / "decoder_state_dict.pt")
    with pytest.raises(UserError, match=message):
        load_decoder(tmp_path / "decoder_state_dict.pt")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("code of a state dict ran",)


def test_a_state_dict_with_code_is_refused(tmp_path: Path) -> None:
    torch.save({"model.0.weight_v": Bomb()}, tmp_path / "decoder_state_dict.pt")
    with pytest.raises(UserError, match="not a state dict of plain tensors"):
        load_decoder(tmp_path / "decoder_state_dict.pt")


def test_a_wrong_hash_is_refused(folder: Path, tmp_path: Path) -> None:
    pins = tmp_path / "weights.json"
    pins.write_text(
        (folder / "base" / "weights.json")
        .read_text()
        .replace('"adapter_model.safetensors": "', '"adapter_model.safetensors": "0')
    )
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: sha256 is \w{64}, expected 0"):
        Native(str(folder / "raw"), str(folder / "base"), pins, torch.device("cpu"), "fp32")
