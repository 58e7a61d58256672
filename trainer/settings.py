"""Typed settings of each command; every number is bounded."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from configs.loader import Gpu, Gpus, Local, Place, Settings
from shards.storage import Location

BETAS = (0.8, 0.99)  # of AdamW, as vocoders use them (HiFi-GAN, DAC)


class TrainSettings(Settings):
    """Fit the 48 kHz decoder to shards. Phase 1 fits the new layers, phase 2 the whole decoder."""

    shards: Annotated[tuple[Place, ...], Field(min_length=1)] | Place = Field(
        description='folder with index.parquet, here or at a URL; or several: ["a", "b"]'
    )
    shard_weights: tuple[Annotated[int, Field(ge=1, le=1000)], ...] | None = Field(
        default=None, description="several folders: crops of each in every Σ weights crops (null: by their sizes)"
    )
    cache: Local | None = Field(default=None, description="where shards from URLs are kept (null: in the user's cache)")
    cache_gib: float = Field(gt=0, description="largest size of this cache in GiB, on each machine")
    run: Local = Field(description="folder for checkpoints, logs and settings")
    pretrained_model: str = Field(description="SNAC 24 kHz that made the codes: hub name or local directory")
    init_from: Local | None = Field(
        default=None, description="run, checkpoint or export whose decoder to start from (null: the warm start)"
    )
    gpu: Gpus = Field(description="number of the GPU, several (0,1,2,3), or cpu")

    batch_size: int = Field(ge=1, le=65_536, description="global batch: crops of one step over all GPUs")
    micro_batch: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        description="crops at once on one GPU; auto: all, halved when memory runs out (on a CPU: 8 s of audio)"
    )
    num_epochs: float = Field(gt=0, le=100_000, description="passes over the training split")
    max_steps: int | None = Field(default=None, ge=1, description="stop after this many steps (null: after num_epochs)")
    phase1_steps: int = Field(ge=0, description="first steps, in which only the new layers learn")
    phase1_epochs: float | None = Field(
        default=None, ge=0, le=100_000, description="the same in epochs (null: use phase1_steps)"
    )
    segment_length: float = Field(gt=0, le=60, description="crop in seconds; becomes whole coarse tokens")
    segment_schedule: tuple[tuple[Annotated[int, Field(ge=0)], Annotated[float, Field(gt=0, le=60)]], ...] = Field(
        default=(), description="crops of another length: [[0, 1.0], [20000, 4.0]] from steps 0 and 20000 on; batches "
        "change so that a step holds the same audio"
    )  # fmt: skip
    precision: Literal["auto", "fp32", "bf16"] = Field(
        description="of the stock layers and discriminators, the rest is fp32; auto: bf16 on a GPU that has it"
    )
    compile: Literal["auto"] | bool = Field(description="torch.compile of the decoder; auto: on a GPU")

    learning_rate: float = Field(gt=0, le=1, description="learning rate of AdamW")
    final_rate: float = Field(ge=0, le=1, description="where the cosine ends, as share of learning_rate (1: constant)")
    warmup_steps: int = Field(ge=0, description="steps in which the learning rate of each phase rises")
    gradient_clip: float = Field(gt=0, le=1e6, description="largest gradient norm")
    ema_decay: float = Field(ge=0, lt=1, description="decay of the EMA of weights, which is what is validated and kept")
    noise: Literal["zero", "keep"] = Field(
        description="SNAC's noise blocks: zero makes the decoder deterministic, keep leaves them as they are"
    )

    l1_weight: float = Field(ge=0, le=1000, description="weight of the waveform's mean absolute error")
    stft_weight: float = Field(ge=0, le=1000, description="weight of the multi-scale STFT magnitude error")
    log_stft_weight: float = Field(ge=0, le=1000, description="weight of the multi-scale STFT log-magnitude error")
    mel_weight: float = Field(ge=0, le=1000, description="weight of the multi-scale log-mel error")
    n_ffts: tuple[Annotated[int, Field(ge=16, le=65_536)], ...] = Field(min_length=1, description="STFT window sizes")

    adversarial_weight: float = Field(ge=0, le=1000, description="weight of the adversarial loss (0: none)")
    feature_weight: float = Field(ge=0, le=1000, description="weight of the feature matching loss")
    balance_losses: bool = Field(description="make the weights shares of the gradient's norm, like EnCodec's balancer")
    discriminator_start: int = Field(ge=0, description="first steps, in which only the discriminators learn")
    discriminator_learning_rate: float = Field(gt=0, le=1, description="learning rate of the discriminators' AdamW")
    discriminator_clip: float = Field(gt=0, le=1e6, description="largest gradient norm of the discriminators")
    mpd_periods: tuple[Annotated[int, Field(ge=2, le=512)], ...] = Field(
        description="periods of the multi-period discriminators"
    )
    mpd_channels: int = Field(ge=1, le=256, description="channels of their first layer; the last has 32 times as many")
    mrd_n_ffts: tuple[Annotated[int, Field(ge=64, le=65_536)], ...] = Field(
        description="multi-band spectrogram discriminators: their STFT windows"
    )
    mrd_channels: int = Field(ge=1, le=512, description="channels of their layers")

    seed: int = Field(ge=0, lt=2**63, description="seed of order, crops and the free channels of the new layers")
    window_shards: int = Field(ge=1, le=10_000, description="shards among which samples are shuffled")
    num_workers: int = Field(ge=0, le=256, description="processes that read and decode ahead, per GPU")

    eval_batch_size: int = Field(ge=1, le=65_536, description="crops decoded at once in validation")
    eval_samples: int = Field(ge=1, description="largest number of validation crops, which are fixed")
    eval_every: int = Field(ge=1, description="steps between validations")
    best_metric: Literal["loss", "lsd", "lsd_hf", "lsd_lf", "lsd_hf_reached", "mel_distance", "si_sdr_lf_db"] = Field(
        description="which validation score makes best.pt"
    )
    patience: int | None = Field(default=None, ge=1, description="stop after this many validations without a new best")
    checkpoint_every: int = Field(ge=1, description="steps between checkpoints")
    checkpoint_minutes: float | None = Field(default=None, gt=0, description="minutes between checkpoints, in addition")
    keep_last: int = Field(ge=1, description="newest checkpoints kept, besides the best")
    keep_best: int = Field(ge=1, description="best checkpoints kept; best.pt is the first")
    log_every: int = Field(ge=1, description="steps between lines of metrics.jsonl")
    eval_clips: int = Field(ge=0, le=64, description="validation crops whose audio and spectrograms TensorBoard shows")
    wandb: str | None = Field(default=None, description="project of Weights & Biases to log to, too (null: none)")
    resume: Literal["auto", "never", "other_samples"] = Field(
        description="auto: continue from the newest checkpoint, if any; other_samples: even if shards changed"
    )

    def check(self) -> None:
        from trainer.sanity import check_that_the_decoder_learns  # it takes these settings

        goes_on = any((self.run / "checkpoints").glob("step_*.pt"))  # and may end sooner than was planned
        if self.max_steps is not None and self.phase1_epochs is None and not goes_on:  # of epochs only the shards tell
            check_that_the_decoder_learns(self, self.phase1_steps, self.max_steps)

    @property
    def folders(self) -> tuple[Location, ...]:
        return self.shards if isinstance(self.shards, tuple) else (self.shards,)

    @model_validator(mode="after")
    def _something_is_learned(self) -> TrainSettings:
        if not any(self.weights[name] for name in ("l1", "stft", "log_stft", "mel")):
            raise ValueError("one of l1_weight, stft_weight, log_stft_weight and mel_weight must be above 0")
        if self.is_adversarial and not (self.mpd_periods or self.mrd_n_ffts):
            raise ValueError("adversarial_weight and feature_weight need mpd_periods or mrd_n_ffts")
        return self

    @model_validator(mode="after")
    def _crops_fit(self) -> TrainSettings:
        from shards.contract import COARSE_48K, coarse_tokens  # what it imports would slow down --help

        steps = [step for step, _ in self.planned_lengths]
        if steps[0] != 0 or any(a >= b for a, b in itertools.pairwise(steps)):
            raise ValueError(f"segment_schedule={list(self.segment_schedule)}: steps should begin with 0 and rise")
        shortest = COARSE_48K * min(coarse_tokens(seconds) for _, seconds in self.planned_lengths)
        if self.is_adversarial and max(self.mrd_n_ffts, default=0) >= 2 * shortest:  # half of it lies beyond an edge
            raise ValueError(
                f"mrd_n_ffts={list(self.mrd_n_ffts)}: windows should be shorter than 2 × {shortest} samples, twice the "
                "shortest crop"
            )
        return self

    @property
    def planned_lengths(self) -> tuple[tuple[int, float], ...]:
        """From which step on crops last how many seconds."""
        return self.segment_schedule or ((0, self.segment_length),)

    @property
    def is_adversarial(self) -> bool:
        return self.adversarial_weight > 0 or self.feature_weight > 0

    @property
    def weights(self) -> dict[str, float]:
        """Of each term of the loss, by its name."""
        return {
            "l1": self.l1_weight,
            "stft": self.stft_weight,
            "log_stft": self.log_stft_weight,
            "mel": self.mel_weight,
            "adversarial": self.adversarial_weight,
            "features": self.feature_weight,
        }


class StatusSettings(Settings):
    """Where a training stands: step, losses, speed, time left, validation, checkpoints. From its files alone."""

    run: Local = Field(description="folder of the training")


class ModelSettings(Settings):
    model: Local = Field(description="a run, a checkpoint (.pt) or an exported directory")
    pretrained_model: str | None = Field(
        default=None, description="where the SNAC 24 kHz of the checkpoint is now (null: where it was)"
    )


class DecodeSettings(ModelSettings):
    """A recording or a codes file (flat int16 .npy, as in shards) → a 48 kHz WAV of exactly its length."""

    input: Local = Field(description="recording, or .npy with T + 2T + 4T tokens")
    out: Local | None = Field(default=None, description="WAV to write (null: INPUT.48k.wav)")
    gpu: Gpu = Field(description="number of the GPU, or cpu")
    window_seconds: float = Field(ge=1, le=600, description="longest stretch encoded, or decoded on a GPU, at once")
    stream: bool = Field(description="decode frame by frame, as a speech model produces them; report latency and speed")
    lookahead_frames: int = Field(
        ge=0, le=3, description="with stream: frames to wait for; 3 is exact, 0 and 1 are sooner and not exact"
    )


class ExportSettings(ModelSettings):
    """Write a directory that the stock `snac` package loads and whose decode(codes) returns 48 kHz audio."""

    out: Local = Field(description="directory to make")
    fold: bool = Field(description="fold weight norm into the kernels of decoder_only.safetensors")
    license: str | None = Field(default=None, description="licence of the new decoder's weights, for the model card")


class ExportOnnxSettings(ModelSettings):
    """Write decoder and encoder as ONNX with dynamic batch and length; the decoder in half precision too."""

    out: Local = Field(description="directory to make")
    license: str | None = Field(default=None, description="licence of the new decoder's weights, for the model card")


class WebSettings(ModelSettings):
    """Write a static page that decodes a codes file to 48 kHz on its visitor's machine."""

    out: Local = Field(description="directory to make")
    package: Local | None = Field(default=None, description="onnxruntime-web's .tgz (null: npm fetches it)")


class PushSettings(Settings):
    """Upload an exported directory to the Hugging Face hub, in one commit."""

    model: Local = Field(description="directory made by `just export` or `just export-onnx`")
    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="repository on the hub: USER/NAME")
    private: bool = Field(description="whether a repository that is made now is private")
    dry_run: bool = Field(description="only print what would be uploaded")


def _split(value: Any) -> Any:
    return tuple(value.split(",")) if isinstance(value, str) else value


def _named(value: Any) -> Any:
    """`a,b` → {"a": "a", "b": "b"}: the last part of each path is its name, without .pt."""
    if not isinstance(value, str):
        return value
    texts = value.split(",")
    names = [path.stem if path.suffix == ".pt" else path.resolve().name for path in map(Path, texts)]
    if len(set(names)) < len(names):
        raise ValueError("two share a name: write KEY.NAME=PATH for each")
    return dict(zip(names, texts, strict=True))


Name = Annotated[str, Field(pattern=r"^[^./\x00][^/\x00]*$")]  # becomes a folder
Named = Annotated[dict[Name, Local], BeforeValidator(_named)]
MetricName = Literal[
    "lsd", "lsd_reached", "stft", "mel", "si_sdr", "level", "lag", "envelope_lag", "bandwidth", "high_band",
    "visqol", "pesq", "stoi", "dnsmos",
]  # fmt: skip


class EvalSettings(Settings):
    """Judge decoders on whole clips: the stock 24 kHz decoder + sinc, the untrained warm start, each model, each other
    system, and the target itself. Writes clips.parquet, summary.parquet and some audio, and prints the means.
    """

    shards: Place | None = Field(
        default=None, description="folder or URL with index.parquet: its validation split is judged"
    )
    audio: Local | None = Field(
        default=None, description="or a folder of recordings, each its own target; those in one folder are one voice"
    )
    group_pattern: str | None = Field(
        default=None, description="regex on the paths below `audio`: its first group names the voice (null: the folder)"
    )
    models: Named = Field(
        default={}, description="runs, checkpoints (.pt) or exported directories: a,b or models.NAME=PATH"
    )
    systems: Named = Field(
        default={}, description="folders of other systems' outputs, CLIP.wav each: a,b or systems.NAME=PATH"
    )
    pretrained_model: str | None = Field(
        default=None, description="the SNAC 24 kHz of the codes: hub name or local directory (null: as the models say)"
    )
    out: Local = Field(description="folder to make")
    metrics: Annotated[tuple[MetricName, ...], BeforeValidator(_split)] = Field(
        min_length=1, description="metrics to compute: a,b"
    )
    samples: int = Field(ge=1, description="largest number of clips, chosen by seed")
    max_seconds: float = Field(gt=0, le=600, description="longer recordings are not judged")
    baseline: str = Field(description="system from which paired differences are taken")
    bootstrap: int = Field(ge=100, le=1_000_000, description="number of resamples of voices for the 95 % intervals")
    keep_audio: int = Field(ge=0, description="clips whose audio is kept, for `just report` and other systems")
    gpu: Gpu = Field(description="number of the GPU, or cpu")
    num_workers: int = Field(ge=0, le=256, description="processes that compute metrics (0: only this one)")
    seed: int = Field(ge=0, lt=2**63, description="seed of the choice of clips, warm start, noise and bootstrap")


class ReportSettings(Settings):
    """One HTML file of an evaluation: synchronous players, spectrograms, a blind test, figures, curves, provenance.

    It is self-contained: no network, no files beside it.
    """

    eval: Local = Field(description="folder that `just eval` made")
    out: Local | None = Field(default=None, description="HTML file to write (null: EVAL/report.html)")
    run: Local | None = Field(default=None, description="run whose curves are drawn (null: those of the models judged)")
    shards: Place | None = Field(
        default=None, description="folder or URL with index.parquet, for the targets (null: those that were judged)"
    )
    clips: int = Field(ge=1, le=1000, description="largest number of clips to listen to")
    seconds: float = Field(gt=0, le=600, description="longest stretch of a clip; the page says if a clip is cut")
