"""The picture of `just inspect`: how targets are distributed, and spectrograms of accepted and rejected segments.

Rejected targets are not in the shards; they are made again by the teacher of `settings.json`, where its model is here.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.ticker import LogLocator, NullFormatter

from codec.audio import AudioError, Samples
from codec.resample import Resampler
from codec.weights import PINS
from pipeline.plan import Plan
from pipeline.recordings import Opener
from pipeline.settings import TargetsSettings
from pipeline.teachers import Teacher
from shards.contract import COARSE_48K, INDEX_NAME, OK, PLAN_NAME, REJECTED, TARGET_RATE, Row, tar_path
from shards.errors import UserError, first_line
from shards.files import replacing
from shards.index import index_rows, read_sidecar
from shards.reader import decode_sample, sample_at
from shards.writer import read_table

Pair = tuple[Samples | str, Samples | str]  # source and target, or why there is none

MEASURES = {
    "lag_samples": "lag, samples at 48 kHz",
    "level_difference_db": "level difference, dB",
    "correlation": "envelope correlation",
    "source_bandwidth_hz": "bandwidth of recordings, Hz",
    "target_bandwidth_hz": "bandwidth of targets, Hz",
    "duration": "duration, s",
}
SHOWN = 5  # segments of each status
FLOOR_DB = -110


def draw(shards: Path, picture: Path) -> None:
    """Writes a PNG about the shards of a folder. Raises UserError where there are none, or for another name."""
    if picture.suffix.lower() != ".png":
        raise UserError(f"picture={picture}: what is drawn is a PNG; name it {picture.with_suffix('.png').name}")
    matplotlib.use("Agg")
    table = segments(shards)
    rows = {status: table.filter(pc.field("status") == status) for status in (OK, REJECTED)}
    if not rows[REJECTED]:
        del rows[REJECTED]
    figure = plt.figure(figsize=(15, 5 + 3.5 * len(rows)), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(5, 3.5 * len(rows)))[:, 0]
    _distributions(above, rows)
    _sheet(below, shards, {status: _spread(found) for status, found in rows.items()})
    with replacing(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=90)
    plt.close(figure)


def segments(shards: Path) -> pa.Table:
    """INDEX_SCHEMA; of all that are done where there is no index, as where too many were rejected."""
    if (shards / INDEX_NAME).exists():
        return read_table(shards / INDEX_NAME)
    done = [(path.parent.name, int(path.stem)) for path in sorted(shards.glob("*/[0-9]*.parquet"))]
    if not done:
        raise UserError(f"picture= shows finished shards, and {shards} holds none")
    return pa.concat_tables([index_rows(read_sidecar(shards, *place), *place) for place in done])


def _distributions(figure: SubFigure, rows: dict[str, pa.Table]) -> None:
    for axis, (name, label) in zip(figure.subplots(2, 3).flat, MEASURES.items(), strict=True):
        found = {status: _measured(table, name) for status, table in rows.items()}
        axis.set_xlabel(label)
        if not any(map(len, found.values())):
            axis.text(0.5, 0.5, "not measured: the targets are the recordings", ha="center", va="center")
            axis.set(xticks=[], yticks=[])
            continue
        axis.hist(list(found.values()), bins=40, stacked=True, label=[f"{s}: {len(v)}" for s, v in found.items()])
        axis.set_yscale("log")
        axis.set_ylim(bottom=0.5)  # so that one segment has a bar, too
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.legend(fontsize=8)
    figure.suptitle(f"{sum(map(len, rows.values()))} segments")


def _measured(table: pa.Table, name: str) -> npt.NDArray[Any]:
    column: npt.NDArray[Any] = table["n_samples" if name == "duration" else name].drop_null().to_numpy()
    return column / TARGET_RATE if name == "duration" else column


def _spread(table: pa.Table) -> list[Row]:
    """Up to SHOWN rows, from all over the table; its teachers and reasons take turns."""
    places = table.select(["teacher", "reason"]).append_column("place", pa.array(np.arange(len(table))))
    kinds = places.group_by(["teacher", "reason"], use_threads=False).aggregate([("place", "min"), ("place", "list")])
    found = [kind.values.to_numpy() for kind in kinds.sort_by("place_min")["place_list"][:SHOWN]]
    evenly = [own[:: max(len(own) // SHOWN, 1)] for own in found]
    turns = [place for turn in zip_longest(*evenly) for place in turn if place is not None]
    rows: list[Row] = table.take(pa.array(turns[:SHOWN], pa.int64())).to_pylist()
    return rows


def _sheet(figure: SubFigure, shards: Path, chosen: dict[str, list[Row]]) -> None:
    axes = figure.subplots(2 * len(chosen), SHOWN, squeeze=False)
    for above, below, (status, rows) in zip(axes[::2], axes[1::2], chosen.items(), strict=True):
        for axis in (*above[len(rows) :], *below[len(rows) :]):
            axis.axis("off")
        for source_axis, target_axis, row, pair in zip(above, below, rows, _pairs(shards, rows), strict=False):
            begins = f", from {row['start_seconds']:.1f} s" if row["start_seconds"] else ""
            _panel(source_axis, pair[0], f"{status}: {row['recording']}{begins}; target: {row['teacher']}")
            _panel(target_axis, pair[1], row["reason"] or "")
            target_axis.set_xlabel("s", fontsize=7)
        above[0].set_ylabel("recording, kHz")
        below[0].set_ylabel("target, kHz")


def _panel(axis: Axes, samples: Samples | str, title: str) -> None:
    axis.set_title(textwrap.fill(title, 48), fontsize=7)
    axis.tick_params(labelsize=7)
    if isinstance(samples, str):
        axis.text(0.5, 0.5, samples, ha="center", va="center", fontsize=7, wrap=True)
        axis.set_axis_off()
    else:
        spectrogram(axis, samples, TARGET_RATE)


def spectrogram(axis: Axes, wav: Samples, rate: int) -> matplotlib.image.AxesImage:
    """Magnitudes in dB re full scale, against seconds and kHz."""
    window = torch.hann_window(rate // 25)
    spectrum = torch.stft(torch.from_numpy(wav), len(window), len(window) // 4, window=window, return_complex=True)
    level_db = 20 * torch.log10(spectrum.abs() / window.sum() * 2 + 1e-9)
    return axis.imshow(
        level_db.numpy(),
        origin="lower",
        aspect="auto",
        extent=(0, len(wav) / rate, 0, rate / 2000),
        vmin=FLOOR_DB,
        vmax=-20,
        cmap="magma",
    )


def _pairs(shards: Path, rows: Sequence[Row]) -> Iterator[Pair]:
    """Source and target of each row, which all have one status."""
    planned = [_planned(shards.parent / PLAN_NAME, row) for row in rows]
    if rows and rows[0]["status"] == REJECTED:
        yield from _made_again(shards, planned)
        return
    for row, plan in zip(rows, planned, strict=True):
        yield _source(plan), _stored(shards, row)


def _planned(path: Path, row: Row) -> Row | None:
    """A row's place in the plan; None where the plan is gone."""
    if not path.exists():
        return None
    plan = Plan(path)
    number = plan.shards.index((row["split"], row["shard"]))
    return plan.rows(number)[int(row["key"].split("-")[1])]


def _source(plan: Row | None) -> Samples | str:
    if plan is None:
        return "the plan is gone"
    start = plan["start_coarse"] * COARSE_48K
    try:
        return Resampler(Opener(plan).recording(plan), TARGET_RATE).read(start, start + plan["n_samples"])
    except AudioError as error:
        return str(error)


def _stored(shards: Path, row: Row) -> Samples:
    path = tar_path(shards, row["split"], row["shard"])
    with path.open("rb") as tar:
        target: Samples = decode_sample(sample_at(tar, row, path))["target"][: row["n_samples"]]
    return target


def _made_again(shards: Path, planned: list[Row | None]) -> Iterator[Pair]:
    known = [[plan] for plan in planned if plan is not None]
    try:
        written = json.loads((shards / "settings.json").read_bytes())
        settings = TargetsSettings.model_validate({**written, "weights": PINS})  # theirs may list code of theirs
        taught = iter(Teacher(settings).segments(known))
    except (UserError, OSError, ValueError) as error:
        reason = f"its teacher cannot be had: {first_line(error)}"
        yield from ((_source(plan), reason) for plan in planned)
        return
    for plan in planned:
        found = next(taught) if plan is not None else AudioError("the plan is gone")
        source = _source(plan)
        yield source, str(found) if isinstance(found, AudioError) else found.target
