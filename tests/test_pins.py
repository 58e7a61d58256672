"""Files whose hash nobody knows yet are fetched, shown and not trusted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from codec.weights import PINS, read_pins, resolve
from shards.errors import UserError
from shards.files import file_sha256


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
    """Raw weights are listed with the files that are wanted; their hashes are for whoever has seen them."""
    native = {name: pin for name, pin in read_pins(PINS).items() if pin.get("backend") == "native"}
    assert set(native) == {"sarulab-speech/sidon_raw_weight", "facebook/w2v-bert-2.0"}
    for pin in native.values():
        assert all(digest is None for digest in pin["files"].values())
