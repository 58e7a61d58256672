"""Discriminators and their losses against NumPy in float64; what they may depend on, and what they may not."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
import scipy.signal
import torch
from torch import Tensor, nn

from configs.loader import load_settings
from shards.contract import COARSE_48K, CONTEXT_COARSE, TOKENS
from trainer.adversary import PEAK, Adversary
from trainer.balancer import PREFIX, Balancer
from trainer.data import Batch
from trainer.discriminators import PeriodDiscriminator, SpectrogramDiscriminator
from trainer.settings import TrainSettings

Floats = npt.NDArray[np.float64]
SMALL = ("mpd_periods=[2,3]", "mpd_channels=2", "mrd_n_ffts=[256]", "mrd_channels=3", "adversarial_weight=1")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seeded(double_precision: None) -> None:
    torch.manual_seed(0)


def batch_of(valid: list[int], coarse: int = 2) -> Batch:
    """Noise for targets; short crops end in zeros."""
    real_BN = torch.arange(coarse * COARSE_48K) < torch.tensor(valid)[:, None]
    return Batch(
        keys=[str(n) for n in valid],
        tokens_BT7=torch.zeros(len(valid), coarse + 2 * CONTEXT_COARSE, TOKENS, dtype=torch.long),
        target_BN=0.1 * torch.randn(len(valid), coarse * COARSE_48K) * real_BN,
        valid_B=torch.tensor(valid),
    )


def adversary(*words: str) -> Adversary:
    return Adversary(load_settings(TrainSettings, "decoder_48khz.json", (*SMALL, *words)), CPU, bf16=False)


def convolved(conv: nn.Module, x_CHW: Floats) -> Floats:
    """A 2-D convolution with its stride and zero padding, kernel position by kernel position."""
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is not None
    assert not isinstance(conv.padding, str)
    weight, (ph, pw), (sh, sw) = conv.weight.detach().numpy(), conv.padding, conv.stride
    padded = np.pad(x_CHW, ((0, 0), (int(ph), int(ph)), (int(pw), int(pw))))
    height = (padded.shape[1] - weight.shape[2]) // sh + 1
    width = (padded.shape[2] - weight.shape[3]) // sw + 1
    out = np.zeros((len(weight), height, width)) + conv.bias.detach().numpy()[:, None, None]
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            seen = padded[:, i : i + sh * height : sh, j : j + sw * width : sw]
            out += np.tensordot(weight[:, :, i, j], seen, axes=1)
    return out


def activated(x: Floats) -> Floats:
    return np.where(x > 0, x, 0.1 * x)


def test_period_discriminator_folds_and_convolves() -> None:
    discriminator = PeriodDiscriminator(3, 2)
    wav = torch.randn(1, 1000)
    maps = discriminator(wav)
    folded = np.append(wav[0].numpy(), wav[0].numpy()[-3:-1][::-1])  # to 1002, mirrored
    x = folded.reshape(1, -1, 3)
    for conv, found in zip(discriminator.convs, maps, strict=False):
        x = activated(convolved(conv, x))
        np.testing.assert_allclose(found[0].detach().numpy(), x, atol=1e-12)
    np.testing.assert_allclose(maps[-1][0].detach().numpy(), convolved(discriminator.score, x), atol=1e-12)
    assert [conv.kernel_size for conv in discriminator.convs] == [(5, 1)] * 5
    assert [conv.stride for conv in discriminator.convs] == [(3, 1)] * 4 + [(1, 1)]
    assert [conv.out_channels for conv in discriminator.convs] == [2, 8, 32, 64, 64]


def test_spectrogram_discriminator_sees_bands_of_a_complex_spectrogram() -> None:
    n_fft, wav = 64, torch.randn(1, 640)
    discriminator = SpectrogramDiscriminator(n_fft, 3)
    maps = discriminator(wav)
    padded = np.pad(wav[0].numpy(), n_fft // 2, mode="reflect")
    window = scipy.signal.get_window("hann", n_fft)
    frames = [np.fft.rfft(padded[start : start + n_fft] * window) for start in range(0, 641, n_fft // 4)]
    spectrum = np.stack([np.real(frames), np.imag(frames)])
    edges = (0, 3, 8, 16, 25, 33)  # 0, 10, 25, 50, 75 and 100 % of 33 bins
    assert discriminator.bands == [slice(low, high) for low, high in itertools.pairwise(edges)]
    ends, place = [], 0
    for band, stack in zip(discriminator.bands, discriminator.stacks, strict=True):
        x = spectrum[..., band]
        assert isinstance(stack, nn.ModuleList)
        for conv in stack:
            x = activated(convolved(conv, x))
            np.testing.assert_allclose(maps[place][0].detach().numpy(), x, atol=1e-12)
            place += 1
        ends.append(x)
    expected = convolved(discriminator.score, np.concatenate(ends, axis=2))
    np.testing.assert_allclose(maps[-1][0].detach().numpy(), expected, atol=1e-12)


def test_losses_are_least_squares_and_feature_matching() -> None:
    gan, batch = adversary(), batch_of([2 * COARSE_48K] * 2)
    wav_BN = batch.target_BN + 0.05 * torch.randn_like(batch.target_BN)
    scale = 0.8 / batch.target_BN.abs().amax(dim=1, keepdim=True)
    fake, real = gan.discriminators(wav_BN * scale), gan.discriminators(batch.target_BN * scale)

    def over_crop(values: Tensor) -> Tensor:
        return values.mean(dim=(1, 2, 3))

    expected = sum(over_crop((1 - y[-1]) ** 2) + over_crop(x[-1] ** 2) for x, y in zip(fake, real, strict=True))
    torch.testing.assert_close(gan.discriminator_loss(wav_BN, batch), expected)
    terms = gan.generator_terms(wav_BN, batch)
    torch.testing.assert_close(terms["adversarial"], sum(over_crop((1 - x[-1]) ** 2) for x in fake))
    pairs = [pair for x, y in zip(fake, real, strict=True) for pair in zip(x[:-1], y[:-1], strict=True)]
    torch.testing.assert_close(terms["features"], sum(over_crop((a - b).abs()) for a, b in pairs))
    equal = gan.generator_terms(batch.target_BN, batch)
    assert not equal["features"].any()


def test_who_learns_from_what() -> None:
    gan, batch = adversary(), batch_of([2 * COARSE_48K])
    wav_BN = torch.zeros_like(batch.target_BN).requires_grad_()
    loss = gan.discriminator_loss(wav_BN, batch).sum()
    gradients: tuple[Tensor | None, ...] = torch.autograd.grad(loss, [wav_BN], allow_unused=True)
    assert gradients == (None,), "the discriminators' loss should not reach the decoder"
    gan.discriminator_loss(wav_BN, batch).sum().backward()
    assert all(parameter.grad is not None for parameter in gan.discriminators.parameters())
    gan.optimizer.zero_grad()
    torch.stack(list(gan.generator_terms(wav_BN, batch).values())).sum().backward()
    assert wav_BN.grad is not None
    assert wav_BN.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in gan.discriminators.parameters())
    assert all(parameter.requires_grad for parameter in gan.discriminators.parameters())


def test_a_crops_loss_does_not_depend_on_the_others_or_on_its_padding() -> None:
    """Frames of a map that begin after the crop's end do not count, whatever they hold."""
    gan, batch = adversary(), batch_of([2 * COARSE_48K, COARSE_48K, 5000])
    wav_BN = batch.only_real(torch.randn(3, 2 * COARSE_48K))
    together = {"d": gan.discriminator_loss(wav_BN, batch), **gan.generator_terms(wav_BN, batch)}
    for place, part in enumerate(batch.split(1)):
        crop_1N = wav_BN[place : place + 1]
        alone = {"d": gan.discriminator_loss(crop_1N, part), **gan.generator_terms(crop_1N, part)}
        for name, value_B in together.items():
            torch.testing.assert_close(value_B[place], alone[name][0])


@pytest.mark.parametrize("bf16", [False, True])
def test_a_quiet_crop_pulls_no_harder_than_a_loud_one(bf16: bool) -> None:
    """The same sound at five levels: equal losses, and equal gradients by its samples, those of the scaled crop."""
    levels = torch.tensor([1.0, 0.5, 0.25, 0.125, 0.0625])[:, None]  # powers of two: scaling rounds nothing
    gan, one = adversary(), batch_of([2 * COARSE_48K])
    gan.bf16 = bf16
    wav_1N = one.target_BN + 0.05 * torch.randn_like(one.target_BN)
    loud = PEAK / one.target_BN.abs().max()
    batch = Batch(one.keys * 5, one.tokens_BT7.expand(5, -1, -1), loud * levels * one.target_BN, one.valid_B.expand(5))
    wav_BN = (loud * levels * wav_1N).requires_grad_()
    for value_B in gan.generator_terms(wav_BN, batch).values():
        (gradient_BN,) = torch.autograd.grad(value_B.sum(), wav_BN, retain_graph=True)
        torch.testing.assert_close(value_B, value_B[:1].expand(5))
        torch.testing.assert_close(gradient_BN, gradient_BN[:1].expand_as(gradient_BN))
        assert gradient_BN.any()


def test_quiet_targets_are_not_blown_up() -> None:
    gan, batch = adversary(), batch_of([2 * COARSE_48K])
    silent = Batch(batch.keys, batch.tokens_BT7, torch.zeros_like(batch.target_BN), batch.valid_B)
    loud = gan.generator_terms(batch.target_BN, batch)["adversarial"]
    assert gan.generator_terms(1e-4 * torch.randn_like(batch.target_BN), silent)["features"].max() < loud.max()


def test_one_seed_one_adversary_and_no_other_draw() -> None:
    before = torch.get_rng_state()
    a, b = adversary().discriminators.state_dict(), adversary().discriminators.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    other = adversary("seed=1").discriminators.state_dict()
    assert not any(torch.equal(a[name], other[name]) for name in a if name.endswith("original1"))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_balancer_gives_each_loss_its_share_of_the_gradient() -> None:
    wav_BN = torch.randn(3, 50, requires_grad=True)
    weights = {"a": 1.0, "b": 3.0}

    def terms() -> dict[str, Tensor]:
        return {"a": 1000 * wav_BN.square().sum(dim=1), "b": 0.001 * wav_BN.abs().sum(dim=1)}

    balancer = Balancer(weights)
    first_BN, norms = balancer.gradient(terms(), wav_BN)
    raw = {"a": 2000 * wav_BN.detach(), "b": 0.001 * wav_BN.detach().sign()}
    torch.testing.assert_close(first_BN, raw["a"] + 3 * raw["b"])  # nothing is known yet
    for name, gradient_BN in raw.items():
        torch.testing.assert_close(norms[PREFIX + name], gradient_BN.norm(dim=1))
    means = {name: float(norm_B.mean()) for name, norm_B in norms.items()}
    balancer.update({**means, "loss": 7.0})
    second_BN, _ = balancer.gradient(terms(), wav_BN)
    expected = sum(weights[name] / 4 * raw[name] / means[PREFIX + name] for name in raw)
    torch.testing.assert_close(second_BN, expected)

    balancer.update({name: 3 * value for name, value in means.items()})
    running = (0.999 * 1 + 3) / (0.999 + 1)  # of the norm's mean, in units of the first
    torch.testing.assert_close(balancer.gradient(terms(), wav_BN)[0], expected / running)
    other = Balancer(weights)
    other.load_state_dict(balancer.state_dict())
    torch.testing.assert_close(other.gradient(terms(), wav_BN)[0], expected / running)
