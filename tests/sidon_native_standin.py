"""SIDON's raw weights in miniature: random values in the upstream files' layout, and a plain reference for each.

The base is what `transformers` saves, the adapter what `peft` saves, the decoder's state dict is written by a plain
DAC decoder on the old weight norm (weight_g, weight_v), built here from its published description.
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel

from shards.files import file_sha256

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "left_max_position_embeddings": 6,
    "right_max_position_embeddings": 2,
    "conv_depthwise_kernel_size": 7,
}
RATES = [8, 5, 4, 3, 2]
LORA = {"r": 64, "lora_alpha": 16, "target_modules": ["output_dense"], "bias": "lora_only"}


def weight_norm(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the old form is what the published file has
        return nn.utils.weight_norm(module)


class Snake(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.rand(1, channels, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.alpha * x).square() / (self.alpha + 1e-9)


class Unit(nn.Module):
    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            Snake(channels),
            weight_norm(nn.Conv1d(channels, channels, 7, dilation=dilation, padding=3 * dilation)),
            Snake(channels),
            weight_norm(nn.Conv1d(channels, channels, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class Block(nn.Module):
    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        up = nn.ConvTranspose1d(channels, channels // 2, 2 * stride, stride, padding=math.ceil(stride / 2))
        units = [Unit(channels // 2, dilation) for dilation in (1, 3, 9)]
        self.block = nn.Sequential(Snake(channels), weight_norm(up), *units)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class PlainDac(nn.Module):
    """DAC's decoder (Kumar et al., 2023), its keys and its 960 T − 26 samples."""

    def __init__(self, inputs: int, channels: int, rates: list[int]) -> None:
        super().__init__()
        widths = [channels // 2**n for n in range(len(rates) + 1)]
        self.model = nn.Sequential(
            weight_norm(nn.Conv1d(inputs, channels, 7, padding=3)),
            *(Block(width, rate) for width, rate in zip(widths, rates, strict=False)),
            Snake(widths[-1]),
            weight_norm(nn.Conv1d(widths[-1], 1, 7, padding=3)),
            nn.Tanh(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def write_base(folder: Path, layers: int = 3, **sizes: Any) -> Wav2Vec2BertModel:
    """config.json and model.safetensors, with one layer more than the adapter uses."""
    torch.manual_seed(0)
    config = Wav2Vec2BertConfig(**{**SMALL, "num_hidden_layers": layers, **sizes})
    model = Wav2Vec2BertModel(config).eval()
    for name, parameter in model.named_parameters():
        if "distance_embedding" in name:
            nn.init.normal_(parameter, std=0.3)  # so that relative positions count
    model.save_pretrained(folder)
    return model


def write_adapter(folder: Path, layers: int, hidden: int, intermediate: int) -> dict[str, Tensor]:
    torch.manual_seed(1)
    tensors = {}
    for layer in range(layers):
        for part in ("ffn1", "ffn2"):
            name = f"base_model.model.encoder.layers.{layer}.{part}.output_dense"
            tensors[f"{name}.lora_A.weight"] = torch.randn(LORA["r"], intermediate) / math.sqrt(intermediate)  # type: ignore[call-overload]
            tensors[f"{name}.lora_B.weight"] = torch.randn(hidden, LORA["r"]) / 8  # type: ignore[call-overload]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **LORA}))
    return tensors


def write_decoder(folder: Path, inputs: int, channels: int, rates: list[int] = RATES) -> PlainDac:
    torch.manual_seed(2)
    decoder = PlainDac(inputs, channels, rates).eval()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(decoder.state_dict(), folder / "decoder_state_dict.pt")
    return decoder


def pin(*folders: Path) -> Path:
    """A list of weights that pins what lies in the folders; returns it."""
    entries = {
        str(folder): {"revision": None, "files": {file.name: file_sha256(file) for file in folder.iterdir()}}
        for folder in folders
    }
    pins = folders[0] / "weights.json"
    pins.write_text(json.dumps(entries))
    return pins


def build(folder: Path) -> Path:
    """`folder/base` and `folder/raw`, pinned; returns the list of pins."""
    write_base(folder / "base")
    write_adapter(folder / "raw", 2, SMALL["hidden_size"], SMALL["intermediate_size"])
    write_decoder(folder / "raw", SMALL["hidden_size"], 64)
    return pin(folder / "base", folder / "raw")
