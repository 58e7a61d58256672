"""`just calibrate`, and the start of every run with SIDON: are its targets in time and level with their recordings?

A stretch of each of some recordings goes through the teacher. A delay or level that all of them share means that the
model is not used as it was trained; one that differs between them means that nothing constant can mend it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import torch
from tqdm import tqdm

from codec.audio import AudioError, Samples
from configs.progress import progress_bar
from pipeline.execute import holding
from pipeline.fidelity import compare, speech_share
from pipeline.plan import Plan
from pipeline.settings import CalibrateSettings, TargetsSettings
from pipeline.teachers import Teacher
from shards.contract import COARSE_48K, OK, PLAN_NAME, TARGET_RATE, Row
from shards.errors import UserError
from shards.files import write_whole

FILE = "calibration.json"
VERSION = 2  # of what is measured
MIN_SECONDS, MAX_SECONDS, MIN_SPEECH = 1, 10, 0.2  # of a stretch that is measured
MIN_MEASURED = 3
AUTO_TRIES = 8  # recordings looked at for each that is measured, because some are their own target
COHERENCE_BANDS_KHZ = ((0, 1), (1, 4), (4, 8), (8, 12))
COHERENCE_N_FFT = 1024
PERCENTILES = (10, 50, 90)
IN_PLACE_KHZ = 4
AGREEING, OWN = 0.8, 0.4  # coherence below 4 kHz: waveforms agree; phases are the model's own


def calibrate(settings: CalibrateSettings) -> None:
    """Measures anew, prints the table and keeps it. Raises UserError for delays or levels that cannot be trained on."""
    plan = Plan(settings.work / PLAN_NAME)
    if settings.teacher == "recording":
        raise UserError("teacher=recording has nothing to calibrate: its targets are the recordings")
    with holding(settings):
        teacher = Teacher(settings)
        result = _measured_and_kept(settings, plan, teacher)
    show(result)
    check(result, settings)


def calibrated(settings: TargetsSettings, plan: Plan, teacher: Teacher) -> Row | None:
    """The calibration kept in `work`, made now if there is none of these or it is damaged; None without SIDON. Not
    checked.
    """
    if teacher.sidon is None:
        return None
    path = settings.work / FILE
    try:
        kept = json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError:
        kept = {}
    if kept.get("made_from") == _made_from(settings, plan, teacher):
        result: Row = kept["result"]
        return result
    return _measured_and_kept(settings, plan, teacher)


def _made_from(settings: TargetsSettings, plan: Plan, teacher: Teacher) -> Row:
    planned = hashlib.sha256("".join(plan.rows_sha256).encode()).hexdigest()
    asked = {"version": VERSION, "recordings": settings.calibrate_recordings}
    return {"teacher": teacher.provenance, "plan": planned, **asked}


def _measured_and_kept(settings: TargetsSettings, plan: Plan, teacher: Teacher) -> Row:
    number = settings.calibrate_recordings
    rows = choose(plan, number * (AUTO_TRIES if settings.teacher == "auto" else 1))
    result = summary(islice(measure(teacher, rows), number))
    kept = {"made_from": _made_from(settings, plan, teacher), "result": result}
    write_whole(settings.work / FILE, json.dumps(kept, indent=1) + "\n")
    return result


def choose(plan: Plan, number: int) -> list[Row]:
    """A stretch each of the first `number` files of the plan, whose order is shuffled.

    Fewer files give further stretches, spread over all that they hold.
    """
    chosen: dict[tuple[str, int | None], Row] = {}
    further: list[Row] = []
    for row in (row for shard in range(len(plan.shards)) for row in plan.rows(shard)):
        stretch = _stretch(row)
        if row["status"] != OK or stretch["n_samples"] < MIN_SECONDS * TARGET_RATE:
            continue
        file = row["path"], row["offset"]
        if file in chosen:
            further.append(stretch)
        chosen.setdefault(file, stretch)
        if len(chosen) == number:
            return list(chosen.values())
    step = max(len(further) // max(number - len(chosen), 1), 1)
    return [*chosen.values(), *further[::step][: number - len(chosen)]]


def _stretch(row: Row) -> Row:
    """A row's segment, and what follows it in its recording, up to MAX_SECONDS."""
    rest = row["frames"] * TARGET_RATE // max(row["rate"], 1) - row["start_coarse"] * COARSE_48K
    return {**row, "n_samples": min(rest, MAX_SECONDS * TARGET_RATE)}


def measure(teacher: Teacher, rows: list[Row]) -> Iterator[Row]:
    """What is found of each stretch that SIDON restored and that holds speech."""
    taught = teacher.segments([[row] for row in rows])
    for found in progress_bar(taught, total=len(rows), desc="calibrating", unit="recording"):
        if isinstance(found, AudioError) or found.source is None or speech_share(found.source) < MIN_SPEECH:
            continue
        restored = found.target if found.restored is None else found.restored
        measured = compare(found.source, restored)
        if measured["lag_samples"] is not None:
            yield {**measured, "model_level_db": found.model_level_db, **coherence(found.source, restored)}


def coherence(source: Samples, target: Samples) -> dict[str, float]:
    """Magnitude-squared coherence |Σ X* Y|² / (Σ |X|² Σ |Y|²) over time (Welch), mean of each band: 1 for one waveform,
    also where it is turned over or some samples late. And `in_place`, Re Σ X* Y / √(Σ |X|² Σ |Y|²) over time and below
    IN_PLACE_KHZ: 1 only where it coincides.
    """
    window = torch.hann_window(COHERENCE_N_FFT, dtype=torch.float64)
    x, y = (
        torch.stft(torch.from_numpy(s).double(), COHERENCE_N_FFT, window=window, return_complex=True)
        for s in (source, target)
    )
    cross, x_power, y_power = (x.conj() * y).sum(1), x.abs().square().sum(1), y.abs().square().sum(1)
    per_bin = cross.abs().square() / (x_power * y_power).clamp(min=1e-30)
    below = round(IN_PLACE_KHZ * 1000 * COHERENCE_N_FFT / TARGET_RATE)
    powers = float((x_power[:below].sum() * y_power[:below].sum()).sqrt())
    result = {"in_place": float(cross[:below].real.sum()) / max(powers, 1e-30)}
    for low, high in COHERENCE_BANDS_KHZ:
        first, last = (round(khz * 1000 * COHERENCE_N_FFT / TARGET_RATE) for khz in (low, high))
        result[f"coherence_{low}_{high}_khz"] = float(per_bin[first:last].mean())
    return result


def summary(found: Iterable[Row]) -> Row:
    """`recordings`, and per measure its percentiles [10, 50, 90], rounded so that the last bits do not show."""
    measured = list(found)
    result: Row = {"recordings": len(measured)}
    for name in measured[0] if measured else ():
        digits = 0 if name == "lag_samples" else 2
        values = np.percentile([row[name] for row in measured], PERCENTILES)
        result[name] = [round(float(value), digits) for value in values]
    return result


def show(result: Row) -> None:
    """The table, and what the coherence means."""
    lines = [f"calibration on {result['recordings']} recordings {'10 %':>12} {'median':>9} {'90 %':>9}"]
    lines += [f"  {name:<28}" + "".join(f"{x:>10.2f}" for x in v) for name, v in result.items() if isinstance(v, list)]
    if "coherence_0_1_khz" in result:
        lines.append("  " + words(result))
    tqdm.write("\n".join(lines))


def words(result: Row) -> str:
    """What the coherence below 4 kHz says about the choice of teacher and about L1."""
    low, in_place = min(result["coherence_0_1_khz"][1], result["coherence_1_4_khz"][1]), result["in_place"][1]
    if low >= AGREEING and in_place < AGREEING:
        return (
            f"below 4 kHz targets share the recordings' waveforms, but not in place ({in_place:.2f}; −1: turned over, "
            "0: some samples off): L1 compares what does not coincide, hybrid mixes it. Rely on losses of magnitudes"
        )
    if low >= AGREEING:
        return "below 4 kHz targets share the recordings' waveforms: teacher=sidon and L1 suit"
    if low <= OWN:
        return (
            "below 4 kHz the phases are the model's own: there L1 pulls towards dull output. Take teacher=hybrid where "
            "recordings reach crossover_hz; with teacher=sidon lower l1_weight and rely on losses of magnitudes"
        )
    return "below 4 kHz targets share part of the recordings' waveforms: teacher=hybrid keeps L1 meaningful"


def check(result: Row, settings: TargetsSettings) -> None:
    """Raises UserError where the targets cannot be trained on, or recordings disagree.

    Medians may reach half of a segment's limit, 10 … 90 % may span the whole of it.
    """
    if settings.teacher == "auto" and result["recordings"] < MIN_MEASURED:
        return  # hardly any needs SIDON; the run's end looks at those that did
    if result["recordings"] < MIN_MEASURED:
        raise UserError(
            f"calibration: only {result['recordings']} stretches hold {MIN_SECONDS} s with speech and need SIDON, "
            f"{MIN_MEASURED} are needed: set calibrate_recordings higher, or add recordings"
        )
    _check_spread("lag_samples", result, settings.max_lag_samples, "samples at 48 kHz", "max_lag_samples")
    _check_spread("level_difference_db", result, settings.max_level_difference_db, "dB", "max_level_difference_db")
    lag, level = result["lag_samples"][1], result["level_difference_db"][1]
    if abs(lag) > settings.max_lag_samples / 2:
        delay = settings.delay_samples + round(lag)
        mend = f"set delay_samples={delay:g}" if 0 <= delay <= 934 else "the model is not the one expected"
        raise UserError(f"calibration: all targets are {lag:.0f} samples at 48 kHz behind their recordings: {mend}")
    if abs(level) > settings.max_level_difference_db / 2:
        raise UserError(
            f"calibration: targets are typically {level:.1f} dB above their recordings: check the weights, or "
            f"accept it with max_level_difference_db={2 * abs(level) + 1:.0f}"
        )
    own = result["model_level_db"][1]
    if abs(own) > settings.max_level_difference_db / 2:
        raise UserError(
            f"calibration: before levels are matched, the model typically speaks {own:.1f} dB louder than what it "
            f"hears: check the weights, or accept it with max_level_difference_db={2 * abs(own) + 1:.0f}"
        )
    if result["correlation"][1] < settings.min_correlation:
        raise UserError(
            f"calibration: envelopes of targets and recordings typically correlate by {result['correlation'][1]:.2f}, "
            f"less than min_correlation={settings.min_correlation:g}: these are no restorations of these recordings"
        )


def _check_spread(name: str, result: Row, limit: float, unit: str, setting: str) -> None:
    low, _, high = result[name]
    if high - low > limit:
        raise UserError(
            f"calibration: recordings disagree: {name} is {low:.1f} … {high:.1f} {unit} (10 … 90 % of "
            f"{result['recordings']} recordings), so no constant can correct it: leave out what is not "
            f"speech, or accept it with {setting}={high - low:.0f}"
        )
