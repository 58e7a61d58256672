"""Stage 1 against the plain way: one recording after the other through the stock package, on the same files.

SNAC's true size (19.8 M) with random weights: speed does not depend on their values. Both ways read, resample and
encode; the tokens must be the same, token for token. The floor is the encoder alone, on one long window that is read
already.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import soundfile
import torch
from snac import SNAC

from benchmarks.harness import interleaved, of_speech, on_device, readable, recordings_in, report
from codec.encoder import prepared
from codec.memory import keep_freed_memory
from codec.resample import Resampler
from codec.snac import device_of
from configs.loader import load_settings
from pipeline.codes import encode_shard
from pipeline.plan import make_plan
from pipeline.recordings import Opener
from pipeline.settings import CodesSettings
from shards.contract import CODEC_RATE, OK, TARGET_RATE, flatten_codes

ROUNDS = 3
RATE = 44_100
SECONDS = (3, 6, 10, 14, 20)  # of the recordings, as corpora of read speech have them
FLOOR_SECONDS = 10


def true_size() -> SNAC:
    """snac_24khz's architecture with random weights."""
    torch.manual_seed(0)
    snac = SNAC(24_000, 48, [2, 4, 8, 8], None, 1024, [8, 8, 4, 2], None, 4096, 8, [4, 2, 1], True, True)
    return snac.eval().requires_grad_(False)


def plan_rows(speech: Path, folder: Path, times: int) -> tuple[list[dict[str, Any]], CodesSettings]:
    """The segments of recordings of SECONDS, each of them speech one after the other; each whole in these rows."""
    clips = _clips(speech)
    lines = ["path,speaker"]
    for number, seconds in enumerate(SECONDS * times):
        path = folder / f"{number}.flac"
        pieces: list[np.ndarray[Any, Any]] = []
        while sum(map(len, pieces)) < seconds * RATE:
            if (clip := next(clips, None)) is None:
                raise click.ClickException(
                    f"{speech} holds less than {times * sum(SECONDS)} s of speech that can be used"
                )
            pieces.append(clip)
        soundfile.write(path, np.concatenate(pieces)[: seconds * RATE], RATE)
        lines.append(f"{path},speaker {number % 2}")
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    given = [f"audio={folder / 'list.csv'}", f"work={folder / 'work'}", "min_seconds=0", "validation_fraction=0.5"]
    settings = load_settings(CodesSettings, "shard_codes.json", given)
    plan = make_plan(settings)
    return [row for number in range(len(plan.shards)) for row in plan.rows(number)], settings


def spread(files: list[Path]) -> list[Path]:
    """All of them, the first 200 from everywhere."""
    step = max(len(files) // 200, 1)
    return [file for first in range(step) for file in files[first::step]]


def _clips(speech: Path) -> Iterator[np.ndarray[Any, Any]]:
    """At RATE, of all of the collection."""
    for recording in readable(spread(recordings_in(speech))):
        yield Resampler(recording, RATE).read(0, recording.length(RATE))


@torch.inference_mode()
def one_by_one(rows: list[dict[str, Any]], model: SNAC, device: torch.device) -> dict[str, list[np.ndarray[Any, Any]]]:
    """Recording → the three levels of its tokens, flat."""
    tokens = {}
    for row in {row["recording"]: row for row in rows if row["status"] == OK}.values():
        recording = Opener(row).recording(row)
        audio = Resampler(recording, CODEC_RATE).read(0, recording.length(CODEC_RATE))
        levels = model.encode(torch.from_numpy(audio)[None, None].to(device))
        tokens[row["recording"]] = [level[0].cpu().numpy().astype(np.int16) for level in levels]
    return tokens


def check(rows: list[dict[str, Any]], expected: dict[str, list[Any]], found: list[dict[str, Any]]) -> tuple[int, int]:
    """How many tokens were compared with the stock package's, and how many are others: on a CPU none may be."""
    compared = differing = 0
    for row, codes in zip(rows, found, strict=True):
        if codes["status"] == OK:
            start = row["start_coarse"] - codes["context_before"]
            stop = row["start_coarse"] + row["n_coarse"] + codes["context_after"]
            whole = expected[row["recording"]]
            cut = [level[n * start : n * stop].reshape(-1, n) for n, level in zip((1, 2, 4), whole, strict=True)]
            flat = flatten_codes(np.concatenate(cut, axis=1))
            differing += int((flat != np.asarray(codes["codes"])).sum())
            compared += flat.size
    return compared, differing


@click.command(help=__doc__)
@of_speech
@on_device
def main(speech: Path, gpu: str) -> None:
    device = device_of(gpu)
    stock, ours = true_size().to(device), prepared(true_size().to(device))
    with tempfile.TemporaryDirectory() as folder:
        rows, settings = plan_rows(speech, Path(folder), 1 if device.type == "cpu" else 40)
        compared, differing = check(rows, one_by_one(rows, stock, device), encode_shard(rows, ours, settings))
        assert not differing or device.type == "cuda", f"{differing} of {compared} tokens differ"
        window = torch.randn(1, 1, FLOOR_SECONDS * CODEC_RATE, device=device) * 0.1

        def floor(model: SNAC) -> None:
            with torch.inference_mode():
                [level.cpu() for level in model.encode(window)]

        plain = {
            "one by one, stock": lambda: one_by_one(rows, stock, device),
            "stock encoder alone": lambda: floor(stock),
        }
        quick = {
            "stage 1": lambda: encode_shard(rows, ours, settings),
            "our encoder alone": lambda: floor(ours),
        }
        seconds = interleaved(plain, ROUNDS)
        keep_freed_memory()  # as stages do; there is no way back, so what is stock comes first
        seconds |= interleaved(quick, ROUNDS)
    audio = sum(row["n_samples"] for row in rows) / TARGET_RATE
    table = []
    for name, took in seconds.items():
        length = FLOOR_SECONDS if "alone" in name else audio
        stocks = seconds["stock encoder alone" if "alone" in name else "one by one, stock"]
        table.append({"way": name, "seconds": took, "times_real_time": length / took, "times_stock": stocks / took})
    tokens = {"tokens_compared": compared, "tokens_differing": differing}
    report("encoding", table, gpu, audio_seconds=audio, recordings_seconds=SECONDS, **tokens, rounds=ROUNDS)


if __name__ == "__main__":
    main()
