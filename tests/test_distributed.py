"""Two processes under torchrun train what one process trains."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from shards import storage
from shards.index import compact, shard_list
from shards.order import Order
from shards.reader import READ_ATTEMPTS
from shards.writer import read_metadata, read_table, write_table
from tests.helpers import ROOT
from tests.test_data_failures import flipped
from tests.training_helpers import (
    ADVERSARIAL,
    CPU,
    largest_difference,
    last_state,
    metrics,
    train_settings,
    train_words,
)
from trainer import checkpoint, distributed
from trainer.loop import Trainer
from trainer.status import is_running

SETTINGS = {"batch_size": 3, "micro_batch": 1, "eval_samples": 3}  # ranks take one crop and two
TRAINING = """
from pathlib import Path

import torch
from trainer.__main__ import main

torch.set_default_dtype(torch.{dtype})
try:
    main()
finally:
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in threads), f"one that ends with Python may abort it: {{threads}}"
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def processes(number: int, *program: str, words: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}", *program]
    ended = subprocess.run(
        [*command, "train", *words], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[:3000]


def assert_same_metrics(found: Path, expected: Path, relative: float) -> None:
    for line, other in zip(metrics(found), metrics(expected), strict=True):
        assert (line["kind"], line["step"]) == (other["kind"], other["step"])
        for name in line.keys() & {"loss", "l1", "stft", "mel", "adversarial", "features", "discriminator"}:
            assert line[name] == pytest.approx(other[name], rel=relative)


RECIPE = {**SETTINGS, **ADVERSARIAL, "balance_losses": True, "ema_decay": 0.9}


@pytest.fixture(scope="module")
def train(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Trains RECIPE in float64 in so many processes and returns the folder of the run.

    In float64, because Adam magnifies rounding: a gradient of 1e-12 moves a weight as far as one of 1.
    """
    folder = tmp_path_factory.mktemp("distributed")
    script = folder / "double_precision.py"
    script.write_text(TRAINING.format(dtype="float64"))

    def run(number: int, name: str, **changes: Any) -> Path:
        processes(number, str(script), words=train_words(work, folder / name, **{**RECIPE, **changes}))
        return folder / name

    return run


@pytest.fixture(scope="module")
def one(train: Callable[..., Path]) -> Path:
    return train(1, "one", micro_batch="auto")


@pytest.mark.parametrize("steps_before", [0, 3], ids=["from the beginning", "resumed"])
def test_two_processes_are_one_to_rounding(steps_before: int, train: Callable[..., Path], one: Path) -> None:
    """Decoder, running mean, discriminators, their optimizers and the balancer; also where one process began."""
    name = f"two from {steps_before}"
    if steps_before:
        train(1, name, micro_batch="auto", max_steps=steps_before)
    two = train(2, name)
    together, expected = last_state(two), last_state(one)
    assert together["step"] == expected["step"] == 6
    assert together["decoder"]["model.8.bias"].dtype == torch.float64
    for weights in ("decoder", "ema"):
        assert largest_difference(together[weights], expected[weights]) < 1e-9
    assert largest_difference(*(state["adversary"]["discriminators"] for state in (together, expected))) < 1e-9
    assert together["balancer"]["sums"] == pytest.approx(expected["balancer"]["sums"], rel=1e-9)
    assert_same_metrics(two, one, relative=1e-9)


def by_another_teacher(work: Path, folder: Path) -> Path:
    """Shards of the same plan, so that keys and lengths are the same."""
    shutil.copytree(work / "shards", folder)
    for sidecar in folder.glob("*/*.parquet"):
        told = read_metadata(sidecar)
        told["fingerprint"]["teacher"] = "sidon"
        write_table(sidecar, read_table(sidecar), told)
    compact(folder, shard_list(folder))
    return folder


def by_hand(commands: list[list[str]]) -> list[tuple[int, str]]:
    """A process of one training for each of `commands`, as on machines of their own: its exit code and its errors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(len(commands)),
        }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TRAINING.format(dtype="float32"), "train", *words], cwd=ROOT,
            stderr=subprocess.PIPE, text=True,
            env={**ENVIRONMENT, **where, "RANK": str(rank), "LOCAL_RANK": "0"},
        )
        for rank, words in enumerate(commands)
    ]  # fmt: skip
    errors = [process.communicate(timeout=500)[1] for process in started]
    return [(process.returncode, said) for process, said in zip(started, errors, strict=True)]


def test_machines_with_other_settings_are_refused(work: Path, tmp_path: Path) -> None:
    other = str(by_another_teacher(work, tmp_path / "other" / "shards"))
    changed = {"eval_every": 2, "seed": 1, "shards": other}
    ended = by_hand([
        train_words(work, tmp_path / str(rank), **{**SETTINGS, **changes}) for rank, changes in enumerate([{}, changed])
    ])  # fmt: skip
    for code, errors in ended:
        assert code == 1, errors
        assert "AssertionError" not in errors
        assert "error: the processes of this training differ in teacher, weights, seed, eval_every; this one" in errors
    assert not any(tmp_path.glob("*/settings.json"))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_what_one_machine_cannot_read_ends_all_and_costs_no_step(split: str, work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "shards", tmp_path / "other" / "shards")
    settings = {**SETTINGS, "checkpoint_every": 99, "eval_every": 99}
    training = Trainer(train_settings(work, tmp_path / "order", **settings), CPU)
    if split == "train":  # a sample that the second process, with two crops of three, reads first at a later step
        index = training.corpus.training[0]
        shares = [{place.sample for place in training.stream.batch(step)[1:]} for step in range(training.total_steps)]
        step, sample = next(
            (step, sample)
            for step, share in enumerate(shares)
            for sample in share
            if step > 1 and not any(sample in before for before in shares[:step])
        )
    else:
        index = training.corpus.validation[0]
        step, sample = 0, Order(index.counts, training.settings.seed, len(index.counts)).sample_at(1)
    row = index.table.slice(sample, 1).to_pylist()[0]
    tar = tmp_path / "other" / "shards" / split / f"{row['shard']:06d}.tar"
    flipped(tar, row)
    run = tmp_path / "run"
    (first, said), (second, cause) = by_hand([
        train_words(folder, run, **settings) for folder in (work, tmp_path / "other")
    ])  # fmt: skip
    assert (first, second) == (1, 1), said + cause
    assert "AssertionError" not in said + cause
    assert "error: another process cannot read its data: its own error says why" in said
    reason = cause.splitlines()[-1].removeprefix("error: ")
    assert reason.startswith(f"{tar}: {row['key']}: ")
    assert checkpoint.newest_step(run) == step
    logged = (run / "training.log").read_text()
    assert logged.count(" ERROR ") == logged.count(reason) == 1
    assert f"saved step {step}, as data cannot be read" in logged or not step


def test_processes_wait_for_one_that_waits_for_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("torch.distributed.init_process_group", lambda _, **options: given.update(options))
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    monkeypatch.setattr(distributed, "_save_and_leave_with_parent", lambda: None)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with distributed.joined("cpu"):
        pass
    assert given["timeout"].total_seconds() > READ_ATTEMPTS * storage.PATIENCE_SECONDS


LAUNCHER = """
import sys
from trainer import distributed

distributed.device_of = lambda gpu: None
distributed.launch("0,1")
"""


@contextmanager
def ending(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Whatever fails, it is not waited for in vain."""
    try:
        yield
    finally:
        process.kill()


def test_signals_to_several_processes(work: Path, tmp_path: Path) -> None:
    """SIGUSR1 to the process that the log names saves, to torchrun does nothing; when torchrun dies, they leave."""
    run = tmp_path / "run"
    words = train_words(work, run, **SETTINGS, max_steps=100_000, checkpoint_every=100_000, eval_every=100_000)
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, "train", *words], cwd=ROOT, env=ENVIRONMENT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as torchrun, ending(torchrun):  # fmt: skip

        def wait_for(what: Callable[[], Any]) -> None:
            until = time.monotonic() + 120
            while not what():
                assert torchrun.poll() in (None, -signal.SIGKILL)
                assert time.monotonic() < until
                time.sleep(0.02)

        def steps_logged() -> int:
            return len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else 0

        wait_for(lambda: steps_logged() > 1)
        torchrun.send_signal(signal.SIGUSR1)
        logged = steps_logged()
        wait_for(lambda: steps_logged() > logged + 1)
        assert torchrun.poll() is None
        assert checkpoint.newest(run) is None
        (first,) = map(int, re.findall(r"on cpu, process (\d+)", (run / "training.log").read_text()))
        os.kill(first, signal.SIGUSR1)
        wait_for(lambda: checkpoint.newest(run))
        saved = checkpoint.newest_step(run)
        torchrun.kill()
        wait_for(lambda: not is_running(run))
    assert checkpoint.newest_step(run) > saved
    assert f"asked to leave: saved step {checkpoint.newest_step(run)}" in (run / "training.log").read_text()


@pytest.fixture
def signals_stay() -> Iterator[None]:
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.usefixtures("signals_stay")
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
