"""Thread states: what remembers becomes an explicit input and output of the graph."""

from __future__ import annotations

import torch
from torch.fx import Node

from co3d_compile.ir.graph_edits import erase_dead, fake_mode, replace
from co3d_compile.ir.markers import carry, counter, fifo, previous, settled, store
from co3d_compile.ir.node_reading import module_path, operand, returned, whole
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.pass_manager import Pass
from co3d_compile.ir.program import Program, State

aten = torch.ops.aten


class ThreadStates(Pass):
    """Rewrites, with one new input and one new output each:

    1. ``previous(x)`` to the state; its next value is ``x``. A chain of them is a shift register;
    2. ``fifo(x, n)`` to ``cat([state, x])``; the next value is its last n entries;
    3. ``carry`` and ``counter`` to the state; its next value is what ``store(state, value)`` gives it.

    What is ``settled`` is from here on what it is of.
    """

    requires = frozenset({"lowered"})
    ensures = frozenset({"threaded"})

    def run(self, program: Program) -> bool:
        graph = program.graph
        anchor = program.placeholders()[-1]
        stored = {n.args[0]: n.args[1] for n in graph.nodes if n.target is store}
        values: list[Node] = []
        replaced: dict[Node, Node] = {}
        names: dict[str, int] = {}
        for node in list(graph.nodes):
            if node.target is settled:
                replace(node, operand(node))
            if node.target not in (previous, fifo, carry, counter):
                continue
            path = module_path(node) or "model"
            names[path] = names.get(path, -1) + 1
            name = f"state.{path}.{names[path]}"
            with graph.inserting_after(anchor):
                state = graph.placeholder(f"state_{len(values)}")
            anchor = state
            state.meta["path"] = path
            replaced[node], value = self._threaded(program, node, state)
            values.append(stored[node] if node.target in (carry, counter) else value)
            given = Arguments(node)
            initial = 0.0 if node.target is counter else given.number("initial")
            if node.target is counter and operand(node).target == program.step.valid:
                program.step.counters.append(name)
            unbounded = node.target is carry and given.given("memory") is None
            shape, dtype = _shape(state), state.meta["val"].dtype
            program.step.states.append(State(name, f"next.{name}", shape, dtype, initial, unbounded))
        final = [replaced.get(v, v) for v in values]
        for old, new in replaced.items():
            old.replace_all_uses_with(new)
        graph.output_node().args = ((*returned(graph), *final),)
        for old in [n for n in reversed(graph.nodes) if n in replaced or n.target is store]:
            graph.erase_node(old)
        erase_dead(graph)
        return bool(values)

    def _threaded(self, program: Program, node: Node, state: Node) -> tuple[Node, Node]:
        """Gives the state its shape. Returns what replaces the node, and the state's next value."""
        graph = program.graph
        if node.target in (carry, counter):
            state.meta["val"] = node.meta["val"]
            return state, state
        x = operand(node)
        if node.target is fifo:
            n = whole(node, 1)
            new = int(x.meta["val"].shape[1])
            with fake_mode(program):
                state.meta["val"] = torch.empty(
                    x.meta["val"].shape[0], n, x.meta["val"].shape[2], dtype=x.meta["val"].dtype
                )
            with graph.inserting_before(node):
                queue = graph.call_function(aten.cat.default, ([state, x], 1))
                last = graph.call_function(aten.slice.Tensor, (queue, 1, new, new + n))
            for made, like in ((queue, node.meta["val"]), (last, state.meta["val"])):
                made.meta = {"val": like, "path": module_path(node)}
            return queue, last
        state.meta["val"] = node.meta["val"]
        return state, x


def _shape(node: Node) -> list[int | str]:
    return ["N", *(int(s) for s in node.meta["val"].shape[1:])]
