"""Find recordings: a folder tree, tars of recordings or a manifest, here or remote. Every one of them ends in the plan.

Recordings are rows of a table, because there may be millions.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from codec.audio import DECODED, EXTENSIONS
from pipeline.manifest import INSIDE_PARQUET, MANIFESTS, read_manifest
from pipeline.tars import members
from shards.errors import UserError
from shards.files import file_sha256
from shards.groups import group_finder
from shards.pieces import Part, version
from shards.storage import READERS, Location, Url, locate

TAR = ".tar"
FSCK_FOLDER = "lost+found"  # at the root of a file system, which root alone may read
FOUND_SCHEMA = pa.schema(  # a recording before anything is known of its content
    [
        ("recording", pa.string()),
        ("path", pa.string()),
        ("offset", pa.int64()),  # in the tar that `path` is; null for a file of its own
        ("file_bytes", pa.int64()),  # null where nobody has looked yet
        ("group", pa.string()),
        ("split", pa.string()),  # null: by hash of the group
        ("start", pa.float64()),  # seconds
        ("end", pa.float64()),
        ("frames", pa.int64()),  # of the file, with `rate`, where a manifest states both
        ("rate", pa.int32()),
        ("problem", pa.string()),  # why it cannot be used
    ]
)


def find(audio: Location, group_pattern: str | None) -> tuple[pa.Table, Counter[str]]:
    """FOUND_SCHEMA, in order of ids; and what was ignored: extensions or columns.

    Raises UserError where there is nothing, or an id stands more than once.
    """
    if audio.suffix in MANIFESTS and audio.is_file():
        columns, ignored = read_manifest(audio)
        if not columns["path"]:
            raise UserError(f"audio={audio} has no rows: a manifest names a recording in each")
    elif audio.suffix == TAR and audio.is_file():
        columns, ignored = _columns(_tar(audio, audio.name))
    elif _is_folder(audio):
        columns, ignored = _columns(_folder(audio))
    elif audio.is_file():
        raise UserError(f"audio={audio} is neither a folder nor a manifest ({', '.join(MANIFESTS)}) nor a .tar")
    else:
        raise UserError(f"audio={audio}: no such folder or manifest")
    if not columns["path"]:
        others = counted(ignored) or "nothing"
        hint = f"; {INSIDE_PARQUET}" if ".parquet" in ignored else ""
        raise UserError(f"audio={audio} holds no recordings ({', '.join(sorted(EXTENSIONS))}); found: {others}{hint}")
    columns["group"] = _groups(columns, group_pattern)
    n = len(columns["path"])
    table = pa.table([columns.get(name) or pa.nulls(n) for name in FOUND_SCHEMA.names], FOUND_SCHEMA.names)
    table = table.cast(FOUND_SCHEMA).sort_by("recording")
    _check_ids(audio, table["recording"])
    return table, ignored


def counted(ignored: Counter[str]) -> str:
    return ", ".join(f"{n} × {name}" for name, n in ignored.most_common())


def listed_sha256(audio: Location) -> str:
    """Of a manifest, or of the names in a folder and the tars' sizes and times: as long as it stays, so does `find`."""
    if audio.suffix in MANIFESTS and audio.is_file():
        return file_sha256(audio)
    paths = sorted(path for path, _ in walk(audio)) if _is_folder(audio) else [str(audio)]
    digest = hashlib.sha256()
    with ThreadPoolExecutor(READERS) as pool:
        versions = pool.map(_version, (path for path in paths if path.lower().endswith(TAR)))
        for part in (*map(os.fsencode, paths), *versions):
            digest.update(part + b"\0")
    return digest.hexdigest()


def _version(tar: str) -> bytes:
    """Without reading it."""
    try:
        return "{} {}".format(*version(locate(tar))).encode()
    except OSError:
        return b""


def stored(path: str, offset: int | None, file_bytes: int | None) -> Location | Part:
    """Where the bytes of a planned recording are."""
    whole = locate(path)
    return whole if offset is None else Part(whole, offset, file_bytes or 0)


def _check_ids(audio: Location, ids: pa.ChunkedArray) -> None:
    counts = ids.value_counts()
    repeated = pc.filter(pc.struct_field(counts, [0]), pc.greater(pc.struct_field(counts, [1]), 1))
    if len(repeated):
        raise UserError(
            f"{audio}: id {repeated[0].as_py()!r} stands more than once ({len(repeated)} such): ids must be unique"
        )


Item = dict[str, Any] | str  # a recording, or what is ignored


def _columns(items: Iterable[Item]) -> tuple[dict[str, list[Any]], Counter[str]]:
    names = ("recording", "name", "path", "offset", "file_bytes", "group", "problem")
    columns: dict[str, list[Any]] = {name: [] for name in names}
    ignored = Counter[str]()
    for item in items:
        if isinstance(item, str):
            ignored[item] += 1
            continue
        for name, column in columns.items():
            column.append(item.get(name))
    return columns, ignored


def _is_folder(audio: Location) -> bool:
    """In a bucket an object may have the name of a folder, as programs leave that show the bucket as a disk."""
    return audio.is_dir() or (isinstance(audio, Url) and audio.is_file() and bool(audio.files().keys() - {audio}))


def _folder(folder: Location) -> Iterator[Item]:
    prefix = len(str(folder).rstrip("/")) + 1
    tars = []
    for path, file_bytes in walk(folder):
        id, name = path[prefix:], path.rpartition("/")[2]
        suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 (a million of them)
        if not name:
            yield f"{id} (a folder's name)" if file_bytes else "folder marker" if file_bytes == 0 else "empty folder"
        elif suffix not in (*EXTENSIONS, TAR):
            yield suffix or _without_suffix(path, id)
        elif name.endswith(DECODED):
            yield DECODED
        elif not _is_utf8(path):  # such a name fits in no Parquet file
            yield _misnamed(id)
        elif suffix == TAR:
            tars.append((locate(path), id))
        else:
            yield {"recording": id, "path": path, "file_bytes": file_bytes}
    with ThreadPoolExecutor(READERS) as pool:
        for items in pool.map(lambda tar: list(_tar(*tar)), tars):
            yield from items


def _tar(path: Location, id: str) -> Iterator[Item]:
    """Its recordings; a tar that cannot be read to its end is one more, with the reason."""
    for member in members(path, EXTENSIONS):
        if not _is_utf8(member.name):
            yield _misnamed(f"{id}/{member.name}")
        elif member.problem is not None:
            yield {"recording": f"{id}/{member.name}".rstrip("/"), "path": str(path), "problem": member.problem}
        elif member.ignored is not None:
            yield member.ignored
        else:
            known = {"path": str(path), "offset": member.offset, "file_bytes": member.size, "group": member.speaker}
            inside = member.name if "/" in member.name else None  # its folder is a group in whichever tar it lies
            yield {"recording": f"{id}/{member.name}", "name": inside, **known}


def _without_suffix(path: str, id: str) -> str:
    """As it is said: of a link to a disk that is not mounted nobody knows that it is a folder."""
    is_lost = "://" not in path and Path(path).is_symlink() and not Path(path).exists()
    return f"{id} (a link to nowhere: is it mounted?)" if is_lost else path.rpartition("/")[2]


def _misnamed(id: str) -> Item:
    readable = os.fsencode(id).decode("utf-8", "backslashreplace")
    return {"recording": readable, "path": "", "problem": "file name is not UTF-8: rename it"}


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def walk(folder: Location) -> Iterator[tuple[str, int | None]]:
    """Every file below `folder`, with its bytes where they are known. Links to folders are followed, once each."""
    if isinstance(folder, Url):
        yield from ((str(url), size) for url, size in folder.files().items())
        return
    try:
        yield from ((path, None) for path in _below(str(folder), set()))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error


def _below(folder: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Files, and empty folders with a slash at their end. A link that cannot be looked at raises, as a folder does."""
    status = Path(folder).stat()
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as found:
        entries = sorted(found, key=attrgetter("name"))
    if not entries:
        yield f"{folder}/"
    for entry in entries:
        if _leads_on(entry) and entry.name != FSCK_FOLDER:
            yield from _below(entry.path, seen)
        else:
            yield entry.path


def _leads_on(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:  # of a link to itself
            raise
        return False


def _groups(columns: dict[str, list[Any]], pattern: str | None) -> list[str]:
    """What each recording names as its group, else the first group of `pattern` in its id, else its folder."""
    named = columns.get("group") or [None] * len(columns["path"])
    ids = columns["recording"]
    if pattern is None:
        ids = [name or id for name, id in zip(columns["name"], ids, strict=True)]
    group_of = group_finder(pattern)
    return [name or group_of(id) for name, id in zip(named, ids, strict=True)]
