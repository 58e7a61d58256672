"""The quicker encoder is the stock one, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from snac import SNAC
from snac.layers import Snake1d
from torch.nn.utils.parametrize import is_parametrized

from codec import encoder
from codec.encoder import BlockedSnake, prepared
from codec.snac import load_snac
from pipeline.codes import shard_codes
from tests.helpers import TINY_SNAC, codes_settings


@pytest.mark.parametrize("samples", [2048, 3 * 2048, 20 * 2048])
@pytest.mark.parametrize("block", [100, 1 << 17])
@torch.inference_mode()
def test_latents_and_tokens(samples: int, block: int, snac: SNAC, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "BLOCK_ELEMENTS", block)
    quick = prepared(load_snac(TINY_SNAC)[0])
    audio = torch.randn(2, 1, samples, generator=torch.Generator().manual_seed(samples)) * 0.2
    before = audio.clone()
    assert torch.equal(quick.encoder(audio), snac.encoder(audio))
    for ours, theirs in zip(quick.encode(audio), snac.encode(audio), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(audio, before)


@pytest.mark.parametrize(("channels", "steps"), [(1, 1), (3, 7), (5, 1000), (64, 333)])
@pytest.mark.parametrize("block", [1, 10, 500, 1 << 17])
def test_snake(channels: int, steps: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that cut through rows and columns, in place or not."""
    monkeypatch.setattr(encoder, "BLOCK_ELEMENTS", max(block, channels * steps // 50))
    torch.manual_seed(channels)
    stock = Snake1d(channels).requires_grad_(False)
    stock.alpha.uniform_(1e-4, 5)
    x_BCT = torch.randn(2, channels, steps)
    expected, kept = stock(x_BCT), x_BCT.clone()
    assert torch.equal(BlockedSnake(stock, False)(x_BCT), expected)
    assert torch.equal(x_BCT, kept)
    assert torch.equal(BlockedSnake(stock, True)(x_BCT), expected)


def test_only_what_makes_tokens_is_changed() -> None:
    quick = prepared(load_snac(TINY_SNAC)[0])
    parametrized = [name for name, layer in quick.named_modules() if is_parametrized(layer)]
    assert parametrized
    assert all(name.startswith("decoder.") for name in parametrized)
    assert not any(isinstance(layer, Snake1d) for layer in quick.encoder.modules())


def test_the_log_says_how_long_the_device_was_idle(
    recordings: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shard_codes(codes_settings(recordings, tmp_path / "work"))
    assert "× real time; idle: " in capfd.readouterr().out
