"""Whatever is damaged in a folder of shards is found."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from shards.contract import FORMAT_VERSION, SIDECAR_SCHEMA
from shards.errors import ShardError
from shards.files import file_sha256
from shards.index import compact, load, read_sums, shard_list, write_sums
from shards.writer import read_metadata, write_table
from tests.command_helpers import in_process, refused
from tests.helpers import codes_words, targets_words
from tests.shard_helpers import all_problems, flip


def flip_data(shards: Path, random: np.random.Generator) -> None:
    path = shards / "train" / "000000.tar"
    with tarfile.open(path) as tar:
        info = tar.getmembers()[int(random.integers(len(tar.getmembers())))]
    flip(path, info.offset_data + int(random.integers(info.size)), int(random.integers(8)))


def flip_header(shards: Path, random: np.random.Generator) -> None:
    path = shards / "train" / "000000.tar"
    with tarfile.open(path) as tar:
        info = tar.getmembers()[int(random.integers(len(tar.getmembers())))]
    flip(path, info.offset + int(random.integers(512)), int(random.integers(8)))


def flip_padding(shards: Path, random: np.random.Generator) -> None:
    path = shards / "train" / "000000.tar"
    flip(path, path.stat().st_size - 1 - int(random.integers(1024)), int(random.integers(8)))


def cut_tar(shards: Path, random: np.random.Generator) -> None:
    path = shards / "train" / "000000.tar"
    os.truncate(path, int(random.integers(path.stat().st_size)))


def lengthen_tar(shards: Path, random: np.random.Generator) -> None:
    with (shards / "train" / "000000.tar").open("ab") as file:
        file.write(bytes(512))


def remove_tar(shards: Path, random: np.random.Generator) -> None:
    (shards / "train" / "000000.tar").unlink()


def swap_tars(shards: Path, random: np.random.Generator) -> None:
    a, b, c = (shards / "train" / name for name in ("000000.tar", "000001.tar", "between"))
    a.rename(c)
    b.rename(a)
    c.rename(b)


def swap_shards(shards: Path, random: np.random.Generator) -> None:
    swap_tars(shards, random)
    a, b, c = (shards / "train" / name for name in ("000000.parquet", "000001.parquet", "between"))
    a.rename(c)
    b.rename(a)
    c.rename(b)


def remove_sidecar(shards: Path, random: np.random.Generator) -> None:
    (shards / "train" / "000000.parquet").unlink()


def cut_sidecar(shards: Path, random: np.random.Generator) -> None:
    path = shards / "train" / "000000.parquet"
    os.truncate(path, int(random.integers(path.stat().st_size)))


def drop_a_row(shards: Path, random: np.random.Generator) -> None:
    path = shards / "train" / "000000.parquet"
    table = pq.read_table(path)
    row = int(random.integers(table.num_rows))
    pq.write_table(pa.concat_tables([table.slice(0, row), table.slice(row + 1)]), path)


def drop_a_column(shards: Path, random: np.random.Generator) -> None:
    path = shards / "train" / "000000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns([table.column_names[int(random.integers(table.num_columns))]]), path)


def widen_a_column(shards: Path, random: np.random.Generator) -> None:
    path = shards / "train" / "000000.parquet"
    table = pq.read_table(path)
    place = table.column_names.index("n_samples")
    pq.write_table(table.set_column(place, "n_samples", table["n_samples"].cast(pa.int64())), path)


def edit_value(path: Path, column: str, row: int) -> None:
    """As a well-meaning hand would."""
    table = pq.read_table(path)
    field = table.schema.field(column)
    values = table[column].to_pylist()
    other = {"string": "edited", "float": 0.25, "double": 0.25}.get(str(field.type), 1)
    values[row] = None if values[row] == other else other
    changed = table.set_column(table.column_names.index(column), field, pa.array(values, field.type))
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), path)


def lose_metadata(shards: Path, random: np.random.Generator) -> None:
    path = shards / "train" / "000000.parquet"
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)


def index_of_another_set(shards: Path, random: np.random.Generator) -> None:
    path = shards / "train" / "000001.parquet"
    kept = path.read_bytes()
    edit_value(path, "crc32", 1)
    compact(shards, shard_list(shards))
    path.write_bytes(kept)


def index_of_fewer_shards(shards: Path, random: np.random.Generator) -> None:
    compact(shards, shard_list(shards)[:-1])


def index_of_more_shards(shards: Path, random: np.random.Generator) -> None:
    for suffix in (".tar", ".parquet"):
        (shards / "train" / "000002").with_suffix(suffix).unlink()


DAMAGES: list[tuple[Callable[[Path, np.random.Generator], None], int]] = [
    (flip_data, 8),
    (flip_header, 8),
    (flip_padding, 4),
    (cut_tar, 6),
    (lengthen_tar, 1),
    (remove_tar, 1),
    (swap_tars, 1),
    (swap_shards, 1),
    (remove_sidecar, 1),
    (cut_sidecar, 6),
    (drop_a_row, 3),
    (drop_a_column, 3),
    (widen_a_column, 1),
    (lose_metadata, 1),
    (index_of_another_set, 1),
    (index_of_fewer_shards, 1),
    (index_of_more_shards, 1),
]


@pytest.mark.parametrize(("damage", "times"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_damage_is_always_found(
    damage: Callable[[Path, np.random.Generator], None], times: int, work: Path, tmp_path: Path
) -> None:
    for seed in range(times):
        shards = Path(shutil.copytree(work / "shards", tmp_path / str(seed)))
        assert all_problems(shards) == []
        damage(shards, np.random.default_rng(seed))
        found = all_problems(shards)
        assert found, f"seed {seed}"
        assert all("\n" not in problem and problem.startswith(str(shards)) for problem in found)


@pytest.mark.parametrize("column", SIDECAR_SCHEMA.names)
def test_an_edited_value_of_any_column_is_found(column: str, shards: Path) -> None:
    path = shards / "train" / "000000.parquet"
    edit_value(path, column, SIDECAR_SCHEMA.names.index(column) % pq.read_metadata(path).num_rows)
    assert all_problems(shards) == [
        f"{path}: its sha256 is not that of SHA256SUMS",
        f"{path}: its rows are not those of the index",
    ]


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("format_version", 99, "000000.parquet has format 99, this version reads 2"),
        ("tar_bytes", 512, "bytes, its sidecar says 512"),
        ("tar_sha256", "0", "000000.tar: its sha256 is not the sidecar's"),
        ("fingerprint", {"target_bits": 24}, "000000.parquet: made by another run than the index"),
    ],
)
def test_edited_metadata_is_found(key: str, value: object, problem: str, shards: Path) -> None:
    path = shards / "train" / "000000.parquet"
    write_table(path, pq.read_table(path), {**read_metadata(path), key: value})
    assert problem in all_problems(shards)[-1]


def test_each_damaged_sample_is_named(shards: Path) -> None:
    index = load(shards, "train")
    rows = index.table.filter(pc.field("shard") == 0).to_pylist()
    for row in rows[1:4]:
        flip(shards / "train" / "000000.tar", row["offset"] + 512 + 128, 0)  # a token, which stays one
    found = "\n".join(all_problems(shards))
    assert [key for key in index.table["key"].to_pylist() if key in found] == [row["key"] for row in rows[1:4]]


def test_a_damaged_index_is_an_error_of_one_kind(shards: Path) -> None:
    path = shards / "index.parquet"
    good = path.read_bytes()
    reference = load(shards, "train").table
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        flip(path, int(random.integers(len(good))), int(random.integers(8)))
        try:
            intact = load(shards, "train").table.equals(reference)
        except ShardError as error:
            assert str(path) in str(error)  # noqa: PT017
            refused += 1
        else:
            assert intact or all_problems(shards)
        path.write_bytes(good)
    assert refused > 10


def test_an_index_of_other_columns_is_refused(shards: Path) -> None:
    path = shards / "index.parquet"
    table = pq.read_table(path)
    changed = table.rename_columns({"crc32": "crc38"})
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), path)
    write_sums(shards, {**read_sums(shards), path.name: file_sha256(path)})
    with pytest.raises(ShardError, match="crc32 is uint32, now None"):
        load(shards, "train")


def test_an_index_of_another_format_is_refused(shards: Path) -> None:
    path = shards / "index.parquet"
    write_table(path, pq.read_table(path), {**read_metadata(path), "format_version": 99})
    with pytest.raises(ShardError, match="format 99, this version reads 2"):
        load(shards, "train")
    write_table(path, pq.read_table(path), {"format_version": FORMAT_VERSION})
    with pytest.raises(ShardError, match=r"index\.parquet: its sha256 is not that of SHA256SUMS"):
        load(shards, "train")
    (shards / "SHA256SUMS").write_text("no sums\n")
    with pytest.raises(ShardError, match="SHA256SUMS: damaged, or not made by"):
        load(shards, "train")
    (shards / "SHA256SUMS").unlink()
    with pytest.raises(ShardError, match="SHA256SUMS is missing"):
        load(shards, "train")
    path.unlink()
    with pytest.raises(ShardError, match=r"index\.parquet is missing"):
        load(shards, "train")


def test_folder_names_that_look_like_columns_add_none(work: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(work / "shards", tmp_path / "speaker=1" / "shards"))
    assert all_problems(shards) == []
    assert load(shards, "train").table.equals(load(work / "shards", "train").table)


@pytest.mark.parametrize("name", ["plan.parquet", "codes/train/000000.parquet", "shards/train/000000.parquet"])
def test_a_table_that_a_power_cut_emptied_is_said_and_made_again(
    name: str, recordings: Path, work: Path, tmp_path: Path
) -> None:
    mine = Path(shutil.copytree(work, tmp_path / "work"))
    words = targets_words(mine) if name.startswith("shards") else codes_words(recordings, mine)
    whole = (mine / name).read_bytes()
    (mine / name).write_bytes(b"")
    refused(words, f"{mine / name}: damaged, or no file of ours (Parquet file size is 0 bytes): if it is ours, delete")
    (mine / name).unlink()
    assert in_process(words).exit_code == 0
    assert (mine / name).read_bytes() == whole
