"""Settings of `just demo`."""

from __future__ import annotations

from pydantic import Field

from configs.loader import Local, Settings


class DemoSettings(Settings):
    """Codes, targets, shards, a short training, a 48 kHz WAV and its spectrogram: offline, on a CPU, in minutes.

    The codec is a small stand-in trained for this project, and targets are the recordings themselves.
    """

    audio: Local | None = Field(default=None, description="folder of your own recordings (null: a voice made by code)")
    out: Local = Field(description="folder for everything the demo makes")
    max_steps: int = Field(ge=40, description="training steps; in the first 40 only the new layers learn")
