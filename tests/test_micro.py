"""A batch that does not fit is halved until it does; the rest of the step does not notice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shards.contract import coarse_tokens
from shards.errors import UserError
from tests.training_helpers import ADVERSARIAL, as_logged, largest_difference, last_state, small_training
from trainer.data import Batch
from trainer.micro import CPU_SECONDS, MicroBatches
from trainer.training_decoder import TrainingDecoder

Forward = Callable[[TrainingDecoder, Tensor], Tensor]


def fits(crops: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on, decoding more crops than these at once runs out of memory; returns what was tried."""
    tried: list[int] = []
    original = TrainingDecoder.forward

    def forward(self: TrainingDecoder, tokens_BT7: Tensor) -> Tensor:
        tried.append(len(tokens_BT7))
        if len(tokens_BT7) > crops:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return original(self, tokens_BT7)

    monkeypatch.setattr(TrainingDecoder, "forward", forward)
    return tried


pytestmark = pytest.mark.usefixtures("double_precision")

FOUR = {"batch_size": 4, "max_steps": 2, "phase1_steps": 0, "eval_every": 99}


@pytest.mark.parametrize("recipe", [{}, ADVERSARIAL], ids=["base", "adversarial"])
def test_out_of_memory_halves_and_changes_nothing_but_rounding(
    recipe: dict[str, Any], work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = small_training(work, tmp_path / "whole", **FOUR, **recipe)
    tried = fits(1, monkeypatch)
    halved = small_training(work, tmp_path / "halved", **FOUR, **recipe)
    assert tried[:6] == [4, 2, 1, 1, 1, 1], "it should remember what fits"
    assert set(tried[2:]) == {1}
    assert largest_difference(halved["decoder"], whole["decoder"]) < 1e-9
    if recipe:
        nets = [state["adversary"]["discriminators"] for state in (halved, whole)]
        assert largest_difference(*nets) < 1e-9
    assert [line["step"] for line in as_logged(tmp_path / "halved")] == [0, 1, 2, 2]
    said = (tmp_path / "halved" / "training.log").read_text()
    assert "out of memory with 4 crops at once: now 2, the same global batch" in said
    assert "out of memory with 2 crops at once: now 1" in said

    tried.clear()
    small_training(work, tmp_path / "halved", **FOUR | {"max_steps": 3}, **recipe)
    assert set(tried) == {1}, "a resumed run should remember it too"


@pytest.mark.parametrize(
    ("micro_batch", "message"),
    [(4, "4 crops at once do not fit .*; micro_batch=auto finds what fits"), ("auto", "1 crops at once do not fit .*")],
)
def test_what_cannot_fit_is_said(
    micro_batch: Any, message: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits(0, monkeypatch)
    with pytest.raises(UserError, match=message):
        small_training(work, tmp_path / "run", **FOUR, micro_batch=micro_batch)
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


@pytest.mark.parametrize(
    "words",
    [
        "cuFFT error: CUFFT_INTERNAL_ERROR",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
        "GET was unable to find an engine to execute this computation",
    ],
)
def test_memory_that_ran_out_under_another_name(words: str) -> None:
    def work(part: Batch) -> int:
        if len(part) > 1:
            raise RuntimeError(words)
        return len(part)

    batch = Batch([""] * 4, torch.zeros(4, 2, 7, dtype=torch.long), torch.zeros(4, 1), torch.ones(4))
    assert MicroBatches("auto", torch.device("cpu"), print).run(batch, lambda: None, work) == [1] * 4


def test_a_share_that_ran_out_of_memory_is_done_again_from_its_beginning() -> None:
    """Amid it, when a part is done: what that left is no second time in the sum."""
    done: list[int] = []

    def work(part: Batch) -> None:
        if done == [2]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.append(len(part))

    batch = Batch([""] * 5, torch.zeros(5, 40, 7, dtype=torch.long), torch.zeros(5, 1), torch.ones(5))
    MicroBatches("auto", torch.device("cpu"), print).run(batch, done.clear, work)
    assert done == [1] * 5


def test_parts_are_of_nearly_one_size_and_never_empty() -> None:
    for coarse, size, expected in ((40, 4, [3, 2]), (40, "auto", [2, 2, 1]), (400, "auto", [1] * 5), (1, "auto", [5])):
        batch = Batch([""] * 5, torch.zeros(5, coarse, 7, dtype=torch.long), torch.zeros(5, 1), torch.ones(5))
        micro = MicroBatches(size, torch.device("cpu"), print)  # type: ignore[arg-type]
        assert micro.run(batch, lambda: None, len) == expected


def test_what_fitted_on_another_device_is_forgotten(work: Path, tmp_path: Path) -> None:
    small_training(work, tmp_path / "run", **FOUR)
    assert last_state(tmp_path / "run")["micro_batch"] == {"device": "cpu", "coarse": coarse_tokens(CPU_SECONDS)}


def test_on_a_cpu_the_default_batch_is_taken_in_parts() -> None:
    """It has 32 crops of 53 coarse tokens, of which three at once take the decoder at its true size 15 GiB."""
    tokens_BT7 = torch.zeros(32, 53, 7, dtype=torch.long)
    batch = Batch([""] * 32, tokens_BT7, torch.zeros(32, 1), torch.ones(32))
    sizes = MicroBatches("auto", torch.device("cpu"), print).run(batch, lambda: None, len)
    assert sum(sizes) == 32
    assert max(sizes) == 1
