"""SIGKILL at any moment of either stage costs time, never a byte of the result."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from tqdm import tqdm

from pipeline.codes import shard_codes
from pipeline.targets import shard_targets
from shards.contract import PLAN_NAME
from tests.conftest import Tally
from tests.helpers import ROOT, codes_settings, speechlike, targets_settings

KILLS, KILLS_OF_ONE_FOLDER = 20, 5
SHORT_FILES = 160  # so that planning takes a good part of the first stage


def codes_quietly(audio: Path, work: Path) -> None:
    silence()
    shard_codes(codes_settings(audio, work, "segments_per_shard=16"))


def targets_quietly(audio: Path, work: Path) -> None:
    silence()
    shard_targets(targets_settings(work))


def silence() -> None:
    torch.set_num_threads(1)
    torch._C._jit_set_profiling_executor(False)  # no second of compiling before the first codes
    tqdm.set_lock(threading.RLock())  # its own lock would outlive a kill
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 (until the process ends)


STAGES = {"codes": codes_quietly, "shards": targets_quietly}


@pytest.fixture(scope="module")
def context() -> Iterator[ForkServerContext]:
    """Processes that start with everything imported, in milliseconds."""
    forkserver = multiprocessing.get_context("forkserver")
    heavy = [__name__, "tests.test_killed_training"]  # one server serves both files
    forkserver.set_forkserver_preload([*heavy, "torch._dynamo", "huggingface_hub.file_download"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        yield forkserver


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings of four speakers among many that are too short."""
    folder = tmp_path_factory.mktemp("recordings")
    for number in range(SHORT_FILES):
        speaker = folder / f"speaker_{number % 4}"
        speaker.mkdir(exist_ok=True)
        seconds = 0.7 if number % 10 == 0 else 0.01
        soundfile.write(speaker / f"{number}.wav", speechlike(seconds, 16_000, number), 16_000)
    return folder


def start(context: ForkServerContext, stage: str, audio: Path, work: Path) -> BaseProcess:
    process = context.Process(target=STAGES[stage], args=(audio, work))
    process.start()
    return process


def cpu_seconds(process: BaseProcess) -> float:
    """What it has computed so far: unlike time on the wall, the same under any load. Raises OSError once it ended."""
    assert process.pid
    return time.clock_gettime((~process.pid << 3) | 2)  # Linux: the CPU clock of a process


def timed(stage: str, audio: Path, work: Path, told: Connection[float, Any]) -> None:
    STAGES[stage](audio, work)
    told.send(time.process_time())


def undisturbed(context: ForkServerContext, stage: str, audio: Path, work: Path) -> float:
    """Its seconds of computing."""
    ours, theirs = context.Pipe()
    process = context.Process(target=timed, args=(stage, audio, work, theirs))
    process.start()
    process.join()
    assert process.exitcode == 0
    return float(ours.recv())


def killed(process: BaseProcess, seconds: float) -> bool:
    """Whether it was still running after `seconds` of computing."""
    with suppress(OSError):
        while process.is_alive() and cpu_seconds(process) < seconds:
            time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.fixture(scope="module")
def whole(context: ForkServerContext, audio: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of runs that nothing disturbed."""
    work = tmp_path_factory.mktemp("undisturbed") / "work"
    for stage in STAGES:
        undisturbed(context, stage, audio, work)
    return work


def contents(work: Path) -> dict[str, bytes]:
    """Every file; settings name the folder that they were used with."""
    files = (path for path in work.rglob("*") if path.is_file())
    return {str(path.relative_to(work)): path.read_bytes().replace(str(work).encode(), b"WORK") for path in files}


def place(names: list[str]) -> str:
    """Where a kill fell, by the files that it left."""
    if any(name.endswith(".tmp") for name in names):
        return "while a file was written"
    if PLAN_NAME not in names:
        return "before the plan stood"
    return "between files"


@pytest.mark.parametrize("stage", STAGES)
def test_killed_twenty_times(
    stage: str, context: ForkServerContext, audio: Path, whole: Path, tmp_path: Path, times: int, tally: Tally
) -> None:
    """At moments from all over the stage, a few times each folder; then one more run ends what was begun."""
    kills = KILLS * times
    expected = contents(whole)
    if stage == "codes":
        expected = {name: data for name, data in expected.items() if not name.startswith("shards/")}

    def fresh(name: str) -> Path:
        work = tmp_path / name
        work.mkdir()
        if stage == "shards":
            for file, data in contents(whole).items():
                if not file.startswith("shards/"):
                    (work / file).parent.mkdir(parents=True, exist_ok=True)
                    (work / file).write_bytes(data.replace(b"WORK", str(work).encode()))
        return work

    seconds = undisturbed(context, stage, audio, fresh("timed"))
    draw = random.Random(0)
    moments = [seconds * (number + draw.random()) / kills for number in range(kills)]
    later = moments[KILLS_OF_ONE_FOLDER:]
    draw.shuffle(later)
    moments[KILLS_OF_ONE_FOLDER:] = later  # the first folder is killed early on, again and again
    left: list[list[str]] = []
    early, kills_here, work = 0, 0, fresh("first")
    while len(left) < kills:
        if killed(start(context, stage, audio, work), moments[len(left)]):
            left.append(sorted(contents(work)))
            tally[f"SIGKILL, {stage}", place(left[-1])] += 1
            kills_here += 1
            if kills_here < KILLS_OF_ONE_FOLDER and len(left) < kills:
                continue
            undisturbed(context, stage, audio, work)
        else:  # this kill is tried again, on a new folder
            early += 1
            if kills_here:  # little was left to do
                moments[len(left)] *= 0.9
            else:  # the machine is quicker now than when it was timed
                moments[len(left) :] = [0.9 * moment for moment in moments[len(left) :]]
            assert early < 2 * kills, "most runs ended before they were killed"
        found = contents(work)
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == []
        kills_here, work = 0, fresh(f"after {len(left)} kills, {early} early ends")
    assert len({str(names) for names in left}) >= 3, f"the kills fell at too few places: {left}"
    if stage == "codes":
        assert any(PLAN_NAME not in names for names in left), "no kill fell before the plan stood"
