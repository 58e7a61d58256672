"""What runs on a GPU leaves no tensor on the CPU, and waits for the GPU no more often than here is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from snac import SNAC

from benchmarks.training_step import random_batch
from codec.encoder import prepared
from codec.snac import Window, encode, load_snac
from configs.loader import FOLDER, load_settings
from pipeline.sidon import FRAME, PADDING, UPSAMPLING, Native, Sidon
from shards.contract import COARSE_24K, COARSE_48K
from tests import sidon_native_standin as upstream
from tests.fake_gpu import GPU, fake_gpu
from tests.helpers import TINY_SNAC
from trainer import validation
from trainer.clips import Clip
from trainer.decoder import CodesToLatent, CropDecoder, warm_start
from trainer.distributed import Process
from trainer.inference import StepDecoder
from trainer.learner import Learner
from trainer.settings import TrainSettings
from trainer.streaming import StreamingDecoder
from trainer.systems import decode_clip

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")

CROPS, COARSE = 4, 3
NO_COMPILER = ("compile=false", "init_from=null", "discriminator_start=0")
SMALL = ("mpd_periods=[2]", "mpd_channels=2", "mrd_n_ffts=[512]", "mrd_channels=2")
RECIPES = {
    "base": NO_COMPILER,
    "every term, balanced": (
        *NO_COMPILER, "mel_weight=1", "log_stft_weight=1", "balance_losses=true", "noise=keep",
    ),
    "adversarial": (f"config={FOLDER / 'decoder_48khz_adversarial.json'}", *NO_COMPILER, *SMALL),
}  # fmt: skip


@pytest.fixture
def own_snac() -> SNAC:
    """One that may be moved to a GPU which is gone afterwards."""
    return load_snac(TINY_SNAC)[0]


class AtOnce:
    """In place of threads, where fake tensors get into each other's way."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> AtOnce:
        return self

    def __exit__(self, *_: object) -> None: ...

    map = staticmethod(map)


@pytest.mark.parametrize(("recipe", "optimizers"), [("base", 1), ("every term, balanced", 1), ("adversarial", 2)])
def test_a_step_waits_for_its_figures_alone(recipe: str, optimizers: int, own_snac: SNAC) -> None:
    settings = load_settings(TrainSettings, "decoder_48khz.json", RECIPES[recipe])
    to_latent, decoder = CodesToLatent(own_snac), warm_start(own_snac, "zero", 0)
    with fake_gpu() as waits:
        learner = Learner(to_latent, decoder, settings, Process(0, 1, GPU), print)
        for phase in (1, 2):
            learner.enter_phase(phase)
            learner.step(random_batch(CROPS, COARSE), 0, CROPS, 1.0)  # the first also makes mel filters
            waits.clear()
            means = learner.step(random_batch(CROPS, COARSE), phase, CROPS, 1.0)
            assert waits.functions == {"_optimize": 2 * optimizers}, "losses' means, and the gradient's norm"
        assert means
        learner.load_state_dict(learner.state_dict())
        for state in learner.optimizer.state.values():
            assert all(value.device == GPU for value in state.values())
        assert all(parameter.device == GPU for parameter in learner.ema.model.parameters())


def test_validation_takes_from_the_gpu_what_it_judges(own_snac: SNAC, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(validation, "score", lambda *_: dict.fromkeys(validation.DISTANCES.values(), 0.0))
    settings = load_settings(TrainSettings, "decoder_48khz.json", RECIPES["every term, balanced"])
    model = CropDecoder(CodesToLatent(own_snac), warm_start(own_snac, "zero", 0))
    with fake_gpu() as waits:
        model.to(GPU)
        waits.clear()
        sums = validation.validation_sums(model, [random_batch(CROPS, COARSE).to(GPU)], settings)
        assert sums.device.type == "cpu"
        assert "forward" not in waits.functions


def test_decoding_in_windows_and_step_by_step(own_snac: SNAC) -> None:
    decoder, codes_T7 = warm_start(own_snac, "zero", 0), np.zeros((9, 7), np.int16)
    model = CropDecoder(CodesToLatent(own_snac), decoder)
    clip = Clip("", "", "", 0, codes_T7, 1, np.zeros(8 * COARSE_48K, np.float32), None)
    with fake_gpu() as waits:
        model.to(GPU)
        own_snac.to(GPU)
        waits.clear()
        assert decode_clip(model, "", 0, clip).shape == clip.target.shape
        assert "forward" not in waits.functions
        with torch.inference_mode():
            stream = StreamingDecoder(StepDecoder(own_snac, decoder), step_coarse=4)
        assert sum(part.shape[1] for part in (stream.push(codes_T7), stream.finish())) == 9 * COARSE_48K


def test_encoding(own_snac: SNAC) -> None:
    with fake_gpu() as waits:
        model = prepared(own_snac.to(GPU))
        waits.clear()
        windows = [Window(0, COARSE, COARSE)] * 2
        codes = encode(model, windows, np.zeros((2, COARSE * COARSE_24K), np.float32))
        assert [part.shape for part in codes] == [(COARSE, 7)] * 2
        assert sum(waits.functions.values()) == 4, "the audio there, three levels of tokens back"


@pytest.fixture
def native(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Native:
    """As a GPU gets it: the decoder not made quick for a CPU."""
    upstream.build(tmp_path)
    monkeypatch.setattr("pipeline.sidon.quicken", lambda _: None)
    pins = tmp_path / "base" / "weights.json"
    return Native(str(tmp_path / "raw"), str(tmp_path / "base"), pins, torch.device("cpu"), "fp32")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sidon_launches_as_much_for_many_recordings_as_for_few(precision: str, native: Native) -> None:
    counts = []
    with fake_gpu() as waits:
        native.encoder.to(GPU)
        native.decoder.to(GPU)
        native.precision, native._device_type = precision, "cuda"
        for repeated in (1, 1, 20):  # the first also makes mel filters
            frames = [30, 27, 25] * repeated
            waits.clear()
            restored = Sidon(native, GPU).restore([np.zeros(n * FRAME + 2 * PADDING, np.float32) for n in frames])
            assert [len(wav) for wav in restored] == [n * FRAME * UPSAMPLING for n in frames]
            counts.append(waits.operations.total() - waits.operations["lift_fresh"])  # of windows, which NumPy holds
    assert counts[1] == counts[2]
