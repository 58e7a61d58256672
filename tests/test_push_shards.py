"""Shards reach the hub complete or not at all: the index goes last, and a push that failed goes on."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import webdataset
from huggingface_hub import DatasetCard

from pipeline import push
from shards.contract import tar_path
from shards.files import file_sha256, write_whole
from shards.index import compact, read_sums, shard_list, write_sums
from shards.writer import read_metadata, read_table, write_table
from tests.command_helpers import in_process, refused
from tests.hub_server import Hub, Repository

FILES = """\
configs:
- config_name: default
  data_files:
  - split: train
    path: train/*.tar
  - split: validation
    path: validation/*.tar
"""


REPO = "datasets/me/corpus"

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # the client's own


@pytest.fixture(autouse=True)
def small_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push, "COMMIT_FILES", 3)


def held(hub: Hub) -> dict[str, bytes]:
    return hub.repositories[REPO].files("main")


def commits(hub: Hub) -> list[list[str]]:
    """The files that each one brought."""
    pairs = pairwise(hub.repositories[REPO].commits)
    return [[name for name in after if after[name] is not before.get(name)] for before, after in pairs]


def words(shards: Path, *more: str) -> list[str]:
    return ["push-shards", f"shards={shards}", "repo=me/corpus", *more]


def test_everything_arrives_and_the_index_last(hub: Hub, shards: Path) -> None:
    assert in_process(words(shards)).exit_code == 0
    names = [f"{split}/{shard:06d}.{kind}" for split, shard in shard_list(shards) for kind in ("tar", "parquet")]
    assert held(hub).keys() == {*names, "index.parquet", "SHA256SUMS", "README.md"}
    assert all(held(hub)[name] == (shards / name).read_bytes() for name in [*names, "index.parquet"])
    assert commits(hub)[-1] == ["index.parquet", "SHA256SUMS", "README.md"]
    assert [name for commit in commits(hub)[:-1] for name in commit] == names
    assert hub.repositories[REPO].private
    card = held(hub)["README.md"].decode()
    assert r"codes by: stand-in or custom weights snac\_tiny\_24khz" in card
    assert "targets by: recording" in card
    assert "| validation |" in card


def test_an_index_that_was_written_meanwhile_waits_for_its_shards(
    hub: Hub, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `just shard-targets` after extend=true."""
    whole, later = shard_list(shards), "{}/{:06d}".format(*shard_list(shards)[-1])
    files = [f"{later}.tar", f"{later}.parquet", "index.parquet", "SHA256SUMS"]
    kept = {name: (shards / name).read_bytes() for name in files}
    for name in files[:2]:
        (shards / name).unlink()
    compact(shards, whole[:-1])

    upload = push._upload

    def and_meanwhile(*those: Any) -> None:
        for name, data in kept.items():
            write_whole(shards / name, data)
        upload(*those)

    monkeypatch.setattr(push, "_upload", and_meanwhile)
    refused(words(shards), "its index was written anew meanwhile: the same command sends the rest")
    assert "index.parquet" not in held(hub)
    assert in_process(words(shards)).exit_code == 0
    assert {name: held(hub)[name] for name in files} == kept


def test_sums_that_are_written_while_the_index_is_sent_do_not_go_with_it(hub: Hub, shards: Path) -> None:
    before, index = (shards / "SHA256SUMS").read_bytes(), file_sha256(shards / "index.parquet")

    def meanwhile(method: str, path: str) -> None:
        if path == f"/stored/{index}":
            write_sums(shards, {"index.parquet": 64 * "0"})

    hub.fault = meanwhile
    assert in_process(words(shards)).exit_code == 0
    assert held(hub)["SHA256SUMS"] == before


@pytest.mark.parametrize("fail_at", [0, 1, 2])
def test_a_push_that_fails_goes_on(fail_at: int, hub: Hub, shards: Path) -> None:
    answers = iter([*[None] * fail_at, 500])
    hub.fault = lambda method, path: next(answers, None) if "/commit/" in path else None
    refused(
        words(shards), "; see that the hub can be reached and that you are signed in (`hf auth login`). Readers see"
    )
    assert "index.parquet" not in held(hub)
    sent = [name for commit in commits(hub) for name in commit]
    assert in_process(words(shards)).exit_code == 0
    again = [name for commit in commits(hub) for name in commit]
    assert len(again) == len(set(again)) > len(sent), "nothing is sent twice"
    assert "index.parquet" in held(hub)


def test_nothing_goes_to_a_public_repository_unless_it_may(hub: Hub, shards: Path) -> None:
    hub.repositories[REPO] = Repository(private=False)
    refused(words(shards), "me/corpus exists and is public: agree to that with private=false")
    assert not commits(hub)
    assert in_process(words(shards, "private=false")).exit_code == 0
    assert "index.parquet" in held(hub)


def test_the_card_says_which_files_are_which_split(hub: Hub, shards: Path) -> None:
    """Without it, stock `datasets` takes the sidecars for the data: no codes and no audio."""
    assert in_process(words(shards)).exit_code == 0
    _, front, _ = held(hub)["README.md"].decode().split("---\n")
    assert front.endswith(FILES)
    assert "hf download me/corpus --repo-type dataset" in held(hub)["README.md"].decode()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # WebDataset leaves closing to the collector
def test_the_card_says_what_a_sample_has(hub: Hub, shards: Path) -> None:
    """Without it, stock `datasets` fails where the first tar of a split holds no sample."""
    assert in_process(words(shards)).exit_code == 0
    card = held(hub)["README.md"].decode()
    told = {field.pop("name"): field for field in DatasetCard(card).data.to_dict()["dataset_info"]["features"]}
    (split, shard), *_ = shard_list(shards)
    sample = next(iter(webdataset.WebDataset(str(tar_path(shards, split, shard)), shardshuffle=False).decode()))
    assert told.keys() == sample.keys() - {"__local_path__"}
    assert told["codes.npy"] == {"sequence": str(sample["codes.npy"].dtype)}
    assert told["target.flac"] == {"audio": {"sampling_rate": sample["json"]["sampling_rate"]}}
    kinds = {"int64": int, "float64": float, "string": str}
    of_json = {field["name"]: kinds[field["dtype"]] for field in told["json"]["struct"]}
    assert of_json == {name: type(value) for name, value in sample["json"].items()}
    assert told["__key__"] == told["__url__"] == {"dtype": "string"}


def test_names_in_the_card_are_text(hub: Hub, shards: Path) -> None:
    index = shards / "index.parquet"
    about = read_metadata(index)
    about["fingerprint"]["snac"] = "a\n<img src=x> [b](c)\x1b[2J"
    write_table(index, read_table(index), about)
    write_sums(shards, {**read_sums(shards), "index.parquet": file_sha256(index)})
    assert "\x1b" not in in_process(words(shards, "dry_run=true")).output
    assert in_process(words(shards)).exit_code == 0
    assert r"- codes by: a\\n\<img src=x\> \[b\](c)\\x1b\[2J" in held(hub)["README.md"].decode().splitlines()


def test_a_dry_run_sends_nothing(hub: Hub, shards: Path) -> None:
    result = in_process(words(shards, "dry_run=true"))
    assert result.exit_code == 0
    assert not hub.asked
    for name in ("train/000000.tar", "index.parquet", "README.md", "would go to me/corpus"):
        assert name in result.output


@pytest.mark.parametrize("name", ["train/000000.tar", "train/000000.parquet"])
def test_others_shards_are_not_overwritten(name: str, hub: Hub, shards: Path) -> None:
    hub.repositories[REPO] = Repository(private=True, commits=[{name: b"another run's"}])
    refused(words(shards), f"me/corpus holds another {name}: shards are never overwritten")
    assert not commits(hub)


def test_a_card_that_was_edited_stays(hub: Hub, shards: Path) -> None:
    hub.repositories[REPO] = Repository(private=True, commits=[{"README.md": b"The recordings are CC0."}])
    result = in_process(words(shards))
    assert "me/corpus keeps its README.md" in result.output
    assert held(hub)["README.md"] == b"The recordings are CC0."
    assert commits(hub)[-1] == ["index.parquet", "SHA256SUMS"]


def test_unfinished_or_damaged_shards_stay_here(hub: Hub, shards: Path) -> None:
    tar = shards / "train" / "000000.tar"
    tar.write_bytes(tar.read_bytes()[:-1])
    refused(words(shards), "000000.tar is not what its sidecar says")
    shutil.copy(tar, shards / "train" / "000077.tar")
    refused(words(shards), "not in the index")
    (shards / "index.parquet").unlink()
    refused(words(shards), "run `just shard-targets` to its end")
    assert not hub.asked


@pytest.mark.parametrize("name", ["train/000001.tar", "train/000001.parquet"])
def test_damage_of_the_right_size_stays_here(name: str, hub: Hub, shards: Path) -> None:
    data = bytearray((shards / name).read_bytes())
    data[600] ^= 1
    (shards / name).write_bytes(data)
    refused(words(shards), f"{name} is not what SHA256SUMS says")
    assert "index.parquet" not in held(hub)
    assert name not in held(hub)


def test_more_files_than_the_hub_takes_are_refused_at_once(
    hub: Hub, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push, "MAX_FILES_IN_A_FOLDER", 5)
    for more in ([], ["dry_run=true"]):
        refused(words(shards, *more), "train holds 6 files, and the hub takes 5 in a folder")
    assert not hub.asked
