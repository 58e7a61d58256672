"""How fast training is."""

from __future__ import annotations

import resource

import torch


class Speed:
    """Of all steps since it began anew: of every tenth alone, a loader may be waited for always or never."""

    def __init__(self) -> None:
        self.begin_anew()

    def begin_anew(self) -> None:
        self.steps = 0
        self.audio = self.waited = self.seconds = 0.0

    def add(self, audio: float, waited: float, seconds: float) -> None:
        """A step over so many seconds of audio, which waited for its data for some of its seconds."""
        self.steps += 1
        self.audio += audio
        self.waited += waited
        self.seconds += seconds

    def values(self) -> dict[str, float]:
        return {
            "audio_seconds_per_second": self.audio / self.seconds,
            "seconds_per_step": self.seconds / self.steps,
            "data_wait_share": self.waited / self.seconds,
        }


def peak_memory_gib(device: torch.device) -> float:
    """The most that was ever allocated on the GPU; on a CPU the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
