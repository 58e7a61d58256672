"""SIGKILL at any moment of either stage costs time, never a byte of the result."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import soundfile
import torch

from pipeline.codes import shard_codes
from pipeline.plan import PLAN_NAME
from pipeline.targets import shard_targets
from tests.helpers import ROOT, codes_settings, speechlike, targets_settings

KILLS, KILLS_OF_ONE_FOLDER = 20, 5
SHORT_FILES = 240  # so that planning takes a good part of the first stage


def codes_quietly(audio: Path, work: Path) -> None:
    silence()
    shard_codes(codes_settings(audio, work, "segments_per_shard=16"))


def targets_quietly(audio: Path, work: Path) -> None:
    silence()
    shard_targets(targets_settings(work))


def silence() -> None:
    torch.set_num_threads(1)
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
        seconds = 0.7 if number % 12 == 0 else 0.01
        soundfile.write(speaker / f"{number}.wav", speechlike(seconds, 16_000, number), 16_000)
    return folder


def start(context: ForkServerContext, stage: str, audio: Path, work: Path) -> BaseProcess:
    process = context.Process(target=STAGES[stage], args=(audio, work))
    process.start()
    return process


def undisturbed(context: ForkServerContext, stage: str, audio: Path, work: Path) -> float:
    """Its seconds."""
    began = time.monotonic()
    process = start(context, stage, audio, work)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - began


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


@pytest.mark.parametrize("stage", STAGES)
def test_killed_twenty_times(stage: str, context: ForkServerContext, audio: Path, whole: Path, tmp_path: Path) -> None:
    """At moments from all over the stage, a few times each folder; then one more run ends what was begun."""
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
    delays = [seconds * (number + draw.random()) / KILLS for number in range(KILLS)]
    draw.shuffle(delays)
    left, early, kills_here, work = [], 0, 0, fresh("first")
    while delays:
        process = start(context, stage, audio, work)
        process.join(delays[-1])
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            left.append(sorted(contents(work)))
            delays.pop()
            kills_here += 1
            if kills_here < KILLS_OF_ONE_FOLDER and delays:
                continue
        else:  # ended before: little was left to do; this kill is tried again, on a new folder
            assert process.exitcode == 0
            early += 1
            delays[-1] *= 0.9
        undisturbed(context, stage, audio, work)
        found = contents(work)
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == []
        kills_here, work = 0, fresh(f"before kill {len(left)}, {early} early")
        assert early < KILLS, "most runs ended before they were killed"
    print("KILLS", len(left), early, seconds, len({str(n) for n in left}), [PLAN_NAME in n for n in left].count(False))
    assert len(left) == KILLS
    assert len({str(names) for names in left}) > 3, f"the kills fell at too few places: {left}"
    if stage == "codes":
        assert any(PLAN_NAME not in names for names in left), "no kill fell before the plan stood"
