"""The fused residual unit against the stock layers, forward and backward: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from benchmarks.fused_unit import ends
from tests.helpers import ROOT

pytest.importorskip("triton", reason="PyTorch brings it with its builds for GPUs")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))]


@pytest.fixture(scope="module", params=DEVICES)
def errors(request: pytest.FixtureRequest) -> dict[str, Any]:
    interpreted = {"TRITON_INTERPRET": "1"} if request.param == "cpu" else {}
    words = [sys.executable, "-m", "tests.fused_check", request.param]
    ended = subprocess.run(words, cwd=ROOT, env=os.environ | interpreted, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def test_fused_kernels_are_as_exact_as_their_layers(errors: dict[str, Any]) -> None:
    for name in ("float32 1", "float32 3", "float32 9", "units"):
        assert len(errors[name]) >= 6
        assert max(fused for fused, _ in errors[name].values()) < 1e-5, errors[name]
    rounded = errors["bfloat16 3"].values()
    assert sum(fused for fused, _ in rounded) < 2 * sum(plain for _, plain in rounded), rounded


def test_both_ways_take_the_second_snake_of_the_same(errors: dict[str, Any]) -> None:
    assert errors["backward finds"] <= 1


def test_ends_of_recordings() -> None:
    real_BL = torch.tensor([[True] * 4, [False, True, True, False], [False] * 4])
    assert ends(real_BL, 40).tolist() == [[0, 40], [10, 30], [0, 0]]
