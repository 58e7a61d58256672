"""Damage to a finished folder of shards: `just verify` notices all of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from shards.errors import UserError
from tests.command_helpers import in_process
from tests.conftest import Tally
from tests.torture.corruption import DAMAGES, injuries
from tests.training_helpers import assert_same_state, small_training
from trainer import checkpoint


@pytest.mark.parametrize("pattern", ["*/*.tar", "*/*.parquet", "index.parquet", "SHA256SUMS"])
def test_every_damage_is_noticed(pattern: str, work: Path, tmp_path: Path, times: int, tally: Tally) -> None:
    shards = Path(shutil.copytree(work / "shards", tmp_path / "shards"))

    def notices(path: Path) -> bool:
        return in_process(["verify", f"shards={shards}"]).exit_code == 1

    assert not notices(shards)
    found = list(injuries(sorted(shards.glob(pattern)), notices, count=40 * times, seed=0, root=shards))
    assert {injury.damage for injury in found} == {damage.__name__ for damage in DAMAGES}
    assert [injury for injury in found if not injury.noticed] == []
    tally.update((f"damage: {injury.damage}", pattern) for injury in found)


def test_every_damage_to_a_checkpoint_is_noticed(work: Path, tmp_path: Path, times: int, tally: Tally) -> None:
    """All but that to bytes that no record is made of: then the state that is read is the same."""
    small_training(work, tmp_path / "run", max_steps=2)
    path = checkpoint.step_path(tmp_path / "run", 2)
    whole = checkpoint.load(path)

    def notices(path: Path) -> bool:
        try:
            found = checkpoint.load(path)
        except UserError:
            return True
        assert_same_state(found, whole)
        return False

    found = list(injuries([path], notices, count=40 * times, seed=0, root=tmp_path))
    assert sum(injury.noticed for injury in found) > len(found) / 2
    tally.update((f"damage: {injury.damage}", "checkpoints") for injury in found)
