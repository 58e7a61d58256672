"""SIDON's feature extractor from its raw weights: the first layers of w2v-BERT 2.0 with the LoRA adapter merged.

`adapter_model.safetensors` is laid out as peft writes it: `base_model.model.NAME.lora_{A,B}.weight` with A (r, in) and
B (out, r); the merged weight is W + alpha / r · B A. `NAME.base_layer.bias`, if it is there, replaces the layer's bias:
peft before 0.21 left out the biases that it had trained. The adapter says how many layers there are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, Wav2Vec2BertConfig, Wav2Vec2BertModel
from transformers.masking_utils import sdpa_mask

from shards.errors import UserError

ADAPTER_KEY = re.compile(
    r"base_model\.model\.(encoder\.layers\.\d+\..+)\.(lora_A\.weight|lora_B\.weight|base_layer\.bias)"
)
LAYER_KEY = re.compile(r"encoder\.layers\.(\d+)\.")
ONLY_IN_TRAINING = {"masked_spec_embed"}
ATTENTION = "relative_key_sdpa"
PLAIN_LORA: dict[str, Any] = {"peft_type": "LORA", "alpha_pattern": {}} | dict.fromkeys(
    ("use_rslora", "use_dora", "fan_in_fan_out"), False
)


def load_encoder(config: Path, base: Path, adapter_config: Path, adapter: Path) -> Wav2Vec2BertModel:
    """w2v-BERT with the adapter merged, in eval mode, on the CPU. Raises UserError for what does not fit."""
    adapted = _adapted(adapter)
    layers = 1 + max(int(LAYER_KEY.match(name)[1]) for name in adapted)  # type: ignore[index]
    model = _empty_model(config, layers)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    weights = _base_weights(base, shapes, layers)
    rank, scaling, trained = _lora(adapter_config)
    for name, part in adapted.items():
        key, a_RI, b_OR = f"{name}.weight", part["lora_A.weight"], part["lora_B.weight"]
        if key not in weights or weights[key].shape != (b_OR.shape[0], a_RI.shape[1]):
            raise UserError(f"{adapter}: {name} does not fit the weights of {base}")
        if not len(a_RI) == rank == b_OR.shape[1]:
            raise UserError(
                f"{adapter}: {name} has ranks {len(a_RI)} and {b_OR.shape[1]}, {adapter_config} says {rank}"
            )
        weights[key] = weights[key].float() + scaling * (b_OR.float() @ a_RI.float())
        if "base_layer.bias" in part:
            weights[f"{name}.bias"] = part["base_layer.bias"]
    check_keys(adapter, shapes, {name: value.shape for name, value in weights.items()})
    if trained != "none" and not any("base_layer.bias" in part for part in adapted.values()):
        tqdm.write(
            f"warning: {adapter_config} says that biases were trained ({trained}), but {adapter} has none, so its "
            "output may not be that of sidon_backend=torchscript: `just doctor` compares them"
        )
    model.load_state_dict({name: value.float() for name, value in weights.items()}, assign=True)
    use_relative_key_sdpa(model)
    return model.requires_grad_(False).eval()


def _empty_model(config: Path, layers: int) -> Wav2Vec2BertModel:
    settings = {**_read_json(config), "num_hidden_layers": layers}
    try:
        with torch.device("meta"):
            return Wav2Vec2BertModel(Wav2Vec2BertConfig.from_dict(settings))
    except Exception as error:  # transformers raises a kind of its own for each
        raise UserError(f"{config} is not the config of a w2v-BERT: {' '.join(str(error).split())}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not JSON of keys and values: {error}") from error
    return content


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from error


def _adapted(path: Path) -> dict[str, dict[str, Tensor]]:
    """Name of the layer → what the adapter has for it, its A and B at least."""
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = ADAPTER_KEY.fullmatch(name)
        if not match:
            raise UserError(f"{path}: unexpected key {name}; expected {ADAPTER_KEY.pattern}")
        found.setdefault(match[1], {})[match[2]] = tensor
    lacking = [name for name, part in found.items() if not {"lora_A.weight", "lora_B.weight"} <= part.keys()]
    if lacking or not found:
        raise UserError(f"{path}: {lacking[0] if lacking else 'it'} lacks lora_A or lora_B")
    return dict(sorted(found.items()))


def _lora(path: Path) -> tuple[int, float, str]:
    """Its rank, alpha / rank, and which biases were trained with it."""
    config = _read_json(path)
    other = {key: config[key] for key, plain in PLAIN_LORA.items() if (config.get(key) or plain) != plain}
    try:
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (KeyError, TypeError, ValueError):
        other = other or config
    if other:
        raise UserError(f"{path} is not a plain LoRA adapter with r and lora_alpha: {other}")
    return rank, alpha / max(rank, 1), config.get("bias") or "none"


def _base_weights(path: Path, shapes: dict[str, torch.Size], layers: int) -> dict[str, Tensor]:
    """The weights of the first `layers` layers; what lies above them is left out knowingly, all else must fit."""
    with _opened(path) as file:
        there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no dict)
        above = {name for name in there if (match := LAYER_KEY.match(name)) and int(match[1]) >= layers}
        check_keys(path, shapes, {name: shape for name, shape in there.items() if name not in above}, ONLY_IN_TRAINING)
        weights = {name: file.get_tensor(name) for name in there.keys() & shapes.keys()}
    unused = {name: torch.zeros(shapes[name]) for name in shapes.keys() & ONLY_IN_TRAINING - weights.keys()}
    return {**weights, **unused}


def check_keys(path: Path, expected: dict[str, Any], found: dict[str, Any], optional: Iterable[str] = ()) -> None:
    """Raises UserError naming keys that are missing, unexpected or of another shape, up to three of each."""
    kinds = {
        "missing": sorted(expected.keys() - found.keys() - set(optional)),
        "unexpected": sorted(found.keys() - expected.keys() - set(optional)),
        "of another shape": sorted(
            name for name in expected.keys() & found.keys() if tuple(expected[name]) != tuple(found[name])
        ),
    }
    wrong = [f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in kinds.items() if names]
    if wrong:
        raise UserError(f"{path}: its keys are not those of the model: {'; '.join(wrong)}")


def use_relative_key_sdpa(model: Wav2Vec2BertModel) -> None:
    """Attention by PyTorch's fused kernel, with the bias of relative positions from one product per distance.

    The stock model gathers an embedding for each pair of positions, 2.3 GB for a minute; the distances are only 73.
    """
    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.config._attn_implementation = ATTENTION
    for layer in model.encoder.layers:
        layer.self_attn.position_embeddings_type = None  # its bias is `_attend`'s affair now


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """(B, heads, T, d) each → (B, T, heads, d). `attention_mask`: True where a position may be heard."""
    left, right = module.left_max_position_embeddings, module.right_max_position_embeddings
    position = torch.arange(query.shape[2], device=query.device)
    distance = (position - position[:, None]).clamp(-left, right) + left
    scores_BHTR = query @ module.distance_embedding.weight.to(query.dtype).T * module.scaling
    bias = scores_BHTR.gather(3, distance.expand(*scores_BHTR.shape[:2], -1, -1))
    if attention_mask is not None:
        bias = bias.masked_fill(~attention_mask, float("-inf"))
    heard = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=module.scaling)
    return heard.transpose(1, 2).contiguous(), None
