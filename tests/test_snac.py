"""Windows give the tokens of the whole; batches hold equal lengths; only the right SNAC is taken."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import torch
from snac import SNAC

from codec.audio import Recording, probe
from codec.resample import Resampler
from codec.snac import OVERLAP_COARSE, bucketed, coarse_length, device_of, encode, load_snac, snac_levels, windows
from shards.contract import (
    COARSE_24K,
    CODEC_RATE,
    LATENT_PER_COARSE,
)
from shards.errors import UserError
from tests.helpers import TINY_SNAC, speechlike

Tokens = npt.NDArray[np.int16]
WINDOW = 12


@torch.inference_mode()
def tokens_of(model: SNAC, path: Path) -> Tokens:
    """(T, 7): what stock SNAC says of the whole recording."""
    reader = Resampler(Recording(path, probe(path)), CODEC_RATE)
    audio = reader.read(0, reader.recording.length(CODEC_RATE))
    levels = model.encode(torch.from_numpy(audio)[None, None])
    return np.concatenate([level.reshape(-1, n).numpy() for level, n in zip(levels, (1, 2, 4), strict=True)], axis=1)


def write_all(folder: Path, frames: Sequence[int], rate: int, same: int = 1) -> None:
    """`same` recordings of each length, every second one with two channels."""
    for number, n in enumerate(length for length in frames for _ in range(same)):
        (folder / f"voice_{number}").mkdir(parents=True)
        audio = speechlike(n / rate, rate, number)
        stereo = np.stack([audio, 0.3 * audio], axis=1)
        soundfile.write(folder / f"voice_{number}" / "a.wav", stereo if number % 2 else audio, rate, "FLOAT")


@torch.inference_mode()
@pytest.mark.parametrize(("overlap", "suffices"), [(OVERLAP_COARSE, True), (OVERLAP_COARSE - 1, False)])
def test_the_overlap_is_the_shortest_that_covers_what_the_encoder_hears(
    overlap: int, suffices: bool, snac: SNAC
) -> None:
    audio = torch.full((1, 1, 12 * COARSE_24K), torch.nan)  # NaN spreads to whatever depends on it
    audio[..., (5 - overlap) * COARSE_24K : (7 + overlap) * COARSE_24K] = 0.1
    latent = snac.encoder(audio)[..., 5 * LATENT_PER_COARSE : 7 * LATENT_PER_COARSE]
    assert bool(latent.isfinite().all()) == suffices


@torch.inference_mode()
def test_a_snac_of_the_published_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SNAC(24_000, 48, [2, 4, 8, 8], None, 1024, [8, 8, 4, 2], None, 4096, 8, [4, 2, 1], True, True).eval()
    write_all(tmp_path, [5 * COARSE_24K - 777, 9 * COARSE_24K + 1], CODEC_RATE)
    for voice in range(2):
        path = tmp_path / f"voice_{voice}" / "a.wav"
        reader = Resampler(Recording(path, probe(path)), CODEC_RATE)
        total = coarse_length(reader.recording.length(CODEC_RATE))
        parts = [encode(model, [w], reader.read(*w.samples)[None])[0] for w in windows(total, 3)]
        expected = tokens_of(model, path)
        assert np.array_equal(np.concatenate(parts), expected)
        assert len(np.unique(expected)) > 10


@pytest.mark.parametrize(
    ("total", "start", "stop"), [(1, 0, None), (12, 0, 12), (13, 0, None), (40, 11, 13), (40, 12, 37), (36, 0, None)]
)
def test_windows_cover_what_is_asked_on_one_grid(total: int, start: int, stop: int | None) -> None:
    found = list(windows(total, WINDOW, start, stop))
    covered = [token for w in found for token in range(w.start, w.stop)]
    assert covered == list(range(covered[0], covered[-1] + 1))
    assert set(range(start, stop or total)) <= set(covered) <= set(range(total))
    for w in found:
        assert w.start % WINDOW == 0
        assert w.samples == (max(w.start - 3, 0) * COARSE_24K, min(w.stop + 3, total) * COARSE_24K)


@pytest.mark.parametrize(("batch", "pending"), [(1, 1), (100, 400), (100, 100), (1000, 10**6)])
def test_buckets_hold_equal_lengths_and_lose_nothing(batch: int, pending: int) -> None:
    random = np.random.default_rng(batch + pending)
    lengths = [int(length) for length in random.choice([7, 20, 33, 90, 150], 500)]
    given: list[int] = []

    def items() -> Iterator[tuple[int, int]]:
        for number, length in enumerate(lengths):
            given.append(number)
            yield length, number

    taken: list[int] = []
    for length, batched in bucketed(items(), batch, pending):
        taken += batched
        assert batched == sorted(batched)
        assert {lengths[number] for number in batched} == {length}
        assert len(batched) == 1 or length * len(batched) <= batch
        waiting = sum(lengths[number] for number in set(given) - set(taken))
        assert waiting <= pending
    assert sorted(taken) == list(range(500))
    again = [batched for _, batched in bucketed(((n, i) for i, n in enumerate(lengths)), batch, pending)]
    assert [number for batched in again for number in batched] == taken


def test_snac_levels_have_the_shapes_that_snac_decodes(snac: SNAC, recordings: Path) -> None:
    codes = tokens_of(snac, recordings / "speaker_2" / "take_0.wav").astype(np.int16)
    levels = snac_levels(codes)
    assert [tuple(level.shape) for level in levels] == [(1, len(codes)), (1, 2 * len(codes)), (1, 4 * len(codes))]
    rejoined = np.concatenate(
        [level.reshape(-1, n).numpy() for level, n in zip(levels, (1, 2, 4), strict=True)], axis=1
    )
    assert np.array_equal(rejoined, codes)
    assert snac.decode(levels).shape == (1, 1, len(codes) * COARSE_24K)


@pytest.mark.parametrize(
    "change",
    [
        {"sampling_rate": 44_100},
        {"vq_strides": [8, 4, 2, 1]},
        {"encoder_rates": [2, 4, 4, 8]},
        {"codebook_size": 1024},
        {"attn_window_size": 32},
    ],
)
def test_another_snac_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    config = {**json.loads((Path(TINY_SNAC) / "config.json").read_text()), **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(SNAC(**config).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="is not a SNAC 24 kHz: expected"):
        load_snac(str(tmp_path))


def test_snac_is_frozen(snac: SNAC) -> None:
    assert not snac.training
    assert not any(parameter.requires_grad for parameter in snac.parameters())


def test_nothing_falls_back_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_of("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of("1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="gpu=2: this machine has 2 GPUs, numbered from 0"):
        device_of(2)


def test_it_says_why_no_gpu_is_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12040). Please update it. Or")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(UserError) as raised:
        device_of(0)
    assert str(raised.value) == (
        "gpu=0: no GPU is usable here (The NVIDIA driver on your system is too old (found version 12040); this PyTorch "
        f"is built for CUDA {torch.version.cuda}); gpu=cpu runs on the CPU"
    )
