"""Stage 1: recordings → codes. Recordings are encoded whole (in exact windows), then cut on coarse tokens."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from snac import SNAC

from codec.audio import AudioError, Header, Recording, Resampler
from codec.snac import Window, bucketed, coarse_length, device_of, encode, load_snac, windows
from pipeline.execute import Advance, has_failures, run_shards, summarize
from pipeline.plan import make_plan, rows_sha256
from pipeline.settings import CodesSettings
from shards.contract import (
    COARSE_24K,
    CODEC_RATE,
    CODES_SCHEMA,
    CONTEXT_COARSE,
    FAILED,
    OK,
    coarse_tokens,
    flatten_codes,
    sample_key,
)
from shards.files import exclusive
from shards.writer import is_done, write_table

Tokens = npt.NDArray[np.int16]
PENDING_BATCHES = 4  # audio that waits for company of its own length, in batches


def codes_path(work: Path, split: str, shard: int) -> Path:
    return work / "codes" / split / f"{shard:06d}.parquet"


def shard_codes(settings: CodesSettings) -> None:
    """Plans, then writes `codes/SPLIT/000000.parquet` for each shard of the plan; skips what is done."""
    with exclusive(settings.work):
        device = device_of(settings.gpu)
        model, weights = load_snac(settings.pretrained_model)
        model.to(device)
        plan = make_plan(settings)
        provenance = {"snac": weights.describe(), "snac_sha256": weights.sha256}

        def fingerprint(rows: list[dict[str, Any]]) -> dict[str, Any]:
            return {"plan_rows": rows_sha256(rows), **provenance}

        def done(number: int) -> bool:
            path = codes_path(settings.work, *plan.shards[number])
            again = settings.retry == "failed" and path.exists() and has_failures(path)
            return is_done(path, fingerprint(plan.rows(number))) and not again

        def make(number: int, advance: Advance) -> None:
            rows = plan.rows(number)
            table = pa.Table.from_pylist(encode_shard(rows, model, settings, advance), schema=CODES_SCHEMA)
            path = codes_path(settings.work, *plan.shards[number])
            write_table(path, table, {"fingerprint": fingerprint(rows)})

        waiting = [number for number in range(len(plan.shards)) if not done(number)]
        settings.write(settings.work / "codes" / "settings.json")  # now that no other run's codes stand there
        run_shards("encoding", plan, waiting, make)
        paths = [codes_path(settings.work, *shard) for shard in plan.shards]
        summarize(paths, settings.max_failed_fraction, f"codes in {settings.work / 'codes'} by {provenance['snac']}")


def encode_shard(
    rows: list[dict[str, Any]], model: SNAC, settings: CodesSettings, advance: Advance = lambda seconds: None
) -> list[dict[str, Any]]:
    """Plan rows of one shard → rows of CODES_SCHEMA, in the same order. A bad recording fails its own rows only."""
    window_coarse = coarse_tokens(settings.window_seconds)
    problems: dict[str, str] = {}
    tokens: dict[str, list[tuple[Window, Tokens]]] = {}

    def windowed() -> Iterator[tuple[int, tuple[str, Window, npt.NDArray[np.float32]]]]:
        for id, group in groupby(rows, key=lambda row: row["recording"]):
            wanted = [row for row in group if row["status"] == OK]
            if not wanted:
                continue
            try:
                for window, audio in read_windows(wanted, window_coarse):
                    yield len(audio), (id, window, audio)
            except AudioError as error:
                problems[id] = str(error)

    batch = int(settings.batch_seconds * CODEC_RATE)
    for _, items in bucketed(windowed(), batch, PENDING_BATCHES * batch):
        ids, parts, audio = zip(*items, strict=True)
        for id, window, codes in zip(ids, parts, encode(model, list(parts), np.stack(audio)), strict=True):
            tokens.setdefault(id, []).append((window, codes))
            advance(len(codes) * COARSE_24K / CODEC_RATE)
    joined = {id: _join(parts) for id, parts in tokens.items() if id not in problems}
    return [_codes_row(row, joined, problems) for row in rows]


def read_windows(rows: list[dict[str, Any]], window_coarse: int) -> Iterator[tuple[Window, npt.NDArray[np.float32]]]:
    """The windows of one recording that its segments `rows` and their context need, with their 24 kHz samples."""
    recording = open_recording(rows[0])
    total = coarse_length(recording.length(CODEC_RATE))
    start = max(rows[0]["start_coarse"] - CONTEXT_COARSE, 0)
    stop = min(rows[-1]["start_coarse"] + rows[-1]["n_coarse"] + CONTEXT_COARSE, total)
    resampler = Resampler(recording, CODEC_RATE)
    for window in windows(total, window_coarse, start, stop):
        yield window, resampler.read(*window.samples)


def open_recording(row: dict[str, Any]) -> Recording:
    """The recording of a plan row. Raises AudioError when its file is no longer the one that was planned."""
    path = Path(row["path"])
    try:
        size = path.stat().st_size
    except OSError as error:
        raise AudioError(f"{error.strerror} since planning") from error
    if size != row["file_bytes"]:
        raise AudioError(f"the file has {size} bytes, {row['file_bytes']} when it was planned")
    header = Header(row["file_frames"], row["rate"], row["channels"])
    return Recording(path, header, row["first_frame"], row["frames"])


def _join(parts: list[tuple[Window, Tokens]]) -> tuple[int, int, Tokens]:
    """Windows in any order → (first coarse token, length of the recording, tokens)."""
    parts = sorted(parts, key=lambda part: part[0].start)
    return parts[0][0].start, parts[0][0].total, np.concatenate([codes for _, codes in parts])


def _codes_row(
    row: dict[str, Any], joined: dict[str, tuple[int, int, Tokens]], problems: dict[str, str]
) -> dict[str, Any]:
    result = {name: row[name] for name in ("recording", "segment", "status", "reason", "n_coarse")}
    result["key"] = sample_key(row["shard"], row["row"])
    if row["status"] != OK:
        return result
    if row["recording"] in problems:
        return {**result, "status": FAILED, "reason": problems[row["recording"]]}
    first, total, codes = joined[row["recording"]]
    start, stop = row["start_coarse"], row["start_coarse"] + row["n_coarse"]
    before, after = min(CONTEXT_COARSE, start), min(CONTEXT_COARSE, total - stop)
    cut = codes[start - before - first : stop + after - first]
    return {**result, "context_before": before, "context_after": after, "codes": flatten_codes(cut)}
