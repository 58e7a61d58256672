"""`just push`: an exported directory to the Hugging Face hub, as one commit."""

from __future__ import annotations

from pathlib import Path

import click

from codec.hub import check_kept, make_repository, refused
from shards.errors import UserError, printable
from shards.files import file_sha256
from trainer.checkpoint import PROVENANCE
from trainer.settings import PushSettings

MODELS = ("pytorch_model.bin", "decoder_model.onnx")  # one of them is in every export


def push(settings: PushSettings) -> None:
    """Prints each file with size and sha256. Raises UserError for a folder that is no export, or what the hub says."""
    files = exported_files(settings.model)
    for path in files:
        name = printable(str(path.relative_to(settings.model)))
        click.echo(f"{path.stat().st_size:>12,} B  {file_sha256(path)[:12]}  {name}")
    visibility = "private" if settings.private else "public"
    where = f"https://huggingface.co/{settings.repo} ({visibility} if it is made now)"
    if settings.dry_run:
        click.echo(f"dry run: {len(files)} files would go to {where}; nothing was sent")
        return
    _upload(settings, [path.relative_to(settings.model).as_posix() for path in files])
    click.echo(f"{len(files)} files are at {where}")


def exported_files(folder: Path) -> list[Path]:
    if not (folder / PROVENANCE).is_file() or not any((folder / model).is_file() for model in MODELS):
        raise UserError(f"model={folder}: expected a directory made by `just export` or `just export-onnx`")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"{path} is a link to what lies elsewhere, which would be published: delete it or copy that"
            )
    return files


def _upload(settings: PushSettings, names: list[str]) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        make_repository(api, settings.repo, "model", settings.private)
        api.upload_folder(
            repo_id=settings.repo,
            folder_path=settings.model,
            allow_patterns=names,
            commit_message="A 48 kHz decoder for SNAC 24 kHz tokens",
        )
        check_kept(settings.repo, sorted(set(names).difference(api.list_repo_files(settings.repo))))
    except UserError:
        raise
    except Exception as error:  # the hub's client raises its own, requests' and the system's errors
        raise UserError(refused(settings.repo, error)) from error
