"""The ONNX graph of a step as LiteRT's delegates want it: no output is an input, none is used or made by ``Add``.

A GPU delegate of LiteRT stumbles over an input that is passed on as an output, over an output that the graph goes on
using, and over ``state + tensor`` as an output. A state that takes the value of an input needs no output: whoever runs
the file moves it, as with ``state_io="renamed"``. The other two get a copy: the minimum with infinity, or with the
largest whole number. LiteRT's converter makes one tensor of two outputs that are computed alike, so a second copy is
the maximum with what is least.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

PASSES_ON = {"Identity"}


def separated(model: ir.Model, own: int, states: Mapping[str, str]) -> dict[str, str]:
    """Rewrites the outputs of a step in place.

    Args:
        model: The step: its first ``own`` outputs are results, the others next states.
        own: How many results it has.
        states: The output that each state takes its next value from, by the state's input.

    Returns:
        For each next state that is the value of an input: the name of the output, now gone, to that of the input.
    """
    graph = model.graph
    fed = {output: state for state, output in states.items()}
    moved: dict[str, str] = {}
    takers: dict[str, str] = {}
    outputs = list(graph.outputs)
    given = Counter(map(_source, outputs))
    copies: Counter[ir.Value] = Counter()
    graph.outputs.clear()
    for place, output in enumerate(outputs):
        name, value = output.name or "", _source(output)
        source = value.name or ""
        free = place >= own and name in fed and value.is_graph_input() and source not in takers
        if free and not _in_a_ring(fed[name], source, takers):
            moved[name], takers[source] = source, fed[name]
            continue
        if given[value] > 1 or _needs_copy(value, states):
            original = value
            for turn in range(copies[original] // 2 + 1):
                value = _copied(graph, value, f"{name}.{turn}", most=(copies[original] + turn) % 2 == 0)
            copies[original] += 1
        value.name = name
        graph.outputs.append(value)
    RemoveUnusedNodesPass()(model)
    return moved


def _in_a_ring(state: str, source: str, takers: Mapping[str, str]) -> bool:
    """Says whether a state that took the value of this input would only hand it around."""
    while state != source and state in takers:
        state = takers[state]
    return state == source


def _source(value: ir.Value) -> ir.Value:
    """Finds the value that another one merely repeats."""
    node = value.producer()
    while node is not None and node.op_type in PASSES_ON and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _needs_copy(value: ir.Value, states: Mapping[str, str]) -> bool:
    """Says whether a value is an input or a constant, is used, or is the sum of a state and something."""
    node = value.producer()
    if node is None or any(user.op_type not in PASSES_ON for user, _ in value.uses()):
        return True
    return node.op_type == "Add" and any(v is not None and v.name in states for v in node.inputs)


def _copied(graph: ir.Graph, value: ir.Value, name: str, *, most: bool) -> ir.Value:
    """Makes the same value a tensor of its own: the minimum with the ``most`` that there is, or a maximum."""
    dtype, rank = value.dtype if value.dtype is not None else ir.DataType.FLOAT, len(value.shape or ())
    if dtype == ir.DataType.BOOL:
        node = ir.node("Or" if most else "And", [value, value])
    else:
        # With as many dims as the value: LiteRT's converter keeps channels last only where all operands have four.
        limit = np.full((1,) * rank, _limit(dtype.numpy(), most), dtype.numpy())
        constant = ir.Value(name=f"{name}.limit", const_value=ir.tensor(limit, name=f"{name}.limit"))
        constant.shape, constant.dtype = ir.Shape(limit.shape), dtype
        graph.register_initializer(constant)
        node = ir.node("Min" if most else "Max", [value, constant])
    copy = node.outputs[0]
    copy.shape, copy.dtype = value.shape, dtype
    graph.append(node)
    return copy


def _limit(dtype: np.dtype[Any], most: bool) -> float:
    """The largest or the least number; LiteRT keeps whole numbers of 64 bits in 32."""
    if dtype.kind == "f":
        return np.inf if most else -np.inf
    own, kept = np.iinfo(dtype), np.iinfo(np.int32)
    return min(own.max, kept.max) if most else max(own.min, kept.min)
