"""Everything that learns, and one optimizer step of it on a global batch.

The global batch is the unit: every loss is a mean over its crops, whatever their split into micro-batches and over
processes. The discriminators step first; then the decoder, against the discriminators as they are now.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from snac.layers import Decoder
from torch import Tensor, nn

from shards.contract import TARGET_RATE
from shards.errors import UserError
from shards.order import random_words
from trainer.adversary import Adversary
from trainer.balancer import Balancer
from trainer.data import Batch
from trainer.decoder import CodesToLatent, CropDecoder, trainable
from trainer.distributed import Process
from trainer.ema import Ema
from trainer.losses import reconstruction, weighted
from trainer.micro import MicroBatches
from trainer.settings import BETAS, TrainSettings
from trainer.training_decoder import TrainingDecoder

AUDIO = "audio_seconds"  # of a crop, without what pads a short one


class NotFiniteError(UserError):
    """A loss or gradient is NaN or infinite; no optimizer step was made with it."""


class Learner:
    def __init__(
        self,
        to_latent: CodesToLatent,
        decoder: Decoder,
        settings: TrainSettings,
        process: Process,
        say: Callable[[str], None],
    ) -> None:
        self.settings, self.process, self.weights = settings, process, settings.weights
        device, on_gpu = process.device, process.device.type == "cuda"
        bf16 = settings.precision == "bf16" or (
            settings.precision == "auto" and on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        )
        compiled = on_gpu if settings.compile == "auto" else settings.compile
        self.model = TrainingDecoder(to_latent, decoder, settings.noise, bf16, compiled, say).to(device)
        self.decoder = decoder
        self.ema = Ema(decoder, settings.ema_decay)
        self.averaged = CropDecoder(to_latent, self.ema.model)
        self.optimizer = torch.optim.AdamW(decoder.parameters(), settings.learning_rate, BETAS, fused=True)
        self.adversary = Adversary(settings, device, bf16) if settings.is_adversarial else None
        self.balancer = Balancer(self.weights) if settings.balance_losses else None
        self.micro = MicroBatches(settings.micro_batch, device, say)
        self.phase = 0

    def enter_phase(self, phase: int) -> int:
        """What learns from now on; returns the number of its parameters."""
        self.phase = phase
        trainable(self.decoder, phase, self.settings.noise)
        self.model.forget_graphs()
        return sum(parameter.numel() for parameter in self.decoder.parameters() if parameter.requires_grad)

    def step(
        self, batch: Batch, step: int, crops: int, rate_factor: float, discriminator_rate_factor: float = 1.0
    ) -> dict[str, float]:
        """This process's share `batch` of a global batch of `crops` → its means: losses, gradient norms, AUDIO.

        Raises NotFiniteError before the optimizer step that a value which is not finite would spoil.
        """
        settings, means = self.settings, dict[str, float]()
        seed = int(random_words(1, settings.seed, "noise", step, self.process.rank)[0])
        if self.adversary:
            _set_rate(self.adversary.optimizer, settings.discriminator_learning_rate * discriminator_rate_factor)
            work = self._discriminator_work(crops)
            means |= self._optimize(self.adversary.optimizer, settings.discriminator_clip, work, batch, crops, seed)
            means["discriminator_grad_norm"] = means.pop("grad_norm")
            if step < settings.discriminator_start:
                return means
        _set_rate(self.optimizer, settings.learning_rate * rate_factor)
        work = self._decoder_work(crops)
        means |= self._optimize(self.optimizer, settings.gradient_clip, work, batch, crops, seed)
        self.ema.update()
        if self.balancer:
            self.balancer.update(means)
        return means

    def state_dict(self) -> dict[str, Any]:
        owned = {"adversary": self.adversary, "balancer": self.balancer}
        return {
            "decoder": self.decoder.state_dict(),
            "ema": self.ema.model.state_dict(),
            "ema_updates": self.ema.updates,
            "optimizer": self.optimizer.state_dict(),
            "micro_batch": self.micro.state_dict(),
            **{name: part.state_dict() for name, part in owned.items() if part},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.decoder.load_state_dict(state["decoder"])
        self.ema.model.load_state_dict(state["ema"])
        self.ema.updates = state["ema_updates"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.micro.load_state_dict(state["micro_batch"])
        if self.adversary:
            self.adversary.load_state_dict(state["adversary"])
        if self.balancer:
            self.balancer.load_state_dict(state["balancer"])

    def weights_sha256(self) -> bytes:
        """Of the decoder and the discriminators."""
        digest = hashlib.sha256()
        for part in (self.decoder, self.adversary.discriminators) if self.adversary else (self.decoder,):
            for tensor in part.state_dict().values():
                digest.update(tensor.cpu().contiguous().numpy())
        return digest.digest()

    def _optimize(
        self,
        optimizer: torch.optim.Optimizer,
        clip: float,
        work: Callable[[Batch], dict[str, Tensor]],
        batch: Batch,
        crops: int,
        seed: int,
    ) -> dict[str, float]:
        """Gradients of `work` over the global batch, checked and clipped, then the optimizer's step."""

        def begin() -> None:
            torch.manual_seed(seed)  # of noise blocks
            optimizer.zero_grad(set_to_none=True)

        found = self.micro.run(batch, begin, work)
        per_crop = {name: torch.cat([values[name] for values in found]) for name in found[0]}
        learning = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self.process.sum_gradients(learning)
        norm = nn.utils.clip_grad_norm_(learning, clip)
        sums = self.process.sum(torch.stack([value_B.sum() for value_B in per_crop.values()]))
        means = dict(zip(per_crop, (sums / crops).tolist(), strict=True)) | {"grad_norm": float(norm)}
        if not all(map(math.isfinite, means.values())):
            losses_are = all(math.isfinite(means[name]) for name in per_crop)
            raise NotFiniteError(
                f"{means} is not finite; stopped before the optimizer step. "
                f"{_at_fault(per_crop.values(), batch.keys, losses_are)}"
            )
        optimizer.step()
        return means

    def _decode(self, part: Batch) -> Tensor:
        return part.only_real(self.model(part.tokens_BT7))

    def _discriminator_work(self, crops: int) -> Callable[[Batch], dict[str, Tensor]]:
        adversary = self.adversary
        assert adversary

        def work(part: Batch) -> dict[str, Tensor]:
            with torch.no_grad():
                wav_BN = self._decode(part)
            loss_B = adversary.discriminator_loss(wav_BN, part)
            (loss_B.sum() / crops).backward()
            return {"discriminator": loss_B.detach(), AUDIO: part.valid_B / TARGET_RATE}

        return work

    def _decoder_work(self, crops: int) -> Callable[[Batch], dict[str, Tensor]]:
        def work(part: Batch) -> dict[str, Tensor]:
            wav_BN = self._decode(part)
            terms = reconstruction(wav_BN, part.target_BN, part.valid_B, self.weights, self.settings.n_ffts)
            if self.adversary:
                terms |= self.adversary.generator_terms(wav_BN, part)
            loss_B, norms = weighted(terms, self.weights), dict[str, Tensor]()
            if self.balancer:
                gradient_BN, norms = self.balancer.gradient(terms, wav_BN)
                wav_BN.backward(gradient_BN / crops)
            else:
                (loss_B.sum() / crops).backward()
            values = {"loss": loss_B, **terms, **norms, AUDIO: part.valid_B / TARGET_RATE}
            return {name: value_B.detach() for name, value_B in values.items()}

        return work


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _at_fault(values: Iterable[Tensor], keys: list[str], losses_are_finite: bool) -> str:
    """Which crops of this process have a value that is not finite; all may, when only the gradient is not."""
    finite_B = torch.stack([value_B.isfinite() for value_B in values]).all(dim=0).tolist()
    bad = [key for key, finite in zip(keys, finite_B, strict=True) if not finite]
    if not bad and not losses_are_finite:
        return "The crops at fault are another process's, whose own error names them"
    return f"Keys of the batch here: {', '.join(bad or keys)}"
