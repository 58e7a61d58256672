"""What a run leaves for people and programs: training.log, metrics.jsonl, TensorBoard and a progress bar."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from configs.progress import progress_bar
from shards.errors import UserError, printable
from shards.files import write_whole
from trainer import watch

if TYPE_CHECKING:
    from trainer.boards import Boards


class LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A disk that is full is said once, where training ends for want of a checkpoint."""


class RunLog:
    """`training.log` for people, `metrics.jsonl` (one object per line: kind, step, named values) for programs.

    A resumed run first drops the lines of steps that it will do again. A process that is not first writes nothing but
    what it waits for, and what ended it.
    """

    def __init__(
        self, run: Path, first_step: int, total_steps: int, writes: bool, boards: Boards | None = None
    ) -> None:
        self._metrics = run / "metrics.jsonl"
        self._writes = writes
        self._logger = logging.getLogger("trainer")
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False
        self._boards = boards
        self._watch = watch.Watch(self._is_slow)
        self._close_files()  # of a run before in this process
        if writes:
            self._drop_after(first_step)
        handler = LogFile(run / "training.log", delay=True)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._logger.addHandler(handler)
        self.bar = progress_bar(total=total_steps, initial=first_step, desc="training", unit="step", disable=not writes)

    def say(self, text: str) -> None:
        if self._writes:
            line = printable(text)
            self._logger.info(line)
            tqdm.write(line)

    def ended_by(self, error: Exception) -> None:
        """Not to the terminal, where the command says it: that may be kept nowhere."""
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        with suppress(OSError):  # of a folder that is away, or on another machine
            self._logger.error(printable(" ".join(text.split())))

    def slowly(self, does: str) -> AbstractContextManager[None]:
        """Says so where it takes minutes, on any process: of several, the one that says nothing stands still."""
        return self._watch.doing(does)

    def _is_slow(self, does: str) -> None:
        line = f"for {watch.SLOW_SECONDS / 60:g} minutes process {os.getpid()} on {socket.gethostname()} {does}"
        with suppress(OSError):  # of a folder that is away
            self._logger.warning(line)
        tqdm.write(line)

    def metrics(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if self._writes:
            with self._metrics.open("a") as file:
                file.write(as_json({"kind": kind, "step": step, **values}) + "\n")
            if self._boards:
                self._boards.metrics(kind, step, values)

    def flush(self) -> None:
        """To the disk: of steps that a checkpoint has done, a power cut would take lines that are not written again."""
        with suppress(FileNotFoundError), self._metrics.open("rb") as file:
            os.fsync(file.fileno())

    def progress(self, values: Mapping[str, float]) -> None:
        """One more step, and its values on the bar."""
        loss = "".join(f"{name} {values[name]:.4f}, " for name in ("loss", "discriminator") if name in values)
        self.bar.set_postfix_str(
            f"phase {values['phase']}, {loss}grad {values.get('grad_norm', 0):.3g}, "
            f"{values['audio_seconds_per_second']:.1f} audio s/s, wait {values['data_wait_share']:.0%}, "
            f"{values['memory_gib']:.1f} GiB",
            refresh=False,
        )
        self.bar.update()

    def close(self) -> None:
        self.bar.close()
        self._watch.close()
        if self._boards:
            self._boards.close()
        self._close_files()

    def _close_files(self) -> None:
        for handler in list(self._logger.handlers):
            handler.close()
            self._logger.removeHandler(handler)

    def _drop_after(self, step: int) -> None:
        if not self._metrics.exists():
            return
        kept = []
        lines = self._metrics.read_text().splitlines() if step else []  # without a checkpoint the run begins anew
        for line in lines:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except ValueError:  # the line that a kill cut off
                continue
        write_whole(self._metrics, "".join(kept))


def as_json(value: Any, indent: int | None = None) -> str:
    """NaN and infinity, which JSON does not know, become null."""
    return json.dumps(_known(value), allow_nan=False, indent=indent)


def _known(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _known(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
