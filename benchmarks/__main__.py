"""All questions one after the other. The first that fails ends it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import torch

from benchmarks.harness import RESULTS, of_speech

SPEECH = "SPEECH"  # in whose place the folder of recordings is put
ON_CPU = {
    "decoding": (), "streaming": (SPEECH,), "training_step": (), "loading": (), "encoding": (SPEECH,),
    "sidon": (SPEECH, "--seconds=4"), "planning": (), "index_memory": (), "judging": (SPEECH,), "corpus": (SPEECH,),
    "on_the_fly": (), "memory": (),
}  # fmt: skip
ON_GPU = {
    "training_step": ("--gpu=0", "--crops=32", "--seconds=4"), "fused_unit": ("--crops=32", "--seconds=4"),
    "decoding": ("--gpu=0",), "on_the_fly": ("--gpu=0", "--crops=32", "--seconds=4"),
    "encoding": (SPEECH, "--gpu=0"), "sidon": (SPEECH, "--gpu=0", "--seconds=10"),
}  # fmt: skip


@click.command(help=__doc__)
@of_speech
@click.option("--gpu", is_flag=True, help="Those that need a GPU, instead of those that need none.")
def main(speech: Path, gpu: bool) -> None:
    if gpu and not torch.cuda.is_available():
        sys.exit("error: no GPU here; `just bench SPEECH` needs none")
    for question, words in (ON_GPU if gpu else ON_CPU).items():
        print(f"\n{question}", flush=True)
        given = [str(speech) if word == SPEECH else word for word in words]
        if code := subprocess.run([sys.executable, "-m", f"benchmarks.{question}", *given], check=False).returncode:
            sys.exit(f"error: benchmarks.{question} ended with {code}")
    print(f"\nresults: {RESULTS}; `just bench-report` puts them into README.md and docs/")


if __name__ == "__main__":
    main()
