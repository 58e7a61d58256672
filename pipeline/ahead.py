"""Work done ahead in threads, its order and its memory kept: what comes out is what a plain loop would give.

Who may leave a generator of these early closes it. Left to the garbage collector, it may wait for its threads inside of
the start of another one, which then never starts.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

END = object()
CLOSE_SECONDS = 5.0
POLL_SECONDS = 0.1  # after which a thread that nobody listens to any more notices it
LEAST_THREADS = 4  # also on fewer cores: reading waits for disks


def thread_count(asked: int | Literal["auto"]) -> int:
    """auto: as many as this process has cores."""
    return max(torch.get_num_threads(), LEAST_THREADS) if asked == "auto" else asked


def cores_each(threads: int) -> int:
    """When as many threads share the cores of this one."""
    return max(torch.get_num_threads() // threads, 1)


def use_cores(cores: int) -> None:
    """In this thread. When a thread first computes, torch gives it what any thread asked for last: that comes first."""
    torch.get_num_threads()
    torch.set_num_threads(cores)


class Ahead(Iterator[Item]):
    """Runs `items` in a thread with `cores` of its own, at most `size` ahead. Raises here what it raises there."""

    def __init__(self, items: Iterable[Item], size: int, cores: int) -> None:
        self._queue: queue.Queue[object] = queue.Queue(size)
        self._closed = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(items, cores), daemon=True)
        self._thread.start()

    def _run(self, items: Iterable[Item], cores: int) -> None:
        use_cores(cores)
        try:
            for item in items:
                if not self._put(item):
                    return
        except BaseException as error:  # it belongs to whoever listens
            self._error = error
        self._put(END)

    def _put(self, item: object) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def __next__(self) -> Item:
        item = self._queue.get()
        if item is END:
            self._queue.put(END)  # for whoever asks again
            if self._error is not None:
                raise self._error
            raise StopIteration
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """Ends the thread after what it has in hand: none should still compute while the process ends."""
        self._closed.set()
        self._thread.join(CLOSE_SECONDS)


class Clock:
    """How long a device worked, in `threads` at once, and how long it waited for what is read or is to be fetched."""

    def __init__(self, threads: int = 1) -> None:
        self._threads, self._began = threads, time.perf_counter()
        self._busy, self._audio = list[float](), list[float]()  # seconds; to append is safe in threads

    @contextmanager
    def busy(self, audio_seconds: float) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._busy.append(time.perf_counter() - began)
        self._audio.append(audio_seconds)

    def figures(self) -> tuple[float, float, float]:
        """Seconds of audio, seconds that they took, and the share of these that it was idle."""
        took = time.perf_counter() - self._began
        return sum(self._audio), took, max(1 - sum(self._busy) / (took * self._threads), 0)


def chained_ahead(sources: Iterable[Iterable[Item]], threads: int, size: int) -> Generator[Item, None, None]:
    """The items of all `sources`, one source after the other; `threads` of them run at once, each `size` ahead."""
    waiting, running = iter(sources), deque[Ahead[Item]]()
    try:
        while True:
            while len(running) < threads and (source := next(waiting, None)) is not None:
                running.append(Ahead(source, size, cores_each(threads)))
            if not running:
                return
            yield from running[0]
            running.popleft()
    finally:
        for ahead in running:
            ahead.close()


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int, size: int
) -> Generator[Result, None, None]:
    """`map`, in order, on `threads` threads, at most `size` items ahead."""
    with ThreadPoolExecutor(threads, initializer=use_cores, initargs=(cores_each(threads),)) as pool:
        running = deque[Future[Result]]()
        try:
            for item in items:
                running.append(pool.submit(function, item))
                if len(running) >= size:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
