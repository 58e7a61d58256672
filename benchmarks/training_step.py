"""How fast is a training step? Stock classes in plain float32 against this trainer's, on one batch.

The decoder has the true size (13.0 M parameters, random weights); losses are the base recipe's. There are two floors.
Arithmetic: 31 GFLOP per audio second, forward and backward, at what a matrix product of this device reaches. Memory:
what the decoder has to read and write even if each residual unit were one pass, at the speed of a copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import click
import torch
from snac import SNAC
from snac.layers import Decoder, DecoderBlock, ResidualUnit
from torch import Tensor, nn

from benchmarks.encoding import true_size
from benchmarks.harness import in_rounds, interleaved, of_crops, of_seconds, on_device, report
from codec.memory import keep_freed_memory
from codec.snac import device_of
from configs.loader import load_settings
from shards.contract import COARSE_48K, CODEBOOK_SIZE, CONTEXT_COARSE, TARGET_RATE, TOKENS, coarse_tokens
from trainer.data import Batch
from trainer.decoder import NEW_BLOCK, CodesToLatent, trainable, warm_start
from trainer.distributed import Process
from trainer.learner import Learner
from trainer.losses import reconstruction, weighted
from trainer.settings import BETAS, TrainSettings

GFLOP_PER_SECOND_OF_AUDIO = 31
PLAIN_CROPS = 16  # at once: of 4 s, 55 GiB, what a GPU of 80 holds


def random_batch(crops: int, length: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    shape = (crops, length + 2 * CONTEXT_COARSE, TOKENS)
    return Batch(
        keys=[str(number) for number in range(crops)],
        tokens_BT7=torch.randint(CODEBOOK_SIZE, shape, generator=generator),
        target_BN=0.1 * torch.randn(crops, length * COARSE_48K, generator=generator),
        valid_B=torch.full((crops,), length * COARSE_48K),
    )


def plain(snac: SNAC, batch: Batch, settings: TrainSettings, device: torch.device) -> Callable[[], None]:
    """What one would write first: stock modules, float32, AdamW as it comes, as many crops at once as fit."""
    decoder = warm_start(snac, "zero", 0)
    trainable(decoder, 2, "zero")
    to_latent, decoder, context = CodesToLatent(snac).to(device), decoder.to(device), CONTEXT_COARSE * COARSE_48K
    optimizer = torch.optim.AdamW(decoder.parameters(), settings.learning_rate, BETAS)
    on_device = batch.to(device)

    def step() -> None:
        optimizer.zero_grad()
        for part in on_device.split(PLAIN_CROPS):
            wav_BN = decoder(to_latent(part.tokens_BT7))[:, 0, context:-context]
            terms = reconstruction(wav_BN, part.target_BN, part.valid_B, settings.weights, settings.n_ffts)
            (weighted(terms, settings.weights).sum() / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), settings.gradient_clip)
        optimizer.step()
        wait(device)

    return step


def ours(
    snac: SNAC, batch: Batch, device: torch.device, *words: str, change: Callable[[nn.Module], None] | None = None
) -> Callable[[], None]:
    """A step with these settings, of a decoder that `change` has changed."""
    settings = load_settings(TrainSettings, "decoder_48khz.json", words)
    learner = Learner(CodesToLatent(snac), warm_start(snac, "zero", 0), settings, Process(0, 1, device), print)
    learner.enter_phase(2)
    if change:
        change(learner.model)

    def step() -> None:
        learner.step(batch, 0, len(batch), 1.0)
        wait(device)

    return step


def gflops(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP per second of a large matrix product."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def product() -> None:
        a @ b
        wait(device)

    seconds = interleaved({"product": product}, rounds=5)["product"]
    return 2 * size**3 / seconds / 1e9


def least_bytes(decoder: Decoder, bf16: bool) -> float:
    """Per second of audio: residual units, and the convolutions between them, each read their input and write their
    output; going back they read the input and the output's gradient and write the input's. Weights and losses are left
    out.
    """
    moved = 0

    def counted(module: nn.Module, size: int) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            nonlocal moved
            moved += size * (3 * inputs[0].numel() + 2 * output.numel())

        return module.register_forward_hook(hook)

    hooks = [
        counted(part, 2 if bf16 and number < NEW_BLOCK else 4)
        for number, layer in enumerate(decoder.model)
        for part in (layer.block if isinstance(layer, DecoderBlock) else [layer])
        if isinstance(part, nn.Conv1d | nn.ConvTranspose1d | ResidualUnit)
    ]
    with torch.inference_mode():
        wav_B1N = decoder(torch.zeros(1, decoder.model[0].in_channels, 8))
    for hook in hooks:
        hook.remove()
    return moved / wav_B1N.shape[-1] * TARGET_RATE


def bytes_per_second(device: torch.device) -> float:
    """That a copy of a large tensor reads and writes."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**26, device=device)
    made = torch.empty_like(source)

    def copy() -> None:
        made.copy_(source)
        wait(device)

    return 2 * source.nbytes / interleaved({"copy": copy}, rounds=5)["copy"]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@click.command(help=__doc__)
@on_device
@of_crops
@of_seconds
@in_rounds(5)
def main(gpu: str, crops: int, seconds: float, rounds: int) -> None:
    device, length = device_of(gpu), coarse_tokens(seconds)
    snac, batch = true_size(), random_batch(crops, length)
    settings = load_settings(TrainSettings, "decoder_48khz.json", [])
    stock = {"stock classes, fp32": plain(snac, batch, settings, device)}
    ways = {
        "ours, fp32": ours(snac, batch, device, "precision=fp32", "compile=false"),
        "ours, fp32, compiled": ours(snac, batch, device, "precision=fp32", "compile=true"),
        "ours, bf16": ours(snac, batch, device, "precision=bf16", "compile=false"),
        "ours, bf16, compiled": ours(snac, batch, device, "precision=bf16", "compile=true"),
    }
    if device.type == "cpu":  # bfloat16 is emulated on most
        ways = {name: way for name, way in ways.items() if "bf16" not in name}
    began = time.perf_counter()
    medians = interleaved(stock, rounds, warm_up=2)
    keep_freed_memory()  # as training does; there is no way back, so what is stock comes first
    medians |= interleaved(ways, rounds, warm_up=2)
    audio = crops * length * COARSE_48K / TARGET_RATE
    first = next(iter(medians.values()))
    bf16 = device.type == "cuda"
    moved = least_bytes(warm_start(snac, "zero", 0), bf16)
    medians["floor: arithmetic"] = (
        audio * GFLOP_PER_SECOND_OF_AUDIO / gflops(device, torch.bfloat16 if bf16 else torch.float32)
    )
    medians["floor: memory"] = audio * moved / bytes_per_second(device)
    rows = [
        {"way": name, "seconds": seconds, "audio_s_per_s": audio / seconds, "times_stock": first / seconds}
        for name, seconds in medians.items()
    ]
    in_all = time.perf_counter() - began
    report("training_step", rows, gpu, crops=crops, coarse=length, bytes_per_audio_second=moved, seconds_in_all=in_all)


if __name__ == "__main__":
    main()
