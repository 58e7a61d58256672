"""A short form of `just fuzz`: seeded damage instead of atheris."""

from __future__ import annotations

import os
import random
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Tally
from tests.torture.corruption import DAMAGES
from tests.torture.fuzz import EscapeError, feeder, watching
from tests.torture.readers import READERS, Reader, finished

INPUTS = 60


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    finished(folder)
    return folder


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_value_or_an_error_of_ours(reader: Reader, whole: Path, tmp_path: Path, times: int, tally: Tally) -> None:
    seeds, chance, feed = reader.seeds(whole), random.Random(0), feeder(reader, tmp_path)
    for seed in seeds:
        (tmp_path / reader.name).write_bytes(seed)
        reader.read(tmp_path / reader.name)
    with watching(tmp_path):
        for data in reader.hostile:
            feed(data)
        for _ in range(INPUTS * times):
            data = chance.choice(seeds)
            for _ in range(chance.randrange(1, 4)):
                data = chance.choice(DAMAGES)(data, chance) or b"\0"
            feed(data)
            tally["damaged three times over", reader.name] += 1


@pytest.mark.parametrize(
    "escape",
    [
        lambda outside: (outside / "file").write_text(""),
        lambda outside: (outside / "folder").mkdir(),
        lambda outside: (outside / "inside" / "whole").rename(outside / "elsewhere"),
        lambda outside: os.close(os.open(outside / "file", os.O_WRONLY | os.O_CREAT)),
        lambda outside: subprocess.run(["true"], check=True),
    ],
)
def test_escapes_are_seen(escape: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "whole").touch()
    with watching(tmp_path / "inside"), pytest.raises(EscapeError):
        escape(tmp_path)
    escape(tmp_path)


def test_what_other_threads_do_is_no_escape(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    begin = threading.Event()

    def touch() -> None:
        begin.wait()
        (tmp_path / "file").touch()

    other = threading.Thread(target=touch)
    other.start()
    with watching(tmp_path / "inside"):
        begin.set()
        other.join()
    assert (tmp_path / "file").exists()
