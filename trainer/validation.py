"""Validation during training: losses and distances on fixed crops of unseen groups, with the EMA's weights."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from configs.granted import granted_cores
from shards.index import Index
from shards.order import rank_slice
from trainer.data import UNREADABLE, Batch, fixed_batches
from trainer.distributed import Process
from trainer.losses import reconstruction, weighted
from trainer.scores import score
from trainer.settings import TrainSettings

METRICS = ("lsd", "lsd_reached", "mel", "si_sdr", "level", "high_band")
DISTANCES = {  # name in logs → name in `just eval`
    "lsd": "lsd",
    "lsd_hf": "lsd_hf",
    "lsd_hf_reached": "lsd_hf_reached",
    "lsd_lf": "lsd_lf",
    "mel_distance": "mel",
    "si_sdr_lf_db": "si_sdr_lf_db",
    "level_db": "level_db",
    "high_band_level_db": "high_band_level_db",
    "high_band_share_error_db": "high_band_share_error_db",
}
HIGHER_IS_BETTER = {"si_sdr_lf_db"}


@torch.no_grad()
def validate(
    model: nn.Module, indexes: tuple[Index, ...], length: int, settings: TrainSettings, process: Process
) -> dict[str, float]:
    """Mean of each loss and distance over `eval_samples` crops of `length` coarse tokens; the same on every process.

    Draws on no random state but its own. A crop that a distance says nothing of does not count in its mean. Raises on
    every process where one cannot read its crops.
    """
    sums, unread = torch.zeros(0), None
    with torch.random.fork_rng(devices=[process.device] if process.device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        try:
            sums = validation_sums(model, validation_batches(indexes, length, settings, process), settings)
        except UNREADABLE as error:
            unread = error
    process.raise_together(unread)
    totals, counts = process.sum(sums.to(process.device)).tolist()
    names = validation_names(settings)
    return {
        name: total / count if count else math.nan for name, total, count in zip(names, totals, counts, strict=True)
    }


def validation_batches(
    indexes: tuple[Index, ...], length: int, settings: TrainSettings, process: Process
) -> Iterator[Batch]:
    """This process's share; folders give equal parts of the crops."""
    for number, index in enumerate(indexes):
        samples = len(rank_slice(settings.eval_samples, number, len(indexes)))
        for batch in fixed_batches(
            index, samples, settings.eval_batch_size, length, settings.seed, process.rank, process.world_size
        ):
            yield batch.to(process.device)


def validation_names(settings: TrainSettings) -> list[str]:
    terms = [name for name in ("l1", "stft", "log_stft", "mel") if settings.weights[name]]
    return ["loss", *terms, *DISTANCES]


def validation_sums(model: nn.Module, batches: Iterable[Batch], settings: TrainSettings) -> Tensor:
    """(2, names), float64: the sum over all crops of each of `validation_names`, and how many crops have a value."""
    names = validation_names(settings)
    sums = torch.zeros(2, len(names), dtype=torch.float64)
    for batch in batches:
        wav_BN = batch.only_real(model(batch.tokens_BT7))
        values = crop_losses(wav_BN, batch, settings) | crop_distances(wav_BN, batch)
        rows_NB = torch.stack([values[name].double().cpu() for name in names])
        defined_NB = ~rows_NB.isnan() | ~wav_BN.isfinite().all(dim=1).cpu()  # what is not finite shall spoil the mean
        sums = sums + torch.stack([rows_NB.where(defined_NB, 0).sum(dim=1), defined_NB.sum(dim=1)])
    return sums


def crop_losses(wav_BN: Tensor, batch: Batch, settings: TrainSettings) -> dict[str, Tensor]:
    """The recipe's terms without its discriminators, and their weighted sum `loss`; one value per crop."""
    terms = reconstruction(wav_BN, batch.target_BN, batch.valid_B, settings.weights, settings.n_ffts)
    return {"loss": weighted(terms, settings.weights), **terms}


def crop_distances(wav_BN: Tensor, batch: Batch) -> dict[str, Tensor]:
    """DISTANCES of each crop's real samples, shape B each; NaN where one would have no meaning.

    On all cores: a GPU would wait for one of them longer than it trains between two validations.
    """

    def of_crop(wav_N: Tensor, target_N: Tensor, valid: int) -> list[Any]:
        found = score(wav_N[:valid].float().numpy(), target_N[:valid].float().numpy(), METRICS)
        return [found[name] for name in DISTANCES.values()]

    with ThreadPoolExecutor(_cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        rows = list(pool.map(of_crop, wav_BN.cpu(), batch.target_BN.cpu(), batch.valid_B.tolist()))
    values_BN = torch.tensor([[math.nan if value is None else value for value in row] for row in rows])
    return dict(zip(DISTANCES, values_BN.unbind(dim=1), strict=True))


def _cores() -> int:
    """Of this machine, for each of the processes that torchrun started on it."""
    return max(granted_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
