"""Recordings in tars, WebDataset style: KEY.flac with, if you like, KEY.json that names its speaker."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import IO

from shards.files import reason_of_one
from shards.pieces import skimmed
from shards.storage import Location

MAX_JSON_BYTES = 1 << 20


@dataclass(frozen=True)
class Member:
    """A recording in a tar; or what is ignored there; or why it, or without a name no more of the tar, can be read."""

    name: str = ""
    offset: int = 0  # of its bytes in the tar
    size: int = 0
    speaker: str | None = None
    ignored: str | None = None
    problem: str | None = None


def members(path: Location, extensions: Collection[str]) -> Iterator[Member]:
    """In the tar's order. What is damaged or compressed ends with a problem."""
    found: list[tarfile.TarInfo] = []
    speakers: dict[str, str | None] = {}
    problem = None
    try:
        whole = skimmed(path)
        size = whole.stat().st_size
        if not size:  # a named pipe would wait for a writer
            raise tarfile.ReadError("empty file")
        with whole.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                if info.isdir():
                    continue
                found.append(info)
                if info.isfile() and info.name.endswith(".json"):
                    small = info.size <= MAX_JSON_BYTES
                    speakers[_key(info.name)] = _speaker(tar.extractfile(info)) if small else None
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile would take it for the end
                problem = f"cut off or damaged at byte {tar.offset}: the tar does not end there"
            elif any(block.strip(b"\0") for block in iter(partial(file.read, 1 << 20), b"")):
                problem = f"more follows its end at byte {tar.offset}, such as another tar: its parts must be files"
    except OSError as error:
        problem = f"not readable as a tar: {reason_of_one(path, error)}"
    except (tarfile.TarError, EOFError, OverflowError) as error:  # pax headers state lengths of any size
        problem = f"not readable as a tar: {error}"
    recordings = {_key(info.name) for info in found if _suffix(info.name) in extensions}
    for info in found:
        beside = info.isfile() and info.name.endswith(".json") and _key(info.name) in recordings
        if not beside:
            yield _member(info, extensions, speakers, size)
    if problem is not None:
        yield Member(problem=problem)


def _member(info: tarfile.TarInfo, extensions: Collection[str], speakers: dict[str, str | None], size: int) -> Member:
    name, suffix = info.name.removeprefix("./"), _suffix(info.name)
    if not info.isfile():
        return Member(ignored="links in tars")
    if info.issparse():  # what follows its header are pieces, not the file
        return Member(name, problem="a sparse member: pack the tar without --sparse")
    if suffix not in extensions:
        return Member(ignored=f"{suffix or PurePosixPath(info.name).name} in tars")
    if info.offset_data + info.size > size:
        return Member(name, problem="cut off with its tar")
    speaker = speakers.get(_key(info.name), "")
    if speaker is None:  # in a group by its folder it might be in another split than the rest of its speaker
        why = f"its speaker is not known: the .json beside it is not JSON of at most {MAX_JSON_BYTES:,} bytes"
        return Member(name, problem=why)
    return Member(name, info.offset_data, info.size, speaker or None)


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _key(name: str) -> str:
    """WebDataset's: up to the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _speaker(file: IO[bytes] | None) -> str | None:
    """The json's `speaker`; empty where it names none, None where it cannot be read."""
    try:
        content = json.loads(file.read()) if file else None
    except (ValueError, RecursionError):
        return None
    named = content.get("speaker") if isinstance(content, dict) else None
    return "" if named is None else str(named).encode("utf-8", "replace").decode()  # JSON may hold half a character
