"""Real speech from Debian's packages, where a script that unpacks it lies beside the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import soundfile

from tests.helpers import ROOT

SCRIPT = Path(os.environ.get("SPEECH_SCRIPT", ROOT.parent / "shared" / "speech.sh"))


def unpack(folder: Path) -> Path:
    """`folder` with everything that the script unpacks; skips where it cannot be had."""
    if not SCRIPT.exists():
        pytest.skip("needs a script that unpacks real speech: SPEECH_SCRIPT=FILE")
    if shutil.which("apt-get") is None:
        pytest.skip("the real speech comes from Debian's packages: needs apt-get")
    unpacked = subprocess.run(["bash", str(SCRIPT), str(folder)], capture_output=True, text=True, check=False)
    if unpacked.returncode:
        pytest.skip(f"real speech cannot be had here: {unpacked.stderr[-200:]}")
    return folder


def some_recordings(
    folder: Path, number: int, min_seconds: float = 1.0, min_rate: int = 8000, seed: int = 0
) -> Iterator[tuple[npt.NDArray[np.float32], int]]:
    """(mono samples, rate) of `number` recordings drawn at random, peak 0.5."""
    files = sorted(path for path in folder.rglob("*.*") if path.suffix in (".wav", ".ogg"))
    for path in (files[i] for i in np.random.default_rng(seed).permutation(len(files))):
        if not number:
            return
        try:
            audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError:
            continue
        mono = audio.mean(axis=1)
        if len(mono) >= min_seconds * rate and rate >= min_rate and np.abs(mono).max() > 0.01:
            number -= 1
            yield (0.5 / np.abs(mono).max() * mono).astype(np.float32), rate
