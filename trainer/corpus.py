"""The shards of a training: one folder or several, checked against each other and against the SNAC they came from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from shards.cache import ShardCache, default_cache
from shards.contract import INDEX_NAME, SPLITS
from shards.errors import SettingsError, UserError
from shards.index import Index, load
from shards.order import Order
from shards.storage import Location
from shards.stream import Stream
from shards.writer import differences, read_table
from trainer.schedule import stages
from trainer.settings import TrainSettings


@dataclass(frozen=True)
class Corpus:
    training: tuple[Index, ...]
    validation: tuple[Index, ...]  # of the folders that have one
    stream: Stream
    in_both: tuple[str, ...]  # groups that train in one folder and validate in another

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the data came from, for checkpoints: indexes, teachers and fingerprints of all folders; of what differs
        between fingerprints, each folder's.
        """
        found = [index.fingerprint for index in self.training]
        each = {name: [one.get(name) for one in found] for name in dict.fromkeys(chain(*found))}
        return {
            "samples_sha256": ", ".join(index.samples_sha256 for index in self.training),
            "validation_sha256": ", ".join(index.samples_sha256 for index in self.validation),
            "index_sha256": ", ".join(index.sha256 for index in self.training),
            **{name: some[0] if some.count(some[0]) == len(some) else some for name, some in each.items()},
            "teacher": " + ".join(dict.fromkeys(one["teacher"] for one in found)),
        }


def open_corpus(settings: TrainSettings, snac_sha256: dict[str, str]) -> Corpus:
    """Raises UserError for shards without usable segments, or with codes of another SNAC."""
    cache = cache_of(settings)
    training = tuple(load(folder, "train", cache) for folder in settings.folders)
    validation = tuple(load(folder, "validation", cache) for folder in settings.folders)
    for folder, index in zip(settings.folders, training, strict=True):
        if not len(index):
            raise UserError(f"{folder} has no usable segment in the split {index.split}")
        changed = differences(index.fingerprint["snac_sha256"], snac_sha256)
        if changed:
            raise UserError(
                f"{folder} holds codes of another SNAC than pretrained_model={settings.pretrained_model} ({changed})"
            )
    with_voices = tuple(index for index in validation if len(index))
    if not with_voices:
        raise UserError(
            f"{', '.join(map(str, settings.folders))} has no usable segment in the split validation: the `reason`s of "
            "its rows say why (`just inspect`); more groups, by extend=true, may be in it"
        )
    orders = tuple(Order(index.counts, settings.seed, settings.window_shards) for index in training)
    stream = Stream(orders, _weights(settings, training), stages(settings), settings.seed)
    return Corpus(training, with_voices, stream, _in_both(settings.folders))


def cache_of(settings: TrainSettings) -> ShardCache:
    return ShardCache(settings.cache or default_cache().folder, int(settings.cache_gib * 2**30))


def _in_both(folders: tuple[Location, ...]) -> tuple[str, ...]:
    if len(folders) == 1:
        return ()  # whose plan keeps them apart
    names = ["split", "group"]
    indexes = [read_table(folder / INDEX_NAME, columns=names) for folder in folders]
    found = pa.concat_tables([index.group_by(names).aggregate([]) for index in indexes])
    training, validating = (set(found.filter(pc.field("split") == split)["group"].to_pylist()) for split in SPLITS)
    return tuple(sorted(training & validating))


def _weights(settings: TrainSettings, training: tuple[Index, ...]) -> tuple[int, ...]:
    """As given; else by size, to a tenth of the smallest folder."""
    if settings.shard_weights is None:
        smallest = min(len(index) for index in training)
        tenths = [round(10 * len(index) / smallest) for index in training]
        return tuple(weight // math.gcd(*tenths) for weight in tenths)
    if len(settings.shard_weights) != len(training):
        raise SettingsError(f"shard_weights={list(settings.shard_weights)} for {len(training)} folders of shards")
    return settings.shard_weights
