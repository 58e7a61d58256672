"""A stream is the whole decode, bit for bit, however the tokens arrive; the whole decode is stock snac's."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from snac import SNAC
from snac.layers import NoiseBlock

from codec.audio import Samples
from codec.snac import snac_levels
from shards.contract import COARSE_48K
from shards.errors import UserError
from tests.test_decoder import true_size
from trainer import kernels
from trainer.decode import StreamingDecoder
from trainer.decoder import silence_noise, warm_start
from trainer.inference import StepDecoder, draws_noise
from trainer.streaming import to_int16

DELAY = 9551

Tokens = npt.NDArray[np.int64]


def codec_of(snac: SNAC) -> tuple[SNAC, Any]:
    """A decoder that is not the warm start: every layer's Snake, kernels and biases are its own."""
    decoder = warm_start(snac, "zero", 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "alpha" in name or "original1" in name or "bias" in name:
                parameter += 0.1 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)
    return snac, decoder.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def codec(snac: SNAC) -> tuple[SNAC, Any]:
    return codec_of(snac)


@pytest.fixture(scope="module")
def model(codec: tuple[SNAC, Any]) -> StepDecoder:
    return StepDecoder(*codec)


def random_tokens(streams: int, coarse: int, seed: int) -> Tokens:
    return np.random.default_rng(seed).integers(0, 4096, (streams, coarse, 7))


def chunked(tokens: Tokens, seed: int) -> list[Tokens]:
    """Cut at random places; some chunks are empty."""
    random, coarse = np.random.default_rng(seed), tokens.shape[1]
    return np.split(tokens, np.sort(random.integers(0, coarse + 1, random.integers(0, coarse + 2))), axis=1)


def streamed(model: StepDecoder, chunks: list[Tokens], **options: int) -> Samples:
    stream = StreamingDecoder(model, streams=len(chunks[0]), **options)
    return np.concatenate([*(stream.push(chunk) for chunk in chunks), stream.finish()], axis=1)


def stock(codec: tuple[SNAC, Any], tokens: Tokens, dtype: torch.dtype = torch.float32) -> npt.NDArray[Any]:
    snac, decoder = (copy.deepcopy(part).to(dtype) for part in codec)
    with torch.inference_mode():
        rows = [decoder(snac.quantizer.from_codes(snac_levels(each.astype(np.int16))))[0, 0] for each in tokens]
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("coarse", [1, 2, 3, 4])
def test_streams_cut_anywhere_are_the_whole_decode_bit_for_bit(model: StepDecoder, coarse: int) -> None:
    """In every way in which so many frames can be cut, with pushes of nothing at all ends."""
    tokens = random_tokens(10, coarse, coarse)
    whole = streamed(model, [tokens])
    assert whole.shape == (10, coarse * COARSE_48K)
    for number in range(coarse):
        for cuts in itertools.combinations(range(1, coarse), number):
            chunks = np.split(tokens, sorted([0, *cuts, *cuts, coarse]), axis=1)
            assert np.array_equal(streamed(model, chunks), whole)


@pytest.mark.parametrize("coarse", [1, 2, 3, 4, 11])
def test_the_whole_decode_is_the_stock_packages(codec: tuple[SNAC, Any], model: StepDecoder, coarse: int) -> None:
    tokens = random_tokens(1, coarse, coarse)
    expected = stock(codec, tokens)
    assert np.abs(expected).max() > 0.01
    assert np.abs(streamed(model, [tokens]) - expected).max() < 1e-6


def test_in_float64_only_rounding_is_left(codec: tuple[SNAC, Any]) -> None:
    tokens = random_tokens(2, 7, 0)
    model = StepDecoder(*(copy.deepcopy(part).double() for part in codec))
    found = torch.cat([torch.from_numpy(streamed(model, [tokens]))])
    stream = StreamingDecoder(model, streams=2)
    assert stream.push(tokens).dtype == np.float32
    expected = stock(codec, tokens, torch.float64)
    assert np.abs(found.numpy() - expected).max() < 1e-7, "float32 holds no more"


@pytest.mark.parametrize("step_coarse", [2, 4, 5])
def test_longer_steps_change_nothing_but_rounding(model: StepDecoder, step_coarse: int) -> None:
    tokens = random_tokens(3, 11, 5)
    whole = streamed(model, [tokens], step_coarse=step_coarse)
    assert np.array_equal(streamed(model, chunked(tokens, 6), step_coarse=step_coarse), whole)
    assert np.abs(whole - streamed(model, [tokens])).max() < 1e-6


def test_streams_in_a_batch_are_as_alone(model: StepDecoder) -> None:
    tokens = random_tokens(4, 5, 8)
    together = streamed(model, [tokens])
    for row, each in zip(together, tokens, strict=True):
        assert np.abs(streamed(model, [each[None]])[0] - row).max() < 1e-6


def test_streams_that_share_a_model_do_not_meet(model: StepDecoder) -> None:
    first, second = random_tokens(1, 4, 1), random_tokens(1, 4, 2)
    a, b = StreamingDecoder(model), StreamingDecoder(model)
    parts: tuple[list[Samples], list[Samples]] = ([], [])
    for n in range(4):
        parts[0].append(a.push(first[:, n : n + 1]))
        parts[1].append(b.push(second[:, n : n + 1]))
    for found, stream, tokens in ((parts[0], a, first), (parts[1], b, second)):
        assert np.array_equal(np.concatenate([*found, stream.finish()], axis=1), streamed(model, [tokens]))


def test_samples_leave_as_soon_as_they_are_exact(codec: tuple[SNAC, Any], model: StepDecoder) -> None:
    """After t frames all but the last DELAY samples; and one sample later would not be exact."""
    assert model.delay == DELAY
    tokens = random_tokens(1, 6, 3)
    stream = StreamingDecoder(model)
    lengths = np.cumsum([stream.push(tokens[:, n : n + 1]).shape[1] for n in range(6)])
    assert lengths.tolist() == [max((n + 1) * COARSE_48K - DELAY, 0) for n in range(6)]
    other = tokens.copy()
    other[:, 4:] = random_tokens(1, 2, 4)
    differs = np.flatnonzero(stock(codec, tokens, torch.float64)[0] != stock(codec, other, torch.float64)[0])
    assert differs[0] >= 4 * COARSE_48K - DELAY
    assert differs[0] < 4 * COARSE_48K - DELAY + 64, "no later than it needs to be"


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_less_look_ahead_is_sooner_and_less_exact(model: StepDecoder, lookahead: int) -> None:
    tokens = random_tokens(2, 9, 7)
    whole = streamed(model, [tokens])
    stream = StreamingDecoder(model, streams=2, lookahead_frames=lookahead)
    parts = [stream.push(tokens[:, n : n + 1]) for n in range(9)]
    assert [part.shape[1] for part in parts] == [0] * lookahead + [COARSE_48K] * (9 - lookahead)
    found = np.concatenate([*parts, stream.finish()], axis=1)
    assert found.shape == whole.shape
    assert np.array_equal(streamed(model, chunked(tokens, 9), lookahead_frames=lookahead), found)

    def snr_db(wav: Samples) -> float:
        return float(10 * np.log10((whole**2).sum() / ((wav - whole) ** 2).sum()))

    assert 0 < snr_db(found) < 120
    if lookahead:
        assert snr_db(found) > snr_db(streamed(model, [tokens], lookahead_frames=lookahead - 1)) + 3


def test_at_the_true_size_it_is_the_stock_decoder() -> None:
    snac = true_size()
    silence_noise(snac.decoder)
    codec = codec_of(snac)
    tokens = random_tokens(1, 4, 0)
    assert np.abs(streamed(StepDecoder(*codec), [tokens]) - stock(codec, tokens)).max() < 2e-6


def test_one_block_with_noise_makes_the_stock_decode_differ(codec: tuple[SNAC, Any]) -> None:
    decoder = copy.deepcopy(codec[1])
    assert not draws_noise(decoder)
    blocks: list[Any] = [module for module in decoder.modules() if isinstance(module, NoiseBlock)]
    assert len(blocks) > 1
    blocks[-1].linear.parametrizations.weight.original0.fill_(1)
    assert draws_noise(decoder)


# The two forms of its kernels


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_native", lambda: None)


@pytest.mark.usefixtures("without_compiler")
def test_without_a_compiler_it_is_the_stock_packages_too(codec: tuple[SNAC, Any], model: StepDecoder) -> None:
    assert "no C compiler" in kernels.description(torch.device("cpu"))
    tokens = random_tokens(2, 5, 5)
    assert np.abs(streamed(model, [tokens]) - stock(codec, tokens)).max() < 1e-6
    assert np.array_equal(streamed(model, chunked(tokens, 3)), streamed(model, [tokens]))


def test_a_library_that_cannot_be_loaded_is_as_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where TMPDIR is noexec: `true` compiles whatever it is given, and leaves nothing to load."""
    monkeypatch.setenv("CC", "true")
    assert kernels._native.__wrapped__() is None


@pytest.mark.parametrize("size", [1.0, 30.0, 3000.0])
def test_the_native_snake_is_as_accurate_as_torchs(size: float) -> None:
    if kernels._native() is None:
        pytest.skip("no C compiler here")
    generator = torch.Generator().manual_seed(0)
    x = size * torch.randn(500, 2, 24, generator=generator)
    alpha = torch.rand(24, generator=generator) + 0.5
    by, out = kernels.Snake(alpha, (alpha + 1e-9).reciprocal()), torch.empty_like(x)
    kernels.snake(x, by, out)
    angle = alpha * x  # rounded to float32 as in the stock package
    exact = x.double() + angle.double().sin().square() * by.inverse.double()
    stocks = x + by.inverse * torch.sin(angle).pow(2)
    allowed = 2 * (stocks.double() - exact).abs().max() + 2e-7
    assert (out.double() - exact).abs().max() <= allowed


# What it refuses


@pytest.mark.parametrize("kind", ["uint16", "uint32", ">i2", "int8"])
def test_integers_of_any_kind_are_tokens(model: StepDecoder, kind: str) -> None:
    tokens = random_tokens(1, 4, 0) % 100
    assert np.array_equal(streamed(model, [tokens.astype(kind)]), streamed(model, [tokens]))
    native = tokens.astype(np.dtype(kind).newbyteorder("="))
    assert np.array_equal(StreamingDecoder(model).push(torch.from_numpy(native)), StreamingDecoder(model).push(tokens))
    assert np.array_equal(streamed(model, [tokens[:, ::-1]]), streamed(model, [tokens[:, ::-1].copy()]))


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        (np.zeros((2, 7), np.float32), "tokens are float32, expected integers"),
        (np.zeros((2, 7), bool), "tokens are bool, expected integers"),
        (np.zeros((2, 6), np.int16), r"the shape \(2, 6\), expected \(1, T, 7\)"),
        (np.zeros(7, np.int16), r"the shape \(7,\), expected \(1, T, 7\)"),
        (np.zeros((2, 1, 7), np.int16), r"the shape \(2, 1, 7\), expected \(1, T, 7\)"),
        (np.array([["1"] * 7]), "tokens are <U1, expected integers"),
        (torch.zeros(2, 7), "tokens are float32, expected integers"),
        (torch.zeros(2, 7, dtype=torch.bool), "tokens are bool, expected integers"),
        (torch.zeros(2, 7, dtype=torch.complex64), "tokens are complex64, expected integers"),
        (np.full((1, 7), 2**63, np.uint64), "tokens run from -9223372036854775808"),
        (np.full((1, 7), 4096), "tokens run from 4096 to 4096, expected 0 to 4095"),
        (np.full((1, 7), -1), "tokens run from -1 to -1"),
    ],
)
def test_wrong_tokens_are_refused_and_change_nothing(model: StepDecoder, tokens: Any, reason: str) -> None:
    good = random_tokens(1, 4, 0)
    stream = StreamingDecoder(model)
    parts = [stream.push(good[:, :2])]
    with pytest.raises(UserError, match=reason):
        stream.push(tokens)
    parts += [stream.push(good[:, 2:]), stream.finish()]
    assert np.array_equal(np.concatenate(parts, axis=1), streamed(model, [good]))


def test_damaged_weights_give_no_audio(codec: tuple[SNAC, Any]) -> None:
    snac, decoder = copy.deepcopy(codec)
    decoder.model[-2].bias.fill_(torch.nan)
    stream = StreamingDecoder(StepDecoder(snac, decoder))
    with pytest.raises(UserError, match="the decoder's output is not finite: its weights are damaged"):
        stream.push(random_tokens(1, 3, 0))


def test_a_finished_stream_takes_no_more(model: StepDecoder) -> None:
    stream = StreamingDecoder(model)
    assert stream.finish().shape == (1, 0)
    with pytest.raises(UserError, match="has been finished"):
        stream.push(random_tokens(1, 1, 0))
    stream = StreamingDecoder(model)
    stream.push(random_tokens(1, 6, 0)[0])
    assert stream.finish().shape[1] > 0
    assert stream.finish().shape == (1, 0)


@pytest.mark.parametrize(
    "options", [{"lookahead_frames": 4}, {"lookahead_frames": -1}, {"lookahead_frames": 0, "step_coarse": 2}]
)
def test_wrong_options_are_refused(model: StepDecoder, options: dict[str, int]) -> None:
    with pytest.raises(UserError, match="lookahead_frames"):
        StreamingDecoder(model, **options)


def test_int16_clips_and_never_wraps() -> None:
    samples = np.array([0, 1, -1, 1.5, -1.5, 100, -100, 32767 / 32768], np.float32)
    assert to_int16(samples).tolist() == [0, 32767, -32768, 32767, -32768, 32767, -32768, 32767]
    assert to_int16(samples).dtype == np.int16
