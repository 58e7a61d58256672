"""Typed settings of each command; every number is bounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from configs.loader import FOLDER, Gpu, Gpus, Local, Place, Settings
from shards.storage import Location, Url


def _no_repository(work: Location) -> Location:
    if str(work).startswith("hf://"):
        raise ValueError(
            "every file in a repository of the hub is a commit, and shards are many: make them elsewhere, then "
            "`just push-shards`"
        )
    return work


Work = Annotated[Place, AfterValidator(_no_repository)]
NO_SPEAKER = "none"
Threads = Literal["auto"] | Annotated[int, Field(ge=1, le=256)]


class ExecutionSettings(Settings):
    """Which processes make the shards, and how failures are handled. The bytes do not depend on the processes."""

    work: Work = Field(description="folder or URL (s3://…) for plan, codes and shards")
    gpu: Gpus = Field(description="number of the GPU, several (0,1,2,3: a process for each), or cpu")
    execute: Literal["local", "ray", "slice"] = Field(
        default="local", description="local: this machine; ray: actors on a Ray cluster; slice: one part of a job array"
    )
    workers: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        description="number of processes with gpu=cpu, of actors with execute=ray (null: one, or one for each GPU)",
    )
    ray_address: str | None = Field(
        default=None,
        description="of the Ray cluster, such as auto or ray://HOST:10001 (null: start one on this machine)",
    )
    slice_index: int | None = Field(default=None, ge=0, description="which slice this is, from 0, with execute=slice")
    slice_count: int | None = Field(default=None, ge=1, description="how many slices there are, with execute=slice")
    max_failed_fraction: float = Field(ge=0, le=1, description="end with an error if a larger share of segments failed")
    retry: Literal["none", "failed"] = Field(description="failed: retry the segments that failed")

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

    def of_one(self, gpu: str | int) -> Self:
        """What a process is told that makes shards on this device for others."""
        gpu = gpu if gpu == "cpu" else int(gpu)
        return self.model_copy(update={"execute": "local", "workers": None, "gpu": gpu})


class CodesSettings(ExecutionSettings):
    """Stage 1: recordings → frozen SNAC 24 kHz → codes (Parquet). Plans first, then skips what is done."""

    audio: Place = Field(
        description="folder of recordings or tars, or a manifest (.parquet, .csv, .jsonl) with a path column; or a URL"
    )
    pretrained_model: str = Field(description="SNAC 24 kHz: hub name or local directory")
    extend: bool = Field(
        default=False, description="put recordings that came later, or could not be read before, into new shards"
    )
    segment_length: float = Field(gt=0, le=60, description="seconds; becomes the nearest whole number of coarse tokens")
    min_seconds: float = Field(ge=0, le=60, description="segments with less real audio are dropped, with a row")
    segments_per_shard: int = Field(ge=1, le=99_999, description="rows of one shard")
    validation_fraction: float = Field(gt=0, lt=1, description="share of the groups kept for validation, by hash")
    group_pattern: str | None = Field(
        default=None, description="regex on the id; its first group names the speaker (null: the parent folder)"
    )
    seed: int = Field(ge=0, lt=2**63, description="seed of the split and of the order in which recordings fill shards")
    window_seconds: float = Field(ge=1, le=600, description="longest stretch encoded at once, seconds")
    batch_seconds: float = Field(ge=1, le=100_000, description="seconds of audio of equal length encoded together")
    threads: Threads = Field(description="threads that read recordings ahead; auto: one per core, at least 4")

    @model_validator(mode="after")
    def _shards_are_no_recordings(self) -> CodesSettings:
        work, audio = (place.resolve() if isinstance(place, Path) else place for place in (self.work, self.audio))
        if f"{work}/".startswith(f"{audio}/"):
            raise ValueError(
                f"work={self.work} lies in audio={self.audio}, where shards would be taken for recordings: choose a "
                "folder beside it"
            )
        return self


class SidonSettings(Settings):
    """SIDON's weights, and how recordings go through it."""

    sidon_backend: Literal["torchscript", "native"] = Field(description="published TorchScript pair, or raw weights")
    sidon: str = Field(description="TorchScript pair: hub name or local directory")
    sidon_raw: str = Field(description="raw weights (adapter and decoder): hub name or local directory")
    sidon_base: str = Field(description="w2v-BERT 2.0 below the adapter: hub name or local directory")
    sidon_precision: Literal["auto", "fp32", "bf16"] = Field(
        description="precision of the raw weights; auto: bf16 on a GPU where it stays within −40 dB of fp32, "
        "and within −20 dB from 12 kHz on"
    )
    delay_samples: int = Field(
        ge=0, le=934, description="samples at 48 kHz to remove from SIDON's output; calibrate measures what is left"
    )
    weights: Local = Field(description="file with revision and sha256 of the model files")
    window_seconds: float = Field(ge=4, le=60, description="longest stretch restored at once, with overlap, seconds")
    overlap_seconds: float = Field(ge=0.5, le=10, description="what neighbouring windows share on each side of a seam")
    batch_seconds: float = Field(ge=1, le=10_000, description="seconds of audio of similar length restored together")

    @model_validator(mode="after")
    def _windows_advance(self) -> SidonSettings:
        if self.window_seconds < 2 * self.overlap_seconds + 1:
            raise ValueError(
                f"window_seconds={self.window_seconds:g} must be 1 s more than twice "
                f"overlap_seconds={self.overlap_seconds:g}"
            )
        return self


class JudgeSettings(Settings):
    """Limits for targets. A segment that breaks one is rejected: it keeps its row, with the reason."""

    min_correlation: float = Field(
        ge=-1, le=1, description="least correlation between the envelopes of target and recording"
    )
    max_lag_samples: float = Field(gt=0, le=2400, description="largest lag behind or ahead of the recording, at 48 kHz")
    max_level_difference_db: float = Field(
        gt=0, le=60, description="largest difference from the recording, 100 Hz to 8 kHz"
    )
    max_clipped_fraction: float = Field(ge=0, le=1, description="largest share of samples at or beyond full scale")
    min_speech_share: float = Field(ge=0, le=1, description="least share of a segment that is not silence")
    min_target_bandwidth_hz: float = Field(ge=0, le=24_000, description="least bandwidth of a target (0: any)")


class DoctorSettings(SidonSettings, JudgeSettings):
    """Check the real models on this machine: files, tokens, delay, level, seams, speed; and say what to do."""

    audio: Local | None = Field(default=None, description="folder of recordings (null: voices made by code)")
    gpu: Gpu = Field(description="number of the GPU, or cpu")
    recordings: int = Field(ge=3, le=100, description="number of recordings that go through the models")
    pretrained_model: str = Field(description="SNAC 24 kHz: hub name or local directory")
    forms: Literal["both", "torchscript", "native"] = Field(description="which forms of SIDON's weights to check")
    work: Local = Field(description="folder for plan, codes and shards; its disk is checked for space")
    corpus_hours: float = Field(gt=0, le=10_000_000, description="hours of your recordings, to estimate disk and time")


class TargetsSettings(ExecutionSettings, SidonSettings, JudgeSettings):
    """Stage 2: each segment's codes next to its 48 kHz target → tar shards, sidecars and index.parquet."""

    teacher: Literal["sidon", "recording", "auto", "hybrid"] = Field(
        description="where targets come from; auto: recordings that reach min_bandwidth_hz stay, others are restored; "
        "hybrid: the recording below crossover_hz, SIDON above"
    )
    min_bandwidth_hz: float = Field(
        ge=0, le=24_000, description="auto: a recording whose measured bandwidth reaches it is its own target"
    )
    crossover_hz: float = Field(
        ge=2000, le=20_000, description="hybrid: where SIDON takes over; recordings that do not reach it are restored"
    )
    calibrate_recordings: int = Field(ge=4, le=1000, description="recordings that a run with SIDON measures first")
    target_bits: Literal[16, 24] = Field(description="bits per sample of the FLAC target")
    threads: Threads = Field(
        description="threads that read recordings and that judge and compress targets; auto: one per core, at least 4"
    )


class CalibrateSettings(TargetsSettings):
    """Measure delay, level and coherence of targets on some recordings of a plan. Makes no shards."""


class InspectSettings(Settings):
    """Print what is in a plan, codes file, sidecar, index, tar shard or a whole folder of shards."""

    path: Local = Field(description="the file or folder")
    picture: Local | None = Field(default=None, description="PNG of a folder's distributions and spectrograms")
    rows: int = Field(ge=0, le=1000, description="rows to print, failed ones first")


class VerifySettings(Settings):
    """Check shards: index against sidecars, sizes, sha256, crc32 and every sample against the contract."""

    shards: Place = Field(description="folder or URL (s3://…) with index.parquet")
    threads: Threads = Field(description="threads that read and check shards; auto: one per core, at least 4")
    set_aside: bool = Field(
        default=False, description="move damaged shards to shards/damaged, and write an index without them"
    )

    @model_validator(mode="after")
    def _what_is_moved_is_here(self) -> VerifySettings:
        if self.set_aside and isinstance(self.shards, Url):
            raise ValueError(f"set_aside=true moves files of a folder on this machine, not of {self.shards}")
        return self


class PushShardsSettings(Settings):
    """Upload finished shards and their index to a dataset repository of the Hugging Face hub; the index goes last."""

    shards: Local = Field(description="folder with index.parquet")
    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="OWNER/NAME on the hub; made if there is none")
    private: bool = Field(default=True, description="whether a repository that is made now is private")
    dry_run: bool = Field(default=False, description="only print what would be uploaded")


class PackParquetSettings(Settings):
    """Recordings inside Parquet, as datasets of the hub hold them → tars for shard-codes. Tars that stand are kept."""

    audio: Place = Field(description="folder, file or URL (hf://datasets/OWNER/NAME) of Parquet with audio in a column")
    out: Local = Field(description="folder for the tars, one for each Parquet file")
    speaker: str = Field(description=f"column that names the speaker, or {NO_SPEAKER}")
    column: str = Field(description="column with the audio: bytes, or a struct of bytes and path")


class PrefetchSettings(Settings):
    """Download the pinned SNAC and SIDON files and verify their sha256; offline use works afterwards."""

    sidon_backend: Literal["torchscript", "native"] = Field(description="published TorchScript pair, or raw weights")
    weights: Local = Field(description="file with revision and sha256 of the model files")


class WorkflowSettings(Settings):
    """Codes, targets and training in one command. What is done is skipped, what was started continues."""

    audio: Place = Field(description="folder of recordings, or a manifest; or a URL")
    work: Work = Field(description="folder or URL (s3://…) for plan, codes and shards")
    run: Local = Field(description="folder for checkpoints, logs and settings of the training")
    pretrained_model: str = Field(description="SNAC 24 kHz: hub name or local directory")
    gpu: Gpus = Field(description="number of the GPU, several (0,1), or cpu")
    codes: dict[str, Any] = Field(default={}, description="further settings of shard-codes, as codes.KEY=VALUE")
    targets: dict[str, Any] = Field(default={}, description="further settings of shard-targets, as targets.KEY=VALUE")
    train: dict[str, Any] = Field(default={}, description="further settings of train, as train.KEY=VALUE")

    @classmethod
    def hint(cls, key: str, value: Any) -> str:
        if isinstance(value, dict):
            return ""
        trained = json.loads((FOLDER / "decoder_48khz.json").read_text())  # all that codes and targets have in common
        having = {"codes": CodesSettings.model_fields, "targets": TargetsSettings.model_fields, "train": trained}
        steps = [step for step, keys in having.items() if key in keys] or ["train"]
        return f"; a setting of one step is written {' or '.join(f'{step}.{key}=' for step in steps)}"
