"""All questions one after the other: `python -m benchmarks SPEECH [gpu]`. The first that fails ends it."""

from __future__ import annotations

import subprocess
import sys

import torch

from benchmarks.harness import RESULTS

SPEECH = "SPEECH"  # in whose place the folder of recordings is put
ON_CPU = {
    "decoding": (), "streaming": (SPEECH,), "training_step": (), "loading": (), "encoding": (SPEECH,),
    "sidon": (SPEECH, "4"), "planning": (), "index_memory": (), "judging": (SPEECH,), "corpus": (SPEECH,),
    "on_the_fly": (), "memory": (),
}  # fmt: skip
ON_GPU = {
    "training_step": ("gpu=0", "crops=32", "seconds=4"), "encoding": (SPEECH, "0"), "sidon": (SPEECH, "10"),
    "on_the_fly": ("gpu=0", "crops=32", "seconds=4"),
}  # fmt: skip


def main() -> None:
    speech, on_gpu = sys.argv[1], sys.argv[2:] == ["gpu"]
    if on_gpu and not torch.cuda.is_available():
        sys.exit("error: no GPU here; `just bench SPEECH` needs none")
    for question, words in (ON_GPU if on_gpu else ON_CPU).items():
        print(f"\n{question}", flush=True)
        given = [speech if word == SPEECH else word for word in words]
        subprocess.run([sys.executable, "-m", f"benchmarks.{question}", *given], check=True)
    print(f"\nresults: {RESULTS}; `just bench-report` puts them into README.md and docs/")


if __name__ == "__main__":
    main()
