"""Orpheus's audio tokens as coarse frames: seven language-model tokens for one frame, interleaved in time.

    position in the frame   0    1    2    3    4    5    6
    token                   c    m0   f0   f1   m1   f2   f3       (coarse, middle, fine)

The id is 128266 + 4096 · position + code; as text, `<custom_token_N>` with N = 10 + 4096 · position + code. Source: the
decoder of canopyai/Orpheus-TTS (`turn_token_into_id`, `convert_to_audio`), and the ONNX users of its codes. Other ids
are not audio. 128261 starts the answer, 128257 its speech: the package of Orpheus-TTS ends its prompt with them, its
notebook leaves them to the model. 128258 ends speech.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from shards.contract import CODEBOOK_SIZE, TOKENS
from shards.errors import UserError

FIRST_AUDIO_ID = 128266  # <custom_token_10>
BEFORE_SPEECH = (128261, 128257)
END_OF_SPEECH = 128258
POSITIONS = (0, 1, 4, 2, 3, 5, 6)  # where an Orpheus frame holds c, m0, m1, f0, f1, f2, f3
OFFSETS = FIRST_AUDIO_ID + CODEBOOK_SIZE * np.arange(TOKENS)


def to_ids(codes_T7: npt.NDArray[np.integer]) -> list[int]:
    """Frames as in the shards → the ids that Orpheus would speak."""
    ids_T7 = np.empty(codes_T7.shape, np.int64)
    ids_T7[:, POSITIONS] = codes_T7
    return [int(id_) for id_ in (ids_T7 + OFFSETS).ravel()]


class OrpheusFrames:
    """Ids as they come, in any portions → whole frames (T, 7); an unfinished frame waits in `held`."""

    def __init__(self) -> None:
        self.held: list[int] = []

    def push(self, ids: Iterable[int]) -> npt.NDArray[np.int16]:
        """Raises UserError for an id that is no audio token of its place, such as END_OF_SPEECH, up to which a portion
        is to be pushed; then nothing of the portion is taken, so that no whole frame before that id is lost.
        """
        held, frames = list(self.held), []
        for id_ in ids:
            position = len(held)
            code = id_ - int(OFFSETS[position])
            if not 0 <= code < CODEBOOK_SIZE:
                first = int(OFFSETS[position])
                raise UserError(
                    f"id {id_} at position {position} of its frame, expected {first} to {first + CODEBOOK_SIZE - 1}"
                )
            held.append(code)
            if len(held) == TOKENS:
                frames.append([held[place] for place in POSITIONS])
                held = []
        self.held = held
        return np.array(frames, np.int16).reshape(-1, TOKENS)
