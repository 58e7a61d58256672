"""A wrong input or model is one line that names it, exit code 1, and nothing written."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from shards.contract import flatten_codes, npy_bytes
from tests.helpers import TINY_SNAC
from tests.training_helpers import call
from trainer import checkpoint

CODES = np.random.default_rng(0).integers(0, 4096, (3, 7)).astype(np.int16)
GOOD = flatten_codes(CODES)


def npz(array: npt.NDArray[Any]) -> bytes:
    np.savez(buffer := io.BytesIO(), array)
    return buffer.getvalue()


def with_token(token: int) -> bytes:
    changed = GOOD.copy()
    changed[4] = token
    return npy_bytes(changed)


BROKEN = {
    "high.npy": (with_token(4096), r"tokens run from \d+ to 4096"),
    "negative.npy": (with_token(-1), "tokens run from -1 to"),
    "short.npy": (npy_bytes(GOOD[:-1]), "20 tokens are not T \\+ 2T \\+ 4T"),
    "none.npy": (npy_bytes(GOOD[:0]), "0 tokens are not"),
    "wide.npy": (npy_bytes(GOOD.astype(np.int64)), "codes are int64"),
    "levels.npy": (npy_bytes(CODES), r"of shape \(3, 7\)"),
    "text.npy": (b"1 2 3 4 5 6 7\n", "not a plain .npy"),
    "cut.npy": (npy_bytes(GOOD)[:-3], "not a plain .npy"),
    "zip.npy": (npz(GOOD), "not a plain .npy"),
    "text.wav": (b"not audio at all\n", "not readable as audio"),
    "empty.wav": (b"", "empty"),
    "missing.wav": (None, "no such file"),
    "missing.npy": (None, "no such file"),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_a_wrong_input_is_one_line(untrained: Path, tmp_path: Path, name: str) -> None:
    content, reason = BROKEN[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, output = call("decode", f"model={untrained}", f"input={tmp_path / name}")
    assert code == 1
    assert re.fullmatch(f"error: .*{re.escape(str(tmp_path / name))}.*\n", output)
    assert re.search(reason, output)
    assert [path.name for path in tmp_path.iterdir()] == ([name] if content is not None else [])


def test_a_folder_as_input_is_said_to_be_one(untrained: Path, tmp_path: Path) -> None:
    code, output = call("decode", f"model={untrained}", f"input={tmp_path}")
    assert (code, output) == (1, f"error: input={tmp_path}: a folder: name a file\n")


def test_a_wrong_model_is_one_line(untrained: Path, tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"decoder": {}}, tmp_path / "foreign.pt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.npy").write_bytes(npy_bytes(GOOD))
    shutil.copytree(TINY_SNAC, tmp_path / "other")
    assert call("export", f"model={untrained}", f"out={tmp_path / 'export'}")[0] == 0
    weights = tmp_path / "export" / "pytorch_model.bin"
    middle = weights.stat().st_size // 2
    weights.write_bytes(weights.read_bytes()[:middle] + b"damage" + weights.read_bytes()[middle + 6 :])
    (tmp_path / "other" / "config.json").write_text((Path(TINY_SNAC) / "config.json").read_text() + "\n")
    cases = [
        ([f"model={tmp_path / 'missing'}"], "missing: no checkpoint there"),
        ([f"model={tmp_path / 'empty'}"], "empty: no checkpoint there"),
        ([f"model={tmp_path / 'text.pt'}"], "text.pt is not a readable checkpoint"),
        ([f"model={tmp_path / 'foreign.pt'}"], "foreign.pt is not a checkpoint of this trainer"),
        ([f"model={TINY_SNAC}"], "is not a directory made by `just export`"),
        ([f"model={tmp_path / 'export'}"], "is not a directory made by `just export`: crc32 of .* differs"),
        (
            [f"model={untrained}", f"pretrained_model={tmp_path / 'other'}"],
            "belongs to another SNAC than .*config.json is",
        ),
        ([f"model={untrained}", f"pretrained_model={tmp_path / 'empty'}"], "empty has no config.json"),
    ]
    for words, reason in cases:
        for command in (["decode", f"input={tmp_path / 'a.npy'}"], ["export", f"out={tmp_path / 'out'}"]):
            code, output = call(*command, *words)
            assert code == 1, output
            assert re.fullmatch(f"error: .*{reason}.*\n", output)
    assert not (tmp_path / "out").exists()


def test_a_wav_is_not_written_under_another_name(untrained: Path, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(npy_bytes(GOOD))
    code, output = call("decode", f"model={untrained}", f"input={tmp_path / 'a.npy'}", f"out={tmp_path / 'a.mp3'}")
    assert (code, output) == (1, f"error: out={tmp_path / 'a.mp3'}: what is written is a WAV; name it a.wav\n")
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


def test_a_checkpoint_whose_snac_is_gone_names_the_setting(untrained: Path, tmp_path: Path) -> None:
    path = tmp_path / "moved.pt"
    torch.save({**checkpoint.load(untrained), "snac": "was/here"}, path)
    (tmp_path / "a.npy").write_bytes(npy_bytes(GOOD))
    code, output = call("decode", f"model={path}", f"input={tmp_path / 'a.npy'}")
    assert code == 1
    assert output.endswith(f"; pretrained_model= says where the SNAC of {path} lies now\n")


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("config.json", {"vq_strides": [8, 4, 2, 1]}, "is an export of another codec: expected .*found .*8, 4, 2, 1"),
        ("config.json", {"sampling_rate": 44_100}, "is an export of another codec: expected .*found .*44100"),
        ("config.json", {"decoder_rates": [8, 8, 4, 2]}, r"decodes with rates \[8, 8, 4, 2\], expected"),
        ("config.json", {"decoder_dim": 128}, "does not hold the weights of a SNAC: .*size mismatch|Error"),
        ("pytorch_model.bin", 1000, "is not a directory made by `just export`: File is not a zip file"),
        ("pytorch_model.bin", -1, "is not a directory made by `just export`"),
        ("provenance.json", 10, "is not a directory made by `just export`"),
    ],
)
def test_an_export_of_another_codec_or_cut_off_is_one_line(
    untrained: Path, tmp_path: Path, file: str, change: dict[str, Any] | int, reason: str
) -> None:
    (tmp_path / "a.npy").write_bytes(npy_bytes(GOOD))
    out = tmp_path / "export"
    assert call("export", f"model={untrained}", f"out={out}")[0] == 0
    content = (out / file).read_bytes()
    changed = content[:change] if isinstance(change, int) else json.dumps({**json.loads(content), **change}).encode()
    (out / file).write_bytes(changed)
    code, output = call("decode", f"model={out}", f"input={tmp_path / 'a.npy'}")
    assert code == 1, output
    assert re.fullmatch(f"error: .*({reason}).*\n", output), output
    assert not (tmp_path / "a.48k.wav").exists()
