"""Which weights are kept as the best, and when training ends for want of better ones."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from shards.errors import UserError
from tests.training_helpers import (
    ADVERSARIAL,
    CPU,
    as_logged,
    assert_same_state,
    call,
    largest_difference,
    last_state,
    small_training,
    steps_kept,
    train_settings,
    train_words,
)
from trainer import checkpoint, status
from trainer.loop import Trainer


def scripted(values: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation finds these losses one after the other, whatever training does."""
    following = iter(values)
    monkeypatch.setattr("trainer.loop.validate", lambda *_: {"loss": next(following), "si_sdr_lf_db": 0.0})


@pytest.mark.parametrize(("values", "said"), [([1, 2, 3], True), ([3, 2, 1], False)])
def test_a_best_that_is_the_beginning_is_said(
    values: list[float], said: bool, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(values, monkeypatch)
    small_training(work, tmp_path, max_steps=2, eval_every=1)
    log = (tmp_path / "training.log").read_text()
    assert ("warning: best.pt is what training began with: no validation had a better loss" in log) == said
    assert ("step_000000002.pt too" in log) == said


def test_the_best_few_are_kept(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted([9, 3, 5, 1, 7, 2, 8], monkeypatch)
    run = tmp_path / "run"
    small_training(work, run, eval_every=1, keep_best=3, ema_decay=0.5)
    kept = sorted(path.name for path in checkpoint.folder(run).glob("best*.pt"))
    assert kept == ["best.pt", "best_000000001.pt", "best_000000003.pt", "best_000000005.pt"]
    best, third = (checkpoint.load(checkpoint.folder(run) / name) for name in ("best.pt", "best_000000003.pt"))
    assert largest_difference(best["decoder"], third["decoder"]) == 0
    assert best["validation"]["loss"] == 1


def test_the_best_of_later_steps_is_kept_where_training_goes_back(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/training.md advises where weights burst."""
    scripted([9, 5, 1, 2], monkeypatch)
    run, often = tmp_path / "run", {"eval_every": 1, "checkpoint_every": 1, "max_steps": 2}
    small_training(work, run, **often)
    best = checkpoint.folder(run) / checkpoint.BEST
    whole = checkpoint.load(best)
    checkpoint.remove(checkpoint.step_path(run, 2))
    for _ in range(2):  # the second time it stands
        assert Trainer(train_settings(work, run, **often), CPU).step == 1
        (former,) = checkpoint.folder(run).glob("former_best_000000002_*.pt")
    assert checkpoint.load(best)["validation"]["loss"] == 1, "until there is another"
    assert f"goes on from step 1; best.pt, of step 2, stays as {former.name}" in (run / "training.log").read_text()
    small_training(work, run, **often, learning_rate=1e-5)
    assert checkpoint.load(best)["validation"]["loss"] == 2
    assert_same_state(checkpoint.load(former), whole)
    assert json.loads(former.with_suffix(".json").read_text())["validation"]["loss"] == 1


def test_a_best_without_checkpoints_is_not_trained_over(work: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    small_training(work, run, eval_every=1, checkpoint_every=99, max_steps=2, best_metric="lsd")
    assert steps_kept(run) == [1, 2], "no best.pt of a later step without a checkpoint"
    best, lines = checkpoint.folder(run) / checkpoint.BEST, as_logged(run)
    step = checkpoint.load(best)["step"]
    assert step > 0
    for path in checkpoint.folder(run).glob("step_*"):
        path.unlink()
    assert status._state(run) == f"not running here, no checkpoint to go on from, best.pt is of step {step}"
    code, output = call("train", *train_words(work, run))
    assert code == 1
    assert f"{best} is of step {step}, but there is no checkpoint to go on from: take another run=" in output
    assert output.count("\n") == 1
    assert as_logged(run) == lines
    begun = Trainer(train_settings(work, tmp_path / "other", init_from=str(best)), CPU)
    assert largest_difference(begun.learner.decoder.state_dict(), checkpoint.load(best)["decoder"]) == 0
    best.unlink()
    assert Trainer(train_settings(work, run), CPU).step == 0


def test_patience(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two validations without a new best, of which one came before an interruption."""
    scripted([9, 3, 4, 5, 6, 1], monkeypatch)
    run = tmp_path / "run"
    small_training(work, run, eval_every=1, max_steps=2, patience=2)
    assert last_state(run)["validations_since_best"] == 1
    stopped = small_training(work, run, eval_every=1, max_steps=50, patience=2)
    assert stopped["step"] == 3
    assert "stopped at step 3: 2 validations without a new best" in (run / "training.log").read_text()
    assert status._state(run) == "ended at step 3: 2 validations (patience) without a new best"
    assert small_training(work, run, eval_every=1, max_steps=50, patience=2)["step"] == 3, "it has ended"
    assert small_training(work, run, eval_every=1, max_steps=4, patience=3)["step"] == 4, "unless it may wait longer"


def test_a_best_metric_without_a_value_is_refused_at_once(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted([math.nan], monkeypatch)
    with pytest.raises(UserError, match="best_metric=loss has no value on these validation crops"):
        small_training(work, tmp_path / "run", best_metric="loss")
    (line,) = as_logged(tmp_path / "run")
    assert line["kind"] == "validation"
    assert line["loss"] is None
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_patience_begins_when_the_decoder_learns(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted([1, 2, 3, 4, 5, 6, 7, 8], monkeypatch)
    recipe = {
        **ADVERSARIAL,
        "discriminator_start": 3,
        "phase1_steps": 0,
        "eval_every": 1,
        "max_steps": 7,
        "patience": 2,
    }
    assert small_training(work, tmp_path / "run", **recipe)["step"] == 5


def test_a_best_that_was_taken_away_has_a_successor(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where only the newest checkpoint was copied to another machine."""
    scripted([9, 1, 3, 5, 4, 6], monkeypatch)
    run = tmp_path / "run"
    small_training(work, run, eval_every=1, checkpoint_every=1, max_steps=2)
    checkpoint.remove(checkpoint.folder(run) / checkpoint.BEST)
    assert small_training(work, run, eval_every=1, max_steps=4)["best"] == 4
    assert checkpoint.load(checkpoint.folder(run) / checkpoint.BEST)["validation"]["loss"] == 4


def test_the_best_few_by_another_judge_are_not_compared(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted([9, 1, 2, 8, 7, 6], monkeypatch)
    run, few = tmp_path / "run", {"eval_every": 1, "checkpoint_every": 1, "keep_best": 2}
    small_training(work, run, **few, max_steps=2)
    small_training(work, run, **few, max_steps=4, eval_samples=1)
    kept = {path.name: checkpoint.load(path)["validation"]["loss"] for path in checkpoint.folder(run).glob("best*.pt")}
    assert kept == {"best.pt": 6, "best_000000004.pt": 6, "best_000000003.pt": 7}
    former = [checkpoint.load(path)["validation"]["loss"] for path in checkpoint.folder(run).glob("former_*.pt")]
    assert set(former) == {1, 2}
