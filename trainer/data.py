"""Samples → crops of whole coarse tokens with real context → batches, in the order of `shards.order`."""

from __future__ import annotations

import atexit
import json
import multiprocessing
import signal
import warnings
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader

from shards.cache import CacheError
from shards.contract import COARSE_48K, CONTEXT_COARSE, TOKENS
from shards.errors import ShardError, UserError, first_line, last_line
from shards.index import Index
from shards.order import Order, random_words, rank_slice
from shards.reader import decode_sample, read_sample
from shards.storage import StorageError
from shards.stream import Stream, StreamSource
from trainer.decoder import PADDING_TOKEN

warnings.filterwarnings("ignore", "This DataLoader will create")  # more processes than cores: they wait, no more

LOST = ("DataLoader worker", "Pin memory thread")  # the thread ends where it is just taking what that process sent


class ReaderError(UserError):
    """A process that reads ahead died, or cannot hand over what it read."""


UNREADABLE = (ShardError, StorageError, CacheError, ReaderError)


@dataclass(frozen=True)
class Crop:
    """Part of a segment with its context: what the decoder reads, and what the loss compares."""

    key: str
    codes_T7: npt.NDArray[np.int16]  # context, crop, context
    before: int  # coarse tokens of context at the front
    target: npt.NDArray[np.float32]  # crop at 48 kHz, real samples only


@dataclass(frozen=True)
class Batch:
    """B crops, each with its first token at CONTEXT_COARSE.

    Where a recording has no context and where a crop is shorter than others, tokens are PADDING_TOKEN, targets zero.
    """

    keys: list[str]
    tokens_BT7: Tensor
    target_BN: Tensor
    valid_B: Tensor  # real samples of each crop

    def __len__(self) -> int:
        return len(self.keys)

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes keys too go beside the pipe, as tensors do, whatever their number.

        So a message is shorter than PIPE_BUF: of a process that is killed it arrives whole or not at all. The rest of a
        longer one would be waited for in vain.
        """
        return _received, (self._packed_keys, self.tensors)

    @cached_property
    def _packed_keys(self) -> Tensor:
        return torch.frombuffer(bytearray(json.dumps(self.keys), "ascii"), dtype=torch.uint8)

    def shared(self) -> Batch:
        """Itself, in memory that processes share. Where that is full, the thread that sends batches would print so and
        drop one, which would be waited for for ever; here it raises ReaderError.
        """
        try:
            for tensor in (self._packed_keys, *self.tensors):
                tensor.share_memory_()
        except RuntimeError as error:
            raise ReaderError(
                f"no shared memory for a batch that is read ahead ({first_line(error)}): give /dev/shm more room (a "
                "container's --shm-size), or take fewer num_workers"
            ) from error
        return self

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.tokens_BT7, self.target_BN, self.valid_B

    def to(self, device: torch.device) -> Batch:
        return Batch(self.keys, *(tensor.to(device, non_blocking=True) for tensor in self.tensors))

    def pin_memory(self) -> Batch:
        """For DataLoader: from there a GPU takes it while this process goes on."""
        return Batch(self.keys, *(tensor.pin_memory() for tensor in self.tensors))

    def split(self, size: int) -> Iterator[Batch]:
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield Batch(self.keys[part], *(tensor[part] for tensor in self.tensors))

    def only_real(self, wav_BN: Tensor) -> Tensor:
        """Decoded crops, with zeros after each crop's real samples as in its target."""
        return wav_BN * (torch.arange(wav_BN.shape[1], device=wav_BN.device) < self.valid_B[:, None])


def _received(keys: Tensor, tensors: tuple[Tensor, Tensor, Tensor]) -> Batch:
    return Batch(json.loads(keys.numpy().tobytes()), *tensors)


def crop(members: dict[str, Any], length: int, seed: int, into: npt.NDArray[np.float32] | None = None) -> Crop:
    """`length` coarse tokens of a segment at a place given by its position in the stream; all of a shorter segment.

    With `into` the crop's target is its front.
    """
    word = int(random_words(1, seed, "crop", members["position"])[0])

    def place(meta: dict[str, Any]) -> range:
        size = min(length, meta["n_coarse"])
        start = word % (meta["n_coarse"] - size + 1)
        return range(start, start + size)

    sample = decode_sample(members, place, into)
    meta, codes_T7, tokens = sample["meta"], sample["codes"], place(sample["meta"])
    first = meta["context_before"] + tokens.start  # in codes_T7
    before = min(first, CONTEXT_COARSE)
    target = sample["target"][: meta["n_samples"] - tokens.start * COARSE_48K]
    return Crop(members["__key__"], codes_T7[first - before : first + len(tokens) + CONTEXT_COARSE], before, target)


def collate(samples: list[dict[str, Any]], length: int, seed: int) -> Batch:
    """A batch of the same shape whatever its samples: `length` coarse tokens and full context.

    Targets are decoded in their place in the batch: what is as large as that is written once.
    """
    tokens = np.full((len(samples), length + 2 * CONTEXT_COARSE, TOKENS), PADDING_TOKEN, dtype=np.int64)
    target = np.empty((len(samples), length * COARSE_48K), dtype=np.float32)
    crops = [crop(members, length, seed, row) for members, row in zip(samples, target, strict=True)]
    for place, item in enumerate(crops):
        start = CONTEXT_COARSE - item.before
        tokens[place, start : start + len(item.codes_T7)] = item.codes_T7
        target[place, len(item.target) :] = 0
    return Batch(
        keys=[item.key for item in crops],
        tokens_BT7=torch.from_numpy(tokens),
        target_BN=torch.from_numpy(target),
        valid_B=torch.tensor([len(item.target) for item in crops]),
    )


def training_batches(
    indexes: tuple[Index, ...],
    stream: Stream,
    steps: range,
    workers: int,
    rank: int,
    world_size: int,
    for_gpu: bool = False,
) -> Generator[Batch, None, None]:
    """This rank's share of each global batch of `steps`. Raises ShardError, naming shard and key, or ReaderError."""
    source = StreamSource(indexes, stream, steps, rank, world_size)
    pipeline = webdataset.DataPipeline(source, webdataset.map(partial(to_batch, seed=stream.seed)))
    if workers:
        pipeline.append(webdataset.map(Batch.shared))
    loader = DataLoader(
        pipeline,
        batch_size=None,
        num_workers=workers,
        pin_memory=for_gpu,
        worker_init_fn=_leave_signals_alone,
        multiprocessing_context="fork" if workers else None,  # with what hears signals, on Python 3.14 too
    )
    try:
        batches = iter(loader)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler of it raises amid a step or a checkpoint
        yield from batches  # here a worker that died is missed within 5 s
    except RuntimeError as error:
        if not str(error).startswith(LOST):
            raise
        raise ReaderError(
            f"a process that reads ahead died ({error}): memory may be short; num_workers= sets their number"
        ) from error
    except UserError as error:  # a worker's error arrives as its whole traceback
        kind = type(error)
        raise kind(last_line(str(error)).removeprefix(f"{kind.__module__}.{kind.__qualname__}: ")) from error


def to_batch(step: dict[str, Any], seed: int) -> Batch:
    """What `StreamSource` yields for a step → its batch."""
    return collate(step["samples"], step["length"], seed)


def fixed_batches(
    index: Index, samples: int, batch_size: int, length: int, seed: int, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """This rank's share of the same `samples` crops at every call (all samples, if there are fewer)."""
    order = Order(index.counts, seed, len(index.counts))
    places = rank_slice(min(samples, len(index)), rank, world_size)
    for start in range(0, len(places), batch_size):
        part = places[start : start + batch_size]
        read = [{**read_sample(index, order.sample_at(place)), "position": place} for place in part]
        yield collate(read, length, seed)


def _leave_signals_alone(worker: int) -> None:
    """A worker ends with its loader: signals to the whole process group are the trainer's to answer."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@atexit.register
def _kill_workers() -> None:
    """Python ends by SIGTERM to daemonic children and waits for them: workers that an error left behind never end."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
