"""How fast is decoding? Tokens → 48 kHz at the true size (13.0 M parameters, random weights: no voice).

`python -m benchmarks.decoding`: `SNAC.decode` of the stock package in eager mode, ONNX Runtime, and the step decoder
that `just decode` uses, in turns on the same tokens, on all of torch's threads and on one; on a GPU without ONNX
Runtime, and `just decode` takes all of them in one step. Floor: a decoder of 5.1 GMAC per audio second (10.2 GFLOP, of
which 1.1 are noise blocks that deterministic decoding leaves out) at the rate that a large matrix product reaches. CPU
seconds stand beside wall-clock ones, because they suffer less from others.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
import torch
from snac import SNAC

from benchmarks.encoding import true_size
from benchmarks.harness import interleaved, on_device, report
from benchmarks.training_step import gflops
from codec.snac import device_of, snac_levels
from shards.contract import COARSE_48K, TARGET_RATE
from trainer import kernels
from trainer.checkpoint import Codec48k
from trainer.decode import STEP_COARSE, decode_stream
from trainer.decoder import silence_noise, warm_start
from trainer.export_onnx import as_inputs, session, write_decoder
from trainer.inference import StepDecoder

COARSE = 47  # 4.01 s
ROUNDS = 5
GFLOP_PER_SECOND_OF_AUDIO = 10.2
ONNX = "decoder.onnx"


def true_size_48k() -> Codec48k:
    """The same with its 48 kHz decoder, without noise."""
    snac = true_size()
    silence_noise(snac.decoder)
    decoder = warm_start(snac, "zero", 0)
    return Codec48k(snac, {}, decoder.eval().requires_grad_(False), {"snac": "random weights of snac_24khz's size"})


def clocked(way: Callable[[], object], spent: list[float]) -> Callable[[], None]:
    def run() -> None:
        began = time.process_time()
        way()
        spent.append(time.process_time() - began)

    return run


def stock(codec: Codec48k) -> SNAC:
    """As an export is loaded."""
    whole = SNAC(24_000, 48, [2, 4, 8, 8], None, 1024, [8, 8, 4, 2, 2], None, 4096, 8, [4, 2, 1], True, True).eval()
    whole.quantizer.load_state_dict(codec.snac.quantizer.state_dict())
    whole.decoder.load_state_dict(codec.decoder.state_dict())
    return whole


def ways(whole: SNAC, codec: Codec48k, device: torch.device, folder: Path) -> dict[str, Callable[[], object]]:
    """Each gives its audio to the CPU."""
    codes_T7 = np.random.default_rng(0).integers(0, 4096, (COARSE, 7)).astype(np.int16)
    levels, inputs = [level.to(device) for level in snac_levels(codes_T7)], as_inputs(codes_T7[None])
    whole.to(device)
    codec.snac.to(device)
    model = StepDecoder(codec.snac, codec.decoder.to(device))
    eager = {"stock SNAC.decode, eager": lambda: whole.decode(levels).cpu()}
    stream = {"just decode stream=true (steps of 1)": lambda: list(decode_stream(model, iter(codes_T7[:, None]), 1))}
    if device.type != "cpu":
        return {**eager, "just decode": lambda: list(decode_stream(model, iter([codes_T7]), COARSE)), **stream}
    onnx = session(folder / ONNX)
    return {
        **eager,
        "ONNX Runtime": lambda: onnx.run(None, inputs),
        "just decode (steps of 4)": lambda: list(decode_stream(model, iter([codes_T7]), STEP_COARSE)),
        **stream,
    }


@torch.inference_mode()
@click.command(help=__doc__)
@on_device
def main(gpu: str) -> None:
    device, codec, rows = device_of(gpu), true_size_48k(), []
    whole, on_gpu = stock(codec), device.type == "cuda"
    seconds_of_audio = COARSE * COARSE_48K / TARGET_RATE
    with TemporaryDirectory() as name:
        folder = Path(name)
        if not on_gpu:
            write_decoder(codec, folder / ONNX)
        for threads in [1] if on_gpu else sorted({torch.get_num_threads(), 1}, reverse=True):
            torch.set_num_threads(threads)
            spent: dict[str, list[float]] = {}
            timed = {
                name: clocked(way, spent.setdefault(name, []))
                for name, way in ways(whole, codec, device, folder).items()
            }
            medians = interleaved(timed, ROUNDS)
            slowest = medians["stock SNAC.decode, eager"]
            cpu_slowest = float(np.median(spent["stock SNAC.decode, eager"]))
            floor = GFLOP_PER_SECOND_OF_AUDIO / gflops(device, torch.float32)
            for name, seconds in medians.items():
                cpu = float(np.median(spent[name]))
                rows.append(
                    {
                        "way": name,
                        "threads": threads,
                        "real_time_factor": seconds / seconds_of_audio,
                        "times_faster": slowest / seconds,
                        "cpu_seconds_per_second": cpu / seconds_of_audio,
                        "times_less_cpu": cpu_slowest / cpu,
                        "floor": floor,
                    }
                )
    load = os.getloadavg()[0]  # of other work too: ratios of one run hold, factors suffer
    report(
        "decoding",
        rows,
        gpu,
        load_average=load,
        seconds_of_audio=seconds_of_audio,
        kernels=kernels.description(device),
    )


if __name__ == "__main__":
    main()
