"""Memory that is freed stays with the process; how it is told that there is no more."""

from __future__ import annotations

import ctypes
import platform

RAN_OUT = ("out of memory", "_ALLOC_FAILED", "CUFFT_INTERNAL_ERROR", "unable to find an engine")
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # mallopt(3)


def keep_freed_memory() -> None:
    """From now on large tensors come from one heap that does not shrink, instead of mappings of their own.

    glibc gives each large tensor back when it is freed, and the next one is faulted in again, page by page: on a CPU
    that took up to half of an encoder's time. The price is a higher peak, as holes are filled less well. Does nothing
    where the C library is another.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1)):
            libc.mallopt(option, value)


def ran_out(error: BaseException) -> bool:
    """Whether a GPU's memory did. Libraries that need some beside torch's say it in words of their own: Triton and CUDA
    itself, cuBLAS and cuDNN, cuFFT (https://github.com/pytorch/pytorch/issues/119420), and torch where no algorithm of
    cuDNN finds its workspace.
    """
    return isinstance(error, RuntimeError) and any(words in str(error) for words in RAN_OUT)
