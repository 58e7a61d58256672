"""How many crops are computed at once, so that a global batch of any size fits into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import torch

from codec.memory import ran_out
from shards.contract import coarse_tokens
from shards.errors import UserError, first_line
from trainer.data import Batch

T = TypeVar("T")

CPU_SECONDS = 8  # of audio with its context; one crop of 4 s takes the decoder at its true size 6 GiB, three 15


class MicroBatches:
    """A share of a global batch in parts: of a given number of crops, or (`auto`) as large as memory allows; on a CPU,
    whose memory ends without a word, of CPU_SECONDS.

    On out-of-memory the part is halved, the share done again from its beginning, and the size remembered: as coarse
    tokens, so that it counts for crops of another length too. Nothing but rounding depends on it, and with `noise=keep`
    the noise that is drawn.
    """

    def __init__(self, size: int | Literal["auto"], device: torch.device, say: Callable[[str], None]) -> None:
        self.size, self.device, self.say = size, device, say
        self.coarse = coarse_tokens(CPU_SECONDS) if device.type == "cpu" else None  # at once, with context; None: all

    def run(self, batch: Batch, begin: Callable[[], None], work: Callable[[Batch], T]) -> list[T]:
        """`work` on every part, after `begin`; both again from the start when memory runs out."""
        while True:
            begin()
            try:
                return [work(part.to(self.device)) for part in self._parts(batch)]
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                trouble = first_line(error)
            torch.cuda.empty_cache()  # outside the handler: its traceback holds the tensors
            self._halve(batch, trouble)

    def state_dict(self) -> dict[str, Any]:
        return {"device": self._name(), "coarse": self.coarse}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Another kind of device finds its own size."""
        if state["device"] == self._name():
            self.coarse = state["coarse"]

    def _parts(self, batch: Batch) -> Iterator[Batch]:
        """Of equal size, as nearly as can be, so that few shapes are compiled."""
        parts = -(-len(batch) // self._crops(batch))
        return batch.split(-(-len(batch) // parts))

    def _crops(self, batch: Batch) -> int:
        if self.size != "auto":
            return self.size
        fitting = self.coarse // batch.tokens_BT7.shape[1] if self.coarse else len(batch)
        return min(max(fitting, 1), len(batch))

    def _halve(self, batch: Batch, trouble: str) -> None:
        crops = self._crops(batch)
        if self.size != "auto" or crops == 1:
            way_out = "micro_batch=auto finds what fits" if crops > 1 else "take a shorter segment_length"
            raise UserError(f"{crops} crops at once do not fit into memory ({trouble}); {way_out}")
        self.coarse = crops // 2 * batch.tokens_BT7.shape[1]
        self.say(f"out of memory with {crops} crops at once: now {crops // 2}, the same global batch")

    def _name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
