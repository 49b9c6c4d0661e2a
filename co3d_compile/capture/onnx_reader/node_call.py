"""One call of an ONNX operator, and the table of functions that compute such calls with PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from co3d_compile.capture.onnx_reader.clip_places import Place
from co3d_compile.capture.onnx_reader.constants import made
from co3d_compile.errors import UnsupportedError

Host: TypeAlias = "NDArray[np.generic]"
"""A value that is known while the model is traced: a shape, an index, a list of sizes."""
Value: TypeAlias = "Tensor | Host | TensorList | None"
Result: TypeAlias = "Tensor | Host | TensorList | tuple[Tensor, ...]"
Compute: TypeAlias = "Callable[..., Result]"

WITHOUT_EFFECT = {
    "allowzero", "auto_pad", "axes", "axis", "block_size", "consumed_inputs", "count_include_pad",
    "cubic_coeff_a", "exclude_outside", "extrapolation_value", "hidden_size", "is_test",
    "keep_aspect_ratio_policy", "kernel_shape", "kv_num_heads", "momentum", "nearest_mode", "noop_with_empty_axes",
    "output_dtype", "output_padding", "precision", "q_num_heads", "ratio", "round_mode", "saturate", "seed",
    "softmax_precision", "sorted", "spatial", "stash_type", "storage_order",
}  # fmt: skip
"""Attributes that change no value, or matter only in cases in which they are read."""

TABLE: dict[str, Reader] = {}
"""The function of each operator of the domain ``ai.onnx``."""


@dataclass(frozen=True)
class TensorList:
    """A list of tensors, which ONNX calls a sequence."""

    entries: tuple[Tensor, ...]


@dataclass(frozen=True)
class Reader:
    """How an operator is computed.

    Attributes:
        compute: Takes the call and its inputs, and returns the output, or a tuple of outputs.
        host: Positions of inputs that must be known while the model is traced; the others come as tensors.
    """

    compute: Compute
    host: frozenset[int] = frozenset()


@dataclass(frozen=True)
class NodeCall:
    """A node of an ONNX graph.

    Attributes:
        node: The node, with its attributes.
        opset: The version of the operator set that defines it.
        host: Of each input the value that is known while the model is traced, or None.
        clips: How many clips are run where the file is written for one.
        place: Where the clips lie in the first output, if the file is written for one and that is known.
        places: Where they lie in each input.
        asked: The attributes that were read so far.
    """

    node: ir.Node
    opset: int
    host: tuple[Host | None, ...] = ()
    clips: int = 1
    place: Place | None = None
    places: tuple[Place | None, ...] = ()
    asked: set[str] = field(default_factory=set, compare=False)

    @property
    def where(self) -> str:
        """The operator and the node, as messages name them."""
        return f"{self.node.op_type} (node {self.node.name or '?'}, opset {self.opset})"

    def has(self, name: str) -> bool:
        """Says whether the node gives an attribute."""
        self.asked.add(name)
        return name in self.node.attributes

    def integer(self, name: str, default: int) -> int:
        """Reads an attribute that is a whole number."""
        return self.node.attributes[name].as_int() if self.has(name) else default

    def number(self, name: str, default: float) -> float:
        """Reads an attribute that is a number."""
        return self.node.attributes[name].as_float() if self.has(name) else default

    def numbers(self, name: str) -> list[float]:
        """Reads an attribute that is a list of numbers; empty where the node gives none."""
        return list(self.node.attributes[name].as_floats()) if self.has(name) else []

    def text(self, name: str, default: str) -> str:
        """Reads an attribute that is a text."""
        return self.node.attributes[name].as_string() if self.has(name) else default

    def texts(self, name: str) -> list[str]:
        """Reads an attribute that is a list of texts; empty where the node gives none."""
        return list(self.node.attributes[name].as_strings()) if self.has(name) else []

    def integers(self, name: str, default: Sequence[int] | None = None) -> list[int] | None:
        """Reads an attribute that is a list of whole numbers."""
        if self.has(name):
            return list(self.node.attributes[name].as_ints())
        return None if default is None else list(default)

    def dims(self, given: Value, name: str = "axes") -> list[int] | None:
        """Reads the dims given as an input (newer operator sets) or as an attribute (older ones)."""
        return whole_numbers(given) if given is not None else self.integers(name)

    def known(self, position: int) -> Host | None:
        """The value of an input if it is known while the model is traced."""
        return self.host[position] if position < len(self.host) else None

    def is_constant(self, position: int) -> bool:
        """Says whether an input is a constant of the file."""
        value = self.node.inputs[position]
        return value is not None and value.const_value is not None

    def check_attributes(self) -> None:
        """Refuses a call with an attribute that nobody has read: it may ask for what was not computed."""
        ignored = [name for name in self.node.attributes if name not in self.asked and name not in WITHOUT_EFFECT]
        if ignored:
            raise self.refuse(f"has the attribute {ignored[0]!r}, which is not known")

    def refuse(self, why: str, hint: str = "") -> UnsupportedError:
        """Writes the error of a call that cannot be read."""
        return UnsupportedError(f"The ONNX operator {self.where} {why}.", hint=hint or None)


def reads(*names: str, host: Sequence[int] = ()) -> Callable[[Compute], Compute]:
    """Enters a function into the table for operators of these names.

    Args:
        names: ONNX operator names.
        host: Positions of inputs that must be known while the model is traced.
    """

    def enter(compute: Compute) -> Compute:
        for name in names:
            TABLE[name] = Reader(compute, frozenset(host))
        return compute

    return enter


def whole_numbers(value: Value) -> list[int]:
    """Lists a shape, a list of dims or a single number."""
    assert isinstance(value, np.ndarray)
    return [int(v) for v in value.reshape(-1)]


def as_tensor(value: Host) -> Tensor:
    """Turns a value that is known while the model is traced into a tensor of the same numbers."""
    again = made(value)
    return torch.from_numpy(np.array(value)) if again is None else again


def torch_dtype(onnx_type: int) -> torch.dtype:
    """The dtype of PyTorch for one of ONNX. Half precision becomes float32."""
    dtype = ir.DataType(onnx_type)
    if dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        return torch.float32
    return torch.from_numpy(np.zeros(1, dtype.numpy())).dtype


def even_padding(pads: Sequence[int]) -> list[int] | None:
    """The padding per dim where front and end are the same, else None.

    ``pads`` lists all fronts, then all ends.
    """
    half = len(pads) // 2
    return list(pads[:half]) if list(pads[:half]) == list(pads[half:]) else None


def even_part(pads: Sequence[int], most: Sequence[int] | None = None) -> tuple[list[int], list[int]]:
    """Parts the padding into what is the same at front and end of a dim, and the pads that are left.

    Args:
        pads: All fronts, then all ends.
        most: The most of each dim that counts as such.
    """
    half = len(pads) // 2
    even = [
        a == b and (most is None or a <= most[d]) for d, (a, b) in enumerate(zip(pads[:half], pads[half:], strict=True))
    ]
    padding = [p if same else 0 for p, same in zip(pads[:half], even, strict=True)]
    return padding, [0 if same else p for p, same in zip(pads, even * 2, strict=True)]


def pad_pairs(pads: Sequence[int]) -> list[int]:
    """Gives the pads of ONNX (all fronts, then all ends) as ``torch.nn.functional.pad`` takes them (last dim first)."""
    half = len(pads) // 2
    return [p for d in reversed(range(half)) for p in (pads[d], pads[half + d])]
