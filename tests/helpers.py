"""What several tests need: audio made by code, commands run as users run them."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from configs.loader import load_settings
from pipeline.settings import CodesSettings, TargetsSettings
from pipeline.teachers import Taught, Teacher, whole_recording
from shards.contract import COARSE_48K
from shards.storage import Location
from shards.writer import read_metadata, read_table, write_table

ROOT = Path(__file__).parent.parent
TINY_SNAC = str(ROOT / "demo" / "snac_tiny_24khz")


def speechlike(seconds: float, rate: int, seed: int) -> npt.NDArray[np.float32]:
    """Noise and tones under a slow envelope, peak 0.5: enough for a codec to give varied tokens."""
    random = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    envelope = 0.5 + 0.5 * np.sin(2 * np.pi * (3 * time + random.random()))
    tones = sum(np.sin(2 * np.pi * f * time) for f in random.uniform(100, 3000, 5))
    audio = envelope * (tones + 0.3 * random.standard_normal(len(time)))
    return (0.5 * audio / np.abs(audio).max()).astype(np.float32)


def restored(path: Path, teacher: Teacher, start_coarse: int = 0) -> npt.NDArray[np.float32]:
    """A file's target from coarse token `start_coarse` to its end."""
    row = {**whole_recording(path), "start_coarse": start_coarse}
    row["n_samples"] -= start_coarse * COARSE_48K
    (taught,) = teacher.segments([[row]])
    assert isinstance(taught, Taught), taught
    return taught.target


def run_command(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`python -m WORDS` as a user would run it, output captured."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def codes_words(audio: Location, work: Location, *more: str) -> list[str]:
    small = ["gpu=cpu", "min_seconds=0.3", "segment_length=0.6", "segments_per_shard=8", "validation_fraction=0.25"]
    given = [f"audio={audio}", f"work={work}", f"pretrained_model={TINY_SNAC}", *small, *more]
    return ["shard-codes", *_last_wins(given)]


def targets_words(work: Path, *more: str) -> list[str]:
    return ["shard-targets", *_last_wins([f"work={work}", "gpu=cpu", "teacher=recording", *more])]


def codes_settings(audio: Location, work: Location, *more: str) -> CodesSettings:
    return load_settings(CodesSettings, "shard_codes.json", codes_words(audio, work, *more)[1:])


def targets_settings(work: Path, *more: str) -> TargetsSettings:
    return load_settings(TargetsSettings, "shard_targets.json", targets_words(work, *more)[1:])


@contextmanager
def longest_file(size: int) -> Iterator[None]:
    """Writing fails beyond so many bytes of a file, as on a disk that is full, with another of the system's errors."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def forget_contents(work: Path) -> None:
    """Makes its codes those of 0.1.0, which do not know the content of their files."""
    for path in (work / "codes").glob("*/*.parquet"):
        write_table(path, read_table(path).drop_columns("content_crc32"), read_metadata(path))


def _last_wins(given: list[str]) -> list[str]:
    return list({word.split("=")[0]: word for word in given}.values())


def no_such_user(number: int) -> None:
    """`pwd.getpwuid` of a container whose user is a mere number."""
    raise KeyError(f"getpwuid(): uid not found: {number}")
