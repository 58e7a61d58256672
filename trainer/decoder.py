"""The 48 kHz decoder: stock `snac` classes with `decoder_rates [8, 8, 4, 2, 2]`, begun as the 24 kHz decoder itself.

Shapes: tokens_BT7 (batch, coarse tokens, 7), z_BCL (batch, latent channels, latent frames), wav_BN (batch, samples).
"""

from __future__ import annotations

from typing import Any

import torch
from snac import SNAC
from snac.layers import Decoder, DecoderBlock, NoiseBlock, ResidualUnit
from torch import Tensor, nn

from shards.contract import LATENT_PER_COARSE
from shards.errors import UserError

STOCK_RATES = [8, 8, 4, 2]
RATES_48K = [*STOCK_RATES, 2]
NEW_BLOCK = 6  # index in Decoder.model: two input convolutions and four stock blocks stand before it
TAPS = 7  # of the stock head, each carried by one channel of the new block
HALF_BAND = (-1 / 16, 0, 9 / 16, 1, 9 / 16, 0, -1 / 16)
SHIFTS = {0: (0, 0), 2: (2, 0), 4: (1, 1), 6: (0, 2)}  # samples → steps of dilation 1 and of dilation 3, one direction
LINEAR_ALPHA = 1e-6  # Snake is x + sin²(αx)/α: with this α it is the identity to about −100 dB
PADDING_TOKEN = -1  # in batches only: marks the places after a crop's last token


def warm_start(snac: SNAC, noise: str, seed: int) -> Decoder:
    """A 48 kHz decoder whose output is the stock 24 kHz output interpolated by two, before the first step.

    The stock layers are copied. In the new block seven channels carry the seven taps of the stock head at the even
    positions of a zero-stuffing transposed convolution; its residual units move them into place, and the new head
    sums them with a half-band kernel. The other channels are free, drawn from `seed`, and silent in the new head.
    """
    if snac.decoder_rates != STOCK_RATES or snac.decoder_dim // 2 ** len(RATES_48K) < TAPS:
        raise UserError(f"the 24 kHz decoder has rates {snac.decoder_rates} and width {snac.decoder_dim}: not usable")
    has_noise = any(isinstance(module, NoiseBlock) for module in snac.decoder.modules())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = Decoder(
            snac.latent_dim, snac.decoder_dim, RATES_48K, has_noise, depthwise=True, attn_window_size=None
        )
    with torch.no_grad():
        for number in range(NEW_BLOCK):
            decoder.model[number].load_state_dict(snac.decoder.model[number].state_dict())
        _carry_taps(snac.decoder.model, decoder.model)
        if noise == "zero":
            silence_noise(decoder)
    return decoder


def _carry_taps(stock: Any, new: Any) -> None:
    stock_snake, stock_head = stock[NEW_BLOCK], stock[NEW_BLOCK + 1]
    snake, upsample, *rest = new[NEW_BLOCK].block
    near, middle, far = rest[-3:]
    snake.load_state_dict(stock_snake.state_dict())

    kernel = upsample.weight.detach().clone()  # (in, out, 4); position 1 meets the even output samples
    kernel[:, :TAPS] = 0
    kernel[:, :TAPS, 1] = stock_head.weight[0]
    set_kernel(upsample, kernel)
    upsample.bias[:TAPS] = 0

    for tap in range(TAPS):
        shift = 2 * (tap - TAPS // 2)  # of this tap's channel, in samples at 48 kHz: −6 … 6
        sign = -1 if shift < 0 else 1
        by_near, by_middle = SHIFTS[abs(shift)]
        _shift(near, tap, by_near * sign)
        _shift(middle, tap, by_middle * sign)
        _shift(far, tap, 0)
    if isinstance(rest[0], NoiseBlock):
        rest[0].linear.parametrizations.weight.original0.zero_()

    out_snake, head = new[NEW_BLOCK + 1], new[NEW_BLOCK + 2]
    out_snake.alpha[:, :TAPS] = LINEAR_ALPHA
    kernel = torch.zeros_like(head.weight)
    kernel[0, :TAPS] = torch.tensor(HALF_BAND)
    set_kernel(head, kernel)
    head.bias.copy_(stock_head.bias)


def _shift(unit: Any, channel: int, steps: int) -> None:
    """Makes a residual unit move one channel by `steps` of its dilation, and leave it out of the others."""
    snake_in, depthwise, snake_out, mix = unit.block
    snake_in.alpha[:, channel] = LINEAR_ALPHA
    snake_out.alpha[:, channel] = LINEAR_ALPHA
    kernel = depthwise.weight.detach().clone()  # (channels, 1, 7)
    kernel[channel] = 0
    kernel[channel, 0, TAPS // 2] -= 1
    kernel[channel, 0, TAPS // 2 + steps] += 1
    set_kernel(depthwise, kernel)
    depthwise.bias[channel] = 0
    kernel = mix.weight.detach().clone()  # (out, in, 1)
    kernel[channel] = 0
    kernel[channel, channel] = 1 if steps else 0
    set_kernel(mix, kernel)
    mix.bias[channel] = 0


def set_kernel(conv: Any, kernel: Tensor) -> None:
    """Sets a weight-normed kernel through its magnitude g and direction v; a zero kernel keeps its old direction."""
    g, v = conv.parametrizations.weight.original0, conv.parametrizations.weight.original1
    norm = kernel.flatten(1).norm(dim=1).view(-1, *[1] * (kernel.dim() - 1))
    g.copy_(norm)
    v.copy_(torch.where(norm > 0, kernel, v))


def silence_noise(decoder: nn.Module) -> None:
    """Sets the gain of every NoiseBlock to zero: decoding becomes deterministic."""
    for module in decoder.modules():
        if isinstance(module, NoiseBlock):
            module.linear.parametrizations.weight.original0.data.zero_()


def trainable(decoder: Decoder, phase: int, noise: str) -> None:
    """Sets what learns: phase 1 the new block and head, phase 2 everything; silent noise blocks never."""
    for number, layer in enumerate(decoder.model):
        layer.requires_grad_(phase == 2 or number >= NEW_BLOCK)
    if noise == "zero":
        for module in decoder.modules():
            if isinstance(module, NoiseBlock):
                module.requires_grad_(False)


class CodesToLatent(nn.Module):
    """Tokens → latent by three look-ups: what `quantizer.from_codes` computes, with codebook · out_proj done once."""

    table_0: Tensor  # (4096, latent channels), coarse
    table_1: Tensor
    table_2: Tensor

    def __init__(self, snac: SNAC) -> None:
        super().__init__()
        with torch.no_grad():
            for level, vq in enumerate(snac.quantizer.quantizers):
                table = vq.out_proj(vq.codebook.weight.T[None])[0].T.contiguous()
                self.register_buffer(f"table_{level}", table, persistent=False)

    def forward(self, tokens_BT7: Tensor) -> Tensor:
        """Places that hold PADDING_TOKEN become zero."""
        tokens = tokens_BT7.clamp(min=0)
        coarse = self.table_0[tokens[..., :1]]
        middle = self.table_1[tokens[..., 1:3]]
        fine = self.table_2[tokens[..., 3:]]
        z_BT4C = coarse + middle.repeat_interleave(2, dim=2) + fine
        z_BT4C = z_BT4C * (tokens_BT7[..., :1, None] != PADDING_TOKEN)
        return z_BT4C.flatten(1, 2).transpose(1, 2)


class CropDecoder(nn.Module):
    """Tokens → audio, in batches whose crops may end before the batch does.

    After a crop's last token every convolution must see the zeros that it sees at a recording's real end; so its
    input is masked there, layer by layer, and a short crop in a long batch decodes as it does alone.
    """

    def __init__(self, to_latent: CodesToLatent, decoder: Decoder) -> None:
        super().__init__()
        self.to_latent, self.decoder = to_latent, decoder

    def forward(self, tokens_BT7: Tensor) -> Tensor:
        real_BT = tokens_BT7[..., 0] != PADDING_TOKEN
        real_BL = None if real_BT.all() else real_BT.repeat_interleave(LATENT_PER_COARSE, dim=1)
        wav_BN: Tensor = run_layers(self.decoder.model, self.to_latent(tokens_BT7), real_BL)[:, 0]
        return wav_BN


def run_layers(layer: nn.Module, x_BCN: Tensor, real_BL: Tensor | None) -> Tensor:
    """`layer(x_BCN)`, but every convolution sees zeros where `real_BL` (batch, latent frames) is false."""
    if real_BL is None:
        return layer(x_BCN)
    if isinstance(layer, nn.Sequential):
        for inner in layer:
            x_BCN = run_layers(inner, x_BCN, real_BL)
        return x_BCN
    if isinstance(layer, DecoderBlock):
        return run_layers(layer.block, x_BCN, real_BL)
    if isinstance(layer, ResidualUnit):
        return x_BCN + run_layers(layer.block, x_BCN, real_BL)
    if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):
        x_BCN = x_BCN * real_BL.repeat_interleave(x_BCN.shape[-1] // real_BL.shape[1], dim=1)[:, None]
    return layer(x_BCN)
