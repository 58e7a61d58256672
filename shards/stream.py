"""Which crops make up which step: several folders mixed by weight, and batches that change size with their crops.

A pure function, as `shards.order` is for one folder: of seed, shards, weights and stages, and of the step. Positions
count crops from the beginning of training. Position p belongs to one folder, where it is that folder's next sample in
its own order; so each folder is read once through before it begins anew, however often the others are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shards.contract import tar_path
from shards.order import Order, permutation, rank_slice
from shards.reader import read_sample
from shards.storage import Url

if TYPE_CHECKING:
    from shards.index import Index


@dataclass(frozen=True)
class Stage:
    """From `first_step` on, a step has `batch` crops of `length` coarse tokens."""

    first_step: int
    length: int
    batch: int


class Place(NamedTuple):
    position: int  # in the endless stream
    folder: int
    sample: int  # number in the folder's index


@dataclass(frozen=True)
class Stream:
    """`weights` are whole numbers: of every Σ weights crops, folder i gives weights[i], in a shuffled order."""

    orders: tuple[Order, ...]
    weights: tuple[int, ...]
    stages: tuple[Stage, ...]  # the first begins at step 0
    seed: int

    def stage(self, step: int) -> Stage:
        return next(stage for stage in reversed(self.stages) if stage.first_step <= step)

    def first_position(self, step: int) -> int:
        """Crops of all steps before."""
        ends = [*(stage.first_step for stage in self.stages[1:]), math.inf]
        steps = [max(min(step, end) - stage.first_step, 0) for stage, end in zip(self.stages, ends, strict=True)]
        return int(sum(count * stage.batch for count, stage in zip(steps, self.stages, strict=True)))

    def batch(self, step: int) -> list[Place]:
        first = self.first_position(step)
        return [self.place(position) for position in range(first, first + self.stage(step).batch)]

    def place(self, position: int) -> Place:
        if len(self._turns) == 1:
            return Place(position, 0, self.orders[0].sample_at(position))
        cycle, turn = divmod(position, len(self._turns))
        turns = self._turns[permutation(len(self._turns), self.seed, "folders", cycle)]
        folder = int(turns[turn])
        own = cycle * self.weights[folder] + int(np.count_nonzero(turns[:turn] == folder))
        return Place(position, folder, self.orders[folder].sample_at(own))

    def shards_from(self, step: int) -> list[tuple[int, int]]:
        """(folder, place in its index's `shards`) of what is read from `step` on: this window's, then the next's."""
        cycle = self.first_position(step) // len(self._turns)
        return [
            (folder, shard)
            for folder, order in enumerate(self.orders)
            for shard in order.shards_from(cycle * self.weights[folder])
        ]

    def steps(self, epochs: float) -> int:
        """The least number of steps with as many crops as `epochs` times all folders hold samples."""
        samples = sum(order.samples_per_epoch for order in self.orders)
        crops = math.ceil(samples * Fraction(str(epochs)))  # 0.07 is 7 in 100
        last = next(s for s in reversed(self.stages) if self.first_position(s.first_step) < crops or s.first_step == 0)
        return last.first_step + math.ceil(Fraction(crops - self.first_position(last.first_step), last.batch))

    @cached_property
    def _turns(self) -> npt.NDArray[np.intp]:
        return np.repeat(np.arange(len(self.weights)), self.weights)


class StreamSource:
    """A source for `wds.DataPipeline`: for each of `steps`, this rank's samples, and the length of its crops.

    DataLoader workers take whole steps in turn, so the loader hands them on in order whatever their number.
    """

    def __init__(self, indexes: tuple[Index, ...], stream: Stream, steps: range, rank: int, world_size: int) -> None:
        self.indexes, self.stream, self.steps = indexes, stream, steps
        self.rank, self.world_size = rank, world_size

    def __call__(self) -> Iterator[dict[str, Any]]:
        from webdataset.utils import pytorch_worker_info

        _, _, worker, workers = pytorch_worker_info()
        for step in self.steps[worker::workers]:
            places = self.stream.batch(step)
            share = rank_slice(len(places), self.rank, self.world_size)
            self._prefetch(step)
            samples = [self._read(place) for place in places[share.start : share.stop]]
            yield {"length": self.stream.stage(step).length, "samples": samples}

    def _prefetch(self, step: int) -> None:
        if any(isinstance(index.folder, Url) for index in self.indexes):
            indexes = [(self.indexes[folder], shard) for folder, shard in self.stream.shards_from(step)]
            tars = [tar_path(index.folder, index.split, index.shards[shard]) for index, shard in indexes]
            self.indexes[0].cache.prefetch(tars)

    def _read(self, place: Place) -> dict[str, Any]:
        return {**read_sample(self.indexes[place.folder], place.sample), "position": place.position}
