"""`just web`: a static page that decodes a codes file to 48 kHz on its visitor's machine, with onnxruntime-web.

The package comes from npm at a pinned version whose sha512 is checked, and is copied into the page, never into this
repository. Model and WebAssembly lie in scripts as base64, so that the page works from a server and from file:// too,
where browsers refuse to fetch; no network is used when it is looked at.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from shards.errors import UserError
from shards.files import new_folder, write_whole
from trainer.card import write_snac_license
from trainer.checkpoint import PROVENANCE, Codec48k, load_codec
from trainer.export_onnx import require_onnx, write_decoder
from trainer.settings import WebSettings

PAGE = Path(__file__).with_name("page")
PACKAGE = "onnxruntime-web@1.30.0"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
RUNTIME, GLUE, WASM = "ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"


def web(settings: WebSettings) -> None:
    """Raises UserError when `out` exists, or when npm or its package cannot be had."""
    require_onnx()
    with new_folder(settings.out) as folder:
        codec = load_codec(settings.model, settings.pretrained_model)
        write_page(codec, folder, settings.package)
    click.echo(f"{settings.out}/index.html: open it, or serve the folder; {codec.described}")


def write_page(codec: Codec48k, folder: Path, package: Path | None) -> None:
    write_snac_license(folder)
    with TemporaryDirectory() as temporary:
        model = Path(temporary) / "decoder.onnx"
        runtime = fetch_runtime(package, Path(temporary))
        write_decoder(codec, model)
        write_asset(folder / "decoder_model.js", model.read_bytes())
    for path in sorted(PAGE.iterdir()):
        write_whole(folder / path.name, path.read_bytes())
    write_whole(folder / RUNTIME, runtime[RUNTIME])
    write_asset(folder / "ort_glue.js", runtime[GLUE])
    write_asset(folder / "ort_wasm.js", runtime[WASM])
    write_whole(folder / "about.js", f"window.about = {as_script(f'Codes by {codec.snac_name}.')};\n")
    write_whole(folder / PROVENANCE, json.dumps(codec.provenance, indent=2, sort_keys=True))


def write_asset(path: Path, content: bytes) -> None:
    text = base64.b64encode(content).decode()
    write_whole(path, f'(window.assets ??= {{}}).{path.stem} = "{text}";\n')


def as_script(text: str) -> str:
    return json.dumps(text).replace("<", "\\u003c")


def fetch_runtime(package: Path | None, folder: Path) -> dict[str, bytes]:
    """The files of the pinned package that the page needs. Raises UserError for any other package."""
    path = package or _from_npm(folder)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"package={path}: {error.strerror}") from error
    digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
    if digest != SHA512:
        raise UserError(f"{path} has the sha512 {digest}, expected {SHA512}: it is not the published {PACKAGE}")
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        found = {name: archive.extractfile(f"package/dist/{name}") for name in (RUNTIME, GLUE, WASM)}
        return {name: file.read() for name, file in found.items() if file}


def _from_npm(folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"npm is not installed: install Node.js, or name the .tgz of {PACKAGE} by package=")
    words = [npm, "pack", PACKAGE, "--silent", "--prefer-offline", "--pack-destination", str(folder)]
    process = subprocess.run(words, capture_output=True, text=True, check=False)
    if process.returncode:
        reason = (process.stderr.strip() or f"exit code {process.returncode}").splitlines()[0]
        raise UserError(f"npm cannot fetch {PACKAGE} ({reason}): name its .tgz by package=")
    return folder / process.stdout.strip().splitlines()[-1]
