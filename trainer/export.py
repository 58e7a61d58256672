"""`just export`: a directory that the unmodified `snac` package loads; its decode(codes) returns 48 kHz audio.

config.json, pytorch_model.bin   what the stock package reads; encoder and quantizer are the original's
model.safetensors                the same weights without pickle
decoder_only.safetensors         what turns tokens into audio: the decoder, codebooks and their projections, under
                                 the stock names; with `fold`, weight norm is folded into the kernels
README.md, provenance.json       the model card, and where weights, codes and targets came from
LICENSE.snac                     the notice of SNAC, whose weights are in every export
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import safetensors.torch
import torch
from snac import SNAC
from torch import Tensor
from torch.nn.utils import parametrize

from shards.files import new_folder, write_whole
from trainer.card import snac_card, write_snac_license
from trainer.checkpoint import PROVENANCE, Codec48k, load_codec, save
from trainer.decoder import RATES_48K
from trainer.settings import ExportSettings

DECODING = ("decoder.", "quantizer.")  # what names of weights begin with that decoding needs


def export(settings: ExportSettings) -> None:
    """Raises UserError when `out` exists: an export never overwrites."""
    with new_folder(settings.out) as folder:
        write_snac_license(folder)
        codec = load_codec(settings.model, settings.pretrained_model)
        write_export(codec, folder, settings.fold)
        write_whole(folder / "README.md", snac_card(codec, settings.out.name, settings.fold, settings.license))
    click.echo(f"{settings.out}: SNAC.from_pretrained loads it; {codec.described}")


def write_export(codec: Codec48k, folder: Path, fold: bool) -> None:
    config = {**codec.config, "decoder_rates": RATES_48K}
    whole = SNAC(**config)
    whole.encoder.load_state_dict(codec.snac.encoder.state_dict())
    whole.quantizer.load_state_dict(codec.snac.quantizer.state_dict())
    whole.decoder.load_state_dict(codec.decoder.state_dict())
    write_whole(folder / "config.json", json.dumps(config, indent=2))
    write_whole(folder / PROVENANCE, json.dumps(codec.provenance, indent=2, sort_keys=True))
    state = whole.state_dict()
    save(folder / "pytorch_model.bin", state)
    save_safetensors(folder / "model.safetensors", state)
    save_safetensors(folder / "decoder_only.safetensors", decoding_weights(whole, fold), weight_norm=not fold)


@torch.no_grad()
def decoding_weights(whole: SNAC, fold: bool) -> dict[str, Tensor]:
    """Folding changes `whole` itself."""
    if fold:
        for module in whole.modules():
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight")
    state: dict[str, Tensor] = whole.state_dict()
    return {name: value for name, value in state.items() if name.startswith(DECODING) and ".in_proj." not in name}


def save_safetensors(path: Path, state: dict[str, Tensor], weight_norm: bool = True) -> None:
    metadata = {"format": "pt", "weight_norm": "kept" if weight_norm else "folded"}
    tensors = {name: value.contiguous() for name, value in state.items()}
    write_whole(path, safetensors.torch.save(tensors, metadata))
