"""Checkpoints: the decoder alone, everything a bit-exact resume needs, and the frozen parts by name and hash."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from snac import SNAC
from snac.layers import Decoder

from codec.snac import GEOMETRY, load_snac, load_verified
from shards.errors import UserError, first_line, printable
from shards.files import file_sha256, write_whole
from shards.writer import differences
from trainer.decoder import RATES_48K
from trainer.log import as_json

BEST = "best.pt"
STEPS = f"step_{9 * '[0-9]'}.pt"
PROVENANCE = "provenance.json"  # in an exported directory, beside what stock snac reads


SUMMARY = ("step", "best", "validation", "validations_since_best", "settings", "data", "snac", "snac_sha256")


def save_described(path: Path, state: Mapping[str, Any]) -> None:
    """A checkpoint; before it, what it says of itself as .json beside it, for whoever has no torch.

    In this order, so that a process that is killed in between writes both again when it comes to this step again.
    """
    summary = {name: state[name] for name in SUMMARY if name in state}
    write_whole(path.with_suffix(".json"), as_json(summary, indent=2) + "\n")
    save(path, state)


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Through memory, because torch reports a full disk as an error of its own."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getvalue())  # no copy; a view of the buffer, kept by an error, crashes Python 3.12


def load(path: Path) -> dict[str, Any]:
    """Never runs code from the file. Raises UserError for one that is not a checkpoint of ours."""
    try:
        _check_crc32(path)
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds for a damaged file
        raise UserError(
            f"{path} is not a readable checkpoint ({first_line(error)}); delete it or take another"
        ) from error
    if not isinstance(state, dict) or not {"decoder", "snac", "snac_sha256"} <= state.keys():
        raise UserError(f"{path} is not a checkpoint of this trainer: it needs decoder, snac and snac_sha256")
    return state


def _check_crc32(path: Path) -> None:
    """torch.load takes flipped bits for weights, although the archive stores the crc32 of every record.

    It would also unpack what torch.save never packs: gigabytes from a file of megabytes.
    """
    with zipfile.ZipFile(path) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise ValueError("its records are compressed")
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"crc32 of {damaged} differs")


def folder(run: Path) -> Path:
    return run / "checkpoints"


def newest(run: Path) -> Path | None:
    found = sorted(folder(run).glob(STEPS))
    return found[-1] if found else None


def newest_step(run: Path) -> int:
    """0 before the first checkpoint."""
    path = newest(run)
    return 0 if path is None else int(path.stem.removeprefix("step_"))


def best_step(run: Path) -> int | None:
    """Of best.pt, by its .json; None where it was taken away."""
    path = (folder(run) / BEST).with_suffix(".json")
    return int(json.loads(path.read_text())["step"]) if path.exists() else None


def step_path(run: Path, step: int) -> Path:
    return folder(run) / f"step_{step:09d}.pt"


def best_path(run: Path, step: int) -> Path:
    return folder(run) / f"best_{step:09d}.pt"


def keep_former_best(best: Path, state: Mapping[str, Any]) -> Path:
    """A copy of `best`, which holds `state`, under a name that no later best takes.

    A copy, because best.pt stays the best there is until training finds another.
    """
    path = best.with_name(f"former_best_{state['step']:09d}_{file_sha256(best)[:8]}.pt")
    if not path.exists():
        save_described(path, state)
    return path


def prune(run: Path, keep: int) -> None:
    """Leaves the `keep` newest checkpoints to resume from, and nothing that a kill left half written."""
    for path in folder(run).glob("*.tmp"):
        path.unlink()
    for path in sorted(folder(run).glob(STEPS))[:-keep]:
        remove(path)
    for path in folder(run).glob("*.json"):
        if not path.with_suffix(".pt").exists():  # a kill came between the two
            path.unlink()


def prune_best(run: Path, keep: int, metric: str, higher_is_better: bool) -> None:
    """Leaves the `keep` best of those kept as best, as their .json says; without one a file is unfinished."""

    def badness(path: Path) -> float:
        try:
            value: float = json.loads(path.with_suffix(".json").read_text())["validation"][metric]
        except FileNotFoundError:
            return math.inf
        return -value if higher_is_better else value

    for path in sorted(folder(run).glob("best_*.pt"), key=badness)[keep:]:
        remove(path)


def remove(path: Path) -> None:
    path.unlink()
    path.with_suffix(".json").unlink(missing_ok=True)


@dataclass(frozen=True)
class Codec48k:
    """The frozen stock SNAC 24 kHz and the decoder that speaks its tokens at 48 kHz."""

    snac: SNAC
    config: dict[str, Any]  # of the stock SNAC 24 kHz
    decoder: Decoder
    provenance: dict[str, Any]  # where weights, codes and targets came from

    @property
    def snac_name(self) -> str:
        return printable(str(self.provenance["snac"]))

    @property
    def described(self) -> str:
        step = printable(str(self.provenance.get("step", "unknown")))
        return f"decoder of step {step}, codes by {self.snac_name}"


def load_codec(model: Path, pretrained_model: str | None = None) -> Codec48k:
    """A run (its best checkpoint), a checkpoint or an exported directory; of the weights, their running mean (EMA).

    Raises UserError naming what is wrong.
    """
    if (model / "config.json").exists():
        return _from_export(model)
    path = folder(model) / BEST if model.is_dir() else model
    if not path.exists():
        raise UserError(f"{model}: no checkpoint there; expected a run with {BEST}, a .pt or an exported folder")
    state = load(path)
    try:
        snac, weights = load_snac(pretrained_model or state["snac"])
    except UserError as error:
        hint = "" if pretrained_model else f"; pretrained_model= says where the SNAC of {path} lies now"
        raise UserError(f"{error}{hint}") from error
    changed = differences(state["snac_sha256"], weights.sha256)
    if changed:
        raise UserError(f"{path} belongs to another SNAC than {weights.name} ({changed}); name it by pretrained_model=")
    config = json.loads(weights.paths["config.json"].read_text())
    decoder = Decoder(snac.latent_dim, config["decoder_dim"], RATES_48K, config["noise"], config["depthwise"], None)
    try:
        decoder.load_state_dict(state.get("ema", state["decoder"]))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not hold this decoder: {first_line(error)}") from error
    names = ("step", "settings", "data", "validation")
    found = {name: _without_folders(state[name]) for name in names if name in state}
    provenance = {"snac": weights.describe(), **found}
    return Codec48k(snac, config, decoder.eval().requires_grad_(False), provenance)


def _without_folders(value: Any) -> Any:
    """Folders and buckets of who trained are nobody else's business: of each its name is left."""
    if isinstance(value, dict):
        return {name: _without_folders(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "s3://", "gs://")) else value


def _from_export(directory: Path) -> Codec48k:
    try:
        config = json.loads((directory / "config.json").read_text())
        provenance = json.loads((directory / PROVENANCE).read_text())
        _check_crc32(directory / "pytorch_model.bin")
    except (OSError, ValueError, RecursionError, zipfile.BadZipFile) as error:
        raise UserError(f"{directory} is not a directory made by `just export`: {error}") from error
    if not isinstance(config, dict) or not isinstance(provenance, dict) or "snac" not in provenance:
        raise UserError(f"{directory}: config.json or {PROVENANCE} is not what `just export` writes")
    found = {key: config.get(key) for key in GEOMETRY}
    if found != GEOMETRY:
        raise UserError(f"{directory} is an export of another codec: expected {GEOMETRY}, found {found}")
    if config.get("decoder_rates") != RATES_48K:
        raise UserError(f"{directory} decodes with rates {config.get('decoder_rates')}, expected {RATES_48K}")
    codec = load_verified(directory).requires_grad_(False).eval()
    return Codec48k(codec, config, codec.decoder, provenance)
