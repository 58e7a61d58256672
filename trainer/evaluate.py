"""`just eval`: scores on fixed crops of the validation split, as a table for people."""

from __future__ import annotations

from collections.abc import Callable

import click
import torch
from torch import Tensor

from codec.audio import sinc_resampler
from codec.snac import device_of
from shards.contract import coarse_tokens
from shards.errors import UserError
from shards.index import load
from trainer.checkpoint import load_codec
from trainer.data import fixed_batches
from trainer.decoder import CodesToLatent, CropDecoder, warm_start
from trainer.settings import EvalSettings
from trainer.validation import DISTANCES, crop_distances


@torch.no_grad()
def evaluate(settings: EvalSettings) -> None:
    """Prints mean LSD, LSD-HF and LSD-LF of three decoders on the same crops of unseen groups."""
    device = device_of(settings.gpu)
    codec = load_codec(settings.model, settings.pretrained_model)
    if codec.snac.decoder is codec.decoder:
        raise UserError(f"{settings.model} holds no 24 kHz decoder to compare with: name the run or its checkpoint")
    index = load(settings.shards, "validation")
    if index.fingerprint["snac"] != codec.snac_name:
        raise UserError(f"{settings.shards} holds codes by {index.fingerprint['snac']}, the model by {codec.snac_name}")
    to_latent = CodesToLatent(codec.snac)
    stock = CropDecoder(to_latent, codec.snac.decoder).to(device)
    sinc = sinc_resampler(1, 2).to(device)
    rows: dict[str, Callable[[Tensor], Tensor]] = {
        "stock 24 kHz + sinc": lambda tokens: sinc(stock(tokens)),
        "warm start, untrained": CropDecoder(to_latent, warm_start(codec.snac, "zero", settings.seed)).to(device),
        "trained": CropDecoder(to_latent, codec.decoder).to(device),
    }
    batches = fixed_batches(index, settings.samples, 8, coarse_tokens(settings.segment_length), settings.seed)
    found: dict[str, list[dict[str, Tensor]]] = {name: [] for name in rows}
    for batch in batches:
        batch = batch.to(device)
        for name, decode in rows.items():
            torch.manual_seed(settings.seed)  # of noise blocks
            found[name].append(crop_distances(batch.select(decode(batch.tokens_BT7)), batch))
    click.echo(f"{min(settings.samples, len(index))} crops of unseen groups; codes by {codec.snac_name}")
    click.echo(f"{'':24}" + "".join(f"{name:>9}" for name in DISTANCES))
    for name, results in found.items():
        means = [float(torch.cat([result[distance] for result in results]).mean()) for distance in DISTANCES]
        click.echo(f"{name:24}" + "".join(f"{mean:9.3f}" for mean in means))
