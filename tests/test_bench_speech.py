"""Which recordings of a collection the benchmarks use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from benchmarks import encoding


def test_speech_is_taken_from_all_of_a_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    files, found = [Path(f"{number:03}.wav") for number in range(450)], list[Path]()

    def readable(paths: Iterable[Path]) -> Iterator[Path]:
        found.extend(paths)
        return iter(())

    monkeypatch.setattr(encoding, "recordings_in", lambda _: files)
    monkeypatch.setattr(encoding, "readable", readable)
    assert not list(encoding._clips(Path()))
    assert sorted(found) == files, "a small collection has no more"
    assert found[199] > files[390], "the first 200 come from everywhere"
