"""The emitter of ONNX nodes, and the table of translations that use it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.fx import Node

from co3d_compile.ir.node_reading import module_path
from co3d_compile.ir.program import Program
from co3d_compile.onnx_export.batch_dims import at_another_batch
from co3d_compile.onnx_export.by_torch_exporter import export_operator

DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float64: ir.DataType.DOUBLE,
    torch.float16: ir.DataType.FLOAT16,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.int16: ir.DataType.INT16,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
    torch.bool: ir.DataType.BOOL,
}


class Emitter:
    """Writes ONNX nodes for the nodes of a step graph."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes: list[ir.Node] = []
        self.values: dict[Node, Any] = {}
        self.initializers: dict[str, ir.Value] = {}
        self.larger = at_another_batch(program)
        self.scope = ""
        self._count: dict[str, int] = {}
        self._last: ir.Value | None = None

    # --- what translations use

    def op(self, operator: str, *inputs: ir.Value | None, outputs: int = 1, **attributes: Any) -> ir.Value:
        """Appends an ONNX operator and returns its first output."""
        operands = list(inputs)
        while operands and operands[-1] is None:
            operands.pop()
        node = ir.node(operator, operands, attributes, num_outputs=outputs, name=self.unique(operator))
        node.outputs[0].name = f"{node.name}.out"
        self.nodes.append(node)
        return node.outputs[0]

    def outputs_of(self, first: ir.Value) -> list[ir.Value]:
        """All outputs of an ONNX operator with several, named and typed."""
        producer = first.producer()
        assert producer is not None
        for i, value in enumerate(producer.outputs):
            value.name = f"{producer.name}.out{i or ''}"
        return list(producer.outputs)

    def value(self, arg: Any) -> ir.Value:
        """The ONNX value of a graph node."""
        if arg not in self.values:
            assert arg.op == "get_attr", arg
            self.values[arg] = self.initializer(str(arg.target), self.program.constant(arg).contiguous().numpy())
        value: ir.Value = self.values[arg]
        return value

    def pair(self, node: Node) -> tuple[ir.Value, ir.Value]:
        """The two operands of a binary operator in the result's dtype, numbers as constants."""
        dtype = node.meta["val"].dtype
        a, b = (self.cast(x, dtype) if isinstance(x, Node) else self.scalar(x, node) for x in node.args[:2])
        return a, b

    def cast(self, node: Node, dtype: torch.dtype) -> ir.Value:
        """The value of a graph node in a dtype."""
        value = self.value(node)
        return value if node.meta["val"].dtype is dtype else self.op("Cast", value, to=int(self.dtype(dtype)))

    def scalar(self, number: Any, node: Node) -> ir.Value:
        """A number as a constant of the node's dtype."""
        return self.number(number, node.meta["val"].dtype)

    def number(self, number: Any, dtype: torch.dtype) -> ir.Value:
        """A number as a constant of a dtype."""
        array = np.array(number, dtype=self.dtype(dtype).numpy())
        return self.initializer(f"number.{array.dtype}.{number}", array)

    def ints(self, numbers: Sequence[int]) -> ir.Value:
        """A one-dimensional constant of int64."""
        return self.initializer("ints." + "_".join(map(str, numbers)), np.array(list(numbers), dtype=np.int64))

    def int_scalar(self, number: Any) -> ir.Value:
        """A constant of int64 without dims."""
        return self.initializer(f"int.{number}", np.array(number, dtype=np.int64))

    def filled(self, shape: Sequence[int], number: float, node: Node) -> ir.Value:
        """A constant tensor of one number."""
        dtype = self.dtype(node.meta["val"].dtype).numpy()
        return self.initializer(
            f"filled.{dtype}.{'x'.join(map(str, shape))}.{number}", np.full(list(shape), number, dtype)
        )

    def transposed(self, weight: Any) -> ir.Value:
        """A weight matrix, stored transposed."""
        if weight.op != "get_attr":
            return self.op("Transpose", self.value(weight), perm=[1, 0])
        return self.initializer(f"{weight.target}_transposed", self.program.constant(weight).t().contiguous().numpy())

    def dtype(self, dtype: torch.dtype) -> ir.DataType:
        """The ONNX dtype of a PyTorch one."""
        return DTYPES[dtype]

    # --- the rest

    def initializer(self, name: str, array: np.ndarray) -> ir.Value:
        """A constant, stored once under its name."""
        if name not in self.initializers:
            tensor = ir.tensor(array, name=name)
            self.initializers[name] = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        return self.initializers[name]

    def unique(self, operator: str) -> str:
        """A node name that says where the operator comes from."""
        name = f"{self.scope}/{operator}" if self.scope else operator
        self._count[name] = self._count.get(name, -1) + 1
        return f"{name}_{self._count[name]}" if self._count[name] else name

    def emit(self, node: Node) -> None:
        """Appends what a graph node stands for."""
        self.scope = module_path(node)
        if node.target is operator.getitem:
            self.values[node] = self.values[node.args[0]][node.args[1]]  # type: ignore[index]
            return
        translation = TABLE.get(node.target)
        result: Any = translation(self, node) if translation is not None else None
        if result is None:
            result = self._by_torch(node)
        value = node.meta["val"]
        if isinstance(result, ir.Value) and isinstance(value, torch.Tensor):
            result.type = ir.TensorType(DTYPES[value.dtype])
        self.values[node] = result

    def holders(self) -> dict[tuple[str, int], str]:
        """The values that hold the entries of the clip's results, where operators of the file compute them."""
        return {
            held: str(value.name)
            for node, value in self.values.items()
            if isinstance(value, ir.Value) and value.producer() is not None
            for held in self.program.notes.holders.get(node, ())
        }

    def _by_torch(self, node: Node) -> Any:
        """An operator without an entry in the table: PyTorch's own exporter translates it, and it is inlined."""
        model = export_operator(node, self.larger)
        operands = list(node.all_input_nodes)
        mapping: dict[ir.Value, ir.Value] = {
            inner: self.value(n) for inner, n in zip(model.graph.inputs, operands, strict=True)
        }
        for value in model.graph.initializers.values():
            assert value.const_value is not None
            mapping[value] = self.initializer(f"{node.name}.{value.name}", value.const_value.numpy())
        for inner in model.graph:
            copy = ir.Node(
                inner.domain,
                inner.op_type,
                [mapping[v] if v is not None else None for v in inner.inputs],
                list(inner.attributes.values()),
                num_outputs=len(inner.outputs),
                overload=inner.overload,
                name=self.unique(inner.op_type),
            )
            for old, new in zip(inner.outputs, copy.outputs, strict=True):
                new.name = f"{copy.name}.{old.name}"
                mapping[old] = new
            self.nodes.append(copy)
        results = [mapping[v] for v in model.graph.outputs]
        return results[0] if isinstance(node.meta["val"], torch.Tensor) else results


Translation = Callable[["Emitter", Node], "ir.Value | list[ir.Value] | None"]
TABLE: dict[Any, Translation] = {}


def translates(*operators: Any) -> Callable[[Translation], Translation]:
    """Decorator: the function emits these operators."""

    def add(function: Translation) -> Translation:
        for target in operators:
            TABLE[target] = function
        return function

    return add
