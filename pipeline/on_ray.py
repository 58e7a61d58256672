"""Shards on Ray: actors that make one shard after the other. A Ray of its own on this machine, or a cluster's.

The nodes of a cluster need this repository under the same path, and the same files: a work folder that they share, or
a URL. An actor gets a shard only when Ray has found a place for it; where one dies, another is started, and its shard
comes first again. These are plain actors and not Ray Data's: a run that ended early left a thread of Ray Data behind,
and when it touched Ray once more, Ray ended the process before it could say why.
"""

from __future__ import annotations

import logging
import os
import signal
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.execute import FATAL, Progress, attempt
from pipeline.processes import MAX_DEATHS, answer
from pipeline.settings import ExecutionSettings
from pipeline.stage import Stage
from shards.errors import UserError, first_line, last_line
from shards.files import described

ROOT = Path(__file__).parent.parent
PATIENCE_SECONDS = 60


class Maker:
    """An actor: makes the shards whose numbers it is given. The stage is built once, for the first."""

    def __init__(self, kind: type[Stage], settings: Any) -> None:
        self._kind, self._settings = kind, settings
        self._stage: Stage | None = None

    def make(self, number: int | None) -> tuple[str | None, str]:
        """→ what kept this shard from being made, and what concerns the whole run; to None, that it has a place."""
        if number is None:
            return None, ""
        try:
            if self._stage is None:
                _use_cores_of_its_gpu()
                self._stage = self._kind(self._settings)
            return attempt(self._stage, number, lambda seconds: None), ""
        except FATAL as error:
            return None, described(error)


def _use_cores_of_its_gpu() -> None:
    """Ray grants torch one core for each actor; those beside a node's GPUs are for who reads and judges."""
    import ray
    import torch

    here = ray.get_runtime_context().get_node_id()
    resources = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
    if gpus := resources.get("GPU"):
        torch.set_num_threads(max(int(resources.get("CPU", 1) // gpus), 1))


def ask(kind: type[Stage], settings: ExecutionSettings) -> Any:
    """`kind(settings).known`, as a node finds that makes shards. Raises UserError for what it cannot."""
    with _connected(settings):
        import ray

        asked = ray.remote(max_calls=1, **_place(settings))(answer)
        try:
            found, problem = ray.get(_first([asked.remote(kind, _of_one(settings))], PATIENCE_SECONDS))
        except ray.exceptions.RayError as error:
            raise UserError(f"Ray gave up: {last_line(str(error))}; the same command goes on") from error
    if problem:
        raise UserError(problem)
    return found


def actors(stage: Stage, numbers: Sequence[int], progress: Progress) -> None:
    """Makes these shards. Raises UserError for what an actor says concerns the whole run, or when Ray gives up."""
    settings = stage.settings
    with _connected(settings):
        import ray

        size = settings.workers or (1 if settings.gpu == "cpu" else int(ray.cluster_resources().get("GPU", 0)))
        maker = ray.remote(**_place(settings))(Maker)
        waiting, deaths = deque(numbers), Counter[int | None]()
        busy: dict[Any, tuple[Any, int | None]] = {}  # answer to come → the actor, and the shard that it makes

        def give(actor: Any, number: int | None) -> None:
            busy[actor.make.remote(number)] = actor, number

        for _ in range(min(size, len(numbers))):
            give(maker.remote(type(stage), _of_one(settings)), None)
        while (are_working := any(number is not None for _, number in busy.values())) or waiting:
            came = _first(list(busy), None if are_working else PATIENCE_SECONDS)
            actor, number = busy.pop(came)
            try:
                problem, fatal = ray.get(came)
            except ray.exceptions.RayError as error:  # it died, or its node
                ray.kill(actor)
                deaths[number] += 1
                if deaths[number] == MAX_DEATHS * (size if number is None else 1):  # a node dies with all of its actors
                    over = "before they had a shard" if number is None else f"over shard {progress.name(number)}"
                    raise UserError(
                        f"{deaths[number]} actors died {over}, the last because of: {last_line(str(error))}. Where "
                        "memory ran out, lower batch_seconds or window_seconds; the same command goes on"
                    ) from error
                if number is not None:
                    waiting.appendleft(number)
                give(maker.remote(type(stage), _of_one(settings)), None)
                continue
            del deaths[number]
            if fatal:
                raise UserError(fatal)
            if number is not None:
                progress.finish(number, problem)
            if waiting:
                give(actor, waiting.popleft())


def _first(answers: list[Any], patience: float | None) -> Any:
    """The one that comes first. Says where none comes in `patience` seconds: Ray waits for a place without a word."""
    import ray

    came, _ = ray.wait(answers, timeout=patience)
    if not came:
        tqdm.write(
            f"no answer of Ray for {patience:g} s: a node still imports or loads models, or none has a CPU (and GPU) "
            "free, as `ray status` says"
        )
        came, _ = ray.wait(answers)
    return came[0]


@contextmanager
def _connected(settings: ExecutionSettings) -> Iterator[None]:
    """Ray, quiet: the bar is ours. Raises UserError where it is missing, or lacks what `settings` ask for."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray tells its makers nothing
    try:
        import ray
    except ImportError as error:
        raise UserError(f"execute=ray: {error}: `just extras` installs Ray") from error

    at_sigterm = signal.getsignal(signal.SIGTERM)
    environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    address = settings.ray_address or "local"  # without one Ray would join whichever was last started on this machine
    try:
        ray.init(address, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises its own, gRPC's and the system's kinds
        ray.shutdown()  # half connected is possible
        raise UserError(f"ray_address={address}: {first_line(error)}") from error
    try:
        signal.signal(signal.SIGTERM, at_sigterm)  # Ray's own prints a stack, and may abort
        if settings.gpu != "cpu" and not ray.cluster_resources().get("GPU"):
            raise UserError("execute=ray: the cluster has no GPU; gpu=cpu runs on its CPUs")
        yield
    finally:
        ray.shutdown()


def _place(settings: ExecutionSettings) -> dict[str, int]:
    return {"num_cpus": 1, "num_gpus": 0 if settings.gpu == "cpu" else 1}


def _of_one(settings: ExecutionSettings) -> ExecutionSettings:
    return settings.of_one("cpu" if settings.gpu == "cpu" else 0)  # Ray shows each process its own GPU
