"""Matrix products: time is batch or rows; where it is summed over, the product is a window."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import Node

from co3d_compile.ir.layout import Axis, Layout
from co3d_compile.ir.markers import history, settled
from co3d_compile.ir.node_reading import operand, rank_of, shape_of, whole
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.time_facts import Fact, Kind, NoExtension, combine, constant_of, fact_of, is_stream, known
from co3d_compile.rules.base import Rule, register
from co3d_compile.rules.pointwise import broadcast, with_time_once
from co3d_compile.step_graph.step_graph import StepGraph

aten = torch.ops.aten
PAIRS = "computes every pair of entries"


@register(aten.linear.default)
class Linear(Rule):
    """A linear layer over the last dim."""

    why = "sums over features into which time is folded"

    def mixes(self, node: Node) -> Iterable[tuple[Node, Iterable[int]]]:
        return [(operand(node), [-1])]

    def weights(self, node: Node) -> Iterable[object]:
        return node.args[1:]

    def layout(self, node: Node) -> Layout:
        lay = known(operand(node))
        kept = [a for a in lay.dims[-1] if a.label and a.size == 1]
        return lay.replace(lay.rank - 1, [*kept, Axis("", shape_of(node)[-1])])

    def entry(self, node: Node, low: StepGraph, i: int) -> Node:
        x = operand(node)
        time = known(x).time
        last = time is not None and time.dim == rank_of(x) - 1
        new = low.whole_entry(x, i) if last else low.entry(x, i)
        result = low.call(node.target, new, *(low.plain(a) for a in node.args[1:] if isinstance(a, Node)))
        return low.without_time(node, result) if last else result


@register(aten.matmul.default, aten.bmm.default, aten.mm.default)
class MatrixProduct(Rule):
    """(…, m, k) times (…, k, n)."""

    why = "sums over time (attention, or weights over the clip)"

    def mixes(self, node: Node) -> Iterable[tuple[Node, Iterable[int]]]:
        a, b = operand(node), operand(node, 1)
        return [(a, [-1]), (b, [-2 if rank_of(b) > 1 else -1])]

    def layout(self, node: Node) -> Layout:
        a, b = (known(n) for n in node.args[:2] if isinstance(n, Node))
        if a.rank == 1 or b.rank == 1:
            rows = a.dims[:-1] if b.rank == 1 else (*b.dims[:-2], b.dims[-1])
            return with_time_once(Layout(rows), PAIRS)
        batch = broadcast([Layout(a.dims[:-2]), Layout(b.dims[:-2])]) if max(a.rank, b.rank) > 2 else Layout(())
        return with_time_once(Layout((*batch.dims, a.dims[-2], b.dims[-1])), PAIRS)

    def flow(self, node: Node) -> Fact:
        fact, layout = super().flow(node), self.layout(node)
        if layout.time is None:
            raise NoExtension(PAIRS)
        for n in (operand(node), operand(node, 1)):
            right = layout.rank - layout.time.dim
            if fact_of(n).kind is Kind.STATIC and right > 2 and rank_of(n) >= right and shape_of(n)[-right] != 1:
                raise NoExtension("meets a constant with a time axis")
        return fact

    def entry(self, node: Node, low: StepGraph, i: int) -> Node:
        a, b = operand(node), operand(node, 1)
        in_rows = is_stream(a) and not is_stream(b) and rank_of(b) == 2 and rank_of(a) > 2
        if in_rows and node.target == aten.matmul.default:
            return low.call(node.target, low.entry(a, i), low.plain(b))
        return low.with_time_of_one(node, i)


@register(aten.addmm.default)
class LinearOverRows(Rule):
    """bias + (m, k) times (k, n)."""

    def mixes(self, node: Node) -> Iterable[tuple[Node, Iterable[int]]]:
        x, weight = operand(node, 1), operand(node, 2)
        return [(x, [-1]), (weight, [0])]

    def layout(self, node: Node) -> Layout:
        x, weight = operand(node, 1), operand(node, 2)
        return Layout((known(x).dims[0], known(weight).dims[1]))


@register(aten.scaled_dot_product_attention.default)
class Attention(Rule):
    """Scaled dot product attention: tokens are mixed, batch and heads are not.

    Where a constant mask lets every entry see only the newest few, keys and values are remembered and it streams.
    """

    why = "attention over time"

    def past(self, node: Node) -> int:
        """Counts the entries of the past that a banded mask lets every entry see; 0 without such a mask."""
        mask = Arguments(node).optional("attn_mask")
        reach = constant_of(mask).band if mask is not None else None
        q, k, v = (n for n in node.args[:3] if isinstance(n, Node))
        facts = [fact_of(n) for n in (q, k, v)]
        places = [known(n).time if is_stream(n) else None for n in (q, k, v)]
        alike = all(p is not None and p.alone and p.dim == rank_of(q) - 2 for p in places)
        even = all(f.spacing == 1 and f.delay == facts[0].delay for f in facts)
        if reach is None or reach[0] != 0 or not alike or not even:
            return 0
        return int(reach[1])

    def flow(self, node: Node) -> Fact:
        if self.past(node):
            return combine([fact_of(n) for n in node.all_input_nodes], self.layout(node))
        return super().flow(node)

    def lower(self, node: Node, low: StepGraph) -> list[Node]:
        q, k, v = (n for n in node.args[:3] if isinstance(n, Node))
        if k.target is not history:
            return super().lower(node, low)
        past = whole(k, 1)
        results = []
        for i in range(low.pulse(q)):
            one = low.as_clip([low.ref(q, i)], known(q))
            keys, values = (low.as_clip([low.ref(n, i + m) for m in range(past + 1)], known(n)) for n in (k, v))
            seen = self._seen(node, low, i, past, one)
            result = low.call(node.target, one, keys, values, seen, scale=node.kwargs.get("scale"))
            result = low.call(aten.squeeze.dim, result, rank_of(q) - 2)
            fewer = -(-(past + fact_of(node).delay - i) // low.pulse(node))  # steps in which it sees no whole band
            results.append(low.call(settled, result, result, fewer) if low.ends is None else result)
        return results

    def _seen(self, node: Node, low: StepGraph, i: int, past: int, q: Node) -> Node | None:
        """Masks what lies before the stream's first entry, for each row of the batch's dim."""
        batch = known(operand(node)).batch
        if batch is None:
            return None
        first = next(n for n in low.graph.nodes if n.op == "placeholder")
        index = low.call(aten.add.Tensor, low.counter(first, low.pulse(node)), i - fact_of(node).delay)
        index = low.call(aten.clamp.default, index, 0)
        back = low.constant(f"back_{past}", torch.arange(past, -1, -1).view(1, -1))
        seen = low.beside_rows(low.call(aten.le.Tensor, back, index), batch)
        behind = [1] * (len(low.sizes(q)) - 2 - batch.dim)
        return low.call(aten.reshape.default, seen, [*[1] * batch.dim, -1, *behind, past + 1])

    def mixes(self, node: Node) -> Iterable[tuple[Node, Iterable[int]]]:
        return [(n, [-1, -2]) for n in node.args[:3] if isinstance(n, Node)]

    def layout(self, node: Node) -> Layout:
        q, _, v = (known(n) for n in node.args[:3] if isinstance(n, Node))
        return Layout((*q.dims[:-1], v.dims[-1]))


@register(aten.embedding.default)
class Embedding(Rule):
    """Rows of a table for each index."""

    def layout(self, node: Node) -> Layout:
        table, index = operand(node), operand(node, 1)
        lay = known(index)
        return lay.insert(lay.rank, Layout.plain([shape_of(table)[1]]).dims[0])
