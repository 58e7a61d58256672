"""`just push-shards`: finished shards to a dataset repository of the Hugging Face hub, complete or not at all.

Tars and sidecars go first, in commits of some gigabytes; a run that is interrupted goes on where it stopped. The index,
without which readers see no shard, goes in the last commit, with the dataset card.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha1
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from tqdm import tqdm

from codec.hub import check_kept, make_repository, refused
from configs.progress import progress_bar
from pipeline.settings import PushShardsSettings
from pipeline.statuses import COLUMNS, Statuses
from shards.contract import INDEX_NAME, META_FIELDS, OK, SPLITS, SUMS_NAME, TARGET_RATE
from shards.damage import unlisted
from shards.errors import ShardError, UserError, in_markdown
from shards.files import file_sha256
from shards.index import check_index, shard_list
from shards.writer import read_metadata, read_table

COMMIT_FILES, COMMIT_BYTES = 100, 5 << 30
MAX_FILES_IN_A_FOLDER = 10_000  # the hub rejects more
CARD_NAME = "README.md"


@dataclass(frozen=True)
class Upload:
    path: Path
    name: str  # in the repository
    size: int
    sha256: str


def push_shards(settings: PushShardsSettings) -> None:
    """Raises UserError when shards are not finished, when the repository holds others, or when the hub fails."""
    sums = check_index(settings.shards)
    uploads = finished(settings.shards, sums)
    last: list[tuple[str, Path | bytes]] = [(INDEX_NAME, settings.shards / INDEX_NAME)]
    last.append((SUMS_NAME, (settings.shards / SUMS_NAME).read_bytes()))  # as it is now, also where others write it
    card = dataset_card(settings.shards, settings.repo)
    if settings.dry_run:
        for upload in uploads:
            tqdm.write(f"{upload.size:>13,d}  {upload.name}")
        sizes = {name: (settings.shards / name).stat().st_size for name in (INDEX_NAME, SUMS_NAME)}
        for name, size in {**sizes, CARD_NAME: len(card.encode())}.items():
            tqdm.write(f"{size:>13,d}  {name}")
        total = sum(upload.size for upload in uploads) + sum(sizes.values())
        tqdm.write(f"\n{card}\ndry run: {len(uploads) + 3} files, {total / 1e9:.3f} GB would go to {settings.repo}")
        return
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        make_repository(api, settings.repo, "dataset", settings.private)
        _upload(api, settings.repo, _missing(api, settings.repo, uploads))
        check_kept(settings.repo, [upload.name for upload in _missing(api, settings.repo, uploads)])
        if api.file_exists(settings.repo, CARD_NAME, repo_type="dataset"):
            tqdm.write(f"{settings.repo} keeps its {CARD_NAME}; `dry_run=true` prints ours")
        else:
            last.append((CARD_NAME, card.encode()))
        if check_index(settings.shards) != sums:
            raise ShardError(
                f"{settings.shards}: its index was written anew meanwhile: the same command sends the rest"
            )
        _commit(api, settings.repo, last, "Index")
    except UserError:
        raise
    except Exception as error:  # the hub's client raises its own, its transport's and the system's kinds
        raise UserError(
            f"{refused(settings.repo, error)}. Readers see no new shard until the index is there; the same command "
            "goes on"
        ) from error
    tqdm.write(f"{settings.repo}: {len(uploads)} files, then {' and '.join(name for name, _ in last)}")


def finished(folder: Path, sums: Mapping[str, str]) -> list[Upload]:
    """Tar and sidecar of every shard in the index, which `sums` names. Raises ShardError for what is not as it says."""
    shards = shard_list(folder)
    for split in SPLITS:
        files = 2 * sum(of == split for of, _ in shards)
        if files > MAX_FILES_IN_A_FOLDER:
            raise UserError(
                f"{folder / split} holds {files} files, and the hub takes {MAX_FILES_IN_A_FOLDER} in a folder: divide "
                "the corpus into several work folders, or make larger shards (segments_per_shard=)"
            )
    for problem in unlisted(folder, shards):
        raise ShardError(problem)
    uploads = []
    for split, shard in shards:
        tar = folder / split / f"{shard:06d}.tar"
        sidecar = tar.with_suffix(".parquet")
        if not tar.exists() or tar.stat().st_size != read_metadata(sidecar)["tar_bytes"]:
            raise ShardError(f"{tar} is not what its sidecar says: `just verify shards={folder}` lists what is damaged")
        for path in (tar, sidecar):
            name = f"{split}/{path.name}"
            uploads.append(Upload(path, name, path.stat().st_size, sums.get(name, "")))
    return uploads


def _missing(api: Any, repo: str, uploads: Iterable[Upload]) -> list[Upload]:
    """What the repository lacks. Raises UserError where it holds other bytes under the same name."""
    there = {file.path: file for file in api.list_repo_tree(repo, repo_type="dataset", recursive=True)}
    missing = []
    for upload in uploads:
        if upload.name not in there:
            missing.append(upload)
        elif not _same(there[upload.name], upload):
            raise UserError(f"{repo} holds another {upload.name}: shards are never overwritten; take another repo=")
    return missing


def _same(found: Any, upload: Upload) -> bool:
    """By the sha256 of what the hub keeps in its large-file storage; else by git's name for the bytes."""
    if found.lfs:
        return bool(found.lfs.sha256 == upload.sha256)
    data = upload.path.read_bytes()
    return bool(found.blob_id == sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest())


def _upload(api: Any, repo: str, missing: list[Upload]) -> None:
    total = sum(upload.size for upload in missing)
    with progress_bar(total=total, desc="uploading", unit="B", unit_scale=True) as bar:
        for batch in _batches(missing):
            _check(batch)
            names = f"{batch[0].name} … {batch[-1].name}"
            _commit(api, repo, [(upload.name, upload.path) for upload in batch], f"Shards {names}")
            bar.update(sum(upload.size for upload in batch))


def _check(batch: Iterable[Upload]) -> None:
    """Raises ShardError for damage that has the right size: what is published stays, and is never overwritten."""
    for upload in batch:
        if file_sha256(upload.path) != upload.sha256:
            raise ShardError(f"{upload.path} is not what {SUMS_NAME} says: `just verify` lists what is damaged")


def _batches(uploads: Iterable[Upload]) -> Iterator[list[Upload]]:
    batch: list[Upload] = []
    for upload in uploads:
        if len(batch) == COMMIT_FILES or (batch and sum(u.size for u in batch) + upload.size > COMMIT_BYTES):
            yield batch
            batch = []
        batch.append(upload)
    if batch:
        yield batch


def _commit(api: Any, repo: str, files: Iterable[tuple[str, Path | bytes]], message: str) -> None:
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(name, path_or_fileobj=content) for name, content in files]
    api.create_commit(repo, operations, commit_message=message, repo_type="dataset")


def dataset_card(folder: Path, repo: str) -> str:
    """What the shards hold, in figures of their own index."""
    index = read_table(folder / INDEX_NAME, columns=["split", "n_samples", "group", *COLUMNS])
    made_from = read_metadata(folder / INDEX_NAME)["fingerprint"]
    usable = index.filter(pc.field("status") == OK)
    splits, lines = [split for split in SPLITS if split in usable["split"].unique().to_pylist()], []
    for split in SPLITS:
        rows = usable.filter(pc.field("split") == split)
        hours = (pc.sum(rows["n_samples"]).as_py() or 0) / TARGET_RATE / 3600
        lines.append(f"| {split} | {len(rows)} | {hours:.2f} | {len(rows['group'].unique())} |")
    found = Statuses()
    found.add(index)
    statuses = ", ".join(f"{n} {name}" for name, n in found.counts().most_common())
    return CARD.format(
        repo=repo,
        fields="\n".join(FIELD.format(name=name, dtype=DTYPES[kind]) for name, kind in META_FIELDS.items()),
        configs="\n".join(SPLIT_FILES.format(split=split) for split in splits),
        table="\n".join(lines),
        statuses=in_markdown(statuses),
        teacher=in_markdown(str(made_from["teacher"])),
        snac=in_markdown(str(made_from["snac"])),
    )


SPLIT_FILES = """\
  - split: {split}
    path: {split}/*.tar"""
DTYPES = {int: "int64", float: "float64", str: "string"}  # of the json's fields, in the words of `datasets`
FIELD = """\
    - name: {name}
      dtype: {dtype}"""
# Features are told because `datasets` would learn them from the first tar of a split, which may hold no sample.
CARD = """---
tags:
- audio
- snac
- webdataset
dataset_info:
  features:
  - name: codes.npy
    sequence: int16
  - name: target.flac
    audio:
      sampling_rate: 48000
  - name: json
    struct:
{fields}
  - name: __key__
    dtype: string
  - name: __url__
    dtype: string
configs:
- config_name: default
  data_files:
{configs}
---
# SNAC 24 kHz tokens and their 48 kHz targets

Each sample is a stretch of speech: its tokens of the SNAC 24 kHz codec, and its 48 kHz audio.

- codes by: {snac}
- targets by: {teacher}
- segments attempted: {statuses}; each has a row in `index.parquet`, with a reason if it has no sample

| split | segments | hours | speakers or folders |
|-|-|-|-|
{table}

`index.parquet` lists the shards; a tar that it does not list belongs to an unfinished upload. Plain
`webdataset`, `pyarrow` and `soundfile` read everything:

```python
import webdataset

url = "https://huggingface.co/datasets/{repo}/resolve/main/train/000000.tar"
for sample in webdataset.WebDataset(url, shardshuffle=False):
    print(sample["__key__"], sorted(name for name in sample if not name.startswith("__")))
```

For a private repository, this URL does not work. Once signed in, download everything with
`hf download {repo} --repo-type dataset --local-dir corpus` (add `--revision COMMIT` for an earlier state), and read
`corpus/train/000000.tar` instead of the URL.
`datasets.load_dataset("{repo}")` reads the samples too; it needs `pip install "datasets[audio]"`.

The licence of the recordings is that of their source; state it here before you publish.
"""
