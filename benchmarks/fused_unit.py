"""Would one pass over memory for Snake, depthwise convolution and Snake pay? On a GPU alone: it is written in Triton.

The compiled training step in bfloat16, as `benchmarks.training_step` takes it, with and without the candidate of
`benchmarks/fused_kernels.py` in all 15 residual units. It belongs into the trainer if the step takes 1.2 times less.
"""

from __future__ import annotations

from typing import Any

import click
import torch
from snac.layers import ResidualUnit
from torch import Tensor, nn

from benchmarks.encoding import true_size
from benchmarks.harness import in_rounds, interleaved, of_crops, of_seconds, report
from benchmarks.training_step import ours, random_batch
from codec.snac import device_of
from shards.contract import COARSE_48K, TARGET_RATE, coarse_tokens
from trainer import decoder


class FusedUnit(ResidualUnit):
    """A residual unit whose first three layers are one kernel."""

    def run(self, x_BCN: Tensor, real_BL: Tensor) -> Tensor:
        from benchmarks.fused_kernels import snake_depthwise_snake  # needs Triton

        snake_in, depthwise, snake_out, mix = self.block
        _, z_BCN = snake_depthwise_snake(
            x_BCN.contiguous(), ends(real_BL, x_BCN.shape[-1]), depthwise.weight[:, 0], depthwise.bias,
            snake_in.alpha.flatten(), snake_out.alpha.flatten(), depthwise.dilation[0],
        )  # fmt: skip
        return x_BCN + mix(z_BCN)  # what lies beyond the ends, every depthwise convolution leaves out again


def ends(real_BL: Tensor, samples: int) -> Tensor:
    """(batch, 2): where in a crop the recording begins, and has ended; its latent frames are in one piece."""
    first_B = real_BL.int().argmax(dim=1)
    ends_B2 = torch.stack((first_B, first_B + real_BL.sum(dim=1)), dim=1)
    return (ends_B2 * (samples // real_BL.shape[1])).int()


run_others = decoder.run_module


def run_module(module: nn.Module, x_BCN: Tensor, real_BL: Tensor | None) -> Tensor:
    """The trainer's, which calls it in turn, for modules of which some are FusedUnits."""
    if isinstance(module, FusedUnit) and real_BL is not None:
        return module.run(x_BCN, real_BL)
    return run_others(module, x_BCN, real_BL)


def fuse(model: nn.Module) -> None:
    """Makes a FusedUnit of every residual unit in `model`."""
    for module in model.modules():
        if isinstance(module, ResidualUnit):
            module.__class__ = FusedUnit
    decoder.run_module = run_module


@click.command(help=__doc__)
@click.option("--gpu", default="0", show_default=True, help="Its number.")
@of_crops
@of_seconds
@in_rounds(20)
def main(gpu: str, crops: int, seconds: float, rounds: int) -> None:
    device, length = device_of(gpu), coarse_tokens(seconds)
    snac, batch = true_size(), random_batch(crops, length)
    recipe = ("precision=bf16", "compile=true")
    ways = {
        "compiled": ours(snac, batch, device, *recipe),
        "compiled, units fused": ours(snac, batch, device, *recipe, change=fuse),
    }
    medians = interleaved(ways, rounds, warm_up=3)
    audio = crops * length * COARSE_48K / TARGET_RATE
    first = medians["compiled"]
    rows: list[dict[str, Any]] = [
        {"way": name, "seconds": seconds, "audio_s_per_s": audio / seconds, "times_compiled": first / seconds}
        for name, seconds in medians.items()
    ]
    report("fused_unit", rows, gpu, crops=crops, coarse=length, largest_gib=torch.cuda.max_memory_allocated() / 2**30)


if __name__ == "__main__":
    main()
