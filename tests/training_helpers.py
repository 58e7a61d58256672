"""A training so small that many fit in one test file: settings, what it left, and how to compare two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner

from configs.loader import load_settings
from tests.helpers import TINY_SNAC
from trainer import checkpoint
from trainer.__main__ import main
from trainer.distributed import Process
from trainer.loop import Trainer
from trainer.settings import TrainSettings

SMALL = {
    "pretrained_model": TINY_SNAC,
    "gpu": "cpu",
    "batch_size": 2,
    "segment_length": 0.085,
    "n_ffts": [64, 256],
    "final_rate": 1,
    "warmup_steps": 0,
    "ema_decay": 0,
    "phase1_steps": 2,
    "max_steps": 6,
    "num_workers": 0,
    "window_shards": 2,
    "eval_samples": 2,
    "eval_batch_size": 2,
    "eval_every": 3,
    "eval_clips": 0,
    "best_metric": "loss",
    "checkpoint_every": 2,
    "log_every": 1,
    "resume": "auto",
}
ADVERSARIAL = {
    "adversarial_weight": 1,
    "feature_weight": 2,
    "mel_weight": 15,
    "mpd_periods": [2, 3],
    "mpd_channels": 1,
    "mrd_n_ffts": [128],
    "mrd_channels": 2,
    "discriminator_start": 1,
}
CPU = Process(rank=0, world_size=1, device=torch.device("cpu"))


def train_words(work: Path, run: Path, **changes: Any) -> list[str]:
    """The key=value arguments of a small training on the CPU."""
    values = {"shards": str(work / "shards"), "run": str(run), **SMALL, **changes}
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def train_settings(work: Path, run: Path, **changes: Any) -> TrainSettings:
    return load_settings(TrainSettings, "decoder_48khz.json", train_words(work, run, **changes))


def small_training(work: Path, run: Path, **changes: Any) -> dict[str, Any]:
    """Trains (or goes on) to the end in this process and returns the last checkpoint."""
    assert Trainer(train_settings(work, run, **changes), CPU).run()
    return last_state(run)


def call(command: str, *words: str) -> tuple[int, str]:
    """`just COMMAND WORDS` in this process: exit code and output."""
    result = CliRunner().invoke(main, [command, *words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def last_state(run: Path) -> dict[str, Any]:
    path = checkpoint.newest(run)
    assert path is not None, f"no checkpoint in {run}"
    return checkpoint.load(path)


def steps_kept(run: Path) -> list[int]:
    return sorted(int(path.stem.split("_")[1]) for path in checkpoint.folder(run).glob("step_*.pt"))


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def logged_steps(run: Path, kind: str) -> list[int]:
    return [line["step"] for line in metrics(run) if line["kind"] == kind]


def as_logged(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what the clock measured."""
    clock = ("audio_seconds_per_second", "seconds_per_step", "data_wait_share", "memory_gib")
    return [{name: value for name, value in line.items() if name not in clock} for line in metrics(run)]


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Over all tensors of two state dicts with the same names."""
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def assert_same_state(a: dict[str, Any], b: dict[str, Any]) -> None:
    """All but settings is the same, bit for bit: weights, running means, optimizers, discriminators, counters."""
    first, second = ({name: value for name, value in state.items() if name != "settings"} for state in (a, b))
    assert_identical(first, second, "state")


def assert_identical(a: Any, b: Any, where: str) -> None:
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for name in a:
            assert_identical(a[name], b[name], f"{where}.{name}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for number, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_identical(left, right, f"{where}.{number}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), (
            f"{where}: {int((a != b).sum())} of {a.numel()} differ, by up to {(a - b).abs().max()}"
        )
    else:
        assert a == b, where
