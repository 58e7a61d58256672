"""Orpheus's ids become frames and a stream of audio, in any portions; what is out of place is named."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from snac import SNAC

from demo.orpheus_server import speech
from shards.contract import COARSE_48K
from shards.errors import UserError
from tests.helpers import run_command, speechlike
from tests.test_streaming import codec, model, random_tokens, stock, streamed
from trainer import orpheus
from trainer.checkpoint import load_codec
from trainer.inference import StepDecoder
from trainer.streaming import StreamingDecoder, to_int16

__all__ = ["codec", "model"]


def test_orpheus_interleaves_a_frame_in_time() -> None:
    """c, m0, f0, f1, m1, f2, f3, each 4096 ids after the last."""
    frame = np.array([[10, 21, 22, 31, 32, 33, 34]])
    ids = orpheus.to_ids(frame)
    codes = [id_ - 128266 - 4096 * position for position, id_ in enumerate(ids)]
    assert codes == [10, 21, 31, 32, 22, 33, 34]
    assert orpheus.END_OF_SPEECH == 128258
    assert orpheus.OrpheusFrames().push(ids).tolist() == frame.tolist()


def test_orpheus_tokens_in_any_portions_give_the_whole_decode(model: StepDecoder) -> None:
    tokens, random = random_tokens(1, 6, 2), np.random.default_rng(3)
    ids, frames, stream = orpheus.to_ids(tokens[0]), orpheus.OrpheusFrames(), StreamingDecoder(model)
    parts = []
    while ids:
        size = int(random.integers(1, 12))
        parts.append(stream.push(frames.push(ids[:size])))
        ids = ids[size:]
    assert frames.held == []
    assert np.array_equal(np.concatenate([*parts, stream.finish()], axis=1), streamed(model, [tokens]))


@pytest.mark.parametrize("id_", [orpheus.END_OF_SPEECH, 128265, 128266, 128266 + 2 * 4096])
def test_an_orpheus_id_out_of_place_is_refused(id_: int) -> None:
    frames = orpheus.OrpheusFrames()
    frames.push([128266])
    with pytest.raises(UserError, match=f"id {id_} at position 1 of its frame, expected 132362 to 136457"):
        frames.push([id_])
    assert frames.held == [0]


def test_a_portion_with_an_id_out_of_place_is_not_taken_at_all() -> None:
    tokens = random_tokens(1, 3, 2)[0]
    first, *others = orpheus.to_ids(tokens)
    frames = orpheus.OrpheusFrames()
    frames.push([first])
    with pytest.raises(UserError, match=f"id {orpheus.END_OF_SPEECH} at position 0"):
        frames.push([*others, orpheus.END_OF_SPEECH, 128009])
    assert frames.push(others).tolist() == tokens.tolist()


def test_orpheuss_own_windows_lie_where_the_document_says(codec: tuple[SNAC, Any]) -> None:
    """Of the last four frames the second: samples 4096 to 8192, near the whole decode but not it."""
    tokens = random_tokens(1, 9, 6)
    whole = stock(codec, tokens)[0]
    windows = [stock(codec, tokens[:, n : n + 4])[0, COARSE_48K : 2 * COARSE_48K] for n in range(6)]
    expected, found = whole[COARSE_48K : 7 * COARSE_48K], np.concatenate(windows)
    snr_db = 10 * np.log10((expected**2).sum() / ((found - expected) ** 2).sum())
    assert 20 < snr_db < 80


def test_the_servers_loop_sends_the_whole_decode(untrained: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", speechlike(0.5, 24_000, 1), 24_000, "FLOAT")
    ran = run_command("demo.orpheus_server", str(untrained), str(tmp_path / "a.wav"), str(tmp_path / "served.wav"))
    assert ran.returncode == 0, ran.stderr
    assert "the language model is a fake" in ran.stdout
    assert "stand-in" in ran.stdout
    codec = load_codec(untrained)
    levels = codec.snac.encode(torch.from_numpy(speechlike(0.5, 24_000, 1))[None, None])
    with torch.inference_mode():
        expected = codec.decoder(codec.snac.quantizer.from_codes(levels))[0, 0].numpy()
    served = soundfile.read(tmp_path / "served.wav", dtype="int16")[0]
    assert len(served) == 6 * COARSE_48K
    assert np.abs(served.astype(int) - to_int16(expected)).max() <= 1


def test_the_servers_loop_says_what_is_wrong_in_one_line(untrained: Path, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_text("no audio")
    for out in ("served.wav", "nowhere/served.wav"):
        ran = run_command("demo.orpheus_server", str(untrained), str(tmp_path / "a.wav"), str(tmp_path / out))
        assert (ran.returncode, len(ran.stderr.splitlines())) == (1, 1), ran.stderr
    assert run_command("demo.orpheus_server").returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


def test_the_servers_loop_passes_over_what_the_model_says_before_it_speaks(codec: tuple[SNAC, Any]) -> None:
    """After a prompt that ends with the listener's turn, it starts its answer (128261) and speech (128257) itself."""
    spoken = orpheus.to_ids(random_tokens(1, 4, 6)[0])

    async def served(ids: list[int]) -> bytes:
        async def model() -> AsyncIterator[int]:
            for id_ in ids:
                yield id_

        return b"".join([pcm async for pcm in speech(StepDecoder(*codec), model())])

    expected = asyncio.run(served([*spoken, orpheus.END_OF_SPEECH]))
    assert asyncio.run(served([128261, 128257, *spoken, orpheus.END_OF_SPEECH])) == expected
    with pytest.raises(UserError, match="id 128262 at position 0"):
        asyncio.run(served([128262, *spoken]))


def test_the_servers_loop_says_what_a_cut_frame_loses(
    codec: tuple[SNAC, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The language model's limit of tokens ends it anywhere, without END_OF_SPEECH."""

    async def ids() -> AsyncIterator[int]:
        for id_ in orpheus.to_ids(random_tokens(1, 4, 6)[0])[:-3]:
            yield id_

    async def served() -> int:
        return sum([len(pcm) async for pcm in speech(StepDecoder(*codec), ids())])

    assert asyncio.run(served()) == 2 * 3 * COARSE_48K
    assert "the last 4 ids are no whole frame" in capsys.readouterr().err
