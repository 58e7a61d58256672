"""Training: reads top to bottom. The order of data and every random draw are functions of (seed, step)."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from codec.snac import load_snac
from shards.contract import COARSE_48K, TARGET_RATE, coarse_tokens
from shards.errors import SettingsError, UserError
from shards.files import exclusive
from shards.index import load
from shards.order import Order, random_words
from shards.writer import differences
from trainer import checkpoint, distributed
from trainer.data import Batch, fixed_batches, training_batches
from trainer.decoder import CodesToLatent, CropDecoder, trainable, warm_start
from trainer.distributed import Process
from trainer.log import RunLog
from trainer.settings import TrainSettings
from trainer.validation import VALIDATION_NAMES, crop_losses, validation_sums

BETAS = (0.8, 0.99)  # of AdamW, as vocoders use them (HiFi-GAN, DAC)
FREE_TO_CHANGE = {  # settings that may differ between a run and its resumption
    "shards", "run", "pretrained_model", "gpu", "micro_batch_size", "num_workers", "num_epochs", "max_steps",
    "eval_batch_size", "checkpoint_every", "keep_last", "log_every", "resume",
}  # fmt: skip
TERMINATED = 143  # exit code of a process that SIGTERM ended


def train(settings: TrainSettings) -> None:
    """Trains to the end, or until SIGTERM: then saves and leaves with exit code 143 (1 where torchrun stands above)."""
    if isinstance(settings.gpu, str) and settings.gpu != "cpu" and not distributed.under_torchrun():
        distributed.launch(settings.gpu)
    process = distributed.start(settings.gpu)
    with exclusive(settings.run) if process.is_first else nullcontext():
        finished = Trainer(settings, process).run()
    distributed.stop(process)  # not after an error: it would wait for processes that wait for this one
    if not finished:
        sys.exit(TERMINATED)


class Trainer:
    """Everything a step needs, built in the order in which it is checked."""

    def __init__(self, settings: TrainSettings, process: Process) -> None:
        self.settings, self.process = settings, process
        if settings.batch_size < process.world_size:
            raise SettingsError(f"batch_size={settings.batch_size} is less than the {process.world_size} processes")
        self.training, self.validation = load(settings.shards, "train"), load(settings.shards, "validation")
        self.snac, self.weights = load_snac(settings.pretrained_model)
        self._check_data()
        self.order = Order(self.training.counts, settings.seed, settings.batch_size, settings.window_shards)
        self.total_steps = settings.max_steps or self.order.steps(settings.num_epochs)
        self.length = coarse_tokens(settings.segment_length)

        self.decoder = warm_start(self.snac, settings.noise, settings.seed)
        self.model = CropDecoder(CodesToLatent(self.snac), self.decoder).to(process.device)
        self.optimizer = torch.optim.AdamW(self.decoder.parameters(), lr=settings.learning_rate, betas=BETAS)
        self.step, self.best = 0, math.inf
        self._resume()
        process.wait()  # nobody writes before everybody has read
        if process.is_first:
            settings.write(settings.run / "settings.json")
        self.log = RunLog(settings.run, self.step, self.total_steps, process.is_first)

    @torch.jit.optimized_execution(False)  # type: ignore[attr-defined]
    def run(self) -> bool:
        """Whether training came to its end; False when SIGTERM asked it to leave.

        TorchScript (snac's snake) runs as written: optimized, its gradients differ in the last bits with the number
        of calls before, and a resumed run would not be the uninterrupted one.
        """
        settings, log = self.settings, self.log
        log.say(
            f"{len(self.training)} training and {len(self.validation)} validation segments, codes by "
            f"{self.weights.describe()}, targets by {self.training.fingerprint['teacher']}; steps {self.step} … "
            f"{self.total_steps} of {settings.batch_size} × {self.length} coarse tokens on {self.process.device}"
        )
        if self.step == 0:
            self._validate()
        batches = training_batches(
            self.training,
            self.order,
            range(self.step, self.total_steps),
            self.length,
            settings.num_workers,
            self.process.rank,
            self.process.world_size,
        )
        with stop_requested() as stop, closing(batches):
            model, phase, started = nn.Module(), 0, time.monotonic()
            for batch in batches:
                if self._phase() != phase:
                    phase = self._phase()
                    model = self._enter_phase(phase)
                waited = time.monotonic() - started
                losses, leave = self._train_step(model, batch, bool(stop))
                self.step += 1
                seconds = time.monotonic() - started
                self._report(losses, phase, waited / seconds, settings.batch_size * self.length / seconds)
                if self.step % settings.eval_every == 0 or self.step == self.total_steps:
                    self._validate()
                if self.step % settings.checkpoint_every == 0 or self.step == self.total_steps or leave:
                    self._save()
                if leave:
                    log.say(f"SIGTERM: saved step {self.step}; resume=auto goes on from here")
                    return False
                started = time.monotonic()
        log.bar.close()
        log.say(
            f"done: {self.total_steps} steps, best validation loss {self.best:.5f}, {checkpoint.BEST} in {settings.run}"
        )
        log.close()
        return True

    def _train_step(self, model: nn.Module, batch: Batch, stop: bool) -> tuple[dict[str, float], bool]:
        """One optimizer step on a global batch → its mean losses and gradient norm, and whether to leave.

        Raises UserError before the optimizer step when a loss or gradient is not finite.
        """
        settings, process = self.settings, self.process
        torch.manual_seed(int(random_words(1, settings.seed, "noise", self.step, process.rank)[0]))
        self.optimizer.zero_grad(set_to_none=True)
        values: dict[str, list[Tensor]] = {}
        parts = list(batch.split(settings.micro_batch_size or len(batch)))
        for number, part in enumerate(parts, start=1):
            more = number < len(parts)
            with model.no_sync() if isinstance(model, DistributedDataParallel) and more else nullcontext():
                losses = crop_losses(model, part.to(process.device), settings)[1]
                # DDP averages over processes, so their number makes it a sum over the global batch again
                (losses["loss"].sum() * process.world_size / settings.batch_size).backward()
            for name, value_B in losses.items():
                values.setdefault(name, []).append(value_B.detach())
        per_crop = {name: torch.cat(parts) for name, parts in values.items()}
        sums = torch.stack([value_B.sum() for value_B in per_crop.values()])
        *totals, leave = process.sum(torch.cat([sums, sums.new_tensor([stop])])).tolist()
        means = {name: total / settings.batch_size for name, total in zip(per_crop, totals, strict=True)}
        learning = [parameter for parameter in self.decoder.parameters() if parameter.requires_grad]
        means["grad_norm"] = float(nn.utils.clip_grad_norm_(learning, settings.gradient_clip))
        if not all(map(math.isfinite, means.values())):
            finite = per_crop["loss"].isfinite().tolist()
            keys = [key for key, ok in zip(batch.keys, finite, strict=True) if not ok] or batch.keys
            raise UserError(
                f"step {self.step}: {means} is not finite; stopped before the optimizer step. Keys of the batch here: "
                f"{', '.join(keys)}. Mend them (`just verify` checks shards); {self._last_save()}"
            )
        self.optimizer.step()
        return means, leave > 0

    def _validate(self) -> None:
        """Scores fixed crops of unseen groups; keeps the decoder with the least loss as best.pt."""
        settings, process = self.settings, self.process
        torch.manual_seed(settings.seed)
        batches = fixed_batches(
            self.validation,
            settings.eval_samples,
            settings.eval_batch_size,
            self.length,
            settings.seed,
            process.rank,
            process.world_size,
        )
        sums = process.sum(validation_sums(self.model, batches, settings, process.device)).tolist()
        count = min(settings.eval_samples, len(self.validation))
        means = {name: value / count for name, value in zip(VALIDATION_NAMES, sums, strict=True)}
        self.log.metrics("validation", self.step, means)
        self.log.say(f"step {self.step}: validation " + ", ".join(f"{name} {mean:.4f}" for name, mean in means.items()))
        if means["loss"] < self.best:
            self.best = means["loss"]
            if process.is_first:
                path = checkpoint.folder(settings.run) / checkpoint.BEST
                checkpoint.save(path, {**self._state(), "validation": means})

    def _phase(self) -> int:
        return 1 if self.step < self.settings.phase1_steps else 2

    def _enter_phase(self, phase: int) -> nn.Module:
        trainable(self.decoder, phase, self.settings.noise)
        learning = sum(parameter.numel() for parameter in self.decoder.parameters() if parameter.requires_grad)
        self.log.say(f"step {self.step}: phase {phase}, {learning:,} parameters learn")
        if self.process.world_size == 1:
            return self.model
        return DistributedDataParallel(self.model, broadcast_buffers=False)

    def _report(self, losses: dict[str, float], phase: int, wait_share: float, coarse_per_second: float) -> None:
        audio_rate = coarse_per_second * COARSE_48K / TARGET_RATE
        self.log.bar.update()
        self.log.bar.set_postfix_str(f"phase {phase}, loss {losses['loss']:.4f}, {audio_rate:.1f} audio s/s")
        if self.step % self.settings.log_every == 0:
            values = {**losses, "phase": phase, "audio_seconds_per_second": audio_rate, "data_wait_share": wait_share}
            self.log.metrics("train", self.step, values)

    def _state(self) -> dict[str, Any]:
        return {
            "decoder": self.decoder.state_dict(),
            "step": self.step,
            "best": self.best,
            "settings": self.settings.model_dump(mode="json"),
            "data": {"index_sha256": self.training.sha256, **self.training.fingerprint},
            "snac": self.settings.pretrained_model,
            "snac_sha256": self.weights.sha256,
        }

    def _save(self) -> None:
        if self.process.is_first:
            state = {**self._state(), "optimizer": self.optimizer.state_dict()}
            checkpoint.save(checkpoint.step_path(self.settings.run, self.step), state)
            checkpoint.prune(self.settings.run, self.settings.keep_last)

    def _last_save(self) -> str:
        path = checkpoint.newest(self.settings.run)
        return f"resume=auto goes on from {path}" if path else "there is no checkpoint yet"

    def _check_data(self) -> None:
        for index in (self.training, self.validation):
            if not len(index):
                raise UserError(f"{self.settings.shards} has no usable segment in the split {index.split}")
        changed = differences(self.training.fingerprint["snac_sha256"], self.weights.sha256)
        if changed:
            raise UserError(
                f"{self.settings.shards} holds codes of another SNAC than pretrained_model="
                f"{self.settings.pretrained_model} ({changed})"
            )

    def _resume(self) -> None:
        path = checkpoint.newest(self.settings.run)
        if path is None and not (checkpoint.folder(self.settings.run) / checkpoint.BEST).exists():
            return
        if self.settings.resume == "never":
            raise UserError(f"{self.settings.run} holds checkpoints: resume=auto goes on from them, run= names another")
        if path is None:  # it ended before its first checkpoint
            return
        state = checkpoint.load(path)
        if "optimizer" not in state:
            raise UserError(f"{path} holds no optimizer: it is no checkpoint to resume from")
        then = {name: value for name, value in state["settings"].items() if name not in FREE_TO_CHANGE}
        now = self.settings.model_dump(mode="json", exclude=FREE_TO_CHANGE)
        changed = differences({**then, "index": state["data"]["index_sha256"]}, {**now, "index": self.training.sha256})
        if changed:
            raise UserError(f"{path} cannot be resumed with other settings or data: {changed}; take another run=")
        self.decoder.load_state_dict(state["decoder"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best = state["step"], state["best"]


class _Stop:
    asked = False

    def __bool__(self) -> bool:
        return self.asked


@contextmanager
def stop_requested() -> Iterator[_Stop]:
    """Something that becomes true when SIGTERM arrives."""
    stop = _Stop()

    def ask(number: int, frame: Any) -> None:
        stop.asked = True

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
