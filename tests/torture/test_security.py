"""Data from others runs no code and calls nobody: SECURITY.md, line by line where no other test does it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from pydantic import ValidationError

from pipeline.plan import Told
from pipeline.sidon_decoder import load_decoder
from shards.errors import ShardError, UserError
from shards.index import compact, load
from shards.storage import StorageError, Url
from shards.writer import ShardWriter
from tests.command_helpers import codes_words, in_process, refused, rows_of
from tests.helpers import TINY_SNAC
from tests.shard_helpers import FINGERPRINT, SHARD, all_problems, some_members, some_row
from trainer import checkpoint


class Code:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def saved(folder: Path, name: str) -> tuple[Path, Path]:
    """A file of torch that holds code, and what it would make."""
    folder.mkdir(exist_ok=True)
    torch.save({"decoder": Code(folder / "made"), "snac": "x", "snac_sha256": {}}, folder / name)
    return folder / name, folder / "made"


def test_the_code_would_run(tmp_path: Path) -> None:
    path, made = saved(tmp_path, "code.pt")
    torch.load(path, weights_only=False)
    assert made.is_dir()


def test_checkpoints_with_code_are_refused(tmp_path: Path) -> None:
    path, made = saved(tmp_path, "code.pt")
    with pytest.raises(UserError, match=r"code\.pt is not a readable checkpoint"):
        checkpoint.load(path)
    with pytest.raises(UserError, match=r"code\.pt is not a state dict of plain tensors"):
        load_decoder(path)
    assert not made.exists()


def test_a_codec_with_code_is_refused(recordings: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TINY_SNAC, tmp_path / "snac"))
    _, made = saved(folder, "pytorch_model.bin")
    refused(codes_words(recordings, tmp_path / "work", f"pretrained_model={folder}"), str(folder))
    assert not made.exists()


def test_a_manifest_names_files_and_nothing_comes_of_those_that_are_no_recordings(tmp_path: Path) -> None:
    voice = 0.1 * np.random.default_rng(0).standard_normal(48_000)
    for name in ("a", "b"):
        soundfile.write(tmp_path / f"{name}.wav", voice, 48_000)
    rows = ["/etc/passwd,x", f"{tmp_path / 'a.wav'},x", f"{tmp_path / 'b.wav'},y", "../../../../etc/passwd,y"]
    manifest = tmp_path / "list.csv"
    manifest.write_text("\n".join(["path,speaker", *rows]) + "\n")
    work = tmp_path / "work"
    assert in_process(codes_words(manifest, work, "max_failed_fraction=1")).exit_code == 0
    reasons = {Path(name).name: {row["reason"] for row in found} for name, found in rows_of(work / "codes").items()}
    assert reasons["a.wav"] == reasons["b.wav"] == {None}
    (reason,) = reasons["passwd"]
    assert reason.startswith(("not readable as audio", "no such file"))


@pytest.mark.parametrize(
    "url", ["http://169.254.169.254/latest", "file:///etc/passwd", "github://a:b@c/d", "ssh://h/x"]
)
def test_only_storage_is_called(url: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is none of s3, gs, hf"):
        Url(url).exists()
    manifest = tmp_path / "list.csv"
    manifest.write_text(f"path,speaker\n{url}.wav,x\n")
    refused(codes_words(manifest, tmp_path / "work"), "is none of s3, gs, hf")


@pytest.mark.parametrize("key", ["../../x", "/tmp/x", "000000-00000/../x", "a.b", ""])
def test_a_key_names_no_place(key: str, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "train", 0, FINGERPRINT) as writer:
        writer.add({**some_row(0), "key": key}, some_members(0))
    compact(tmp_path, [SHARD])
    with pytest.raises(ShardError, match="is no key of a sample"):
        load(tmp_path, "train")
    assert any("is no key of a sample" in problem for problem in all_problems(tmp_path))


@pytest.mark.parametrize("shard", [("../../outside", 0), ("train/x", 0), ("train", -1)])
def test_a_plan_names_no_place(shard: tuple[str, int]) -> None:
    told: dict[str, Any] = {"settings": {}, "seconds": [1.0], "rows_sha256": ["0"], "listed_sha256": None}
    Told.model_validate({**told, "shards": [("train", 0)]})
    with pytest.raises(ValidationError, match="shards"):
        Told.model_validate({**told, "shards": [shard]})
