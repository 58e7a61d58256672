"""The decoder as training runs it: the same weights and numbers, compiled or in bfloat16 where asked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from snac.layers import Decoder, NoiseBlock, Snake1d
from torch import Tensor

from codec.memory import ran_out
from trainer.decoder import NEW_BLOCK, CodesToLatent, CropDecoder

MAX_GRAPHS = 64  # one for each size of micro-batch and length of crop, with gradients and without


class PlainSnake(Snake1d):
    """Snake, x + sin²(αx)/α, without TorchScript: compilers and exporters see through it, and its bits never change.

    snac's own is a TorchScript function: optimized, its gradients differ in the last bits with the number of calls
    before, and a resumed run would not be the uninterrupted one. The operations here are its own, in its order.
    """

    def forward(self, x_BCN: Tensor) -> Tensor:
        return x_BCN + (self.alpha + 1e-9).reciprocal() * torch.sin(self.alpha * x_BCN).pow(2)


class SilentNoise(NoiseBlock):
    """Noise whose gain is zero and stays so: not drawn, and not convolved at full rate to be multiplied by zero."""

    def forward(self, x_BCN: Tensor) -> Tensor:
        return x_BCN


class TrainingDecoder(CropDecoder):
    """Turns the Snakes of `decoder` into PlainSnakes and, with `noise=zero`, its noise blocks into SilentNoise.

    In bf16 the stock layers run under autocast, the new block and the head in float32: at full rate, bfloat16's
    rounding is a white noise some 50 dB below the signal, and so louder than speech is above 12 kHz.
    """

    def __init__(
        self,
        to_latent: CodesToLatent,
        decoder: Decoder,
        noise: str,
        bf16: bool,
        compiled: bool,
        say: Callable[[str], None],
    ) -> None:
        super().__init__(to_latent, decoder)
        for module in decoder.modules():
            if isinstance(module, Snake1d):
                module.__class__ = PlainSnake
            elif isinstance(module, NoiseBlock) and noise == "zero":
                module.__class__ = SilentNoise
        self.bf16, self.say = bf16, say
        self._compiled = None
        if compiled:  # inductor would turn the images of `folded_depthwise` to channels last and back
            torch._dynamo.config.recompile_limit = MAX_GRAPHS
            torch._functorch.config.force_non_lazy_backward_lowering = True  # in backward() it would fail uncaught
            torch._dynamo.config.fail_on_recompile_limit_hit = True  # else it goes on uncompiled without a word
            self._compiled = torch.compile(super().decode, dynamic=False, options={"layout_optimization": False})

    def forget_graphs(self) -> None:
        """To be called when other parameters learn than before: Dynamo does not notice, and its graph of the old ones
        would give the others no gradient.
        """
        if self._compiled is not None:
            torch.compiler.reset()
            self.say("torch.compile: the next step may take minutes")

    def decode(self, z_BCL: Tensor, real_BL: Tensor | None) -> Tensor:
        if self._compiled is None:
            return super().decode(z_BCL, real_BL)
        if real_BL is None:  # one graph serves all batches
            real_BL = torch.ones_like(z_BCL[:, 0], dtype=torch.bool)
        try:
            wav_BN: Tensor = self._compiled(z_BCL, real_BL)
            return wav_BN
        except Exception as error:  # what a compiler raises where it cannot work is of any kind
            if ran_out(error):
                raise
            reason = " ".join(str(error).split())[:200]
            self.say(f"torch.compile does not work here: going on without it ({type(error).__name__}: {reason})")
            self._compiled = None
            return super().decode(z_BCL, real_BL)

    def run_layer(self, number: int, x_BCN: Tensor, real_BL: Tensor | None) -> Tensor:
        if not self.bf16:
            return super().run_layer(number, x_BCN, real_BL)
        stock = number < NEW_BLOCK
        with torch.autocast(x_BCN.device.type, torch.bfloat16, enabled=stock):
            return super().run_layer(number, x_BCN if stock else x_BCN.float(), real_BL)
