from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from shards import contract
from shards.contract import (
    CODEBOOK_SIZE,
    check_meta,
    check_sample,
    flatten_codes,
    load_codes,
    npy_bytes,
    sample_key,
    unflatten_codes,
)
from shards.errors import ShardError
from shards.writer import read_metadata
from tests.helpers import ROOT

README = (ROOT / "shards" / "README.md").read_text()
NAMES = {"float": "float32", "double": "float64"}  # Arrow's words → the page's


def some_codes(coarse: int, seed: int = 0) -> npt.NDArray[np.int16]:
    return np.random.default_rng(seed).integers(0, CODEBOOK_SIZE, (coarse, 7)).astype(np.int16)


def some_meta(**changes: Any) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "format_version": contract.FORMAT_VERSION,
        "recording": "a/b.wav",
        "group": "a",
        "segment": 0,
        "start_seconds": 0.0,
        "n_coarse": 4,
        "context_before": 1,
        "context_after": 3,
        "n_samples": 4 * 4096,
        "sampling_rate": 48_000,
        "gain": 1.0,
        "teacher": "recording",
        "snac": "some SNAC",
    }
    return {**meta, **changes}


# Codes


@pytest.mark.parametrize("coarse", [1, 2, 5, 47])
def test_flat_codes_are_coarse_then_middle_then_fine_in_time_order(coarse: int) -> None:
    codes_T7 = some_codes(coarse)
    expected = [int(row[0]) for row in codes_T7]
    for row in codes_T7:
        expected += [int(row[1]), int(row[2])]
    for row in codes_T7:
        expected += [int(token) for token in row[3:7]]
    flat = flatten_codes(codes_T7)
    assert flat.dtype == np.int16
    assert flat.tolist() == expected
    back = unflatten_codes(flat)
    assert back.dtype == np.int16
    assert back.tolist() == codes_T7.tolist()
    assert load_codes(npy_bytes(flat)).tolist() == codes_T7.tolist()


@pytest.mark.parametrize(
    ("flat", "found", "expected"),
    [
        (np.zeros(7, np.int32), "int32", "int16"),
        (np.zeros(7, np.float32), "float32", "int16"),
        (np.zeros(7, np.uint16), "uint16", "int16"),
        (np.zeros(7, ">i2"), ">i2", "int16"),
        (np.zeros((1, 7), np.int16), "(1, 7)", "a row of int16"),
        (np.zeros((), np.int16), "()", "a row of int16"),
        (np.zeros(0, np.int16), "0 tokens", "multiple of 7"),
        (np.zeros(13, np.int16), "13 tokens", "multiple of 7"),
        (np.array([0, 0, 0, 0, 0, 0, 4096], np.int16), "4096", "0 … 4095"),
        (np.array([0, -1, 0, 0, 0, 0, 9], np.int16), "-1 to 9", "0 … 4095"),
    ],
)
def test_codes_that_are_none_are_refused(flat: npt.NDArray[Any], found: str, expected: str) -> None:
    for read in (unflatten_codes, lambda array: load_codes(npy_bytes(array))):
        with pytest.raises(ShardError) as error:
            read(flat)
        assert found in str(error.value)
        assert expected in str(error.value)


def test_tokens_at_both_ends_of_the_range_are_codes() -> None:
    assert unflatten_codes(np.array([0, 4095] * 7, np.int16)).shape == (2, 7)


class Bomb:
    exploded = False

    def __reduce__(self) -> tuple[Any, ...]:
        return setattr, (Bomb, "exploded", True)


def test_a_pickle_is_never_loaded() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(ShardError, match=r"plain \.npy"):
        load_codes(buffer.getvalue())
    assert not Bomb.exploded
    np.load(io.BytesIO(buffer.getvalue()), allow_pickle=True)
    assert Bomb.exploded, "the file above should have been dangerous"


def npz_bytes() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, codes=flatten_codes(some_codes(2)))
    return buffer.getvalue()


def zip_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", b"b")
    return buffer.getvalue()


@pytest.mark.parametrize("data", [b"", b"\x93NUMPY", b"no array at all", npz_bytes(), zip_bytes(), b"PK\x03\x04"])
def test_what_is_no_npy_is_refused(data: bytes) -> None:
    with pytest.raises(ShardError, match=r"plain \.npy"):
        load_codes(data)


def test_bytes_behind_the_codes_are_refused() -> None:
    data = npy_bytes(flatten_codes(some_codes(2)))
    with pytest.raises(ShardError, match="3 bytes follow the codes"):
        load_codes(data + b"abc")


def test_a_cut_or_damaged_npy_is_refused_or_still_codes() -> None:
    whole = npy_bytes(flatten_codes(some_codes(3)))
    for length in range(len(whole)):
        with pytest.raises(ShardError):
            load_codes(whole[:length])
    random = np.random.default_rng(0)
    for _ in range(500):
        damaged = bytearray(whole)
        damaged[random.integers(len(whole))] ^= 1 << int(random.integers(8))
        try:
            codes_T7 = load_codes(bytes(damaged))
        except ShardError:
            continue
        assert 0 <= codes_T7.min() <= codes_T7.max() < CODEBOOK_SIZE


@pytest.mark.parametrize(("shard", "row"), [(0, 0), (12, 345), (999_999, 99_999)])
def test_a_key_has_no_dot_and_sorts_as_its_numbers(shard: int, row: int) -> None:
    key = sample_key(shard, row)
    assert re.fullmatch(r"\d{6}-\d{5}", key)
    assert [int(part) for part in key.split("-")] == [shard, row]


# Metadata and the sample as a whole


def test_metadata_with_every_field_is_read() -> None:
    assert check_meta(json.dumps(some_meta(further="is allowed")).encode()) == some_meta(further="is allowed")


@pytest.mark.parametrize("name", contract.META_FIELDS)
def test_metadata_without_a_field_is_refused(name: str) -> None:
    meta = some_meta()
    del meta[name]
    with pytest.raises(ShardError, match=rf"\b{name}\b"):
        check_meta(json.dumps(meta).encode())


VALUES: list[object] = [None, True, [], {}, "text", 1, 1.5]
WRONG = [(name, value) for name, kind in contract.META_FIELDS.items() for value in VALUES if type(value) is not kind]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_metadata_of_another_type_is_refused(name: str, value: object) -> None:
    with pytest.raises(ShardError, match=rf"\b{name} should be {contract.META_FIELDS[name].__name__}\b"):
        check_meta(json.dumps(some_meta(**{name: value})).encode())


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b'{"a": 1'])
def test_metadata_that_is_no_json_is_refused(data: bytes) -> None:
    with pytest.raises(ShardError, match="not JSON"):
        check_meta(data)


@pytest.mark.parametrize("data", [b"[]", b"1", b"null", b'"text"'])
def test_metadata_that_is_no_object_is_refused(data: bytes) -> None:
    with pytest.raises(ShardError, match="format_version should be int"):
        check_meta(data)


def test_metadata_of_another_format_is_refused() -> None:
    with pytest.raises(ShardError, match="format 3, this version reads 2"):
        check_meta(json.dumps(some_meta(format_version=contract.FORMAT_VERSION + 1)).encode())


@pytest.mark.parametrize(
    "changes",
    [{}, {"n_samples": 3 * 4096 + 1}, {"context_before": 0, "context_after": 0}, {"context_before": 3}],
)
def test_a_sample_that_fits_passes(changes: dict[str, int]) -> None:
    meta = some_meta(**changes)
    coarse = meta["context_before"] + 4 + meta["context_after"]
    check_sample(some_codes(coarse), 4 * 4096, 48_000, meta)


@pytest.mark.parametrize(
    ("coarse", "frames", "rate", "changes", "message"),
    [
        (7, 4 * 4096, 48_000, {}, r"7 coarse tokens, metadata says 1 \+ 4 \+ 3"),
        (9, 4 * 4096, 48_000, {}, r"9 coarse tokens, metadata says 1 \+ 4 \+ 3"),
        (8, 4 * 4096 - 1, 48_000, {}, "16383 samples at 48000 Hz, expected 16384"),
        (8, 8 * 4096, 48_000, {}, "32768 samples at 48000 Hz, expected 16384"),  # the context is no part of the target
        (8, 4 * 4096, 44_100, {}, "at 44100 Hz, expected 16384 at 48000 Hz"),
        (8, 4 * 4096, 48_000, {"n_samples": 4 * 4096 + 1}, "16385 real samples"),
        (8, 4 * 4096, 48_000, {"n_samples": 3 * 4096}, "12288 real samples"),
        (8, 4 * 4096, 48_000, {"n_samples": 0}, "0 real samples"),
        (9, 4 * 4096, 48_000, {"context_after": 4}, "out of range"),
        (6, 4 * 4096, 48_000, {"context_before": -1}, "out of range"),
        (4, 0, 48_000, {"n_coarse": 0, "n_samples": 0}, "out of range"),
    ],
)
def test_a_sample_that_does_not_fit_is_refused(
    coarse: int, frames: int, rate: int, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ShardError, match=message):
        check_sample(some_codes(coarse), frames, rate, some_meta(**changes))


# README.md says the same


def tables(heading: str) -> list[list[list[str]]]:
    """The cells of each table below the `## ` heading that begins so, header first; backticks taken off."""
    section = re.split(rf"^## {re.escape(heading)}.*$", README, flags=re.MULTILINE)[1].split("\n## ")[0]
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", section, flags=re.MULTILINE):
        rows = [[cell.strip(" `") for cell in line.strip("|\n").split("|")] for line in block.splitlines()]
        assert set("".join(rows[1])) <= {"-"}
        assert {len(row) for row in rows} == {len(rows[0])}, f"a cell of {rows} holds a |"
        found.append([rows[0], *rows[2:]])
    return found


def table(heading: str, *header: str) -> list[list[str]]:
    matching = [rows[1:] for rows in tables(heading) if rows[0] == list(header)]
    assert len(matching) == 1, f"expected one table {header} under {heading}"
    assert all(cell for row in matching[0] for cell in row)
    return matching[0]


def columns(heading: str) -> list[tuple[str, str]]:
    return [(name, kind) for name, kind, _ in table(heading, "column", "type", "meaning")]


def declared(schema: pa.Schema) -> list[tuple[str, str]]:
    def word(kind: pa.DataType) -> str:
        return f"list<{kind.value_type}>" if pa.types.is_list(kind) else NAMES.get(str(kind), str(kind))

    return [(field.name, word(field.type)) for field in schema]


@pytest.mark.parametrize(
    ("heading", "schema"),
    [
        ("plan.parquet", contract.PLAN_SCHEMA),
        ("codes/", contract.CODES_SCHEMA),
        ("Sidecar", contract.SIDECAR_SCHEMA),
    ],
)
def test_readme_has_the_columns_of_each_schema(heading: str, schema: pa.Schema) -> None:
    assert columns(heading) == declared(schema)


def test_readme_has_the_columns_of_the_index() -> None:
    assert columns("shards/index.parquet") + columns("Sidecar") == declared(contract.INDEX_SCHEMA)


def test_readme_has_the_fields_of_the_json() -> None:
    found = [(name, kind) for name, kind, _ in table("A sample", "field", "type", "meaning")]
    assert found == [(name, kind.__name__) for name, kind in contract.META_FIELDS.items()]


def test_readme_has_the_members() -> None:
    suffixes = [contract.CODES_SUFFIX, contract.TARGET_SUFFIX, contract.META_SUFFIX]
    assert [name for name, _ in table("A sample", "member", "content")] == [f"KEY.{suffix}" for suffix in suffixes]


def test_readme_has_the_statuses() -> None:
    words = {name: value for name, value in vars(contract).items() if name.isupper() and isinstance(value, str)}
    statuses = {value for name, value in words.items() if not name.endswith(("_SUFFIX", "_NAME"))}
    assert {status for status, _ in table("Statuses", "status", "meaning")} == statuses


def test_readme_has_the_geometry() -> None:
    assert f"# The shard format, version {contract.FORMAT_VERSION}\n" in README
    found = dict(table("Geometry", "unit", "amount"))
    assert found == {
        "tokens": f"1 coarse + 2 middle + 4 fine = {contract.TOKENS}",
        "latent frames": str(contract.LATENT_PER_COARSE),
        "samples at 24 kHz": str(contract.COARSE_24K),
        "samples at 48 kHz": str(contract.COARSE_48K),
        "time": f"{1000 * contract.COARSE_48K / contract.TARGET_RATE:.2f} ms",
    }
    assert contract.TOKENS_PER_COARSE == (1, 2, 4)
    assert f"0 … {contract.CODEBOOK_SIZE - 1}." in README


@pytest.mark.parametrize(
    ("heading", "file"),
    [
        ("plan.parquet", "plan.parquet"),
        ("codes/", "codes/train/000000.parquet"),
        ("Sidecar", "shards/train/000000.parquet"),
        ("shards/index.parquet", "shards/index.parquet"),
    ],
)
def test_readme_has_the_schema_metadata_of_real_files(heading: str, file: str, work: Path) -> None:
    found = {name for name, _ in table(heading, "schema metadata", "meaning")}
    assert found == read_metadata(work / file).keys()


def test_readme_has_the_entries_of_real_fingerprints(work: Path) -> None:
    entries = dict(table("Fingerprints", "entry", "meaning"))
    sidon_only = {name for name, meaning in entries.items() if meaning.endswith("with SIDON only")}
    in_shards_only = {name for name, meaning in entries.items() if meaning.endswith("not in codes")}
    sidecar = read_metadata(work / "shards" / "train" / "000000.parquet")["fingerprint"]
    codes = read_metadata(work / "codes" / "train" / "000000.parquet")["fingerprint"]
    index = read_metadata(work / "shards" / "index.parquet")["fingerprint"]
    assert sidecar.keys() == entries.keys() - sidon_only
    assert codes.keys() == sidecar.keys() - in_shards_only
    assert index == {name: value for name, value in sidecar.items() if name != "plan_rows"}
    versions = {name: meaning for name, meaning in entries.items() if name.endswith("_version")}
    assert versions.keys() == {"codes_version", "format_version", "targets_version"}
    assert all(meaning.startswith(str(sidecar[name])) for name, meaning in versions.items())
