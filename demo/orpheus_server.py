"""How a server of an Orpheus-like voice gets 48 kHz: `python -m demo.orpheus_server EXPORT RECORDING OUT.wav`.

A real server's loop is `async for id in language_model(prompt)`. Here the language model is a **fake**: it speaks the
tokens of RECORDING, as EXPORT's own encoder gives them, at the pace of speech, one id at a time in Orpheus's order. All
after it is what such a server needs: ids → frames → 48 kHz samples, sent as 16 bit PCM as soon as they are exact.
With an export made from demo/snac_tiny_24khz the codec is a stand-in too, small and rough.
"""

from __future__ import annotations

import asyncio
import sys
import time
import wave
from collections.abc import AsyncIterator
from pathlib import Path

import click

from codec.audio import AudioError, Recording, probe
from codec.resample import Resampler
from codec.snac import Window, coarse_length, encode
from shards.contract import COARSE_24K, COARSE_48K, CODEC_RATE, TARGET_RATE, TOKENS
from shards.errors import UserError
from trainer import orpheus
from trainer.checkpoint import Codec48k, load_codec
from trainer.inference import StepDecoder
from trainer.streaming import StreamingDecoder, to_int16

SECONDS_PER_ID = COARSE_48K / TARGET_RATE / TOKENS


def spoken_ids(codec: Codec48k, recording: Path) -> list[int]:
    """The ids that Orpheus would speak to say `recording`."""
    source = Recording(recording, probe(recording))
    total = coarse_length(source.length(CODEC_RATE))
    audio = Resampler(source, CODEC_RATE).read(0, total * COARSE_24K)
    (codes_T7,) = encode(codec.snac, [Window(0, total, total)], audio[None])
    return [*orpheus.to_ids(codes_T7), orpheus.END_OF_SPEECH]


async def fake_language_model(ids: list[int]) -> AsyncIterator[int]:
    """Each id no sooner than it would be spoken."""
    began = time.perf_counter()
    for number, id_ in enumerate(ids):
        await asyncio.sleep(max(began + (number + 1) * SECONDS_PER_ID - time.perf_counter(), 0))
        yield id_


async def speech(model: StepDecoder, ids: AsyncIterator[int]) -> AsyncIterator[bytes]:
    """What a server sends: 16 bit little-endian PCM at 48 kHz. Decoding runs in a thread, so that others are served."""
    frames, stream = orpheus.OrpheusFrames(), StreamingDecoder(model)
    async for id_ in ids:
        if id_ == orpheus.END_OF_SPEECH:
            break
        if id_ in orpheus.BEFORE_SPEECH:
            continue
        whole = frames.push([id_])
        if len(whole):
            samples = await asyncio.to_thread(stream.push, whole)
            if samples.size:
                yield to_int16(samples[0]).tobytes()
    yield to_int16((await asyncio.to_thread(stream.finish))[0]).tobytes()
    if frames.held:  # a limit of tokens ends the model anywhere
        print(f"the last {len(frames.held)} ids are no whole frame and were not heard", file=sys.stderr)


async def serve(export: Path, recording: Path, out: Path) -> None:
    codec = load_codec(export)
    model = StepDecoder(codec.snac, codec.decoder)  # once for the server: all its streams share it
    ids = spoken_ids(codec, recording)
    began, first, count = time.perf_counter(), None, 0
    with out.open("wb") as plain, wave.open(plain, "wb") as file:
        file.setparams((1, 2, TARGET_RATE, 0, "NONE", "not compressed"))
        async for pcm in speech(model, fake_language_model(ids)):
            first = first or time.perf_counter() - began
            count += len(pcm) // 2
            file.writeframes(pcm)
    print(f"{out}: {count / TARGET_RATE:.2f} s at 48 kHz, first audio {first or 0:.3f} s after the request")
    print(f"the language model is a fake that speaks the recording's own tokens; codes by {codec.snac_name}")


@click.command()
@click.argument("export", type=click.Path(exists=True, path_type=Path))
@click.argument("recording", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, writable=True, path_type=Path))
def main(export: Path, recording: Path, out: Path) -> None:
    """RECORDING's tokens, spoken by EXPORT as a server does it, to OUT, a WAV."""
    try:
        asyncio.run(serve(export, recording, out))
    except AudioError as error:
        raise click.ClickException(f"{recording}: {error}") from None
    except (UserError, OSError) as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
