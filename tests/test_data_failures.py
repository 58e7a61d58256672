"""Data and losses that are not as they should be stop a training before they reach its weights, and cost no step."""

from __future__ import annotations

import errno
import multiprocessing
import multiprocessing.connection
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from shards.cache import CacheError
from shards.errors import ShardError, UserError
from shards.storage import StorageError
from shards.stream import Stage, Stream
from tests.helpers import longest_file
from tests.test_saving import at_step
from tests.training_helpers import (
    ADVERSARIAL,
    CPU,
    as_logged,
    assert_same_state,
    largest_difference,
    small_training,
    steps_kept,
    train_settings,
)
from trainer import checkpoint
from trainer.data import ReaderError, training_batches
from trainer.loop import Trainer


def flipped(tar: Path, row: Mapping[str, Any]) -> None:
    whole = bytearray(tar.read_bytes())
    whole[row["offset"] + row["length"] // 2] ^= 1
    tar.write_bytes(whole)


def replaced(tar: Path, row: Mapping[str, Any]) -> None:
    """By a shard that another run wrote under the same name."""
    other = tar.with_name("other")
    other.write_bytes(tar.read_bytes()[:512] + tar.read_bytes())
    other.replace(tar)


def removed(tar: Path, row: Mapping[str, Any]) -> None:
    tar.unlink()


@pytest.mark.parametrize(("damage", "workers"), [(flipped, 0), (replaced, 1), (removed, 1)])
def test_a_shard_that_changes_under_way_stops_before_the_step_and_is_named(
    damage: Any, workers: int, work: Path, tmp_path: Path
) -> None:
    shutil.copytree(work / "shards", tmp_path / "shards")
    run = tmp_path / "run"
    small_training(tmp_path, run, max_steps=2, eval_every=1)
    begun = Trainer(train_settings(tmp_path, run, max_steps=3, num_workers=workers, eval_every=1), CPU)
    place, index = begun.stream.batch(2)[0], begun.corpus.training[0]
    row = index.table.slice(place.sample, 1).to_pylist()[0]
    tar = tmp_path / "shards" / "train" / f"{row['shard']:06d}.tar"
    good = tar.read_bytes()
    damage(tar, row)
    with pytest.raises(ShardError) as caught:
        begun.run()
    assert str(caught.value).startswith(f"{tar}: {row['key']}: ")
    assert (begun.step, steps_kept(run)) == (2, [1, 2])
    tar.write_bytes(good)
    mended = small_training(tmp_path, run, max_steps=3, eval_every=1)
    assert_same_state(mended, small_training(work, tmp_path / "whole", max_steps=3, eval_every=1))


@pytest.mark.parametrize("error", [ShardError, StorageError, CacheError])
@pytest.mark.parametrize("where", ["a batch", "a validation"])
def test_data_that_cannot_be_read_costs_no_step(
    where: str, error: Any, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch after step 3, or the validation there."""
    run, training = tmp_path / "run", {"checkpoint_every": 99, "eval_every": 99, "max_steps": 5}

    def fail(*_: Any) -> Any:
        raise error("it is away")

    if where == "a batch":
        at_step(2, lambda: monkeypatch.setattr("shards.stream.read_sample", fail), monkeypatch)
    else:
        training["eval_every"] = 3
        at_step(2, lambda: monkeypatch.setattr("trainer.loop.validate", fail), monkeypatch)
    with pytest.raises(error, match="it is away"):
        small_training(work, run, **training)
    assert steps_kept(run) == [3]
    monkeypatch.undo()
    whole = tmp_path / "whole"
    assert_same_state(small_training(work, run, **training), small_training(work, whole, **training))
    assert as_logged(run) == as_logged(whole)


def test_a_process_that_reads_ahead_and_dies_amid_a_step_costs_none(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does for which memory is too short: what it had read is trained on, then it is missed."""
    run, training = tmp_path / "run", {"checkpoint_every": 99, "eval_every": 99, "max_steps": 8, "num_workers": 1}

    others = multiprocessing.active_children()  # of tests before

    def kill() -> None:
        (worker,) = (child for child in multiprocessing.active_children() if child not in others)
        worker.kill()
        multiprocessing.connection.wait([worker.sentinel])

    at_step(2, kill, monkeypatch)
    with pytest.raises(UserError, match="a process that reads ahead died"):
        small_training(work, run, **training)
    assert 3 <= checkpoint.newest_step(run) < 8
    monkeypatch.undo()
    whole = tmp_path / "whole"
    assert_same_state(small_training(work, run, **training), small_training(work, whole, **training))
    assert as_logged(run) == as_logged(whole)


def test_where_shared_memory_is_full_no_batch_is_waited_for(work: Path, tmp_path: Path) -> None:
    training = Trainer(train_settings(work, tmp_path / "run"), CPU)
    with longest_file(100), pytest.raises(ReaderError, match=r"no shared memory .*: give /dev/shm more room"):
        next(training_batches(training.corpus.training, training.stream, range(6), 1, 0, 1))


def test_so_does_one_that_dies_while_its_batch_is_taken_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """There PyTorch speaks of its own thread."""

    def ended(_: Any) -> Any:
        raise RuntimeError("Pin memory thread exited unexpectedly")

    monkeypatch.setattr("trainer.data.DataLoader.__iter__", ended)
    stream = Stream((), (), (Stage(0, 1, 1),), 0)
    with pytest.raises(ReaderError, match="a process that reads ahead died"):
        next(training_batches((), stream, range(1), 1, 0, 1, for_gpu=True))


def test_data_that_cannot_be_read_is_said_where_nothing_can_be_saved(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fail(*_: Any) -> Any:
        monkeypatch.setattr(checkpoint, "save", full)
        raise ShardError("it is away")

    at_step(2, lambda: monkeypatch.setattr("shards.stream.read_sample", fail), monkeypatch)
    with pytest.raises(ShardError, match="it is away"):
        small_training(work, tmp_path / "run", checkpoint_every=99, eval_every=99)


def test_a_loss_that_is_not_finite_stops_before_either_optimizer(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The discriminators meet the bad target first."""
    training = Trainer(train_settings(work, tmp_path / "run", **ADVERSARIAL, eval_every=99), CPU)
    before = {name: value.clone() for name, value in training.learner.decoder.state_dict().items()}
    nets = training.learner.adversary
    assert nets
    begun = {name: value.clone() for name, value in nets.discriminators.state_dict().items()}
    monkeypatch.setattr("trainer.adversary.PEAK", float("nan"))
    with pytest.raises(UserError, match=r"step 0: \{'discriminator': nan.*stopped before the optimizer step\. Keys"):
        training.run()
    assert largest_difference(training.learner.decoder.state_dict(), before) == 0
    assert largest_difference(nets.discriminators.state_dict(), begun) == 0


# The running mean of weights, and beginning from one
