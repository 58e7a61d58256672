"""`just status run=…`: where a training stands, from its files alone; while it runs and after it died."""

from __future__ import annotations

import fcntl
import json
import math
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from shards.errors import UserError
from trainer.settings import StatusSettings

TAIL_BYTES = 1 << 20  # of metrics.jsonl: some thousand lines
LOG_LINES = 3  # of training.log, without validations: these are told from metrics.jsonl
QUIET = {"kind", "step", "phase"}  # not shown among the values of a line


def status(settings: StatusSettings) -> None:
    run = settings.run
    if not (run / "settings.json").exists():
        raise UserError(f"run={run} is not the folder of a training: it has no settings.json")
    for line in report(run):
        click.echo(line)


def report(run: Path) -> Iterator[str]:
    lines = list(tail(run / "metrics.jsonl"))
    training = [line for line in lines if line["kind"] == "train"]
    validations = [line for line in lines if line["kind"] == "validation"]
    yield f"{run}: {_state(run)}{_age(run)}"
    if training:
        last, total = training[-1], _read(run / "progress.json").get("total_steps")
        of_all = f" of {total}" if total else ""
        yield f"training at step {last['step']}{of_all}, phase {last['phase']}: {_values(last)}"
        yield from _time_left(last, total)
    for line in validations[-1:]:
        yield f"validation at step {line['step']}: {_values(line)}"
    yield from _checkpoints(run, validations[-1]["step"] if validations else None)
    log = run / "training.log"
    if log.exists():
        said = [line for line in log.read_text().splitlines() if ": validation " not in line]
        yield from (f"  {line}" for line in said[-LOG_LINES:])


def _state(run: Path) -> str:
    if is_running(run):
        return "running"
    newest = max((run / "checkpoints").glob("step_*.pt"), default=None)
    if newest is None:
        if step := _read(run / "checkpoints" / "best.json").get("step"):
            return f"not running here, no checkpoint to go on from, best.pt is of step {step}"
        return "not running here, the same command begins anew"
    step, found = int(newest.stem.removeprefix("step_")), _read(newest.with_suffix(".json"))
    if step >= _read(run / "progress.json").get("total_steps", math.inf):
        return "done"
    patience = found.get("settings", {}).get("patience")
    if patience is not None and found.get("validations_since_best", 0) >= patience:
        return f"ended at step {step}: {patience} validations (patience) without a new best"
    return f"not running here, the same command with resume=auto goes on from step {step}"


def is_running(run: Path) -> bool:
    """A training holds a lock on its folder for as long as it lives, on this machine."""
    path = run / ".lock"
    if not path.exists():
        return False
    with path.open("r") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def tail(path: Path) -> Iterator[dict[str, Any]]:
    """The last lines of a file of JSON lines; one that is being written, or that a kill cut off, is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - TAIL_BYTES, 0))
        for line in file.read().splitlines():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict):
                yield entry


def _age(run: Path) -> str:
    path = run / "metrics.jsonl"
    if not path.exists():
        return ", nothing logged yet"
    return f", last logged {timedelta(seconds=round(max(time.time() - path.stat().st_mtime, 0)))} ago"


def _time_left(last: dict[str, Any], total: int | None) -> Iterator[str]:
    seconds = last.get("seconds_per_step")
    if total and seconds and last["step"] < total:
        yield f"at this speed {timedelta(seconds=round((total - last['step']) * seconds))} of training are left"


def _checkpoints(run: Path, shown: int | None) -> Iterator[str]:
    """Each with its scores, but for those of the validation that is `shown`."""
    for path in sorted((run / "checkpoints").glob("*.pt")):
        state = _read(path.with_suffix(".json"))
        if not path.exists():  # given up by the training just now
            continue
        step = state.get("step")
        scores = f": {_values(state['validation'])}" if "validation" in state and step != shown else ""
        yield f"{path.name}: step {step}{scores}"


def _values(line: dict[str, Any]) -> str:
    numbers = {name: value for name, value in line.items() if name not in QUIET and isinstance(value, int | float)}
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found
