"""Stage 1: recordings → codes. Recordings are encoded whole (in exact windows), then cut on coarse tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from snac import SNAC
from tqdm import tqdm

from codec.audio import AudioError, Recording
from codec.encoder import prepared
from codec.resample import Resampler
from codec.snac import Window, bucketed, coarse_length, device_of, encode, load_snac, windows
from pipeline.ahead import Clock, chained_ahead, map_ahead, thread_count
from pipeline.execute import holding, run
from pipeline.plan import make_plan
from pipeline.recordings import Opener, by_file, content_crc32
from pipeline.settings import CodesSettings
from pipeline.stage import Advance, Stage, made_with
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
from shards.storage import Location
from shards.writer import write_table

Tokens = npt.NDArray[np.int16]
Read = tuple[str, Window, npt.NDArray[np.float32]]  # of the recording with this id
# Raise it when the same recordings and settings give other codes than before: read, resampled, encoded or cut anew.
CODES_VERSION = 1

PENDING_BATCHES = 4  # audio that waits for company of its own length, in batches
WINDOWS_AHEAD = 4  # of each recording that is read ahead


def codes_path(work: Location, split: str, shard: int) -> Location:
    return work / "codes" / split / f"{shard:06d}.parquet"


def shard_codes(settings: CodesSettings) -> list[str] | None:
    """Plans, then writes `codes/SPLIT/000000.parquet` for each shard of the plan; skips what is done. Returns the
    command that follows once all stand.
    """
    with holding(settings):
        stage = CodesStage(settings)
        make_plan(settings)
        complete = run(stage)
    return ["just", "shard-targets", f"work={settings.work}", f"gpu={settings.gpu}"] if complete else None


class CodesStage(Stage):
    """Recordings of a shard → its codes."""

    doing = "encoding"
    mendable = pc.field("n_coarse") > 0  # what could not be read when it was planned is for extend=true
    settings: CodesSettings

    def __init__(self, settings: CodesSettings) -> None:
        super().__init__(settings)
        if settings.execute != "ray":  # whose cluster has other devices than this machine
            self._device, *_ = [device_of(gpu) for gpu in settings.devices()]
        self._snac, weights = load_snac(settings.pretrained_model)
        self._provenance = {"snac": weights.describe(), "snac_sha256": weights.sha256}

    @cached_property
    def model(self) -> SNAC:
        """On its device, which a process that only hands out shards leaves alone."""
        return prepared(self._snac.to(self._device))

    @property
    def folder(self) -> Location:
        return self.settings.work / "codes"

    def fingerprint(self, number: int) -> dict[str, Any]:
        rows = self.plan.rows_sha256[number]
        return {"plan_rows": rows, "codes_version": CODES_VERSION, **self._provenance}

    def make(self, number: int, advance: Advance) -> None:
        planned, kept = self.plan.rows(number), self.kept(number)
        again = [row for place, row in enumerate(planned) if place not in kept]
        fresh = iter(encode_shard(again, self.model, self.settings, advance))
        rows = [kept.get(place) or next(fresh) for place in range(len(planned))]
        if kept and self.holds(number, dict(enumerate(rows))):
            return
        table = pa.Table.from_pylist(rows, schema=CODES_SCHEMA)
        about = {"fingerprint": self.fingerprint(number), "made_with": made_with()}
        write_table(self.split_folder(number) / self.table(number).name, table, about)


def encode_shard(
    rows: list[dict[str, Any]], model: SNAC, settings: CodesSettings, advance: Advance = lambda seconds: None
) -> list[dict[str, Any]]:
    """Plan rows of one shard → rows of CODES_SCHEMA, in the same order. A bad recording fails its own rows only.

    Threads read ahead. A GPU encodes batches of equal length; on a CPU each core encodes windows of its own, which is
    quicker than one window split among them.
    """
    problems: dict[str, str] = {}
    tokens: dict[str, list[tuple[Window, Tokens]]] = {}
    files = groupby((row for row in rows if row["status"] == OK), key=by_file)
    sources = (_windows_of(list(wanted), coarse_tokens(settings.window_seconds), problems) for _, wanted in files)
    on_cpu = next(model.parameters()).device.type == "cpu"
    encoders, batch = (torch.get_num_threads(), 1) if on_cpu else (1, int(settings.batch_seconds * CODEC_RATE))
    clock = Clock(encoders)

    def encoding(items: list[Read]) -> tuple[list[Read], list[Tokens]]:
        _, parts, audio = zip(*items, strict=True)
        with clock.busy(sum(map(len, audio)) / CODEC_RATE):
            return items, encode(model, list(parts), np.stack(audio))

    with closing(chained_ahead(sources, thread_count(settings.threads), WINDOWS_AHEAD)) as read:
        batches = (items for _, items in bucketed(read, batch, PENDING_BATCHES * batch))
        with closing(map_ahead(encoding, batches, encoders, 2 * encoders)) as done:
            for items, encoded in done:
                for (id, window, _), codes in zip(items, encoded, strict=True):
                    tokens.setdefault(id, []).append((window, codes))
                    advance(len(codes) * COARSE_24K / CODEC_RATE)
    audio, took, idle = clock.figures()
    tqdm.write(f"  {audio:.0f} s of audio encoded in {took:.1f} s, {audio / took:.0f} × real time; idle: {idle:.0%}")
    joined = {id: _join(parts) for id, parts in tokens.items() if id not in problems}
    return [_codes_row(row, joined, problems) for row in rows]


def _windows_of(
    wanted: list[dict[str, Any]], window_coarse: int, problems: dict[str, str]
) -> Iterator[tuple[int, Read]]:
    """The windows of the recordings of one file, with their lengths, and `content_crc32` in their rows; or an entry in
    `problems`.
    """
    opener = Opener(wanted[0])
    for id, group in groupby(wanted, key=itemgetter("recording")):
        rows = list(group)
        try:
            recording = opener.recording(rows[0])
            for row in rows:
                row["content_crc32"] = content_crc32(recording.path, row)
            for window, audio in read_windows(recording, rows, window_coarse):
                opener.check()
                yield len(audio), (id, window, audio)
        except AudioError as error:
            problems[id] = str(error)


def read_windows(
    recording: Recording, rows: list[dict[str, Any]], window_coarse: int
) -> Iterator[tuple[Window, npt.NDArray[np.float32]]]:
    """The windows of one recording that its segments `rows` and their context need, with their 24 kHz samples."""
    total = coarse_length(recording.length(CODEC_RATE))
    start = max(rows[0]["start_coarse"] - CONTEXT_COARSE, 0)
    stop = min(rows[-1]["start_coarse"] + rows[-1]["n_coarse"] + CONTEXT_COARSE, total)
    resampler = Resampler(recording, CODEC_RATE)
    for window in windows(total, window_coarse, start, stop):
        yield window, resampler.read(*window.samples)


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
    content = {"content_crc32": row["content_crc32"], "codes": flatten_codes(cut)}
    return {**result, "context_before": before, "context_after": after, **content}
