"""Training: reads top to bottom. The order of data and every random draw are functions of (seed, step)."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from snac.layers import Decoder

from codec.memory import keep_freed_memory
from codec.snac import load_snac
from shards.contract import coarse_tokens
from shards.errors import SettingsError, UserError
from shards.files import exclusive, write_whole
from shards.index import check_index
from shards.storage import naming_written
from trainer import checkpoint, distributed
from trainer.boards import Boards
from trainer.corpus import cache_of, open_corpus
from trainer.data import UNREADABLE, Batch, training_batches
from trainer.decoder import CodesToLatent, silence_noise, warm_start
from trainer.distributed import ElsewhereError, Process
from trainer.learner import AUDIO, Learner, NotFiniteError
from trainer.log import RunLog
from trainer.requests import Requests, requests
from trainer.resuming import (
    BEGUN_FROM,
    FORMER_SAMPLES,
    changed_settings,
    check_that_all_begin_alike,
    judges_alike,
    newest_state,
    with_former_samples,
)
from trainer.sanity import check_that_the_decoder_learns, warnings
from trainer.schedule import rate_factor, segment_text
from trainer.settings import TrainSettings
from trainer.speed import Speed, peak_memory_gib
from trainer.validation import HIGHER_IS_BETTER, validate

TERMINATED = 143  # exit code of a process that SIGTERM ended, and here Ctrl-C too


def train(settings: TrainSettings) -> None:
    """Trains to the end, or until SIGTERM or Ctrl-C: then saves and leaves with exit code 143 (1 below torchrun)."""
    if isinstance(settings.gpu, str) and settings.gpu != "cpu" and not distributed.under_torchrun():
        distributed.launch(settings.gpu)
    keep_freed_memory()
    with distributed.joined(settings.gpu) as process:
        lock = exclusive(settings.run) if process.is_first else nullcontext()
        with lock, naming_written(settings.run):
            training = Trainer(settings, process)
            try:
                finished = training.run()
            except ElsewhereError:
                raise  # the process that knows why logs it
            except Exception as error:
                training.log.ended_by(error)
                raise
            finally:
                training.log.bar.close()  # before the command says what ended training
    if not finished:
        sys.exit(TERMINATED)


class Trainer:
    """Everything a step needs, built in the order in which it is checked."""

    def __init__(self, settings: TrainSettings, process: Process) -> None:
        self.settings, self.process = settings, process
        for folder in settings.folders:
            check_index(folder, cache_of(settings))  # before the hub is asked for anything
        self.snac, self.weights = load_snac(settings.pretrained_model)
        self.corpus = open_corpus(settings, self.weights.sha256)
        self.stream = self.corpus.stream
        smallest = min(stage.batch for stage in self.stream.stages)
        if smallest < process.world_size:
            raise SettingsError(f"a batch of {smallest} crops is less than the {process.world_size} processes")
        self.total_steps = settings.max_steps or self.stream.steps(settings.num_epochs)
        self.phase1_steps = settings.phase1_steps
        if settings.phase1_epochs is not None:
            self.phase1_steps = self.stream.steps(settings.phase1_epochs)
        self.alone_steps = settings.discriminator_start if settings.is_adversarial else 0
        self.step, self.validations_since_best = 0, 0
        self.validated_step: int | None = None
        self.best = math.inf
        self.saved_at = time.monotonic()
        self.speed = Speed()  # since the last line of metrics.jsonl
        self.begins_from, self.changed = "begins from the warm start", ""
        self.data = self.corpus.provenance

        state = newest_state(settings, self.data, self.weights.sha256)
        if state is not None:  # what is written down of it stays true
            begun_from = state["settings"].get("init_from")
            began = {"init_from": None if begun_from is None else Path(begun_from)}
            settings = self.settings = settings.model_copy(update=began)
            self.changed = changed_settings(state["settings"], settings)
        decoder = warm_start(self.snac, settings.noise, settings.seed)
        if state is None:  # a run that goes on may end sooner than was planned
            if settings.init_from is not None:
                self._begin_from(settings.init_from, decoder)
            check_that_the_decoder_learns(settings, self.phase1_steps, self.total_steps)
        self.learner = Learner(CodesToLatent(self.snac), decoder, settings, process, self._say)
        if state is not None:
            self._resume(state)
        check_that_all_begin_alike(process, settings, self.begins_with())  # and nobody writes before everybody has read
        if process.is_first:
            settings.write(settings.run / "settings.json")
            progress = json.dumps({"total_steps": self.total_steps}) + "\n"
            write_whole(settings.run / "progress.json", progress)  # for `just status`
        self.boards = Boards(settings, self.corpus, self.snac, self.step) if process.is_first else None
        self.log = RunLog(settings.run, self.step, self.total_steps, process.is_first, self.boards)
        if process.is_first and state is not None:
            self._keep_former_best()

    def _begin_from(self, init_from: Path, decoder: Decoder) -> None:
        """Gives `decoder` the weights of another training. Raises UserError where that had other tokens."""
        source = checkpoint.load_codec(init_from, self.settings.pretrained_model)
        if not CodesToLatent(self.snac).same_tokens(CodesToLatent(source.snac)):
            raise UserError(
                f"init_from={init_from} speaks the tokens of {source.snac_name}, not of {self.weights.describe()}"
            )
        told = source.provenance
        self.begins_from = f"begins from {init_from}, step {told.get('step', 'unknown')}"
        self.data = {**self.data, BEGUN_FROM: {name: told[name] for name in ("step", "data") if name in told}}
        decoder.load_state_dict(source.decoder.state_dict())
        if self.settings.noise == "zero":
            silence_noise(decoder)

    def run(self) -> bool:
        """Whether training came to its end; False when a signal asked it to leave."""
        with requests() as asked:  # before the log names this process
            self._begin()
            if self._out_of_patience():  # it ended in an earlier run
                self._finish(left=False, early=True)
                return True
            steps = range(self.step, self.total_steps)
            batches = training_batches(
                self.corpus.training, self.stream, steps, self.settings.num_workers, self.process.rank,
                self.process.world_size, for_gpu=self.process.device.type == "cuda",
            )  # fmt: skip
            with closing(batches):
                try:
                    left, early = self._train(batches, asked)
                except (*UNREADABLE, ElsewhereError):  # between two steps: the weights are whole
                    self._save_what_is_not()
                    raise
            self._finish(left, early)
        return not left

    def _begin(self) -> None:
        """Says what begins or goes on, and validates what no run before has."""
        self._say(self._describe())
        if f"until step {self.step}" in self.data.get(FORMER_SAMPLES, {}):
            self._say(f"goes on from step {self.step} with other samples than until then, in an order of their own")
        if self.changed:
            self._say(f"goes on with other settings: {self.changed}")
        if self.step == 0:
            self._say(self.begins_from)
            agreement_db, left = self._validate()["si_sdr_lf_db"], self.total_steps - self.phase1_steps
            for warning in warnings(self.settings, left, self.corpus.in_both, agreement_db):
                self._say(warning)
        elif self._validation_is_due():  # its crops could not be read in an earlier run
            self._validate()

    def _train(self, batches: Iterator[Batch], asked: Requests) -> tuple[bool, bool]:
        """Whether it ended because it was asked to leave, and whether for want of a new best."""
        left = early = False
        batch, waited = self._next_batch(batches)
        while batch is not None:
            started = time.monotonic()
            means = self._train_step(batch)
            self._report(means, waited, waited + time.monotonic() - started)
            last, validates = self.step == self.total_steps, self._validation_is_due()
            if validates:
                self._validate()
                early = not last and self._out_of_patience()
            left, save = self._agree(asked)
            if save or left or last or early or self._checkpoint_is_due(validates):
                self._save()
            if left or early:
                break
            batch, waited = self._next_batch(batches)
        return left, early

    def _next_batch(self, batches: Iterator[Batch]) -> tuple[Batch | None, float]:
        """What is trained on next, None after the last step; and the seconds until every process had its share.

        Raises on every process where one cannot read it: all leave after the same step, with whole weights.
        """
        batch, unread, started = None, None, time.monotonic()
        try:
            with self.log.slowly("has waited for its data"):
                batch = next(batches, None)
        except UNREADABLE as error:
            unread = error
        with self.log.slowly("has waited for another"):
            self.process.raise_together(unread)
        return batch, time.monotonic() - started

    def _train_step(self, batch: Batch) -> dict[str, float]:
        settings, phase = self.settings, 1 if self.step < self.phase1_steps else 2
        if phase != self.learner.phase:
            learning = self.learner.enter_phase(phase)
            self._say(f"step {self.step}: phase {phase}, {learning:,} parameters learn")
        crops = self.stream.stage(self.step).batch
        begun = 0 if phase == 1 else self.phase1_steps
        factor, of_discriminators = (
            rate_factor(self.step, since, self.total_steps, settings) for since in (max(begun, self.alone_steps), begun)
        )
        try:
            with self.log.slowly(f"has computed step {self.step}, or waited for another in it"):
                means = self.learner.step(batch, self.step, crops, factor, of_discriminators)
        except NotFiniteError as error:
            raise UserError(
                f"step {self.step}: {error}. Repair them (`just verify` checks shards); {self._last_save()}; if the "
                "data is sound, use a lower learning_rate= or precision=fp32"
            ) from error
        self.step += 1
        return {**means, "phase": phase, "learning_rate": settings.learning_rate * factor}

    def _validation_is_due(self) -> bool:
        due = self.step % self.settings.eval_every == 0 or self.step == self.total_steps
        return due and self.step != self.validated_step

    def _validate(self) -> dict[str, float]:
        """Scores fixed crops of unseen groups; keeps the running mean of weights that does best as best.pt."""
        settings, learner = self.settings, self.learner
        length = coarse_tokens(settings.segment_length)
        means = validate(learner.averaged, self.corpus.validation, length, settings, self.process)
        self.validated_step = self.step
        self.log.metrics("validation", self.step, means)
        self._say(f"step {self.step}: validation " + ", ".join(f"{name} {mean:.4f}" for name, mean in means.items()))
        if self.boards:
            self.boards.show(self.step, learner.averaged)
        sign = -1 if settings.best_metric in HIGHER_IS_BETTER else 1
        value = sign * means[settings.best_metric]
        if math.isnan(value):
            raise UserError(
                f"best_metric={settings.best_metric} has no value on these validation crops: choose another, like lsd"
            )
        better = value < self.best
        if better:
            self.best, self.validations_since_best = value, 0
        elif self.step > self.alone_steps:
            self.validations_since_best += 1
        if self.process.is_first:
            self._keep_best(means, better)
        return means

    def _keep_best(self, means: dict[str, float], better: bool) -> None:
        settings = self.settings
        state = {**self._state(), "decoder": self.learner.ema.model.state_dict(), "validation": means}
        if better:
            self._write(checkpoint.folder(settings.run) / checkpoint.BEST, state)
        if settings.keep_best > 1:
            self._write(checkpoint.best_path(settings.run, self.step), state)
            checkpoint.prune_best(
                settings.run, settings.keep_best, settings.best_metric, settings.best_metric in HIGHER_IS_BETTER
            )

    def _keep_former_best(self) -> None:
        """What is best.pt where its successor is not compared with it.

        It is of a later step than training goes on from, where the newest checkpoints were deleted; or it was judged
        otherwise than will be now.
        """
        best = checkpoint.folder(self.settings.run) / checkpoint.BEST
        if best.exists() and ((state := checkpoint.load(best))["step"] > self.step or math.isinf(self.best)):
            former = checkpoint.keep_former_best(best, state)
            self._say(f"goes on from step {self.step}; best.pt, of step {state['step']}, stays as {former.name}")
        if math.isinf(self.best):  # the others of `keep_best` would be compared with its successors, too
            for path in best.parent.glob("best_*.pt"):
                checkpoint.keep_former_best(path, checkpoint.load(path))
                checkpoint.remove(path)

    def _checkpoint_is_due(self, validated: bool) -> bool:
        """Also beside the first best.pt, which should not stand without a checkpoint to go on from."""
        return self.step % self.settings.checkpoint_every == 0 or (
            validated and checkpoint.newest(self.settings.run) is None
        )

    def _out_of_patience(self) -> bool:
        return self.settings.patience is not None and self.validations_since_best >= self.settings.patience

    def _agree(self, asked: Requests) -> tuple[bool, bool]:
        """Whether any process was asked to leave, and whether any was to save, or it is time to."""
        minutes = self.settings.checkpoint_minutes
        due = minutes is not None and self.process.is_first and time.monotonic() - self.saved_at > 60 * minutes
        wanted = torch.tensor([asked.leave, asked.save() or due], dtype=torch.float32, device=self.process.device)
        leave, save = self.process.sum(wanted).tolist()
        return leave > 0, save > 0

    def _save(self) -> None:
        self.saved_at = time.monotonic()
        if self.process.is_first:
            state = {**self._state(), **self.learner.state_dict()}
            self.log.flush()
            self._write(checkpoint.step_path(self.settings.run, self.step), state)
            checkpoint.prune(self.settings.run, self.settings.keep_last)

    def _write(self, path: Path, state: dict[str, Any]) -> None:
        """Not below the mount point of a disk that is gone: there it is not seen once the disk is back."""
        if not (self.settings.run / "settings.json").exists():
            raise UserError(f"{self.settings.run} is gone: is it mounted? Then resume=auto goes on")
        checkpoint.save_described(path, state)

    def _save_what_is_not(self) -> None:
        """Without the other processes, which leave too. What ended training is said, whether or not this goes."""
        with suppress(OSError, UserError):
            if self.process.is_first and self.step > checkpoint.newest_step(self.settings.run):
                self._save()
                self._say(f"saved step {self.step}, as data cannot be read; resume=auto goes on from here")

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "best": self.best,
            "validations_since_best": self.validations_since_best,
            "validated_step": self.validated_step,
            "settings": self.settings.model_dump(mode="json"),
            "data": self.data,
            "snac": self.settings.pretrained_model,
            "snac_sha256": self.weights.sha256,
        }

    def _report(self, means: dict[str, float], waited: float, seconds: float) -> None:
        self.speed.add(self.stream.stage(self.step - 1).batch * means.pop(AUDIO), waited, seconds)
        values = {**means, **self.speed.values(), "memory_gib": peak_memory_gib(self.process.device)}
        self.log.progress(values)
        if self.step % self.settings.log_every == 0:
            self.log.metrics("train", self.step, values)
            self.speed.begin_anew()

    def _finish(self, left: bool, early: bool) -> None:
        self.log.bar.close()  # before the words below it
        if left:
            self._say(f"asked to leave: saved step {self.step}; resume=auto goes on from here")
        elif early:
            self._say(f"stopped at step {self.step}: {self.validations_since_best} validations without a new best")
        if not left:
            name = self.settings.best_metric
            best = -self.best if name in HIGHER_IS_BETTER else self.best
            path = checkpoint.folder(self.settings.run) / checkpoint.BEST
            self._say(f"done: {self.step} steps, best validation {name} {best:.5f} in {path}")
            model = shlex.quote(f"model={self.settings.run}")
            self._say(f"next: just export {model} out=FOLDER; `just decode` and `just eval` let you hear and judge it")
            if self.process.is_first and self.step and checkpoint.best_step(self.settings.run) == 0:
                self._say(
                    f"warning: best.pt is what training began with: no validation had a better {name}; listen to "
                    f"model={checkpoint.newest(self.settings.run)} too, or judge it with `just eval`"
                )
        self.log.close()

    def _describe(self) -> str:
        training, validation = (sum(map(len, part)) for part in (self.corpus.training, self.corpus.validation))
        together = f", the first of {self.process.world_size}" if distributed.under_torchrun() else ""
        return (
            f"{training} training and {validation} validation segments, codes by {self.weights.describe()}, "
            f"targets by {self.data['teacher']}; steps {self.step} … {self.total_steps} of "
            f"{segment_text(self.stream.stages)} on {self.process.device}, process {os.getpid()}{together}"
        )

    def _say(self, text: str) -> None:
        self.log.say(text)

    def begins_with(self) -> dict[str, Any]:
        """What all processes must have in common, beside their settings."""
        return {
            "step": self.step,
            "last step": self.total_steps,
            "samples": self.data["samples_sha256"],
            "samples to validate on": self.data["validation_sha256"],
            "teacher": self.data["teacher"],
            "best validation": self.best,
            "weights": self.learner.weights_sha256().hex(),
        }

    def _last_save(self) -> str:
        path = checkpoint.newest(self.settings.run)
        return f"resume=auto goes on from {path}" if path else "there is no checkpoint yet"

    def _resume(self, state: dict[str, Any]) -> None:
        try:
            self.learner.load_state_dict(state)
            self.step, self.data = state["step"], with_former_samples(self.data, state)
            best = checkpoint.folder(self.settings.run) / checkpoint.BEST
            if best.exists() and judges_alike(self.settings, self.data, state):
                self.best, self.validations_since_best = state["best"], state["validations_since_best"]
                self.validated_step = state.get("validated_step", self.step)  # without one, it was validated
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            path, reason = checkpoint.newest(self.settings.run), " ".join(str(error).split())[:200]
            raise UserError(f"{path} is not a checkpoint of this training ({reason}): name another run=") from error
