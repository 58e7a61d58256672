"""Typed settings of each command; every number is bounded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from configs.loader import Place, Settings

Gpu = Literal["cpu"] | Annotated[int, Field(ge=0)]
Gpus = Gpu | Annotated[str, Field(pattern=r"^\d+(,\d+)+$")]


class ExecutionSettings(Settings):
    """Who makes the shards. The bytes are the same whoever does."""

    work: Place = Field(description="folder or URL (s3://…) for plan, codes and shards")
    gpu: Gpus = Field(description="number of the GPU, several (0,1,2,3: a process for each), or cpu")
    execute: Literal["local", "ray", "slice"] = Field(
        default="local", description="local: this machine; ray: actors on a Ray cluster; slice: one part of a job array"
    )
    workers: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        description="processes with gpu=cpu, actors with execute=ray (null: one, or one for each GPU)",
    )
    ray_address: str | None = Field(
        default=None, description="of the Ray cluster, such as auto or ray://HOST:10001 (null: a Ray of its own, here)"
    )
    slice_index: int | None = Field(default=None, ge=0, description="which slice this is, from 0, with execute=slice")
    slice_count: int | None = Field(default=None, ge=1, description="how many slices there are, with execute=slice")

    @model_validator(mode="after")
    def _slice_is_one_of_them(self) -> ExecutionSettings:
        index, count = self.slice_index, self.slice_count
        if self.execute == "slice" and (index is None or count is None or index >= count):
            raise ValueError("execute=slice needs slice_count=N and slice_index=I with I from 0 to N − 1")
        if self.execute != "slice" and (index, count) != (None, None):
            raise ValueError("slice_index and slice_count go with execute=slice")
        return self

    def devices(self) -> list[str]:
        return str(self.gpu).split(",")


class CodesSettings(ExecutionSettings):
    """Stage 1: recordings → frozen SNAC 24 kHz → codes (Parquet). Plans first, then skips what is done."""

    audio: Place = Field(
        description="folder of recordings or tars, or a manifest (.parquet, .csv, .jsonl) with a path column; or a URL"
    )
    pretrained_model: str = Field(description="SNAC 24 kHz: hub name or local directory")
    extend: bool = Field(default=False, description="put recordings that the plan does not know into new shards")
    segment_length: float = Field(gt=0, le=60, description="seconds; becomes the nearest whole number of coarse tokens")
    min_seconds: float = Field(ge=0, le=60, description="segments with less real audio are dropped, with a row")
    segments_per_shard: int = Field(ge=1, le=99_999, description="rows of one shard")
    validation_fraction: float = Field(gt=0, lt=1, description="share of the groups kept for validation, by hash")
    group_pattern: str | None = Field(
        default=None, description="regex on the id; its first group names the speaker (null: the parent folder)"
    )
    seed: int = Field(ge=0, lt=2**63, description="of the split and of the order in which recordings fill shards")
    window_seconds: float = Field(ge=1, le=600, description="longest stretch encoded at once")
    batch_seconds: float = Field(ge=1, le=100_000, description="audio of equal length encoded together")
    threads: int = Field(ge=1, le=256, description="that read and decode recordings ahead")
    max_failed_fraction: float = Field(ge=0, le=1, description="the run ends with an error when more segments failed")
    retry: Literal["none", "failed"] = Field(description="failed: make shards with failed segments again")


class TargetsSettings(ExecutionSettings):
    """Stage 2: each segment's codes next to its 48 kHz target → tar shards, sidecars and index.parquet."""

    teacher: Literal["sidon", "recording"] = Field(description="where the 48 kHz target comes from")
    sidon: str = Field(description="SIDON's TorchScript pair: hub name or local directory")
    weights: Path = Field(description="file with revision and sha256 of the model files")
    window_seconds: float = Field(ge=4, le=60, description="longest stretch restored at once, overlap included")
    overlap_seconds: float = Field(ge=0.5, le=10, description="shared by neighbouring windows on each side of a seam")
    min_correlation: float = Field(
        ge=-1, le=1, description="SIDON's targets whose 50 ms envelope correlates less with the recording are rejected"
    )
    target_bits: Literal[16, 24] = Field(description="bits per sample of the FLAC target")
    max_failed_fraction: float = Field(ge=0, le=1, description="the run ends with an error when more segments failed")
    retry: Literal["none", "failed"] = Field(description="failed: make shards with failed segments again")


class InspectSettings(Settings):
    """Print what a plan, codes file, sidecar, index, tar shard or a whole folder of shards holds."""

    path: Path = Field(description="the file or folder")
    rows: int = Field(ge=0, le=1000, description="rows to print")


class VerifySettings(Settings):
    """Check shards: index against sidecars, sizes, sha256, crc32 and every sample against the contract."""

    shards: Path = Field(description="folder with index.parquet")


class PushShardsSettings(Settings):
    """Upload finished shards and their index to a dataset repository of the Hugging Face hub; the index goes last."""

    shards: Path = Field(description="folder with index.parquet")
    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="OWNER/NAME on the hub; made if there is none")
    private: bool = Field(default=True, description="of a repository that is made now")
    dry_run: bool = Field(default=False, description="only print what would go")


class PrefetchSettings(Settings):
    """Download the pinned SNAC and SIDON files and verify their sha256; offline use works afterwards."""

    weights: Path = Field(description="file with revision and sha256 of the model files")


class WorkflowSettings(Settings):
    """Codes, targets and training in one go. What is done is skipped, what was begun goes on."""

    audio: Path = Field(description="folder of recordings, or a manifest")
    work: Path = Field(description="folder for plan, codes and shards")
    run: Path = Field(description="folder for checkpoints, logs and settings of the training")
    pretrained_model: str = Field(description="SNAC 24 kHz: hub name or local directory")
    gpu: Gpus = Field(description="number of the GPU, several (0,1), or cpu")
    codes: dict[str, Any] = Field(default={}, description="further settings of shard-codes, as codes.KEY=VALUE")
    targets: dict[str, Any] = Field(default={}, description="further settings of shard-targets, as targets.KEY=VALUE")
    train: dict[str, Any] = Field(default={}, description="further settings of train, as train.KEY=VALUE")
