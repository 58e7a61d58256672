"""TensorBoard, and Weights & Biases where it is wanted: scalars, and clips to hear and to see."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from snac import SNAC
from torch import Tensor

from codec.resample import sinc_resampler
from shards.contract import COARSE_48K, CONTEXT_COARSE, TARGET_RATE, coarse_tokens
from shards.errors import UserError
from shards.files import write_whole
from trainer.corpus import Corpus
from trainer.data import Batch, fixed_batches
from trainer.decoder import CodesToLatent, CropDecoder, padded
from trainer.losses import magnitudes
from trainer.settings import TrainSettings

PICTURE_N_FFT = 2048
RANGE_DB = 100.0  # of a picture's colours, below full scale


class Boards:
    """All boards of a run, and the validation clips that TensorBoard shows. For the first process only."""

    def __init__(self, settings: TrainSettings, corpus: Corpus, snac: SNAC, first_step: int) -> None:
        self._tensorboard = TensorBoard(settings.run, first_step)
        self._boards: list[TensorBoard | WeightsAndBiases] = [self._tensorboard]
        if settings.wandb is not None:
            self._boards.append(WeightsAndBiases(settings.wandb, settings.run, settings.model_dump(mode="json")))
        length = coarse_tokens(settings.segment_length)
        self._clips = list(fixed_batches(corpus.validation[0], settings.eval_clips, 1, length, settings.seed))
        self._references = list(references(snac, self._clips))
        self._references_shown = first_step > 0

    def metrics(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        for board in self._boards:
            board.metrics(kind, step, values)

    @torch.no_grad()
    def show(self, step: int, model: CropDecoder) -> None:
        """What `model` makes of each clip, its spectrogram between those of stock SNAC + sinc and of the target."""
        device = next(model.decoder.parameters()).device
        for batch, (stock_N, target_N) in zip(self._clips, self._references, strict=True):
            (key,), on_device = batch.keys, batch.to(device)
            decoded_N = model(on_device.tokens_BT7)[0, : len(target_N)].float().cpu()
            if not self._references_shown:
                self._tensorboard.audio(f"{key}/stock + sinc", 0, stock_N)
                self._tensorboard.audio(f"{key}/target", 0, target_N)
            self._tensorboard.audio(f"{key}/decoded", step, decoded_N)
            self._tensorboard.picture(f"{key}/stock + sinc, decoded, target", step, [stock_N, decoded_N, target_N])
        self._references_shown = True

    def close(self) -> None:
        for board in self._boards:
            board.close()


@torch.no_grad()
def references(snac: SNAC, clips: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    """What each clip is compared with: the stock decoder's audio, resampled, and the target; on the CPU."""
    stock, start = CropDecoder(CodesToLatent(snac), snac.decoder), CONTEXT_COARSE * COARSE_48K
    for batch in clips:
        with torch.random.fork_rng(devices=[]):  # of noise blocks
            wav_N = sinc_resampler(1, 2)(stock(padded(batch.tokens_BT7)))[0]  # with its context
        valid = int(batch.valid_B)
        yield wav_N[start : start + valid].float(), batch.target_BN[0, :valid]


class TensorBoard:
    """`run/tensorboard`; a resumed run takes back what was logged after its checkpoint."""

    def __init__(self, run: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)
        self._hook = threading.excepthook
        threading.excepthook = self._thread_ended

    def metrics(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def audio(self, tag: str, step: int, wav_N: Tensor) -> None:
        self._writer.add_audio(tag, wav_N.clamp(-1, 1)[None], step, TARGET_RATE)

    def picture(self, tag: str, step: int, wavs: list[Tensor]) -> None:
        """Their spectrograms, side by side."""
        self._writer.add_image(tag, np.concatenate(list(map(spectrogram, wavs)), axis=1), step, dataformats="HWC")

    def close(self) -> None:
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._hook

    def _thread_ended(self, ended: threading.ExceptHookArgs) -> None:
        """What cannot be written is said once: the writer raises what ended its thread when it is called next."""
        if not isinstance(ended.exc_value, OSError):
            self._hook(ended)


class WeightsAndBiases:
    """The same scalars for a project of wandb. The run there keeps its id in our folder, so that it is resumed."""

    def __init__(self, project: str, run: Path, settings: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(f"wandb={project} needs the package wandb: `just extras` installs it") from error
        known = run / "wandb_id.txt"
        if not known.exists():
            write_whole(known, uuid.uuid4().hex[:8])
        id = known.read_text()
        self._run = wandb.init(project=project, name=run.name, id=id, dir=run, config=settings, resume="allow")

    def metrics(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self._run.log({f"{kind}/{name}": value for name, value in values.items()} | {"step": step})

    def close(self) -> None:
        self._run.finish()


def spectrogram(wav_N: Tensor) -> npt.NDArray[np.uint8]:
    """(bins, frames, RGB), 24 kHz at the top, black at −100 dB and below."""
    decibels = 20 * magnitudes(wav_N[None], PICTURE_N_FFT)[0].clamp(min=1e-9).log10()
    shade = ((decibels + RANGE_DB) / RANGE_DB).clamp(0, 1).flip(0).numpy()
    colours: npt.NDArray[np.uint8] = matplotlib.colormaps["magma"](shade, bytes=True)[..., :3]
    return np.ascontiguousarray(colours)
