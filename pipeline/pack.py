"""`just pack-parquet`: recordings inside Parquet, as datasets of the hub hold them → tars for `just shard-codes`.

Row 7 of FOLDER/NAME.parquet becomes 000007.flac, or what else its bytes are, and 000007.json, which names its speaker,
in FOLDER/NAME.tar. No row is left out: what is no audio gets its reason where the tars are planned. In memory is twice
the largest row group, which the hub's writers keep to some hundred rows.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import webdataset
from tqdm import tqdm

from codec.audio import EXTENSIONS
from configs.progress import progress_bar
from configs.words import number_of
from pipeline.settings import NO_SPEAKER, PackParquetSettings
from pipeline.sources import counted, walk
from shards.errors import UserError, first_line, printable
from shards.files import replacing
from shards.storage import Location, locate

PARQUET = ".parquet"
ROWS_AT_ONCE = 16
BUFFER_BYTES = 1 << 20  # read at once; pyarrow still holds a row group twice, without this three to four times
TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_dictionary)
TEXT_OR_NUMBER = (*TEXT, pa.types.is_integer, pa.types.is_null)  # null: that of no row
SOUND = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)


def pack_parquet(settings: PackParquetSettings) -> list[str]:
    """One tar for each Parquet file; those that stand are kept. Returns the command that follows. Raises UserError
    naming file and column.
    """
    files = _files(settings.audio)
    missing = {name: path for name, path in files.items() if not (settings.out / name).exists()}
    rows = 0
    for name, path in progress_bar(missing.items(), desc="packing", unit="file"):
        rows += _pack(path, settings.out / name, settings)
    made, kept = number_of(len(missing), "new tar"), len(files) - len(missing)
    tqdm.write(f"{settings.out}: {number_of(rows, 'row')} in {made}; {kept} stood already")
    return ["just", "shard-codes", f"audio={settings.out}", "work=WORK"]


def _files(audio: Location) -> dict[str, Location]:
    """The tar that is made of each Parquet file, and the file."""
    if audio.suffix.lower() == PARQUET and audio.is_file():
        return {f"{audio.stem}.tar": audio}
    paths = sorted(path for path, _ in walk(audio)) if audio.is_dir() else []
    found = [path for path in paths if path.lower().endswith(PARQUET)]
    if not found:
        raise UserError(f"audio={audio} is no Parquet file, and no folder with such files")
    if others := Counter(PurePosixPath(path).suffix or PurePosixPath(path).name for path in set(paths) - {*found}):
        tqdm.write(printable(f"ignored: {counted(others)}"))
    tars = {path[: -len(PARQUET)].removeprefix(f"{audio}/") + ".tar": locate(path) for path in found}
    if len(tars) < len(found):
        raise UserError(f"audio={audio}: two names differ only in the capitals of {PARQUET}: rename one")
    return tars


def _pack(path: Location, tar: Path, settings: PackParquetSettings) -> int:
    """The rows of one file. Raises UserError where no row has audio."""
    rows = of_nobody = 0
    name, holds_audio = None, False
    found = _rows(path, settings)
    begin = list(islice(found, 1))  # before there is a folder: what is refused leaves none
    with (
        replacing(tar) as temporary,
        temporary.open("wb") as file,
        webdataset.TarWriter(file, encoder=False, mtime=0) as writer,
    ):
        for name, sound, speaker in chain(begin, found):
            about = json.dumps({"speaker": speaker}).encode()
            writer.write({"__key__": f"{rows:06d}", "json": about, _suffix(name, sound).removeprefix("."): sound})
            rows += 1
            of_nobody += not speaker
            holds_audio |= sound != b""
        if rows and not holds_audio:
            raise UserError(
                f"{path}: its column {settings.column} holds no audio, only names such as {name!r}: list these files "
                "in a manifest"
            )
    if of_nobody and settings.speaker != NO_SPEAKER:
        tqdm.write(
            f"{path}: {settings.speaker} is empty in {of_nobody} of {number_of(rows, 'row')}: their group is the tar"
        )
    return rows


def _rows(path: Location, settings: PackParquetSettings) -> Iterator[tuple[str, bytes, str | None]]:
    """Name, bytes and speaker of each row, the first and the last empty where it has none."""
    try:
        with path.open("rb") as file:
            table = pq.ParquetFile(path if isinstance(path, Path) else file, buffer_size=BUFFER_BYTES)
            speaker = [] if settings.speaker == NO_SPEAKER else [settings.speaker]
            _check(path, table.schema_arrow, settings.column, *speaker)
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=[settings.column, *speaker], use_threads=False):
                speakers = batch[settings.speaker].to_pylist() if speaker else [None] * len(batch)
                for sound, who in zip(batch[settings.column].to_pylist(), speakers, strict=True):
                    held = sound if isinstance(sound, dict) else {"bytes": sound}
                    yield held.get("path") or "", held["bytes"] or b"", None if who is None else str(who)
    except (pa.ArrowException, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the system's, not pyarrow's
            raise
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error


def _check(path: Location, schema: pa.Schema, column: str, *speaker: str) -> None:
    for key, name in zip(("column", "speaker"), (column, *speaker), strict=False):
        if schema.names.count(name) != 1:
            raise UserError(f"{path} has no {key}={name}; its columns are {', '.join(schema.names)}")
    kind = schema.field(column).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not any(is_type(kind) for is_type in SOUND):
        raise UserError(f"{path}: its column {column} is {kind}; expected bytes, or a struct of bytes and path")
    for name in speaker:
        if not any(is_type(schema.field(name).type) for is_type in TEXT_OR_NUMBER):
            raise UserError(f"{path}: its column {name} is {schema.field(name).type}; expected text or whole numbers")


def _suffix(name: str, sound: bytes) -> str:
    """The name's, else what the bytes are. Of what nobody can read it is that of a recording, which gets a reason."""
    suffix = PurePosixPath(name).suffix.lower()
    if suffix not in EXTENSIONS:
        try:
            suffix = f".{soundfile.info(io.BytesIO(sound)).format.lower()}"
        except soundfile.SoundFileError:
            suffix = ""
    return suffix if suffix in EXTENSIONS else ".wav"
