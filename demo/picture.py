"""The recording, what stock SNAC decodes at 24 kHz, and what the new decoder makes of the same tokens."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import soundfile
import torch

from codec.audio import Recording, probe
from codec.resample import Resampler
from codec.snac import load_snac
from pipeline.gallery import spectrogram
from shards.contract import CODEC_RATE, TARGET_RATE
from shards.files import replacing

SECONDS = 4


def draw(recording: Path, decoded_48k: Path, snac: Path, picture: Path) -> None:
    """Writes a PNG of three spectrograms, 0–24 kHz, same scale (dB re full scale)."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    model, weights = load_snac(str(snac))
    source = Recording(recording, probe(recording))
    samples_24k = min(source.length(CODEC_RATE), SECONDS * CODEC_RATE)
    audio_24k = Resampler(source, CODEC_RATE).read(0, samples_24k)
    with torch.inference_mode():
        stock = model.decode(model.encode(torch.from_numpy(audio_24k)[None, None]))[0, 0, :samples_24k].numpy()
    original = Resampler(source, TARGET_RATE).read(0, 2 * samples_24k)
    ours = soundfile.read(decoded_48k, dtype="float32", frames=2 * samples_24k)[0]

    panels = (
        ("recording", original, TARGET_RATE),
        ("stock decoder, 24 kHz", stock, CODEC_RATE),
        ("new decoder, 48 kHz, same tokens", ours, TARGET_RATE),
    )
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharex=True, sharey=True, layout="constrained")
    for axis, (title, wav, rate) in zip(axes, panels, strict=True):
        image = spectrogram(axis, wav, rate)
        axis.set_title(title)
        axis.set_xlabel("seconds")
    axes[0].set_ylabel("kHz")
    axes[0].set_ylim(0, TARGET_RATE / 2000)
    figure.colorbar(image, ax=axes, label="dB re full scale")
    figure.suptitle(f"{recording.name}; codec: {weights.describe()}", fontsize=9)
    with replacing(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)
