"""Data from others runs no code and calls nobody: SECURITY.md, line by line where no other test does it."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from pydantic import ValidationError

from codec.weights import Weights, resolve
from pipeline import sidon
from pipeline.plan import Told
from pipeline.sidon import TorchScript
from pipeline.sidon_decoder import load_decoder
from shards.contract import COARSE_48K, MAX_COARSE, TARGET_RATE, check_sample, coarse_tokens
from shards.errors import ShardError, UserError
from shards.index import compact, load
from shards.storage import StorageError, Url
from shards.writer import ShardWriter
from tests.command_helpers import in_process, refused, rows_of
from tests.helpers import TINY_SNAC, codes_words
from tests.shard_helpers import FINGERPRINT, SHARD, all_problems, some_members, some_row
from tests.sidon_standin import build
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


def test_a_checkpoint_does_not_grow_as_it_is_read(untrained: Path, tmp_path: Path) -> None:
    """Compressed, a thousandth of the bytes would do."""
    path = tmp_path / "packed.pt"
    with zipfile.ZipFile(untrained) as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    with pytest.raises(UserError, match=r"packed\.pt is not a readable checkpoint \(its records are compressed"):
        checkpoint.load(path)


def test_sidon_that_changes_once_it_is_hashed_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "sidon"
    build(folder)
    named, other = folder / "decoder_cpu.pt", folder / "feature_extractor_cpu.pt"

    def resolve_and_swap(*given: Any, **more: Any) -> Weights:
        weights = resolve(*given, **more)
        shutil.copy(other, named)
        return weights

    monkeypatch.setattr(sidon, "resolve", resolve_and_swap)
    with pytest.raises(UserError, match=r"decoder_cpu\.pt changed after its sha256 was checked"):
        TorchScript(str(folder), folder / "weights.json", torch.device("cpu"))


def test_a_segment_is_no_longer_than_one_can_be() -> None:
    """Silence of any length is little FLAC, and all of memory."""
    meta = {"n_coarse": MAX_COARSE + 1, "context_before": 0, "context_after": 0, "n_samples": 1}
    with pytest.raises(ShardError, match=r"704 .* is out of range"):
        check_sample(np.zeros((MAX_COARSE + 1, 7), np.int16), (MAX_COARSE + 1) * COARSE_48K, TARGET_RATE, meta)
    assert coarse_tokens(60) == MAX_COARSE, "what segment_length allows"


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


def test_an_index_names_no_place(tmp_path: Path) -> None:
    """What stands elsewhere is not set aside for damaged."""
    folder, mine = tmp_path / "theirs" / "shards", tmp_path / "mine"
    for place in (folder / "train", mine):
        with ShardWriter(place, 0, FINGERPRINT) as writer:
            writer.add(some_row(0), some_members(0))
    compact(folder, [SHARD, ("../../mine", 0)])
    (mine / "000000.tar").write_bytes(b"mine")
    refused(["verify", f"shards={folder}", "set_aside=true"], "('../../mine', 0) is no shard")
    assert (mine / "000000.tar").read_bytes() == b"mine"


@pytest.mark.parametrize("shard", [("../../outside", 0), ("train/x", 0), ("train", -1)])
def test_a_plan_names_no_place(shard: tuple[str, int]) -> None:
    told: dict[str, Any] = {"settings": {}, "seconds": [1.0], "rows_sha256": ["0"], "listed_sha256": None}
    Told.model_validate({**told, "shards": [("train", 0)]})
    with pytest.raises(ValidationError, match="shards"):
        Told.model_validate({**told, "shards": [shard]})
