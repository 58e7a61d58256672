"""The decoder as training runs it: the same weights and numbers, compiled or in bfloat16 where asked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from snac.layers import Decoder, Snake1d
from torch import Tensor, nn

from shards.contract import LATENT_PER_COARSE
from trainer.decoder import NEW_BLOCK, PADDING_TOKEN, CodesToLatent, CropDecoder, run_layers


class PlainSnake(Snake1d):
    """Snake, x + sin²(αx)/α, without TorchScript: torch.compile sees through it, and its bits never change.

    snac's own is a TorchScript function: optimized, its gradients differ in the last bits with the number of calls
    before, and a resumed run would not be the uninterrupted one. The operations here are its own, in its order.
    """

    def forward(self, x_BCN: Tensor) -> Tensor:
        return x_BCN + (self.alpha + 1e-9).reciprocal() * torch.sin(self.alpha * x_BCN).pow(2)


class TrainingDecoder(CropDecoder):
    """Turns the Snakes of `decoder` into PlainSnakes.

    In bf16 the stock layers run under autocast, the new block and the head in float32: at full rate, bfloat16's
    rounding is a white noise some 50 dB below the signal, and so louder than speech is above 12 kHz.
    """

    def __init__(
        self, to_latent: CodesToLatent, decoder: Decoder, bf16: bool, compiled: bool, say: Callable[[str], None]
    ) -> None:
        super().__init__(to_latent, decoder)
        for module in decoder.modules():
            if isinstance(module, Snake1d):
                module.__class__ = PlainSnake
        self.bf16, self.say = bf16, say
        self._compiled = torch.compile(self._masked, dynamic=False) if compiled else None

    def forward(self, tokens_BT7: Tensor) -> Tensor:
        real_BT = tokens_BT7[..., 0] != PADDING_TOKEN
        real_BL = real_BT.repeat_interleave(LATENT_PER_COARSE, dim=1)
        z_BCL = self.to_latent(tokens_BT7)
        if self._compiled is not None:
            try:
                wav_BN: Tensor = self._compiled(z_BCL, real_BL)
                return wav_BN
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # what a compiler raises where it cannot work is of any kind
                reason = " ".join(str(error).split())[:200]
                self.say(f"torch.compile does not work here: going on without it ({type(error).__name__}: {reason})")
                self._compiled = None
        return self._masked(z_BCL, None if real_BT.all() else real_BL)

    def _masked(self, z_BCL: Tensor, real_BL: Tensor | None) -> Tensor:
        layers: nn.Sequential = self.decoder.model
        device = z_BCL.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.bf16):
            x_BCN = run_layers(layers[:NEW_BLOCK], z_BCL, real_BL)
        with torch.autocast(device, enabled=False):
            return run_layers(layers[NEW_BLOCK:], x_BCN.to(z_BCL.dtype), real_BL)[:, 0]
