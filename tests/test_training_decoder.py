"""The decoder as training runs it gives the decoder's numbers; bfloat16 stays out of the new band."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from snac import SNAC
from snac.layers import NoiseBlock, Snake1d, snake
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from benchmarks.training_step import random_batch
from configs.loader import load_settings
from shards.contract import COARSE_48K
from tests.test_decoder import random_tokens
from trainer import training_decoder as training_decoder_module
from trainer.decoder import NEW_BLOCK, PADDING_TOKEN, CodesToLatent, CropDecoder, padded, trainable, warm_start
from trainer.distributed import Process
from trainer.learner import Learner
from trainer.settings import TrainSettings
from trainer.training_decoder import PlainSnake, TrainingDecoder


def training_decoder(snac: SNAC, bf16: bool = False, compiled: bool = False) -> tuple[TrainingDecoder, list[str]]:
    said: list[str] = []
    decoder = warm_start(snac, "zero", 0)
    trainable(decoder, 2, "zero")
    return TrainingDecoder(CodesToLatent(snac), decoder, "zero", bf16, compiled, said.append), said


def gradients(output: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(output.square().sum(), inputs))


def test_plain_snake_is_snacs_bit_for_bit() -> None:
    torch.manual_seed(0)
    x_BCN, alpha = torch.randn(2, 5, 1001, requires_grad=True), torch.rand(1, 5, 1).add(1e-6).requires_grad_()
    plain = PlainSnake(5)
    plain.alpha = torch.nn.Parameter(alpha.detach().clone())
    with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
        expected = snake(x_BCN, alpha)
        wanted = gradients(expected, x_BCN, alpha)
    found = plain(x_BCN)
    assert torch.equal(found, expected)
    for a, b in zip(gradients(found, x_BCN, plain.alpha), wanted, strict=True):
        assert torch.equal(a, b)


def test_weights_keep_their_names(snac: SNAC) -> None:
    model, _ = training_decoder(snac)
    assert model.decoder.state_dict().keys() == warm_start(snac, "zero", 0).state_dict().keys()
    snakes = [module for module in model.decoder.modules() if isinstance(module, Snake1d)]
    assert snakes
    assert all(isinstance(module, PlainSnake) for module in snakes)
    assert all(type(module) is Snake1d for module in snac.modules() if isinstance(module, Snake1d))


def test_silent_noise_is_left_out_and_changes_no_bit(snac: SNAC, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = training_decoder(snac)
    learning = [parameter for parameter in model.decoder.parameters() if parameter.requires_grad]
    drawn: list[object] = []
    original = torch.randn

    def draw(shape: tuple[int, ...], **how: Any) -> Tensor:
        drawn.append(shape)
        return original(shape, **how)

    monkeypatch.setattr(torch, "randn", draw)

    def step() -> list[Tensor]:
        wav_BN = model(padded(random_tokens(1, 2)))
        return [wav_BN.detach(), *gradients(wav_BN, *learning)]

    found = step()
    assert not drawn
    for module in model.decoder.modules():
        if isinstance(module, NoiseBlock):
            module.__class__ = NoiseBlock
    for a, b in zip(found, step(), strict=True):
        assert torch.equal(a, b)
    assert len(drawn) == 5


@torch.no_grad()
def test_it_decodes_as_the_stock_classes_do(snac: SNAC) -> None:
    tokens = padded(random_tokens(2, 4))
    tokens[1, 5:] = PADDING_TOKEN
    expected = CropDecoder(CodesToLatent(snac), warm_start(snac, "zero", 0))(tokens)
    torch.testing.assert_close(training_decoder(snac)[0](tokens), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_bfloat16_is_quiet_where_speech_is(snac: SNAC) -> None:
    """Rounding everywhere is a noise at all frequencies; rounding the stock layers only is not in the new band."""
    model, _ = training_decoder(snac, bf16=True)
    exact, tokens = copy.deepcopy(model), padded(random_tokens(2, 12))
    exact.bf16 = False
    wanted, found = exact(tokens), model(tokens)
    assert found.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        everywhere = exact(tokens).float()

    def noise_db(wav_BN: Tensor) -> float:
        """Of the error above 12 kHz, re the exact signal above 12 kHz."""
        error, signal = (
            torch.fft.rfft(audio).abs()[:, wanted.shape[1] // 4 :].square().sum() for audio in (wav_BN - wanted, wanted)
        )
        return float(10 * (error / signal).log10())

    assert noise_db(found) < noise_db(everywhere) - 6
    assert not torch.equal(found, wanted)


def test_bfloat16_gradients_reach_every_layer(snac: SNAC) -> None:
    model, _ = training_decoder(snac, bf16=True)
    model(padded(random_tokens(1, 2))).square().sum().backward()
    for number, layer in enumerate(model.decoder.model):
        for parameter in layer.parameters():
            assert parameter.grad is None or parameter.grad.dtype == torch.float32
        if number < NEW_BLOCK:
            assert any(parameter.grad is not None for parameter in layer.parameters())


@pytest.fixture
def whole_graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """torch.compile captures graphs and refuses breaks, but leaves the compiler out; counts what it captured."""
    captured: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor], **options: object) -> object:
        captured.append(len(list(graph.graph.nodes)))
        return graph.forward

    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: original(f, backend=backend, fullgraph=True, **options))
    torch._dynamo.reset()
    return captured


def test_the_decoder_is_one_graph_to_compile(snac: SNAC, whole_graphs: list[int]) -> None:
    model, said = training_decoder(snac, compiled=True)
    eager, _ = training_decoder(snac)
    tokens = padded(random_tokens(2, 3))
    tokens[0, 4:] = PADDING_TOKEN
    found, expected = model(tokens), eager(tokens)
    assert said == []
    assert len(whole_graphs) == 1
    assert found.shape == (2, 3 * COARSE_48K)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    found.square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(model.decoder.parameters(), eager.decoder.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)


def test_phase_2_teaches_all_layers_though_phase_1_was_compiled(snac: SNAC, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo does not guard on what requires gradients."""
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: original(f, backend="aot_eager", dynamic=False))
    torch._dynamo.reset()
    given = ["compile=true", "n_ffts=[256]", "micro_batch=2"]
    settings = load_settings(TrainSettings, "decoder_48khz.json", given)
    decoder, alone = warm_start(snac, "zero", 0), Process(0, 1, torch.device("cpu"))
    said: list[str] = []
    learner = Learner(CodesToLatent(snac), decoder, settings, alone, said.append)
    batch = random_batch(2, 2)
    for phase in (1, 2):
        learner.enter_phase(phase)
        assert said == phase * ["torch.compile: the next step may take minutes"]
        before = copy.deepcopy(decoder.state_dict())
        learner.step(batch, phase, 2, 1.0)
        for name, value in decoder.named_parameters():
            assert torch.equal(value, before[name]) != value.requires_grad, name


def test_too_many_graphs_are_said(snac: SNAC, whole_graphs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_decoder_module, "MAX_GRAPHS", 2)
    model, said = training_decoder(snac, compiled=True)
    expected = [model(padded(random_tokens(1, coarse))).shape[1] for coarse in (1, 2, 3)]
    assert expected == [COARSE_48K, 2 * COARSE_48K, 3 * COARSE_48K]
    (line,) = said
    assert line.startswith("torch.compile does not work here: going on without it (FailOnRecompileLimitHit")


def test_without_a_compiler_it_says_so_and_goes_on(snac: SNAC, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: object, **options: object) -> object:
        def call(*_: object) -> Tensor:
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    model, said = training_decoder(snac, compiled=True)
    tokens = padded(random_tokens(1, 2))
    expected = training_decoder(snac)[0](tokens)
    assert torch.equal(model(tokens), expected)
    assert torch.equal(model(tokens), expected)
    (line,) = said
    assert line.startswith("torch.compile does not work here: going on without it (RuntimeError: Failed to find C")


def test_without_a_compiler_for_gradients_it_says_so_and_goes_on(snac: SNAC, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("PassManager::run failed")

    original, backend = torch.compile, aot_autograd(fw_compiler=lambda graph, _: graph.forward, bw_compiler=broken)
    monkeypatch.setattr(torch, "compile", lambda f, **options: original(f, backend=backend, dynamic=False))
    torch._dynamo.reset()
    model, said = training_decoder(snac, compiled=True)
    model(padded(random_tokens(1, 2))).square().sum().backward()
    (line,) = said
    assert line.startswith("torch.compile does not work here: going on without it (")
    assert "PassManager::run failed" in line


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_running_out_of_memory_is_not_a_compilers_failure(
    kind: type[Exception], snac: SNAC, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(function: object, **options: object) -> object:
        def call(*_: object) -> Tensor:
            raise kind("Triton Error [CUDA]: out of memory")

        return call

    monkeypatch.setattr(torch, "compile", full)
    model, said = training_decoder(snac, compiled=True)
    with pytest.raises(kind, match="out of memory"):
        model(padded(random_tokens(1, 2)))
    assert said == []
