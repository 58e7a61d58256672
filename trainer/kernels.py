"""Snake and the depthwise convolution before it: natively in one pass where a C compiler is, else in torch operations.

The C source is compiled when it is first needed (a quarter of a second), into a folder that is deleted once the library
is loaded; so it is always built for the processor that runs it. Both forms give Snake to float32's accuracy.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("kernels.c")
MISSING = "no C compiler found, or TMPDIR is noexec: gcc or clang and a TMPDIR that is not would speed it up"
TAPS = 7


class Snake(NamedTuple):
    """x + sin²(αx)/α for each channel; `inverse` is 1/(α + 1e-9) as in the stock package."""

    alpha: Tensor  # (channels,)
    inverse: Tensor

    @classmethod
    def of(cls, stock: Any) -> Snake:
        alpha = stock.alpha.detach().flatten()
        return cls(alpha, (alpha + 1e-9).reciprocal())


def snake(x_NBC: Tensor, by: Snake, out_NBC: Tensor) -> None:
    native = _native_for(x_NBC)
    if native:
        native.snake(*_pointers(x_NBC, *by, out_NBC), *_sizes(out_NBC.numel() // out_NBC.shape[2], out_NBC.shape[2]))
        return
    sine = torch.mul(x_NBC, by.alpha).sin_()
    torch.addcmul(x_NBC, sine.mul_(sine), by.inverse, out=out_NBC)


def depthwise(x_NBC: Tensor, kernel_KC: Tensor, bias: Tensor, dilation: int, out_NBC: Tensor) -> None:
    """(rows + 6 · dilation, streams, channels) → (rows, streams, channels)."""
    rows = out_NBC.shape[0]
    torch.addcmul(bias, x_NBC[:rows], kernel_KC[0], out=out_NBC)
    for tap in range(1, TAPS):
        out_NBC.addcmul_(x_NBC[tap * dilation :][:rows], kernel_KC[tap])


def depthwise_snake(x_NBC: Tensor, kernel_KC: Tensor, bias: Tensor, dilation: int, by: Snake, out_NBC: Tensor) -> None:
    native = _native_for(x_NBC)
    if native is None:
        depthwise(x_NBC, kernel_KC, bias, dilation, out_NBC)
        snake(out_NBC, by, out_NBC)
        return
    rows, streams, channels = out_NBC.shape
    pointers = _pointers(x_NBC, kernel_KC, bias, *by, out_NBC)
    native.depthwise_snake(*pointers, *_sizes(rows * streams, channels, dilation * streams))


def description(device: torch.device) -> str:
    if device.type != "cpu":
        return f"torch operations on {device}"
    return "native kernels" if _native() else f"torch operations ({MISSING})"


def _native_for(x: Tensor) -> ctypes.CDLL | None:
    return _native() if x.device.type == "cpu" and x.dtype == torch.float32 else None


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in tensors)
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def _sizes(*values: int) -> list[ctypes.c_ssize_t]:
    return [ctypes.c_ssize_t(value) for value in values]


@cache
def _native() -> ctypes.CDLL | None:
    """None where there is no compiler, one that cannot build it, or no folder that code may be loaded from (noexec)."""
    compiler = next(filter(None, map(shutil.which, filter(None, [os.environ.get("CC"), "cc", "gcc", "clang"]))), None)
    if compiler is None:
        return None
    flags = ["-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC"]
    try:
        with TemporaryDirectory(prefix="snac48.") as folder:
            library = Path(folder) / "kernels.so"
            words = [compiler, *flags, str(SOURCE), "-lm", "-o", str(library)]
            subprocess.run(words, capture_output=True, check=True)
            return ctypes.CDLL(str(library))
    except (OSError, subprocess.CalledProcessError):
        return None
