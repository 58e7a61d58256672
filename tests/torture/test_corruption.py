"""Damage to a finished folder of shards: `just verify` notices all of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.command_helpers import in_process
from tests.torture.corruption import DAMAGES, injuries


@pytest.mark.parametrize("pattern", ["*/*.tar", "*/*.parquet", "index.parquet", "SHA256SUMS"])
def test_every_damage_is_noticed(pattern: str, work: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(work / "shards", tmp_path / "shards"))

    def notices(path: Path) -> bool:
        return in_process(["verify", f"shards={shards}"]).exit_code == 1

    assert not notices(shards)
    found = list(injuries(sorted(shards.glob(pattern)), notices, count=40, seed=0, root=shards))
    assert {injury.damage for injury in found} == {damage.__name__ for damage in DAMAGES}
    assert [injury for injury in found if not injury.noticed] == []
