"""The 48 kHz decoder for inference: weight norm folded, noise left out, in two forms.

`folded` gives the stock layers for whole sequences (ONNX). `StepDecoder` runs the same layers step by step: each
convolution keeps what the next step still needs of its input, so nothing is computed twice, and a step's signals stay
in the processor's cache. Its output comes `delay` samples late, when the last token that a sample depends on is known.

Shapes: z_NBC (latent frames, streams, channels), x_NBC at any rate likewise, wav_NB (samples, streams).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from snac import SNAC
from snac.layers import Decoder, NoiseBlock, Snake1d
from torch import Tensor, nn
from torch.nn.utils import parametrize

from shards.contract import LATENT_PER_COARSE
from trainer.decoder import RATES_48K, CodesToLatent
from trainer.kernels import TAPS, Snake, depthwise, depthwise_snake, snake
from trainer.training_decoder import PlainSnake

DILATIONS = (1, 3, 9)  # of a block's residual units
HEAD_COLUMNS = 8  # the head's 7 taps as one matrix product, which is quicker with one column more


def folded(module: nn.Module) -> nn.Module:
    """A frozen copy of stock layers: weight norm folded into the kernels, noise blocks left out, Snake plain."""
    plain = copy.deepcopy(module)
    for parent in list(plain.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, NoiseBlock):
                setattr(parent, name, nn.Identity())
            elif isinstance(child, Snake1d):
                child.__class__ = PlainSnake
            elif parametrize.is_parametrized(child, "weight"):
                setattr(parent, name, _unnormed(child))
    return plain.eval().requires_grad_(False)


def _unnormed(conv: Any) -> nn.Module:
    """Made anew: copies of a parametrized module share their class, so that unparametrizing one would break all."""
    kind = nn.ConvTranspose1d if isinstance(conv, nn.ConvTranspose1d) else nn.Conv1d
    names = ("kernel_size", "stride", "padding", "dilation", "groups")
    options = {name: getattr(conv, name) for name in names}
    plain: Any = kind(conv.in_channels, conv.out_channels, bias=conv.bias is not None, **options)
    plain.weight = nn.Parameter(conv.weight.detach().clone())
    if conv.bias is not None:
        plain.bias = nn.Parameter(conv.bias.detach().clone())
    return plain


def draws_noise(decoder: nn.Module) -> bool:
    """Whether the stock class would add noise, so that its output differs from run to run."""
    blocks = (module for module in decoder.modules() if isinstance(module, NoiseBlock))
    return any(bool(block.linear.weight.any()) for block in blocks)


class Line:
    """A signal as one layer needs it: `history` rows of earlier steps, then the rows of this step."""

    def __init__(self, history: int, rows: int, streams: int, like: Tensor) -> None:
        self.history, self.rows = history, rows
        self.all = like.new_zeros(history + rows, streams, like.shape[-1])
        self.new = self.all[history:]

    def advance(self) -> None:
        self.all[: self.history] = self.all[self.rows :].clone()

    def take_history(self, other: Line) -> None:
        self.all[: self.history] = other.all[: self.history]


class Input:
    """The two convolutions before the first block: depthwise, then 1×1 to the decoder's width."""

    delay = TAPS // 2  # in rows of its input

    def __init__(self, spread: Any, widen: Any) -> None:
        self.kernel, self.bias = _taps(spread), spread.bias
        self.mix, self.mix_bias = _matrix(widen), widen.bias

    def lines(self, rows: int, streams: int) -> list[Line]:
        return [Line(TAPS - 1, rows, streams, self.bias)]

    def run(self, lines: list[Line], scratch: Tensor, out_NBC: Tensor) -> None:
        spread = _view(scratch, lines[0].new)
        depthwise(lines[0].all, self.kernel, self.bias, 1, spread)
        torch.addmm(self.mix_bias, _flat(spread), self.mix, out=_flat(out_NBC))


class Upsample:
    """Snake and a transposed convolution whose kernel is two strides long: row n gives s samples from inputs n−1, n."""

    def __init__(self, activation: Any, transposed: Any) -> None:
        (self.stride,) = transposed.stride
        assert transposed.weight.shape[2] == 2 * self.stride == 4 * transposed.padding[0]
        self.snake = Snake.of(activation)
        kernel_ISO = transposed.weight.transpose(1, 2)
        self.of_this, self.of_last = (part.flatten(1).contiguous() for part in kernel_ISO.split(self.stride, dim=1))
        self.bias = transposed.bias.repeat(self.stride)

    def lines(self, rows: int, streams: int) -> list[Line]:
        return [Line(history, rows, streams, self.snake.alpha) for history in (0, 1)]

    def run(self, lines: list[Line], scratch: Tensor, out_NBC: Tensor) -> None:
        raw, active = lines
        snake(raw.new, self.snake, active.new)
        _, streams, channels = out_NBC.shape
        interleaved = streams > 1  # a row's s samples of one stream lie together, out wants streams together
        product = (_view(scratch, out_NBC) if interleaved else out_NBC).view(-1, self.stride * channels)
        torch.addmm(self.bias, _flat(active.all[:-1]), self.of_last, out=product)
        product.addmm_(_flat(active.new), self.of_this)
        if interleaved:
            apart = product.view(raw.rows, streams, self.stride, channels)
            out_NBC.view(raw.rows, self.stride, streams, channels).copy_(apart.transpose(1, 2))


class Residual:
    """x + mix(Snake(depthwise(Snake(x))))."""

    def __init__(self, unit: Any, dilation: int) -> None:
        first, spread, second, mix = unit.block
        self.dilation, self.delay = dilation, dilation * (TAPS // 2)
        self.first, self.second = Snake.of(first), Snake.of(second)
        self.kernel, self.bias = _taps(spread), spread.bias
        self.mix, self.mix_bias = _matrix(mix), mix.bias

    def lines(self, rows: int, streams: int) -> list[Line]:
        return [Line(history, rows, streams, self.bias) for history in (self.delay, 2 * self.delay)]

    def run(self, lines: list[Line], scratch: Tensor, out_NBC: Tensor) -> None:
        raw, active = lines
        snake(raw.new, self.first, active.new)
        spread = _view(scratch, out_NBC)
        depthwise_snake(active.all, self.kernel, self.bias, self.dilation, self.second, spread)
        torch.add(raw.all[: raw.rows], self.mix_bias, out=out_NBC)
        _flat(out_NBC).addmm_(_flat(spread), self.mix)


class Head:
    """Snake, a convolution of 7 taps to one channel, tanh."""

    delay = TAPS // 2

    def __init__(self, activation: Any, convolution: Any) -> None:
        self.snake, self.bias = Snake.of(activation), convolution.bias
        self.taps = nn.functional.pad(convolution.weight[0], (0, HEAD_COLUMNS - TAPS)).contiguous()

    def lines(self, rows: int, streams: int) -> list[Line]:
        return [Line(history, rows, streams, self.snake.alpha) for history in (0, TAPS - 1)]

    def run(self, lines: list[Line], scratch: Tensor, out_NBC: Tensor) -> None:
        raw, active = lines
        snake(raw.new, self.snake, active.new)
        each_NBK = (_flat(active.all) @ self.taps).view(*active.all.shape[:2], HEAD_COLUMNS)
        each_KNB = each_NBK.permute(2, 0, 1).contiguous()
        wav_NB = self.bias + each_KNB[0, : raw.rows]
        for tap in range(1, TAPS):
            wav_NB += each_KNB[tap, tap:][: raw.rows]
        torch.tanh(wav_NB, out=out_NBC[..., 0])


Layer = Input | Upsample | Residual | Head


class StepDecoder:
    """Token tables and layers with their delays; never changed, so that any number of streams may share it."""

    def __init__(self, snac: SNAC, decoder: Decoder) -> None:
        plain: Any = folded(decoder)
        layers = plain.model
        self.to_latent = CodesToLatent(snac)
        self.layers: list[Layer] = [Input(*layers[:2])]
        for block in layers[2 : 2 + len(RATES_48K)]:
            activation, transposed, *rest = block.block
            self.layers.append(Upsample(activation, transposed))
            self.layers += [Residual(unit, d) for unit, d in zip(rest[-len(DILATIONS) :], DILATIONS, strict=True)]
        self.layers.append(Head(*layers[-3:-1]))
        self.upsampling, self.delay = 1, 0  # samples per latent frame; how many samples the output comes late
        for layer in self.layers:
            self.upsampling, self.delay = _after(layer, self.upsampling, self.delay)

    def latent(self, tokens_BT7: Tensor) -> Tensor:
        """→ z_NBC, on the decoder's device."""
        z_BCN: Tensor = self.to_latent(tokens_BT7.to(self.to_latent.table_0.device))
        return z_BCN.permute(2, 0, 1)


class StepState:
    """What some streams have in flight, `coarse` tokens of each at a time. Position 0 is a stream's first sample.

    Before its first and after its last sample every convolution must see the zeros that it sees at the ends of a
    whole sequence, so rows outside [0, end) are cleared at the entry of each layer.
    """

    def __init__(self, model: StepDecoder, streams: int, coarse: int) -> None:
        self.model, self.done = model, 0  # latent frames
        self.frames = coarse * LATENT_PER_COARSE  # of one step
        self.lines: list[list[Line]] = []
        rate = 1
        for layer in model.layers:
            self.lines.append(layer.lines(self.frames * rate, streams))
            rate, _ = _after(layer, rate, 0)
        largest = max(lines[0].new.numel() for lines in self.lines)
        self.wav_NBC = self.lines[0][0].all.new_empty(self.frames * rate, streams, 1)
        self.scratch = self.wav_NBC.new_empty(largest)

    @property
    def done_coarse(self) -> int:
        return self.done // LATENT_PER_COARSE

    def silence(self) -> Tensor:
        """What to step with after the end."""
        return torch.zeros_like(self.lines[0][0].new)

    def step(self, z_NBC: Tensor, end_frames: int | None = None) -> Tensor:
        """The next `frames` latent frames → as many samples (NB), `delay` samples late; they live until the next step.

        Once the streams' length is known, `end_frames` says it; what `z_NBC` holds after it is ignored.
        """
        self.lines[0][0].new.copy_(z_NBC)
        outputs = [*(lines[0].new for lines in self.lines[1:]), self.wav_NBC]
        rate, delay = 1, 0
        for layer, lines, out_NBC in zip(self.model.layers, self.lines, outputs, strict=True):
            first = self.done * rate - delay
            lines[0].new[: max(-first, 0)] = 0
            if end_frames is not None:
                lines[0].new[max(end_frames * rate - first, 0) :] = 0
            layer.run(lines, self.scratch, out_NBC)
            for line in lines:
                line.advance()
            rate, delay = _after(layer, rate, delay)
        self.done += self.frames
        return self.wav_NBC[..., 0]

    def take(self, other: StepState) -> None:
        """Becomes what `other` is, without sharing memory."""
        self.done = other.done
        for mine, theirs in zip(self.lines, other.lines, strict=True):
            for line, source in zip(mine, theirs, strict=True):
                line.take_history(source)


def _after(layer: Layer, rate: int, delay: int) -> tuple[int, int]:
    """Rows per latent frame and rows of delay behind `layer`, given those before it."""
    if isinstance(layer, Upsample):
        return rate * layer.stride, delay * layer.stride + layer.stride // 2
    return rate, delay + layer.delay


def _taps(convolution: Any) -> Tensor:
    """(channels, 1, taps) → (taps, channels)."""
    return convolution.weight[:, 0].T.contiguous()


def _matrix(convolution: Any) -> Tensor:
    """(out, in, 1) → (in, out)."""
    return convolution.weight[:, :, 0].T.contiguous()


def _flat(x_NBC: Tensor) -> Tensor:
    return x_NBC.view(-1, x_NBC.shape[2])


def _view(scratch: Tensor, like: Tensor) -> Tensor:
    return scratch[: like.numel()].view(like.shape)
