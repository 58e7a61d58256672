"""`just prefetch`: download the pinned model files and verify them."""

from __future__ import annotations

from tqdm import tqdm

from codec.weights import UnreachableError, read_pins, resolve
from configs.progress import progress_bar
from pipeline.settings import PrefetchSettings
from shards.errors import UserError


def prefetch(settings: PrefetchSettings) -> None:
    """Tries every file of the list. Raises UserError when the hub is out of reach, or at the end for wrong files."""
    chosen = settings.sidon_backend
    pins = {name: pin for name, pin in read_pins(settings.weights).items() if pin.get("backend", chosen) == chosen}
    wanted = [(name, file) for name, pin in pins.items() for file in pin["files"]]
    failures = 0
    for name, file in progress_bar(wanted, desc="fetching", unit="file"):
        try:
            weights = resolve(name, (file,), settings.weights)
        except UnreachableError:
            raise
        except UserError as error:
            tqdm.write(f"FAIL {name}/{file}: {error}")
            failures += 1
        else:
            tqdm.write(f"ok   {name}/{file} {weights.sha256[file][:12]} {weights.paths[file]}")
    if failures:
        raise UserError(f"{failures} of {len(wanted)} files could not be verified")
