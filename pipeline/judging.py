"""What is measured of a segment's target, and whether it may be trained on."""

from __future__ import annotations

import math

import numpy as np

from codec.audio import Samples
from pipeline.bandwidth import bandwidth_hz
from pipeline.fidelity import compare, speech_share
from pipeline.settings import JudgeSettings
from shards.contract import REJECTED, TARGET_RATE, Row

CLIPPED = 1 - 2**-15  # full scale in 16 bit


def judge(target: Samples, source: Samples | None, settings: JudgeSettings, restored: Samples | None = None) -> Row:
    """The sidecar's columns for a target and its recording (None: it is the recording), and, where a limit of
    `settings` is not kept, `status` and `reason`.

    With `restored`, lag, level and correlation are those of SIDON's part of a mixed target.
    """
    row = _loudness(target)
    row["target_bandwidth_hz"] = bandwidth_hz(target, TARGET_RATE)
    row["source_bandwidth_hz"] = row["target_bandwidth_hz"] if source is None else bandwidth_hz(source, TARGET_RATE)
    row["speech_share"] = speech_share(target if source is None else source)
    if source is not None:
        row.update(compare(source, target if restored is None else restored))
    reason = _reason(row, settings, len(target))
    return {**row, "status": REJECTED, "reason": reason} if reason else row


def _loudness(target: Samples) -> Row:
    """Peak, RMS level (dB re full scale, at least −120) and samples beyond full scale, which will be clipped."""
    rms = math.sqrt(float(np.mean(target.astype(np.float64) ** 2)))
    return {
        "peak": float(np.abs(target).max()),
        "level_db": 20 * math.log10(max(rms, 1e-6)),
        "clipped_samples": int((np.abs(target) >= CLIPPED).sum()),
    }


def _reason(row: Row, settings: JudgeSettings, samples: int) -> str | None:
    """The first limit that is not kept; null columns were not measured and break none."""
    if row["clipped_samples"] > settings.max_clipped_fraction * samples:
        return f"more than max_clipped_fraction={settings.max_clipped_fraction:g} of it lies at or beyond full scale"
    if row["speech_share"] < settings.min_speech_share:
        return f"less than min_speech_share={settings.min_speech_share:g} of it is speech"
    if _value(row, "correlation", 1.0) < settings.min_correlation:
        return f"envelopes correlate less than min_correlation={settings.min_correlation:g}"
    if abs(_value(row, "lag_samples", 0.0)) > settings.max_lag_samples:
        return f"not in time with its recording: more than max_lag_samples={settings.max_lag_samples:g} away"
    if abs(_value(row, "level_difference_db", 0.0)) > settings.max_level_difference_db:
        return f"level differs by more than max_level_difference_db={settings.max_level_difference_db:g}"
    if (row["target_bandwidth_hz"] or math.inf) < settings.min_target_bandwidth_hz:
        return f"its spectrum ends below min_target_bandwidth_hz={settings.min_target_bandwidth_hz:g}"
    return None


def _value(row: Row, name: str, default: float) -> float:
    value = row.get(name)
    return default if value is None else float(value)
