"""`just doctor`: the real models, examined on given recordings or on voices made by code."""

from __future__ import annotations

import tempfile
from pathlib import Path

from codec.audio import AudioError, probe
from demo.voice import write_voices
from pipeline.doctor import examine
from pipeline.settings import DoctorSettings
from pipeline.sources import find
from shards.errors import UserError

MIN_SECONDS = 2


def doctor(settings: DoctorSettings) -> None:
    """Raises UserError when a check failed."""
    with tempfile.TemporaryDirectory() as folder:
        if settings.audio is None:
            recordings = write_voices(Path(folder), settings.recordings, 1, 8.0)
        else:
            recordings = _recordings(settings.audio, settings.recordings)
        examine(settings, recordings, Path(folder))


def _recordings(audio: Path, number: int) -> list[Path]:
    """The first files of `audio` that can be read and last long enough. Raises UserError when they are too few."""
    usable: list[Path] = []
    for row in find(audio, None)[0].to_pylist():
        if len(usable) < number and row["offset"] is None and row["problem"] is None and _lasts(Path(row["path"])):
            usable.append(Path(row["path"]))
    if len(usable) < number:
        raise UserError(
            f"audio={audio} holds {len(usable)} files of {MIN_SECONDS} s or more, recordings={number} asks for"
        )
    return usable


def _lasts(path: Path) -> bool:
    try:
        header = probe(path)
    except AudioError:
        return False
    return header.frames >= MIN_SECONDS * header.rate
