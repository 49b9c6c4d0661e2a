"""Which numbers of a result depend on which entries of an input: followed through a graph, operator by operator.

Each tensor has a companion that marks the numbers in which a marked number of an input has a part. Running the graph
with changed numbers is no such proof: ``0 * NaN`` says that a mask lets through what it does not, a comparison hides a
change, and a saturated gate shows none.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node, map_arg

from co3d_compile.analysis.integer_bounds import IntegerBounds
from co3d_compile.analysis.operator_families import (
    FORGET_LOW,
    FORGET_ZERO,
    GATHERS,
    MOVES,
    NORMS,
    ORDERS,
    PRODUCTS,
    REDUCTIONS,
    SCATTERS,
    TWO_SOURCES,
    is_pointwise,
    keeps_dims,
    name_of,
    reduced_dims,
)
from co3d_compile.analysis.structural_values import LOW, Structure, floats, moved, product
from co3d_compile.ir.node_reading import operand

aten = torch.ops.aten
Marks = Any  # a tensor of bool for each result of a node


class Tracker:
    """A tracker of marks through a graph of one length.

    Args:
        module: The graph.
        inputs: One clip of each input, of any values: shapes are taken from it.
    """

    def __init__(self, module: GraphModule, inputs: list[Tensor]) -> None:
        self.structure = Structure(module, inputs)
        self.bounds = IntegerBounds(self.structure)
        self.nodes = [n for n in module.graph.nodes if n.op == "call_function"]
        self.inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
        self.result = module.graph.output_node().all_input_nodes[0]
        self.marks: dict[Node, Marks] = {}

    def follow(self, marks: Mapping[int, Tensor]) -> dict[Node, Marks]:
        """Marks every node that depends on marked entries of some inputs."""
        self.marks = {self.inputs[i]: mark for i, mark in marks.items()}
        for node in self.nodes:
            if any(n in self.marks for n in node.all_input_nodes):
                found = self._operator(node)
                if isinstance(found, tuple) or bool(found.any()):
                    self.marks[node] = found
        return self.marks

    def mark(self, node: Node) -> Tensor:
        """The marks of a tensor."""
        if node in self.marks:
            return self.marks[node]
        return torch.zeros(self.structure.shape(node), dtype=torch.bool)

    def _operator(self, node: Node) -> Marks:
        if node.target is operator.getitem:
            source, item = node.args
            return self.marks[source][item]  # type: ignore[index]
        found = self._family(node)
        if found is None:
            return self._everything(node)
        shapes = self.structure.shapes[node]
        if isinstance(shapes, list) and isinstance(found, Tensor):  # values and where they were
            return tuple(found for _ in shapes)
        return found

    def _everything(self, node: Node) -> Marks:
        shapes = self.structure.shapes[node]
        if isinstance(shapes, list):
            return tuple(torch.ones(shape, dtype=torch.bool) for shape in shapes)
        return torch.ones(shapes, dtype=torch.bool)

    def _family(self, node: Node) -> Marks | None:
        """Finds the marks of an operator's result; None where it is of no kind that is known."""
        name = name_of(node)
        if name in MOVES and self._static_besides(node):
            return self._moved(node)
        if name in GATHERS:
            return self._gather(node, GATHERS[name])
        if name in SCATTERS:
            return self._scatter(node, name)
        if is_pointwise(node):
            return self._pointwise(node, name)
        if name in REDUCTIONS or name in ORDERS or name in NORMS:
            return self._over_dims(node, name)
        if name in PRODUCTS:
            return self._product(node)
        if name == "scaled_dot_product_attention":
            return self._attention(node)
        return None

    # --- kinds of operators

    def _static_besides(self, node: Node) -> bool:
        """Says whether all but the first operands are constants."""
        data = 2 if name_of(node) in TWO_SOURCES else 1
        rest: list[Node] = []
        map_arg((node.args[data:], node.kwargs), rest.append)
        return all(n in self.structure.static for n in rest)

    def _moved(self, node: Node) -> Marks:
        found = moved(node, lambda n: floats(self.mark(n)), self.structure.static)
        return tuple(part > 0 for part in found) if isinstance(found, (tuple, list)) else found > 0

    def _gather(self, node: Node, at: int) -> Tensor | None:
        """Marks what is read at indices that are known; at others, all that may be read."""
        x, index = node.args[0], node.args[at]
        indices = [i for i in (index if isinstance(index, (list, tuple)) else [index]) if isinstance(i, Node)]
        if all(i in self.structure.static for i in indices):
            return self._moved(node)
        if any(i not in self.structure.static for i in indices) and bool(self.mark(x).any()):  # type: ignore[arg-type]
            return None
        if name_of(node) in ("embedding", "take_along_dim", "gather"):
            marks = self.mark(indices[0])
            return (marks.unsqueeze(-1) if name_of(node) == "embedding" else marks).expand(self.structure.shape(node))
        if name_of(node) == "index" and all(isinstance(i, Node) for i in index):  # type: ignore[union-attr]
            found = self.mark(indices[0])
            for i in indices[1:]:
                found = found | self.mark(i)
            rest = len(self.structure.shape(node)) - found.dim()
            return found[(..., *[None] * rest)].expand(self.structure.shape(node))
        return None

    def _scatter(self, node: Node, name: str) -> Tensor | None:
        """Marks what is written at indices that are known, or within the bounds of those that are not."""
        others = [n for n in node.all_input_nodes if n is not node.args[0]]
        position = node.args[1] if name == "index_put" else node.args[2]
        indices: list[Node] = []
        map_arg(position, indices.append)
        if all(i in self.structure.static for i in indices):
            data = {n for n in others if n not in indices} | {node.args[0]}
            return moved(node, lambda n: floats(self.mark(n)), self.structure.static, data=data) > 0
        if name not in ("scatter", "scatter_add", "scatter_reduce"):
            return None
        dim, index, source = node.args[1], indices[0], node.args[3]
        bounds = self.bounds.of(index)
        if bounds is None:
            return None
        marked = self.mark(index)
        if isinstance(source, Node):
            taken = tuple(slice(0, s) for s in marked.shape)
            marked = marked | self.mark(source)[taken]
        size = self.structure.shape(node)[dim]  # type: ignore[index]
        return self.mark(node.args[0]) | _within(marked, bounds, dim, size, self.structure.shape(node))  # type: ignore

    def _pointwise(self, node: Node, name: str) -> Tensor:
        shape = self.structure.shape(node)
        zero, static = self.structure.zero, self.structure.static
        if name == "where" and (cond := operand(node)) in static:
            a, b = node.args[1:]
            picked = torch.where(static[cond].bool(), self._as(a, shape), self._as(b, shape))
            return picked.expand(shape)
        if name == "masked_fill" and (mask := operand(node, 1)) in static:
            return (self._as(node.args[0], shape) & ~static[mask].bool()).expand(shape)
        found = torch.zeros(shape, dtype=torch.bool)
        for n in _read(node, name):
            found = found | self.mark(n)
        return found & ~zero(node)

    def _as(self, operand: object, shape: tuple[int, ...]) -> Tensor:
        return self.mark(operand) if isinstance(operand, Node) else torch.zeros(shape, dtype=torch.bool)

    def _over_dims(self, node: Node, name: str) -> Tensor:
        x = node.all_input_nodes[0]
        marks = self.mark(x)
        if name in FORGET_LOW:
            marks = marks & ~self.structure.low(x)
        if name in FORGET_ZERO:
            marks = marks & ~self.structure.zero(x)
        dims = reduced_dims(node, marks.dim())
        keep = name in ORDERS or name in NORMS or keeps_dims(node)
        found = marks
        for d in sorted(dims, reverse=True):
            found = found.any(d, keepdim=keep)
        shapes = self.structure.shapes[node]
        shape = shapes[0] if isinstance(shapes, list) else shapes
        found = found.expand(shape)
        zero = self.structure.zero(node) if not isinstance(shapes, list) else torch.tensor(False)
        return found & ~zero

    def _product(self, node: Node) -> Tensor | None:
        """Multiplies marked numbers with numbers that are not zero by structure."""
        there = {n: floats(~self.structure.whole(self.structure.zero(n), n)) for n in node.all_input_nodes}
        found = torch.zeros(self.structure.shape(node), dtype=torch.bool)
        for n in dict.fromkeys(node.all_input_nodes):
            if n in self.marks:
                marked = floats(self.mark(n) & ~self.structure.zero(n))
                values = {m: marked if m is n else there[m] for m in node.all_input_nodes}
                result = product(node, values, only=n)
                if result is None:
                    return None
                found = found | result
        return found

    def _attention(self, node: Node) -> Tensor | None:
        q, k, v = (self.mark(n).any(-1) for n in node.args[:3])  # type: ignore[arg-type]
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        seen = torch.ones(*q.shape[:-1], q.shape[-1], k.shape[-1], dtype=torch.bool)
        if isinstance(mask, Node):
            if mask not in self.structure.static:
                return None
            value = self.structure.static[mask]
            seen = seen & (value if value.dtype is torch.bool else value > LOW)
        if node.kwargs.get("is_causal") or (len(node.args) > 5 and node.args[5]):
            seen = seen & torch.ones_like(seen).tril()
        marked = (q.unsqueeze(-1) | k.unsqueeze(-2) | v.unsqueeze(-2)) & seen
        return marked.any(-1, keepdim=True).expand(self.structure.shape(node))


def _read(node: Node, name: str) -> list[Node]:
    """Lists the operands of a pointwise operator whose numbers have a part in the result."""
    if "batch_norm" in name:
        return node.all_input_nodes[:1]
    return [] if name == "full_like" else node.all_input_nodes


def _within(marked: Tensor, bounds: tuple[Tensor, Tensor], dim: int, size: int, shape: tuple[int, ...]) -> Tensor:
    """Finds the places along a dim that marked numbers may be written to, between the bounds of their indices."""
    low, high = (b.expand(marked.shape).clamp(0, size - 1) for b in bounds)
    longer = [size + 1 if d == dim % len(shape) else marked.shape[d] for d in range(len(shape))]
    steps = torch.zeros(longer).scatter_add_(dim, low, floats(marked)).scatter_add_(dim, high + 1, -floats(marked))
    found = steps.cumsum(dim).narrow(dim, 0, size) > 0.5
    result = torch.zeros(shape, dtype=torch.bool)
    result[tuple(slice(0, s) for s in found.shape)] = found
    return result
