"""`just export`: a directory that the unmodified `snac` package loads; its decode(codes) returns 48 kHz audio."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from snac import SNAC

from shards.errors import UserError
from shards.files import replacing
from trainer.checkpoint import PROVENANCE, Codec48k, load_codec, save
from trainer.decoder import RATES_48K
from trainer.settings import ExportSettings

CARD = """\
# A 48 kHz decoder for SNAC 24 kHz tokens

Encoder and quantizer are those of {snac}, unchanged; the decoder has rates {rates} and returns 48 kHz audio.

```python
from snac import SNAC

codec = SNAC.from_pretrained("{name}").eval()
wav_48k = codec.decode(codes)  # codes as the 24 kHz model gives them; 4096 samples for each coarse token
```

`encode` still takes 24 kHz audio. `forward` trims to the 24 kHz length, so call `encode` and `decode` instead.

- Codes by: {snac}
- Targets by: {teacher}
- Trained for {step} steps; validation on unseen groups: {validation}
- Settings: `{provenance}`
"""


def export(settings: ExportSettings) -> None:
    """Raises UserError when `out` exists: an export never overwrites."""
    if settings.out.exists():
        raise UserError(f"out={settings.out} exists: choose another directory or delete it")
    codec = load_codec(settings.model, settings.pretrained_model)
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=settings.out.parent, prefix=f".{settings.out.name}.") as temporary:
        write_export(codec, Path(temporary) / "export", settings.out.name)
        (Path(temporary) / "export").rename(settings.out)
    click.echo(f"{settings.out}: SNAC.from_pretrained loads it; codes by {codec.snac_name}")


def write_export(codec: Codec48k, folder: Path, name: str) -> None:
    config = {**codec.config, "decoder_rates": RATES_48K}
    whole = SNAC(**config)
    whole.encoder.load_state_dict(codec.snac.encoder.state_dict())
    whole.quantizer.load_state_dict(codec.snac.quantizer.state_dict())
    whole.decoder.load_state_dict(codec.decoder.state_dict())
    provenance = codec.provenance
    card = CARD.format(
        snac=codec.snac_name,
        rates=RATES_48K,
        name=name,
        teacher=provenance.get("data", {}).get("teacher", "unknown"),
        step=provenance.get("step", "unknown"),
        validation=json.dumps(provenance.get("validation", "none")),
        provenance=PROVENANCE,
    )
    texts = {
        "config.json": json.dumps(config, indent=2),
        PROVENANCE: json.dumps(provenance, indent=2, sort_keys=True),
        "README.md": card,
    }
    for file, text in texts.items():
        with replacing(folder / file) as temporary:
            temporary.write_text(text)
    save(folder / "pytorch_model.bin", whole.state_dict())
