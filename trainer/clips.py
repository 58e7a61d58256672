"""Clips to judge: whole segments of a validation split, or whole recordings of a folder, with their codes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from snac import SNAC
from tqdm import tqdm

from codec.audio import DECODED, EXTENSIONS, AudioError, Recording, Samples, probe
from codec.resample import Resampler
from codec.snac import encode_whole
from shards.contract import COARSE_48K, PLAN_NAME, TARGET_RATE, sample_key
from shards.errors import UserError, printable
from shards.groups import group_finder
from shards.index import load
from shards.reader import decode_sample, read_sample
from shards.storage import Location
from shards.writer import read_table

SPLIT = "validation"
WINDOW_COARSE = 352  # tokens encoded at once: 30 s


@dataclass(frozen=True)
class Entry:
    """A clip before it is read."""

    key: str
    n_samples: int  # at 48 kHz
    problem: str | None = None


@dataclass(frozen=True)
class Clip:
    """Equal stretches at 48 kHz: `target` is what every system is compared with, `source` the recording behind it."""

    key: str
    group: str
    recording: str
    start_seconds: float
    codes_T7: npt.NDArray[np.int16]
    before: int  # coarse tokens of context before the clip
    target: Samples
    source: Samples | None  # None where the target is the recording, or where it cannot be had


class ShardClips:
    """The segments of the validation split, each with its real context; their recordings by the plan, if it is there.

    Raises UserError when the codes are not by the SNAC named `snac_name`.
    """

    def __init__(self, folder: Location, snac_name: str) -> None:
        folder = folder.resolve() if isinstance(folder, Path) else folder
        self.index = load(folder, SPLIT)
        if not len(self.index):
            raise UserError(f"{folder} has no usable segment in the split {SPLIT}")
        if self.index.fingerprint["snac"] != snac_name:
            raise UserError(f"{folder} holds codes by {self.index.fingerprint['snac']}, not by {snac_name}")
        self.teacher = str(self.index.fingerprint["teacher"])
        self.title = f"Validation segments of {folder.parent.name}"
        keys, lengths = (self.index.table[name].to_pylist() for name in ("key", "n_samples"))
        self.entries = [Entry(key, length) for key, length in zip(keys, lengths, strict=True)]
        self.plan: dict[str, dict[str, Any]] = {}
        if self.teacher != "recording":
            self.plan = self._find_plan(folder.parent / PLAN_NAME)

    def load(self, place: int) -> Clip:
        sample = decode_sample(read_sample(self.index, place))
        meta, entry = sample["meta"], self.entries[place]
        return Clip(
            key=entry.key,
            group=meta["group"],
            recording=meta["recording"],
            start_seconds=meta["start_seconds"],
            codes_T7=sample["codes"],
            before=meta["context_before"],
            target=sample["target"][: entry.n_samples],
            source=self._source(entry),
        )

    def _find_plan(self, plan: Location) -> dict[str, dict[str, Any]]:
        if not plan.exists():
            tqdm.write(f"no {PLAN_NAME} beside the shards: the recordings behind the targets are not judged")
            return {}
        planned = _plan_rows(plan)
        rows = {entry.key: planned[entry.key] for entry in self.entries if entry.key in planned}
        here = {key: row for key, row in rows.items() if row["offset"] is None and Path(row["path"]).is_file()}
        if len(here) < len(self.entries):
            missing = len(self.entries) - len(here)
            tqdm.write(f"{missing} of {len(self.entries)} recordings are gone, remote or inside tars: not judged")
        return here

    def _source(self, entry: Entry) -> Samples | None:
        row = self.plan.get(entry.key)
        if row is None:
            return None
        path, start = Path(row["path"]), row["start_coarse"] * COARSE_48K
        try:
            header = probe(path)
            if (header.frames, header.rate) != (row["file_frames"], row["rate"]):
                raise AudioError("not the file that was planned")
            recording = Recording(path, header, row["first_frame"], row["frames"])
            return Resampler(recording, TARGET_RATE).read(start, start + entry.n_samples)
        except AudioError as error:
            tqdm.write(printable(f"{entry.key}: its recording is not judged: {path}: {error}"))
            return None


def _plan_rows(plan: Location) -> dict[str, dict[str, Any]]:
    table: pa.Table = read_table(plan, filters=pc.field("split") == SPLIT)
    return {sample_key(row["shard"], row["row"]): row for row in table.to_pylist()}


class RecordingClips:
    """The recordings of a folder, whole, each its own target. Raises UserError for a folder that holds none.

    A recording's key is its path below the folder without the suffix. Its group is what `group_pattern` finds in that
    path, else the folder in which it lies: to take each file for a voice of its own would make intervals too narrow.
    """

    teacher = "recording"

    def __init__(self, folder: Path, snac: SNAC, max_seconds: float, group_pattern: str | None = None) -> None:
        if not folder.is_dir():
            raise UserError(f"audio={folder}: no such folder")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        self.paths = [path for path in files if path.suffix.lower() in EXTENSIONS and not path.name.endswith(DECODED)]
        if not self.paths:
            raise UserError(
                f"audio={folder} holds no recordings ({', '.join(sorted(EXTENSIONS))}; those of `just decode`, "
                f"*{DECODED}, are none)"
            )
        self.folder, self.snac, self.max_seconds = folder, snac, max_seconds
        group_of = group_finder(group_pattern)
        self.groups = [group_of(path.relative_to(folder).as_posix()) for path in self.paths]
        self.title = f"Recordings of {folder.resolve().name}"
        if len(files) > len(self.paths):
            tqdm.write(f"ignored: {len(files) - len(self.paths)} files that are no recordings")
        keys = [path.relative_to(folder).with_suffix("").as_posix() for path in self.paths]
        repeated = [key for key, n in Counter(keys).items() if n > 1]
        if repeated:
            raise UserError(f"audio={folder}: {repeated[0]} stands there with several suffixes: keep one of them")
        self.entries = [self._entry(path, key) for path, key in zip(self.paths, keys, strict=True)]

    def _entry(self, path: Path, key: str) -> Entry:
        try:
            length = Recording(path, probe(path)).length(TARGET_RATE)
        except AudioError as error:
            return Entry(key, 0, str(error))
        if length > self.max_seconds * TARGET_RATE:
            return Entry(key, length, f"lasts {length / TARGET_RATE:.1f} s, more than max_seconds={self.max_seconds:g}")
        return Entry(key, length)

    def load(self, place: int) -> Clip:
        """Raises AudioError for a recording that cannot be used."""
        path, entry = self.paths[place], self.entries[place]
        recording = Recording(path, probe(path))
        return Clip(
            key=entry.key,
            group=self.groups[place],
            recording=path.relative_to(self.folder).as_posix(),
            start_seconds=0.0,
            codes_T7=np.concatenate(list(encode_whole(self.snac, recording, WINDOW_COARSE))),
            before=0,
            target=Resampler(recording, TARGET_RATE).read(0, entry.n_samples),
            source=None,
        )


Clips = ShardClips | RecordingClips
