"""`just workflow`: the three commands one after the other, each in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

from pipeline.settings import WorkflowSettings
from shards.storage import Url


def workflow(settings: WorkflowSettings) -> None:
    """Checks all settings, then runs. Leaves with the exit code of the first command that fails."""
    work, model = settings.work, settings.pretrained_model
    gpu = settings.gpu
    codes = {"audio": settings.audio, "work": work, "pretrained_model": model, "gpu": gpu, **settings.codes}
    targets = {"work": work, "gpu": gpu, **settings.targets}
    train = {
        "shards": work / "shards",
        "run": settings.run,
        "pretrained_model": model,
        "gpu": gpu,
        "resume": "auto",
    }
    commands = {
        "codes": ("pipeline", "shard-codes", codes),
        "targets": ("pipeline", "shard-targets", targets),
        "train": ("trainer", "train", {**train, **settings.train}),
    }
    for step, command in commands.items():
        _run(*command, "--check", f"--step={step}.")
    for step, command in commands.items():
        _run(*command, f"--step={step}.")


def _run(module: str, command: str, values: dict[str, Any], *options: str) -> None:
    run_module(module, command, *options, *(f"{key}={_written(value)}" for key, value in values.items()))


def run_module(*words: str) -> None:
    """`python -m WORDS` in a process of its own. Leaves with its exit code where that is not 0.

    SIGTERM is passed on to it, Ctrl-C has reached it already: it is waited for, as it may have something to save.
    """
    asked: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    with subprocess.Popen([sys.executable, "-m", *words]) as process:
        try:
            while (code := process.poll()) is None:
                if asked:
                    process.send_signal(asked.pop())
                time.sleep(0.1)
        except KeyboardInterrupt:
            code = process.wait() or 128 + signal.SIGINT
    signal.signal(signal.SIGTERM, before)
    if code == -signal.SIGKILL:  # it had no time to say so
        name = " ".join(words[:2])
        click.echo(f"error: `python -m {name}` was killed: out of memory? The kernel's log says", err=True)
    if code:
        sys.exit(code if code > 0 else 128 - code)


def _written(value: Any) -> str:
    """As a command reads it: text and paths as they are, all else as JSON."""
    return str(value) if isinstance(value, str | Path | Url) else json.dumps(value)
