"""Files whose hash nobody knows yet are fetched, shown and not trusted; `just prefetch` verifies what is listed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from codec.weights import PINS, read_pins, resolve
from shards.errors import UserError
from shards.files import file_sha256
from tests.command_helpers import in_process, refused


def test_a_file_without_a_known_hash_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"weights")
    digest = file_sha256(tmp_path / "model.bin")
    pins = tmp_path / "pins.json"
    pins.write_text(json.dumps({str(tmp_path): {"revision": None, "files": {"model.bin": None}}}))
    with pytest.raises(
        UserError, match=rf"sha256 is {digest}, but .*pins\.json knows none.*write it there for .*model\.bin"
    ):
        resolve(str(tmp_path), ("model.bin",), pins)
    pins.write_text(pins.read_text().replace("null}}", f'"{digest}"}}}}'))
    assert resolve(str(tmp_path), ("model.bin",), pins, must_be_pinned=True).sha256 == {"model.bin": digest}


def test_no_hash_is_invented() -> None:
    """SIDON's raw weights are listed with the files that are wanted; their hashes are for whoever has seen them."""
    native = {name: pin["files"] for name, pin in read_pins(PINS).items() if pin.get("backend") == "native"}
    assert set(native) == {"sarulab-speech/sidon_raw_weight", "facebook/w2v-bert-2.0"}
    assert set(native["sarulab-speech/sidon_raw_weight"].values()) == {None}
    assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in native["facebook/w2v-bert-2.0"].values())


def test_prefetch_tries_every_file_of_the_chosen_form(tmp_path: Path) -> None:
    pins: dict[str, Any] = {}
    for name, about in (("snac", {}), ("pair", {"backend": "torchscript"}), ("raw", {"backend": "native"})):
        (tmp_path / name).mkdir()
        for file in ("a.bin", "b.bin"):
            (tmp_path / name / file).write_text(f"{name} {file}")
        files = {file: file_sha256(tmp_path / name / file) for file in ("a.bin", "b.bin")}
        pins[str(tmp_path / name)] = {**about, "revision": None, "files": files}
    (tmp_path / "pins.json").write_text(json.dumps(pins))
    words = ["prefetch", f"weights={tmp_path / 'pins.json'}"]
    for form, chosen in (("torchscript", "pair"), ("native", "raw")):
        result = in_process([*words, f"sidon_backend={form}"])
        assert result.exit_code == 0
        said = [line.split()[:3] for line in result.stdout.splitlines()]
        assert said == [
            ["ok", str(tmp_path / name / file), file_sha256(tmp_path / name / file)[:12]]
            for name in ("snac", chosen)
            for file in ("a.bin", "b.bin")
        ]
    pins[str(tmp_path / "snac")]["files"]["b.bin"] = "0" * 64
    (tmp_path / "pins.json").write_text(json.dumps(pins))
    (tmp_path / "pair" / "a.bin").unlink()
    result = in_process([*words, "sidon_backend=torchscript"])
    assert result.exit_code == 1
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["ok", "FAIL", "FAIL", "ok"]
    assert result.stderr.splitlines()[-1] == "error: 2 of 4 files could not be verified"


def test_without_a_network_prefetch_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def offline(name: str, file: str, **_: Any) -> str:
        asked.append(file)
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    refused(["prefetch"], "cannot be fetched (ConnectionError: no route): see that the hub can be reached, ")
    assert asked == ["config.json"]
