"""Turns of a loop that do not lie beside the others: last ones that lack parts, a first one that lies among others.

What nobody reads is not captured, so the last copies may lack operators: those that would read frames behind the
clip's last one, where each turn looks ahead, and values that are handed on to turns that are not there. In front of the
first copy there may be one more whose operators lie among others, such as those that make the first state
(``if h is None: h = …``).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

from torch.fx import Node

from co3d_compile.capture.loops.copies import Copies, Earlier, Frames, Inner, Outer
from co3d_compile.capture.loops.tokens import Take, Tokens, alike, flat, leaves, uncut


class Values:
    """What each operator of a graph computes of which operands: where that is the same, so is the value.

    Args:
        tokens: Of the graph.

    Attributes:
        frames: The first node that takes some entries: several turns may read it.
    """

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        self.frames: dict[Take, Node] = {}
        self._first: dict[Node, Node] = {}  # that computes the same
        self._alike: dict[Hashable, list[Node]] = {}
        for node in tokens.nodes:
            take = tokens.takes.get(node)
            same = self._alike.setdefault(self._key(node, leaves(node), take.start if take is not None else None), [])
            same.append(node)
            self._first[node] = same[0]
            if (frame := tokens.frames.get(node)) is not None:
                self.frames.setdefault(frame, node)

    def computed(self, like: Node, operands: Sequence[Node], start: int | None) -> list[Node]:
        """Lists the nodes that do what a node does, with other operands; entries are taken from ``start`` on."""
        return self._alike.get(self._key(like, operands, start), [])

    def _key(self, node: Node, operands: Sequence[Node], start: int | None) -> Hashable:
        inputs, take = iter(operands), self.tokens.takes.get(node)
        if take is not None:
            return (node.target, self._value(uncut(next(inputs))), take.dim, start, take.length)
        return (node.target, *(self._leaf(v, inputs) for v in flat((node.args, node.kwargs))))

    def _leaf(self, value: Any, inputs: Iterator[Node]) -> Hashable:
        return self._value(next(inputs)) if isinstance(value, Node) else (type(value), str(value))

    def _value(self, node: Node) -> Hashable:
        """What stands for a value: frames that were taken several times are one."""
        return self.tokens.constant(self._first.get(node, node))


class Extension:
    """The search for further turns of a loop, by what their operators must read.

    Args:
        values: Of the graph.
        copies: Found so far; turns are added to it.
    """

    def __init__(self, values: Values, copies: Copies) -> None:
        self.values, self.tokens, self.copies = values, values.tokens, copies
        self.used = {n for turn in copies.turns for n in turn.values()}
        self._given = frozenset(self.used)

    def run(self) -> None:
        """Adds what there is in front, and behind."""
        while self._front():
            pass
        while self._behind():
            pass

    # --- one more turn at the end

    def _behind(self) -> bool:
        """Adds a turn, of which parts may be missing; says whether there may be another one."""
        turn = self._completed({}, len(self.copies.turns), self.copies.turns)
        if turn is None or not self._computes(at for at, node in turn.items() if node not in self.used):
            return False  # what reads no frames would be found for ever
        self.copies.turns.append(turn)
        self.used.update(turn.values())
        return True

    def _completed(self, turn: dict[int, Node], index: int, before: list[dict[int, Node]]) -> dict[int, Node] | None:
        """Finds a turn with all its operators that there are; None where it would begin before the first frame."""
        if any(walk.start + index * walk.step < 0 for walk in self.copies.walks.values()):
            return None
        for at, node in self.copies.body.items():
            if at in turn:
                continue
            read = [self._operand(turn, at, k, index, before) for k in range(len(self.copies.edges[at]))]
            operands = [x for x in read if x is not None]
            if len(operands) == len(read):
                computed = self.values.computed(node, operands, self._start(at, index))
                found = next((n for n in computed if n not in self._given), None)
                if found is not None:
                    turn[at] = found
        return turn

    def _operand(
        self, turn: dict[int, Node], at: int, k: int, index: int, before: list[dict[int, Node]]
    ) -> Node | None:
        edge = self.copies.edges[at][k]
        if isinstance(edge, Inner):
            return turn.get(edge.at)
        if isinstance(edge, Earlier):
            if edge.lag > len(before):
                return self.copies.starts.get((edge.at, edge.lag - len(before)))
            return before[-edge.lag].get(edge.at)
        if isinstance(edge, Outer):
            return edge.node
        walk = self.copies.walks[at, k]
        return self.values.frames.get(Take(walk.root, walk.dim, walk.start + index * walk.step, walk.length))

    def _start(self, at: int, index: int) -> int | None:
        """The index at which an operator takes frames in a turn."""
        walk = self.copies.walk_of(at)
        if walk is not None:
            return walk.start + index * walk.step
        take = self.tokens.takes.get(self.copies.body[at])
        return take.start if take is not None else None

    def _computes(self, turn: Iterable[int]) -> bool:
        """Says whether a turn is more than frames that are taken, and what is the same in each."""
        return any(at not in self.copies.invariant and self.copies.walk_of(at) is None for at in turn)

    # --- one more turn in front

    def _front(self) -> bool:
        """Adds the turn that has computed what the first one starts from, if there is one."""
        copies = self.copies
        handed = {at for at, lag in copies.starts if lag == 1}
        if not handed:
            return False
        turn: dict[int, Node] = {}
        starts: dict[tuple[int, int], Node] = {}
        if not all(self._match(at, copies.starts[at, 1], turn, starts) for at in handed):
            return False
        for at, lag in copies.starts:
            before = copies.starts.get((at, lag + 1))
            if before is not None and starts.setdefault((at, lag), before) is not before:
                return False
        if set(starts) != set(copies.starts) or not self._computes(turn):
            return False
        if not all(alike(node, copies.body[at]) for (at, _), node in starts.items()):
            return False
        kept, copies.starts = copies.starts, starts
        whole = self._completed(turn, -1, [])
        if whole is None:
            copies.starts = kept
            return False
        copies.turns.insert(0, whole)
        copies.walks = {place: walk.moved(-1) for place, walk in copies.walks.items()}
        return True

    def _match(self, at: int, node: Node, turn: dict[int, Node], starts: dict[tuple[int, int], Node]) -> bool:
        """Says whether a node is operator ``at`` of the turn in front.

        Notes what that turn reads from before itself.
        """
        if at in turn:
            return turn[at] is node
        own = self.copies.body[at]
        if node.op != "call_function" or self._token(node) != self._token(own):
            return False
        if (take := self.tokens.takes.get(node)) is not None and take.start != self._start(at, -1):
            return False
        turn[at] = node
        operands = leaves(node)
        if len(operands) != len(self.copies.edges[at]):
            return False
        for k, (edge, x) in enumerate(zip(self.copies.edges[at], operands, strict=True)):
            if isinstance(edge, Inner):
                if not self._match(edge.at, x, turn, starts):
                    return False
            elif isinstance(edge, Earlier):
                if starts.setdefault((edge.at, edge.lag), x) is not x:
                    return False
            elif isinstance(edge, Outer):
                if self.tokens.constant(x) != edge.key:
                    return False
            elif not self._is_frame(x, edge, (at, k)):
                return False
        return True

    def _is_frame(self, x: Node, edge: Frames, place: tuple[int, int]) -> bool:
        walk = self.copies.walks[place]
        return self.tokens.frames.get(x) == Take(edge.root, edge.dim, walk.start - walk.step, edge.length)

    def _token(self, node: Node) -> int:
        return int(self.tokens.ids[self.tokens.place[node]])
