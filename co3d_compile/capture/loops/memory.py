"""How long a loop remembers: after so many turns nothing depends on what it started from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from co3d_compile.ir.graph_walks import computed_from
from co3d_compile.ir.node_reading import returned
from co3d_compile.ir.random_runs import random_tensor

aten = torch.ops.aten
MOST = 100  # turns: what remembers longer counts as if it never forgot
PATIENCE = 4  # turns in which no number was forgotten


def memory_of(body: GraphModule, states: Sequence[Node], constants: Mapping[Node, Tensor]) -> int | None:
    """Counts the turns whose outputs a start has a part in; None if it has for good, or may.

    Where no value is made of itself, the graph says it: a cache of the last frames, one value a frame. Else the loop
    is run from NaN until none is left: a cache in one tensor that is cut and appended to.

    Args:
        body: ``(*entries, *states, *fixed) -> (*next states, *outputs)``.
        states: Its placeholders of values that are handed on.
        constants: Real values of placeholders; others are drawn at random.
    """
    results = returned(body.graph)
    reads = [_read(result, set(states)) for result in results]
    sources = [{states.index(s) for s in found if s in states} for found in reads]
    depths = _depths(sources[: len(states)])
    if depths is not None:
        return max((depths[i] for read in sources[len(states) :] for i in read), default=0)
    if any(_hides(node) for found in reads for node in found):
        return None
    return _turns_until_forgotten(body, states, constants)


def _read(result: Node, states: set[Node]) -> set[Node]:
    """Finds the nodes between a result and the states that it depends on, these among them."""
    seen = computed_from(result)
    depends: set[Node] = set()
    for node in result.graph.nodes:
        if node in seen and (node in states or any(n in depends for n in node.all_input_nodes)):
            depends.add(node)
    return depends


def _depths(reads: list[set[int]]) -> list[int] | None:
    """Counts for each state the turns until nothing of a start is left in it; None where one is made of itself."""
    known: dict[int, int] = {}
    try:
        for i in TopologicalSorter(dict(enumerate(reads))).static_order():
            known[i] = 1 + max((known[j] for j in reads[i]), default=0)
    except CycleError:
        return None
    return [known[i] for i in range(len(reads))]


def _hides(node: Node) -> bool:
    """Says whether what depends on NaN may be a number again: a comparison, an index."""
    values = [v for v in pytree.tree_leaves(node.meta["val"]) if isinstance(v, Tensor)]
    return node.target is aten.nan_to_num.default or not all(v.is_floating_point() for v in values)


def _turns_until_forgotten(body: GraphModule, states: Sequence[Node], constants: Mapping[Node, Tensor]) -> int | None:
    generator = torch.Generator().manual_seed(0)
    given: dict[Node, Tensor] = {}
    for node in body.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            drawn = constants[node] if node in constants else random_tensor(value.shape, value.dtype, generator)
            given[node] = torch.full_like(drawn, torch.nan) if node in states else drawn
    left, waited, last = None, 0, 0
    with torch.no_grad(), torch.backends.nnpack.flags(enabled=False):
        for turn in range(1, MOST + 1):
            results = body(*given.values())
            given.update(zip(states, results, strict=False))
            if any(bool(result.isnan().any()) for result in results[len(states) :]):
                last = turn
            count = sum(int(given[s].isnan().sum()) for s in states)
            if not count:
                return last
            waited = waited + 1 if count == left else 0
            left = count
            if waited == PATIENCE:
                break
    return None
