"""How many cores this process may use: those that it may run on, and no more than a container's quota buys."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")  # lines of NUMBER:CONTROLLERS:PATH, of version 2 without controllers


def granted_cores() -> int:
    """Rounded down: of threads that work in step, one too many makes all wait while the kernel holds it back."""
    return max(int(min([len(os.sched_getaffinity(0)), *_quotas()])), 1)


def _quotas() -> Iterator[float]:
    """Cores that the control groups above this process may use, which `sched_getaffinity` does not know."""
    for group in _own_groups():
        with suppress(OSError, ValueError):  # max, where there is no quota
            quota, period = map(int, (group / "cpu.max").read_text().split())
            yield quota / period
        with suppress(OSError):
            quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            if quota > 0:
                yield quota / period


def _own_groups() -> Iterator[Path]:
    """Version 2 and 1; in a container the paths may be those of the machine, and its own group the topmost here."""
    with suppress(OSError):
        for line in OWN_GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "" or "cpu" in controllers.split(","):
                own = Path(path.removeprefix("/"))
                yield from (CGROUPS / ("cpu" if controllers else "") / group for group in (own, *own.parents))
