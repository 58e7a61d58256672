"""Typed settings of each command; every number is bounded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from configs.loader import Settings

Gpu = Literal["cpu"] | Annotated[int, Field(ge=0)]
Gpus = Gpu | Annotated[str, Field(pattern=r"^\d+(,\d+)+$")]


class TrainSettings(Settings):
    """Fit the 48 kHz decoder to shards. Phase 1 fits the new layers, phase 2 the whole decoder."""

    shards: Path = Field(description="folder with index.parquet")
    run: Path = Field(description="folder for checkpoints, logs and settings")
    pretrained_model: str = Field(description="SNAC 24 kHz that made the codes: hub name or local directory")
    gpu: Gpus = Field(description="number of the GPU, several (0,1,2,3), or cpu")
    batch_size: int = Field(ge=1, le=65_536, description="crops of one step over all GPUs")
    micro_batch_size: int | None = Field(default=None, ge=1, description="crops at once on one GPU (null: all)")
    num_epochs: float = Field(gt=0, le=100_000, description="passes over the training split")
    max_steps: int | None = Field(default=None, ge=1, description="stop after so many steps (null: num_epochs says)")
    learning_rate: float = Field(gt=0, le=1, description="of AdamW")
    segment_length: float = Field(gt=0, le=60, description="crop in seconds; becomes whole coarse tokens")
    l1_weight: float = Field(ge=0, le=1000, description="weight of the waveform's mean absolute error")
    stft_weight: float = Field(ge=0, le=1000, description="weight of the multi-scale STFT magnitude error")
    n_ffts: tuple[Annotated[int, Field(ge=16, le=65_536)], ...] = Field(min_length=1, description="STFT window sizes")
    phase1_steps: int = Field(ge=0, description="steps in which only the new layers learn")
    gradient_clip: float = Field(gt=0, le=1e6, description="largest gradient norm")
    noise: Literal["zero", "keep"] = Field(
        description="SNAC's noise blocks: zero makes the decoder deterministic, keep leaves them as they are"
    )
    seed: int = Field(ge=0, lt=2**63, description="of order, crops and the new layers' free channels")
    window_shards: int = Field(ge=1, le=10_000, description="shards among which samples are shuffled")
    num_workers: int = Field(ge=0, le=256, description="processes that read and decode ahead, per GPU")
    eval_batch_size: int = Field(ge=1, le=65_536, description="crops at once in validation")
    eval_samples: int = Field(ge=1, description="fixed validation crops, at most")
    eval_every: int = Field(ge=1, description="steps between validations")
    checkpoint_every: int = Field(ge=1, description="steps between checkpoints")
    keep_last: int = Field(ge=1, description="checkpoints kept beside the best")
    log_every: int = Field(ge=1, description="steps between lines of metrics.jsonl")
    resume: Literal["auto", "never"] = Field(description="auto: go on from the run's newest checkpoint, if any")


class ModelSettings(Settings):
    model: Path = Field(description="a run, a checkpoint (.pt) or an exported directory")
    pretrained_model: str | None = Field(
        default=None, description="where the checkpoint's SNAC 24 kHz lies now (null: where it was)"
    )


class DecodeSettings(ModelSettings):
    """A recording or a codes file (flat int16 .npy, as in shards) → a 48 kHz WAV of exactly its length."""

    input: Path = Field(description="recording, or .npy with T + 2T + 4T tokens")
    output: Path | None = Field(default=None, description="WAV to write (null: INPUT.48k.wav)")
    gpu: Gpu = Field(description="number of the GPU, or cpu")
    window_seconds: float = Field(ge=1, le=600, description="longest stretch encoded, or decoded on a GPU, at once")
    stream: bool = Field(description="frame by frame, as a speech model gives them; reports latency and speed")
    lookahead_frames: int = Field(
        ge=0, le=3, description="with stream: frames waited for; 3 is exact, fewer are sooner"
    )


class ExportSettings(ModelSettings):
    """Write a directory that the stock `snac` package loads and whose decode(codes) returns 48 kHz audio."""

    out: Path = Field(description="directory to make")
    fold: bool = Field(description="decoder_only.safetensors with weight norm folded into the kernels")
    license: str | None = Field(default=None, description="licence of the new decoder's weights, for the model card")


class ExportOnnxSettings(ModelSettings):
    """Write decoder and encoder as ONNX with dynamic batch and length; the decoder in half precision too."""

    out: Path = Field(description="directory to make")


class WebSettings(ModelSettings):
    """Write a static page that decodes a codes file to 48 kHz on its visitor's machine."""

    out: Path = Field(description="directory to make")
    package: Path | None = Field(default=None, description="onnxruntime-web's .tgz (null: npm fetches it)")


class PushSettings(Settings):
    """Upload an exported directory to the Hugging Face hub, in one commit."""

    model: Path = Field(description="directory made by `just export` or `just export-onnx`")
    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="repository on the hub: USER/NAME")
    private: bool = Field(description="whether a repository that is made now is private")
    dry_run: bool = Field(description="only print what would be uploaded")


class EvalSettings(ModelSettings):
    """Log-spectral distances on the validation split: stock SNAC + sinc, untrained warm start, trained decoder."""

    shards: Path = Field(description="folder with index.parquet")
    gpu: Gpu = Field(description="number of the GPU, or cpu")
    samples: int = Field(ge=1, description="fixed validation crops, at most")
    segment_length: float = Field(gt=0, le=60, description="crop in seconds")
    seed: int = Field(ge=0, lt=2**63, description="of the choice of crops and the warm start")
