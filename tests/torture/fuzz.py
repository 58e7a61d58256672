"""Coverage-guided fuzzing of every reader, so many SECONDS for each: `just fuzz SECONDS OUT` (atheris, on Linux).

Anything but a value or an error of ours is a crash; so is a file that is written elsewhere, a process that is started,
a connection, an unpickled class. The input that did it is left in OUT, with what was printed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tests.torture.readers import Reader

INSTRUMENTED = ["shards", "configs", "codec", "pipeline", "trainer", "json", "tarfile", "zipfile", "numpy.lib"]
NEVER = {"subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "socket.connect", "socket.getaddrinfo",
         "pickle.find_class"}  # fmt: skip
OF_TWO = {"os.rename", "os.link", "os.symlink"}
CHANGES = {*OF_TWO, "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod"}
MAX_MIB, MAX_SECONDS = 4096, 20  # that one input may take

_watched: Path | None = None
_installed = False
_others: set[int | None] = set()  # threads that were there before, which do not read


class EscapeError(BaseException):
    """Something was done that reading does not need. No `except Exception` hides it."""


def _audit(event: str, given: tuple[Any, ...]) -> None:
    if _watched is None or threading.get_ident() in _others:
        return
    writes = event in CHANGES or (event == "open" and given[2] & (os.O_WRONLY | os.O_RDWR))
    names = [name for name in given[: 2 if event in OF_TWO else 1] if writes and not isinstance(name, int)]
    outside = [name for name in names if not Path(os.fsdecode(name)).resolve().is_relative_to(_watched)]
    if event in NEVER or outside:
        raise EscapeError(f"{event} {given}")


@contextmanager
def watching(folder: Path) -> Iterator[None]:
    """Meanwhile, whatever this thread and those it starts do beyond `folder` raises EscapeError."""
    global _watched, _installed, _others
    if not _installed:
        sys.addaudithook(_audit)
        _installed = True
    _others = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
    before, tempfile.tempdir, _watched = tempfile.tempdir, str(folder), folder.resolve()
    try:
        yield
    finally:
        tempfile.tempdir, _watched = before, None


def feeder(reader: Reader, folder: Path) -> Callable[[bytes], None]:
    """Gives the reader a file of these bytes, and lets through what it must not raise."""
    from tests.torture.readers import OURS

    def feed(data: bytes) -> None:
        path = folder / reader.name
        path.write_bytes(data)
        with suppress(*OURS):
            reader.read(path)

    return feed


def fuzz(name: str, corpus: Path, options: list[str]) -> None:
    """In a process of its own, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.torture.readers import READERS
    (reader,) = (reader for reader in READERS if reader.name == name)
    with tempfile.TemporaryDirectory() as folder:
        feed = feeder(reader, Path(folder))
        for path in sorted(corpus.iterdir()):
            feed(path.read_bytes())  # what is imported late, is imported now
        atheris.Setup([sys.argv[0], str(corpus), *options], feed)
        with watching(Path(folder)):
            atheris.Fuzz()


@click.command(help=__doc__)
@click.argument("seconds", type=click.IntRange(min=1))
@click.argument("out", type=click.Path(path_type=Path))
def main(seconds: int, out: Path) -> None:
    if find_spec("atheris") is None:
        sys.exit("error: atheris is missing: `just extras` installs it (Linux, x86_64)")
    from benchmarks.harness import make_new, report
    from tests.torture.readers import READERS, finished

    make_new(out)
    finished(out / "finished")
    limits = [f"-max_total_time={seconds}", f"-rss_limit_mb={MAX_MIB}", f"-timeout={MAX_SECONDS}", "-seed=1"]
    rows = []
    for reader in READERS:
        corpus = out / reader.name / "corpus"
        corpus.mkdir(parents=True)
        seeds = [*reader.seeds(out / "finished"), *reader.hostile]
        for number, seed in enumerate(seeds):
            (corpus / f"seed_{number}").write_bytes(seed)
        options = [*limits, f"-artifact_prefix={out / reader.name}/", f"-max_len={4 * max(map(len, seeds))}"]
        words = [sys.executable, "-m", "tests.torture.fuzz", "one", reader.name, str(corpus), *options]
        with (out / reader.name / "log").open("w") as log:
            ended = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        text = (out / reader.name / "log").read_text(errors="replace")
        runs = re.search(r"^Done (\d+) runs in (\d+) second", text, re.MULTILINE)
        cover = re.findall(r"cov: (\d+)", text)
        rows.append(
            {
                "reader": reader.name,
                "seconds": int(runs[2]) if runs else None,
                "inputs": int(runs[1]) if runs else None,
                "branches": int(cover[-1]) if cover else None,
                "inputs_kept": len(list(corpus.iterdir())),
                "crashes": int(ended != 0),
            }
        )
        print(rows[-1], flush=True)
    report("fuzz", rows, seconds_each=seconds)
    if any(row["crashes"] for row in rows):
        sys.exit(f"error: crashes; their inputs and logs are in {out}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        fuzz(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
    else:
        main()
