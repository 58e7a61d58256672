"""Every reader of what others wrote: bytes in, a value or an error of ours out. What `fuzz` feeds."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from codec.audio import EXTENSIONS, AudioError, Recording, probe
from codec.snac import load_snac
from configs.loader import FOLDER, load_settings
from pipeline.codes import shard_codes
from pipeline.inspect import inspect
from pipeline.pack import pack_parquet
from pipeline.plan import Plan
from pipeline.settings import CodesSettings, InspectSettings, PackParquetSettings
from pipeline.sources import find
from pipeline.targets import shard_targets
from pipeline.tars import members
from shards.contract import CODES_SUFFIX, INDEX_NAME, META_SUFFIX, PLAN_NAME, SUMS_NAME, check_meta, load_codes
from shards.errors import UserError
from shards.files import file_sha256
from shards.index import load, read_sums, write_sums
from shards.reader import decode_sample, split_members
from tests.helpers import TINY_SNAC, codes_settings, speechlike, targets_settings
from trainer import checkpoint
from trainer.decoder import warm_start
from trainer.settings import TrainSettings

OURS = (UserError, AudioError)
KEY = "000000-00000"
NESTED = b"[" * 100_000  # deeper than any parser of JSON goes


@dataclass(frozen=True)
class Reader:
    """`read` is given a file `name`, whatever its bytes, alone in its folder."""

    name: str
    seeds: Callable[[Path], list[bytes]]  # of a finished folder: files that are whole
    read: Callable[[Path], object]
    hostile: tuple[bytes, ...] = ()  # what mutation would hardly find


def finished(folder: Path) -> None:
    """Recordings in several formats, and all that is made of them: the files that seeds are taken from."""
    for number, suffix in enumerate(("wav", "flac", "ogg", "wav")):
        speaker = folder / "audio" / f"speaker_{number % 2}"
        speaker.mkdir(parents=True, exist_ok=True)
        soundfile.write(speaker / f"{number}.{suffix}", speechlike(0.5, 16_000, number), 16_000)
    with tarfile.open(folder / "recordings.tar", "w") as tar:
        tar.add(folder / "audio", "audio")
    shard_codes(codes_settings(folder / "audio", folder, "validation_fraction=0.5"))
    shard_targets(targets_settings(folder))
    snac, weights = load_snac(TINY_SNAC)
    state = {"decoder": warm_start(snac, "zero", 0).state_dict(), "snac": TINY_SNAC, "snac_sha256": weights.sha256}
    checkpoint.save(folder / "checkpoint.pt", state)


def given(*texts: str) -> Callable[[Path], list[bytes]]:
    return lambda _: [text.encode() for text in texts]


def first(pattern: str) -> Callable[[Path], list[bytes]]:
    """The first file that matches."""
    return lambda folder: [min(folder.glob(pattern)).read_bytes()]


def parquet_manifest(_: Path) -> list[bytes]:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"path": ["a.wav", "b.wav"], "start": [0.0, 1.0], "split": ["train", None]}), sink)
    return [sink.getvalue().to_pybytes()]


def parquet_audio(folder: Path) -> list[bytes]:
    sounds = [{"bytes": path.read_bytes(), "path": path.name} for path in sorted(folder.glob("audio/*/*"))[:2]]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"audio": sounds, "speaker": ["a", None]}), sink)
    return [sink.getvalue().to_pybytes()]


def sample(folder: Path) -> list[bytes]:
    row = load(folder / "shards", "train").table.slice(0, 1).to_pylist()[0]
    assert row["key"] == KEY
    (tar,) = first("shards/train/*.tar")(folder)
    return [tar[row["offset"] :][: row["length"]]]


def member(suffix: str) -> Callable[[Path], list[bytes]]:
    return lambda folder: [split_members(sample(folder)[0], KEY, folder)[suffix]]


def read_manifest(path: Path) -> None:
    find(path, None)


def pack(path: Path) -> None:
    path.with_suffix(".tar").unlink(missing_ok=True)  # of the file before, which would be kept
    with redirect_stdout(io.StringIO()):
        pack_parquet(PackParquetSettings(audio=path, out=path.parent, speaker="speaker", column="audio"))


def read_tar(path: Path) -> None:
    list(members(path, EXTENSIONS))


def read_recording(path: Path) -> None:
    for _ in Recording(path, probe(path)).blocks():
        pass


def read_settings(path: Path) -> None:
    load_settings(CodesSettings, "shard_codes.json", [f"config={path}", "audio=a"])


def read_overrides(path: Path) -> None:
    load_settings(TrainSettings, "decoder_48khz.json", path.read_bytes().decode(errors="replace").split("\n"))


def read_index(path: Path) -> None:
    """With sums that fit, as whoever writes an index writes them too."""
    write_sums(path.parent, {INDEX_NAME: file_sha256(path)})
    load(path.parent, "train").table.to_pylist()


def read_plan(path: Path) -> None:
    plan = Plan(path)
    for number in range(len(plan.shards)):
        plan.rows(number)


def look_into(path: Path) -> None:
    with redirect_stdout(io.StringIO()):
        inspect(InspectSettings(path=path, rows=9))


def endless() -> bytes:
    """A tar whose pax header states a length beyond what a computer counts to."""
    info = tarfile.TarInfo("pax")
    data = b"%d path=a\n" % 10**25
    info.type, info.size = tarfile.XHDTYPE, len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data.ljust(tarfile.BLOCKSIZE, b"\0") + bytes(2 * tarfile.BLOCKSIZE)


ENDLESS = endless()
READERS = (
    Reader(
        "list.csv",
        given("path,id,start,end,speaker,split\na.wav,a,0,1.5,x,train\nb/c.wav,,,,y,\n"),
        read_manifest,
        (b"path,\xd8\na,b\n", b"path,speaker\na,\xd8\n", b"path,end,end\na,1,2\n"),
    ),
    Reader(
        "list.jsonl",
        given('{"path": "a.wav", "start": 0.5, "speaker": 7}\n{"path": "b.wav", "frames": 9, "rate": 8000}\n'),
        read_manifest,
        (NESTED, b'{"path": ' + NESTED, b'{"path": "a", "\xa9": 1}'),
    ),
    Reader("list.parquet", parquet_manifest, read_manifest),
    Reader("audio.parquet", parquet_audio, pack),
    Reader("recordings.tar", first("recordings.tar"), read_tar, (ENDLESS,)),
    Reader("recording.flac", first("audio/*/*.flac"), read_recording),
    Reader("recording.wav", first("audio/*/*.wav"), read_recording),
    Reader("recording.ogg", first("audio/*/*.ogg"), read_recording),
    Reader(
        "settings.json",
        lambda _: [(FOLDER / "shard_codes.json").read_bytes()],
        read_settings,
        (b'{"audio": ' + NESTED, b'{"audio": "a", "work": "b", "segment_length": 1e999}'),
    ),
    Reader(
        "overrides",
        given('run=a\nshards=["b"]\nmax_steps=3\nsegment_schedule=[[0,1]]'),
        read_overrides,
        (b"run=" + NESTED, b"run.a.b=1\nrun=2", b"max_steps=" + b"9" * 5000),
    ),
    Reader("sample", sample, lambda path: decode_sample(split_members(path.read_bytes(), KEY, path)), (ENDLESS,)),
    Reader("codes.npy", member(CODES_SUFFIX), lambda path: load_codes(path.read_bytes())),
    Reader("meta.json", member(META_SUFFIX), lambda path: check_meta(path.read_bytes()), (NESTED,)),
    Reader("sidecar.parquet", first("shards/train/*.parquet"), look_into),
    Reader(PLAN_NAME, first(PLAN_NAME), read_plan),
    Reader(INDEX_NAME, first(f"shards/{INDEX_NAME}"), read_index),
    Reader(SUMS_NAME, first(f"shards/{SUMS_NAME}"), lambda path: read_sums(path.parent)),
    Reader("checkpoint.pt", first("checkpoint.pt"), checkpoint.load),
)
