"""What every benchmark shares: interleaved medians, the machine's name, a table, and JSON under results/.

Machines are noisy, so only ratios within one run are compared: the ways take turns, and each gives its median.
A module of this folder is one question: `python -m benchmarks.NAME` prints its table and writes results/NAME.json
(NAME.gpu.json on a GPU).
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from codec.audio import EXTENSIONS, AudioError, Recording, probe
from shards.files import write_whole

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchaudio", "snac", "transformers", "numpy", "webdataset", "soundfile", "pyarrow")


def recordings_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)


def readable(paths: Iterable[Path]) -> Iterator[Recording]:
    """Real speech holds files that are refused, too."""
    for path in paths:
        try:
            recording = Recording(path, probe(path))
        except AudioError:
            continue
        yield recording


def _of_recordings(_: click.Context, __: click.Parameter, folder: Path) -> Path:
    if not recordings_in(folder):
        raise click.BadParameter(f"{folder} holds no recordings ({', '.join(sorted(EXTENSIONS))})")
    return folder


FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
of_speech = click.argument("speech", type=FOLDER, callback=_of_recordings)
on_device = click.option("--gpu", default="cpu", show_default=True, help="Number of a GPU.")
of_crops = click.option("--crops", type=click.IntRange(min=1), default=2, show_default=True, help="In a batch.")
of_seconds = click.option(
    "--seconds", type=click.FloatRange(min=0.1), default=1.0, show_default=True, help="Of a crop."
)


def in_rounds(default: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    number = click.IntRange(min=1)
    return click.option("--rounds", type=number, default=default, show_default=True, help="Of which medians are taken.")


def make_new(folder: Path) -> None:
    """Ends the process with a line where it cannot be made, or is there."""
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        sys.exit(f"error: {folder}: {error.strerror}: name a new folder")


def interleaved(ways: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, float]:
    """Median seconds of each way over `rounds` turns. A way returns only when its work is done (synchronize a GPU)."""
    for way in ways.values():
        for _ in range(warm_up):
            way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(found) for name, found in seconds.items()}


def peak_mib(status: Path = Path("/proc/self/status")) -> float:
    """The largest resident size of the process whose status this is; getrusage's may be its parent's."""
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 1024


def machine(gpu: str = "cpu") -> dict[str, Any]:
    """Hardware and versions, for the result's file."""
    import torch

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": None if gpu == "cpu" else torch.cuda.get_device_name(int(gpu)),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def report(name: str, rows: Sequence[Mapping[str, Any]], gpu: str = "cpu", **context: Any) -> Path:
    """Prints `rows` as a table; writes them with the machine and `context` (settings, what was assumed) as JSON.

    `gpu` says where they were measured, as `on_device` gives it.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    hardware = machine(gpu)
    path = RESULTS / f"{name}{'.gpu' if hardware['gpu'] else ''}.json"
    write_whole(path, json.dumps({"rows": list(rows), **context, "machine": hardware}, indent=2) + "\n")
    print(f"written: {path}")
    return path


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:,.4g}" if isinstance(value, float) else str(value)


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
