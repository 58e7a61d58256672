"""The model card of an export: what it is, how to use it, data, recipe, figures, licences."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shards.files import replacing
from trainer.checkpoint import PROVENANCE, Codec48k
from trainer.decoder import RATES_48K

CARD = """\
---
library_name: snac
tags: [audio, codec, snac, text-to-speech, 48khz]
license: {license_id}
---

# A 48 kHz decoder for SNAC 24 kHz tokens

Encoder and quantizer are those of {snac}, unchanged; the decoder has rates {rates} and returns 48 kHz audio.
{stand_in}
## How to use it

```python
from snac import SNAC

codec = SNAC.from_pretrained({name}).eval()  # this folder, or USER/NAME of this page
wav_48k = codec.decode(codes)  # codes as the 24 kHz model gives them; 4096 samples for each coarse token
```

`encode` still takes 24 kHz audio, which is what `codec.sampling_rate` says. `forward` trims to the 24 kHz length, so
call `encode` and `decode` instead.

`decoder_only.safetensors` holds what decoding needs and nothing else, under the same names{folding}

## Data

{data}

## Recipe

{step} steps; all settings that made it stand in `{provenance}`.

{settings}

## Figures

Validation on groups (speakers) that training never saw:

{validation}

## Licence

{license} Encoder and quantizer keep the licence of {snac};
hubertsiuzdak/snac_24khz is published under MIT. The targets were made from recordings, and with `teacher` sidon by the
model SIDON: their terms hold too.
"""
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
STAND_IN = "\n**A stand-in**: its encoder and quantizer are not those of snac_24khz, and nor is its sound.\n"


def write_card(codec: Codec48k, path: Path, name: str, fold: bool, license_name: str | None) -> None:
    found = codec.provenance
    text = CARD.format(
        license_id=json.dumps(license_name or "other"),
        snac=_plain(codec.snac_name),
        rates=RATES_48K,
        stand_in=STAND_IN if "stand-in" in codec.snac_name else "",
        name=json.dumps(name),
        folding=FOLDED.strip("\n") if fold else "; `SNAC(**config)` loads it with `strict=False`.",
        data=_table(found.get("data")),
        step=found.get("step", "an unknown number of"),
        provenance=PROVENANCE,
        settings=_table(found.get("settings")),
        validation=_table(found.get("validation")),
        license=f"New decoder: {_plain(license_name)}." if license_name else "New decoder: not stated by who made it.",
    )
    with replacing(path) as temporary:
        temporary.write_text(text)


def _table(values: Any) -> str:
    if not isinstance(values, Mapping) or not values:
        return "Unknown." if values in (None, {}) else _plain(values)
    rows = (f"| {_plain(key)} | {_plain(value)} |" for key, value in values.items())
    return "\n".join(["| | |", "|-|-|", *rows])


def _plain(value: Any) -> str:
    """Names from data must not become markup, nor break a table."""
    text = value if isinstance(value, str) else f"{value:.4g}" if isinstance(value, float) else json.dumps(value)
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else " " if c in "\r\n" else c for c in text)
