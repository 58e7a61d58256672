"""Damage to finished tars: `just verify` notices all of it."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.command_helpers import in_process
from tests.torture.corruption import DAMAGES, injuries


def test_every_damage_to_a_tar_is_noticed(work: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(work / "shards", tmp_path / "shards"))

    def notices(path: Path) -> bool:
        return in_process(["verify", f"shards={shards}"]).exit_code == 1

    assert not notices(shards)
    found = list(injuries(sorted(shards.glob("*/*.tar")), notices, count=40, seed=0, root=shards))
    assert {injury.damage for injury in found} == {damage.__name__ for damage in DAMAGES}
    assert [injury for injury in found if not injury.noticed] == []
