"""Names, rates, dtypes and schemas of everything the two halves exchange. README.md says the same in prose."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shards.errors import ShardError
from shards.storage import Location

FORMAT_VERSION = 2

Row = dict[str, Any]  # of a plan, a sidecar or an index; the schemas below say which names it has

CODEC_RATE = 24_000  # Hz, what SNAC's encoder hears
TARGET_RATE = 48_000  # Hz, what the new decoder speaks
TOKENS_PER_COARSE = (1, 2, 4)  # tokens of each codebook level in one coarse token (vq_strides 4, 2, 1)
TOKENS = sum(TOKENS_PER_COARSE)
CODEBOOK_SIZE = 4096
LATENT_PER_COARSE = 4  # latent frames in one coarse token (46.875 frames per second)
COARSE_24K = 2048  # samples of one coarse token at 24 kHz
COARSE_48K = 4096  # the same at 48 kHz: 85.33 ms
MAX_COARSE = 703  # of a segment: 60 s
CONTEXT_COARSE = 3  # coarse tokens that cover the decoder's receptive field (10 latent frames) on each side

CODES_SUFFIX = "codes.npy"
TARGET_SUFFIX = "target.flac"
META_SUFFIX = "json"
PLAN_NAME = "plan.parquet"
INDEX_NAME = "index.parquet"
SUMS_NAME = "SHA256SUMS"
SPLITS = ("train", "validation")

OK = "ok"  # has codes and, in a shard, a target
FAILED = "failed"  # the recording cannot be used; `reason` says why
REJECTED = "rejected"  # the target does not say what the recording says
TOO_SHORT = "too_short"  # shorter than `min_seconds`

TEACHERS = ("recording", "sidon", "hybrid")  # the recording itself, its restoration, or that above a crossover

PLAN_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("shard", pa.int32()),
        ("row", pa.int32()),  # position in the shard; with `shard` it makes the key
        ("recording", pa.string()),  # stable id: the manifest's, or the path below the folder
        ("group", pa.string()),  # what a split never cuts through: speaker, or parent folder
        ("path", pa.string()),  # of the file, or of the tar that holds it; a URL where it is remote
        ("offset", pa.int64()),  # where the file begins in the tar, bytes; null for a file of its own
        ("first_frame", pa.int64()),  # where the recording begins in its file, at the file's rate
        ("frames", pa.int64()),  # length of the recording, at the file's rate
        ("rate", pa.int32()),  # Hz
        ("channels", pa.int32()),  # null where a manifest was taken at its word; stage 1 compares it with the file
        ("file_frames", pa.int64()),  # with rate and channels: is the file still the one that was planned?
        ("file_bytes", pa.int64()),  # null likewise
        ("segment", pa.int32()),  # position in the recording
        ("start_coarse", pa.int32()),  # first coarse token of the segment
        ("n_coarse", pa.int32()),
        ("n_samples", pa.int32()),  # real samples at 48 kHz; the rest of n_coarse × 4096 is zeros
        ("status", pa.string()),
        ("reason", pa.string()),
    ]
)

CODES_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("recording", pa.string()),
        ("segment", pa.int32()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("n_coarse", pa.int32()),
        ("context_before", pa.int8()),  # coarse tokens of the neighbour before, 0 at the recording's start
        ("context_after", pa.int8()),
        ("content_crc32", pa.uint32()),  # of its share of the file: is it the one that they were made from?
        ("codes", pa.list_(pa.int16())),  # flat as in codes.npy
    ]
)

SIDECAR_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("recording", pa.string()),
        ("group", pa.string()),
        ("segment", pa.int32()),
        ("start_seconds", pa.float64()),  # of the segment in its recording
        ("status", pa.string()),
        ("reason", pa.string()),
        ("offset", pa.int64()),  # bytes into the tar, of the sample's first header
        ("length", pa.int64()),  # bytes of the sample's members with headers and padding
        ("crc32", pa.uint32()),  # of those bytes
        ("n_coarse", pa.int32()),
        ("context_before", pa.int8()),
        ("context_after", pa.int8()),
        ("n_samples", pa.int32()),
        ("teacher", pa.string()),  # one of TEACHERS: what this segment's target was made by
        ("peak", pa.float32()),  # of the target before clipping, full scale = 1
        ("level_db", pa.float32()),  # RMS of the target's real samples, dB re full scale
        ("clipped_samples", pa.int32()),
        ("source_bandwidth_hz", pa.float32()),  # where the recording's spectrum falls away; null in silence
        ("target_bandwidth_hz", pa.float32()),
        ("speech_share", pa.float32()),  # of the recording's 20 ms frames: those that are not silence
        # of the target against its recording; null when it is the recording, or both are silent
        ("lag_samples", pa.float32()),  # at 48 kHz, positive when the target is late; null when one is silent
        ("level_difference_db", pa.float32()),  # of target over recording, 100 Hz to 8 kHz
        ("correlation", pa.float32()),  # of their 50 ms envelopes; 0 when one is silent
    ]
)

INDEX_SCHEMA = pa.schema([("split", pa.string()), ("shard", pa.int32()), *SIDECAR_SCHEMA])

META_FIELDS = {
    "format_version": int,
    "recording": str,
    "group": str,
    "segment": int,
    "start_seconds": float,
    "n_coarse": int,
    "context_before": int,
    "context_after": int,
    "n_samples": int,
    "sampling_rate": int,
    "gain": float,
    "teacher": str,
    "snac": str,
}
SAID_TWICE = META_FIELDS.keys() & set(SIDECAR_SCHEMA.names) - {"teacher"}  # by a sample's json and by its row


def sample_key(shard: int, row: int) -> str:
    """`000012-00345`: no dots, because WebDataset splits names at the first one."""
    return f"{shard:06d}-{row:05d}"


def tar_path(folder: Location, split: str, shard: int) -> Location:
    """Of a shard; its sidecar has the suffix .parquet."""
    return folder / split / f"{shard:06d}.tar"


def coarse_tokens(seconds: float) -> int:
    """The nearest whole number of coarse tokens, at least one: 4 s become 47 (4.0107 s)."""
    return max(round(seconds * TARGET_RATE / COARSE_48K), 1)


def flatten_codes(codes_T7: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
    """(T, 7) rows of one coarse token each → flat: T coarse, 2T middle, 4T fine tokens, each in time order."""
    return np.concatenate([codes_T7[:, :1].ravel(), codes_T7[:, 1:3].ravel(), codes_T7[:, 3:].ravel()])


def unflatten_codes(flat: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int16]:
    """The inverse of `flatten_codes`. Raises ShardError for a wrong dtype, shape, length or token."""
    if flat.dtype != np.int16 or flat.ndim != 1:
        raise ShardError(
            f"codes are {flat.dtype} of shape {flat.shape}, expected a row of int16: T coarse, 2T middle, 4T fine"
        )
    if flat.size == 0 or flat.size % TOKENS:
        raise ShardError(f"{flat.size} tokens are not T + 2T + 4T: expected a multiple of {TOKENS}")
    if flat.min() < 0 or flat.max() >= CODEBOOK_SIZE:
        raise ShardError(f"tokens run from {flat.min()} to {flat.max()}, expected 0 … {CODEBOOK_SIZE - 1}")
    t = flat.size // TOKENS
    coarse, middle, fine = flat[:t], flat[t : 3 * t], flat[3 * t :]
    return np.concatenate([coarse[:, None], middle.reshape(t, 2), fine.reshape(t, 4)], axis=1)


def npy_bytes(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def load_codes(data: bytes) -> npt.NDArray[np.int16]:
    """Bytes of a `codes.npy` → (T, 7), checked; never unpickles."""
    try:
        file = io.BytesIO(data)
        flat = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # on damaged headers NumPy raises whatever its parser of Python literals raises
        raise ShardError(f"codes are not a plain .npy array: {error}") from error
    if file.tell() < len(data):
        raise ShardError(f"{len(data) - file.tell()} bytes follow the codes in their .npy")
    return unflatten_codes(flat)


def check_meta(data: bytes) -> dict[str, Any]:
    """Bytes of a sample's json → its fields, each present and of its type."""
    try:
        meta: dict[str, Any] = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"metadata is not JSON: {error}") from error
    for name, kind in META_FIELDS.items():
        if not isinstance(meta, dict) or type(meta.get(name)) is not kind:
            raise ShardError(f"metadata field {name} should be {kind.__name__}: {data[:200]!r}")
    if meta["format_version"] != FORMAT_VERSION:
        raise ShardError(f"sample has format {meta['format_version']}, this version reads {FORMAT_VERSION}")
    return meta


def check_sample(codes_T7: npt.NDArray[np.int16], target_frames: int, rate: int, meta: dict[str, Any]) -> None:
    """Codes, target and metadata must describe the same stretch of time. Raises ShardError."""
    before, core, after = meta["context_before"], meta["n_coarse"], meta["context_after"]
    if not (0 <= before <= CONTEXT_COARSE and 0 <= after <= CONTEXT_COARSE and 0 < core <= MAX_COARSE):
        raise ShardError(f"context {before} + {core} + {after} coarse tokens is out of range")
    if len(codes_T7) != before + core + after:
        raise ShardError(f"{len(codes_T7)} coarse tokens, metadata says {before} + {core} + {after}")
    if rate != TARGET_RATE or target_frames != core * COARSE_48K:
        raise ShardError(
            f"target has {target_frames} samples at {rate} Hz, expected {core * COARSE_48K} at {TARGET_RATE} Hz"
        )
    if not (core - 1) * COARSE_48K < meta["n_samples"] <= core * COARSE_48K:
        raise ShardError(f"{meta['n_samples']} real samples do not end in the last of {core} coarse tokens")
