"""The emitter of ONNX nodes, and the table of translations that use it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
import torch
from torch.fx import Node
from torch.fx.node import Argument, Target

from co3d_compile.ir.node_reading import module_path, operand, operator_name, whole
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.program import Program
from co3d_compile.onnx_export.batch_dims import at_another_batch
from co3d_compile.onnx_export.by_torch_exporter import export_operator, signature

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
Operand: TypeAlias = "ir.Value | Node | Sequence[int] | None"
"""What an ONNX operator takes: a value, a node of the step graph, or whole numbers as a constant."""
Attribute: TypeAlias = "int | float | str | Sequence[int] | Sequence[str]"
Emitted: TypeAlias = "ir.Value | list[ir.Value]"
SINGLE = {
    *("Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Cosh", "Sinh", "Tan", "Erf"),
    *("Celu", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu", "Selu", "Softplus", "Softsign"),
    *("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "InstanceNormalization", "ThresholdedRelu"),
    *("Col2Im", "Conv", "ConvTranspose", "GRU", "LSTM", "MaxRoiPool", "RNN", "Resize"),
}
"""Operators that ONNX Runtime computes in float32, and not in float64."""
FIRST_ALONE = {"Col2Im", "Resize"}  # whose other operands are sizes
FLOATS = {"alpha", "beta", "epsilon", "spatial_scale"}
"""Attributes of ONNX that are floats, also where the number is whole."""
EVERY: Mapping[str, float] = {}


class Emitter:
    """A writer of ONNX nodes for the nodes of a step graph."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes: list[ir.Node] = []
        self.values: dict[Node, Emitted] = {}
        self.initializers: dict[str, ir.Value] = {}
        self.larger = at_another_batch(program)
        self.scope = ""
        self.single: set[str] = set()
        self._double = False
        self._count: dict[str, int] = {}
        self._exported: dict[Hashable, ir.Model] = {}

    # --- what translations use

    def op(self, operator: str, *inputs: Operand, **attributes: Attribute) -> ir.Value:
        """Appends an ONNX operator with one output and returns that."""
        return self.outputs(1, operator, *inputs, **attributes)[0]

    def outputs(self, count: int, operator: str, *inputs: Operand, **attributes: Attribute) -> list[ir.Value]:
        """Appends an ONNX operator and returns its outputs."""
        operands = [self.operand(x) for x in inputs]
        while operands and operands[-1] is None:
            operands.pop()
        attributes.update({name: float(attributes[name]) for name in FLOATS & attributes.keys()})  # type: ignore
        if self._double and operator in SINGLE:
            self.single.add(operator)
            operands = self._cast(operands, operator, ir.DataType.FLOAT)
            return [self._append(1, "Cast", [y], {"to": int(ir.DataType.DOUBLE)})[0]
                    for y in self._append(count, operator, operands, attributes)]  # fmt: skip
        return self._append(count, operator, operands, attributes)

    def _cast(self, operands: list[ir.Value | None], operator: str, to: ir.DataType) -> list[ir.Value | None]:
        """Casts the operands that are no sizes to another precision."""
        data = operands[:1] if operator in FIRST_ALONE else operands
        cast = [x if x is None else self._append(1, "Cast", [x], {"to": int(to)})[0] for x in data]
        return [*cast, *operands[len(data) :]]

    def _append(
        self, count: int, operator: str, operands: Sequence[ir.Value | None], attributes: Mapping[str, Attribute]
    ) -> list[ir.Value]:
        typed = {name: _numbers(name, value) for name, value in attributes.items()}
        node = ir.node(operator, operands, typed, num_outputs=count, name=self.unique(operator))
        for i, value in enumerate(node.outputs):
            value.name = f"{node.name}.out{i or ''}"
        self.nodes.append(node)
        return list(node.outputs)

    def operand(self, x: Operand) -> ir.Value | None:
        """The ONNX value of an operand."""
        if isinstance(x, Node):
            return self.value(x)
        return x if x is None or isinstance(x, ir.Value) else self.ints(x)

    def value(self, node: Node) -> ir.Value:
        """The ONNX value of a graph node."""
        if node not in self.values:
            assert node.op == "get_attr", node
            self.values[node] = self.initializer(str(node.target), self.program.constant(node).contiguous().numpy())
        value = self.values[node]
        assert isinstance(value, ir.Value), f"{node} has several values"
        return value

    def typed(self, x: Argument, dtype: torch.dtype) -> ir.Value:
        """Casts a tensor where it is of another dtype; a number becomes a constant."""
        if not isinstance(x, Node):
            return self.number(x, dtype)
        return self.value(x) if x.meta["val"].dtype is dtype else self.op("Cast", x, to=int(DTYPES[dtype]))

    def pair(self, node: Node, start: int = 0) -> list[ir.Value]:
        """Casts the two operands of a binary operator, from ``start`` on, to the dtype of its result."""
        return [self.typed(x, node.meta["val"].dtype) for x in node.args[start : start + 2]]

    def scalar(self, number: Argument, node: Node) -> ir.Value:
        """Makes a number a constant of the node's dtype."""
        return self.number(number, node.meta["val"].dtype)

    def number(self, number: Argument, dtype: torch.dtype) -> ir.Value:
        """Makes a number a constant of a dtype."""
        array = np.array(number, dtype=DTYPES[dtype].numpy())
        return self.initializer(f"number.{array.dtype}.{number}", array)

    def ints(self, numbers: Sequence[int]) -> ir.Value:
        """Makes a one-dimensional constant of int64."""
        return self.initializer("ints." + "_".join(map(str, numbers)), np.array(list(numbers), dtype=np.int64))

    def int_scalar(self, number: int) -> ir.Value:
        """Makes a constant of int64 without dims."""
        return self.initializer(f"int.{number}", np.array(number, dtype=np.int64))

    def filled(self, shape: Sequence[int], number: float, node: Node) -> ir.Value:
        """Makes a constant tensor of one number."""
        array = np.full(list(shape), number, DTYPES[node.meta["val"].dtype].numpy())
        return self.initializer(f"filled.{array.dtype}.{'x'.join(map(str, shape))}.{number}", array)

    def transposed(self, weight: Node) -> ir.Value:
        """Stores a weight matrix transposed."""
        if weight.op != "get_attr":
            return self.op("Transpose", weight, perm=[1, 0])
        return self.initializer(f"{weight.target}_transposed", self.program.constant(weight).t().contiguous().numpy())

    # --- the rest

    def initializer(self, name: str, array: np.ndarray) -> ir.Value:
        """Stores a constant once under its name."""
        if name not in self.initializers:
            tensor = ir.tensor(array, name=name)
            self.initializers[name] = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        return self.initializers[name]

    def unique(self, operator: str) -> str:
        """Makes a node name that says where the operator comes from."""
        name = f"{self.scope}/{operator}" if self.scope else operator
        self._count[name] = self._count.get(name, -1) + 1
        return f"{name}_{self._count[name]}" if self._count[name] else name

    def emit(self, node: Node) -> None:
        """Appends what a graph node stands for."""
        self.scope = module_path(node)
        if node.target is operator.getitem:
            several = self.values[operand(node)]
            assert isinstance(several, list)
            self.values[node] = several[whole(node, 1)]
            return
        values = [v.meta["val"] for v in (node, *node.all_input_nodes)]
        self._double = any(isinstance(v, torch.Tensor) and v.dtype is torch.float64 for v in values)
        translation, before = TABLE.get(node.target), len(self.nodes)
        result = translation(self, node) if translation is not None else None
        if result is None:
            result = self._by_torch(node)
        origin = operator_name(node.target), self.scope
        self.program.notes.origins |= {str(made.name): origin for made in self.nodes[before:]}
        if isinstance(result, ir.Value):
            result.type = ir.TensorType(DTYPES[node.meta["val"].dtype])
        self.values[node] = result

    def holders(self) -> dict[tuple[str, int], str]:
        """Finds the values that hold the entries of the clip's results, where operators of the file compute them."""
        return {
            (name, entry): f"{value.name}{place}"
            for node, value in self.values.items()
            if isinstance(value, ir.Value) and value.producer() is not None
            for name, entry, place in self.program.notes.holders.get(node, ())
        }

    def _by_torch(self, node: Node) -> Emitted:
        """Inlines what PyTorch's own exporter makes of an operator without an entry in the table."""
        alike = signature(node, self.larger)
        model = self._exported.pop(alike, None) or export_operator(node, self.larger)
        if not any(_graphs(a) for inner in model.graph for a in inner.attributes.values()):  # these are written into
            self._exported[alike] = model
        mapping = dict(zip(model.graph.inputs, map(self.value, node.all_input_nodes), strict=True))
        for value in model.graph.initializers.values():
            assert value.const_value is not None
            mapping[value] = self.initializer(f"{node.name}.{value.name}", value.const_value.numpy())
        for inner in model.graph:
            operands = [mapping[v] if v is not None else None for v in inner.inputs]
            single = self._double and inner.op_type in SINGLE
            copy = ir.Node(
                inner.domain,
                inner.op_type,
                self._cast(operands, inner.op_type, ir.DataType.FLOAT) if single else operands,
                list(inner.attributes.values()),
                num_outputs=len(inner.outputs),
                overload=inner.overload,
                name=self.unique(inner.op_type),
            )
            for old, new in zip(inner.outputs, copy.outputs, strict=True):
                new.name = f"{copy.name}.{old.name}"
                mapping[old] = new
            for part in inner.attributes.values():
                for body in _graphs(part):
                    _read_outer(body, mapping, copy.name)
            self.nodes.append(copy)
            if single:
                self.single.add(inner.op_type)
                for old in inner.outputs:
                    mapping[old] = self._append(1, "Cast", [mapping[old]], {"to": int(ir.DataType.DOUBLE)})[0]
        results = [mapping[v] for v in model.graph.outputs]
        return results[0] if isinstance(node.meta["val"], torch.Tensor) else results


def _graphs(attribute: ir.Attr) -> list[ir.Graph]:
    """The graph that an attribute has: the body of a loop, a branch of a choice; no operator has a list of them."""
    return [attribute.as_graph()] if attribute.type is ir.AttributeType.GRAPH else []


def _read_outer(graph: ir.Graph, outer: Mapping[ir.Value, ir.Value | None], name: str | None) -> None:
    """Makes the body of an operator read what has taken the place of values around it, and gives its own new names."""
    for given in graph.inputs:
        given.name = f"{name}.{given.name}"
    for inner in graph:
        for i, value in enumerate(inner.inputs):
            if value is not None and value in outer:
                inner.replace_input_with(i, outer[value])
        for made in inner.outputs:
            made.name = f"{name}.{made.name}"
        for attribute in inner.attributes.values():
            for part in _graphs(attribute):
                _read_outer(part, outer, name)


Translation: TypeAlias = Callable[[Emitter, Node], "Emitted | None"]
TABLE: dict[Target, Translation] = {}
"""How operators are translated; where there is no entry, or it gives None, PyTorch's own exporter does it."""


def translates(*operators: Target) -> Callable[[Translation], Translation]:
    """Decorates the function that emits these operators."""

    def add(function: Translation) -> Translation:
        TABLE.update(dict.fromkeys(operators, function))
        return function

    return add


def _numbers(name: str, value: Attribute) -> Attribute | ir.Attr:
    """Says of a list of whole numbers that it is one: else it is first looked at for graphs, tensors and types."""
    whole = isinstance(value, (list, tuple)) and value and all(isinstance(v, int) for v in value)
    return ir.Attr(name, ir.AttributeType.INTS, value) if whole else value


def declared(
    operator: str, *operands: str, only: Mapping[str, float] = EVERY, **attributes: str | float
) -> Translation:
    """Makes a translation in one line: one ONNX operator on some of the arguments, with others for attributes.

    ``declared("Elu", alpha="alpha", only={"scale": 1})`` is ONNX's ``Elu`` of the argument ``self`` with the argument
    ``alpha`` for its attribute of that name, if the argument ``scale`` is 1.

    Args:
        operator: The ONNX operator.
        operands: The arguments that are its inputs; default ``self``.
        only: Values that arguments must have, or there is no such ONNX operator.
        attributes: For each ONNX attribute the argument that gives it, or a number.
    """

    def emit(e: Emitter, node: Node) -> ir.Value | None:
        given = Arguments(node)
        if any(given.number(name) != wanted for name, wanted in only.items()):
            return None
        values = {name: given.plain(how) if isinstance(how, str) else how for name, how in attributes.items()}
        return e.op(operator, *map(given.tensor, operands or ("self",)), **values)

    return emit
