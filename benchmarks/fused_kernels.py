"""A residual unit's Snake, depthwise convolution and second Snake as one pass over memory, forward and backward.

A candidate for `trainer/`, for which `python -m benchmarks.fused_unit` has to show first that it pays. Triton
(Tillet et al., 2019). Forward reads x and writes y, the convolution's output, and z, what the 1 × 1 convolution takes;
backward reads x, y and dz and writes dx. Every sum is taken in a fixed order: no atomics.

Each program takes a stretch of one channel of one crop, with HALO samples of its neighbours at both ends: Snake is
taken once for each sample, and the seven taps are shifts within the stretch, through shared memory. There, neighbouring
threads must meet in neighbouring banks. So none may hold samples side by side, as Triton would have it where it knows
that rows are aligned: `length` tells it nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TAPS = tl.constexpr(7)
ROWS = tl.constexpr(8)  # a power of two
SUMS = tl.constexpr(10)  # of each stretch in backward: seven taps, the bias and both alphas
HALO = tl.constexpr(32)  # samples at both ends of a stretch, at least three times the largest dilation
STRETCH = 1024  # samples, with both halos; a power of two
INVERSE_PI = tl.constexpr(0.3183098861837907)


@triton.jit
def _sine(r):  # type: ignore[no-untyped-def]
    """sin(πr) for |r| ≤ ½, to 2e-7: a least-squares polynomial on Chebyshev's nodes."""
    q = r * r
    p = 0.07721838355064392 * q - 0.598044216632843
    p = p * q + 2.5500311851501465
    p = p * q - 5.1677069664001465
    return r * (p * q + 3.141592502593994)


@triton.jit
def _cosine(r):  # type: ignore[no-untyped-def]
    """cos(πr) for |r| ≤ ½, likewise."""
    q = r * r
    p = -0.024396324530243874 * q + 0.23493731021881104
    p = p * q - 1.335211992263794
    p = p * q + 4.058709144592285
    p = p * q - 4.934802055358887
    return p * q + 1.0


@triton.jit
def _turns(x, alpha):  # type: ignore[no-untyped-def]
    """αx/π without its whole part: Snake and its slope repeat with it."""
    u = x * (alpha * INVERSE_PI)
    return u - tl.floor(u + 0.5)


@triton.jit
def _snake(x, alpha):  # type: ignore[no-untyped-def]
    """x + sin²(αx)/(α + 1e-9), as in the stock package."""
    sine = _sine(_turns(x, alpha))
    return x + sine * sine / (alpha + 1e-9)


@triton.jit
def _slopes(x, alpha):  # type: ignore[no-untyped-def]
    """Of Snake, with respect to x and to α."""
    r = _turns(x, alpha)
    sine, inverse = _sine(r), 1.0 / (alpha + 1e-9)
    double = 2 * sine * _cosine(r)  # sin(2αx)
    return 1 + alpha * inverse * double, inverse * (x * double - sine * sine * inverse)


@triton.jit
def _stretch(length, ends, channels, stretch: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of this program: where its row begins, its samples, which of them there are, which the convolution sees, and
    which are to be written.
    """
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, stretch)
    t = tl.program_id(1) * (stretch - 2 * HALO) - HALO + place
    inside = (t >= 0) & (t < length)
    seen = (t >= tl.load(ends + row // channels * 2)) & (t < tl.load(ends + row // channels * 2 + 1))
    return row * length, t, inside, seen, inside & (place >= HALO) & (place < stretch - HALO)


@triton.jit
def _taps(kernel):  # type: ignore[no-untyped-def]
    """(ROWS, 1), with a zero below the taps."""
    tap = tl.arange(0, ROWS)
    return tl.load(kernel + tap, mask=tap < TAPS, other=0)[:, None]


@triton.jit
def _shifted(values, dilation: tl.constexpr, stretch: tl.constexpr):  # type: ignore[no-untyped-def]
    """(ROWS, stretch): for each tap what stands where it reaches, and anything in the halos."""
    place = tl.arange(0, ROWS * stretch)
    place += (place // stretch - TAPS // 2) * dilation
    return tl.gather(values, place & (stretch - 1), 0).reshape(ROWS, stretch)


@triton.jit(do_not_specialize=["length"])
def forward_kernel(  # type: ignore[no-untyped-def]
    x, ends, kernel, bias, alpha_in, alpha_out, y, z, channels, length,
    dilation: tl.constexpr, stretch: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) % channels
    first, t, _, seen, own = _stretch(length, ends, channels, stretch)
    taken = _snake(tl.load(x + first + t, mask=seen, other=0).to(tl.float32), tl.load(alpha_in + c))
    found = tl.load(bias + c) + tl.sum(_taps(kernel + c * TAPS) * _shifted(taken, dilation, stretch), 0)
    found = found.to(y.dtype.element_ty).to(tl.float32)  # as backward will find it
    tl.store(y + first + t, found, mask=own)
    tl.store(z + first + t, _snake(found, tl.load(alpha_out + c)), mask=own)


@triton.jit(do_not_specialize=["length"])
def backward_kernel(  # type: ignore[no-untyped-def]
    x, y, dz, ends, kernel, alpha_in, alpha_out, dx, sums, channels, length,
    dilation: tl.constexpr, stretch: tl.constexpr,
):  # fmt: skip
    """`sums` (crops · channels, stretches, SUMS) are for the caller to add up."""
    c = tl.program_id(0) % channels
    first, t, inside, seen, own = _stretch(length, ends, channels, stretch)
    given = tl.load(dz + first + t, mask=inside, other=0).to(tl.float32)
    slope, of_out = _slopes(tl.load(y + first + t, mask=inside, other=0).to(tl.float32), tl.load(alpha_out + c))
    dy = given * slope
    there = _shifted(dy, -dilation, stretch)  # of where each tap carries a sample
    found = tl.sum(_taps(kernel + c * TAPS) * there, 0)

    input, alpha = tl.load(x + first + t, mask=seen, other=0).to(tl.float32), tl.load(alpha_in + c)
    taken = tl.where(own, _snake(input, alpha), 0)
    slope, of_in = _slopes(input, alpha)
    tl.store(dx + first + t, tl.where(seen, found * slope, 0), mask=own)

    sums += (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * SUMS
    tap = tl.arange(0, ROWS)
    tl.store(sums + tap, tl.sum(there * taken[None, :], 1), mask=tap < TAPS)
    tl.store(sums + TAPS, tl.sum(tl.where(own, dy, 0)))
    tl.store(sums + TAPS + 1, tl.sum(tl.where(own, found * of_in, 0)))
    tl.store(sums + TAPS + 2, tl.sum(tl.where(own, given * of_out, 0)))


@torch.library.custom_op("snac48::snake_depthwise_snake", mutates_args={})
def snake_depthwise_snake(
    x_BCN: Tensor, ends_B2: Tensor, kernel_CK: Tensor, bias_C: Tensor, alpha_in_C: Tensor, alpha_out_C: Tensor,
    dilation: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y_BCN and z_BCN, in the type of x_BCN; arithmetic is in float32. All inputs are contiguous.

    `ends_B2` (int32) are the samples at which what the convolution sees of each crop begins, and has ended.
    """
    y_BCN, z_BCN = torch.empty_like(x_BCN), torch.empty_like(x_BCN)
    _, channels, length = x_BCN.shape
    forward_kernel[_grid(x_BCN)](
        x_BCN, ends_B2, kernel_CK, bias_C, alpha_in_C, alpha_out_C, y_BCN, z_BCN,
        channels, length, dilation, STRETCH,
    )  # fmt: skip
    return y_BCN, z_BCN


@torch.library.custom_op("snac48::snake_depthwise_snake_backward", mutates_args={})
def snake_depthwise_snake_backward(
    x_BCN: Tensor, y_BCN: Tensor, dz_BCN: Tensor, ends_B2: Tensor, kernel_CK: Tensor, alpha_in_C: Tensor,
    alpha_out_C: Tensor, dilation: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx_BCN, and for each channel the gradients of its taps, its bias and both its alphas."""
    dx_BCN = torch.empty_like(x_BCN)
    crops, channels, length = x_BCN.shape
    rows, stretches = _grid(x_BCN)
    sums = x_BCN.new_empty(rows, stretches, SUMS.value, dtype=torch.float32)
    backward_kernel[(rows, stretches)](
        x_BCN, y_BCN, dz_BCN, ends_B2, kernel_CK, alpha_in_C, alpha_out_C, dx_BCN, sums,
        channels, length, dilation, STRETCH,
    )  # fmt: skip
    return dx_BCN, sums.view(crops, channels, stretches, SUMS.value).sum(dim=(0, 2))


def _grid(x_BCN: Tensor) -> tuple[int, int]:
    crops, channels, length = x_BCN.shape
    return crops * channels, triton.cdiv(length, STRETCH - 2 * HALO.value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_BCN, ends_B2, kernel_CK, _, alpha_in_C, alpha_out_C, ctx.dilation = inputs
    ctx.save_for_backward(x_BCN, output[0], ends_B2, kernel_CK, alpha_in_C, alpha_out_C)


def _backward(ctx: Any, _: Tensor, dz_BCN: Tensor) -> tuple[Tensor | None, ...]:
    x_BCN, y_BCN, ends_B2, kernel_CK, alpha_in_C, alpha_out_C = ctx.saved_tensors
    dx_BCN, sums_CS = snake_depthwise_snake_backward(
        x_BCN, y_BCN, dz_BCN.contiguous(), ends_B2, kernel_CK, alpha_in_C, alpha_out_C, ctx.dilation
    )
    dkernel_CK, (dbias_C, din_C, dout_C) = sums_CS[:, : TAPS.value], sums_CS[:, TAPS.value :].unbind(1)
    return dx_BCN, None, dkernel_CK, dbias_C, din_C, dout_C, None


def _like_forward(x_BCN: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_BCN), torch.empty_like(x_BCN)


def _like_backward(x_BCN: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_BCN), x_BCN.new_empty(x_BCN.shape[1], SUMS.value, dtype=torch.float32)


snake_depthwise_snake.register_fake(_like_forward)
snake_depthwise_snake_backward.register_fake(_like_backward)
snake_depthwise_snake.register_autograd(_backward, setup_context=_keep)
