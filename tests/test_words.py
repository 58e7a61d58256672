"""Numbers as people write them."""

from __future__ import annotations

import pytest

from configs.words import lasting, number_of


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 clips"), (1, "1 clip"), (2, "2 clips"), (1_234_567, "1,234,567 clips")]
)
def test_a_number_of_things(number: int, text: str) -> None:
    assert number_of(number, "clip") == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (38, "38 s"), (60, "1.0 min"), (750, "12.5 min"), (3600, "1.00 h"), (4.5e6, "1,250.00 h")],
)
def test_how_long_something_lasts(seconds: float, text: str) -> None:
    assert lasting(seconds) == text
