"""Which crops make up which step: mixed folders, and batches that follow the length of crops."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from configs.loader import FOLDER, load_settings
from shards.contract import COARSE_48K
from shards.errors import SettingsError
from shards.order import Order, rank_slice
from shards.stream import Place, Stage, Stream
from trainer.discriminators import SpectrogramDiscriminator
from trainer.schedule import rate_factor, stages
from trainer.settings import TrainSettings

ORDERS = (Order((5, 3, 4), 7, 2), Order((6,), 7, 2), Order((2, 2), 7, 2))
STAGES = (Stage(0, 1, 8), Stage(3, 2, 4), Stage(10, 4, 2))
STREAMS = [
    Stream(ORDERS[:1], (1,), (Stage(0, 3, 5),), 7),
    Stream(ORDERS[:2], (2, 1), STAGES, 7),
    Stream(ORDERS, (1, 3, 2), STAGES, 7),
]


def settings(*changes: str) -> TrainSettings:
    return load_settings(TrainSettings, "decoder_48khz.json", changes)


@pytest.mark.parametrize("stream", STREAMS)
def test_steps_follow_each_other_without_gap(stream: Stream) -> None:
    places = [place for step in range(20) for place in stream.batch(step)]
    assert [place.position for place in places] == list(range(len(places)))
    for step in range(20):
        assert len(stream.batch(step)) == stream.stage(step).batch
        assert stream.first_position(step) == sum(stream.stage(before).batch for before in range(step))


@pytest.mark.parametrize("stream", STREAMS)
def test_each_folder_is_read_in_its_own_order(stream: Stream) -> None:
    cycle = sum(stream.weights)
    places = [stream.place(position) for position in range(cycle * 12)]
    for folder, order in enumerate(stream.orders):
        own = [place.sample for place in places if place.folder == folder]
        assert own == [order.sample_at(position) for position in range(len(own))]
    for start in range(0, len(places), cycle):
        turns = Counter(place.folder for place in places[start : start + cycle])
        assert tuple(turns[folder] for folder in range(len(stream.orders))) == stream.weights


def test_one_folder_is_its_order() -> None:
    assert [STREAMS[0].place(p) for p in range(40)] == [Place(p, 0, ORDERS[0].sample_at(p)) for p in range(40)]


def test_folders_are_mixed_differently_in_every_cycle() -> None:
    stream = Stream(ORDERS, (2, 2, 2), (Stage(0, 1, 1),), 7)
    cycles = [tuple(stream.place(6 * cycle + turn).folder for turn in range(6)) for cycle in range(8)]
    assert len(set(cycles)) > 4


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_share_a_batch_that_changes_size(ranks: int) -> None:
    for step in range(15):
        batch = STREAMS[1].batch(step)
        shares = [rank_slice(len(batch), rank, ranks) for rank in range(ranks)]
        assert [batch[place] for share in shares for place in share] == batch


@pytest.mark.parametrize("epochs", [0.1, 0.5, 1, 2, 3.7, 15])
@pytest.mark.parametrize("stream", STREAMS)
def test_steps_are_the_least_that_hold_the_epochs(stream: Stream, epochs: float) -> None:
    crops = sum(order.samples_per_epoch for order in stream.orders) * epochs
    steps = stream.steps(epochs)
    assert stream.first_position(steps) >= crops - 1e-9
    assert stream.first_position(steps - 1) < crops


def test_the_batch_follows_so_that_a_step_holds_the_same_audio() -> None:
    planned = stages(settings("segment_schedule=[[0, 0.5], [100, 1.0], [400, 4.0]]"))
    assert [stage.first_step for stage in planned] == [0, 100, 400]
    assert [stage.length for stage in planned] == [6, 12, 47]
    assert [stage.batch for stage in planned] == [251, 125, 32]
    audio = 32 * 47
    assert all(abs(stage.length * stage.batch - audio) <= stage.length / 2 for stage in planned)
    assert stages(settings()) == (Stage(0, 47, 32),)
    one = settings("batch_size=1", "segment_length=1.0", "segment_schedule=[[0, 1.0], [9, 4.0]]")
    assert [stage.batch for stage in stages(one)] == [1, 1], "never none"


@pytest.mark.parametrize("schedule", ["[[1, 4.0]]", "[[0, 1.0], [0, 2.0]]", "[[0, 1.0], [9, 2.0], [5, 4.0]]"])
def test_a_schedule_begins_at_0_and_rises(schedule: str) -> None:
    with pytest.raises(SettingsError, match="steps should begin with 0 and rise"):
        settings(f"segment_schedule={schedule}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("l1_weight=0", "stft_weight=0"), "one of l1_weight, stft_weight, log_stft_weight and mel_weight"),
        (("adversarial_weight=1", "mpd_periods=[]", "mrd_n_ffts=[]"), "need mpd_periods or mrd_n_ffts"),
        (("adversarial_weight=1", "segment_length=0.085", "mrd_n_ffts=[512,8192]"), "shorter than 2 × 4096 samples"),
    ],
)
def test_settings_must_go_together(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as error:
        settings(*words)
    assert "Known keys" not in str(error.value), "no key is wrong by itself"


def test_a_discriminator_s_window_may_be_nearly_twice_the_crop() -> None:
    wav_BN = torch.randn(1, COARSE_48K, generator=torch.Generator().manual_seed(0))
    assert SpectrogramDiscriminator(2 * COARSE_48K - 2, 1)(wav_BN)
    with pytest.raises(RuntimeError, match="Padding size"):
        SpectrogramDiscriminator(2 * COARSE_48K, 1)(wav_BN)


def test_the_rate_is_a_cosine_after_a_warm_up() -> None:
    chosen = settings("warmup_steps=9", "final_rate=0.1")
    rates = [rate_factor(step, 0, 1000, chosen) for step in range(1000)]
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 1000)) / 2 for step in range(1000)]
    assert rates[:10] == pytest.approx([cosine[step] * (step + 1) / 10 for step in range(10)])
    assert rates[9:] == pytest.approx(cosine[9:])
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    assert rate_factor(1000, 0, 1000, chosen) == pytest.approx(0.1)
    assert rate_factor(500, 500, 1000, chosen) == pytest.approx(cosine[500] / 10), "a phase begins with a warm-up"
    assert rate_factor(499, 500, 1000, chosen) == 0
    assert rate_factor(700, 0, 1000, settings("final_rate=1")) == 1.0


def test_the_second_recipe_says_what_differs_from_the_first() -> None:
    base = load_settings(TrainSettings, "decoder_48khz.json", ())
    file = FOLDER / "decoder_48khz_adversarial.json"
    best = load_settings(TrainSettings, "decoder_48khz.json", [f"config={file}"])
    assert all(json.loads(file.read_text())[name] != getattr(base, name) for name in json.loads(file.read_text()))
    assert base.weights == {"l1": 1, "stft": 1, "log_stft": 0, "mel": 0, "adversarial": 0, "features": 0}
    assert best.weights["adversarial"] > 0
    assert best.init_from == Path(base.run)
