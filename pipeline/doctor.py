"""`just doctor`: do the real models do here what they must? A table of checks, each with its figure and a way out.

A check that cannot run because an earlier one failed has failed too; nothing is taken for granted.
"""

from __future__ import annotations

import math
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from codec.audio import AudioError, Recording, Samples, probe
from codec.encoder import prepared
from codec.memory import ran_out
from codec.resample import Resampler
from codec.snac import coarse_length, device_of, encode, load_snac, windows
from codec.weights import SNAC_FILES, resolve
from configs.granted import granted_memory
from configs.loader import load_settings
from configs.progress import progress_bar
from pipeline.calibrate import measure, summary
from pipeline.seams import differences_db, points
from pipeline.settings import DoctorSettings, TargetsSettings
from pipeline.sidon import FRAME, INPUT_RATE, PADDING, Sidon, load_sidon
from pipeline.targets import flac_bytes
from pipeline.teachers import Taught, Teacher, whole_recording
from shards.contract import COARSE_24K, COARSE_48K, CODEC_RATE, TARGET_RATE
from shards.errors import UserError, first_line, last_line

AGREEMENT_DB = {"fp32": -60.0, "bf16": -40.0}  # of the two forms, by the precision of the raw weights
ROUNDED = 0.01  # of tokens that a GPU may choose otherwise; of the stand-in's, float64 changes 0.06 %, TF32 39 %
SEAM_MARGIN_DB, SEAM_FLOOR_DB = 1.0, -30.0  # how much more seams may differ; below that nobody hears them
SECONDS = 10  # of each recording that goes through the models
NOT_RUN = "not run"  # the figure of a check that needs what an earlier one could not find out
CODES_BYTES_PER_SECOND = 7 * 2 * TARGET_RATE / COARSE_48K


@dataclass(frozen=True)
class Check:
    passed: bool
    figure: str
    advice: str = ""


class NotMeasuredError(Exception):
    """A check needs what an earlier one could not find out."""


T = TypeVar("T")


class OfForms(dict[str, T]):
    """What was found of each form of SIDON. Raises NotMeasuredError for others."""

    def __missing__(self, form: str) -> T:
        raise NotMeasuredError(f"SIDON, {form}")


@dataclass
class Patient:
    """What later checks need of earlier ones."""

    settings: DoctorSettings
    recordings: list[Path]
    folder: Path  # for what is written on the way
    sidons: OfForms[Sidon]
    restored: OfForms[list[Samples]]  # targets of the recordings
    speed: float = 0.0  # audio seconds per second

    @property
    def forms(self) -> list[str]:
        return ["torchscript", "native"] if self.settings.forms == "both" else [self.settings.forms]

    def teacher(self, form: str) -> Teacher:
        shared = self.settings.model_dump(mode="json", include=set(TargetsSettings.model_fields))
        made = load_settings(TargetsSettings, "shard_targets.json", [])
        settings = TargetsSettings.model_validate({**made.model_dump(mode="json"), **shared, "sidon_backend": form})
        return Teacher(settings, self.sidons[form])


def examine(settings: DoctorSettings, recordings: Sequence[Path], folder: Path) -> None:
    """Prints the table. Raises UserError when a check failed."""
    patient = Patient(settings, list(recordings), folder, OfForms(), OfForms())
    forms = patient.forms
    steps: list[tuple[str, Callable[[], Check]]] = [
        ("device", partial(device, patient)),
        ("tokens equal stock SNAC's", partial(snac_tokens, patient)),
        *((f"SIDON, {form}: files", partial(files, patient, form)) for form in forms),
        *((f"SIDON, {form}: runs", partial(runs, patient, form)) for form in forms),
        *([("both forms agree", partial(agreement, patient))] if len(forms) > 1 else []),
        *((f"{name}, {form}", partial(check, patient, form)) for form in forms for name, check in OF_FORM.items()),
        *((name, partial(check, patient)) for name, check in OF_MACHINE.items()),
    ]
    checks = {name: _run(step) for name, step in progress_bar(steps, desc="examining", unit="check")}
    for name, check in checks.items():
        tqdm.write(f"{'pass' if check.passed else 'FAIL'}  {name:<32} {check.figure}")
        if not check.passed:
            tqdm.write(f"      → {check.advice}")
    failed = {name: check for name, check in checks.items() if not check.passed}
    if failed:
        causes = "; ".join(name for name, check in failed.items() if check.figure != NOT_RUN)
        raise UserError(f"{len(failed)} of {len(checks)} checks failed; first repair: {causes}")


def _run(step: Callable[[], Check]) -> Check:
    try:
        return step()
    except NotMeasuredError as missing:
        return Check(False, NOT_RUN, f"needs what failed above ({missing})")
    except (UserError, AudioError) as error:
        return Check(False, "not usable", " ".join(str(error).split()))
    except torch.AcceleratorError as error:
        return Check(False, "failed", f"the GPU failed: try again ({first_line(error)})")
    except RuntimeError as error:  # what PyTorch raises where a model is not what it should be
        advice = "set batch_seconds lower"
        if not ran_out(error):
            tqdm.write(traceback.format_exc(), file=sys.stderr)
            advice = "another model or PyTorch than expected, or a bug"
        return Check(False, "failed", f"{advice} ({last_line(str(error))})")


def device(patient: Patient) -> Check:
    found = device_of(patient.settings.gpu)
    name = torch.cuda.get_device_name(found) if found.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return Check(True, name)


def snac_tokens(patient: Patient) -> Check:
    """The tokens of windows, as stage 1 makes them on this device, against `SNAC.encode` on the CPU, of the whole."""
    resolve(patient.settings.pretrained_model, SNAC_FILES, patient.settings.weights, must_be_pinned=True)
    model, weights = load_snac(patient.settings.pretrained_model)
    device = device_of(patient.settings.gpu)
    ours = prepared(load_snac(patient.settings.pretrained_model)[0].to(device))
    differing = total = 0
    for path in patient.recordings:
        recording = Recording(path, probe(path))
        coarse = coarse_length(recording.length(CODEC_RATE))
        whole = Resampler(recording, CODEC_RATE).read(0, coarse * COARSE_24K)
        stock = np.concatenate(
            [level.numpy().reshape(coarse, -1) for level in model.encode(torch.from_numpy(whole)[None, None])],
            axis=1,
        )
        for window in windows(coarse, 20):
            a, b = window.samples
            (codes,) = encode(ours, [window], whole[None, a:b])
            differing += int((codes != stock[window.start : window.stop]).sum())
        total += stock.size
    advice = "another torch or CPU may round differently; if many differ, the weights or the stock package are others"
    return Check(differing <= may_differ(device, total), f"{differing} of {total} differ, {weights.describe()}", advice)


def may_differ(device: torch.device, tokens: int) -> int:
    """How many tokens: where two are about as near, rounding decides, and a GPU's is not the CPU's."""
    return 0 if device.type == "cpu" else int(ROUNDED * tokens)


def files(patient: Patient, form: str) -> Check:
    settings = patient.settings.model_copy(update={"sidon_backend": form})
    patient.sidons[form] = load_sidon(settings, device_of(settings.gpu))
    sidon = patient.sidons[form]
    return Check(True, f"{len(sidon.sha256())} files, sha256 as pinned, {sidon.describe()}")


def runs(patient: Patient, form: str) -> Check:
    """Restores the recordings, three times: TorchScript compiles in the first two, the third counts for speed."""
    teacher = patient.teacher(form)
    for _ in range(3):
        began = time.perf_counter()
        taught = _beginnings(patient, teacher)
        wall = time.perf_counter() - began
    targets = [found.target for found in taught if isinstance(found, Taught)]
    broken = "; ".join(str(found) for found in taught if isinstance(found, AudioError))
    if broken:
        return Check(False, f"{len(targets)} of {len(taught)}", f"{broken}: use other recordings")
    if not all(np.isfinite(target).all() for target in targets):
        return Check(False, "its output is not finite", "set sidon_precision=fp32")
    patient.restored[form] = targets
    speed = sum(map(len, targets)) / TARGET_RATE / wall
    if form == patient.settings.sidon_backend or len(patient.forms) == 1:
        patient.speed = speed
    figure = f"{speed:.1f} audio seconds per second, {patient.sidons[form].precision}"
    return Check(True, figure)


def _beginnings(patient: Patient, teacher: Teacher) -> list[Taught | AudioError]:
    """Of each recording SECONDS."""
    rows = [whole_recording(path) for path in patient.recordings]
    for row in rows:
        row["n_samples"] = min(row["n_samples"], SECONDS * TARGET_RATE)
    return list(teacher.segments([[row] for row in rows]))


def agreement(patient: Patient) -> Check:
    """In float32, where no fault of the weights hides behind rounding; and in bfloat16 if that is used."""
    expected, found = patient.restored["torchscript"], patient.restored["native"]
    native = patient.sidons["native"].model
    outputs = {native.precision: found}
    if native.precision != "fp32":
        used, native.precision = native.precision, "fp32"
        try:
            taught = _beginnings(patient, patient.teacher("native"))
        finally:
            native.precision = used
        outputs["fp32"] = [each.target for each in taught if isinstance(each, Taught)]
    apart = {kind: max(map(_apart_db, targets, expected)) for kind, targets in sorted(outputs.items(), reverse=True)}
    figure = ", ".join(f"{kind} {db:.0f} dB apart, limit {AGREEMENT_DB[kind]:.0f}" for kind, db in apart.items())
    advice = "the raw weights are not the pair's, or lack biases that were trained: use sidon_backend=torchscript"
    return Check(all(db <= AGREEMENT_DB[kind] for kind, db in apart.items()), figure, advice)


def _apart_db(found: Samples, expected: Samples) -> float:
    apart, power = (float(np.square(x, dtype=np.float64).sum()) for x in (found - expected, expected))
    return 10 * math.log10(apart / max(power, 1e-20) + 1e-20)


def delay(patient: Patient, form: str) -> Check:
    low, median, high = _calibration(patient, form)["lag_samples"]
    limit = patient.settings.max_lag_samples
    passed = abs(median) <= limit / 2 and high - low <= limit
    advice = f"targets are not in time: set delay_samples={patient.settings.delay_samples + round(median)} if all agree"
    return Check(passed, f"{median:.0f} samples at 48 kHz ({low:.0f} … {high:.0f})", advice)


def level(patient: Patient, form: str) -> Check:
    found = _calibration(patient, form)
    (low, median, high), (_, own, _) = found["level_difference_db"], found["model_level_db"]
    limit = patient.settings.max_level_difference_db
    passed = abs(median) <= limit / 2 and high - low <= limit and abs(own) <= limit / 2
    advice = "targets have not their recordings' level: check the weights, use clean recordings"
    return Check(passed, f"{median:.1f} dB ({low:.1f} … {high:.1f}), the model's own {own:.1f}", advice)


def fidelity(patient: Patient, form: str) -> Check:
    low, median, _ = _calibration(patient, form)["correlation"]
    advice = "targets do not say what their recordings say: check the weights, use clean speech"
    passed = median >= patient.settings.min_correlation
    return Check(passed, f"envelopes correlate by {median:.3f} (10 %: {low:.3f})", advice)


def _calibration(patient: Patient, form: str) -> dict[str, list[float]]:
    patient.restored[form]  # it runs
    rows = [whole_recording(path) for path in patient.recordings]
    found = summary(measure(patient.teacher(form), rows))
    if found["recordings"] < len(rows):
        raise UserError(f"{len(rows) - found['recordings']} of {len(rows)} recordings hold no speech: use others")
    return found


def seams(patient: Patient, form: str) -> Check:
    """On the recordings one after the other, long enough for three seams."""
    teacher = patient.teacher(form)
    path = _one_after_the_other(patient, teacher.grid.hop * 3.5 / INPUT_RATE + 2 * patient.settings.overlap_seconds)
    (taught,) = teacher.segments([[whole_recording(path)]])
    if not isinstance(taught, Taught):
        raise UserError(str(taught))
    recording = Recording(path, probe(path))
    at_seams, between = (
        differences_db(taught.target, recording, taught.gain, patient.sidons[form], teacher.grid, at)
        for at in points(teacher.grid, recording.length(INPUT_RATE))
    )
    if not at_seams or not between:
        raise UserError("nothing is heard around the seams: use other recordings")
    passed = max(at_seams) <= max(max(between) + SEAM_MARGIN_DB, SEAM_FLOOR_DB)
    figure = f"{max(at_seams):.0f} dB at seams, {max(between):.0f} dB elsewhere"
    return Check(passed, figure, "seams are heard: set overlap_seconds higher")


def _one_after_the_other(patient: Patient, seconds: float) -> Path:
    recordings = [Recording(path, probe(path)) for path in patient.recordings]
    pieces = [Resampler(recording, TARGET_RATE).read(0, recording.length(TARGET_RATE)) for recording in recordings]
    joined = np.concatenate(pieces)
    path = patient.folder / "long.wav"
    soundfile.write(path, np.resize(joined, int(seconds * TARGET_RATE)), TARGET_RATE, "FLOAT")
    return path


def disk(patient: Patient) -> Check:
    """What targets and codes of the corpus take, by the size of these targets as FLAC."""
    targets = next(iter(patient.restored.values()), None)
    if targets is None:
        raise NotMeasuredError("no target was made")
    rate = sum(len(flac_bytes(target, 16)) for target in targets) / sum(map(len, targets)) * TARGET_RATE
    needed = (rate + 2 * CODES_BYTES_PER_SECOND) * 3600 * patient.settings.corpus_hours
    place = next(
        folder
        for folder in (patient.settings.work.absolute(), *patient.settings.work.absolute().parents)
        if folder.exists()
    )
    free = shutil.disk_usage(place).free
    figure = f"{needed / 1e9:.1f} GB for {patient.settings.corpus_hours:g} h, {free / 1e9:.1f} GB free in {place}"
    return Check(needed < free, figure, "set work= to a larger disk")


def memory(patient: Patient) -> Check:
    found, settings = device_of(patient.settings.gpu), patient.settings
    if not patient.restored:
        raise NotMeasuredError("no target was made")
    if found.type == "cuda":
        window = np.zeros(int(settings.window_seconds * INPUT_RATE) // FRAME * FRAME + 2 * PADDING, np.float32)
        for sidon in patient.sidons.values():
            sidon.restore([window] * max(int(settings.batch_seconds // settings.window_seconds), 1))
        used, total = torch.cuda.max_memory_allocated(found), torch.cuda.get_device_properties(found).total_memory
    else:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        total = granted_memory()
    batch = f"batch_seconds={settings.batch_seconds:g} window_seconds={settings.window_seconds:g}"
    figure = f"{used / 1e9:.1f} of {total / 1e9:.1f} GB at {batch}"
    return Check(used < 0.9 * total, figure, "set batch_seconds lower")


def duration(patient: Patient) -> Check:
    if not patient.speed:
        raise NotMeasuredError("no speed was measured")
    hours = patient.settings.corpus_hours / patient.speed
    figure = f"{hours:.1f} h for {patient.settings.corpus_hours:g} h of recordings, on this device alone"
    return Check(True, figure)


OF_FORM: dict[str, Callable[[Patient, str], Check]] = {
    "delay": delay,
    "level": level,
    "fidelity": fidelity,
    "seams": seams,
}
OF_MACHINE: dict[str, Callable[[Patient], Check]] = {"disk": disk, "memory": memory, "time": duration}
