"""What changes with the step, as pure functions of it: phases, lengths of crops, the learning rate."""

from __future__ import annotations

import math

from shards.contract import coarse_tokens
from shards.stream import Stage
from trainer.settings import TrainSettings


def stages(settings: TrainSettings) -> tuple[Stage, ...]:
    """`segment_schedule` as stages whose batches hold the audio of `batch_size` crops of `segment_length`.

    To the nearest crop: 32 crops of 47 coarse tokens (4 s) become 125 of 12 (1 s), 1504 tokens against 1500.
    """
    audio = settings.batch_size * coarse_tokens(settings.segment_length)
    lengths = [(step, coarse_tokens(seconds)) for step, seconds in settings.planned_lengths]
    return tuple(Stage(step, length, max(round(audio / length), 1)) for step, length in lengths)


def rate_factor(step: int, begun: int, total_steps: int, settings: TrainSettings) -> float:
    """What the learning rate of parameters is multiplied by that began to learn, or to learn with others, at `begun`.

    Half a cosine from 1 at the beginning of training to `final_rate` at its end (SGDR, arXiv 1608.03983, without
    restarts), times a linear rise over the `warmup_steps` from `begun` on, before which it is 0.
    """
    factor = settings.final_rate + (1 - settings.final_rate) * (1 + math.cos(math.pi * step / total_steps)) / 2
    return factor * min(max((step - begun + 1) / (settings.warmup_steps + 1), 0.0), 1.0)


def segment_text(stages_: tuple[Stage, ...]) -> str:
    return ", then ".join(f"{stage.batch} × {stage.length} coarse tokens" for stage in stages_)
