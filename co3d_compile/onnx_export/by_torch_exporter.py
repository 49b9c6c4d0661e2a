"""Operators that PyTorch's own ONNX exporter translates, one at a time."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache

import onnx_ir as ir
import torch
from torch import nn
from torch.fx import Node
from torch.onnx._internal.exporter._registration import ONNXRegistry

from co3d_compile.errors import UnsupportedError
from co3d_compile.ir.node_reading import where
from co3d_compile.onnx_export.batch_dims import Value, grown_dims
from co3d_compile.support.silence_torch import quiet

OPSET = 20  # the newest whose convolutions ONNX Runtime's layout optimiser knows
TRANSLATIONS: dict[Callable[..., Value], Callable[..., ir.Value]] = {}
"""ONNX translations of users' own operators, as ``torch.onnx.export(custom_translation_table=…)`` takes them."""


class _OneOperator(nn.Module):
    """A module that applies one graph node to its operands."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self.node = node

    def forward(self, *operands: torch.Tensor) -> Value:
        """Applies it to all operands that are tensors."""
        values = dict(zip(self.node.all_input_nodes, operands, strict=True))
        args, kwargs = torch.fx.map_arg((self.node.args, self.node.kwargs), lambda n: values[n])
        assert callable(self.node.target)
        result: Value = self.node.target(*args, **kwargs)
        return result


READER = "from_torchlib"
_read = ONNXRegistry.from_torchlib


@lru_cache(maxsize=1)
def _library(opset: int, operators: int) -> ONNXRegistry:
    """Reads PyTorch's library of translations.

    Args:
        opset: Of ONNX.
        operators: How many PyTorch has: with a package that adds some, the library has more translations.
    """
    return _read(opset)


@contextmanager
def library_kept() -> Iterator[None]:
    """Keeps the library that PyTorch's exporter reads anew for each operator: that takes longer than the operator."""

    def kept(opset_version: int) -> ONNXRegistry:
        library = copy.copy(_library(opset_version, len(torch._C._dispatch_get_all_op_names())))
        library.functions = {name: list(found) for name, found in library.functions.items()}
        return library

    usual = vars(ONNXRegistry)[READER]
    setattr(ONNXRegistry, READER, staticmethod(kept))
    try:
        yield
    finally:
        setattr(ONNXRegistry, READER, usual)


def signature(node: Node, larger: Mapping[Node, Value]) -> Hashable:
    """Says all that the translation of an operator hangs on: two nodes with the same are translated alike."""
    place = {n: f"operand {i}" for i, n in enumerate(node.all_input_nodes)}
    tensors = [(n.meta["val"].shape, n.meta["val"].dtype, grown_dims(n, larger)) for n in place]
    return node.target, str(torch.fx.map_arg((node.args, node.kwargs), place.__getitem__)), str(tensors)


def export_operator(node: Node, larger: Mapping[Node, Value]) -> ir.Model:
    """Exports one operator by PyTorch's own ONNX exporter, for any batch (``larger``: the values at another one).

    Raises:
        UnsupportedError: It has no translation there either.
    """
    values = [larger.get(n, n.meta["val"]) for n in node.all_input_nodes]
    operands = tuple(torch.zeros(tuple(v.shape), dtype=v.dtype) for v in values)
    grown = [grown_dims(n, larger) for n in node.all_input_nodes]
    dynamic = (tuple(dict.fromkeys(dims, torch.export.Dim.DYNAMIC) if dims else None for dims in grown),)
    names = [f"operand_{i}" for i in range(len(operands))]
    try:
        with warnings.catch_warnings(), quiet(stdout=True), torch.no_grad(), library_kept():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _OneOperator(node),
                operands,
                input_names=names,
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                optimize=True,
                custom_translation_table=TRANSLATIONS or None,
                dynamic_shapes=dynamic,
            )
    except Exception as error:
        given = node.target in TRANSLATIONS
        raise UnsupportedError(
            f"Its ONNX translation fails: {_cause(error)}." if given else "There is no ONNX operator for this one.",
            **where(node),
            hint="Give its translation: co3d.rule(op, onnx=…), see docs/custom_operators.md.",
        ) from error
    assert program is not None
    return program.model


def _cause(error: BaseException) -> str:
    """Finds what went wrong first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".rstrip(".")
