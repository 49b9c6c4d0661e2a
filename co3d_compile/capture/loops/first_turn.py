"""A first turn that was captured as other operators than the rest: the body on zeros, shown by numbers.

``v = 0.0`` in front of a loop makes ``v + x`` a sum with a number in the first turn, and one of two tensors afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.fx import Node

from co3d_compile.capture.loops.body import Body, Signature
from co3d_compile.capture.loops.copies import Copies, Walk
from co3d_compile.ir.graph_edits import insert_constant
from co3d_compile.ir.graph_walks import computed_from, run_operator
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.program import Program
from co3d_compile.ir.random_runs import equal

aten = torch.ops.aten
TOLERANCE = 1e-5
Draw = Callable[..., Tensor]


def add_first_turn(program: Program, signature: Signature, outputs: list[int], whole: bool) -> bool:
    """Adds the turn in front of those that were found, if it is the body on zeros; says whether it is.

    Args:
        program: Has the copies.
        signature: What a turn of the loop takes.
        outputs: The operators of the body that something outside reads.
        whole: Whether the turn must have all of them: else it only makes what the next turn reads.
    """
    copies, keys = signature.copies, signature.states
    walks = {place: walk.moved(-1) for place, walk in copies.walks.items()}
    if any(lag != 1 or (at, 1) not in copies.starts for at, lag in keys) or any(w.start < 0 for w in walks.values()):
        return False
    if not all(copies.remembers(at) for at, _ in keys):
        return False  # no more than a piece of a turn that is read by the next one
    body = Body(program, signature)
    entries, fixed, own = signature.walked, list(signature.fixed.values()), list(body.values)
    module = body.close([body.values[at] for at in own])
    firsts = [copies.starts[key] for key in keys]
    read = _collected_before(program, copies, outputs)
    draws: tuple[Draw, ...] = (torch.rand, torch.randn)  # what a ReLU lets through alone says too little
    for draw in draws:
        values = drawn_values([*firsts, *fixed, *(w.root for w, _ in entries), *read.values()], program, draw)
        taken = [_entry(values[w.root], w, i) for w, i in entries]
        with torch.no_grad():
            results = module(*taken, *(_zeros(copies.body[at]) for at, _ in keys), *(values[n] for n in fixed))
        handed, computed = results[: len(keys)], dict(zip(own, results[len(keys) :], strict=True))
        if not all(equal(values[n], result, TOLERANCE) for n, result in zip(firsts, handed, strict=True)):
            return False
        read = {at: n for at, n in read.items() if at in computed and equal(values[n], computed[at], TOLERANCE)}
    if whole and not set(outputs) <= {*read, *(at for at, _ in keys)}:
        return False
    copies.turns.insert(0, {**read, **{at: copies.starts[at, 1] for at, _ in keys}})
    copies.walks = walks
    first = next(n for n in program.graph.nodes if n.op == "call_function")
    for at, lag in keys:
        like = copies.body[at].meta["val"]
        zero = torch.zeros([1] * like.dim(), dtype=like.dtype)
        copies.starts[at, lag] = insert_constant(program, first, "start_of_loop", zero)
    return True


def _zeros(node: Node) -> Tensor:
    value = node.meta["val"]
    return torch.zeros(tuple(value.shape), dtype=value.dtype)


def _entry(root: Tensor, walk: Walk, index: int) -> Tensor:
    """Takes what the turn in front takes of a walk."""
    return root.select(walk.dim, walk.start - walk.step + index)


def _collected_before(program: Program, copies: Copies, outputs: list[int]) -> dict[int, Node]:
    """Finds what concatenations collect right before the first turn's outputs, by the operator of the body."""
    turn, found = copies.turns[0], dict[int, Node]()
    operators = {turn[at]: at for at in outputs if at in turn}
    for cat in [n for n in program.graph.nodes if n.target is aten.cat.default]:
        parts = [_collected(part) for part in Arguments(cat).tensors("tensors")]
        for before, part in pairwise(parts):
            if part in operators:
                found[operators[part]] = before
    return found


def _collected(part: Node) -> Node:
    return part.all_input_nodes[0] if part.target is aten.unsqueeze.default else part


def drawn_values(nodes: Sequence[Node], program: Program, draw: Draw) -> dict[Node, Tensor]:
    """Computes nodes, and all that they are computed from, for random inputs."""
    wanted = computed_from(*nodes)
    generator, values = torch.Generator().manual_seed(0), dict[Node, Tensor]()
    for node in [n for n in program.graph.nodes if n in wanted]:
        if node.op == "placeholder":
            value = node.meta["val"]
            values[node] = draw(tuple(value.shape), generator=generator).to(value.dtype)
        else:
            values[node] = program.constant(node) if node.op == "get_attr" else run_operator(node, values)
    return values
