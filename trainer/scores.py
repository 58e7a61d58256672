"""What `just eval` measures: the metrics by name, what each writes, and one output scored against its reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

import pyarrow as pa
import torch

from codec.audio import Samples
from shards.errors import UserError
from trainer import perceptual, signals
from trainer.metrics import SPLIT_HZ, log_spectral_distance_in_band, log_spectral_distances, mel_distance, stft_distance
from trainer.signals import Undefined


@dataclass(frozen=True)
class Column:
    label: str
    better: str  # less, more, zero, or target: what the target has
    digits: int = 3
    unit: str = ""


@dataclass(frozen=True)
class Metric:
    """`score(wav, reference)` gives the values of `columns`."""

    columns: tuple[str, ...]
    score: Callable[[Samples, Samples], dict[str, float]]
    definition: str  # for people
    packages: tuple[str, ...] = ()


COLUMNS = {
    "lsd": Column("LSD", "less"),
    "lsd_hf": Column("LSD above 12 kHz", "less"),
    "lsd_hf_reached": Column("LSD, 12 kHz to the target's bandwidth", "less"),
    "lsd_lf": Column("LSD below 12 kHz", "less"),
    "stft": Column("Multi-resolution STFT distance", "less"),
    "mel": Column("Mel distance", "less"),
    "si_sdr_lf_db": Column("SI-SDR below 12 kHz", "more", 2, "dB"),
    "level_db": Column("Level", "zero", 2, "dB"),
    "lag_samples": Column("Lag of the waveform", "zero", 2, "samples"),
    "envelope_lag_samples": Column("Lag of envelopes", "zero", 1, "samples"),
    "bandwidth_hz": Column("Bandwidth", "target", 0, "Hz"),
    "high_band_level_db": Column("Level from 12 kHz", "zero", 2, "dB"),
    "high_band_share_db": Column("Share of energy from 12 kHz", "target", 2, "dB"),
    "high_band_share_error_db": Column("Share of energy from 12 kHz, error", "zero", 2, "dB"),
    "visqol": Column("ViSQOL, audio", "more", 2),
    "pesq_wb": Column("PESQ-WB", "more", 2),
    "stoi": Column("STOI", "more"),
    "dnsmos_ovrl": Column("DNSMOS overall", "more", 2),
    "dnsmos_sig": Column("DNSMOS speech", "more", 2),
    "dnsmos_bak": Column("DNSMOS background", "more", 2),
    "dnsmos_p808": Column("DNSMOS P.808", "more", 2),
}


def _lsd_reached(wav_N: torch.Tensor, reference_N: torch.Tensor) -> float:
    """As LSD, from 12 kHz up to the reference's bandwidth: recordings often end at 16 or 18 kHz, and above that LSD
    judges an empty band. Undefined for references that end at 12 kHz or below."""
    bandwidth = signals.bandwidth_hz(reference_N.numpy())
    if bandwidth <= SPLIT_HZ:
        raise Undefined(f"the reference ends at {bandwidth:.0f} Hz")
    return log_spectral_distance_in_band(wav_N, reference_N, SPLIT_HZ, bandwidth)


def _high_band(wav: Samples, reference: Samples) -> dict[str, float]:
    """Level: energy from 12 kHz on over the reference's, dB, both at least −120 dB re a full-scale sine. Share: of all
    energy, dB, at least −120; its error is that share less the reference's, which is also too large where the output
    is too quiet below 12 kHz."""
    signals.check_sounds(reference=reference)
    energy, share = signals.high_band_db(wav)
    energy_there, share_there = signals.high_band_db(reference)
    return {
        "high_band_level_db": energy - energy_there,
        "high_band_share_db": share,
        "high_band_share_error_db": share - share_there,
    }


def _of_pair(name: str, score: Callable[[Samples, Samples], float], *packages: str) -> Metric:
    return Metric((name,), lambda wav, reference: {name: score(wav, reference)}, _words(score), packages)


def _of_tensors(name: str, score: Callable[[torch.Tensor, torch.Tensor], float]) -> Metric:
    return Metric((name,), lambda *pair: {name: score(*map(torch.from_numpy, pair))}, _words(score))


def _words(function: Callable[..., object]) -> str:
    return " ".join((function.__doc__ or "").split())


METRICS: dict[str, Metric] = {
    "lsd": Metric(
        ("lsd", "lsd_hf", "lsd_lf"),
        lambda *pair: log_spectral_distances(*map(torch.from_numpy, pair)),
        _words(log_spectral_distances),
    ),
    "lsd_reached": _of_tensors("lsd_hf_reached", _lsd_reached),
    "stft": _of_tensors("stft", stft_distance),
    "mel": _of_tensors("mel", mel_distance),
    "si_sdr": _of_pair("si_sdr_lf_db", signals.low_band_si_sdr_db),
    "level": _of_pair("level_db", signals.level_db),
    "lag": _of_pair("lag_samples", signals.lag_samples),
    "envelope_lag": _of_pair("envelope_lag_samples", signals.envelope_lag_samples),
    "bandwidth": Metric(
        ("bandwidth_hz",),
        lambda wav, reference: {"bandwidth_hz": signals.bandwidth_hz(wav)},
        _words(signals.bandwidth_hz),
    ),
    "high_band": Metric(
        ("high_band_level_db", "high_band_share_db", "high_band_share_error_db"), _high_band, _words(_high_band)
    ),
    "visqol": _of_pair("visqol", perceptual.visqol, "visqol"),
    "pesq": _of_pair("pesq_wb", perceptual.pesq_wb, "pesq"),
    "stoi": _of_pair("stoi", perceptual.stoi, "pystoi"),
    "dnsmos": Metric(
        ("dnsmos_ovrl", "dnsmos_sig", "dnsmos_bak", "dnsmos_p808"),
        lambda wav, reference: perceptual.dnsmos(wav),
        _words(perceptual.dnsmos),
        ("speechmos", "librosa"),
    ),
}


def columns_of(names: Iterable[str]) -> list[str]:
    """What these metrics write, in the order of COLUMNS."""
    written = {column for name in names for column in METRICS[name].columns}
    return [column for column in COLUMNS if column in written]


def schema(names: Iterable[str]) -> pa.Schema:
    """A row for each clip and system. Without a value, `undefined` says why, metric by metric."""
    return pa.schema(
        [
            ("clip", pa.string()),
            ("group", pa.string()),
            ("recording", pa.string()),
            ("start_seconds", pa.float64()),
            ("seconds", pa.float64()),
            ("system", pa.string()),  # null where the clip could not be used
            ("status", pa.string()),
            ("reason", pa.string()),  # why the clip could not be used
            *((name, pa.float64()) for name in columns_of(names)),
            ("undefined", pa.list_(pa.string())),
        ]
    )


def check_installed(names: Iterable[str]) -> None:
    """Raises UserError when a chosen metric's package is missing: no metric is left out unasked."""
    wanted = list(names)
    missing = [name for name in wanted if not all(map(find_spec, METRICS[name].packages))]
    if missing:
        rest = ",".join(name for name in wanted if name not in missing)
        raise UserError(
            f"{', '.join(missing)} need packages that are not installed: `just extras` installs them; "
            f"metrics={rest} does without"
        )


def score(wav: Samples, reference: Samples, names: Iterable[str]) -> dict[str, object]:
    """Columns → value or None, and `undefined`: `metric: reason` for each that says nothing of this clip."""
    row: dict[str, object] = {}
    undefined = []
    for name in names:
        try:
            values: Mapping[str, float | None] = METRICS[name].score(wav, reference)
        except Undefined as reason:
            values = dict.fromkeys(METRICS[name].columns)
            undefined.append(f"{name}: {reason}")
        except RuntimeError as error:
            if "cannot cache function" not in str(error):
                raise
            raise UserError(
                f"{name} has no folder for its compiled code: home and the package's own folder are read-only; "
                "NUMBA_CACHE_DIR in the environment names another"
            ) from error
        for column in METRICS[name].columns:
            value = values[column]
            if value is not None and not math.isfinite(value):
                undefined.append(f"{name}: {column} is {value}")
                value = None
            row[column] = value
    return {**row, "undefined": undefined}
