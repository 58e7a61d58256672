"""`just report`: reads an evaluation, its runs and its shards, and writes one HTML file that needs no network."""

from __future__ import annotations

import click

from configs.progress import progress_bar
from configs.words import number_of
from shards.errors import UserError
from shards.files import write_whole
from shards.storage import locate
from trainer.evaluate import AUDIO
from trainer.report import page
from trainer.report.listening import listening
from trainer.report.reading import read_evaluation, read_targets
from trainer.settings import ReportSettings

MEGABYTE = 1_000_000


def report(settings: ReportSettings) -> None:
    """Raises UserError for what `just eval` did not make, for shards that are gone, and for a page that exists."""
    page.check_installed()
    out = settings.out or settings.eval / "report.html"
    if out.exists():
        raise UserError(f"out={out} exists: choose another file or delete it")
    evaluation = read_evaluation(settings.eval)
    shards = settings.shards or evaluation.about["settings"]["shards"]
    targets = read_targets(locate(shards)) if shards else None
    curves = evaluation.curves(settings.run)
    heard = [
        listening(evaluation.folder / AUDIO, key, evaluation.systems, settings.seconds)
        for key in progress_bar(evaluation.kept[: settings.clips], desc="audio and pictures", unit=" clips")
    ]
    write_whole(out, page.render(evaluation, heard, curves, targets))
    size = out.stat().st_size / MEGABYTE
    click.echo(f"{out}: {number_of(len(heard), 'clip')}, {size:.1f} MB; opens in a browser, without a network")
