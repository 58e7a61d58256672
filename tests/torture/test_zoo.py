"""Both stages over the whole zoo: every recording ends in one row a segment, with codes or with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards.contract import OK
from tests.command_helpers import in_process, rows_of
from tests.helpers import codes_words, targets_words
from tests.torture.zoo import ANY, Exhibit, build

ENOUGH = "max_failed_fraction=1"


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Exhibit], Path]:
    folder = tmp_path_factory.mktemp("zoo")
    exhibits = build(folder / "zoo")
    assert len(exhibits) >= 200
    assert in_process(codes_words(folder / "zoo", folder / "work", ENOUGH, "segment_length=3")).exit_code == 0
    assert in_process(targets_words(folder / "work", ENOUGH)).exit_code == 0
    assert in_process(["verify", f"shards={folder / 'work' / 'shards'}"]).exit_code == 0
    return exhibits, folder / "work"


@pytest.mark.parametrize(("stage", "content"), [("codes", "codes"), ("shards", "crc32")])
def test_each_ends_in_codes_or_in_a_reason(shown: tuple[list[Exhibit], Path], stage: str, content: str) -> None:
    exhibits, work = shown
    rows = rows_of(work / stage)
    assert rows.keys() == {exhibit.name for exhibit in exhibits}
    for name, found in rows.items():
        for row in found:
            assert (row["status"] == OK) == (row[content] is not None) == (row["reason"] is None), (name, row)


def test_each_ends_as_it_must(shown: tuple[list[Exhibit], Path]) -> None:
    exhibits, work = shown
    statuses = {name: {row["status"] for row in rows} for name, rows in rows_of(work / "shards").items()}
    expected = {exhibit.name: {exhibit.fate} for exhibit in exhibits if exhibit.fate != ANY}
    assert {name: statuses[name] for name in expected} == expected
