"""`just eval`: three decoders on the same crops of unseen groups."""

from __future__ import annotations

from pathlib import Path

import pytest
from snac import SNAC

from codec.snac import load_snac
from tests.helpers import TINY_SNAC
from tests.training_helpers import call
from trainer import checkpoint
from trainer.decoder import warm_start


@pytest.fixture(scope="module")
def model(snac: SNAC, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the warm start of seed 5."""
    path = tmp_path_factory.mktemp("model") / "warm_start.pt"
    frozen = {"snac": TINY_SNAC, "snac_sha256": load_snac(TINY_SNAC)[1].sha256}
    checkpoint.save(path, {"decoder": warm_start(snac, "zero", 5).state_dict(), **frozen})
    return path


def table(output: str) -> dict[str, list[float]]:
    rows = [line.rsplit(maxsplit=3) for line in output.splitlines()[-3:]]
    return {name.strip(): [float(value) for value in values] for name, *values in rows}


def test_three_decoders_on_the_same_crops(work: Path, model: Path) -> None:
    words = [f"model={model}", f"shards={work / 'shards'}", "samples=3", "segment_length=0.2", "seed=5"]
    code, output = call("eval", *words)
    assert code == 0
    assert output.startswith("3 crops of unseen groups; codes by stand-in")
    assert call("eval", *words) == (0, output)
    rows = table(output)
    assert list(rows) == ["stock 24 kHz + sinc", "warm start, untrained", "trained"]
    assert rows["trained"] == rows["warm start, untrained"]
    lsd, above, below = zip(*rows.values(), strict=True)
    assert all(min(a, b) < whole < max(a, b) for whole, a, b in zip(lsd, above, below, strict=True))
    assert above[0] > above[1] > 0.5, "nothing above 12 kHz costs most"
    assert below[0] == pytest.approx(below[1], abs=0.2), "below, both are the stock decoder"


def test_an_export_cannot_be_compared(work: Path, model: Path, tmp_path: Path) -> None:
    assert call("export", f"model={model}", f"out={tmp_path / 'out'}")[0] == 0
    code, output = call("eval", f"model={tmp_path / 'out'}", f"shards={work / 'shards'}")
    assert code == 1
    assert output.startswith(f"error: {tmp_path / 'out'} holds no 24 kHz decoder to compare with")
