"""`just export-onnx`: decoder and encoder as ONNX, with the names that onnx-community/snac_24khz-ONNX made common.

    decoder_model.onnx       audio_codes.0 [B, T], audio_codes.1 [B, 2T], audio_codes.2 [B, 4T] (int64)
                             → audio_values [B, 1, 4096 T] at 48 kHz
    decoder_model_fp16.onnx  the same in half precision inside; its error stands in parity.json
    encoder_model.onnx       input_values [B, 1, N] at 24 kHz, N a multiple of 2048 → audio_codes.0, .1, .2

B, T and N are dynamic. The decoder's noise blocks are left out: there is no random operation.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from snac import SNAC
from torch import Tensor, nn

from shards.contract import COARSE_24K, CODEBOOK_SIZE, TARGET_RATE, TOKENS, TOKENS_PER_COARSE
from shards.errors import UserError
from shards.files import new_folder, replacing, write_whole
from trainer.card import onnx_card, write_snac_license
from trainer.checkpoint import PROVENANCE, Codec48k, load_codec
from trainer.inference import folded
from trainer.settings import ExportOnnxSettings

CODES = ["audio_codes.0", "audio_codes.1", "audio_codes.2"]
DECODER, DECODER_FP16, ENCODER = "decoder_model.onnx", "decoder_model_fp16.onnx", "encoder_model.onnx"
LARGEST_ERROR = 1e-4
OPSET = 20


class TokensToAudio(nn.Module):
    """Three token tensors → (B, 1, 4096 T)."""

    def __init__(self, codec: Codec48k) -> None:
        super().__init__()
        self.quantizers: Any = folded(codec.snac.quantizer.quantizers)
        self.decoder = folded(codec.decoder)

    def forward(self, *levels: Tensor) -> Tensor:
        each = [
            vq.out_proj(vq.codebook(tokens_BT).transpose(1, 2)).repeat_interleave(vq.stride, dim=2)
            for vq, tokens_BT in zip(self.quantizers, levels, strict=True)
        ]
        wav_B1N: Tensor = self.decoder(each[0] + each[1] + each[2])
        return wav_B1N


class AudioToTokens(nn.Module):
    """(B, 1, N) at 24 kHz, N a multiple of 2048 → three token tensors."""

    def __init__(self, snac: SNAC) -> None:
        super().__init__()
        self.encoder, self.quantizer = folded(snac.encoder), folded(snac.quantizer)

    def forward(self, audio_B1N: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.quantizer(self.encoder(audio_B1N))[1])


def export_onnx(settings: ExportOnnxSettings) -> None:
    """Raises UserError when `out` exists, when an optional package is missing, or when ONNX and torch disagree."""
    require_onnx()
    with new_folder(settings.out) as folder:
        write_snac_license(folder)
        codec = load_codec(settings.model, settings.pretrained_model)
        write_decoder(codec, folder / DECODER)
        write_half(folder / DECODER, folder / DECODER_FP16)
        write_encoder(codec.snac, folder / ENCODER)
        found = parity(codec, folder)
        records = {"parity.json": found, PROVENANCE: codec.provenance}
        for name, record in records.items():
            write_whole(folder / name, json.dumps(record, indent=2, sort_keys=True) + "\n")
        write_whole(folder / "README.md", onnx_card(codec, settings.license))
    click.echo(
        f"{settings.out}: {DECODER} differs from torch by {found['decoder_largest_difference']:.1e}, "
        f"{DECODER_FP16} has {found['decoder_fp16_snr_db']:.1f} dB "
        f"({found['decoder_fp16_snr_db_from_12_khz']:.1f} from 12 kHz); {codec.described}"
    )


def require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"ONNX needs the package {error.name}: `just extras` installs it") from error


def write_decoder(codec: Codec48k, path: Path) -> None:
    batch, coarse = torch.export.Dim("batch"), torch.export.Dim("coarse")
    tokens = tuple(torch.zeros(2, 3 * n, dtype=torch.int64) for n in TOKENS_PER_COARSE)
    shapes = tuple({0: batch, 1: n * coarse if n > 1 else coarse} for n in TOKENS_PER_COARSE)
    _write(TokensToAudio(codec).eval(), tokens, shapes, CODES, ["audio_values"], path)


def write_encoder(snac: SNAC, path: Path) -> None:
    batch, coarse = torch.export.Dim("batch"), torch.export.Dim("coarse")
    audio = torch.randn(2, 1, 3 * COARSE_24K, generator=torch.Generator().manual_seed(0))
    _write(AudioToTokens(snac).eval(), (audio,), ({0: batch, 2: COARSE_24K * coarse},), ["input_values"], CODES, path)


def _write(
    model: nn.Module,
    example: tuple[Tensor, ...],
    shapes: tuple[Mapping[int, Any], ...],
    inputs: list[str],
    outputs: list[str],
    path: Path,
) -> None:
    click.echo(f"writing {path.name}")
    with _quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            model,
            example,
            dynamo=True,
            dynamic_shapes=(shapes,) if len(shapes) > 1 else shapes,  # *levels is one argument
            input_names=inputs,
            output_names=outputs,
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces: the paths of this machine
    with replacing(path) as temporary:
        program.save(temporary)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """torch's exporter reports its own progress and deprecations of its own making."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.|onnxscript|onnx_ir|copyreg")
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.|onnxscript|copyreg")
            warnings.filterwarnings("ignore", message="# The axis name", category=UserWarning)  # B and T recur: meant
            yield
    finally:
        logger.setLevel(level)


def write_half(source: Path, path: Path) -> None:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the float32 number", category=UserWarning)  # rounds tiny weights up
        half = convert_float_to_float16(onnx.load(source), keep_io_types=True)
    with replacing(path) as temporary:
        onnx.save(half, temporary)


def session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def as_inputs(tokens_BT7: npt.NDArray[Any]) -> dict[str, npt.NDArray[np.int64]]:
    """(B, T, 7) → what the decoder's session takes."""
    levels = np.split(tokens_BT7.astype(np.int64), np.cumsum(TOKENS_PER_COARSE)[:-1], axis=2)
    return {name: level.reshape(len(level), -1) for name, level in zip(CODES, levels, strict=True)}


@torch.inference_mode()
def parity(codec: Codec48k, folder: Path) -> dict[str, Any]:
    """ONNX Runtime against torch on random tokens and noise. Raises UserError above LARGEST_ERROR."""
    random = np.random.default_rng(0)
    tokens = as_inputs(random.integers(0, CODEBOOK_SIZE, (2, 12, TOKENS)))
    expected = TokensToAudio(codec)(*map(torch.from_numpy, tokens.values())).numpy()
    (wav,) = session(folder / DECODER).run(None, tokens)
    (half,) = session(folder / DECODER_FP16).run(None, tokens)
    audio = 0.1 * random.standard_normal((2, 1, 12 * COARSE_24K)).astype(np.float32)
    codes = session(folder / ENCODER).run(None, {"input_values": audio})
    differ = [
        int((a != b.numpy()).sum()) for a, b in zip(codes, codec.snac.encode(torch.from_numpy(audio)), strict=True)
    ]
    difference = float(np.abs(wav - expected).max())
    if not difference <= LARGEST_ERROR:
        raise UserError(f"ONNX Runtime's output differs from torch's by {difference:.1e}, more than {LARGEST_ERROR}")
    return {
        "decoder_largest_difference": difference,
        "decoder_fp16_largest_difference": float(np.abs(half - expected).max()),
        "decoder_fp16_snr_db": snr_db(expected, half),
        "decoder_fp16_snr_db_from_12_khz": snr_db(expected, half, 12_000),
        "encoder_tokens_that_differ": sum(differ),
        "encoder_tokens": sum(level.size for level in codes),
        "codes_by": codec.snac_name,
    }


def snr_db(expected: npt.NDArray[np.float32], found: npt.NDArray[np.float32], lowest_hz: int = 0) -> float:
    """Energy of what is expected over that of the error, both from `lowest_hz` on; along the last axis at 48 kHz."""
    first = lowest_hz * expected.shape[-1] // TARGET_RATE
    signal, error = ((np.abs(np.fft.rfft(x)[..., first:]) ** 2).sum() for x in (expected, found - expected))
    return float(10 * np.log10(signal / error))
