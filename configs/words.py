"""Numbers as people write them."""

from __future__ import annotations


def number_of(number: int, noun: str) -> str:
    """1 clip, 2 clips."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def lasting(seconds: float) -> str:
    """38 s, 12.5 min or 3.20 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:,.2f} h"
