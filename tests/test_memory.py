"""Memory that is freed is used again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from tests.helpers import ROOT

LARGE = """
import resource, torch
from codec.memory import keep_freed_memory
{keep}
def faults():
    torch.zeros(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):  # glibc takes some to find the same place again for what is aligned
    first = faults()
for _ in range(5):
    last = faults()
print(last - first)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_large_tensors_are_not_faulted_in_again() -> None:
    def faults(keep: str) -> int:
        return int(subprocess.check_output([sys.executable, "-c", LARGE.format(keep=keep)], cwd=ROOT))

    pages = 5 * (1 << 26) // 4096
    assert faults("pass") > pages / 2
    assert faults("keep_freed_memory()") < pages / 100
