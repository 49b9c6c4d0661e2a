"""What is known of the numbers in a graph whatever its inputs are: constants, zeros, masked scores."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node, map_arg

from co3d_compile.analysis.operator_families import (
    GATHERS,
    KEEP_ZERO,
    MOVES,
    PRODUCTS,
    name_of,
    reduced_dims,
)
from co3d_compile.ir.node_reading import called

aten = torch.ops.aten
LOW = -1e4
"""A number to which at most this is added has no part in a softmax, or in the maximum of a row."""
NO = torch.tensor(False)
Shape = tuple[int, ...]


def floats(marks: Tensor) -> Tensor:
    """Marks as numbers, for operators that take no flags."""
    return marks.to(torch.float32)


class Structure(Interpreter):
    """Facts of every number in a graph of one length.

    Args:
        module: The graph.
        inputs: One clip of each input, of any values.

    Attributes:
        static: The values of what does not depend on the inputs.
        shapes: The shape of each tensor; several of a node with several results.
    """

    def __init__(self, module: GraphModule, inputs: list[Tensor]) -> None:
        super().__init__(module)
        self.static: dict[Node, Tensor] = {}
        self.shapes: dict[Node, Any] = {}
        self.dtypes: dict[Node, torch.dtype] = {}
        self._zero: dict[Node, Tensor] = {}
        self._low: dict[Node, Tensor] = {}
        with torch.no_grad():
            self.run(*inputs)

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        constant = n.op == "get_attr" or (n.op == "call_function" and all(x in self.static for x in n.all_input_nodes))
        if constant and isinstance(value, Tensor):
            self.static[n] = value.detach()
        if isinstance(value, Tensor):
            self.shapes[n], self.dtypes[n] = tuple(value.shape), value.dtype
        elif isinstance(value, (tuple, list)):
            self.shapes[n] = [tuple(v.shape) if isinstance(v, Tensor) else () for v in value]
        return value

    def shape(self, node: Node) -> Shape:
        """The shape of a tensor."""
        shape: Shape = self.shapes[node]
        return shape

    def whole(self, marks: Tensor, node: Node) -> Tensor:
        """Marks of the shape of a tensor."""
        return marks.expand(self.shape(node))

    # --- zeros

    def zero(self, node: Node) -> Tensor:
        """Marks the numbers that are zero whatever the inputs are."""
        if node not in self._zero:
            self._zero[node] = self._find_zero(node)
        return self._zero[node]

    def _find_zero(self, node: Node) -> Tensor:
        if node in self.static:
            return self.static[node] == 0
        if node.op != "call_function" or node not in self.dtypes:
            return NO
        name, args = name_of(node), node.args
        operands = [a for a in args if isinstance(a, Node)]
        if name in MOVES or self._known_gather(node, name):
            if not any(bool(self.zero(x).any()) for x in node.all_input_nodes) and name != "constant_pad_nd":
                return NO
            fill = float(name == "constant_pad_nd" and (args[2] if len(args) > 2 else 0) != 0)
            return ~(moved(node, lambda n: floats(~self.whole(self.zero(n), n)), self.static, fill) > 0)
        if name == "mul":
            return reduce(torch.logical_or, map(self.zero, operands), NO)
        if name in ("div", "true_divide") and isinstance(args[0], Node):
            return self.zero(args[0])
        if name in ("add", "sub") and len(operands) == 2:
            return self.zero(operands[0]) & self.zero(operands[1])
        if name == "exp":
            return self.low(operands[0])
        if name in ("sum", "mean"):
            zero = self.whole(self.zero(operands[0]), operands[0])
            dims = reduced_dims(node, zero.dim())
            keep = len(self.shape(node)) == zero.dim()
            for d in sorted(dims, reverse=True):
                zero = zero.all(d, keepdim=keep)
            return zero
        if name == "relu":
            return self.zero(operands[0]) | self.low(operands[0])
        if name in KEEP_ZERO:
            return self.zero(operands[0])
        if name in ("softmax", "_softmax"):
            low = self.low(operands[0])
            return low & ~self.whole(low, operands[0]).all(reduced_dims(node, len(self.shape(node)))[0], keepdim=True)
        if name in ("where", "masked_fill"):
            return self._picked(node, name, self.zero, lambda v: v == 0)
        if name in PRODUCTS and any(bool(self.zero(x).any()) for x in operands):
            there = {n: floats(~self.whole(self.zero(n), n)) for n in node.all_input_nodes}
            found = product(node, there)
            return NO if found is None else ~found
        return NO

    def _known_gather(self, node: Node, name: str) -> bool:
        """Says whether it reads at indices that are constants."""
        if name not in GATHERS:
            return False
        indices: list[Node] = []
        map_arg(node.args[1:], indices.append)
        return all(i in self.static for i in indices)

    def _picked(self, node: Node, name: str, of: Callable[[Node], Tensor], number: Callable[[float], bool]) -> Tensor:
        """Finds a fact behind ``where`` or ``masked_fill`` with a constant mask."""
        cond, yes, no = node.args if name == "where" else (node.args[1], node.args[2], node.args[0])
        if cond not in self.static:
            return NO

        def fact(x: Any) -> Tensor:
            return of(x) if isinstance(x, Node) else torch.tensor(number(x))

        return torch.where(self.static[cond].bool(), fact(yes), fact(no))  # type: ignore[index]

    # --- scores that a mask has taken out

    def low(self, node: Node) -> Tensor:
        """Marks the numbers that a constant mask makes so low that they have no part in a softmax or a maximum."""
        if node not in self._low:
            self._low[node] = self._find_low(node)
        return self._low[node]

    def _find_low(self, node: Node) -> Tensor:
        if node in self.static:
            value = self.static[node]
            return value <= LOW if value.is_floating_point() else NO
        if node.op != "call_function" or node not in self.dtypes:
            return NO
        name, args = name_of(node), node.args
        operands = [a for a in args if isinstance(a, Node)]
        if name in MOVES or self._known_gather(node, name):
            fill = float(name == "constant_pad_nd" and float(args[2] if len(args) > 2 else 0) <= LOW)  # type: ignore
            if not fill and not any(bool(self.low(x).any()) for x in node.all_input_nodes):
                return NO
            return moved(node, lambda n: floats(self.whole(self.low(n), n)), self.static, fill) > 0.999
        if name == "add":
            return reduce(torch.logical_or, map(self.low, operands), NO)
        if name in ("sub", "_to_copy", "to", "clone"):
            return self.low(operands[0]) if isinstance(args[0], Node) else NO
        if name in ("where", "masked_fill"):
            return self._picked(node, name, self.low, lambda v: v <= LOW)
        return NO


def moved(
    node: Node,
    of: Callable[[Node], Tensor],
    static: Mapping[Node, Tensor],
    fill: float = 0.0,
    data: Collection[object] | None = None,
) -> Any:
    """Applies an operator that moves numbers to other numbers.

    Args:
        node: The operator.
        of: The numbers in place of each operand.
        static: The indices among its operands, which stay as they are.
        fill: What a pad fills in.
        data: The operands that are no indices, if they are not all, or the first of a gather.
    """
    name = name_of(node)
    if data is None:
        data = {node.args[0]} if name in GATHERS else node.all_input_nodes
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: of(n) if n in data else static[n])
    if name == "constant_pad_nd":
        args = (args[0], args[1], fill)
    return called(node.target)(*args, **kwargs)


def product(node: Node, values: Mapping[Node, Tensor], only: Node | None = None) -> Tensor | None:
    """Marks where a product of marks is not zero; None for a product that is not understood.

    Args:
        node: A matrix product or a convolution.
        values: Marks of its operands, as numbers.
        only: The operand whose marks are followed; what is added counts only if it is this one.
    """
    name, args, target = name_of(node), list(node.args), node.target
    added: object = None
    if name in ("addmm", "baddbmm"):
        added, args = args[0], args[1:3]
        target = aten.mm.default if name == "addmm" else aten.bmm.default
    elif name == "linear":
        added, args = (args[2] if len(args) > 2 else None), args[:2]
    elif name.startswith("conv"):
        added, args = (args[2] if len(args) > 2 else None), [*args[:2], None, *args[3:]]
    result = None
    if only is None or only in args:
        result = target(*map_arg(tuple(args), values.__getitem__)) > 0  # type: ignore[operator]
    if isinstance(added, Node) and (only is None or only is added):
        if name.startswith("conv"):
            return None
        marks = values[added] > 0
        result = marks if result is None else result | marks
    return result
