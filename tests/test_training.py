"""Training learns what it should and nothing else; what would spoil it stops it, with the reason."""

from __future__ import annotations

import errno
import json
import math
import shutil
import threading
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from snac import SNAC

from configs import progress
from pipeline.codes import shard_codes
from pipeline.targets import shard_targets
from shards.contract import COARSE_48K, TARGET_RATE, coarse_tokens
from shards.errors import SettingsError, UserError
from shards.index import compact, shard_list
from tests.command_helpers import assert_one_line
from tests.helpers import TINY_SNAC, codes_settings, longest_file, targets_settings
from tests.training_helpers import (
    ADVERSARIAL,
    CPU,
    call,
    largest_difference,
    last_state,
    logged_steps,
    metrics,
    small_training,
    train_settings,
    train_words,
)
from trainer import checkpoint, data
from trainer.boards import TensorBoard
from trainer.data import Crop, fixed_batches
from trainer.distributed import Process
from trainer.log import RunLog
from trainer.loop import Trainer, train
from trainer.settings import BETAS
from trainer.validation import crop_losses


def frozen_bytes(codec: SNAC) -> dict[str, bytes]:
    tensors = {**codec.encoder.state_dict(prefix="encoder."), **codec.quantizer.state_dict(prefix="quantizer.")}
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def test_frozen_means_frozen(work: Path, tmp_path: Path) -> None:
    training = Trainer(train_settings(work, tmp_path / "run"), CPU)
    frozen = frozen_bytes(training.snac)
    tables = {name: table.clone() for name, table in training.learner.model.to_latent.named_buffers()}
    stock = {name: tensor.clone() for name, tensor in training.snac.decoder.state_dict().items()}
    begun = {name: tensor.clone() for name, tensor in training.learner.decoder.state_dict().items()}
    assert training.run()
    assert frozen_bytes(training.snac) == frozen
    assert largest_difference(dict(training.learner.model.to_latent.named_buffers()), tables) == 0
    assert largest_difference(training.snac.decoder.state_dict(), stock) == 0
    silent = [name for name in begun if ".block.2.linear." in name]
    ended = training.learner.decoder.state_dict()
    assert [name for name in begun if torch.equal(begun[name], ended[name])] == silent
    assert len(silent) == 2 * 5


def test_phase_1_moves_the_new_layers_only(work: Path, tmp_path: Path) -> None:
    training = Trainer(train_settings(work, tmp_path / "run", phase1_steps=3, max_steps=3), CPU)
    begun = {name: tensor.clone() for name, tensor in training.learner.decoder.state_dict().items()}
    training.run()
    ended = training.learner.decoder.state_dict()
    moved = {int(name.split(".")[1]) for name in begun if not torch.equal(begun[name], ended[name])}
    assert moved == {6, 7, 8}
    assert largest_difference(training.learner.ema.model.state_dict(), ended) == 0, "ema_decay=0 follows"
    assert {line["phase"] for line in metrics(tmp_path / "run") if line["kind"] == "train"} == {1}


@pytest.mark.parametrize(
    ("changes", "given", "tenth"),
    [
        ({"phase1_steps": 21, "max_steps": 20}, "21 of 20 steps (phase1_steps=21, max_steps=20)", "phase1_steps=2"),
        ({"phase1_steps": 9, "max_steps": 8}, "(phase1_steps=9, max_steps=8)", "phase1_steps=1, a tenth, and warmup"),
        ({"phase1_steps": 2000, "num_epochs": 2}, "(phase1_steps=2000, num_epochs=2)", "phase1_steps="),
        ({"phase1_epochs": 4, "num_epochs": 2}, "(phase1_epochs=4, num_epochs=2)", "phase1_epochs=0.2"),
    ],
)
def test_a_phase_1_longer_than_training_is_refused(
    changes: dict[str, Any], given: str, tenth: str, work: Path, tmp_path: Path
) -> None:
    code, output = call("train", *train_words(work, tmp_path / "run", **{"max_steps": None, **changes}))
    assert code == 2
    assert output.startswith("error: phase 1 would take ")
    assert f"{given}, and only the new layers would learn: take {tenth}" in output
    assert len(output.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_phase_1_longer_than_training_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    words = train_words(tmp_path, tmp_path / "run", pretrained_model="nobody/nowhere", phase1_steps=21, max_steps=20)
    code, output = call("train", *words)
    assert (code, output.partition(" (")[0]) == (2, "error: phase 1 would take 21 of 20 steps")


def test_what_only_shards_or_a_checkpoint_tell_is_not_refused_before_they_are_read(work: Path, tmp_path: Path) -> None:
    settings = partial(train_settings, work, tmp_path / "run")
    with pytest.raises(SettingsError, match=r"^phase 1 would take 21 of 20 steps"):
        settings(phase1_steps=21, max_steps=20).check()
    settings(phase1_steps=20, max_steps=20).check()
    settings(phase1_steps=21, max_steps=None).check()
    settings(phase1_steps=21, phase1_epochs=1, max_steps=20).check()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step_000000021.pt").touch()
    settings(phase1_steps=21, max_steps=20).check()


def test_discriminators_that_learn_alone_to_the_end_are_refused(work: Path, tmp_path: Path) -> None:
    words = train_words(work, tmp_path, **{**ADVERSARIAL, "discriminator_start": 7})
    code, output = call("train", *words)
    assert (code, output) == (
        2,
        "error: the discriminators would learn alone for all of 6 steps (max_steps=6): take discriminator_start=0, a "
        "tenth, or max_steps= above 7\n",
    )


def test_a_run_that_goes_on_may_end_in_phase_1(work: Path, tmp_path: Path) -> None:
    small_training(work, tmp_path / "run", phase1_steps=2, max_steps=2)
    assert small_training(work, tmp_path / "run", phase1_steps=2, max_steps=1)["step"] == 2


@pytest.mark.parametrize(("max_steps", "warned"), [(2, False), (3, True), (5, True), (6, False)])
def test_a_phase_2_that_only_warms_up_is_said(max_steps: int, warned: bool, work: Path, tmp_path: Path) -> None:
    """Of training that ends with phase 1 it is not: then only the new layers are wanted."""
    training = Trainer(train_settings(work, tmp_path / "run", phase1_steps=2, warmup_steps=3, max_steps=max_steps), CPU)
    training.run()
    said = f"warning: {max_steps - 2} steps are left for the whole decoder, no more than warmup_steps=3: its rate still"
    assert (said in (tmp_path / "run" / "training.log").read_text()) == warned


def test_every_parameter_is_in_the_optimizer(work: Path, tmp_path: Path) -> None:
    training = Trainer(train_settings(work, tmp_path / "run"), CPU)
    held = [id(parameter) for group in training.learner.optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in training.learner.decoder.parameters())


def eight_tones(folder: Path) -> Path:
    """Eight segments of one coarse token each, a tone in each, and one for validation."""
    rows, random = [], np.random.default_rng(0)
    time = np.arange(COARSE_48K) / TARGET_RATE
    for number, hertz in enumerate(random.uniform(100, 600, 9)):
        tone = 0.45 * np.sin(2 * np.pi * hertz * time + random.uniform(0, 6))
        soundfile.write(folder / f"{number}.wav", tone, TARGET_RATE, "FLOAT")
        split = "validation" if number == 8 else "train"
        rows.append({"path": f"{number}.wav", "speaker": f"{number}", "split": split})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    work = folder / "work"
    shard_codes(codes_settings(folder / "manifest.jsonl", work, "min_seconds=0", "segment_length=0.085"))
    shard_targets(targets_settings(work))
    return work


def test_it_overfits_eight_segments(tmp_path: Path) -> None:
    settings = train_settings(
        eight_tones(tmp_path), tmp_path / "run", learning_rate=1e-3, max_steps=150, phase1_steps=0,
        n_ffts=[256, 1024], eval_every=1000, checkpoint_every=1000,
    )  # fmt: skip
    training = Trainer(settings, CPU)

    @torch.no_grad()
    def loss() -> float:
        (batch,) = fixed_batches(training.corpus.training[0], 8, 8, 1, 0)
        assert len(set(batch.keys)) == len(training.corpus.training[0]) == 8
        wav_BN = batch.only_real(training.learner.model(batch.tokens_BT7))
        return float(crop_losses(wav_BN, batch, settings)["loss"].mean())

    warm_start = loss()
    training.run()
    assert loss() < warm_start / 2


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("recipe", [{}, {**ADVERSARIAL, "balance_losses": True}])
def test_micro_batches_change_nothing(recipe: dict[str, Any], work: Path, tmp_path: Path) -> None:
    """In float64, because Adam magnifies rounding: a gradient of 1e-12 moves a weight as far as one of 1."""
    states = {}
    for size in ("auto", 2, 1):
        run = tmp_path / str(size)
        settings = {"batch_size": 3, "micro_batch": size, "max_steps": 3, "phase1_steps": 1, "eval_every": 99}
        states[size] = small_training(work, run, **settings, **recipe)
    for size in (2, 1):
        assert largest_difference(states[size]["decoder"], states["auto"]["decoder"]) < 1e-9
        for line, expected in zip(metrics(tmp_path / str(size)), metrics(tmp_path / "auto"), strict=True):
            for name in {"loss", "discriminator", "grad_norm", "discriminator_grad_norm"} & expected.keys():
                assert line[name] == pytest.approx(expected[name], rel=1e-9)
    assert states[1]["decoder"]["model.8.bias"].dtype == torch.float64


def test_a_first_step_has_nothing_to_balance_by(work: Path, tmp_path: Path) -> None:
    """Its gradient, of the mean over crops, is that of plain weights."""
    norms = []
    for balanced in (False, True):
        run = tmp_path / str(balanced)
        small_training(work, run, phase1_steps=0, max_steps=1, balance_losses=balanced)
        norms.append(next(line["grad_norm"] for line in metrics(run) if line["kind"] == "train"))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_noise_is_another_in_each_step_and_process(work: Path, tmp_path: Path) -> None:
    training = Trainer(train_settings(work, tmp_path / "run", noise="keep"), CPU)
    learner, settings = training.learner, training.settings
    length = coarse_tokens(settings.segment_length)
    (batch,) = fixed_batches(training.corpus.training[0], 2, 2, length, settings.seed)
    learner.enter_phase(2)
    for name, gain in learner.decoder.named_parameters():
        if name.endswith("block.2.linear.parametrizations.weight.original0"):
            torch.nn.init.ones_(gain)  # the stand-in's noise is silent

    def loss(step: int, rank: int) -> float:
        learner.process = replace(CPU, rank=rank)
        return learner.step(batch, step, 2, rate_factor=0)["loss"]

    assert loss(0, 0) == loss(0, 0)
    assert len({loss(0, 0), loss(1, 0), loss(0, 1)}) == 3


def test_a_short_crop_is_silent_behind_its_end(work: Path, tmp_path: Path) -> None:
    """As its padded target is: a spectrum of its last frames would hear the difference."""
    training = Trainer(train_settings(work, tmp_path / "run"), CPU)
    (batch,) = fixed_batches(training.corpus.training[0], 1, 1, coarse_tokens(1.0), 0)
    wav_BN = training.learner._decode(replace(batch, valid_B=torch.tensor([3000])))
    assert wav_BN[:, :3000].any()
    assert not wav_BN[:, 3000:].any()


def test_each_optimizer_clips_by_its_own_norm(work: Path, tmp_path: Path) -> None:
    recipe = {**ADVERSARIAL, "discriminator_start": 0, "phase1_steps": 0, "max_steps": 1}
    state = small_training(work, tmp_path / "run", **recipe, gradient_clip=1e-2, discriminator_clip=1e-3)
    for part, clip in ((state, 1e-2), (state["adversary"], 1e-3)):
        means = [values["exp_avg"].double().norm() for values in part["optimizer"]["state"].values()]
        assert float(torch.stack(means).norm()) == pytest.approx((1 - BETAS[0]) * clip, rel=1e-3)


def test_validation_does_not_touch_training(work: Path, tmp_path: Path) -> None:
    often = small_training(work, tmp_path / "often", eval_every=1, noise="keep", max_steps=4)
    never = small_training(work, tmp_path / "never", eval_every=99, noise="keep", max_steps=4)
    assert largest_difference(often["decoder"], never["decoder"]) == 0
    assert logged_steps(tmp_path / "often", "validation") == [0, 1, 2, 3, 4]
    assert logged_steps(tmp_path / "never", "validation") == [0, 4]
    silent = small_training(work, tmp_path / "silent", eval_every=99, noise="zero", max_steps=4)
    assert largest_difference(silent["decoder"], never["decoder"]) > 0


def test_the_best_checkpoint_is_the_best_by_validation(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation losses are made to fall and rise again, whatever training does."""
    losses = iter([5.0, 3.0, 4.0, 2.0, 6.0])
    monkeypatch.setattr("trainer.loop.validate", lambda *_: {"loss": next(losses), "si_sdr_lf_db": 0.0})
    run = tmp_path / "run"
    last = small_training(work, run, eval_every=1, eval_samples=1, checkpoint_every=1, keep_last=9, max_steps=4)
    best = checkpoint.load(checkpoint.folder(run) / checkpoint.BEST)
    assert (best["step"], best["validation"]["loss"]) == (3, 2.0)
    assert last["best"] == 2.0
    assert largest_difference(best["decoder"], checkpoint.load(checkpoint.step_path(run, 3))["decoder"]) == 0
    assert largest_difference(best["decoder"], last["decoder"]) > 0


def test_checkpoints_hold_the_decoder_and_no_code(work: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    small_training(work, run, keep_last=2)
    kept = sorted(path.name for path in checkpoint.folder(run).iterdir())
    assert kept == [
        f"{name}.{kind}" for name in ("best", "step_000000004", "step_000000006") for kind in ("json", "pt")
    ]
    for name in kept[1::2]:
        state = torch.load(checkpoint.folder(run) / name, weights_only=True)
        assert not {key for key in state["decoder"] if "encoder" in key or "quantizer" in key or "table" in key}
        assert state["snac_sha256"].keys() == {"config.json", "pytorch_model.bin"}
    assert "optimizer" not in torch.load(checkpoint.folder(run) / "best.pt", weights_only=True)


def test_a_bad_target_stops_before_the_step_and_is_named(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, original = tmp_path / "run", data.crop
    training = Trainer(train_settings(work, run, checkpoint_every=1, max_steps=50, eval_every=99), CPU)
    stream, index = training.stream, training.corpus.training[0]
    bad_step = 3
    seen = {place.sample for step in range(bad_step) for place in stream.batch(step)}
    sample = next(place.sample for place in stream.batch(bad_step) if place.sample not in seen)
    bad_key = index.table["key"][sample].as_py()
    assert bad_key not in {row["key"] for row in training.corpus.validation[0].table.to_pylist()[:2]}

    def planted(members: dict[str, Any], *given: Any) -> Crop:
        item = original(members, *given)
        if item.key == bad_key and "train" in members["__url__"]:
            item.target[7] = np.nan
        return item

    monkeypatch.setattr(data, "crop", planted)
    with pytest.raises(UserError, match="not finite; stopped before the optimizer step") as caught:
        training.run()
    assert f"Keys of the batch here: {bad_key}. Repair" in str(caught.value)
    assert str(checkpoint.step_path(run, bad_step)) in str(caught.value)
    assert training.step == bad_step
    assert largest_difference(training.learner.decoder.state_dict(), last_state(run)["decoder"]) == 0


def test_why_training_ended_stands_in_its_log(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.learner.weighted", lambda terms, _: terms["l1"] * math.nan)
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=SimpleNamespace(isatty=lambda: True)))
    code, output = call("train", *train_words(work, tmp_path))
    assert code == 1
    assert "\rtraining: " in output
    (error,) = [line for line in output.split("\n") if line.startswith("error: ")]  # which the bar's line has not
    last = (tmp_path / "training.log").read_text().splitlines()[-1]
    assert "ERROR step 0: " in last
    assert last.endswith(error.removeprefix("error: "))


@pytest.mark.parametrize("error", [OSError(errno.EROFS, "Read-only file system", "best.pt"), AssertionError()])
def test_so_do_a_disk_and_a_bug(error: Exception, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "save", fail)
    with pytest.raises(type(error)):
        train(train_settings(work, tmp_path))
    last = (tmp_path / "training.log").read_text().splitlines()[-1]
    assert last.endswith(f"ERROR {type(error).__name__}: {error}".rstrip())


def test_so_does_what_ended_another_process(tmp_path: Path) -> None:
    """Which may be all that says which crop was at fault, or which GPU ran out of memory."""
    for rank in range(2):
        log = RunLog(tmp_path, 0, 1, writes=rank == 0)
        log.say(f"begins, {rank}")
        log.ended_by(UserError(f"ended, {rank}"))
        log.close()
    said = [line.split(" ", 2)[2] for line in (tmp_path / "training.log").read_text().splitlines()]
    assert said == ["INFO begins, 0", "ERROR ended, 0", "ERROR ended, 1"]


def test_what_ended_training_is_not_hidden_by_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    """As on a machine whose run= is not there."""
    RunLog(tmp_path / "not here", 0, 1, writes=False).ended_by(UserError("ended"))


def test_a_full_disk_is_said_by_the_command_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Not by a traceback of the log that has no room for it."""
    (tmp_path / "training.log").symlink_to("/dev/full")
    log = RunLog(tmp_path, 0, 1, writes=True)
    log.ended_by(OSError(errno.ENOSPC, "No space left on device", "best.pt"))
    assert "Traceback" not in capfd.readouterr().err
    with suppress(OSError):
        log.close()


def test_so_is_one_on_which_tensorboard_finds_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[object] = []
    monkeypatch.setattr(threading, "excepthook", shown.append)
    board = TensorBoard(tmp_path, 0)
    with longest_file(10_000):
        with suppress(OSError):  # where its thread is quick
            board.audio("clip", 0, torch.rand(48_000))
        with pytest.raises(OSError, match="File too large"):
            board.close()
    assert not shown
    assert threading.excepthook == shown.append


class WithABadOne(Process):
    """The first of two processes, the other of which has a loss, or a gradient alone, that is not finite."""

    bad_loss = True

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values + math.nan if self.bad_loss else values

    def sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad += math.nan


class WithABadGradient(WithABadOne):
    bad_loss = False


@pytest.mark.parametrize(
    ("process", "said", "unsaid"),
    [
        (WithABadOne, "The crops at fault are another process's", "Keys of the batch"),
        (WithABadGradient, "Keys of the batch here: ", "another process's"),
    ],
)
def test_another_process_names_what_is_at_fault_there(
    process: type[Process], said: str, unsaid: str, work: Path, tmp_path: Path
) -> None:
    one = Trainer(train_settings(work, tmp_path, eval_every=99), CPU)
    one.learner.process = process(0, 2, CPU.device)
    with pytest.raises(UserError, match=said) as caught:
        one.run()
    assert unsaid not in str(caught.value)


def test_shards_of_another_snac_are_refused(work: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(TINY_SNAC, other)
    weights = torch.load(other / "pytorch_model.bin", weights_only=True)
    weights["quantizer.quantizers.0.codebook.weight"][0, 0] += 1
    torch.save(weights, other / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"holds codes of another SNAC .*pytorch_model\.bin is \w+, now \w+"):
        Trainer(train_settings(work, tmp_path / "run", pretrained_model=str(other)), CPU)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_shards_without_a_usable_segment_are_refused(split: str, shards: Path, tmp_path: Path) -> None:
    compact(shards, [place for place in shard_list(shards) if place[0] != split])
    with pytest.raises(UserError, match=f"has no usable segment in the split {split}"):
        Trainer(train_settings(tmp_path, tmp_path / "run"), CPU)
    assert not (tmp_path / "run").exists()


def test_fewer_crops_than_processes_are_refused(work: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="a batch of 2 crops is less than the 3 processes"):
        Trainer(train_settings(work, tmp_path / "run"), Process(0, 3, torch.device("cpu")))


@pytest.mark.parametrize("gpu", ["0", "0,1"])
def test_without_a_gpu_it_says_so(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, output = call("train", *train_words(work, tmp_path / "run", gpu=gpu))
    assert code == 1
    assert_one_line(output, "gpu=0: no GPU is usable here (")
    assert not (tmp_path / "run").exists()
