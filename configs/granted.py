"""What this process may use of a machine: no more than the control groups of its container grant."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")  # lines of NUMBER:CONTROLLERS:PATH, of version 2 without controllers


def granted_memory() -> int:
    """Bytes."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_memory_limits()])


def granted_cores() -> int:
    """Those that it may run on, as far as its quota buys them.

    Rounded down: of threads that work in step, one too many makes all wait while the kernel holds it back.
    """
    return max(int(min([len(os.sched_getaffinity(0)), *_quotas()])), 1)


def _memory_limits() -> Iterator[int]:
    for group in _own_groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):  # max, where there is no limit
                yield int((group / name).read_text())


def _quotas() -> Iterator[float]:
    """In cores, which `sched_getaffinity` does not know."""
    for group in _own_groups("cpu"):
        with suppress(OSError, ValueError):  # max, where there is no quota
            quota, period = map(int, (group / "cpu.max").read_text().split())
            yield quota / period
        with suppress(OSError):
            quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            if quota > 0:
                yield quota / period


def _own_groups(controller: str) -> Iterator[Path]:
    """Of version 2 and 1; in a container the paths may be those of the machine, and its own group the topmost here."""
    with suppress(OSError):
        for line in OWN_GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "" or controller in controllers.split(","):
                own = Path(path.removeprefix("/"))
                yield from (CGROUPS / (controller if controllers else "") / group for group in (own, *own.parents))
