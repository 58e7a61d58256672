"""Shards on Ray: a pool of Ray Data actors, one row per shard. A Ray of its own on this machine, or a cluster's.

The nodes of a cluster need this repository under the same path, and the same files: a work folder that they share, or
a URL. An actor that dies is started again by Ray and its shard with it; an exception inside one would end Ray's
whole job, so actors answer with what went wrong instead.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.execute import FATAL, Progress, attempt, described
from pipeline.processes import answer
from pipeline.settings import ExecutionSettings
from pipeline.stage import Stage
from shards.errors import UserError, first_line

ROOT = Path(__file__).parent.parent
RETRIES = 3  # of a shard whose actor died, each by an actor that is started again


class Maker:
    """What an actor does with a shard's number. The stage is built once, by the first."""

    def __init__(self, kind: type[Stage], settings: Any) -> None:
        self._kind, self._settings = kind, settings
        self._stage: Stage | None = None

    def __call__(self, row: dict[str, int]) -> dict[str, int | str]:
        number = int(row["number"])
        try:
            if self._stage is None:
                _use_cores_of_its_gpu()
                self._stage = self._kind(self._settings)
            return {"number": number, "problem": attempt(self._stage, number, lambda seconds: None) or "", "fatal": ""}
        except FATAL as error:
            return {"number": number, "problem": "", "fatal": described(error)}


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

        asked = ray.remote(num_cpus=1, num_gpus=0 if settings.gpu == "cpu" else 1, max_calls=1)(answer)
        try:
            found, problem = ray.get(asked.remote(kind, _of_one(settings)))
        except ray.exceptions.RayError as error:
            raise UserError(f"Ray gave up: {first_line(error)}; the same command goes on") from error
    if problem:
        raise UserError(problem)
    return found


def actors(stage: Stage, numbers: Sequence[int], progress: Progress) -> None:
    """Makes these shards. Raises UserError for what an actor says concerns the whole run, or when Ray gives up."""
    settings = stage.settings
    on_gpu = settings.gpu != "cpu"
    with _connected(settings):
        import ray
        import ray.data

        size = settings.workers or (int(ray.cluster_resources().get("GPU", 0)) if on_gpu else 1)
        left = list(numbers)
        for attempts_left in reversed(range(RETRIES + 1)):
            rows = ray.data.from_items([{"number": n} for n in left], override_num_blocks=len(left)).map(
                Maker,
                fn_constructor_args=(type(stage), _of_one(settings)),
                compute=ray.data.ActorPoolStrategy(size=min(size, len(left))),
                num_gpus=1 if on_gpu else 0,
                num_cpus=1,
                max_task_retries=RETRIES,
            )
            try:
                for row in rows.iter_rows():
                    if row["fatal"]:
                        raise UserError(row["fatal"])
                    left.remove(row["number"])
                    progress.finish(row["number"], row["problem"] or None)
                return
            except ray.exceptions.RayError as error:  # Ray does not retry a task whose actor died at a bad moment
                if not left:
                    return
                if not attempts_left:
                    raise UserError(f"Ray gave up: {first_line(error)}; the same command goes on") from error


@contextmanager
def _connected(settings: ExecutionSettings) -> Iterator[None]:
    """Ray, quiet: the bar is ours. Raises UserError where it is missing, or lacks what `settings` ask for."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray tells its makers nothing
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError(f"execute=ray: {error}: `just extras` installs Ray") from error

    environment = {"env_vars": {"PYTHONPATH": str(ROOT), "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}}
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it would say of an end on purpose, we say
    try:
        ray.init(settings.ray_address, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises its own, gRPC's and the system's kinds
        ray.shutdown()  # half connected is possible
        raise UserError(f"ray_address={settings.ray_address}: {first_line(error)}") from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    try:
        if settings.gpu != "cpu" and not ray.cluster_resources().get("GPU"):
            raise UserError("execute=ray: the cluster has no GPU; gpu=cpu runs on its CPUs")
        yield
    finally:
        ray.shutdown()


def _of_one(settings: ExecutionSettings) -> ExecutionSettings:
    return settings.of_one("cpu" if settings.gpu == "cpu" else 0)  # Ray shows each process its own GPU
