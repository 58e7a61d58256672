"""Results in order from several processes, with few jobs in memory at a time."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import torch

from shards.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")


def ordered(work: Callable[[Job], Result], jobs: Iterator[Job], processes: int) -> Iterator[Result]:
    """work(job) for each job, in order; at most two jobs per process are under way. 0 processes: here.

    Each process computes on one thread, so that results do not depend on their number. Raises UserError when one dies.
    """
    if not processes:
        yield from map(work, jobs)
        return
    waiting: deque[Future[Result]] = deque()
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        try:
            for job in jobs:
                waiting.append(_submitted(pool, work, job))
                if len(waiting) >= 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                if process not in others:
                    process.kill()  # a minute of speech takes ViSQOL long, and one that stands still hears no SIGTERM
            raise
        except BrokenProcessPool as error:
            raise UserError("a process died: memory may be short; num_workers= sets their number") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _submitted(pool: ProcessPoolExecutor, work: Callable[[Job], Result], job: Job) -> Future[Result]:
    """A process that is started for it does not hear Ctrl-C: this one does, and ends it."""
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(work, job)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)
