"""The 48 kHz decoder: stock `snac` classes with `decoder_rates [8, 8, 4, 2, 2]`, begun as the 24 kHz decoder itself.

Shapes: tokens_BT7 (batch, coarse tokens, 7), z_BCL (batch, latent channels, latent frames), wav_BN (batch, samples).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from snac import SNAC
from snac.layers import Decoder, DecoderBlock, NoiseBlock, ResidualUnit
from torch import Tensor, nn

from shards.contract import CONTEXT_COARSE, LATENT_PER_COARSE
from shards.errors import UserError

STOCK_RATES = [8, 8, 4, 2]
RATES_48K = [*STOCK_RATES, 2]
NEW_BLOCK = 6  # index in Decoder.model: two input convolutions and four stock blocks stand before it
CONTEXT_FRAMES = CONTEXT_COARSE * LATENT_PER_COARSE
TAPS = 7  # of the stock head, each carried by one channel of the new block
HALF_BAND = (-1 / 16, 0, 9 / 16, 1, 9 / 16, 0, -1 / 16)
SHIFTS = {0: (0, 0), 2: (2, 0), 4: (1, 1), 6: (0, 2)}  # samples → steps of dilation 1 and of dilation 3, one direction
LINEAR_ALPHA = 1e-6  # Snake is x + sin²(αx)/α: with this α it is the identity to about −100 dB
PADDING_TOKEN = -1  # in batches only: marks the places before a recording's first token and after its last


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

    def same_tokens(self, other: CodesToLatent) -> bool:
        return all(torch.equal(a, b) for a, b in zip(self.buffers(), other.buffers(), strict=True))

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
    """Crops with CONTEXT_COARSE tokens of context at both ends → the audio of the crops alone.

    Where a recording begins or ends, tokens are PADDING_TOKEN, and the input of every convolution is masked: it sees
    the zeros that it sees when the recording is decoded whole. Each layer gets only the context that its successors
    can reach, which is next to nothing at the rates where decoding takes its time.
    """

    def __init__(self, to_latent: CodesToLatent, decoder: Decoder) -> None:
        super().__init__()
        self.to_latent, self.decoder = to_latent, decoder
        self.context = context_frames(decoder.model)
        assert self.context[0] <= CONTEXT_FRAMES

    def forward(self, tokens_BT7: Tensor) -> Tensor:
        real_BT = tokens_BT7[..., 0] != PADDING_TOKEN
        real_BL: Tensor | None = real_BT.repeat_interleave(LATENT_PER_COARSE, dim=1)
        if real_BT.device.type == "cpu" and real_BT.all():  # to ask a GPU would be to wait for it
            real_BL = None
        return self.decode(self.to_latent(tokens_BT7), real_BL)

    def decode(self, z_BCL: Tensor, real_BL: Tensor | None) -> Tensor:
        x_BCN, frames, given = z_BCL, z_BCL.shape[-1], CONTEXT_FRAMES
        for number, needed in enumerate(self.context):
            spare = given - needed
            x_BCN = _without_ends(x_BCN, spare * (x_BCN.shape[-1] // frames))
            real_BL = None if real_BL is None else _without_ends(real_BL, spare)
            x_BCN = self.run_layer(number, x_BCN, real_BL)
            frames, given = frames - 2 * spare, needed
        return x_BCN[:, 0]

    def run_layer(self, number: int, x_BCN: Tensor, real_BL: Tensor | None) -> Tensor:
        return run_module(self.decoder.model[number], x_BCN, real_BL)


def context_frames(layers: nn.Sequential) -> list[int]:
    """Latent frames of context that each layer must be given at both ends, for the audio between them to be exact."""
    convolutions = [[m for m in layer.modules() if isinstance(m, nn.Conv1d | nn.ConvTranspose1d)] for layer in layers]
    reach, found = 0, list[int]()  # in samples at the rate before a layer
    per_frame = math.prod(conv.stride[0] for of_layer in convolutions for conv in of_layer)
    for of_layer in reversed(convolutions):
        for conv in reversed(of_layer):
            if isinstance(conv, nn.ConvTranspose1d):
                reach = (reach + int(conv.padding[0]) - 1) // conv.stride[0] + 1
                per_frame //= conv.stride[0]
            else:
                reach += conv.dilation[0] * (conv.kernel_size[0] // 2)
        found.append(-(-reach // per_frame))
    return found[::-1]


def padded(tokens_BT7: Tensor) -> Tensor:
    """Whole recordings as crops without context."""
    return nn.functional.pad(tokens_BT7, (0, 0, CONTEXT_COARSE, CONTEXT_COARSE), value=PADDING_TOKEN)


def _without_ends(x: Tensor, size: int) -> Tensor:
    return x[..., size : x.shape[-1] - size]


def run_module(module: nn.Module, x_BCN: Tensor, real_BL: Tensor | None) -> Tensor:
    """`module(x_BCN)`, but every convolution sees zeros where `real_BL` (batch, latent frames) is false."""
    if isinstance(module, nn.Sequential):
        for inner in module:
            x_BCN = run_module(inner, x_BCN, real_BL)
        return x_BCN
    if isinstance(module, DecoderBlock):
        return run_module(module.block, x_BCN, real_BL)
    if isinstance(module, ResidualUnit):
        return x_BCN + run_module(module.block, x_BCN, real_BL)
    if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
        if real_BL is not None:
            x_BCN = x_BCN * real_BL.repeat_interleave(x_BCN.shape[-1] // real_BL.shape[1], dim=1)[:, None]
        if module.groups == module.in_channels and x_BCN.device.type == "cpu":
            return folded_depthwise(x_BCN, module.weight, module.bias, module.dilation[0])
    return module(x_BCN)


def folded_depthwise(x_BCN: Tensor, kernel_C1K: Tensor, bias_C: Tensor | None, dilation: int) -> Tensor:
    """A dilated depthwise convolution that keeps the length, as an undilated one down an image as wide as the dilation.

    On a CPU oneDNN takes a third of the time for it in this form, forward and backward.
    """
    length, rows = x_BCN.shape[-1], -(-x_BCN.shape[-1] // dilation)
    image_BCRD = nn.functional.pad(x_BCN, (0, rows * dilation - length)).unflatten(-1, (rows, dilation))
    padding = (kernel_C1K.shape[-1] // 2, 0)
    image_BCRD = nn.functional.conv2d(
        image_BCRD, kernel_C1K[..., None], bias_C, padding=padding, groups=len(kernel_C1K)
    )
    return image_BCRD.flatten(-2)[..., :length]
