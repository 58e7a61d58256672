"""Processes of one training, perhaps on several machines, begin alike or not at all."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from shards.errors import UserError
from tests.test_resume import finished
from tests.training_helpers import ADVERSARIAL, CPU, train_settings
from trainer import checkpoint
from trainer.distributed import Process
from trainer.loop import Trainer
from trainer.resuming import check_that_all_begin_alike

__all__ = ["finished"]


@dataclass(frozen=True)
class OneOfTwo(Process):
    """The other has these numbers, call by call."""

    others: list[list[int]]

    def all_have(self, numbers: list[int]) -> list[bool]:
        return [a == b for a, b in zip(numbers, self.others.pop(0), strict=True)]


@dataclass(frozen=True)
class Noting(Process):
    noted: list[list[int]] = field(default_factory=list)

    def all_have(self, numbers: list[int]) -> list[bool]:
        self.noted.append(numbers)
        return [True] * len(numbers)


def test_processes_begin_alike(work: Path, finished: Path, tmp_path: Path) -> None:
    """Against a machine that found an older checkpoint, no best.pt or other weights, or was given other settings."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.copytree(finished, tmp_path / "no best")
    checkpoint.remove(tmp_path / "no best" / "checkpoints" / checkpoint.BEST)
    trainer = Trainer(train_settings(work, finished), CPU)
    checkpoint.step_path(tmp_path / "run", 6).unlink()

    def compared(difference: str, run: Path = finished, weight: float = 0, **changes: Any) -> None:
        other = Trainer(train_settings(work, run, **changes), CPU)
        with torch.no_grad():
            other.learner.decoder.model[0].bias[0] += weight
        noting = Noting(0, 2, torch.device("cpu"))
        check_that_all_begin_alike(noting, other.settings, other.begins_with())
        process = OneOfTwo(0, 2, torch.device("cpu"), noting.noted)
        if not difference:
            return check_that_all_begin_alike(process, trainer.settings, trainer.begins_with())
        with pytest.raises(UserError, match=f"of this training differ in {difference}; this one goes on from step 6"):
            check_that_all_begin_alike(process, trainer.settings, trainer.begins_with())

    compared("")
    compared("", num_workers=2, micro_batch=1, eval_batch_size=1)
    compared("step, weights", run=tmp_path / "run")
    compared("best validation", run=tmp_path / "no best")
    compared("weights", weight=1e-3)
    compared("last step, max_steps, learning_rate", learning_rate=1e-5, max_steps=7)


def test_discriminators_are_weights_too(work: Path, tmp_path: Path) -> None:
    learner = Trainer(train_settings(work, tmp_path / "run", **ADVERSARIAL), CPU).learner
    before = learner.weights_sha256()
    assert learner.adversary
    with torch.no_grad():
        next(learner.adversary.discriminators.parameters()).add_(1e-3)
    assert learner.weights_sha256() != before


def test_a_program_that_knows_other_settings_does_not_train_along(work: Path, tmp_path: Path) -> None:
    """Told before messages are compared that have a number for each: gloo aborts where they differ in length."""
    settings = train_settings(work, tmp_path / "run")
    noting = Noting(0, 2, torch.device("cpu"))
    check_that_all_begin_alike(noting, settings, {"step": 0, "last step": 6, "of a newer version": 1})
    with pytest.raises(UserError, match="run different versions of this program: bring all to the same"):
        check_that_all_begin_alike(
            OneOfTwo(0, 2, torch.device("cpu"), noting.noted), settings, {"step": 0, "last step": 6}
        )
