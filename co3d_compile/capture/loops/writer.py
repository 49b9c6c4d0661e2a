"""Replaces the copies of a loop by one operator, and what read them by what reads its outputs."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace as replace_fields

import torch
from torch import Tensor
from torch.fx import Node

from co3d_compile.analysis.operator_families import MOVES, name_of
from co3d_compile.capture.loops.body import Body, Signature, common_path, leave_pools, needed
from co3d_compile.capture.loops.copies import Copies, Walk
from co3d_compile.capture.loops.counted_numbers import counts_turns
from co3d_compile.capture.loops.memory import memory_of
from co3d_compile.capture.loops.starts import is_of_first_frame
from co3d_compile.capture.loops.time_dims import TimeDims
from co3d_compile.capture.loops.tokens import frame_of
from co3d_compile.ir.frame_loop import FrameLoop
from co3d_compile.ir.graph_edits import erase_dead, fake_mode, insert, insert_constant, replace
from co3d_compile.ir.graph_walks import in_order
from co3d_compile.ir.node_reading import operands, shape_of
from co3d_compile.ir.operator_arguments import Arguments, filling_like
from co3d_compile.ir.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class Collected:
    """How a concatenation collects an output of the turns: along which dim, and whether that was made for it."""

    at: int
    dim: int
    entries: int | None  # None: each turn's value was given the dim


@dataclass(frozen=True)
class Group:
    """Turns whose outputs a concatenation collects one behind the other.

    Args:
        how: How it collects each of them.
        turn: The first of these turns.
        start: The part of the concatenation that is that turn's.
        count: How many turns there are.
    """

    how: Collected
    turn: int
    start: int
    count: int = 1


class LoopWriter:
    """The writer of a loop as an operator.

    Args:
        program: Has the copies.
        copies: Of the loop.
        times: Where time is in the program.
        pieces: Whether what a turn hands on may be computed from its frames alone.
    """

    def __init__(self, program: Program, copies: Copies, times: TimeDims, pieces: bool = False) -> None:
        self.program, self.copies, self.times, self.pieces = program, copies, times, pieces
        leave_pools(copies)
        self.turn_of = {n: (t, at) for t, turn in enumerate(copies.turns) for at, n in turn.items()}
        self.openings: dict[tuple[int, int], Walk] = {}  # the starts that are frames
        self.numbers: dict[tuple[int, int], float] = {}  # those of one number all over; of frames, zero
        self.begins_late = False  # whether the turns are a loop, but for starts that are computed from frames
        self.outputs = self._outputs()
        self.signature = Signature(copies, self.outputs)
        self.order = {n: i for i, n in enumerate(program.graph.nodes)}

    def _outputs(self) -> list[int]:
        """Finds the operators of the body that something outside reads."""
        found = {at for node, (_, at) in self.turn_of.items() if any(user not in self.turn_of for user in node.users)}
        return sorted(needed(self.copies, list(found)) & found)

    def write(self, with_state: bool, ends: bool = False) -> bool:
        """Writes the operator; says whether the copies are a loop over frames.

        Args:
            with_state: Whether it must hand values on; else it must hand on none.
            ends: Whether the first or last results may be others, where nothing is handed on.
        """
        if not self.outputs or not self._over_frames(with_state):
            return False
        cats = list(self._cats())
        remembers = with_state and any(self.copies.walk_of(at) is None for at, _ in self.signature.states)
        if not (remembers or ends) and any(
            len(Arguments(cat).tensors("tensors")) > groups[0].count for cat, groups in cats
        ):
            return False  # the first or last ones are others: frames_at_once takes them
        alone = [at for at in self.outputs if self._read_alone(at, cats)]
        variants = list(dict.fromkeys(group.how for _, groups in cats for group in groups))
        others = [at for at in alone if all(c.at != at for c in variants)]
        variants += [Collected(at, 1 if len(shape_of(self.copies.body[at])) else 0, None) for at in others]
        loop, stacks = self._loop(variants)
        for cat, groups in cats:
            self._join(cat, groups, stacks)
        self._select_the_rest(variants, stacks)
        sort(self.program)
        erase_dead(self.program.graph)
        self.program.record(loop, "loop over frames")
        return True

    # --- whether it is a loop over frames

    def _over_frames(self, with_state: bool) -> bool:
        takes = self.signature
        if bool(takes.states) != with_state:
            return False
        if not with_state and all(name_of(self.copies.body[at]) in {*MOVES, "getitem"} for at in takes.needed):
            return False  # frames that are only taken are what they are
        if any(at in self.copies.invariant for at, _ in takes.states):
            return False
        walks = {walk for walk, _ in takes.walked}
        turns = len(self.copies.turns)
        if any(counts_turns(w.root) for w in walks) and self._last_alone():
            return False  # a mean over the clip, which a stream would take over all that ever came
        if all(counts_turns(w.root) for w in walks) or not all(self.times.is_time(w.root, w.dim) for w in walks):
            return False
        if any(2 * w.step * turns < shape_of(w.root)[w.dim] for w in walks):
            return False
        if any(node in self.times.timed and not is_of_first_frame(node, self.times) for node in takes.fixed.values()):
            return False
        starts = {key: self.copies.starts[key] for key in takes.states if key in self.copies.starts}
        if len(starts) < len(takes.states):
            return False
        steps = {w.step for w in walks}
        timed = [(key, node) for key, node in starts.items() if node in self.times.timed]
        self.begins_late = not all(self._begins(key, node, steps) for key, node in timed)
        return not self.begins_late

    def _last_alone(self) -> bool:
        """Says whether nothing outside reads what another turn than the last one has computed."""
        last = len(self.copies.turns) - 1
        return all(t == last or self.turn_of.keys() >= n.users.keys() for n, (t, _) in self.turn_of.items())

    def _begins(self, key: tuple[int, int], start: Node, steps: set[int]) -> bool:
        """Says whether a start that is computed from frames is one, or has no more of them than the shape."""
        number = filling_like(start)
        own = self.pieces or self.copies.remembers(key[0])
        walk = self._opening(start, steps) if number is None and own else None
        if walk is not None:
            self.openings[key] = walk
        if number is not None or walk is not None:
            self.numbers[key] = number or 0.0
        return key in self.numbers

    def _opening(self, start: Node, steps: set[int]) -> Walk | None:
        """Makes the walk whose first entry is a start.

        None where the start is no frame, or frames end before the loop.
        """
        take = frame_of(start)
        if take is None or take.length is not None or len(steps) > 1 or not self.times.is_time(take.root, take.dim):
            return None
        walk = Walk(take.root, take.dim, take.start, next(iter(steps)), None)
        last = take.start + (len(self.copies.turns) - 1) * walk.step
        return walk if last < shape_of(take.root)[take.dim] else None

    # --- the operator

    def _loop(self, variants: list[Collected]) -> tuple[Node, dict[tuple[Collected, int], Node]]:
        """Adds the loop, and each of its stacked outputs, by how it is collected and which entry of a turn it is."""
        takes = Signature(self.copies, self.outputs, self.openings.values()) if self.openings else self.signature
        body = Body(self.program, takes)
        turns = len(self.copies.turns)
        keys = [(c, i) for c in variants for i in range(c.entries or 1)]
        results = [body.values[c.at] if c.entries is None else body.entry_of(c.at, c.dim, i) for c, i in keys]
        module = body.close(results)
        fixed = list(takes.fixed.values())
        pairs = zip(fixed, body.fixed.values(), strict=True)
        constants = {inner: self.program.constant(outer) for outer, inner in pairs if outer.op == "get_attr"}
        memory = memory_of(module, list(body.states.values()), constants)
        walked = takes.walked
        dims = tuple(w.dim for w, _ in walked)
        opened = tuple(walked.index((self.openings[key], 0)) if key in self.openings else None for key in body.states)
        loop = FrameLoop(module, dims, len(body.states), tuple(c.dim for c, _ in keys), memory, opened)
        starts = {key: self._start(key) for key in body.states}
        last = max([*fixed, *starts.values(), *(w.root for w, _ in walked)], key=lambda n: self.order.get(n, -1))
        anchor = last.next
        while anchor.op in ("placeholder", "get_attr"):
            anchor = anchor.next
        operands = []
        for walk, i in walked:
            first, end = walk.start + i, walk.start + i + (turns - 1) * walk.step + 1
            size = shape_of(walk.root)[walk.dim]
            args = (walk.dim, first, min(end, size), walk.step)
            whole = args[1:] == (0, size, 1)
            taken = walk.root if whole else insert(self.program, anchor, aten.slice.Tensor, walk.root, *args)
            missing = turns - shape_of(taken)[walk.dim]
            if missing:  # the last turn has no operator that reads them
                pads = [0, 0] * (len(shape_of(taken)) - 1 - walk.dim) + [0, missing]
                taken = insert(self.program, anchor, aten.constant_pad_nd.default, taken, pads)
            operands.append(taken)
        operands += [self._of_shape(start, shape_of(self.copies.body[at]), anchor) for (at, _), start in starts.items()]
        with self.program.graph.inserting_before(anchor):
            node = self.program.graph.call_function(loop, (*operands, *fixed))
        node.meta["path"] = common_path([self.copies.body[at] for at in takes.needed])
        node.meta["val"] = tuple(self._stacked(result, c.dim) for result, (c, _) in zip(results, keys, strict=True))
        stacks = {}
        for i, key in enumerate(keys):
            stacks[key] = insert(self.program, anchor, operator.getitem, node, i)
            stacks[key].meta["path"] = node.meta["path"]
        return node, stacks

    def _start(self, key: tuple[int, int]) -> Node:
        """Finds what a value starts from; zero where an entry takes its place."""
        if key not in self.numbers:
            return self.copies.starts[key]
        like = self.copies.body[key[0]].meta["val"]
        first = next(n for n in self.program.graph.nodes if n.op == "call_function")
        value = torch.full([1] * like.dim(), self.numbers[key], dtype=like.dtype)
        return insert_constant(self.program, first, "start_of_loop", value)

    def _of_shape(self, start: Node, shape: tuple[int, ...], before: Node) -> Node:
        """Repeats a start that is the same for all clips, once for each."""
        return start if shape_of(start) == shape else insert(self.program, before, aten.expand.default, start, shape)

    def _stacked(self, result: Node, dim: int) -> Tensor:
        """Makes a tensor in the shape of an output of all turns."""
        value = result.meta["val"]
        shape = list(value.shape)
        shape.insert(dim, len(self.copies.turns))
        with fake_mode(self.program):
            return torch.empty(shape, dtype=value.dtype)

    # --- what reads it

    def _cats(self) -> Iterator[tuple[Node, list[Group]]]:
        """Yields the concatenations that collect several turns one behind the other.

        Those that join a few turns, as ``cat(hs[t - 1 : t + 2], 1)`` does for each t, read turn by turn.
        """
        found = list(self._joins())
        spans: dict[Collected, set[tuple[int, int]]] = {}
        for _, groups in found:
            for group in groups:
                spans.setdefault(group.how, set()).add((group.turn, group.count))
        few = {
            how
            for how, spanned in spans.items()
            if how.entries is not None
            and (len(spanned) > 2 or all(2 * count <= len(self.copies.turns) for _, count in spanned))
        }
        for cat, groups in found:
            collecting = [group for group in groups if group.how not in few]
            if collecting:
                yield cat, collecting

    def _joins(self) -> Iterator[tuple[Node, list[Group]]]:
        """Yields the concatenations of several turns that follow each other, and which ones these are."""
        for cat in [n for n in self.program.graph.nodes if n.target is aten.cat.default and n not in self.turn_of]:
            parts = Arguments(cat).tensors("tensors")
            dim = Arguments(cat).dim(cat)
            groups: list[Group] = []
            for i, part in enumerate(parts):
                found = self._collected(part, dim)
                if found is None:
                    continue
                how, turn = found
                last = groups[-1] if groups else None
                if last is not None and Group(how, turn - last.count, i - last.count, last.count) == last:
                    groups[-1] = replace_fields(last, count=last.count + 1)
                else:
                    groups.append(Group(how, turn, i))
            groups = [group for group in groups if group.count > 1]
            if groups:
                yield cat, groups

    def _collected(self, part: Node, dim: int) -> tuple[Collected, int] | None:
        if part in self.turn_of:
            turn, at = self.turn_of[part]
            return (Collected(at, dim, shape_of(part)[dim]), turn) if at in self.outputs else None
        if part.target is aten.unsqueeze.default and part.args[0] in self.turn_of:
            turn, at = self.turn_of[part.args[0]]  # type: ignore[index]
            made = Arguments(part).integer("dim") % len(shape_of(part)) == dim
            return (Collected(at, dim, None), turn) if made and at in self.outputs else None
        return None

    def _read_alone(self, at: int, cats: list[tuple[Node, list[Group]]]) -> bool:
        collecting = {cat for cat, groups in cats}
        for node, (_, own) in self.turn_of.items():
            if own == at:
                for user in node.users:
                    through = user.users if user.target is aten.unsqueeze.default else [user]
                    if user not in self.turn_of and not all(u in collecting for u in through):
                        return True
        return False

    def _join(self, cat: Node, groups: list[Group], stacks: dict[tuple[Collected, int], Node]) -> None:
        parts, dim = Arguments(cat).tensors("tensors"), Arguments(cat).dim(cat)
        joined: list[Node] = []
        done = 0
        for group in groups:
            joined += parts[done : group.start]
            done = group.start + group.count
            size = group.how.entries or 1
            whole = self._sequence(cat, group.how, stacks)
            if (group.turn, group.count) != (0, len(self.copies.turns)):
                args = (dim, group.turn * size, (group.turn + group.count) * size)
                whole = insert(self.program, cat, aten.slice.Tensor, whole, *args)
            joined.append(whole)
        joined += parts[done:]
        new = joined[0] if len(joined) == 1 else insert(self.program, cat, aten.cat.default, joined, dim)
        replace(cat, new)

    def _sequence(self, before: Node, how: Collected, stacks: dict[tuple[Collected, int], Node]) -> Node:
        """Joins an output of all turns, one behind the other."""
        if how.entries in (None, 1):
            return stacks[how, 0]
        rows = [
            insert(self.program, before, aten.unsqueeze.default, stacks[how, i], how.dim + 1)
            for i in range(how.entries or 1)
        ]
        apart = insert(self.program, before, aten.cat.default, rows, how.dim + 1)
        shape = list(shape_of(stacks[how, 0]))
        shape[how.dim] *= len(rows)
        return insert(self.program, before, aten.reshape.default, apart, shape)

    def _select_the_rest(self, variants: list[Collected], stacks: dict[tuple[Collected, int], Node]) -> None:
        """Makes what reads the value of one turn read that turn's entry of the output."""
        sequences = {how: self._from_the_start(how, stacks[how, 0]) for how in variants if how.entries is None}
        for node, (turn, at) in self.turn_of.items():
            users = [u for u in node.users if u not in self.turn_of and (u.users or u.op == "output")]
            if at not in self.outputs or not users:
                continue
            how = next(c for c in variants if c.at == at)
            for user in users:
                if how.entries is None:
                    every, before = sequences[how]
                    value = insert(self.program, user, aten.select.int, every, how.dim, before + turn)
                else:
                    every = self._sequence(user, how, stacks)
                    args = (how.dim, turn * how.entries, (turn + 1) * how.entries)
                    value = insert(self.program, user, aten.slice.Tensor, every, *args)
                user.replace_input_with(node, value)

    def _from_the_start(self, how: Collected, stack: Node) -> tuple[Node, int]:
        """Joins an output of all turns to the frame that it starts from, where that is read too; else it is by itself.

        The number says how many entries are in front of the first turn's.
        """
        walk, start = self.openings.get((how.at, 1)), self.copies.starts.get((how.at, 1))
        if walk is None or start is None or not _computed_from_it(start):
            return stack, 0
        after = stack.next
        first = insert(self.program, after, aten.slice.Tensor, walk.root, walk.dim, walk.start, walk.start + 1)
        if walk.dim != how.dim:
            order = [d for d in range(len(shape_of(first))) if d != walk.dim]
            order.insert(how.dim, walk.dim)
            first = insert(self.program, after, aten.permute.default, first, order)
        every = insert(self.program, after, aten.cat.default, [first, stack], how.dim)
        start.replace_all_uses_with(insert(self.program, after, aten.select.int, every, how.dim, 0))
        return every, 1


def _computed_from_it(node: Node) -> bool:
    """Says whether anything but a list of results reads a node."""
    lists = {aten.cat.default, aten.unsqueeze.default}
    return any(u.target not in lists for u in node.users)


def sort(program: Program) -> None:
    """Puts each node behind all that it reads; the order of others stays."""
    nodes = list(program.graph.nodes)
    last = nodes[0]
    for node in in_order(nodes, operands):
        if node is not last:
            last.append(node)
        last = node
