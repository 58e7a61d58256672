"""What a run shows while it runs and after it died: boards, the progress line, and status from files alone."""

from __future__ import annotations

import gc
import json
import os
import re
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from snac import SNAC

from shards.contract import COARSE_48K, coarse_tokens
from shards.errors import UserError
from shards.files import exclusive
from shards.index import load
from tests.helpers import ROOT
from tests.training_helpers import ADVERSARIAL, CPU, call, logged_steps, metrics, small_training, train_settings
from trainer import checkpoint, watch
from trainer.boards import TensorBoard, WeightsAndBiases, references, spectrogram
from trainer.data import Batch, fixed_batches, training_batches
from trainer.decoder import CodesToLatent, CropDecoder
from trainer.distributed import Process
from trainer.log import RunLog
from trainer.loop import Trainer
from trainer.status import report

PAGE = ROOT / "docs" / "training.md"


@pytest.fixture(scope="module")
def finished(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adversarial training in two parts, with two clips on the board. Read only."""
    run = tmp_path_factory.mktemp("watched") / "run"
    recipe = {**ADVERSARIAL, "balance_losses": True, "eval_clips": 2}
    small_training(work, run, **recipe, max_steps=3)
    small_training(work, run, **recipe)
    return run


def board(run: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run / "tensorboard"), size_guidance={"audio": 0, "images": 0})
    return events.Reload()


def test_tensorboard_has_scalars_audio_and_pictures(finished: Path) -> None:
    events = board(finished)
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    logged = {line["step"]: line["loss"] for line in metrics(finished) if line["kind"] == "train" and "loss" in line}
    assert losses == pytest.approx(logged)
    assert [event.step for event in events.Scalars("validation/lsd_hf_reached")] == [0, 3, 6]
    audio = events.Tags()["audio"]
    keys = {tag.split("/")[0] for tag in audio}
    assert len(keys) == 2
    assert {tag.split("/")[1] for tag in audio} == {"stock + sinc", "decoded", "target"}
    key = min(keys)
    assert [clip.step for clip in events.Audio(f"{key}/decoded")] == [0, 3, 6]
    assert [clip.step for clip in events.Audio(f"{key}/target")] == [0], "what does not change is shown once"
    assert events.Audio(f"{key}/decoded")[0].sample_rate == 48_000
    assert events.Audio(f"{key}/decoded")[0].length_frames == COARSE_48K
    pictures = events.Images(f"{key}/stock + sinc, decoded, target")
    assert [picture.step for picture in pictures] == [0, 3, 6]
    assert pictures[0].height == 1025


def test_a_resumed_run_takes_back_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    for first_step, steps in ((0, (1, 2, 3)), (1, (2,))):
        writer = TensorBoard(tmp_path, first_step)
        for step in steps:
            writer.metrics("train", step, {"loss": first_step})
        writer.close()
    assert [(event.step, event.value) for event in board(tmp_path).Scalars("train/loss")] == [(1, 0), (2, 1)]


@torch.no_grad()
def test_the_stock_decoder_is_heard_over_the_same_stretch(work: Path, snac: SNAC) -> None:
    """And draws no noise of training's."""
    batches = list(fixed_batches(load(work / "shards", "validation"), 2, 1, 5, 0))
    before = torch.get_rng_state()
    found = list(references(snac, batches))
    assert torch.equal(torch.get_rng_state(), before)
    for batch, (stock_N, target_N) in zip(batches, found, strict=True):
        assert len(stock_N) == len(target_N) == int(batch.valid_B)
        wav_N = CropDecoder(CodesToLatent(snac), snac.decoder)(batch.tokens_BT7)[0]
        pair = np.stack([stock_N[::2], wav_N[: (len(stock_N) + 1) // 2]])
        assert np.corrcoef(pair)[0, 1] > 0.95


def test_a_spectrogram_shows_a_tone_where_it_is() -> None:
    tone = 1e-3 * torch.sin(2 * torch.pi * 18_000 * torch.arange(24_000) / 48_000)
    picture = spectrogram(tone)
    brightness = picture.astype(np.int64).sum(axis=(1, 2))
    assert picture.dtype == np.uint8
    assert abs(brightness.argmax() - 1024 * (1 - 18_000 / 24_000)) <= 1
    assert brightness[512:].max() < brightness.max() / 5


def test_every_logged_value_is_explained(finished: Path) -> None:
    explained = PAGE.read_text()
    for line in metrics(finished):
        for name in line:
            name = "gradient_…" if name.startswith("gradient_") else name
            assert f"| `{name}` |" in explained, name


def test_speed_is_that_of_all_steps_and_of_real_audio(work: Path, tmp_path: Path) -> None:
    """Also of those between two lines, in which the loader's processes may be waited for; padding is no audio. Here
    discriminators learn alone at first, and batches change.
    """
    recipe = {
        **ADVERSARIAL,
        "segment_length": 1.0,
        "segment_schedule": [[0, 1.0], [3, 2.0]],
        "max_steps": 4,
        "log_every": 2,
    }
    training = Trainer(train_settings(work, tmp_path, **recipe), CPU)
    (index,), coarse = training.corpus.training, coarse_tokens(1.0)
    audio = []
    for step in range(4):
        places = [place.sample for place in training.stream.batch(step)]
        whole = [index.table["n_coarse"][place].as_py() <= coarse for place in places]
        assert all(whole), "so that how much of a segment is taken follows from its length"
        audio.append(sum(index.table["n_samples"][place].as_py() for place in places) / 48_000)
    assert [stage.batch for stage in training.stream.stages] == [2, 1]
    measured, report = iter([(0.0, 1.0), (3.0, 4.0), (0.0, 2.0), (2.0, 8.0)]), training._report
    training._report = lambda means, *_: report(means, *next(measured))  # type: ignore[method-assign]
    assert training.run()
    lines = [line for line in metrics(tmp_path) if line["kind"] == "train"]
    assert [(line["step"], line["seconds_per_step"], line["data_wait_share"]) for line in lines] == [
        (2, 2.5, 0.6), (4, 5.0, 0.2)
    ]  # fmt: skip
    speeds = [line["audio_seconds_per_second"] for line in lines]
    assert speeds == pytest.approx([sum(audio[:2]) / 5, sum(audio[2:]) / 10])


def test_waiting_for_the_data_of_another_process_counts(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Process, "raise_together", lambda *_: time.sleep(0.2))
    small_training(work, tmp_path, max_steps=2)
    lines = [line for line in metrics(tmp_path) if line["kind"] == "train"]
    assert all(line["seconds_per_step"] * line["data_wait_share"] > 0.199 for line in lines)
    assert len(lines) == 2


def until_said(run: Path, words: str) -> None:
    while words not in (run / "training.log").read_text():
        time.sleep(0.01)


def test_data_that_is_long_in_coming_is_said(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a process that reads ahead stands still, or its disk."""
    monkeypatch.setattr(watch, "SLOW_SECONDS", 0.01)

    def stalled(*words: Any, **options: Any) -> Generator[Batch, None, None]:
        until_said(tmp_path, f" minutes process {os.getpid()} on {socket.gethostname()} has waited for its data")
        yield from training_batches(*words, **options)

    monkeypatch.setattr("trainer.loop.training_batches", stalled)
    small_training(work, tmp_path, max_steps=2)


def test_also_who_is_not_first_says_that_it_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nobody would know which of many processes stands still: the one that says nothing."""
    monkeypatch.setattr(watch, "SLOW_SECONDS", 0.01)
    other = RunLog(tmp_path, 0, 1, writes=False)
    other.say("no word of it")
    assert not (tmp_path / "training.log").exists()
    (tmp_path / "training.log").touch()
    with other.slowly("has waited for another"):
        until_said(tmp_path, "has waited for another")
    other.close()


def test_what_watches_keeps_no_log_of_a_training_that_failed(tmp_path: Path) -> None:
    """Nor its bar, below which all others would stand."""
    log = RunLog(tmp_path, 0, 1, writes=True)
    gone = weakref.ref(log)
    del log
    gc.collect()
    assert gone() is None


def test_status_after_the_end(finished: Path) -> None:
    code, output = call("status", f"run={finished}")
    assert code == 0
    first, second, *rest = output.splitlines()
    assert first.startswith(f"{finished}: done, last logged 0:")
    last = [line for line in metrics(finished) if line["kind"] == "train"][-1]
    assert second.startswith(f"training at step 6 of 6, phase 2: discriminator {last['discriminator']:.4g}, ")
    assert f"loss {last['loss']:.4g}" in second
    assert any(line.startswith("validation at step 6: loss ") for line in rest)
    best = checkpoint.best_step(finished)
    told = [line for line in rest if line.startswith(f"best.pt: step {best}")]
    assert [": loss " in line for line in told] == [best != 6], "what is told of step 6 already is not told again"
    assert any(line == "step_000000006.pt: step 6" for line in rest)
    assert not any("left" in line for line in rest)
    assert not any(": validation loss" in line for line in rest), "what the last validation was is told already"
    done = next(line for line in rest if "INFO done" in line)
    assert re.search(rf"done: 6 steps, best validation loss \d+\.\d+ in {checkpoint.folder(finished)}/best\.pt$", done)


def test_status_of_a_run_under_way_or_cut_off(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "settings.json").write_text("{}")
    with exclusive(run):
        assert list(report(run)) == [f"{run}: running, nothing logged yet"]
        (run / "progress.json").write_text('{"total_steps": 100}')
        line = {"kind": "train", "step": 40, "phase": 1, "loss": 0.5, "seconds_per_step": 2.0}
        (run / "metrics.jsonl").write_text(json.dumps(line) + '\n{"kind": "train", "step": 41, "lo')
        first, second, third = report(run)
    assert first.startswith(f"{run}: running, last logged")
    assert second == "training at step 40 of 100, phase 1: loss 0.5, seconds_per_step 2"
    assert third == "at this speed 0:02:00 of training are left"
    checkpoints = run / "checkpoints"
    assert next(report(run)).startswith(f"{run}: not running here, the same command begins anew, ")
    checkpoints.mkdir()
    (checkpoints / "step_000000040.pt").touch()
    assert "resume=auto goes on from step 40, last logged" in next(report(run))
    (checkpoints / "step_000000100.pt").touch()
    assert next(report(run)).startswith(f"{run}: done, last logged")
    code, output = call("status", f"run={tmp_path / 'nothing'}")
    assert code == 1
    assert "is not the folder of a training" in output


def test_status_tells_the_scores_of_a_validation_once(tmp_path: Path) -> None:
    lines = ({"kind": "validation", "step": step, "loss": step / 4} for step in (1, 2, 3))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, step in (("best", 3), ("best_000000002", 2)):
        checkpoint.save_described(
            tmp_path / "checkpoints" / f"{name}.pt", {"step": step, "validation": {"loss": step / 4}}
        )
    _, *told = report(tmp_path)
    assert told == ["validation at step 3: loss 0.75", "best.pt: step 3", "best_000000002.pt: step 2: loss 0.5"]


def test_status_leaves_out_what_training_gives_up_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint.step_path(tmp_path, 1)
    checkpoint.save_described(path, {"step": 1})

    def too_late(description: Path) -> dict[str, Any]:
        path.unlink(missing_ok=True)
        return {}

    monkeypatch.setattr("trainer.status._read", too_late)
    with exclusive(tmp_path):
        assert list(report(tmp_path)) == [f"{tmp_path}: running, nothing logged yet"]


def test_status_needs_no_torch(finished: Path) -> None:
    program = (
        "import sys\nfor name in ('torch', 'numpy', 'pyarrow'): sys.modules[name] = None\n"
        "from trainer.__main__ import main\nmain(sys.argv[1:])"
    )
    words = [sys.executable, "-c", program, "status", f"run={finished}"]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "step 6 of 6" in ended.stdout


class FakeWandb:
    def __init__(self) -> None:
        self.given: dict[str, Any] = {}
        self.logged: list[dict[str, float]] = []
        self.finished = False

    def init(self, **given: Any) -> FakeWandb:
        self.given = given
        return self

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


def test_weights_and_biases_gets_the_same_scalars(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    small_training(work, tmp_path / "a", wandb="voices", max_steps=2)
    assert (fake.given["project"], fake.given["name"], fake.given["resume"]) == ("voices", "a", "allow")
    id = fake.given["id"]
    assert fake.given["config"]["batch_size"] == 2
    assert [values["step"] for values in fake.logged if "train/loss" in values] == logged_steps(tmp_path / "a", "train")
    assert fake.finished
    small_training(work, tmp_path / "a", wandb="voices", max_steps=3)
    assert fake.given["id"] == id, "a run that goes on"
    small_training(work, tmp_path / "elsewhere" / "a", wandb="voices", max_steps=2)
    assert fake.given["id"] != id, "another folder of that name"


def test_without_wandb_it_says_how_to_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb=voices needs the package wandb: `just extras` installs it"):
        WeightsAndBiases("voices", tmp_path, {})


@pytest.mark.parametrize(("l1_weight", "warned"), [(1, True), (0, False)])
def test_l1_is_warned_of_where_waveforms_differ(l1_weight: float, warned: bool, work: Path, tmp_path: Path) -> None:
    """The stand-in's waveforms have little in common with the voice's."""
    small_training(work, tmp_path / "run", max_steps=2, l1_weight=l1_weight)
    first, *_ = [line for line in metrics(tmp_path / "run") if line["kind"] == "validation"]
    assert first["si_sdr_lf_db"] < 0
    assert ("L1 will pull the level down" in (tmp_path / "run" / "training.log").read_text()) == warned


def test_a_log_obeys_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The teacher's name comes with the shards."""
    RunLog(tmp_path, 0, 1, writes=True).say("targets by \x1b[2J")
    for text in (capsys.readouterr().out, (tmp_path / "training.log").read_text()):
        assert "\x1b" not in text
        assert text.endswith("targets by \\x1b[2J\n")
