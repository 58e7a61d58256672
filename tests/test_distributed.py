"""Two processes under torchrun train what one process trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shards.errors import UserError
from tests.helpers import ROOT
from tests.training_helpers import ADVERSARIAL, largest_difference, last_state, metrics, small_training, train_words
from trainer import distributed

SETTINGS = {"batch_size": 3, "micro_batch": 1, "eval_samples": 3}  # ranks take one crop and two
DOUBLE_PRECISION = """
import torch
from trainer.__main__ import main
torch.set_default_dtype(torch.float64)
main()
"""


def two_processes(*program: str, words: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [*command, "train", *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[:3000]


def assert_same_metrics(found: Path, expected: Path, relative: float) -> None:
    for line, other in zip(metrics(found), metrics(expected), strict=True):
        assert (line["kind"], line["step"]) == (other["kind"], other["step"])
        for name in line.keys() & {"loss", "l1", "stft", "mel", "adversarial", "features", "discriminator"}:
            assert line[name] == pytest.approx(other[name], rel=relative)


def test_two_processes_are_one_to_rounding(work: Path, tmp_path: Path) -> None:
    """In float64, because Adam magnifies rounding: a gradient of 1e-12 moves a weight as far as one of 1."""
    script = tmp_path / "double_precision.py"
    script.write_text(DOUBLE_PRECISION)
    recipe = {**SETTINGS, **ADVERSARIAL, "balance_losses": True, "ema_decay": 0.9}
    two_processes(str(script), words=train_words(work, tmp_path / "two", **recipe))
    torch.set_default_dtype(torch.float64)
    try:
        alone = small_training(work, tmp_path / "one", **recipe | {"micro_batch": "auto"})
    finally:
        torch.set_default_dtype(torch.float32)
    together = last_state(tmp_path / "two")
    assert together["step"] == alone["step"] == 6
    assert together["decoder"]["model.8.bias"].dtype == torch.float64
    for weights in ("decoder", "ema"):
        assert largest_difference(together[weights], alone[weights]) < 1e-9
    assert largest_difference(*(state["adversary"]["discriminators"] for state in (together, alone))) < 1e-9
    assert together["balancer"]["sums"] == pytest.approx(alone["balancer"]["sums"], rel=1e-9)
    assert_same_metrics(tmp_path / "two", tmp_path / "one", relative=1e-9)


def test_a_run_of_one_process_is_resumed_by_two(work: Path, tmp_path: Path) -> None:
    """By the command itself, in float32: weights move by up to 1e-4 a step and agree to a tenth of one step."""
    alone = small_training(work, tmp_path / "one", **SETTINGS)
    begun = small_training(work, tmp_path / "both", **SETTINGS, max_steps=3)
    two_processes("-m", "trainer", words=train_words(work, tmp_path / "both", **SETTINGS))
    together = last_state(tmp_path / "both")
    assert together["step"] == 6
    assert largest_difference(together["decoder"], begun["decoder"]) > 2e-4
    assert largest_difference(together["decoder"], alone["decoder"]) < 1e-5
    assert_same_metrics(tmp_path / "both", tmp_path / "one", relative=1e-3)


@pytest.mark.parametrize(
    ("granted", "gpus", "visible"), [(None, "0,1", "0,1"), ("4,5,7", "0,2", "4,7"), ("", "1,0", "1,0")]
)
def test_gpu_numbers_count_within_what_was_granted(
    granted: str | None, gpus: str, visible: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(distributed, "device_of", lambda gpu: None)
    monkeypatch.setattr(os, "execve", lambda path, words, environment: started.append((words, environment)))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if granted is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", granted)
    distributed.launch(gpus)
    ((words, environment),) = started
    assert environment["CUDA_VISIBLE_DEVICES"] == visible
    assert "--nproc-per-node=2" in words
    with pytest.raises(UserError, match="names a GPU twice"):
        distributed.launch("1,1")
