"""Remote storage by its URL, through fsspec: `s3://bucket/corpus`, `gs://…`, `hf://…`, and no other kind.

A `Location` is a `Path` or a `Url`. A `Url` answers to the few names of pathlib that readers and writers of shards use:
`location / name`, `.name`, `.parent`, `.with_suffix()`, `.exists()`, `.stat().st_size`, `.open()`, `.read_bytes()`,
`.unlink()`. Beyond them, `fetch` brings a whole object to this machine, and `shards.files.replacing` writes to both
kinds so that a reader finds an object whole or not at all.

Nothing is cached here: other machines write too. What fails is tried again, for minutes where the storage is away; what
keeps failing raises StorageError, which names URL and reason. Only an object that is not there is a FileNotFoundError.
"""

from __future__ import annotations

import errno
import io
import itertools
import json
import logging
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeGuard, TypeVar

import fsspec

from shards import hub
from shards.errors import UserError
from shards.stretch import Stretch

T = TypeVar("T")

SCHEMES = ("s3", "gs", "hf")
ATTEMPTS = 5
FIRST_WAIT_SECONDS = 0.2  # doubled after each attempt, up to
LONGEST_WAIT_SECONDS = 30.0
PATIENCE_SECONDS = 600.0  # for storage that is away; ATTEMPTS are made in any case
NETWORK_ERRORS = {  # of Python, botocore, aiohttp, requests, httpx and google.auth, or what they derive from
    *("ConnectionError", "TimeoutError", "Timeout", "TransportError", "HTTPClientError", "ClientConnectionError"),
    *("ClientPayloadError", "ResponseStreamingError", "IncompleteReadError", "ChunkedEncodingError"),
}
SILENCE_SECONDS = 30.0  # of Google's storage within an answer; its client asks six times before it fails
WHOLE_BYTES = 1 << 28  # up to this size `open` fetches an object at once
BLOCK_BYTES = 1 << 22  # of larger ones
EXPIRED = "have the credentials expired?"
DENIED = "do the credentials allow it? Where they allow no listing, what is not there is refused as well"
ELSEWHERE = "the bucket is in another region or behind another address: AWS_DEFAULT_REGION, AWS_ENDPOINT_URL (https?)"
WAYS_OUT = {  # by what S3 calls an error; by its status, where HEAD is asked, which tells no more
    **dict.fromkeys(("400", "401", "ExpiredToken"), EXPIRED),
    **dict.fromkeys(("403", "AccessDenied"), DENIED),
    **dict.fromkeys(("301", "307", "PermanentRedirect", "TemporaryRedirect"), ELSEWHERE),
    "AuthorizationHeaderMalformed": ELSEWHERE,
}
OURS = "snac48."  # how the name begins of a folder in TMPDIR, which a killed process leaves
READERS = 16  # threads that look into many files, and mostly wait for disks or storage
FULL = {errno.ENOSPC, errno.EDQUOT}
OF_WRITING = {*FULL, errno.EFBIG, errno.EROFS, errno.EIO}


class StorageError(UserError):
    """Remote storage does not do what is asked of it."""


@dataclass(frozen=True)
class Stat:
    st_size: int  # bytes
    tag: str = ""  # another one for other bytes, where the storage keeps such


@dataclass(frozen=True, order=True)
class Url:
    """An object or a folder in remote storage."""

    text: str

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.text.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        return self.text.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @property
    def parent(self) -> Url:
        return Url(self.text.rpartition("/")[0])

    def with_name(self, name: str) -> Url:
        return self.parent / name

    def with_suffix(self, suffix: str) -> Url:
        return self.with_name(self.stem + suffix)

    def exists(self) -> bool:
        return self._kind() is not None

    def is_file(self) -> bool:
        return self._kind() == "file"

    def is_dir(self) -> bool:
        return self._kind() == "directory"

    def _kind(self) -> str | None:
        """Not by fsspec's `exists`: some filesystems answer no when they could not find out."""
        try:
            return str(self._patiently(lambda files, path: files.info(path)["type"]))
        except FileNotFoundError:
            return None

    def stat(self) -> Stat:
        info = self._patiently(lambda files, path: files.info(path))
        tags = (info.get(name) for name in ("ETag", "etag", "blob_id", "xet_hash"))
        return Stat(int(info["size"]), str(next(filter(None, tags), "")))

    def modified(self) -> datetime:
        found: datetime = self._patiently(lambda files, path: files.modified(path))
        return found

    def read_bytes(self, start: int = 0, stop: int | None = None) -> bytes:
        """By one request. The last bytes where `start` is negative, all of them where there are fewer."""
        is_fixed = self.text.startswith("hf://")  # elsewhere it may be shorter by now
        just_these = {"cache_type": "none"} if is_fixed else {}  # of itself the hub's reads 5 MiB beyond them
        if is_fixed and start == 0 and stop is None:
            stop = self.stat().st_size

        def read(files: Any, path: str) -> bytes:
            try:
                data: bytes = files.cat_file(path, start=start, end=stop, **just_these)
            except Exception as error:
                if _answer(error)[0] != 416:  # it ends before `start`
                    raise
                return b""
            most = -start if start < 0 else len(data) if stop is None else stop - start
            if len(data) > most or (len(data) < most and start >= 0 and is_fixed):
                raise OSError(f"{most} bytes were asked for, and {len(data)} came, as from a proxy or a login page")
            return data

        return self._patiently(read)

    def open(self, mode: str = "rb") -> IO[bytes]:
        """For reading; large objects are fetched block by block."""
        assert mode == "rb", "objects are written by shards.files.replacing"
        return self.open_stretch(0, self.stat().st_size)

    def open_stretch(self, offset: int, size: int) -> IO[bytes]:
        """Bytes [offset, offset + size) as a file."""
        if size <= WHOLE_BYTES:
            return io.BytesIO(self.read_bytes(offset, offset + size) if size else b"")
        return io.BufferedReader(Stretch(self.read_bytes, offset, size), BLOCK_BYTES)

    def files(self) -> dict[Url, int]:
        """Every object below this folder, to any depth, with its bytes; empty where there is no such folder."""
        folder, found = self._patiently(lambda files, path: (path, files.find(path, detail=True)))
        return {Url(self.text + name.removeprefix(folder)): info["size"] for name, info in sorted(found.items())}

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self._patiently(lambda files, path: files.rm_file(path))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def fetch(self, path: Path) -> None:
        """The whole object into the file `path`, which appears when it is complete."""
        from shards.files import replacing

        def whole(files: Any, name: str) -> None:
            with replacing(path) as temporary:  # another for each attempt: gcsfs deletes one that it could not fill
                files.get_file(name, str(temporary))
                self._check_size(temporary.stat().st_size, self.stat().st_size, f"fetched to {path}")

        self._patiently(whole)

    @contextmanager
    def replacing(self) -> Iterator[Path]:
        """Yields a local file; on success it is uploaded. The storage shows an object whole, or the one before."""
        with tempfile.TemporaryDirectory(prefix=OURS) as folder:
            local = Path(folder) / self.name
            with naming_written(local):
                yield local
            self._patiently(lambda files, path: files.put_file(str(local), path))
            self._check_size(self.stat().st_size, local.stat().st_size, "uploaded")

    def _check_size(self, found: int, expected: int, where: str) -> None:
        if found != expected:
            raise StorageError(f"{self}: {found} of {expected} bytes were {where}; try again")

    def _patiently(self, action: Callable[[Any, str], T]) -> T:
        """`action` with the filesystem and its name for this object, again and again while the storage fails."""
        files = _filesystem(self.text)
        failing_since = math.inf
        with ExitStack() as waiting:
            for attempt in itertools.count(1):
                try:
                    return action(files, _path(files, self))
                except FileNotFoundError as error:
                    what = "bucket" if _answer(error)[1] == "NoSuchBucket" else "object"
                    raise FileNotFoundError(errno.ENOENT, f"no such {what}", self.text) from error
                except Exception as error:  # each filesystem raises its own kinds
                    if is_full(error) or isinstance(error, UserError):
                        raise
                    if _answer(error)[1] == "InvalidObjectState":
                        raise PermissionError(errno.EACCES, "archived (restore it first)", self.text) from error
                    failing_since = min(failing_since, time.monotonic())
                    seconds = time.monotonic() - failing_since
                    reason = _reason(error)
                    kinds = PermissionError | NotImplementedError | ValueError | RecursionError
                    hopeless = isinstance(error, kinds) or _answer(error)[0] in (401, 403)
                    patience = PATIENCE_SECONDS if _is_outage(error) else 0
                    if hopeless or (attempt >= ATTEMPTS and seconds >= patience):
                        raise StorageError(f"{self}: {reason} ({attempt} attempts in {seconds:.0f} s)") from error
                # earlier where a client makes slow attempts of its own
                is_said = attempt == ATTEMPTS or (patience > 0 and attempt == 2 and seconds > LONGEST_WAIT_SECONDS)
                if is_said and _one_says_so.acquire(blocking=False):
                    waiting.callback(_one_says_so.release)
                    minutes = PATIENCE_SECONDS / 60
                    print(f"{self}: {reason}: trying for {minutes:.0f} minutes; Ctrl-C ends it", flush=True)
                time.sleep(min(FIRST_WAIT_SECONDS * 2**attempt, LONGEST_WAIT_SECONDS))
        raise AssertionError("unreachable")


_one_says_so = threading.Lock()  # held by the thread that has said that it waits


def is_full(error: BaseException) -> TypeGuard[OSError]:
    """Whether a disk of this machine has no room, or none for this user."""
    return isinstance(error, OSError) and error.errno in FULL


@contextmanager
def naming_written(path: Path) -> Iterator[None]:
    """An error of writing is said with what was written: the system names what cannot be opened, and nothing else."""
    try:
        yield
    except OSError as error:
        if error.errno in OF_WRITING and error.filename is None:
            error.filename = str(path)
        raise


def _answer(error: Exception) -> tuple[int | None, str, str]:
    """What the storage answered: its status and, of S3, the error's name and what is said of it."""
    answer = getattr(error.__cause__ or error, "response", None)
    if isinstance(answer, dict):  # botocore's
        told = answer.get("Error", {})
        return answer.get("ResponseMetadata", {}).get("HTTPStatusCode"), told.get("Code", ""), told.get("Message", "")
    is_denied = str(error).startswith("Forbidden: ")  # gcsfs's, which tells no number
    status = 403 if is_denied else getattr(answer, "status_code", getattr(error, "code", None))
    return (status if isinstance(status, int) else None), str(status) if status in (401, 403) else "", str(error)


def _reason(error: Exception) -> str:
    """In a line, with a way out where there is one."""
    _, code, said = _answer(error)
    if isinstance(error, RecursionError):  # botocore's, when a redirect does not say to which region
        code, said = "307", "redirected"
    said = f"{code}: {said}" if code else str(error)
    reason = " ".join(said.split()) or type(error).__name__
    if isinstance(error, json.JSONDecodeError):
        return f"the answer is not JSON, as from a proxy or a login page ({reason})"
    return f"{reason}; {WAYS_OUT[code]}" if code in WAYS_OUT else reason


def _is_outage(error: Exception) -> bool:
    """Whether the storage could not be reached, or answered that it cannot serve now."""
    status, *_ = _answer(error)
    if status is not None:
        return status >= 500 or status in (408, 429)
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return not kinds.isdisjoint(NETWORK_ERRORS) and "OfflineModeIsEnabled" not in kinds


Location = Path | Url


def locate(text: str | Location) -> Location:
    """`s3://…` → Url, anything else → Path."""
    if isinstance(text, str) and "://" in text:
        return Url(text.rstrip("/"))
    return text if isinstance(text, Url) else Path(text)


def _filesystem(url: str) -> Any:
    protocol = url.partition("://")[0]
    if protocol not in SCHEMES:  # a manifest's rows must not make this machine call whomever they name
        raise StorageError(f"{url}: {protocol}:// is none of {', '.join(SCHEMES)}")
    if protocol == "gs":  # whose client would ask by gRPC what kind of bucket it is, warn where it may not, and print
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # a traceback for each failure
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    try:
        options = _google_options() if protocol == "gs" else {}
        return hub.filesystem() if protocol == "hf" else fsspec.filesystem(protocol, **options)
    except ImportError as error:
        raise StorageError(f"{url}: {error}: `just extras` installs what s3:// and gs:// need") from error
    except Exception as error:
        raise StorageError(f"{url}: {protocol}:// cannot be opened: {error}") from error


def _google_options() -> dict[str, Any]:
    """Of itself its client waits without end for a server that accepts and never answers."""
    from aiohttp import ClientTimeout

    return {"requests_timeout": ClientTimeout(total=None, sock_connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS)}


def _path(files: Any, url: Url) -> str:
    """What the filesystem calls an object, now that it has forgotten what it knew of it.

    Not so at the hub, where asking for one file lists its whole folder: what was listed stays true of a repository, by
    its commit, and of a bucket it is believed.
    """
    path: str = files._strip_protocol(url.text)
    if not url.text.startswith("hf://"):
        files.invalidate_cache()
        return path
    return path if path.startswith("buckets/") else hub.at_commit(files, path)
