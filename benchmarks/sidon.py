"""How fast is stage 2, and what stands between it and its floor? With random weights of the true size.

Each part is given in audio seconds per second, beside the plain way (stock packages, fp32, one recording after the
other) and a floor measured in the same run. All of them keep the memory that is freed, as stages do.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import soundfile
import torch
import torchaudio.functional as F
from snac.layers import Decoder
from torch import Tensor
from transformers import SeamlessM4TFeatureExtractor, Wav2Vec2BertConfig, Wav2Vec2BertModel

from benchmarks.harness import interleaved, of_speech, on_device, report
from benchmarks.training_step import gflops, wait
from codec.audio import AudioError, Recording, Samples, probe
from codec.encoder import quicken
from codec.memory import keep_freed_memory
from codec.resample import Resampler
from codec.snac import device_of
from configs.loader import load_settings
from pipeline import bandwidth, fidelity
from pipeline.ahead import map_ahead, thread_count
from pipeline.judging import judge
from pipeline.settings import TargetsSettings
from pipeline.sidon import FRAME, HIGH_PASS_HZ, INPUT_RATE, PADDING, UPSAMPLING, Native, Sidon, high_passed
from pipeline.sidon_decoder import DacDecoder
from pipeline.sidon_encoder import use_relative_key_sdpa
from pipeline.sidon_features import BLOCK_FRAMES, FRAME_LENGTH, HOP, N_FFT, features
from pipeline.sources import find
from pipeline.targets import FINISHED_AHEAD, flac_bytes
from pipeline.teachers import Taught, Teacher, whole_recording
from shards.contract import TARGET_RATE

CONFIG = Wav2Vec2BertConfig(num_hidden_layers=8, layerdrop=0.0)
CHANNELS, RATES = 1536, [8, 5, 4, 3, 2]
ENCODER_GFLOP, DECODER_GFLOP = 20.0, 66.0  # per second of audio, by arithmetic
ROUNDS = 5
TIMES = 8  # the recordings, where no model takes its time
ALL_BUT_THE_MODEL = "all but the model, one core"
HOST = load_settings(TargetsSettings, "shard_targets.json", [])


class RandomNative(Native):
    """The native form with random weights of the true size."""

    def __init__(self, device: torch.device, precision: str) -> None:
        torch.manual_seed(0)
        self.weights, self.precision, self._device_type = (), precision, device.type
        encoder = Wav2Vec2BertModel(CONFIG).eval().requires_grad_(False)
        use_relative_key_sdpa(encoder)
        self.encoder = encoder.to(device)
        decoder = Decoder(CONFIG.hidden_size, CHANNELS, RATES, noise=False, depthwise=False, attn_window_size=None)
        self.decoder = DacDecoder(decoder, RATES).to(device)
        if device.type == "cpu":
            quicken(self.decoder)


class Plain:
    """What one would write with the stock packages: fp32, eager, one recording after the other."""

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        self.features = SeamlessM4TFeatureExtractor(feature_size=80, num_mel_bins=80, stride=2)
        self.encoder = Wav2Vec2BertModel._from_config(CONFIG, attn_implementation="eager").eval().to(device)
        decoder = Decoder(CONFIG.hidden_size, CHANNELS, RATES, noise=False, depthwise=False, attn_window_size=None)
        self.decoder = decoder.eval().to(device)

    @torch.inference_mode()
    def restore(self, path: Path, seconds: int) -> bytes:
        wav = _plain_read(path, seconds)
        wav = F.highpass_biquad(wav * 0.9 / wav.abs().max(), INPUT_RATE, HIGH_PASS_HZ)
        given = self.features(np.pad(wav.numpy(), PADDING), sampling_rate=INPUT_RATE, return_tensors="pt")
        hidden = self.encoder(given["input_features"].to(self.device)).last_hidden_state
        restored = self.decoder(hidden.transpose(1, 2))[0, 0].float().cpu().numpy()
        return flac_bytes(restored, 16)


class Instant(Sidon):
    """No model: its time is not part of what is measured, its output is what it hears."""

    def restore(self, windows: Sequence[Samples]) -> list[Samples]:
        return [np.repeat(window[PADDING:-PADDING], UPSAMPLING) for window in windows]


@dataclass(frozen=True)
class Bench:
    """Recordings of about the same length, and both ways through them."""

    paths: list[Path]
    seconds: int  # of each that is used
    device: torch.device
    sidon: Sidon
    plain: Plain

    @property
    def audio(self) -> float:
        return self.seconds * len(self.paths)


def chosen(speech: Path, number: int, seconds: int) -> list[Path]:
    paths = []
    for path in map(Path, find(speech, None)[0]["path"].to_pylist()):
        try:
            header = probe(path)
        except AudioError:
            continue
        if header.frames >= seconds * header.rate and header.rate >= 44_100:
            paths.append(path)
        if len(paths) == number:
            break
    if len(paths) < number:
        raise click.ClickException(
            f"{speech} holds {len(paths)} of {number} recordings of {seconds} s, 44.1 kHz or more"
        )
    return paths


def parts(bench: Bench) -> list[dict[str, Any]]:
    """Each part alone, beside the plain way and a floor of the same run."""
    length = bench.seconds * INPUT_RATE // FRAME * FRAME + 2 * PADDING
    windows = [high_passed(_read(path, INPUT_RATE, length)) for path in bench.paths]
    sources = [_read(path, TARGET_RATE, bench.seconds * TARGET_RATE) for path in bench.paths]
    frames = [len(window) // FRAME for window in windows]
    with torch.inference_mode():
        wav_BN = torch.from_numpy(np.stack(windows)).to(bench.device)
        frames_FN = wav_BN.double().unfold(1, FRAME_LENGTH, HOP).flatten(0, 1).contiguous()
        given_BTF = bench.sidon._features(windows)
        hidden_BTC = bench.sidon.model.encode(given_BTF, frames)
        product = gflops(bench.device, torch.bfloat16 if bench.sidon.precision == "bf16" else torch.float32)
        on_gpu = bench.device.type == "cuda"
        return [
            _row(bench, "reading, one core", _on_one_core(lambda: [_read(p, INPUT_RATE, length) for p in bench.paths]),
                 _on_one_core(lambda: [_plain_read(p, bench.seconds) for p in bench.paths]),
                 _on_one_core(lambda: [_decoded(p, bench.seconds) for p in bench.paths]), "decoding alone"),
            _row(bench, "features" if on_gpu else "features, one core",
                 _on_one_core(lambda: features(wav_BN, [length] * len(windows))),
                 _on_one_core(lambda: [bench.plain.features(w, sampling_rate=INPUT_RATE) for w in windows]),
                 _on_one_core(partial(_spectra, frames_FN)), "its float64 spectra alone"),
            _row(bench, "encoder", lambda: bench.sidon.model.encode(given_BTF, frames),
                 lambda: [bench.plain.encoder(row[None]) for row in given_BTF],
                 product / ENCODER_GFLOP, "a matrix product at the same precision"),
            _row(bench, "decoder", lambda: bench.sidon.model.decode(hidden_BTC, frames),
                 lambda: [bench.plain.decoder(row[None].float().transpose(1, 2)) for row in hidden_BTC],
                 product / DECODER_GFLOP, "a matrix product at the same precision"),
            _row(bench, "judging, one core", _on_one_core(lambda: [judge(s, s, HOST) for s in sources]), None,
                 _on_one_core(partial(_judged_spectra, sources)), "its four spectra alone"),
            _row(bench, "FLAC, one core", lambda: [flac_bytes(s, 16) for s in sources], None,
                 lambda: [_plain_flac(s) for s in sources], "libsndfile alone"),
        ]  # fmt: skip


def _read(path: Path, rate: int, samples: int) -> Samples:
    return Resampler(Recording(path, probe(path)), rate).read(0, samples)


def _plain_read(path: Path, seconds: int) -> Tensor:
    audio, rate = _decoded(path, seconds)
    return F.resample(torch.from_numpy(audio.mean(axis=1)), rate, INPUT_RATE)


def _decoded(path: Path, seconds: int) -> tuple[Samples, int]:
    rate = soundfile.info(path).samplerate
    return soundfile.read(path, dtype="float32", always_2d=True, frames=seconds * rate)


def _plain_flac(samples: Samples) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, TARGET_RATE, format="FLAC")
    return buffer.getvalue()


def _spectra(frames_FN: Tensor) -> None:
    for block in frames_FN.split(BLOCK_FRAMES if frames_FN.device.type == "cpu" else len(frames_FN)):
        torch.fft.rfft(block, N_FFT)


def _on_one_core(way: Callable[[], object]) -> Callable[[], object]:
    """On two, a noisy neighbour of one core holds up each of the many small operations."""

    def alone() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        way()
        torch.set_num_threads(threads)

    return alone


def _judged_spectra(sources: list[Samples]) -> None:
    """Envelopes and bandwidth, of recording and target."""
    for samples in [*sources, *sources]:
        for size, hop in ((fidelity.N_FFT, fidelity.HOP), (bandwidth.N_FFT, bandwidth.N_FFT // 2)):
            for block in torch.from_numpy(samples).unfold(0, size, hop).split(fidelity.BLOCK_STEPS):
                torch.fft.rfft(block)


def _row(
    bench: Bench,
    what: str,
    ours: Callable[[], object],
    plain: Callable[[], object] | None = None,
    floor: Callable[[], object] | float | None = None,
    floor_is: str = "",
) -> dict[str, Any]:
    ways: dict[str, Callable[[], object]] = {"ours": ours}
    if plain:
        ways["plain"] = plain
    if callable(floor):
        ways["floor"] = floor
    timed = {name: partial(_finished, bench, way) for name, way in ways.items()}
    rates = {name: bench.audio / seconds for name, seconds in interleaved(timed, ROUNDS).items()}
    limit = rates.get("floor", floor if isinstance(floor, float) else None)
    return {
        "part": what,
        "audio_s_per_s": rates["ours"],
        "plain": rates.get("plain"),
        "ratio": rates["ours"] / rates["plain"] if plain else None,
        "floor": limit,
        "share_of_floor": rates["ours"] / limit if isinstance(limit, float) else None,
        "floor_is": floor_is,
    }


def _finished(bench: Bench, way: Callable[[], object]) -> None:
    way()
    wait(bench.device)


def whole(bench: Bench) -> dict[str, Any]:
    """From files to judged FLAC, as a shard is made, against one recording after the other."""
    settings = HOST.model_copy(update={"gpu": "cpu" if bench.device.type == "cpu" else bench.device.index or 0})
    ours = partial(_made, bench, Teacher(settings, bench.sidon))
    return _row(bench, "whole", ours, lambda: [bench.plain.restore(path, bench.seconds) for path in bench.paths])


def all_but_the_model(bench: Bench) -> dict[str, Any]:
    """In processor time: how much of it a GPU needs beside it."""
    teacher = Teacher(HOST, Instant(bench.sidon.model, bench.device))
    seconds = []
    for _ in range(ROUNDS):
        began = time.process_time()
        _on_one_core(partial(_made, bench, teacher, TIMES))()
        seconds.append(time.process_time() - began)
    rate = TIMES * bench.audio / statistics.median(seconds)
    return {"part": ALL_BUT_THE_MODEL, "audio_s_per_s": rate}


def _made(bench: Bench, teacher: Teacher, times: int = 1) -> None:
    rows = []
    for path in bench.paths * times:
        row = whole_recording(path)
        rows.append({**row, "frames": bench.seconds * row["rate"], "n_samples": bench.seconds * TARGET_RATE})

    def finish(taught: Taught | AudioError) -> None:
        assert isinstance(taught, Taught)
        judge(taught.target, taught.source, HOST)
        flac_bytes(taught.target, 16)

    threads = thread_count(HOST.threads)
    for _ in map_ahead(finish, teacher.segments([[row] for row in rows]), threads, FINISHED_AHEAD * threads):
        pass


@click.command(help=__doc__)
@of_speech
@on_device
@click.option("--seconds", type=click.IntRange(min=1), default=2, show_default=True, help="Of each recording.")
def main(speech: Path, gpu: str, seconds: int) -> None:
    keep_freed_memory()
    device = device_of(gpu)
    number = 64 if device.type == "cuda" else 2
    precision = "bf16" if device.type == "cuda" else "fp32"
    sidon = Sidon(RandomNative(device, precision), device)
    bench = Bench(chosen(speech, number, seconds), seconds, device, sidon, Plain(device))
    rows = [*parts(bench), all_but_the_model(bench), whole(bench)]
    context = {"recordings": len(bench.paths), "seconds_each": seconds, "precision": precision}
    report("sidon", rows, gpu, **context, weights="random, of the true size")


if __name__ == "__main__":
    main()
