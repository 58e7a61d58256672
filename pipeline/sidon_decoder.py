"""SIDON's decoder from its raw weights: DAC's decoder on the stock `snac.layers.Decoder`.

The two are the same network; only their odd strides differ: DAC's give stride · T − 1 samples, snac's one more. Here
everything beyond DAC's length is zero before each convolution hears it, as beyond the end of a tensor. So the output
is DAC's to its last sample, 960 T − 26 at the published rates, and a padded batch gives what its members give alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from snac.layers import Decoder, DecoderBlock, ResidualUnit
from torch import Tensor, nn
from torch.nn.utils.parametrize import remove_parametrizations

from pipeline.sidon_encoder import check_keys
from shards.errors import UserError, first_line


def load_decoder(path: Path) -> DacDecoder:
    """A state dict of `dac.model.dac.Decoder` (weight_g, weight_v), key by key. Raises UserError for what does not fit.

    Widths and rates are read from the shapes: a transposed convolution's kernel is two strides long.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        shapes = {name: value.shape for name, value in state.items()}
    except Exception as error:  # a damaged file makes torch raise many kinds
        raise UserError(f"{path} is not a state dict of plain tensors: {first_line(error)}") from error
    strides = {
        int(match[1]): shape[-1] // 2
        for name, shape in shapes.items()
        if (match := re.fullmatch(r"model\.(\d+)\.block\.1\.weight_v", name))
    }
    first = shapes.get("model.0.weight_v")
    if first is None or not strides:
        raise UserError(f"{path}: no decoder of DAC: model.0.weight_v or model.N.block.1.weight_v is missing")
    rates = [strides[number] for number in sorted(strides)]
    decoder = Decoder(first[1], first[0], rates, noise=False, depthwise=False, attn_window_size=None)
    renamed = {_renamed(name): value.float() for name, value in state.items()}
    expected = {name: value.shape for name, value in decoder.state_dict().items()}
    check_keys(path, expected, {name: value.shape for name, value in renamed.items()})
    decoder.load_state_dict(renamed)
    return DacDecoder(decoder, rates)


def _renamed(name: str) -> str:
    """Old weight norm → parametrizations, as the stock class has them."""
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        if name.endswith(f".{old}"):
            return f"{name.removesuffix(old)}parametrizations.weight.{new}"
    return name


class DacDecoder(nn.Module):
    """(B, C, T) with the real frames of each member → (B, samples), zero beyond each member's own length."""

    def __init__(self, decoder: Decoder, rates: list[int]) -> None:
        super().__init__()
        self.decoder, self.rates = decoder.eval().requires_grad_(False), rates
        self._lengths_DB = torch.zeros(0, 0)  # of each member, after so many transposed convolutions
        self._shortest_D: list[int] = []  # known without asking the device
        for module in decoder.modules():
            if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
                remove_parametrizations(module, "weight")  # the norm folded in
        depth = 0
        for layer in decoder.model:
            self._clear_before(layer, depth)
            depth += isinstance(layer, DecoderBlock)

    def forward(self, hidden_BCT: Tensor, frames: list[int]) -> Tensor:
        lengths = [[self.output_length(n, depth) for n in frames] for depth in range(len(self.rates) + 1)]
        self._lengths_DB, self._shortest_D = torch.tensor(lengths, device=hidden_BCT.device), list(map(min, lengths))
        *half, _, _, _, _ = self.decoder.model  # all but the last block, and the head's Snake, convolution and tanh
        features_BCT = hidden_BCT.clone()
        for layer in half:
            features_BCT = layer(features_BCT)
        with torch.autocast(hidden_BCT.device.type, enabled=False):  # bfloat16 would be heard above 12 kHz
            wav_B1N = self.decoder.model[len(half) :](features_BCT.float())
        self._clear(wav_B1N, len(self.rates))
        return wav_B1N[:, 0]

    def output_length(self, frames: int, depth: int) -> int:
        """Samples after `depth` transposed convolutions."""
        for rate in self.rates[:depth]:
            frames = frames * rate - rate % 2
        return frames

    def _clear_before(self, layer: nn.Module, depth: int) -> None:
        """A hook before each convolution that hears its neighbours; `depth` transposed ones stand before `layer`."""
        if isinstance(layer, DecoderBlock):
            self._clear_before(layer.block[1], depth)
            for unit in layer.block[2:]:
                assert isinstance(unit, ResidualUnit)
                self._clear_before(unit.block[1], depth + 1)
        elif isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):

            def clear(module: nn.Module, given: tuple[Any, ...]) -> None:
                self._clear(given[0], depth)

            layer.register_forward_pre_hook(clear)

    def _clear(self, x_BCN: Tensor, depth: int) -> None:
        """In place: zeros beyond each member's length, in one operation for all of them."""
        first = self._shortest_D[depth]
        beyond_BN = torch.arange(first, x_BCN.shape[2], device=x_BCN.device) >= self._lengths_DB[depth][:, None]
        x_BCN[..., first:].masked_fill_(beyond_BN[:, None], 0)
