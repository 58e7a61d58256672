"""ONNX Runtime decodes and encodes as torch does, for any batch and length, under the ecosystem's names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shards.contract import COARSE_24K, COARSE_48K, TOKENS_PER_COARSE
from tests.helpers import ROOT, speechlike
from tests.training_helpers import call
from trainer.checkpoint import load_codec
from trainer.export_onnx import CODES, DECODER, DECODER_FP16, ENCODER, as_inputs, session, snr_db

onnx: Any = pytest.importorskip("onnx", reason="`just extras` installs it")
pytest.importorskip("onnxruntime", reason="`just extras` installs it")
pytest.importorskip("onnxscript", reason="`just extras` installs it")


@pytest.fixture(scope="module")
def exported(untrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "export"
    code, output = call("export-onnx", f"model={untrained}", f"out={out}", "license=mit")
    assert code == 0, output
    assert output.startswith("writing decoder_model.onnx\nwriting encoder_model.onnx\n")
    assert "stand-in" in output
    return out


def shapes(values: Any) -> dict[str, tuple[str, list[Any]]]:
    return {value.name: (value.type, value.shape) for value in values}


@pytest.mark.parametrize("name", [DECODER, DECODER_FP16])
def test_the_decoders_names_types_and_shapes(exported: Path, name: str) -> None:
    found = session(exported / name)
    inputs = shapes(found.get_inputs())
    assert list(inputs) == ["audio_codes.0", "audio_codes.1", "audio_codes.2"]
    for kind, shape in inputs.values():
        assert kind == "tensor(int64)"
        assert len(shape) == 2
        assert all(isinstance(size, str) for size in shape), "batch and length are dynamic"
    ((output, (kind, shape)),) = shapes(found.get_outputs()).items()
    assert (output, kind, len(shape)) == ("audio_values", "tensor(float)", 3)


def test_running_a_model_tells_nobody(exported: Path, tmp_path: Path) -> None:
    """onnxruntime would keep a device's id at home and report each session to its makers."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom trainer.export_onnx import session\nsession(Path(sys.argv[1]))"
    )
    words = [sys.executable, "-c", program, str(exported / DECODER)]
    inherited = {name: os.environ[name] for name in os.environ.keys() - {"ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME"}}
    subprocess.run(words, cwd=ROOT, env={**inherited, "HOME": str(tmp_path)}, check=True)
    assert not list(tmp_path.iterdir())


def test_the_encoders_names(exported: Path) -> None:
    found = session(exported / ENCODER)
    assert list(shapes(found.get_inputs())) == ["input_values"]
    assert list(shapes(found.get_outputs())) == CODES


def test_the_cards_snippet_decodes(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert "**A stand-in**" in card
    assert 'license: "mit"' in card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    exec(snippet.replace(DECODER, str(exported / DECODER)), names)
    assert [level.shape[1] for level in names["codes"]] == [8 * n for n in TOKENS_PER_COARSE]
    assert names["wav_48k"].shape == (1, 1, 8 * COARSE_48K)
    assert "samples are within ±1" in card
    assert np.abs(names["wav_48k"]).max() <= 1


def test_windows_with_the_context_that_the_card_names_are_the_whole(exported: Path) -> None:
    assert "with 3 coarse tokens (6 middle, 12 fine) of its neighbours" in (exported / "README.md").read_text()
    run, codes_T7 = session(exported / DECODER), np.random.default_rng(0).integers(0, 4096, (9, 7))
    (whole,) = run.run(None, as_inputs(codes_T7[None]))
    for start in range(0, 9, 2):
        left, right, stop = max(start - 3, 0), min(start + 5, 9), min(start + 2, 9)
        (wav,) = run.run(None, as_inputs(codes_T7[None, left:right]))
        own = wav[..., (start - left) * COARSE_48K : (stop - left) * COARSE_48K]
        np.testing.assert_allclose(own, whole[..., start * COARSE_48K : stop * COARSE_48K], atol=1e-5)


@pytest.mark.parametrize("name", [DECODER, DECODER_FP16, ENCODER])
def test_nothing_is_drawn_at_random_and_nothing_lies_outside_the_file(exported: Path, name: str) -> None:
    model = onnx.load(exported / name, load_external_data=False)
    onnx.checker.check_model(model)
    kinds = {node.op_type for node in model.graph.node}
    assert "Conv" in kinds
    assert not [kind for kind in kinds if "Random" in kind or kind in ("Bernoulli", "Multinomial", "Dropout")]
    assert not [tensor.name for tensor in model.graph.initializer if tensor.external_data]


@pytest.mark.parametrize("name", [DECODER, DECODER_FP16, ENCODER])
def test_a_model_names_no_folder_of_who_made_it(exported: Path, name: str) -> None:
    content = (exported / name).read_bytes()
    assert b"site-packages" not in content
    assert str(Path(__file__).parents[1]).encode() not in content


@torch.inference_mode()
def test_200_random_lengths_and_batches_decode_as_torch_does(exported: Path, untrained: Path) -> None:
    codec, run, random = load_codec(untrained), session(exported / DECODER), np.random.default_rng(0)
    largest, seen = 0.0, set()
    for _ in range(200):
        batch, coarse = int(random.integers(1, 4)), int(random.integers(1, 5))
        seen.add((batch, coarse))
        inputs = as_inputs(random.integers(0, 4096, (batch, coarse, 7)))
        (wav,) = run.run(["audio_values"], inputs)
        assert wav.shape == (batch, 1, coarse * COARSE_48K)
        levels = [torch.from_numpy(level) for level in inputs.values()]
        expected = codec.decoder(codec.snac.quantizer.from_codes(levels)).numpy()
        largest = max(largest, float(np.abs(wav - expected).max()))
    assert len(seen) == 12, "every batch of 1 to 3 with every length of 1 to 4"
    assert largest <= 1e-4


@pytest.mark.parametrize(("batch", "coarse"), [(1, 1), (1, 5), (2, 3)])
def test_encoding_gives_the_stock_packages_tokens(exported: Path, untrained: Path, batch: int, coarse: int) -> None:
    audio = np.stack([speechlike(coarse * COARSE_24K / 24_000, 24_000, seed)[None] for seed in range(batch)])
    found = session(exported / ENCODER).run(None, {"input_values": audio})
    for level, expected in zip(found, load_codec(untrained).snac.encode(torch.from_numpy(audio)), strict=True):
        assert np.array_equal(level, expected.numpy())


def test_parity_and_half_precisions_error_are_written_down(exported: Path) -> None:
    found = json.loads((exported / "parity.json").read_text())
    assert 0 < found["decoder_largest_difference"] <= 1e-4
    assert 15 < found["decoder_fp16_snr_db_from_12_khz"] < found["decoder_fp16_snr_db"] < 90
    assert found["encoder_tokens_that_differ"] == 0
    assert "stand-in" in found["codes_by"]
    assert json.loads((exported / "provenance.json").read_text())["snac"] == found["codes_by"]
    assert "Hubert Siuzdak" in (exported / "LICENSE.snac").read_text()


def test_an_error_is_judged_from_the_lowest_frequency_on() -> None:
    time_s = np.arange(48_000) / 48_000
    low, high = (np.sin(2 * np.pi * hz * time_s).astype(np.float32) for hz in (1000, 18_000))
    expected, found = low + 0.1 * high, low + 0.11 * high
    assert snr_db(expected, found) == pytest.approx(40, abs=0.1)
    assert snr_db(expected, found, 12_000) == pytest.approx(20, abs=0.1)


def test_a_missing_package_and_an_existing_folder_are_one_line(
    untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"model={untrained}", f"out={tmp_path}"]
    assert call("export-onnx", *words) == (
        1, f"error: out={tmp_path} exists: choose another folder or delete it\n",
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    code, output = call("export-onnx", f"model={untrained}", f"out={tmp_path / 'out'}")
    assert code == 1
    assert output == "error: ONNX needs the package onnxscript: `just extras` installs it\n"
    assert list(tmp_path.iterdir()) == []
