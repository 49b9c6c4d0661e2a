"""Regions: parts of a network without an extension beyond the clip, which are local in time all the same.

They are looked for in the captured graph, before any pass. What is shown to be local becomes one operator there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch.fx import Graph, GraphModule, Node

from co3d_compile.analysis.captured_length import check_shown
from co3d_compile.analysis.locality import dependences, ends_meet, reach_of, spread
from co3d_compile.analysis.locality_proof import (
    NotLocal,
    OddEnds,
    Part,
    Proof,
    confirm_ends,
    confirmed,
    odd_entries,
)
from co3d_compile.analysis.operator_families import MOVES, is_pointwise, name_of
from co3d_compile.errors import UnsupportedError
from co3d_compile.ir.found_parts import Region
from co3d_compile.ir.graph_edits import erase_unused
from co3d_compile.ir.graph_walks import reached
from co3d_compile.ir.markers import region
from co3d_compile.ir.node_reading import module_path, operator_name, place_of, shape_of, sources
from co3d_compile.ir.program import Program
from co3d_compile.ir.resized_graph import Captures, NotResizable, Size, check_same, drop_slices, in_float64, part_of
from co3d_compile.ir.time_facts import KEY, STATIC, Fact, Kind, fact_of
from co3d_compile.passes import default_passes
from co3d_compile.rules.base import no_dense_form
from co3d_compile.rules.remembering import remembers_all

log = logging.getLogger(__name__)
TRIES = 6  # results behind one operator that are looked at
FARTHER = 4  # times that results farther behind are looked at, where ends of the clip meet
FAR = 300  # nodes behind it that are looked at
LONGEST = 4  # times the clip's length, at which it must show
MOST = 5e8  # numbers of all tensors of a part that is looked at
REORDERED = {"permute", "transpose", "t", "clone", "detach", "alias", "contiguous", "_to_copy"}
"""What is done again in a region, rather than kept twice as its input."""
Again = Callable[[int, bool], Program | None]
"""Captures the network again: with so many times the frames, and with one more clip at once or not."""


def stream_regions(program: Program, again: Again) -> None:
    """Replaces what is shown to be local by one operator each; of the rest it is noted why it is not."""
    facts = facts_of(program, _annotated(program.copied()))
    if facts is None:
        return
    search = _Search(program, again)
    while facts is not None and search.one(facts):
        facts = facts_of(program, search.found)


def facts_of(program: Program, tried: Program | None) -> dict[str, Fact] | None:
    """Finds what is known of the captured nodes, by name, from an annotated copy, which is None where a rule fails.

    None where nothing falls back to a window, or there is no copy.
    """
    if tried is None or not tried.notes.recomputed:
        return None
    found = {n.name: n.meta.get(KEY, STATIC) for n in tried.graph.nodes}
    known = {captured: found[name] for captured, name in tried.places().items()}
    became = program.places()
    return {name: known[new] for name, new in became.items() if new in known}


def _annotated(tried: Program) -> Program | None:
    """Gives each node of a copy its fact; None where a rule fails. What dense strides refuse is refused at once."""
    tried.options = replace(tried.options, unsupported="window")
    tried.looking = True
    passes = default_passes()
    try:
        for step in passes[: passes.position("annotate_time") + 1]:
            step.run(tried)
    except Exception as error:  # it will be said when the passes run in earnest
        if isinstance(error, UnsupportedError) and tried.options.stride_mode == "dense":
            raise
        log.info("no regions are looked for: %s", error)
        return None
    return tried


@dataclass
class _Search:
    """The search for regions in one network."""

    program: Program
    again: Again

    def __post_init__(self) -> None:
        self.short = self.program.copied().module
        self.batch = int(self.program.inputs[0].shape[0])
        self.nodes = list(self.short.graph.nodes)
        self.order = {n: i for i, n in enumerate(self.nodes)}
        self.tried: set[Node] = set()
        self.odd: set[Node] = set()
        self.lists: dict[GraphModule, list[Node]] = {}
        self.found: Program | None = None  # the annotated copy with the last region

    @cached_property
    def long(self) -> GraphModule:
        """The network captured for clips twice as long.

        What pads to whole blocks may have none to pad there, but in clips three times as long: two blocks of 4 and a
        half are 10 frames, and seven and a half are 30.

        Raises:
            NotResizable: It cannot be captured so.
        """
        pads = any(name_of(n) == "constant_pad_nd" for n in self.nodes)
        try:
            return self._captured(2)
        except NotResizable:
            if not pads:
                raise
            return self._captured(3)

    def _captured(self, factor: int) -> GraphModule:
        long = self.again(factor, False)
        assert long is not None
        check_same([self.short, long.module])
        return long.module

    @cached_property
    def wide(self) -> GraphModule | None:
        """The network captured for one more clip at once; None where it takes one batch alone.

        Raises:
            NotResizable: It cannot be captured so.
        """
        wide = self.again(1, True)
        if wide is None:
            return None
        check_same([self.short, wide.module])
        return wide.module

    def one(self, facts: Mapping[str, Fact]) -> bool:
        """Finds and replaces one region; says whether there was one."""
        for start in self.nodes:
            if start.op != "call_function" or not self._starts(start, facts):
                continue
            try:
                if self._any(start, facts):
                    return True
            except NotResizable as why:
                self.program.notes.not_local[start.name] = str(why)
        return False

    def _any(self, start: Node, facts: Mapping[str, Fact]) -> bool:
        """Says whether one of the results behind an operator streams.

        Where both ends of one meet, as behind ``roll`` and ``flip``, or one has entries of its own, those farther
        behind are looked at: what wraps around may be overwritten, time turned back, and what is its own cut off.
        """
        for _ in range(1 + FARTHER):
            results = self._results(start, facts)
            if any(self._streams(start, result, facts) for result in results):
                return True
            if self.odd.isdisjoint(results):
                return False
        return False

    def _starts(self, node: Node, facts: Mapping[str, Fact]) -> bool:
        """Says whether a window begins at an operator."""
        fact = facts.get(node.name)
        if fact is None or fact.kind is not Kind.WINDOW or fact.own.by_decree:
            return False
        return any(facts.get(x.name, STATIC).kind is Kind.STREAM for x in node.all_input_nodes)

    def _results(self, start: Node, facts: Mapping[str, Fact]) -> list[Node]:
        """Finds the first results behind an operator with one dim that grows with the clip, as much as what it reads.

        What meets, farther behind, that which it was computed from comes last: one region has less delay than two.
        """
        behind, given_up, found = {start}, set[Node](), list[Node]()
        streams = [x for x in start.all_input_nodes if facts.get(x.name, STATIC).kind is Kind.STREAM]
        growth = max(self._grows(x) for x in streams)
        for node in self.nodes[self.order[start] : self.order[start] + FAR]:
            if len(given_up.intersection(found)) == TRIES:
                break
            sources = [x for x in node.all_input_nodes if x in behind]
            if node is not start and not sources:
                continue
            behind.add(node)
            if node is not start and all(x in given_up for x in sources):
                given_up.add(node)
            elif node.op == "call_function" and self._follows(node, growth) and node not in self.tried:
                given_up |= set() if self._meets(node, behind) else {node}
                found.append(node)
        found.sort(key=lambda node: node not in given_up)
        return found[:TRIES]

    def _meets(self, node: Node, behind: set[Node]) -> bool:
        """Says whether what is computed from a node meets what it was computed from, or what lies beside it."""
        own = {node}
        for other in self.nodes[self.order[node] + 1 : self.order[node] + FAR]:
            if own.isdisjoint(other.all_input_nodes):
                if not behind.isdisjoint(other.all_input_nodes):
                    behind = behind | {other}
                continue
            if any(x in behind and x not in own for x in other.all_input_nodes):
                return True
            own.add(other)
        return False

    def _same(self, node: Node, module: GraphModule) -> Node:
        """Finds the node of another capture that is the same one."""
        if module not in self.lists:
            self.lists[module] = list(module.graph.nodes)
        return self.lists[module][self.order[node]]

    def _grows(self, node: Node) -> int:
        """Counts the entries by which a tensor is longer for the longer clip, in its one dim that is."""
        dim = self._time_dim(node)
        return 0 if dim is None else shape_of(self._same(node, self.long))[dim] - shape_of(node)[dim]

    def _follows(self, node: Node, growth: int) -> bool:
        """Says whether a tensor grows with the clip, as much as what is read (0: that is not known)."""
        own = self._grows(node)
        return own > 0 and growth in (0, own)

    def _time_dim(self, node: Node) -> int | None:
        """Finds the dim of a result that grows with the clip, if there is one, and the batch is in front."""
        if not isinstance(node.meta.get("val"), torch.Tensor):
            return None
        short, long = shape_of(node), shape_of(self._same(node, self.long))
        over = [d for d, (a, b) in enumerate(zip(short, long, strict=True)) if a != b]
        return over[0] if len(over) == 1 and over != [0] and short[0] == self.batch else None

    def _inputs(self, result: Node, facts: Mapping[str, Fact]) -> list[Node]:
        """Finds the streams that a result is computed from, in the order of the graph.

        Raises:
            NotResizable: One of them is no clip with a dim for time.
        """
        entries = shape_of(result)[self._time_dim(result) or 0]

        def is_input(node: Node) -> bool:
            fact = facts.get(node.name, STATIC)
            return node is not result and fact.kind is Kind.STREAM and not self._passed(node, fact, entries)

        inside = reached([result], lambda n: [] if is_input(n) else sources(n))
        inputs = [n for n in inside if is_input(n)]
        if any(n.op == "placeholder" for n in inside.keys() - set(inputs)):
            raise NotResizable("it reads an input without time")
        return sorted(inputs, key=self.order.__getitem__)

    def _passed(self, node: Node, fact: Fact, entries: int) -> bool:
        """Says whether a region begins before a stream.

        It does where the stream only moves its numbers, is a crop or a pad of ``entries``, as many as the result has,
        or has time folded into another dim. What has weights there is too much to be computed again for each entry.
        """
        if node.op == "placeholder":
            return False
        if name_of(node) in REORDERED:
            return True
        place = fact.layout.time if fact.layout is not None else None
        alone = fact.layout is not None and place is not None and place.alone and fact.layout.shape == shape_of(node)
        plain = name_of(node) in MOVES or is_pointwise(node)
        if not alone and not plain and any(x.op == "get_attr" for x in node.all_input_nodes):
            raise NotResizable("time is folded into another dim of what it reads")
        return not alone or (plain and place is not None and place.size != entries)

    def _streams(self, start: Node, result: Node, facts: Mapping[str, Fact]) -> bool:
        """Replaces what computes a result by one operator, if it is shown to be local."""
        self.tried.add(result)
        if name_of(result) in REORDERED and result.all_input_nodes[0] in self.odd:
            self.odd.add(result)
            return False
        try:
            inputs = self._inputs(result, facts)
            part = self._part(result, inputs, facts, wide=False)
            proof = self._proved(part)
            if proof.reach.period > 1 and self.program.options.stride_mode == "dense":
                raise no_dense_form(f"A computation in blocks of {proof.reach.period} entries", start)
            captures = self._part(result, inputs, facts, wide=True).captures
            names = tuple(n.name for n in inputs)
            where, found = (operator_name(start.target), module_path(start)), proof.reach
            reach = found.before, found.after, found.period
            known = Region(result.name, *where, captures, names, part.dims, part.dim, *reach, proof.shortest)
            if self._ends_are_read(start, result, inputs, known, proof.odd):
                confirm_ends(part, found, proof.entries, proof.shortest)
        except (NotLocal, NotResizable, RuntimeError, IndexError, ValueError, TypeError) as why:
            log.info("%s is no region: %s", place_of(start), why)
            self.odd |= {result} if isinstance(why, OddEnds) else set()
            text = str(why) if isinstance(why, (NotLocal, NotResizable)) else "it cannot be run at other lengths"
            self.program.notes.not_local.setdefault(start.name, text)
            return False
        self.program.regions[result.name] = known
        self._replace(self.program.graph, start, result, inputs, known)
        self.program.module.recompile()
        return True

    def _ends_are_read(self, start: Node, result: Node, inputs: list[Node], known: Region, odd: str | None) -> bool:
        """Says whether what follows depends on the first entries of a stream, as what remembers for good does.

        Raises:
            OddEnds: A window behind the region would read odd ones, which a stream has no more.
        """
        trial = self.program.copied()
        trial.regions = {**self.program.regions, result.name: known}
        self._replace(trial.graph, start, result, inputs, known)
        trial.follow()
        self.found = tried = _annotated(trial)
        if tried is None:
            raise NotLocal("a rule fails behind it")
        own = [n for n in tried.graph.nodes if n.target is region and n.args[1] == result.name]
        behind = reached(own, lambda n: [*n.users] if fact_of(n).kind is Kind.STREAM else [])
        if odd is not None and any(fact_of(n).kind is Kind.WINDOW for n in behind):
            raise OddEnds(odd)
        edges = odd is not None or known.before + known.after > 0
        return self.program.options.boundary == "exact" or (edges and any(map(remembers_all, behind)))

    def _replace(self, graph: Graph, start: Node, result: Node, inputs: list[Node], known: Region) -> None:
        """Puts one operator in place of what computes a result, in the program's graph or a copy of it."""
        places, numbers = self.program.places(), (known.before, known.after, known.period, known.dim)
        there = {n.name: n for n in graph.nodes}
        old = there[places[result.name]]
        with graph.inserting_before(old):
            operands = [there[places[n.name]] for n in inputs]
            new = graph.call_function(region, (operands, result.name, *numbers))
        new.meta = {**old.meta, "path": module_path(start)}
        old.replace_all_uses_with(new)
        erase_unused(old)

    def _part(self, result: Node, inputs: list[Node], facts: Mapping[str, Fact], wide: bool) -> Part:
        """Makes what computes a result, at any length.

        Raises:
            NotResizable: The captures do not say what it is at other lengths.
        """
        dims = [_time_dim_of(facts[x.name]) for x in inputs]
        modules = [self.short, self.long, *([self.wide] if wide and self.wide is not None else [])]
        parts = [self._cut(m, inputs, result) for m in modules]
        check_same(parts)
        drop_slices(parts)
        dim = self._time_dim(result)
        if dim is None:
            raise NotResizable("its result has no dim that grows with the clip")
        sizes = [[shape_of(self._same(x, m))[d] for x, d in zip(inputs, dims, strict=True)] for m in modules[:2]]
        rows = [shape_of(self._same(result, m))[dim] for m in modules[:2]]
        steps = {b - a for a, b in zip([*sizes[0], rows[0]], [*sizes[1], rows[1]], strict=True)}
        rates = {(facts[x.name].rate, facts[x.name].spacing) for x in inputs}
        if not len(steps) == len(set(sizes[0])) == len(rates) == 1:
            raise NotResizable("its inputs and its result have different rates")
        short, long = sizes[0][0], sizes[1][0]
        captured = Size(short, self.batch), Size(long, self.batch), Size(short, self.batch + 1)
        captures = Captures(parts[0], parts[1], parts[2] if len(parts) > 2 else None, captured)
        return Part(captures, tuple(dims), tuple(x.meta["val"].dtype for x in inputs), dim)

    def _cut(self, module: GraphModule, inputs: list[Node], result: Node) -> GraphModule:
        """Cuts out what computes a result, in one of the captures."""
        order = {n: i for i, n in enumerate(module.graph.nodes)}
        return part_of(module, [self._same(x, module) for x in inputs], self._same(result, module), order)

    def _proved(self, part: Part) -> Proof:
        """Proves how local a part is.

        Raises:
            NotLocal: It is not local.
        """
        generator = torch.Generator().manual_seed(0)
        short, long, *_ = (size.entries for size in part.captures.sizes)
        longest = long + (LONGEST - 1) * (long - short) * 2
        if part.captures.numbers(longest) > MOST:
            raise NotLocal("clips so long that it would show have too many numbers")
        extent = spread(in_float64(part.at(longest)), part.inputs(longest, generator), part.dims, part.dim)
        if extent >= longest // 2:
            raise NotLocal("each entry depends on entries far away")
        for entries in range(long, longest + 1, long - short):
            if entries > extent + 1:
                module, clips = in_float64(part.at(entries)), part.inputs(entries, generator)
                found = dependences(module, clips, part.dims, part.dim)
                reach = reach_of(found)
                if ends_meet(found, reach):
                    raise OddEnds("entries at one end depend on entries at the other")
                if reach is not None:
                    reach, length = confirmed(part, reach, entries)
                    check_shown(part, found, reach)
                    return Proof(reach, length, odd_entries(part, found, reach.period, entries), entries)
        raise NotLocal("what each entry depends on differs from entry to entry")


def _time_dim_of(fact: Fact) -> int:
    """The time dim of an input of a region."""
    place = fact.layout.time if fact.layout is not None else None
    if place is None or not place.alone:
        raise NotResizable("it reads something whose entries are not along one dim")
    return place.dim
