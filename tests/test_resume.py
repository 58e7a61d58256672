"""A resumed run is the uninterrupted one, bit for bit; a run that cannot be that is refused with the reason."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from shards.errors import UserError
from shards.files import exclusive
from shards.index import compact, read_sums, shard_list
from tests.helpers import ROOT
from tests.training_helpers import (
    CPU,
    as_logged,
    assert_identical,
    assert_same_state,
    call,
    largest_difference,
    last_state,
    logged_steps,
    small_training,
    train_settings,
    train_words,
)
from trainer import checkpoint
from trainer.learner import Learner
from trainer.loop import Trainer, train
from trainer.resuming import newest_state


@pytest.fixture(scope="module")
def finished(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps without interruption. Read only."""
    run = tmp_path_factory.mktemp("finished") / "run"
    small_training(work, run, keep_last=9)
    return run


def stopped_after(work: Path, run: Path, step: int, **changes: Any) -> Path:
    """As a training that was asked to leave, but for the validation of its last step."""
    training = Trainer(train_settings(work, run, **changes), CPU)
    training.total_steps = step
    assert training.run()
    return run


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_is_uninterrupted(work: Path, finished: Path, tmp_path: Path, workers: int) -> None:
    """Stopped in phase 1 and on the first step of phase 2, at a validation and between two."""
    run = tmp_path / "run"
    for step in (1, 3):
        stopped_after(work, run, step)
    resumed, whole = small_training(work, run, num_workers=workers), last_state(finished)
    resumed["validations_since_best"] = whole["validations_since_best"]  # the stops were validated too
    assert_same_state(resumed, whole)
    assert logged_steps(run, "train") == [1, 2, 3, 4, 5, 6]
    assert [line for line in as_logged(run) if line["step"] != 1] == [
        line for line in as_logged(finished) if line["step"] != 1
    ]


def test_what_was_logged_after_the_checkpoint_is_logged_once(work: Path, finished: Path, tmp_path: Path) -> None:
    """As a kill leaves it: an older checkpoint than the log, whose last line is cut off."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    checkpoint.step_path(run, 6).unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert_same_state(small_training(work, run), last_state(finished))
    assert as_logged(run) == as_logged(finished)
    shutil.rmtree(checkpoint.folder(run))
    small_training(work, run, max_steps=2)
    assert logged_steps(run, "validation") == [0, 2]
    assert logged_steps(run, "train") == [1, 2]


def test_noise_is_resumed_too(work: Path, tmp_path: Path) -> None:
    whole = small_training(work, tmp_path / "whole", noise="keep", max_steps=4, eval_every=99)
    run = stopped_after(work, tmp_path / "run", 3, noise="keep", eval_every=99)
    resumed = small_training(work, run, noise="keep", max_steps=4, eval_every=99)
    assert resumed["decoder"]["model.2.block.2.linear.parametrizations.weight.original0"].any(), "no noise is heard"
    for name in ("best", "validations_since_best"):  # the stop was validated too
        resumed[name] = whole[name]
    assert_same_state(resumed, whole)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 1}, "seed is 0, now 1"),
        ({"batch_size": 3}, "batch_size is 2, now 3"),
        ({"window_shards": 1}, "window_shards is 2, now 1"),
        ({"n_ffts": [64, 128]}, "n_ffts is [64, 256], now [64, 128]"),
        ({"ema_decay": 0.5, "l1_weight": 0.25}, "ema_decay is 0.0, now 0.5; l1_weight is 1.0, now 0.25"),
        ({"noise": "keep", "warmup_steps": 7}, "warmup_steps is 0, now 7; noise is zero, now keep"),
    ],
)
def test_other_settings_are_refused(work: Path, finished: Path, change: dict[str, Any], difference: str) -> None:
    before = (finished / "settings.json").read_text()
    with pytest.raises(UserError) as caught:
        Trainer(train_settings(work, finished, **change), CPU)
    assert f"cannot be resumed with other settings or data: {difference}; take another run=" in str(caught.value)
    assert str(checkpoint.step_path(finished, 6)) in str(caught.value)
    assert (finished / "settings.json").read_text() == before


def test_other_data_is_refused_and_moved_data_is_not(work: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "shards", tmp_path / "shards")
    assert Trainer(train_settings(tmp_path, finished), CPU).step == 6
    before = read_sums(tmp_path / "shards")
    compact(tmp_path / "shards", shard_list(tmp_path / "shards"), {"calibration": "made again"})
    assert read_sums(tmp_path / "shards") != before
    assert Trainer(train_settings(tmp_path, finished), CPU).step == 6, "the samples are the same"
    compact(tmp_path / "shards", shard_list(tmp_path / "shards")[1:])
    with pytest.raises(UserError, match=r"other settings or data: samples is \w{64}, now \w{64}; take another run="):
        Trainer(train_settings(tmp_path, finished), CPU)


@pytest.mark.parametrize("resume", ["auto", "other_samples"])
def test_another_snac_is_refused(work: Path, finished: Path, resume: str) -> None:
    """Its tokens mean something else, and a plan gives samples of the same keys and lengths with any SNAC."""
    settings = train_settings(work, finished, resume=resume)
    training = Trainer(settings, CPU)
    other = {**training.weights.sha256, "pytorch_model.bin": "of another"}
    with pytest.raises(UserError, match=r"other settings or data: snac: pytorch_model.bin is \w{64}, now of another"):
        newest_state(settings, training.data, other)


def test_what_only_steps_depend_on_may_change(work: Path, finished: Path) -> None:
    """So that a training which ended in a gradient that is not finite can go on."""
    assert Trainer(train_settings(work, finished, learning_rate=1e-5, gradient_clip=0.1), CPU).step == 6


def test_validation_may_change_and_what_was_best_stays(work: Path, finished: Path, tmp_path: Path) -> None:
    """It draws on nothing that training draws on; another judge's first verdict is not compared with the last one's."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    checkpoint.remove(checkpoint.step_path(run, 6))
    best = checkpoint.load(checkpoint.folder(run) / checkpoint.BEST)
    resumed = small_training(work, run, eval_every=1, eval_samples=1, best_metric="lsd")
    assert largest_difference(resumed["decoder"], last_state(finished)["decoder"]) == 0
    assert logged_steps(run, "validation") == [0, 3, 4, 5, 6]
    changed = next(line for line in (run / "training.log").read_text().splitlines() if "with other settings" in line)
    assert "; eval_samples is 2, now 1; eval_every is 3, now 1; best_metric is loss, now lsd; " in changed
    new = checkpoint.load(checkpoint.folder(run) / checkpoint.BEST)
    assert new["step"] in (4, 5, 6)
    assert resumed["best"] == new["validation"]["lsd"]
    (former,) = checkpoint.folder(run).glob("former_best_*.pt")
    assert_same_state(checkpoint.load(former), best)


def test_where_a_run_began_is_read_once_and_remembered(work: Path, finished: Path, tmp_path: Path) -> None:
    begun = stopped_after(work, tmp_path / "run", 1, init_from=str(finished))
    assert small_training(work, begun, max_steps=2, init_from=str(tmp_path / "moved"))["step"] == 2
    assert last_state(begun)["settings"]["init_from"] == str(finished)
    assert json.loads((begun / "settings.json").read_text()) == last_state(begun)["settings"]


def test_a_setting_that_a_checkpoint_does_not_know(work: Path, finished: Path, tmp_path: Path) -> None:
    """It was written before there was such a setting: its default is what the training did."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    state = last_state(run)
    del state["settings"]["balance_losses"], state["settings"]["patience"]
    checkpoint.save(checkpoint.step_path(run, 6), state)
    assert Trainer(train_settings(work, run, patience=7), CPU).step == 6
    with pytest.raises(UserError, match="balance_losses, which the checkpoint does not know, is now True; take"):
        Trainer(train_settings(work, run, balance_losses=True), CPU)


def test_a_checkpoint_of_a_former_setting_goes_on(work: Path, finished: Path, tmp_path: Path) -> None:
    """`rate_schedule=constant` gave what `final_rate=1` gives."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    state = last_state(run)
    for schedule, final_rate in (("constant", 1), ("cosine", 0.01)):
        state["settings"] |= {"rate_schedule": schedule, "final_rate": 0.01}
        checkpoint.save(checkpoint.step_path(run, 6), state)
        assert Trainer(train_settings(work, run, final_rate=final_rate), CPU).step == 6
        with pytest.raises(UserError, match=f"other settings or data: final_rate is {float(final_rate)}, now 0.5"):
            Trainer(train_settings(work, run, final_rate=0.5), CPU)


def test_a_run_is_not_overwritten_unasked(
    work: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one that ended after its first validation and before its first checkpoint."""
    monkeypatch.setattr(Learner, "step", lambda *_: sys.exit())
    with pytest.raises(SystemExit):
        small_training(work, tmp_path / "run")
    for run in (finished, tmp_path / "run"):
        with pytest.raises(UserError, match="holds checkpoints: resume=auto goes on from them"):
            Trainer(train_settings(work, run, resume="never"), CPU)
    assert Trainer(train_settings(work, tmp_path / "run"), CPU).step == 0
    with pytest.raises(UserError, match=r"best.pt cannot be resumed with other settings or data: seed is 0, now 1"):
        Trainer(train_settings(work, tmp_path / "run", seed=1), CPU)


def damaged(whole: bytes, damage: str) -> bytes:
    middle = len(whole) // 2
    return {
        "empty": b"",
        "cut": whole[:-5000],
        "one flipped bit": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "zeros": whole[:300] + bytes(600) + whole[900:],
        "text": b"hello\n",
    }[damage]


@pytest.mark.parametrize("damage", ["empty", "cut", "one flipped bit", "zeros", "text", "not ours"])
def test_a_damaged_checkpoint_is_one_clear_line(work: Path, finished: Path, tmp_path: Path, damage: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    path = checkpoint.step_path(run, 6)
    if damage == "not ours":
        torch.save({"weights": torch.zeros(1)}, path)
    else:
        path.write_bytes(damaged(path.read_bytes(), damage))
    left = path.read_bytes()
    code, output = call("train", *train_words(work, run))
    assert code == 1
    assert output.startswith(f"error: {path} is not a ")
    assert output.count("\n") == 1
    assert path.read_bytes() == left


def test_two_trainings_in_one_folder_are_refused(work: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with exclusive(run), pytest.raises(UserError, match="another process is writing here"):
        train(train_settings(work, run))
    assert not checkpoint.folder(run).exists()


PROGRAM = """
import sys
sys.modules["transformers"] = None  # importing it fails
from trainer.__main__ import main
main(sys.argv[1:], standalone_mode=False)
print("modules:", sorted({name.split(".")[0] for name in sys.modules if sys.modules[name]}))
"""


def test_sigterm_saves_and_another_process_goes_on(work: Path, tmp_path: Path) -> None:
    """The process that is stopped has no transformers, imports nothing of the pipeline, and reads with workers."""
    run = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", PROGRAM, "train"]
    never = 1_000_000
    long = train_words(work, run, max_steps=never, num_workers=1, checkpoint_every=never, eval_every=never)
    with subprocess.Popen(
        [*words, *long], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        log, waited_until = run / "metrics.jsonl", time.monotonic() + 120
        while not (log.exists() and '"train"' in log.read_text()):
            assert process.poll() is None
            assert time.monotonic() < waited_until
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGTERM)
        output = process.communicate()[0]
    assert process.returncode == 143
    saved = last_state(run)
    stopped = saved["step"]
    assert 0 < stopped < never
    assert f"asked to leave: saved step {stopped}; resume=auto goes on from here" in output
    assert logged_steps(run, "train") == list(range(1, stopped + 1))

    half = last_state(stopped_after(work, tmp_path / "half", stopped, eval_every=never))
    assert_identical(saved["decoder"], half["decoder"], f"decoder after step {stopped}")
    rest = {"max_steps": stopped + 1, "eval_every": never}
    short = [*words, *train_words(work, run, **rest)]
    ended = subprocess.run(short, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    modules = ended.stdout.rsplit("modules:", 1)[1]
    assert "'trainer'" in modules
    assert "'pipeline'" not in modules
    assert "'transformers'" not in modules
    assert_same_state(last_state(run), small_training(work, tmp_path / "whole", **rest))
