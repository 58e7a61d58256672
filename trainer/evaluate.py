"""`just eval`: decoders and other systems on whole clips of unseen groups, judged clip by clip."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import soundfile

from codec.audio import AudioError, Samples
from codec.snac import device_of
from configs.progress import progress_bar
from configs.words import number_of
from shards.contract import FAILED, OK, TARGET_RATE
from shards.errors import SettingsError, UserError, printable
from shards.files import new_folder, write_whole
from shards.order import permutation
from shards.writer import write_table
from trainer.checkpoint import load_codec
from trainer.clips import Clip, Clips, Entry, RecordingClips, ShardClips
from trainer.pool import ordered
from trainer.scores import check_installed, schema, score
from trainer.settings import EvalSettings
from trainer.summary import lines, summarise, voices_of
from trainer.systems import (
    OURS,
    SOURCE,
    TARGET,
    Stock,
    System,
    decoded_systems,
    external_systems,
    find_stock,
    label,
    rounded_to_16_bits,
)

CLIPS, SUMMARY, SETTINGS, AUDIO = "clips.parquet", "summary.parquet", "settings.json", "audio"
PACKAGES = ("torch", "torchaudio", "snac", "numpy", "soundfile", "pyarrow")


def evaluate(settings: EvalSettings) -> None:
    """Raises SettingsError for settings that do not fit together, UserError for anything that cannot be judged."""
    _check(settings)
    check_installed(settings.metrics)
    device = device_of(settings.gpu)
    codecs = {name: load_codec(path, settings.pretrained_model) for name, path in settings.models.items()}
    stock = find_stock(settings.pretrained_model, codecs)
    decoded = decoded_systems(stock, codecs, device, settings.seed)
    stock.snac.to(device)
    clips = _clips(settings, stock)
    chosen = _choose(clips, settings.samples, settings.seed)
    entries = [clips.entries[place] for place in chosen if clips.entries[place].problem is None]
    systems = decoded | external_systems(settings.systems, entries)
    with new_folder(settings.out) as folder:
        table = pa.Table.from_pylist(list(_rows(settings, clips, chosen, systems, folder)), schema(settings.metrics))
        if not any(status == OK for status in table["status"].to_pylist()):
            raise UserError(f"no clip could be used; the first because: {table['reason'][0]}")
        provenance = _provenance(settings, clips, stock, {name: codec.provenance for name, codec in codecs.items()})
        summary = summarise(table, settings.baseline, settings.bootstrap, settings.seed)
        write_table(folder / CLIPS, table, provenance)
        write_table(folder / SUMMARY, summary, provenance)
        settings.write(folder / SETTINGS)
    _print(settings, table, summary, provenance)


def _check(settings: EvalSettings) -> None:
    if (settings.shards is None) == (settings.audio is None):
        raise SettingsError("give either shards= (its validation split is judged) or audio= (a folder of recordings)")
    if settings.group_pattern is not None and settings.audio is None:
        raise SettingsError(f"group_pattern={settings.group_pattern} is for audio=: shards say whose voice a clip is")
    names = [*settings.models, *settings.systems]
    taken = [name for name in names if name in OURS or names.count(name) > 1]
    if taken:
        raise SettingsError(f"the name {taken[0]} is taken: write models.NAME=PATH or systems.NAME=PATH")
    if settings.baseline not in {*names, *OURS} - {SOURCE}:
        raise SettingsError(f"baseline={settings.baseline} is none of {', '.join([*OURS, *names])}")
    if settings.out.exists():
        raise UserError(f"out={settings.out} exists: choose another folder or delete it")


def _clips(settings: EvalSettings, stock: Stock) -> Clips:
    if settings.shards is not None:
        return ShardClips(settings.shards, stock.name)
    assert settings.audio is not None
    return RecordingClips(settings.audio, stock.snac, settings.max_seconds, settings.group_pattern)


def _choose(clips: Clips, samples: int, seed: int) -> list[int]:
    """Places of the clips to judge, in order."""
    shuffled = permutation(len(clips.entries), seed, "clips")
    return sorted(int(place) for place in shuffled[:samples])


@dataclass(frozen=True)
class Job:
    """One clip with every system's output, or the reason why there is none."""

    entry: Entry
    clip: Clip | None
    wavs: Mapping[str, Samples]
    problem: str | None
    metrics: tuple[str, ...]


def _rows(
    settings: EvalSettings, clips: Clips, chosen: list[int], systems: Mapping[str, System], folder: Path
) -> Iterator[dict[str, Any]]:
    """The rows of clips.parquet, clip by clip; the audio of the first clips of the seeded choice is kept."""
    kept = set(_choose(clips, min(settings.keep_audio, len(chosen)), settings.seed))
    jobs = _jobs(settings, clips, chosen, systems, kept, folder)
    with progress_bar(total=len(chosen), desc="judging", unit=" clips") as bar:
        for rows in ordered(_judge, jobs, settings.num_workers):
            yield from rows
            bar.update()


def _jobs(
    settings: EvalSettings,
    clips: Clips,
    chosen: list[int],
    systems: Mapping[str, System],
    kept: set[int],
    folder: Path,
) -> Iterator[Job]:
    for place in chosen:
        entry = clips.entries[place]
        clip, wavs, problem = None, {}, entry.problem
        if problem is None:
            try:
                clip = clips.load(place)
                wavs = outputs(clip, systems)
            except AudioError as error:
                problem = str(error)
        if place in kept:
            for name, wav in wavs.items():
                write_whole(folder / AUDIO / name / f"{entry.key}.flac", flac(wav))
        yield Job(entry, clip, wavs, problem, settings.metrics)


def outputs(clip: Clip, systems: Mapping[str, System]) -> dict[str, Samples]:
    """Every system's clip; the recording, where it is not the target, and the target come last."""
    wavs = {name: system(clip) for name, system in systems.items()}
    if clip.source is not None:
        wavs[SOURCE] = clip.source
    return {**wavs, TARGET: clip.target}


def _judge(job: Job) -> list[dict[str, Any]]:
    if job.clip is None or job.problem is not None:
        return [{"clip": job.entry.key, "status": FAILED, "reason": job.problem}]
    about = {
        "clip": job.clip.key,
        "group": job.clip.group,
        "recording": job.clip.recording,
        "start_seconds": job.clip.start_seconds,
        "seconds": len(job.clip.target) / TARGET_RATE,
        "status": OK,
    }
    return [{**about, "system": name, **score(wav, job.clip.target, job.metrics)} for name, wav in job.wavs.items()]


def flac(wav: Samples) -> bytes:
    """16 bit and lossless, because lossy codecs cut off the top octave, which is what is to be judged; libsndfile clips
    what is beyond full scale. In memory: it says nothing of a disk that is full when it closes a file.
    """
    file = io.BytesIO()
    soundfile.write(file, wav, TARGET_RATE, "PCM_16", format="FLAC")
    return file.getvalue()


def _provenance(
    settings: EvalSettings, clips: Clips, stock: Stock, models: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    return {
        "title": clips.title,
        "snac": stock.name,
        "teacher": clips.teacher,
        "settings": settings.model_dump(mode="json"),
        "models": dict(models),
        "versions": {package: version(package) for package in PACKAGES},
    }


def _print(settings: EvalSettings, table: pa.Table, summary: pa.Table, provenance: Mapping[str, Any]) -> None:
    rows = table.to_pylist()
    used = {row["clip"]: row["seconds"] for row in rows if row["status"] == OK}
    voices = voices_of(row for row in rows if row["status"] == OK)
    teacher = printable(provenance["teacher"])
    click.echo(
        f"{number_of(len(used), 'clip')} of {voices}, {sum(used.values()):.1f} s: {provenance['title']}; "
        f"codes by {provenance['snac']}, targets by {teacher}"
    )
    for row in rows:
        if row["status"] != OK:
            click.echo(printable(f"  not judged: {row['clip']}: {row['reason']}"))
    systems = dict.fromkeys(summary["system"].to_pylist())
    for line in lines(summary, [(name, label(name, teacher)) for name in systems]):
        click.echo(line)
    for name in rounded_to_16_bits(settings.systems, used):
        click.echo(
            f"warning: {name} is judged from 16-bit files; LSD counts their rounding noise, which models do not have: "
            "use 24-bit or float WAVs"
        )
    why = voices.why_no_intervals
    intervals = f" [95 % interval over {voices.noun}s]; * differs from {settings.baseline} clip by clip"
    how = f"; {why}" if why else intervals
    click.echo(f"mean over clips{how}. Undefined values have their reasons in {settings.out / CLIPS}")
