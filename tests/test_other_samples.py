"""A run goes on with samples that came, or that were lost, where that is asked for; what was before stays written."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from shards.errors import UserError
from shards.index import Index, compact, load, shard_list
from shards.order import Order
from tests.training_helpers import CPU, assert_same_state, last_state, small_training, train_settings
from trainer import checkpoint
from trainer.loop import Trainer


@pytest.fixture(scope="module")
def finished(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps. Read only."""
    run = tmp_path_factory.mktemp("finished") / "run"
    small_training(work, run)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def without_first_shard(work: Path, folder: Path) -> Path:
    """The same shards but for the first of training."""
    shutil.copytree(work / "shards", folder / "shards")
    shards = shard_list(folder / "shards")
    shards.remove(next(place for place in shards if place[0] == "train"))
    compact(folder / "shards", shards)
    return folder


def indexes(folder: Path) -> tuple[Index, Index]:
    train, validation = (load(folder / "shards", split) for split in ("train", "validation"))
    return train, validation


def test_samples_are_their_keys_and_lengths(work: Path) -> None:
    """Crops follow from the lengths, which another plan gives to the same keys."""
    index = indexes(work)[0]
    for name, other in (("key", "000000-99999"), ("n_coarse", 1), ("n_samples", 1)):
        rows = index.table.to_pylist()
        rows[-1][name] = other
        table = pa.Table.from_pylist(rows, index.table.schema)
        assert replace(index, table=table).samples_sha256 != index.samples_sha256, name


def test_other_samples_are_refused_with_the_way_on(work: Path, run: Path, tmp_path: Path) -> None:
    less = without_first_shard(work, tmp_path / "less")
    with pytest.raises(UserError, match=r"samples is .* or with resume=other_samples go on with what shards hold now$"):
        Trainer(train_settings(less, run), CPU)
    with pytest.raises(UserError, match=r"seed is 0, now 1; take another run=$"):
        Trainer(train_settings(less, run, resume="other_samples", seed=1), CPU)


def test_targets_by_another_teacher_are_other_samples(work: Path, run: Path) -> None:
    """Of the same plan, so that keys and lengths are the same."""
    path = checkpoint.step_path(run, 6)
    state = checkpoint.load(path)
    checkpoint.save(path, {**state, "data": {**state["data"], "teacher": "sidon: another"}})
    with pytest.raises(UserError, match=r"teacher is sidon: another, now recording; .* or with resume=other_samples"):
        Trainer(train_settings(work, run), CPU)
    training = Trainer(train_settings(work, run, resume="other_samples"), CPU)
    assert training.data["former_samples"]["until step 6"]["teacher"] == "sidon: another"
    assert math.isinf(training.best), "what validated on other targets is not compared"


def test_a_run_goes_on_with_other_samples(
    work: Path, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    less = without_first_shard(work, tmp_path / "less")
    before, after = indexes(work)[0], indexes(less)[0]
    best = last_state(run)["best"]
    training = Trainer(train_settings(less, run, resume="other_samples", max_steps=8), CPU)
    assert training.best == best, "validation is the same"
    order = Order(after.counts, 0, 2)
    assert [place.sample for place in training.stream.batch(6)] == [order.sample_at(position) for position in (12, 13)]
    assert training.run()
    assert "goes on from step 6 with other samples than until then" in capfd.readouterr().out
    whole = last_state(run)
    assert whole["step"] == 8
    assert whole["data"]["samples_sha256"] == after.samples_sha256
    assert whole["data"]["former_samples"] == {
        "until step 6": {"samples": before.samples_sha256, "teacher": "recording"}
    }

    checkpoint.remove(checkpoint.step_path(run, 8))  # killed before it was saved
    again = small_training(less, run, max_steps=8, resume="other_samples")
    assert_same_state(without_words(again), without_words(whole))
    capfd.readouterr()
    small_training(less, run, max_steps=9)  # from now on as any other run
    assert last_state(run)["data"] == whole["data"]
    assert "with other samples" not in capfd.readouterr().out


def test_a_run_goes_on_with_another_folder_and_weights(work: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "shards", tmp_path / "more")
    mixed = {"shards": [str(work / "shards"), str(tmp_path / "more")], "shard_weights": [2, 1]}
    with pytest.raises(UserError, match=r"shard_weights is None, now \[2, 1\]; samples is .* resume=other_samples"):
        Trainer(train_settings(work, run, **mixed), CPU)
    assert small_training(work, run, **mixed, resume="other_samples", max_steps=7)["step"] == 7
    assert small_training(work, run, **mixed, max_steps=8)["settings"]["shard_weights"] == [2, 1]
    assert small_training(work, run, resume="other_samples", max_steps=9)["settings"]["shard_weights"] is None


def without_words(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "settings": {}, "best": 0.0, "validations_since_best": 0}


def test_the_same_samples_are_resumed_as_ever(work: Path, run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    auto, others = (
        small_training(work, run, max_steps=8),
        small_training(work, other, max_steps=8, resume="other_samples"),
    )
    assert_same_state(without_words(others), without_words(auto))
    assert "former_samples" not in others["data"]


def test_the_best_by_other_voices_is_not_compared(work: Path, run: Path) -> None:
    path = checkpoint.step_path(run, 6)
    state = checkpoint.load(path)
    assert state["data"]["validation_sha256"] == indexes(work)[1].samples_sha256
    checkpoint.save(path, {**state, "best": 0.0, "data": {**state["data"], "validation_sha256": "of others"}})
    resumed = small_training(work, run, max_steps=7)
    new = checkpoint.load(checkpoint.folder(run) / checkpoint.BEST)
    assert new["step"] == 7
    assert resumed["best"] == new["validation"][resumed["settings"]["best_metric"]]
    assert len(list(checkpoint.folder(run).glob("former_best_*.pt"))) == 1
