"""Tokens of a speech model in, 48 kHz samples out as soon as they are known.

What equals what: for a given `step_coarse`, the concatenation of everything that `push` and `finish` return is the
same, bit for bit, however the tokens were cut into pushes, because the same steps are computed either way; with
`lookahead_frames=EXACT` it is the decode of the whole sequence. (Other step sizes, and the stock layers run over the
whole sequence, agree to float32's rounding, about 1e-6.) SNAC's noise blocks are left out.

A sample depends on tokens up to 9551 samples (199 ms, 2.33 coarse frames) after it. EXACT sends it once they are there,
so the first samples leave with the third frame. A smaller look-ahead sends each frame when only so many more are known,
as if the stream ended there: sooner, at the price of more work and of the SNR in benchmarks/results/streaming.json.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from codec.audio import Samples
from shards.contract import COARSE_48K, CODEBOOK_SIZE, LATENT_PER_COARSE, TOKENS
from shards.errors import UserError
from trainer.inference import StepDecoder, StepState

EXACT = 3  # coarse frames that cover the decoder's delay


class StreamingDecoder:
    """Some streams in lockstep: `push` tokens as they come, then `finish`. Any number may share one StepDecoder."""

    def __init__(
        self, model: StepDecoder, streams: int = 1, lookahead_frames: int = EXACT, step_coarse: int = 1
    ) -> None:
        if not 0 <= lookahead_frames <= EXACT:
            raise UserError(f"lookahead_frames={lookahead_frames}: expected 0 to {EXACT} ({EXACT} is exact)")
        if lookahead_frames < EXACT and step_coarse > 1:
            raise UserError(f"lookahead_frames={lookahead_frames} needs step_coarse=1, given {step_coarse}")
        self.model, self.streams, self.lookahead, self.step_coarse = model, streams, lookahead_frames, step_coarse
        self._state = StepState(model, streams, step_coarse)
        self._ahead = StepState(model, streams, 1) if lookahead_frames < EXACT else None
        self._held_BT7 = torch.zeros(streams, 0, TOKENS, dtype=torch.int64)
        self._finished = False
        self.sent = 0  # samples of each stream

    @torch.inference_mode()
    def push(self, tokens: npt.ArrayLike | Tensor) -> Samples:
        """Integers (T, 7) or (streams, T, 7), coarse to fine as in the shards → (streams, samples), perhaps none.

        Raises UserError for another shape or type, for tokens outside the codebook, and after `finish`.
        """
        if self._finished:
            raise UserError("this stream has been finished: make a new StreamingDecoder")
        self._held_BT7 = torch.cat([self._held_BT7, checked(tokens, self.streams)], dim=1)
        sent = []
        while self._held_BT7.shape[1] >= self.step_coarse:
            ready, self._held_BT7 = self._held_BT7.tensor_split([self.step_coarse], dim=1)
            sent += self._known(self._state, self._state.step(self.model.latent(ready)))
            if self._ahead is not None:
                self._ahead.take(self._state)
                sent += self._until((self._state.done_coarse - self.lookahead) * COARSE_48K, self._ahead)
        return self._joined(sent)

    @torch.inference_mode()
    def finish(self) -> Samples:
        """The rest: silence follows the last token, as when decoding the whole. Nothing, when called again."""
        if self._finished:
            return self._joined([])
        self._finished = True
        total = self._state.done_coarse + self._held_BT7.shape[1]
        sent = []
        if self._held_BT7.shape[1]:
            padded = torch.nn.functional.pad(self._held_BT7, (0, 0, 0, self.step_coarse - self._held_BT7.shape[1]))
            end_frames = total * LATENT_PER_COARSE
            wav_NB = self._state.step(self.model.latent(padded), end_frames)
            sent += self._known(self._state, wav_NB, total * COARSE_48K)
        sent += self._until(total * COARSE_48K, self._state, total * LATENT_PER_COARSE)
        return self._joined(sent)

    def _until(self, end: int, state: StepState, end_frames: int | None = None) -> list[Tensor]:
        """Samples up to `end` by running `state` as if the stream ended after what it has had, or at `end_frames`."""
        end_frames = state.done if end_frames is None else end_frames
        found = []
        while self.sent < end:
            found += self._known(state, state.step(state.silence(), end_frames), end)
        return found

    def _known(self, state: StepState, wav_NB: Tensor, end: int | None = None) -> list[Tensor]:
        """Of a step's samples those not sent yet, up to `end`."""
        reached = state.done * self.model.upsampling - self.model.delay
        first = reached - len(wav_NB)
        new = wav_NB[self.sent - first : None if end is None else end - first]
        self.sent += len(new)
        return [new.clone()] if len(new) else []

    def _joined(self, parts: list[Tensor]) -> Samples:
        if not parts:
            return np.zeros((self.streams, 0), np.float32)
        wav_NB = torch.cat(parts)
        if not wav_NB.isfinite().all():
            raise UserError("the decoder's output is not finite: its weights are damaged; take another checkpoint")
        wav_BN: Samples = wav_NB.T.contiguous().float().cpu().numpy()
        return wav_BN


def checked(tokens: npt.ArrayLike | Tensor, streams: int) -> Tensor:
    """int64 (streams, T, 7). Raises UserError with what was found and expected."""
    found = tokens.cpu() if isinstance(tokens, Tensor) else _integers(tokens)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise UserError(f"tokens are {str(found.dtype).removeprefix('torch.')}, expected integers")
    shaped = (found[None] if found.dim() == 2 else found).long()
    if shaped.dim() != 3 or shaped.shape[0] != streams or shaped.shape[2] != TOKENS:
        raise UserError(f"tokens have the shape {tuple(found.shape)}, expected ({streams}, T, {TOKENS})")
    if shaped.numel() and not 0 <= int(shaped.min()) <= int(shaped.max()) < CODEBOOK_SIZE:
        raise UserError(
            f"tokens run from {int(shaped.min())} to {int(shaped.max())}, expected 0 to {CODEBOOK_SIZE - 1}"
        )
    return shaped


def _integers(tokens: npt.ArrayLike) -> Tensor:
    array = np.asarray(tokens)
    if array.dtype.kind not in "iu":
        raise UserError(f"tokens are {array.dtype}, expected integers")
    return torch.from_numpy(array.astype(np.int64))


def to_int16(samples: Samples) -> npt.NDArray[np.int16]:
    """Full scale is ±1; beyond it samples are clipped, never wrapped."""
    return np.clip(np.round(samples * 32768), -32768, 32767).astype("<i2")
