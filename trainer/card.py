"""The model card of an export: what it is, how to use it, data, recipe, figures, licences; and SNAC's notice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from codec.weights import PINS, read_pins
from shards.errors import UserError, in_markdown
from shards.files import write_whole
from trainer.checkpoint import PROVENANCE, Codec48k
from trainer.decoder import RATES_48K

SNAC_LICENSE = "LICENSE.snac"
CARD = """\
---
{library}
tags: [audio, codec, snac, text-to-speech, 48khz]
license: {license_id}{base_model}
---

# A 48 kHz decoder for SNAC 24 kHz tokens

Encoder and quantizer are those of {snac}, unchanged; the decoder has rates {rates} and returns 48 kHz audio.
{stand_in}
## How to use it

{usage}

## Data

{data}

## Recipe

{step} steps. All settings are in `{provenance}`.

{settings}

## Figures

Validation on groups (speakers, or recordings where each is a group) that training never saw{chosen}:

{validation}

## Licence

{license} Encoder and quantizer are those of {snac}, and
the decoder began as its decoder, so its licence applies to all three. hubertsiuzdak/snac_24khz is published under MIT,
whose notice, `LICENSE.snac`, belongs to every copy. The targets were made from recordings,
and with `teacher` sidon by the model SIDON: their terms apply, too.
"""
WITH_SNAC = """\
```python
import torch
from snac import SNAC

codec = SNAC.from_pretrained({name}).eval()  # this folder, or USER/NAME of this page
codes = [torch.zeros(1, 8 << level, dtype=torch.long) for level in range(3)]  # instead of the 24 kHz model's
with torch.inference_mode():
    wav_48k = codec.decode(codes)  # [B, T], [B, 2T], [B, 4T] → [B, 1, 4096 T]
```

`encode` still takes 24 kHz audio, which is what `codec.sampling_rate` says. `forward` trims to the 24 kHz length, so
call `encode` and `decode` instead.

`decoder_only.safetensors` contains only what decoding needs, under the same names{folding}"""
FOLDED = """
, weight norm folded into the kernels:

```python
from safetensors.torch import load_file
from torch.nn.utils import parametrize

for module in codec.modules():
    if parametrize.is_parametrized(module, "weight"):
        parametrize.remove_parametrizations(module, "weight")
codec.load_state_dict(load_file("decoder_only.safetensors"), strict=False)  # leaves out encoder and in_proj
```
"""
WITH_ONNX = """\
```python
import numpy as np
import onnxruntime

decoder = onnxruntime.InferenceSession("decoder_model.onnx")
codes = [np.zeros((1, 8 << level), np.int64) for level in range(3)]  # instead of the 24 kHz model's
levels = {f"audio_codes.{level}": codes[level] for level in range(3)}  # [B, T], [B, 2T], [B, 4T]
(wav_48k,) = decoder.run(None, levels)  # [B, 1, 4096 T] at 48 kHz
```

To decode long or streamed input in windows, decode each one with 3 coarse tokens (6 middle, 12 fine) of its neighbours
on each side, or as many as there are. Then drop the neighbours' samples, 4096 per coarse token: the rest is what
decoding the whole gives there. Tokens are 0 … 4095 and not checked; samples are within ±1.

Input and output names are those of onnx-community/snac_24khz-ONNX. `encoder_model.onnx` takes `input_values` [B, 1, N]
at 24 kHz, N a multiple of 2048. The differences to torch, also those of half precision, are in `parity.json`."""
CHOSEN = "; the step was chosen by these same crops, which flatters it"
STAND_IN = "\n**A stand-in**: its encoder and quantizer are not those of snac_24khz, and its sound is not either.\n"


def snac_card(codec: Codec48k, name: str, fold: bool, license_name: str | None) -> str:
    """Of an export that stock `snac` loads from the folder `name`."""
    folding = FOLDED.strip("\n") if fold else "; `SNAC(**config)` loads it with `strict=False`."
    return _card(codec, "library_name: snac", WITH_SNAC.format(name=json.dumps(name), folding=folding), license_name)


def onnx_card(codec: Codec48k, license_name: str | None) -> str:
    return _card(codec, "library_name: onnx", WITH_ONNX, license_name)


def write_snac_license(folder: Path) -> None:
    """The notice of the installed package. Raises UserError where it was installed without it."""
    found = (path for snac in distributions(name="snac") for path in snac.files or () if path.name == "LICENSE")
    notice = next(found, None)
    if notice is None:
        raise UserError(
            "the package snac is installed without its LICENSE, which exports have to hold: install its wheel"
        )
    write_whole(folder / SNAC_LICENSE, notice.read_text())


def _card(codec: Codec48k, library: str, usage: str, license_name: str | None) -> str:
    found = codec.provenance
    return CARD.format(
        library=library,
        license_id=json.dumps(license_name or "other"),
        base_model=f"\nbase_model: {codec.snac_name}" if codec.snac_name in read_pins(PINS) else "",
        snac=_plain(codec.snac_name),
        rates=RATES_48K,
        stand_in=STAND_IN if "stand-in" in codec.snac_name else "",
        usage=usage,
        data=_table(found.get("data")),
        step=_plain(found.get("step", "an unknown number of")),
        provenance=PROVENANCE,
        settings=_table(found.get("settings")),
        chosen=CHOSEN if found.get("validation") else "",
        validation=_table(found.get("validation")),
        license=f"New decoder: {_plain(license_name)}." if license_name else "New decoder: not stated by who made it.",
    )


def _table(values: Any) -> str:
    if not isinstance(values, Mapping) or not values:
        return "Unknown." if values in (None, {}) else _plain(values)
    rows = (f"| {_plain(key)} | {_plain(value)} |" for key, value in values.items())
    return "\n".join(["| | |", "|-|-|", *rows])


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else f"{value:.4g}" if isinstance(value, float) else json.dumps(value)
    return in_markdown(text)
