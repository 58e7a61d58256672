"""Shards in several processes of this machine, one for each GPU (or `workers` of them on the CPU).

Each process builds the stage from its settings and is given one shard at a time over a pipe of its own, so that a
process that is killed takes nothing along: its shard goes to another. Processes end with their parent.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from tqdm import tqdm

from codec.snac import device_of, visible
from pipeline.ahead import cores_each, use_cores
from pipeline.execute import FATAL, Progress, attempt
from pipeline.settings import ExecutionSettings
from pipeline.stage import Stage
from shards.errors import UserError
from shards.files import described

MAX_DEATHS = 3  # of processes that made the same shard
SILENCE_SECONDS = 600.0  # of all processes; SIDON on a CPU may take longer for what it restores together


@dataclass
class Worker:
    device: str
    process: BaseProcess
    connection: Connection[Any, Any]
    number: int | None = None  # of the shard that it makes


def processes(stage: Stage, numbers: Sequence[int], progress: Progress) -> None:
    """Makes these shards. Raises UserError for what a process says concerns the whole run."""
    waiting, deaths = deque(numbers), Counter[int]()
    devices = stage.settings.devices() * (stage.settings.workers or 1)
    for device in stage.settings.devices():
        device_of(device)
    workers = [_start(stage, device, len(devices)) for device in devices[: len(waiting)]]
    try:
        while waiting or any(worker.number is not None for worker in workers):
            for worker in workers:
                if worker.number is None and waiting:
                    _give(worker, waiting)
            busy = {worker.connection: worker for worker in workers if worker.number is not None}
            if not (came := wait(busy, SILENCE_SECONDS)):
                who = ", ".join(f"{worker.process.pid} (shard {progress.name(n)})" for worker in busy.values()
                                if (n := worker.number) is not None)  # fmt: skip
                tqdm.write(
                    f"no progress for {SILENCE_SECONDS / 60:g} minutes of processes {who}: `ps -o stat,wchan -p …` "
                    "shows R for one that computes, T for a stopped one, D for one that waits for a disk or server"
                )
            for connection in came:
                worker = busy[connection]  # type: ignore[index]
                try:
                    _listen(worker, progress)
                except (EOFError, ConnectionResetError):  # the latter where it died before it read its number
                    workers.remove(worker)
                    _bury(worker, waiting, deaths, progress)
                    workers.append(_start(stage, worker.device, len(devices)))
    finally:
        for worker in workers:
            worker.process.kill()  # what it has begun is left out, for the next run
            worker.process.join()
            worker.connection.close()


def _start(stage: Stage, device: str, count: int) -> Worker:
    return Worker(device, *_process(work, type(stage), stage.settings.of_one(device), count))


def _process(
    target: Callable[..., None], kind: type[Stage], settings: Any, *more: Any
) -> tuple[BaseProcess, Connection[Any, Any]]:
    """One that starts with everything imported, and this end of its pipe."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([kind.__module__])
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(kind, settings, theirs, *more), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _give(worker: Worker, waiting: deque[int]) -> None:
    worker.number = waiting.popleft()
    with suppress(ConnectionError):  # it is dead, as its end of the pipe will say
        worker.connection.send(worker.number)


def _listen(worker: Worker, progress: Progress) -> None:
    kind, value = worker.connection.recv()
    assert worker.number is not None
    if kind == "advance":
        progress.advance(worker.number, value)
    elif kind == "fatal":
        raise UserError(value)
    else:
        number, worker.number = worker.number, None
        progress.finish(number, value)


def _bury(worker: Worker, waiting: deque[int], deaths: Counter[int], progress: Progress) -> None:
    """Its shard comes first again. Raises UserError when this shard keeps killing."""
    worker.connection.close()
    worker.process.join()
    assert worker.number is not None
    deaths[worker.number] += 1
    if deaths[worker.number] == MAX_DEATHS:
        raise UserError(
            f"{MAX_DEATHS} processes died over shard {progress.name(worker.number)} (exit code "
            f"{worker.process.exitcode}; −9 is what the system does when memory runs out): lower batch_seconds or "
            "window_seconds, or the number of processes"
        )
    waiting.appendleft(worker.number)


def work(kind: type[Stage], settings: Any, connection: Connection[Any, Any], count: int) -> None:
    """What a process does: shard numbers in; seconds and outcomes out."""
    _belong_to_parent()
    use_cores(cores_each(count))
    try:
        stage = kind(_seeing_its_gpu_alone(settings))
        while True:
            number = connection.recv()
            problem = attempt(stage, number, lambda seconds: connection.send(("advance", seconds)))
            connection.send(("done", problem))
    except EOFError:
        return
    except FATAL as error:
        connection.send(("fatal", described(error)))


def _seeing_its_gpu_alone(settings: Any) -> Any:
    """For a process that has touched none yet. There it is number 0, which TorchScript's constants name."""
    if settings.gpu == "cpu":
        return settings
    os.environ["CUDA_VISIBLE_DEVICES"] = visible(settings.gpu)
    return settings.of_one(0)


def _belong_to_parent() -> None:
    """Called first: Ctrl-C is the parent's, the end comes with it, and nothing outlives a process that it kills."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tqdm.set_lock(threading.RLock())  # its own takes a semaphore of the system too
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def ask(kind: type[Stage], settings: ExecutionSettings) -> Any:
    """`kind(settings).known`, as a process of the first device finds. Raises UserError for what it cannot."""
    device_of(settings.devices()[0])
    process, ours = _process(_tell, kind, settings.of_one(settings.devices()[0]))
    try:
        found, problem = ours.recv()
    except EOFError:
        process.join()
        problem = f"the process that loads the model died (exit code {process.exitcode}; −9: memory ran out)"
    finally:
        process.kill()
        ours.close()
    if problem:
        raise UserError(problem)
    return found


def _tell(kind: type[Stage], settings: Any, connection: Connection[Any, Any]) -> None:
    _belong_to_parent()
    connection.send(answer(kind, _seeing_its_gpu_alone(settings)))


def answer(kind: type[Stage], settings: Any) -> tuple[Any, str]:
    """What a stage finds out when it is built, and what kept it from that."""
    try:
        return kind(settings).known, ""
    except FATAL as error:
        return None, described(error)
