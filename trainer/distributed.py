"""One process per GPU, started by torchrun; a lone process when there is one device."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group: defaults in there would hold it, and its threads, to the end
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from codec.snac import device_of, visible
from configs.granted import granted_cores
from shards import storage
from shards.errors import UserError
from shards.reader import READ_ATTEMPTS

PATIENCE_SECONDS = (READ_ATTEMPTS + 1) * storage.PATIENCE_SECONDS  # with a process that waits for storage
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


class ElsewhereError(UserError):
    """What another process cannot go on for; its own error says what that is."""


@dataclass(frozen=True)
class Process:
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Each gradient becomes its sum over all processes, as one message.

        Once a step and after every micro-batch, instead of torch's DistributedDataParallel, which sends during the
        backward pass: a process that runs out of memory there may do its share again while the others wait here.
        """
        if self.world_size > 1:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            flat = parameters_to_vector(gradients)
            dist.all_reduce(flat)
            for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def raise_together(self, error: Exception | None) -> None:
        """Raises `error`; where only other processes have one, ElsewhereError. So none waits for those that end."""
        raises = [float(error is not None)]
        on_any = self.world_size > 1 and self.sum(torch.tensor(raises, device=self.device)).item() > 0
        if error:
            raise error
        if on_any:
            raise ElsewhereError("another process cannot read its data: its own error says why")

    def all_have(self, numbers: list[int]) -> list[bool]:
        """For each of `numbers`, 64 bits at most, whether it is the same on all processes."""
        if self.world_size == 1:
            return [True] * len(numbers)
        ours = torch.tensor(numbers, device=self.device)
        found = [torch.empty_like(ours) for _ in range(self.world_size)]
        dist.all_gather(found, ours)
        same: list[bool] = (torch.stack(found) == ours).all(dim=0).tolist()
        return same


def launch(gpus: str) -> None:
    """Replaces this process by torchrun with one process for each of `gpus` (0,1,…), same arguments.

    Numbers count within CUDA_VISIBLE_DEVICES, where a scheduler has set it.
    """
    numbers = gpus.split(",")
    for gpu in numbers:
        device_of(int(gpu))
    chosen = ",".join(map(visible, numbers))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # which would kill torchrun; its processes ask for it again
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={len(numbers)}"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": chosen}
    if environment.get("OMP_NUM_THREADS") == str(granted_cores()):  # for all of them together: torchrun gives each one
        del environment["OMP_NUM_THREADS"]
    os.execve(sys.executable, [*torchrun, "-m", "trainer", *sys.argv[1:]], environment)


def under_torchrun() -> bool:
    return "LOCAL_RANK" in os.environ


@contextmanager
def joined(gpu: str | int) -> Iterator[Process]:
    """This process in torchrun's group, or alone. `gpu` numbers count only without torchrun.

    The group is left before Python ends, after an error too: one of gloo's threads that lets go of its last tensor
    then would take the process with it, "terminate called without an active exception"
    (https://github.com/pytorch/pytorch/pull/179291). NCCL has no such threads, but after an error would wait for
    processes that wait for this one.
    """
    process, failed = _join(gpu), True
    try:
        yield process
        failed = False
    finally:
        if dist.is_initialized() and (process.device.type == "cpu" or not failed):
            dist.destroy_process_group()


def _join(gpu: str | int) -> Process:
    alone = not under_torchrun()
    device = device_of("cpu" if gpu == "cpu" else gpu if alone else int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)  # else what pins memory would also open the first GPU
    if alone:
        return Process(0, 1, device)
    _save_and_leave_with_parent()
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl", timeout=timedelta(seconds=PATIENCE_SECONDS))
    return Process(dist.get_rank(), dist.get_world_size(), device)


def _save_and_leave_with_parent() -> None:
    """SIGTERM for this process when torchrun is gone, which else would leave it running."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
