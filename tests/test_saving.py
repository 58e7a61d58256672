"""What is kept, when, and what stands when something goes wrong: signals, full disks, shards that change."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from snac import SNAC

from configs.loader import load_settings
from pipeline.codes import shard_codes
from pipeline.targets import shard_targets
from shards.cache import ShardCache
from shards.contract import PLAN_NAME, coarse_tokens
from shards.errors import UserError
from shards.writer import read_table
from tests.helpers import TINY_SNAC, codes_settings, targets_settings
from tests.training_helpers import (
    ADVERSARIAL,
    CPU,
    as_logged,
    assert_same_state,
    call,
    largest_difference,
    logged_steps,
    small_training,
    steps_kept,
    train_settings,
    train_words,
)
from trainer import checkpoint, losses
from trainer.corpus import _weights, cache_of, open_corpus
from trainer.decoder import CodesToLatent, CropDecoder
from trainer.ema import Ema
from trainer.learner import Learner
from trainer.loop import Trainer
from trainer.requests import Requests
from trainer.settings import TrainSettings
from trainer.validation import validate


def at_step(step: int, action: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Does `action` while this step is computed."""
    original = Learner.step

    def stepping(self: Learner, batch: Any, number: int, *rest: Any) -> dict[str, float]:
        if number == step:
            action()
        return original(self, batch, number, *rest)

    monkeypatch.setattr(Learner, "step", stepping)


def test_sigusr1_saves_within_the_step_and_goes_on(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(2, lambda: os.kill(os.getpid(), signal.SIGUSR1), monkeypatch)
    small_training(work, tmp_path / "run", checkpoint_every=99, keep_last=9)
    assert steps_kept(tmp_path / "run") == [3, 6]
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_sigusr1_amid_an_answer_is_answered_at_the_next_step(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It arrives once the answer is made up, and before that is given."""
    tensor, asked = torch.tensor, list[int]()

    def asking(values: Any, **options: Any) -> torch.Tensor:
        if values == [False, False] and not asked:  # whether to leave, whether to save
            asked.append(signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR1)
        return tensor(values, **options)

    at_step(2, lambda: monkeypatch.setattr(torch, "tensor", asking), monkeypatch)
    small_training(work, tmp_path / "run", checkpoint_every=99, eval_every=99, keep_last=9)
    assert steps_kept(tmp_path / "run") == [4, 6]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_and_ctrl_c_save_within_the_step_and_leave(
    number: int, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)
    at_step(2, lambda: os.kill(os.getpid(), number), monkeypatch)
    assert not Trainer(train_settings(work, tmp_path / "run", checkpoint_every=99), CPU).run()
    assert steps_kept(tmp_path / "run") == [3]
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_what_is_asked_amid_the_first_validation_is_done_a_step_later(
    number: int, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asking(*given: Any) -> dict[str, float]:
        monkeypatch.setattr("trainer.loop.validate", validate)
        os.kill(os.getpid(), number)
        return validate(*given)

    monkeypatch.setattr("trainer.loop.validate", asking)
    run, training = tmp_path / "run", {"checkpoint_every": 99, "eval_every": 99, "max_steps": 3}
    finished = Trainer(train_settings(work, run, **training), CPU).run()
    assert (finished, steps_kept(run)) == ((True, [1, 3]) if number == signal.SIGUSR1 else (False, [1]))


def test_a_second_ctrl_c_does_not_wait(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(2, twice, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        Trainer(train_settings(work, tmp_path / "run", checkpoint_every=99), CPU).run()
    assert not steps_kept(tmp_path / "run")


def test_a_full_disk_keeps_the_last_good_checkpoint(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, write = tmp_path / "run", Path.write_bytes

    def full(self: Path, data: Any) -> int:
        if self.name.startswith("step_000000004.pt"):
            write(self, bytes(data)[:1000])
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    code, output = call("train", *train_words(work, run))
    assert code == 1
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: No space left on device: ")
    assert steps_kept(run) == [2]
    assert not list(run.rglob("*.tmp"))
    monkeypatch.undo()
    assert_same_state(small_training(work, run), small_training(work, tmp_path / "whole"))


def test_what_was_logged_reaches_the_disk_before_a_checkpoint(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut would take lines of steps that are not done again."""
    fsync, flushed = os.fsync, list[str]()

    def watched(descriptor: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    small_training(work, tmp_path, max_steps=2)
    assert "metrics.jsonl" in flushed[: flushed.index("step_000000002.pt.tmp")]


@pytest.mark.parametrize("mounted", ["run", "above"])
def test_nothing_is_saved_where_the_disk_of_the_run_was(
    mounted: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would not be seen once the disk is back, although it was said to be saved."""
    disk = tmp_path / "disk"
    run, words = disk / "run", {"log_every": 99, "eval_every": 99}
    gone = run if mounted == "run" else disk

    def go() -> None:
        gone.rename(tmp_path / "away")
        gone.mkdir()

    with monkeypatch.context() as patched:
        at_step(3, go, patched)
        code, output = call("train", *train_words(work, run, **words))
    assert code == 1
    assert f"error: {run} is gone: is it mounted? Then resume=auto goes on" in output.splitlines()
    assert not [path for path in gone.rglob("*") if path.is_file()]
    shutil.rmtree(gone)
    (tmp_path / "away").rename(gone)
    assert steps_kept(run) == [2]
    whole = small_training(work, tmp_path / "whole", **words)
    assert_same_state(small_training(work, run, **words), whole)


def test_checkpoints_by_the_clock(work: Path, tmp_path: Path) -> None:
    small_training(work, tmp_path / "run", checkpoint_every=99, checkpoint_minutes=1e-9, keep_last=9)
    assert steps_kept(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    training = Trainer(train_settings(work, tmp_path / "other", checkpoint_minutes=1), CPU)
    for seconds, due in ((50, False), (70, True)):
        training.saved_at = time.monotonic() - seconds
        assert training._agree(Requests()) == (False, due)


def test_what_a_kill_left_half_written_goes(work: Path, tmp_path: Path) -> None:
    """Of a step that is not saved again: where the kill came while SIGTERM was being answered."""
    half = checkpoint.step_path(tmp_path, 3).with_suffix(".pt.tmp")
    half.parent.mkdir()
    half.touch()
    small_training(work, tmp_path)
    assert not half.exists()


def test_what_a_checkpoint_is_can_be_read_without_torch(work: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    small_training(work, run)
    summary = json.loads(checkpoint.step_path(run, 6).with_suffix(".json").read_text())
    assert summary["step"] == 6
    assert summary["settings"] == json.loads((run / "settings.json").read_text())
    assert summary["snac"] == TINY_SNAC
    assert summary["data"]["teacher"] == "recording"
    best = json.loads((checkpoint.folder(run) / "best.json").read_text())
    assert {"loss", "lsd_hf"} <= best["validation"].keys()


# Shards that are not what the index says: nothing is learned from them, and once mended the run goes on


def test_ema_is_the_running_mean(snac: SNAC) -> None:
    source = torch.nn.Linear(3, 2).double()
    ema = Ema(source, 0.7)
    expected = source.weight.detach().clone()
    for update in range(40):
        with torch.no_grad():
            source.weight.copy_(torch.randn(2, 3, generator=torch.Generator().manual_seed(update)).double())
        ema.update()
        decay = min(0.7, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * source.weight.detach()
    torch.testing.assert_close(ema.model.weight, expected)
    follows = Ema(source, 0.0)
    follows.update()
    assert largest_difference(follows.model.state_dict(), source.state_dict()) == 0


def test_the_mean_is_validated_kept_and_loaded(work: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    state = small_training(work, run, ema_decay=0.9, eval_every=6, learning_rate=1e-2)
    assert largest_difference(state["ema"], state["decoder"]) > 1e-4
    at_end = {**checkpoint.load(checkpoint.folder(run) / checkpoint.BEST)}
    if at_end["step"] == 6:
        assert largest_difference(at_end["decoder"], state["ema"]) == 0
    loaded = checkpoint.load_codec(checkpoint.step_path(run, 6))
    assert largest_difference(loaded.decoder.state_dict(), state["ema"]) == 0
    mean, settings = CropDecoder(CodesToLatent(loaded.snac), loaded.decoder), train_settings(work, run)
    length, crops = coarse_tokens(settings.segment_length), open_corpus(settings, state["snac_sha256"]).validation
    line = next(line for line in as_logged(run) if (line["kind"], line["step"]) == ("validation", 6))
    assert line["loss"] == pytest.approx(validate(mean, crops, length, settings, CPU)["loss"], rel=1e-5)


def test_a_run_begins_from_anothers_mean(work: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    expected = small_training(work, base, ema_decay=0.9, eval_every=3)
    source = checkpoint.step_path(base, 6)
    recipe = {**ADVERSARIAL, "init_from": str(source), "phase1_steps": 0, "max_steps": 2}
    training = Trainer(train_settings(work, tmp_path / "run", **recipe), CPU)
    assert largest_difference(training.learner.decoder.state_dict(), expected["ema"]) == 0
    assert training.run()
    shutil.rmtree(base)
    resumed = small_training(work, tmp_path / "run", **recipe | {"max_steps": 4})
    assert resumed["step"] == 4
    assert resumed["data"]["begun_from"] == {"step": 6, "data": expected["data"]}
    log = (tmp_path / "run" / "training.log").read_text()
    assert f"begins from {source}, step 6" in log
    code, output = call("train", *train_words(work, tmp_path / "other", **recipe))
    assert code == 1
    assert f"{source}: no checkpoint there" in output


def test_an_init_from_that_is_not_there_is_named(work: Path, tmp_path: Path) -> None:
    words = train_words(work, tmp_path / "run", init_from=str(tmp_path / "typo"), max_steps=2)
    code, output = call("train", *words)
    assert code == 1
    assert f"{tmp_path / 'typo'}" in output


def test_a_run_begins_from_no_decoder_of_other_tokens(work: Path, untrained: Path, tmp_path: Path) -> None:
    export, run = tmp_path / "export", tmp_path / "run"
    code, output = call("export", f"model={untrained}", f"out={export}")
    assert code == 0, output
    code, output = call("train", *train_words(work, run, init_from=str(export), max_steps=2))
    assert code == 0, output
    weights = torch.load(export / "pytorch_model.bin", weights_only=True)
    weights["quantizer.quantizers.1.codebook.weight"] += 0.1
    torch.save(weights, export / "pytorch_model.bin")
    code, output = call("train", *train_words(work, tmp_path / "other", init_from=str(export), max_steps=2))
    assert code == 1
    assert f"init_from={export} speaks the tokens of" in output


def test_voices_that_train_here_and_validate_there_are_said(work: Path, recordings: Path, tmp_path: Path) -> None:
    """The same recordings, the splits exchanged."""
    split_of = dict(zip(*(read_table(work / PLAN_NAME)[name].to_pylist() for name in ("group", "split")), strict=True))
    other = {"train": "validation", "validation": "train"}
    lines = [f"{path},{path.parent.name},{other[split_of[path.parent.name]]}" for path in recordings.glob("*/*.wav")]
    (tmp_path / "list.csv").write_text("\n".join(["path,speaker,split", *lines]) + "\n")
    shard_codes(codes_settings(tmp_path / "list.csv", tmp_path / "work"))
    shard_targets(targets_settings(tmp_path / "work"))
    folders = [str(work / "shards"), str(tmp_path / "work" / "shards")]
    small_training(work, tmp_path / "run", shards=folders, max_steps=2)
    said = (tmp_path / "run" / "training.log").read_text()
    assert "warning: 4 groups such as 'speaker_0' train in one folder and validate in another" in said


def test_only_the_discriminators_learn_at_first(work: Path, tmp_path: Path) -> None:
    recipe = {**ADVERSARIAL, "discriminator_start": 2, "phase1_steps": 0, "eval_every": 99}
    first = Trainer(train_settings(work, tmp_path / "none", **recipe, max_steps=2), CPU)
    begun = {name: value.clone() for name, value in first.learner.decoder.state_dict().items()}
    first.run()
    assert largest_difference(first.learner.decoder.state_dict(), begun) == 0
    lines = [line for line in as_logged(tmp_path / "none") if line["kind"] == "train"]
    for line in lines:
        assert {"discriminator", "discriminator_grad_norm"} <= line.keys()
        assert not {"loss", "grad_norm"} & line.keys()
    state = small_training(work, tmp_path / "some", **recipe, max_steps=3)
    assert largest_difference(state["decoder"], begun) > 0
    line = [line for line in as_logged(tmp_path / "some") if line["kind"] == "train"][-1]
    weights = {"l1": 1, "stft": 1, "mel": 15, "adversarial": 1, "features": 2}
    assert line["loss"] == pytest.approx(sum(weight * line[name] for name, weight in weights.items()), rel=1e-5)
    assert losses.MEL_SCALES[-1] == (2048, 320)


def test_rates_warm_up_whenever_who_learns_changes(work: Path, tmp_path: Path) -> None:
    """The discriminators alone, then phase 1, then phase 2; a rate per optimizer, and the decoder's is logged."""
    rates = {"learning_rate": 1e-3, "discriminator_learning_rate": 2e-4}
    recipe = {**ADVERSARIAL, **rates, "discriminator_start": 2, "phase1_steps": 3, "warmup_steps": 3, "max_steps": 5}
    run = tmp_path / "run"
    small_training(work, run, **recipe, eval_every=99, checkpoint_every=1, keep_last=9)
    lines = [line for line in as_logged(run) if line["kind"] == "train"]
    assert [line["phase"] for line in lines] == [1, 1, 1, 2, 2]
    assert [line["learning_rate"] for line in lines] == pytest.approx([0, 0, 0.25e-3, 0.25e-3, 0.5e-3])
    states = [checkpoint.load(checkpoint.step_path(run, step)) for step in range(1, 6)]
    decoders, discriminators = (
        [part["optimizer"]["param_groups"][0]["lr"] for part in parts]
        for parts in (states[2:], [state["adversary"] for state in states])
    )
    assert decoders == [line["learning_rate"] for line in lines[2:]]
    assert discriminators == pytest.approx([0.5e-4, 1e-4, 1.5e-4, 0.5e-4, 1e-4])


def test_what_folders_differ_in_is_told_of_each(work: Path, tmp_path: Path) -> None:
    corpus = Trainer(train_settings(work, tmp_path / "run"), CPU).corpus
    (first,) = corpus.training
    other = {**first.fingerprint, "teacher": "sidon", "sidon_sha256": {"a": "b"}, "target_bits": 24}
    both = replace(corpus, training=(first, replace(first, fingerprint=other))).provenance
    assert both["teacher"] == "recording + sidon"
    assert (both["sidon_sha256"], both["target_bits"]) == ([None, {"a": "b"}], [16, 24])
    assert both["limits"] == first.fingerprint["limits"]


def test_folders_are_mixed_by_their_sizes_to_a_tenth_of_the_smallest() -> None:
    by_size: Any = SimpleNamespace(shard_weights=None)
    folders: Any = (range(2499), range(1000), range(3000))
    assert _weights(by_size, folders) == (5, 2, 6)
    assert _weights(by_size, folders[:1]) == (1,)


def test_the_cache_lies_where_it_should_and_counts_gib(tmp_path: Path) -> None:
    asked: Any = SimpleNamespace(cache=tmp_path, cache_gib=1.5)
    assert cache_of(asked) == ShardCache(tmp_path, 3 << 29)


def test_folders_are_mixed_and_named(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "shards", tmp_path / "more")
    folders = [str(work / "shards"), str(tmp_path / "more")]
    mixed = {"shards": folders, "shard_weights": [1, 3], "eval_samples": 4, "batch_size": 4}
    run = tmp_path / "run"
    training = Trainer(train_settings(work, run, **mixed, max_steps=2), CPU)
    assert [place.folder for place in training.stream.batch(0)].count(1) == 3
    assert training.stream.steps(1) == math.ceil(2 * len(training.corpus.training[0]) / 4)
    assert training.run()
    assert logged_steps(run, "validation") == [0, 2]
    assert training.corpus.in_both == ()
    again = load_settings(TrainSettings, "decoder_48khz.json", [f"config={run / 'settings.json'}"])
    assert again == training.settings, "a run's settings can be given to another"
    assert training.settings.model_dump(mode="json")["shards"] == folders
    for change, message in (
        ({"shard_weights": [1, 2]}, r"shard_weights is \[1, 3\], now \[1, 2\]"),
        ({"shard_weights": [1]}, r"shard_weights=\[1\] for 2 folders of shards"),
    ):
        with pytest.raises(UserError, match=message):
            Trainer(train_settings(work, run, **mixed | change), CPU)
