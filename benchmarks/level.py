"""Which level does each loss ask for? The warm start's output times a gain, against the targets.

SHARDS are made with the stand-in SNAC, as `just bench-quality` leaves them in OUT/work.
Where waveforms of codec and target have little in common, L1 is least for silence, whatever the decoder could learn.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch

from benchmarks.harness import FOLDER, report
from benchmarks.quality import SNAC
from codec.snac import load_snac
from configs.loader import load_settings
from shards.contract import coarse_tokens
from shards.index import load
from trainer.data import fixed_batches
from trainer.decoder import CodesToLatent, CropDecoder, warm_start
from trainer.losses import reconstruction
from trainer.settings import TrainSettings
from trainer.validation import crop_distances

GAINS_DB = (-120, -20, -12, -6, -3, 0, 3, 6, 9)
CROPS, SECONDS = 48, 1.0
WEIGHTS = dict.fromkeys(("l1", "stft", "log_stft", "mel"), 1.0)


@click.command(help=__doc__)
@click.argument("shards", type=FOLDER)
@torch.no_grad()
def main(shards: Path) -> None:
    snac, _ = load_snac(SNAC)
    model = CropDecoder(CodesToLatent(snac), warm_start(snac, "zero", 0))
    n_ffts = load_settings(TrainSettings, "decoder_48khz.json", []).n_ffts
    (batch,) = fixed_batches(load(shards, "validation"), CROPS, CROPS, coarse_tokens(SECONDS), 0)
    wav_BN = batch.only_real(model(batch.tokens_BT7))
    distances = {name: float(values_B.nanmean()) for name, values_B in crop_distances(wav_BN, batch).items()}
    rows = []
    for gain_db in GAINS_DB:
        terms = reconstruction(wav_BN * 10 ** (gain_db / 20), batch.target_BN, batch.valid_B, WEIGHTS, n_ffts)
        rows.append({"gain_db": gain_db, **{name: float(values_B.mean()) for name, values_B in terms.items()}})
    report("level", rows, crops=len(batch), distances=distances)


if __name__ == "__main__":
    main()
