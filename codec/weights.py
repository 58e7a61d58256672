"""Model files: from the hub at a pinned revision, or from a local directory; their sha256 is always known."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from tqdm import tqdm

from shards.errors import UserError
from shards.files import file_sha256

PINS = Path(__file__).parent.parent / "configs" / "weights.json"
SNAC_FILES = ("config.json", "pytorch_model.bin")
_sha256 = cache(file_sha256)


class UnreachableError(UserError):
    """A file is neither here nor to be had from the hub."""


@dataclass(frozen=True)
class Weights:
    name: str
    paths: dict[str, Path]
    sha256: dict[str, str]

    def folder(self) -> Path:
        return next(iter(self.paths.values())).parent

    def read(self, file: str) -> bytes:
        """The bytes that were trusted, for what runs code as it loads. Raises UserError where the file has changed."""
        data = self.paths[file].read_bytes()
        if sha256(data).hexdigest() != self.sha256[file]:
            raise UserError(f"{self.paths[file]} changed after its sha256 was checked: start again")
        return data

    def describe(self) -> str:
        """The published name when every hash is the published one, else a name that says that it is not."""
        for repo, entry in read_pins(PINS).items():
            if all(entry["files"].get(file) == digest for file, digest in self.sha256.items()):
                return repo
        return f"stand-in or custom weights {Path(self.name).name} (sha256 {list(self.sha256.values())[-1][:12]})"


def resolve(name: str, files: tuple[str, ...], pins: Path = PINS, must_be_pinned: bool = False) -> Weights:
    """Finds `files` of a local directory or a hub repository and hashes them.

    A name that `pins` lists must match its hashes; a hash that is null there trusts nothing. A hub repository must be
    listed, and with `must_be_pinned` a local directory too. Raises UserError naming file, expected and found hash.
    """
    entry = read_pins(pins).get(name)
    paths = _local(Path(name), files) if Path(name).is_dir() else _from_hub(name, files, entry, pins)
    found = {file: _sha256(path) for file, path in paths.items()}
    if entry is None and must_be_pinned:
        pin = json.dumps({name: {"revision": None, "files": found}})
        raise UserError(f"{name} is not listed in {pins}; if you trust these files, add {pin}")
    for file, digest in found.items():
        expected = entry["files"].get(file) if entry else digest
        if expected is None:
            raise UserError(
                f"{paths[file]}: sha256 is {digest}, but {pins} knows none for it, so it is not trusted. "
                f"If you know that this is the published file, write it there for {name}, {file}"
            )
        if digest != expected:
            raise UserError(
                f"{paths[file].resolve()}: sha256 is {digest}, expected {expected}: the file is damaged or another "
                f"one. Delete it and fetch it again; if it is the one you want, correct {pins}"
            )
    return Weights(name, paths, found)


def read_pins(path: Path) -> dict[str, Any]:
    try:
        pins: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable list of weights: {error}") from error
    return pins


def _local(folder: Path, files: tuple[str, ...]) -> dict[str, Path]:
    for file in files:
        if not (folder / file).is_file():
            raise UserError(f"{folder} has no {file}; expected {', '.join(files)}")
    return {file: folder / file for file in files}


def _from_hub(name: str, files: tuple[str, ...], entry: dict[str, Any] | None, pins: Path) -> dict[str, Path]:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its retries are not news; their failure is
    if entry is None:
        raise UserError(f"{name} is neither a directory nor a repository listed in {pins} with revision and sha256")
    revision = entry["revision"]
    missing = [file for file in files if not isinstance(try_to_load_from_cache(name, file, revision=revision), str)]
    if missing:  # and without a network the client tries for half a minute
        tqdm.write(f"fetching {', '.join(missing)} of {name} from the hub")
    try:
        return {file: Path(hf_hub_download(name, file, revision=revision)) for file in files}
    except Exception as error:  # the hub's client raises its own, requests' and the system's errors
        reason = error.__cause__ or error if isinstance(error, LocalEntryNotFoundError) else error
        raise UnreachableError(
            f"{name} cannot be fetched ({type(reason).__name__}: {' '.join(str(reason).split())}): see that the hub "
            "can be reached, and be signed in if it asks for that (`hf auth login`). Without a network, name a local "
            "directory that holds the files, or take the HF_HOME of a machine on which `just prefetch` was run"
        ) from error
