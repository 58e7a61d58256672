"""`just eval` and validation: fixed crops of unseen groups, and means that do not depend on the batch size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from snac import SNAC

from codec.snac import load_snac
from shards.index import load
from tests.helpers import TINY_SNAC
from tests.training_helpers import call, train_settings
from trainer import checkpoint
from trainer.data import fixed_batches
from trainer.decoder import CodesToLatent, CropDecoder, warm_start
from trainer.metrics import log_spectral_distances
from trainer.validation import VALIDATION_NAMES, crop_losses, validation_sums


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


@torch.no_grad()
def test_validation_is_the_mean_over_crops(work: Path, snac: SNAC, tmp_path: Path) -> None:
    index, settings = load(work / "shards", "validation"), train_settings(work, tmp_path)
    model = CropDecoder(CodesToLatent(snac), warm_start(snac, "zero", 0))
    cpu = torch.device("cpu")
    sums = {size: validation_sums(model, fixed_batches(index, 5, size, 2, 0), settings, cpu) for size in (5, 2, 1)}
    torch.testing.assert_close(sums[2], sums[5], rtol=1e-4, atol=0)
    torch.testing.assert_close(sums[1], sums[5], rtol=1e-4, atol=0)
    found = dict(zip(VALIDATION_NAMES, (sums[1] / 5).tolist(), strict=True))
    losses, distances = [], []
    for batch in fixed_batches(index, 5, 1, 2, 0):
        wav_BN, values = crop_losses(model, batch, settings)
        valid = int(batch.valid_B)
        losses.append(float(values["loss"]))
        distances.append(log_spectral_distances(wav_BN[0, :valid], batch.target_BN[0, :valid])["lsd_hf"])
    assert found["loss"] == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert found["lsd_hf"] == pytest.approx(sum(distances) / 5, rel=1e-5)
