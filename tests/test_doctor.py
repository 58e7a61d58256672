"""`just doctor` passes with stand-ins that are right, and cannot pass with one that is not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner

from codec.audio import Samples
from codec.snac import encode
from codec.weights import SNAC_FILES
from demo.__main__ import main
from pipeline import doctor
from pipeline.sidon import Sidon
from shards.files import file_sha256
from tests.helpers import TINY_SNAC
from tests.sidon_standin import build, random_pattern, recording


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-ins of SNAC and SIDON and a list that pins both."""
    folder = tmp_path_factory.mktemp("models")
    pins = json.loads(build(folder / "sidon").read_text())
    shutil.copytree(TINY_SNAC, folder / "snac")
    files = {file: file_sha256(folder / "snac" / file) for file in SNAC_FILES}
    pins[str(folder / "snac")] = {"revision": None, "files": files}
    (folder / "weights.json").write_text(json.dumps(pins))
    return folder


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bursts")
    for number in range(3):
        bursts = recording(random_pattern(3.0 + number, number), 16_000, 0.2 + 0.1 * number)
        soundfile.write(folder / f"{number}.wav", bursts, 16_000, "FLOAT")
    return folder


class NativeStandin:
    """The pair's burst language in the native form's place."""

    mixes_lengths = False
    precision = "fp32"

    def __init__(self, name: str, base: str, pins: Path, device: torch.device, precision: str) -> None:
        from pipeline.sidon import TorchScript

        pair = TorchScript(name, pins, device)
        self.weights, self.encode, self.decode = pair.weights, pair.encode, pair.decode


def examined(models: Path, audio: Path, *more: str) -> tuple[int, dict[str, str], str]:
    """Exit code, check → its line, and all that was printed."""
    given = {
        "audio": audio, "pretrained_model": models / "snac", "sidon": models / "sidon", "sidon_raw": models / "sidon",
        "weights": models / "weights.json", "gpu": "cpu", "recordings": 3, "window_seconds": 4, "overlap_seconds": 0.5,
        "corpus_hours": 0.01, **dict(word.split("=") for word in more),
    }  # fmt: skip
    result = CliRunner().invoke(main, ["doctor", *(f"{key}={value}" for key, value in given.items())])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    lines = re.findall(r"^(pass|FAIL)  (.{32}) (.*)$", result.stdout, re.MULTILINE)
    return result.exit_code, {name.strip(): f"{verdict} {figure}" for verdict, name, figure in lines}, result.output


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.sidon.Native", NativeStandin)


@pytest.mark.usefixtures("native")
def test_right_stand_ins_pass(models: Path, audio: Path) -> None:
    code, checks, output = examined(models, audio)
    assert code == 0, output
    assert len(checks) == 18
    assert all(figure.startswith("pass") for figure in checks.values())
    assert "stand-in or custom weights" in checks["SIDON, native: files"]
    assert checks["tokens equal stock SNAC's"].startswith("pass 0 of")


def test_voices_made_by_code_serve_without_recordings(models: Path) -> None:
    """They are no bursts, so the stand-in cannot restore them, which is what the table says."""
    code, checks, output = examined(models, Path("null"), "forms=torchscript")
    assert code == 1
    assert checks["tokens equal stock SNAC's"].startswith("pass"), output
    assert checks["fidelity, torchscript"].startswith("FAIL")


@pytest.mark.parametrize("left", [0, 120])
def test_a_wrong_delay_fails(left: int, models: Path, audio: Path) -> None:
    code, checks, output = examined(models, audio, "forms=torchscript", f"delay_samples={left}")
    assert code == 1
    assert checks["delay, torchscript"].startswith(f"FAIL {(360 - left) // 10}")
    assert re.search(r"set delay_samples=3[56]\d if all agree", output)


@pytest.mark.parametrize("gain", [0.5, 2.0])
def test_a_wrong_level_fails(gain: float, models: Path, audio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda output: output * np.float32(gain))
    code, checks, _ = examined(models, audio, "forms=torchscript")
    assert code == 1
    assert checks["level, torchscript"].startswith("FAIL")


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[Samples], Samples]) -> None:
    restore = Sidon.restore

    def spoilt(self: Sidon, windows: Sequence[Samples]) -> list[Samples]:
        return [change(output) for output in restore(self, windows)]

    monkeypatch.setattr(Sidon, "restore", spoilt)


def test_other_targets_fail(models: Path, audio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda output: np.random.default_rng(0).standard_normal(len(output)).astype(np.float32) * 0.1)
    code, checks, _ = examined(models, audio, "forms=torchscript")
    assert code == 1
    assert checks["fidelity, torchscript"].startswith("FAIL")


def test_output_that_is_not_finite_fails(models: Path, audio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda output: np.full_like(output, np.nan))
    code, checks, _ = examined(models, audio, "forms=torchscript")
    assert code == 1
    assert checks["SIDON, torchscript: runs"].startswith("FAIL")


IN_SCRIPT = "The following operation failed in the TorchScript interpreter.\n"


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (
            RuntimeError(f"{IN_SCRIPT}mat1 and mat2"),
            "another model or PyTorch than expected, or a bug (mat1 and mat2)",
        ),
        (RuntimeError(f"{IN_SCRIPT}CUDA out of memory"), "set batch_seconds lower (CUDA out of memory)"),
        (torch.AcceleratorError("CUDA error: misaligned\nmore"), "the GPU failed: try again (CUDA error: misaligned)"),
    ],
)
def test_a_model_that_raises_fails_and_the_table_stands(
    error: RuntimeError, advice: str, models: Path, audio: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Samples) -> Samples:
        raise error

    spoil(monkeypatch, fail)
    code, checks, output = examined(models, audio, "forms=torchscript")
    assert code == 1
    assert checks["SIDON, torchscript: runs"].startswith("FAIL failed")
    assert f"      → {advice}\n" in output
    assert ("Traceback" in output) == ("a bug" in advice), "which is all that tells where it is"
    assert checks["tokens equal stock SNAC's"].startswith("pass")


def test_on_a_cpu_every_token_is_stock_snacs_and_on_a_gpu_nearly_all(
    models: Path, audio: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_is_another(*given: Any) -> list[Any]:
        codes = encode(*given)
        codes[0][0, 0] ^= 1
        return codes

    monkeypatch.setattr(doctor, "encode", one_is_another)
    _, checks, _ = examined(models, audio, "forms=torchscript")
    assert re.match(r"FAIL [1-9]\d* of", checks["tokens equal stock SNAC's"])
    assert doctor.may_differ(torch.device("cpu"), 10_000) == 0
    assert doctor.may_differ(torch.device("cuda", 0), 10_000) == 100


@pytest.mark.parametrize(
    ("file", "fails"), [("sidon/decoder_cpu.pt", "SIDON, torchscript: files"), ("snac/pytorch_model.bin", "tokens")]
)
@pytest.mark.parametrize("fault", ["changed", "missing"])
def test_a_wrong_hash_or_a_missing_file_fails(
    fault: str, file: str, fails: str, models: Path, audio: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "models"
    shutil.copytree(models, copy)
    pins = (models / "weights.json").read_text().replace(str(models), str(copy))
    (copy / "weights.json").write_text(pins)
    if fault == "missing":
        (copy / file).unlink()
    else:
        with (copy / file).open("r+b") as opened:
            opened.write(b"x")
    code, checks, output = examined(copy, audio, "forms=torchscript")
    assert code == 1
    (found,) = (figure for name, figure in checks.items() if name.startswith(fails))
    assert found.startswith("FAIL not usable")
    assert ("sha256 is" if fault == "changed" else "has no") in output
    if file.startswith("sidon"):  # and nothing that needs it passes
        assert checks["delay, torchscript"].startswith("FAIL not run")
        assert checks["seams, torchscript"].startswith("FAIL not run")
        assert checks["memory"].startswith("FAIL not run")


def spoil_native(
    monkeypatch: pytest.MonkeyPatch, precision: str, change: Callable[[str, torch.Tensor], object]
) -> None:
    """`change` gets the precision in use and what was decoded."""
    init = NativeStandin.__init__

    def spoilt(self: NativeStandin, *given: Any) -> None:
        init(self, *given)
        right = self.decode

        def decode(hidden_BTC: torch.Tensor, frames: list[int]) -> torch.Tensor:
            wav = right(hidden_BTC, frames).clone()
            change(self.precision, wav[:, ::2])
            return wav

        self.decode, self.precision = decode, precision

    monkeypatch.setattr(NativeStandin, "__init__", spoilt)


@pytest.mark.usefixtures("native")
def test_forms_that_disagree_fail(models: Path, audio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_native(monkeypatch, "fp32", lambda _, samples: samples.mul_(1.02))
    code, checks, _ = examined(models, audio)
    assert code == 1
    assert checks["both forms agree"].startswith("FAIL fp32 -40 dB")


@pytest.mark.parametrize(("of", "verdict"), [("bf16", "pass"), ("fp32", "FAIL")])
@pytest.mark.usefixtures("native")
def test_what_bfloat16_loses_hides_no_other_fault(
    of: str, verdict: str, models: Path, audio: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of −49 dB, which bfloat16 alone may have, in that precision only or in float32 too."""
    spoil_native(monkeypatch, "bf16", lambda used, samples: samples.mul_(1.007 if of in (used, "fp32") else 1))
    _, checks, output = examined(models, audio)
    assert re.match(
        rf"{verdict} fp32 -\d+ dB apart, limit -60, bf16 -49 dB apart, limit -40", checks["both forms agree"]
    )
    assert "audio seconds per second, bf16" in output


@pytest.mark.usefixtures("native")
def test_what_fails_in_float32_is_not_asked_of_it_again(
    models: Path, audio: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(used: str, _: torch.Tensor) -> None:
        if used == "fp32":
            raise RuntimeError("CUDA out of memory")

    spoil_native(monkeypatch, "bf16", run_out)
    _, checks, _ = examined(models, audio)
    assert checks["both forms agree"].startswith("FAIL failed")
    assert checks["delay, native"].startswith("pass")


def test_raw_weights_that_nobody_pinned_fail(models: Path, audio: Path) -> None:
    code, checks, _ = examined(models, audio)
    assert code == 1
    assert checks["SIDON, native: files"].startswith("FAIL")
    assert checks["both forms agree"].startswith("FAIL not run")


def test_a_corpus_or_a_process_that_does_not_fit_fails(
    models: Path, audio: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.doctor.granted_memory", lambda: 10**8)
    code, checks, _ = examined(models, audio, "forms=torchscript", "corpus_hours=9000000")
    assert code == 1
    assert checks["disk"].startswith("FAIL")
    assert re.match(r"FAIL .* of 0\.1 GB at batch_seconds=", checks["memory"])
