"""The warm start is the stock decoder interpolated by two; crops in a batch decode as they do alone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from snac import SNAC
from snac.layers import NoiseBlock
from torch import Tensor, nn

from codec.snac import snac_levels
from shards.contract import COARSE_48K, CONTEXT_COARSE
from shards.errors import UserError
from trainer.decoder import (
    NEW_BLOCK,
    PADDING_TOKEN,
    TAPS,
    CodesToLatent,
    CropDecoder,
    folded_depthwise,
    padded,
    silence_noise,
    trainable,
    warm_start,
)

LEAST_SNR_DB = 80


def true_size() -> SNAC:
    """SNAC 24 kHz as it is published, with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SNAC(24_000, 48, [2, 4, 8, 8], None, 1024, [8, 8, 4, 2], None, 4096, 8, [4, 2, 1], True, True)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module", params=["stand-in", "true size"])
def stock(request: pytest.FixtureRequest, snac: SNAC) -> SNAC:
    """Two codecs with their noise silenced."""
    codec = copy.deepcopy(snac) if request.param == "stand-in" else true_size()
    silence_noise(codec.decoder)
    return codec


def random_tokens(batch: int, coarse: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 4096, (batch, coarse, 7), generator=torch.Generator().manual_seed(seed))


def latent(codec: SNAC, coarse: int) -> Tensor:
    return CodesToLatent(codec)(random_tokens(1, coarse))


def snr_db(found: Tensor, expected: Tensor) -> float:
    return float(10 * torch.log10(expected.square().sum() / (found - expected).square().sum()))


@torch.no_grad()
def test_every_second_sample_is_the_stock_decoders(stock: SNAC) -> None:
    z_BCL = latent(stock, 6)
    expected = stock.decoder(z_BCL)[0, 0]
    wav = warm_start(stock, "zero", 0)(z_BCL)[0, 0]
    assert len(wav) == 2 * len(expected) == 6 * COARSE_48K
    assert snr_db(wav[::2], expected) > LEAST_SNR_DB
    loudest = float(expected.abs().max())
    for edge in (slice(0, 16), slice(-16, None)):
        assert float((wav[::2][edge] - expected[edge]).abs().max()) < 1e-4 * loudest


def half_band(before_tanh: npt.NDArray[np.float64], bias: float) -> npt.NDArray[np.float64]:
    """Zero-stuffing and [−1, 0, 9, 16, 9, 0, −1] / 16 as a plain loop; the head's bias is no part of the signal."""
    u = [0.0, *(before_tanh - bias), 0.0, 0.0]
    odd = [(-u[k - 1] + 9 * u[k] + 9 * u[k + 1] - u[k + 2]) / 16 for k in range(1, len(before_tanh) + 1)]
    return np.tanh(np.array(odd) + bias)


@torch.no_grad()
def test_odd_samples_are_interpolated_by_the_half_band_kernel(stock: SNAC) -> None:
    z_BCL = latent(stock, 4).double()
    doubled = copy.deepcopy(stock.decoder).double()
    before_tanh = doubled.model[:-1](z_BCL)[0, 0].numpy()
    expected = torch.from_numpy(half_band(before_tanh, float(doubled.model[-2].bias)))
    odd = warm_start(stock, "zero", 0).double()(z_BCL)[0, 0, 1::2]
    assert snr_db(odd, expected) > LEAST_SNR_DB
    loudest = float(expected.abs().max())
    for edge in (slice(0, 16), slice(-16, None)):
        assert float((odd[edge] - expected[edge]).abs().max()) < 1e-4 * loudest


def noisy(snac: SNAC) -> SNAC:
    """The stand-in with noise that is heard: its own gains are zero."""
    codec = copy.deepcopy(snac)
    for module in codec.modules():
        if isinstance(module, NoiseBlock):
            module.linear.parametrizations.weight.original0.data.fill_(0.1)
    return codec


@torch.no_grad()
def test_with_noise_kept_the_same_noise_gives_the_stock_output(snac: SNAC) -> None:
    codec = noisy(snac)
    z_BCL = latent(codec, 4)
    decoder = warm_start(codec, "keep", 0)
    torch.manual_seed(5)
    expected = codec.decoder(z_BCL)[0, 0]
    torch.manual_seed(5)
    assert snr_db(decoder(z_BCL)[0, 0, ::2], expected) > LEAST_SNR_DB
    assert snr_db(decoder(z_BCL)[0, 0, ::2], expected) < 60, "other noise gives the same, so none is heard"


@torch.no_grad()
def test_with_noise_zero_decoding_is_repeatable(snac: SNAC) -> None:
    codec = noisy(snac)
    z_BCL = latent(codec, 2)
    assert not torch.equal(codec.decoder(z_BCL), codec.decoder(z_BCL))
    decoder = warm_start(codec, "zero", 0)
    assert torch.equal(decoder(z_BCL), decoder(z_BCL))


def test_the_stock_class_loads_the_new_decoder(snac: SNAC) -> None:
    decoder = warm_start(snac, "zero", 0)
    whole = SNAC(24_000, 16, [2, 4, 8, 8], None, 256, [8, 8, 4, 2, 2], None, 4096, 8, [4, 2, 1], True, True)
    whole.decoder.load_state_dict(decoder.state_dict(), strict=True)
    z_BCL = latent(snac, 1)
    assert torch.equal(whole.decoder(z_BCL), decoder(z_BCL))


def test_the_seed_alone_decides_the_free_channels(snac: SNAC) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (warm_start(snac, "zero", seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    differing = {name for name in first if not torch.equal(first[name], other[name])}
    assert differing
    assert all(name.startswith(f"model.{NEW_BLOCK}.") for name in differing)


def test_free_channels_can_learn(snac: SNAC) -> None:
    """The head is silent for them, but its gradient is not; one step later gradients reach the channels themselves."""
    decoder = warm_start(snac, "zero", 0)
    z_BCL = latent(snac, 2)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3)
    head = decoder.model[NEW_BLOCK + 2].parametrizations.weight.original1
    near = decoder.model[NEW_BLOCK].block[-3].block[1].parametrizations.weight.original1
    assert not head[:, TAPS:].any()
    for step in range(2):
        optimizer.zero_grad()
        decoder(z_BCL).square().mean().backward()
        assert bool(head.grad[:, TAPS:].any(dim=2).all())
        assert bool(near.grad[TAPS:].any()) == (step == 1)
        optimizer.step()


def test_another_geometry_is_refused() -> None:
    with pytest.raises(UserError, match=r"rates \[8, 8, 4, 4\]"):
        warm_start(SNAC(24_000, 8, [4, 4, 8, 8], None, 256, [8, 8, 4, 4], None, 64, 8, [4, 2, 1]), "zero", 0)
    with pytest.raises(UserError, match="width 128"):
        warm_start(SNAC(24_000, 8, [2, 4, 8, 8], None, 128, [8, 8, 4, 2], None, 64, 8, [4, 2, 1]), "zero", 0)


@torch.no_grad()
def test_look_ups_give_the_quantizers_latent(stock: SNAC) -> None:
    tokens = random_tokens(3, 5)
    z_BCL = CodesToLatent(stock)(tokens)
    for row, z_CL in zip(tokens, z_BCL, strict=True):
        expected = stock.quantizer.from_codes(snac_levels(row.numpy().astype(np.int16)))[0]
        torch.testing.assert_close(z_CL, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def free_decoder(snac: SNAC) -> CropDecoder:
    """A decoder whose channels all sound, in float64, so that nothing hides behind the warm start's zeros."""
    decoder = warm_start(snac, "zero", 0)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(2)
        for parameter in decoder.model[NEW_BLOCK:].parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    silence_noise(decoder)
    trainable(decoder, 2, "zero")
    return CropDecoder(CodesToLatent(snac), decoder).double()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_a_short_crop_in_a_long_batch_decodes_as_it_does_alone(
    free_decoder: CropDecoder, dtype: torch.dtype, tolerance: float
) -> None:
    model, lengths = free_decoder.to(dtype), [2, 5, 1, 4]
    tokens = padded(random_tokens(len(lengths), max(lengths)))
    for row, length in zip(tokens, lengths, strict=True):
        row[CONTEXT_COARSE + length :] = PADDING_TOKEN
    together = model(tokens)
    for row, wav, length in zip(tokens, together, lengths, strict=True):
        alone = whole(model, row[None, CONTEXT_COARSE:][:, :length])
        assert float((wav[: length * COARSE_48K] - alone).detach().abs().max()) < tolerance


def gradients(model: CropDecoder, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    found = [parameter.grad.flatten() for parameter in model.decoder.parameters() if parameter.grad is not None]
    return torch.cat(found)


def whole(model: CropDecoder, tokens_1T7: Tensor) -> Tensor:
    """By the stock class."""
    return model.decoder(model.to_latent(tokens_1T7))[0, 0]


CROPS = [(5, 2), (0, 3), (1, 4), (9, 3), (11, 1)]  # of 12 tokens: where they begin, and how many


@pytest.mark.parametrize(("length", "dilation"), [(64, 1), (64, 3), (64, 9), (65, 9), (5, 9)])
def test_a_folded_depthwise_convolution_is_the_dilated_one(length: int, dilation: int) -> None:
    torch.manual_seed(0)
    x_BCN, kernel_C1K, bias_C = (torch.randn(*shape, requires_grad=True) for shape in ((2, 5, length), (5, 1, 7), (5,)))
    expected = nn.functional.conv1d(x_BCN, kernel_C1K, bias_C, padding=3 * dilation, dilation=dilation, groups=5)
    found, upstream = folded_depthwise(x_BCN, kernel_C1K, bias_C, dilation), torch.randn(2, 5, length)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for a, b in zip(
        *(torch.autograd.grad(y, (x_BCN, kernel_C1K, bias_C), upstream) for y in (found, expected)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("first", "length"), CROPS)
def test_a_crop_with_its_context_is_part_of_the_whole(free_decoder: CropDecoder, first: int, length: int) -> None:
    tokens = random_tokens(1, 12)
    expected = whole(free_decoder, tokens)[first * COARSE_48K :][: length * COARSE_48K]
    expected_gradients = gradients(free_decoder, expected.square().sum())
    found = free_decoder(padded(tokens)[:, first:][:, : length + 2 * CONTEXT_COARSE])[0]
    found_gradients = gradients(free_decoder, found.square().sum())
    assert float((found - expected).detach().abs().max()) < 1e-9
    assert float((found_gradients - expected_gradients).abs().max() / expected_gradients.abs().max()) < 1e-9


@torch.no_grad()
def test_no_layer_is_given_context_that_it_does_not_need(free_decoder: CropDecoder, stock: SNAC) -> None:
    tokens = random_tokens(1, 8)
    for model in (free_decoder, CropDecoder(CodesToLatent(stock), copy.deepcopy(stock.decoder)).double()):
        silence_noise(model)
        per_coarse = whole(model, tokens).shape[0] // 8
        expected = whole(model, tokens)[3 * per_coarse :][: 2 * per_coarse]
        needed = list(model.context)
        assert float((model(tokens)[0] - expected).abs().max()) < 1e-13
        for number, frames in enumerate(needed):
            if frames == 0:
                continue
            model.context = needed[:number] + [min(other, frames - 1) for other in needed[number:]]
            assert float((model(tokens)[0] - expected).abs().max()) > 1e-11, f"layer {number} needs less"


def learning(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("noise", ["zero", "keep"])
def test_phases(snac: SNAC, noise: str) -> None:
    decoder: Any = warm_start(snac, noise, 0)
    noise_blocks = {name for name, module in decoder.named_modules() if isinstance(module, NoiseBlock)}
    everything = {name for name, _ in decoder.named_parameters()}
    of_noise = {name for name in everything if any(name.startswith(f"{block}.") for block in noise_blocks)}
    assert len(of_noise) == 2 * 5
    silent = of_noise if noise == "zero" else set()
    fresh = {name for name in everything if int(name.split(".")[1]) >= NEW_BLOCK}
    for phase, expected in ((1, fresh - silent), (2, everything - silent), (1, fresh - silent)):
        trainable(decoder, phase, noise)
        assert learning(decoder) == expected
