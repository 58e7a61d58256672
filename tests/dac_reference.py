"""Runs the published `dac.model.dac.Decoder`, in a process of its own: python -m tests.dac_reference SITE FOLDER.

descript-audio-codec's dependencies exclude ours, so it lies in SITE without them; what its decoder does not use of
them is filled with empty modules. Reads FOLDER/sizes.json, writes its own random state dict, an input and its output.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import torch

UNUSED = ("audiotools", "audiotools.ml", "dac.model.base", "dac.nn.quantize")


class Empty(types.ModuleType):
    AudioSignal = object
    CodecMixin = object
    BaseModel = torch.nn.Module

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


def main() -> None:
    site, folder = Path(sys.argv[1]), Path(sys.argv[2])
    for name in UNUSED:
        sys.modules[name] = Empty(name)
    sys.modules["audiotools"].ml = sys.modules["audiotools.ml"]  # type: ignore[attr-defined]
    for name in ("dac", "dac.model", "dac.nn"):  # without what their __init__ imports
        module = types.ModuleType(name)
        module.__path__ = [str(site / name.replace(".", "/"))]
        sys.modules[name] = module
    warnings.simplefilter("ignore")  # the old weight norm
    torch.manual_seed(0)
    inputs, channels, rates = json.loads((folder / "sizes.json").read_text())
    decoder = importlib.import_module("dac.model.dac").Decoder(inputs, channels, rates).eval()
    for name, parameter in decoder.named_parameters():
        if name.endswith("alpha"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    hidden = torch.randn(2, inputs, 25)
    with torch.inference_mode():
        output = decoder(hidden)
    torch.save(decoder.state_dict(), folder / "decoder_state_dict.pt")
    torch.save({"hidden": hidden, "output": output}, folder / "pair.pt")


if __name__ == "__main__":
    main()
