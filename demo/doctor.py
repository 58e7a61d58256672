"""`just doctor`: the real models, examined on given recordings or on voices made by code."""

from __future__ import annotations

import tempfile
from pathlib import Path

from demo.voice import write_voices
from pipeline.doctor import examine
from pipeline.settings import DoctorSettings
from pipeline.sources import find


def doctor(settings: DoctorSettings) -> None:
    """Raises UserError when a check failed."""
    with tempfile.TemporaryDirectory() as folder:
        if settings.audio is None:
            recordings = write_voices(Path(folder), settings.recordings, 1, 8.0)
        else:
            recordings = [
                Path(path) for path in find(settings.audio, None)[0]["path"][: settings.recordings].to_pylist()
            ]
        examine(settings, recordings, Path(folder))
