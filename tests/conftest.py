"""Fixtures shared by all tests: everything is seeded, small and offline."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # as shards.storage has it; read where gcsfs is imported

import torch
from snac import SNAC

from benchmarks.harness import report
from codec.snac import load_snac
from pipeline.codes import shard_codes
from pipeline.targets import shard_targets
from shards import storage
from tests import hub_server
from tests.helpers import TINY_SNAC, codes_settings, speechlike, targets_settings
from tests.real_speech import unpack
from tests.s3_server import Door, serving
from trainer import checkpoint
from trainer.decoder import warm_start

torch.set_num_threads(1)


Tally = Counter[tuple[str, str]]  # what was done, and where → how often, none of it with a loss


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--times", type=int, default=1, help="how often what tortures is repeated (just torture)")


def pytest_configure(config: pytest.Config) -> None:
    if (times := config.getoption("--times")) < 1:
        raise pytest.UsageError(f"--times={times}: at least 1, or nothing is tortured")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ray last: its library stays in a process that used it, and on Python 3.13 what is forked from there dies."""
    items.sort(key=lambda item: item.path.name == "test_ray.py")


@pytest.fixture(scope="session")
def times(request: pytest.FixtureRequest) -> int:
    found: int = request.config.getoption("--times")
    return found


@pytest.fixture(scope="session")
def tally(times: int) -> Iterator[Tally]:
    """Counts what was survived; repeated torture leaves the table in benchmarks/results/."""
    counts: Tally = Counter()
    yield counts
    if times > 1:
        rows = [{"what": what, "where": where, "times": n, "lost": 0} for (what, where), n in sorted(counts.items())]
        report("torture", rows, repeated=times)


@pytest.fixture
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def snac() -> SNAC:
    """The stand-in SNAC, frozen."""
    return load_snac(TINY_SNAC)[0]


@pytest.fixture(scope="session")
def real_speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of real speech; tests that take it are skipped where it cannot be had. Read only."""
    return unpack(tmp_path_factory.mktemp("speech"))


@pytest.fixture(scope="session")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight recordings of four speakers, 0.4 to 3.2 s, at several rates, mono and stereo."""
    folder = tmp_path_factory.mktemp("recordings")
    rates = [48_000, 44_100, 24_000, 16_000]
    for speaker in range(4):
        (folder / f"speaker_{speaker}").mkdir()
        for take in range(2):
            seed = 2 * speaker + take
            audio = speechlike(0.4 + 0.4 * seed, rates[speaker], seed)
            stereo = np.stack([audio, 0.5 * audio], axis=1) if take else audio
            soundfile.write(folder / f"speaker_{speaker}" / f"take_{take}.wav", stereo, rates[speaker], "FLOAT")
    return folder


@pytest.fixture(scope="session")
def work(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plan, codes and shards of `recordings`, each recording its own target. Read only: copy before changing."""
    folder = tmp_path_factory.mktemp("data") / "work"
    shard_codes(codes_settings(recordings, folder))
    shard_targets(targets_settings(folder))
    return folder


@pytest.fixture
def shards(work: Path, tmp_path: Path) -> Path:
    """A copy of the shards that a test may damage."""
    return Path(shutil.copytree(work / "shards", tmp_path / "shards"))


@pytest.fixture(scope="module")
def server() -> Iterator[Door]:
    with serving() as door:
        yield door


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage that is away is not waited for."""
    monkeypatch.setattr(storage, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(storage, "PATIENCE_SECONDS", 0)


@pytest.fixture
def door(server: Door, impatient: None) -> Iterator[Door]:
    """The way to `s3://corpus`, without faults and without patience."""
    server.asked.clear()
    yield server
    server.fault = lambda method, path: None


@pytest.fixture(scope="session")
def untrained(snac: SNAC, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the stand-in's warm start: the least that export and decode take."""
    path = tmp_path_factory.mktemp("untrained") / "untrained.pt"
    frozen = {"snac": TINY_SNAC, "snac_sha256": load_snac(TINY_SNAC)[1].sha256}
    checkpoint.save(path, {"decoder": warm_start(snac, "zero", 0).state_dict(), **frozen})
    return path


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[hub_server.Hub]:
    with hub_server.serving(tmp_path / "hub_cache") as hub:
        yield hub
