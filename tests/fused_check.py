"""Errors of the fused residual unit, and of the stock layers at the same precision, against these in float64, as JSON.

`python -m tests.fused_check DEVICE`, in a process of its own, as Triton looks at TRITON_INTERPRET when it is imported:
with it, kernels run on a CPU.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from snac.layers import ResidualUnit, snake
from torch import Tensor
from torch.nn.functional import conv1d

from benchmarks.fused_kernels import snake_depthwise_snake
from benchmarks.fused_unit import ends, fuse
from trainer import decoder

Tensors = dict[str, Tensor]
Errors = dict[str, tuple[float, float]]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().cpu().double() - expected.detach()).norm() / expected.detach().norm())


def stock(
    x_BCN: Tensor, real_BL: Tensor, kernel_CK: Tensor, bias_C: Tensor, alpha_in_C: Tensor, alpha_out_C: Tensor,
    dilation: int,
) -> Tensor:  # fmt: skip
    """By the stock package's Snake and torch's convolution."""
    taken_BCN = snake(x_BCN, alpha_in_C[:, None])
    taken_BCN = taken_BCN * real_BL.repeat_interleave(x_BCN.shape[-1] // real_BL.shape[1], dim=1)[:, None]
    padding, channels = dilation * (kernel_CK.shape[1] // 2), len(kernel_CK)
    y_BCN = conv1d(taken_BCN, kernel_CK[:, None], bias_C, padding=padding, dilation=dilation, groups=channels)
    return snake(y_BCN, alpha_out_C[:, None])


def of_kernels(dilation: int, dtype: torch.dtype, device: str) -> Errors:
    """On three stretches of two crops, of which one begins and the other ends with what is not real."""
    random = torch.Generator().manual_seed(dilation)
    given: Tensors = {
        "x": torch.randn(2, 2, 2400, generator=random).to(dtype),
        "kernel": torch.randn(2, 7, generator=random),
        "bias": torch.randn(2, generator=random),
        "alpha_in": 3 * torch.rand(2, generator=random),
        "alpha_out": 3 * torch.rand(2, generator=random),
    }
    dz_BCN = torch.randn(2, 2, 2400, generator=random).to(dtype)
    real_BL = torch.ones(2, 8, dtype=torch.bool)
    real_BL[0, 0] = real_BL[1, 6:] = False

    def fused(x_BCN: Tensor, real_BL: Tensor, *others: Any) -> Tensor:
        return snake_depthwise_snake(x_BCN, ends(real_BL, x_BCN.shape[-1]), *others)[1]

    def learned(layers: Callable[..., Tensor], to: Any) -> Tensors:
        taken = {name: value.detach().clone().to(to).requires_grad_() for name, value in given.items()}
        x_BCN, *of_channels = taken.values()
        z_BCN = layers(x_BCN, real_BL.to(x_BCN.device), *of_channels, dilation)
        z_BCN.backward(dz_BCN.to(z_BCN))
        return {"z": z_BCN} | {f"d {name}": value.grad for name, value in taken.items() if value.grad is not None}

    exact, found = learned(stock, torch.float64), learned(fused, device)
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        plain = learned(stock, "cpu")
    return {name: (relative(found[name], exact[name]), relative(plain[name], exact[name])) for name in exact}


def backward_finds(device: str) -> float:
    """How far z, in bfloat16, is at most from the Snake of the y that backward reads, in steps of its rounding."""
    random = torch.Generator().manual_seed(0)
    x_BCN = torch.randn(1, 2, 2400, generator=random).to(device, torch.bfloat16)
    kernel_CK, (bias_C, alpha_C) = torch.randn(2, 7, generator=random), torch.rand(2, 2, generator=random) + 0.5
    ends_B2 = ends(torch.ones(1, 8, dtype=torch.bool, device=device), 2400)
    of_channels = (value.to(device).contiguous() for value in (kernel_CK, bias_C, alpha_C, alpha_C))
    y_BCN, z_BCN = snake_depthwise_snake(x_BCN, ends_B2, *of_channels, 3)
    expected_BCN = snake(y_BCN.float(), alpha_C.to(device)[:, None])
    step = torch.finfo(torch.bfloat16).eps
    return float(((z_BCN.float() - expected_BCN).abs() / (step * expected_BCN.abs() + 1e-5)).max())


def of_units(device: str) -> Errors:
    """Of three units in turn, whose weights are any: what is real of their output, and all gradients."""
    torch.manual_seed(0)
    units = torch.nn.Sequential(*(ResidualUnit(2, dilation, groups=2) for dilation in (1, 3, 9)))
    for parameter in units.parameters():
        torch.nn.init.uniform_(parameter, 0.1, 0.5)
    x_BCN = torch.randn(2, 2, 2400)
    real_BL = torch.ones(2, 10, dtype=torch.bool)[:, 1:-1]
    real_BL[1, :3] = False

    def learned(units: torch.nn.Module, x_BCN: Tensor) -> Tensors:
        real = real_BL.to(x_BCN.device)
        found_BCN = decoder.run_module(units, x_BCN, real) * real.repeat_interleave(300, dim=1)[:, None]
        found_BCN.square().mean().backward()
        return {"output": found_BCN} | {name: p.grad for name, p in units.named_parameters() if p.grad is not None}

    exact = learned(copy.deepcopy(units).double(), x_BCN.double())
    plain = learned(copy.deepcopy(units), x_BCN)
    fuse(units)
    found = learned(units.to(device), x_BCN.to(device))
    return {name: (relative(found[name], exact[name]), relative(plain[name], exact[name])) for name in exact}


if __name__ == "__main__":
    _, where = sys.argv
    kernels = {f"float32 {dilation}": of_kernels(dilation, torch.float32, where) for dilation in (1, 3, 9)}
    kernels["bfloat16 3"] = of_kernels(3, torch.bfloat16, where)
    print(json.dumps({**kernels, "units": of_units(where), "backward finds": backward_finds(where)}))
