"""The results of recurrent layers while a network is captured: PyTorch walks over all frames to find their shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor

aten = torch.ops.aten
LAYERS: tuple[OpOverload, ...] = (aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input, aten.lstm.input)
KEYS = (DispatchKey.CompositeImplicitAutograd, DispatchKey.Autograd)
Kernel: TypeAlias = Callable[..., tuple[Tensor, ...]]


@contextmanager
def recurrent_layers_by_shape() -> Iterator[None]:
    """Lets recurrent layers walk over one frame alone where tensors have no numbers."""
    walks = [(layer, key, layer.py_kernels[key]) for layer in LAYERS for key in KEYS if key in layer.py_kernels]
    try:
        for layer, key, walk in walks:
            _put(layer, key, _over_one_frame(walk))
        yield
    finally:
        for layer, key, walk in walks:
            _put(layer, key, walk)


def _put(layer: OpOverload, key: DispatchKey, kernel: Kernel) -> None:
    layer.py_kernels[key] = kernel
    layer._dispatch_cache.clear()


def _over_one_frame(walk: Kernel) -> Kernel:
    """Makes of a function that computes a layer one that computes its shapes, for fake tensors."""

    def kernel(x: Tensor, *rest: object) -> tuple[Tensor, ...]:
        time = 1 if rest[-1] else 0  # the last argument is batch_first
        if not isinstance(x, FakeTensor):
            return walk(x, *rest)
        first, *last = walk(x.narrow(time, 0, 1), *rest)
        frames, clips, features = x.shape[time], x.shape[1 - time], first.shape[-1]
        result = first.new_empty(frames, clips, features)
        return (result.transpose(0, 1) if time else result, *last)

    return kernel
