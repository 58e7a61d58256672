"""A GPU of which only shapes, types and devices are real: code for one runs here, and it is seen where it waits.

Operations on tensors of two devices raise, as on a GPU. A value that is read, and a copy between the devices that is
not asked to be non-blocking, are counted by the function of ours that asks for them; all values are ones. Gradients are
zeros, of every parameter that autograd would reach.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torchaudio.functional import melscale_fbanks

from pipeline import sidon_features
from tests.helpers import ROOT
from trainer import losses
from trainer.discriminators import Discriminators

GPU = torch.device("cuda", 0)
SHAPED_BY_VALUES = {"nonzero", "masked_select", "unique_dim", "_unique2", "bincount"}
VALUES = {"_local_scalar_dense", "item", "is_nonzero"}
COPIES = {"to", "_to_copy", "copy_"}


class Waits(TorchDispatchMode):
    """How often each function waits for the GPU, and how often each operation is called."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()

    def clear(self) -> None:
        self.functions.clear()
        self.operations.clear()

    def __torch_dispatch__(
        self, function: Any, types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, options = function.overloadpacket.__name__, kwargs or {}
        self.operations[name] += name != "device"
        if name in VALUES:
            self.note(args[0])
            return np.ones((), _numpy_type(args[0])).item()
        if name in SHAPED_BY_VALUES:
            self.note(args[0])
        made = function(*args, **options)
        if name in COPIES:
            given = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False)) | options
            source: Any = given.get("src", given["self"])
            if source.device != made.device and not given.get("non_blocking"):
                self.note(source, made)
        return made

    def note(self, *tensors: Tensor) -> None:
        if any(tensor.device.type == "cuda" for tensor in tensors):
            ours = [frame for frame in traceback.extract_stack() if _is_ours(frame.filename)]
            self.functions[ours[-1].name if ours else "no function of ours"] += 1


def _is_ours(path: str) -> bool:
    return path.startswith(str(ROOT)) and not any(f"{ROOT}/{name}/" in path for name in ("tests", ".venv"))


@contextmanager
def fake_gpu() -> Iterator[Waits]:
    """Inside of it, GPU may be used. Models that are moved to it must have been made outside."""
    waits = Waits()

    def to_list(tensor: Tensor) -> Any:
        waits.note(tensor)
        return np.ones(tuple(tensor.shape), _numpy_type(tensor)).tolist()

    def to_numpy(tensor: Tensor, *_: Any, **__: Any) -> npt.NDArray[Any]:
        assert tensor.device.type == "cpu", "numpy() of a tensor on the GPU"
        return np.ones(tuple(tensor.shape), _numpy_type(tensor))

    in_place_of = {
        "torch.cuda.is_bf16_supported": lambda **_: True,
        "torch.cuda.get_device_name": lambda _: "a fake",
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.autograd._engine_run_backward": _zero_gradients,  # autograd's engine wants a driver
        "torch._subclasses.fake_tensor.FakeTensor.tolist": to_list,
        "torch._subclasses.fake_tensor.FakeTensor.numpy": to_numpy,
        "snac.layers.snake": _snake,
        "trainer.adversary.Discriminators": _made_outside(Discriminators),
        "trainer.losses.melscale_fbanks": _made_outside(melscale_fbanks),
    }
    with ExitStack() as stack:
        for name, value in in_place_of.items():
            stack.enter_context(mock.patch(name, value, create=True))
        stack.enter_context(_constants_made_anew())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(waits)
        yield waits


@contextmanager
def _constants_made_anew() -> Iterator[None]:
    """Those that are kept must not be fake afterwards."""
    kept = (losses._hann, losses._filters, sidon_features._constants)
    try:
        for constant in kept:
            constant.cache_clear()
        yield
    finally:
        for constant in kept:
            constant.cache_clear()


def _made_outside(make: Callable[..., Any]) -> Callable[..., Any]:
    def real(*args: Any) -> Any:
        with unset_fake_temporarily():
            return make(*args)

    return real


def _numpy_type(tensor: Tensor) -> npt.DTypeLike:
    return np.dtype(str(tensor.dtype).removeprefix("torch."))


def _snake(x_BCN: Tensor, alpha: Tensor) -> Tensor:
    """snac's own is TorchScript, whose fuser wants a driver."""
    return x_BCN + (alpha + 1e-9).reciprocal() * torch.sin(alpha * x_BCN).pow(2)


def _zero_gradients(outputs: Sequence[Tensor], *args: Any, accumulate_grad: bool, **_: object) -> tuple[Tensor, ...]:
    if not accumulate_grad:
        inputs: Sequence[Tensor] = args[3]
        return tuple(map(torch.zeros_like, inputs))
    nodes, seen = [output.grad_fn for output in outputs], set[Any]()
    while nodes:
        node: Any = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                node.variable.grad = torch.zeros_like(node.variable)
            nodes += [before for before, _ in node.next_functions]
    return ()
