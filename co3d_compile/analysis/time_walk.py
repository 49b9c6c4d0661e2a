"""How every tensor of a graph flows, given what was decided about some operators; and what must be decided besides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import dropwhile

from torch import Tensor
from torch.fx import Node

from co3d_compile.analysis.clip_pieces import pieces_with
from co3d_compile.analysis.gate_dependence import forgets_entry
from co3d_compile.analysis.loop_layouts import annotate_body
from co3d_compile.analysis.regrouping import Regrouping, firsts_kept, folded, regroupings
from co3d_compile.analysis.starts import start_fact, start_of, starts_behind
from co3d_compile.analysis.window_contents import paddings_of, uneven_strides
from co3d_compile.analysis.window_facts import window_fact
from co3d_compile.errors import UsageError
from co3d_compile.ir.aten_operators import SEPARABLE
from co3d_compile.ir.frame_loop import is_loop
from co3d_compile.ir.graph_walks import reached
from co3d_compile.ir.layout import LayoutLost
from co3d_compile.ir.node_reading import operands, operator_name, rank_of, shape_of, where
from co3d_compile.ir.program import Program
from co3d_compile.ir.time_facts import (
    KEY,
    STATIC,
    Fact,
    Kind,
    NoExtension,
    Own,
    Uneven,
    fact_of,
    facts_as,
    is_stream,
    is_window,
)
from co3d_compile.rules import Rule, rule_for
from co3d_compile.rules.base import refuse_dense
from co3d_compile.rules.combine import Concatenation
from co3d_compile.rules.edge_copies import waiting_operands
from co3d_compile.rules.failures import blaming

Names = frozenset[str]


@dataclass(frozen=True)
class Decisions:
    """What is decided about operators, which are called by the names of their nodes.

    Args:
        gates: Pools whose results meet the stream again: they are computed for each of its entries.
        windows: Pools that remain windows: as gates nothing of the entry would be left, or all would end in a window.
        written: Operators that are to be as the model has them, instead of in their canonical form.
        starts: Concatenations over time that begin with a start of its own.
        firsts: What computes such starts, from the first entries alone; not where the concatenation is a window.
        late: Streams that wait until their start is known.
        regrouped: Operands of which several entries are made one, or one several.
        whole: What could slide or run on, and is part of a window.
    """

    gates: Names = frozenset()
    windows: Names = frozenset()
    written: Names = frozenset()
    starts: Names = frozenset()
    firsts: Names = frozenset()
    late: Names = frozenset()
    regrouped: frozenset[Regrouping] = frozenset()
    whole: Names = frozenset()


@dataclass
class TimeWalk:
    """One walk along a graph that attaches a fact to every node, and changes nothing else.

    It ends at the first operator that decides about nodes before it: what it would find behind is not so any more.

    Args:
        program: Its inputs have their facts.
        decisions: What was decided before; in the end, what is decided now.
        first: Where the walk begins, if nodes in front of it have their facts from the walk before.
        fallbacks: Nodes that are applied to a window, and why.
        waiting: The operands that a node cannot read as early as they come, with their facts once delayed.
    """

    program: Program
    decisions: Decisions
    first: Node | None = None
    fallbacks: list[tuple[Node, str]] = field(default_factory=list)
    waiting: dict[Node, Mapping[Node, Fact]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        there = {n.name for n in self.program.graph.nodes}
        decrees = [[name for name in names if name in there] for names in self.program.decreed]
        self._decreed = {names[0] for names in decrees if names}

    def run(self) -> Decisions:
        """Walks; the result is equal to the decisions given if nothing is left to be decided."""
        given = self.decisions
        for node in dropwhile(lambda n: n is not (self.first or n), self.program.graph.nodes):
            if node.op == "get_attr":
                node.meta.setdefault(KEY, STATIC)  # of a constant more may be known
            elif node.op == "call_function":
                with blaming(self.program, node):
                    self._operator(node)
            elif node.op == "output":
                self._wait(node, STATIC)
            if self.decisions != given:
                return self.decisions
        if self.fallbacks and not self.program.looking:
            paddings = frozenset().union(*(paddings_of(node) for node, _ in self.fallbacks))
            self._decide(whole=paddings | uneven_strides(self.program))
        return self.decisions

    def next(self, given: Decisions, decisions: Decisions) -> TimeWalk:
        """Begins the walk behind this one: what was found in front of the first node that is decided anew is kept.

        Args:
            given: What was decided when this walk began.
            decisions: What is decided now.
        """
        walk = TimeWalk(self.program, decisions)
        if decisions != replace(given, gates=decisions.gates, windows=decisions.windows):
            return walk  # the graph has become another
        anew = (given.gates ^ decisions.gates) | (given.windows ^ decisions.windows)
        nodes = list(self.program.graph.nodes)
        place = next(i for i, node in enumerate(nodes) if node.name in anew)
        walk.first, known = nodes[place], set(nodes[:place])
        walk.fallbacks = [(node, why) for node, why in self.fallbacks if node in known]
        walk.waiting = {node: facts for node, facts in self.waiting.items() if node in known}
        return walk

    def _operator(self, node: Node) -> None:
        rule = self._rule(node)
        if rule is not None and node in self.program.originals and rule.resamples_again(node):
            self._decide(written=frozenset({node.name}))
            return
        if isinstance(rule, Concatenation) and node.name not in self.decisions.starts and self._begins(node, rule):
            return
        if is_loop(node):
            annotate_body(node)
        fact, reason = self._fact(node, rule)
        if waiting := self._wait(node, fact):
            with facts_as(waiting):
                fact, reason = self._fact(node, rule)
        if fact.kind is Kind.WINDOW and (start := starts_behind(node)):
            self.decisions = replace(self.decisions, firsts=self.decisions.firsts - start)
            return
        if fact.layout is None and fact.kind is Kind.STREAM and not fact.own.items:
            raise AssertionError(f"{node.name} streams without a layout")
        by_decree = node.name in self._decreed and fact.kind is Kind.WINDOW
        node.meta[KEY] = replace(fact, own=replace(fact.own, by_decree=by_decree))
        if reason is not None:
            self.fallbacks.append((node, reason))

    def _begins(self, node: Node, rule: Concatenation) -> bool:
        """Decides that a concatenation has a start of its own, if it has; what it joins is regrouped before."""
        apart = folded(node)
        with facts_as({x: fact for x, (fact, _) in apart.items()}):
            begins = bool(start_of(node, rule))
        if begins and apart:
            steps = frozenset((node.name, x.name, steps) for x, (_, steps) in apart.items())
            self.decisions = replace(self.decisions, regrouped=self.decisions.regrouped | steps)
        elif begins:
            self._decide(starts=frozenset({node.name}))
        return begins

    def _rule(self, node: Node) -> Rule | None:
        """The rule of a node, unless it is a window by decree."""
        return None if node.name in self._decreed else rule_for(node.target)

    def _wait(self, node: Node, fact: Fact) -> Mapping[Node, Fact]:
        waiting = waiting_operands(node, fact)
        if waiting:
            self.waiting[node] = waiting
        return waiting

    def _decide(self, **names: Names) -> None:
        """Adds names to the decisions; what is to be a window is no gate any more."""
        known = {kind: getattr(self.decisions, kind) | more for kind, more in names.items()}
        found = replace(self.decisions, **known)
        self.decisions = replace(found, gates=found.gates - found.windows)

    def _fact(self, node: Node, rule: Rule | None) -> tuple[Fact, str | None]:
        """Finds the fact of a node, and why it falls back to a window if it does."""
        facts = [fact_of(n) for n in node.all_input_nodes]
        kinds = {f.kind for f in facts}
        if kinds <= {Kind.STATIC}:
            return STATIC, None
        if node.name in self.decisions.whole:
            return window_fact(node, rule), "is read as a whole"
        if node.name in self.decisions.firsts:
            return start_fact(node, rule), None
        if Kind.WINDOW in kinds:  # a single entry (a selection, or a head behind its time axis) is no stream here
            if all(f.single for f in facts if f.kind is Kind.STREAM):
                return window_fact(node, rule), None
            self._meet(node, frozenset().union(*(f.sources for f in facts)))
            return window_fact(node, rule), "meets the result of a window"
        if rule is None:
            return window_fact(node, rule), "has a rule that failed" if node.name in self._decreed else "has no rule"
        try:
            if node.name in self.decisions.gates:
                if folded(node):
                    self._regroup(node, rule, self.program.options.pool_scope)
                gate = rule.gate(node, self.program.options.pool_scope)
                assert gate is not None
                return self._gate(gate)
            if rule.remembers_all(node) and (why := self._starts_anew(node)):
                raise NoExtension(why)
            fact = rule.flow(node)
            if fact.length < 1 <= fact.clip:
                _refuse_short_window(self.program, node)
            starts = [f.due for f in facts if f.kind is Kind.START]
            if starts and node.name in self.decisions.late:
                fact = fact.no_sooner(max(starts))
            several = isinstance(node.meta["val"], (tuple, list))
            items = tuple(rule.items(node, fact)) if several else ()
            return replace(fact, own=Own(items=items, block=rule.block(node))), None
        except LayoutLost:
            self._regroup(node, rule)
            return window_fact(node, rule), "moves time in a way that cannot be followed"
        except NoExtension as why:
            if self._regroup(node, rule):
                return window_fact(node, rule), str(why)
            if isinstance(why, Uneven):
                refuse_dense(node, "What gives blocks of entries")
            return self._without_extension(node, rule, str(why))

    def _starts_anew(self, node: Node) -> str | None:
        """Says why what remembers all entries before does not run on for longer than a clip; None if it does."""
        if self.program.options.recurrence == "window":
            return "starts again with each window (recurrence='window')"
        if not self.program.refuted.isdisjoint(self.program.names_of(node)):
            return "is something else in a longer clip"
        pieces = pieces_with(node)
        self._decide(whole=pieces)
        return "starts anew in each piece of a clip" if pieces else None

    def _regroup(self, node: Node, rule: Rule, scope: str = "recompute") -> bool:
        """Says whether the operator streams, or is a gate, once entries are regrouped, which is then decided."""
        if not self.program.refuted.isdisjoint(self.program.names_of(node)):
            return False
        found = regroupings(node, rule, scope)
        if not found and self.program.options.recurrence == "state":
            found = firsts_kept(node, rule)
            found = found if self.program.refuted.isdisjoint(name for _, name, _ in found) else frozenset()
        self.decisions = replace(self.decisions, regrouped=self.decisions.regrouped | found)
        return bool(found)

    def _gate(self, fact: Fact) -> tuple[Fact, None]:
        return replace(fact, own=Own(gate=self.program.options.pool_scope)), None

    def _without_extension(self, node: Node, rule: Rule, why: str) -> tuple[Fact, str | None]:
        """Makes a norm a gate wherever it stands, else a window. Gates before a window were for nothing."""
        scope = self.program.options.pool_scope
        norm = rule.gate(node, scope) if scope != "recompute" and node.target not in SEPARABLE else None
        if norm is not None:
            return self._gate(norm)
        useless = _per_entry_behind(node) & self.decisions.gates
        if useless:
            self._decide(windows=useless)
        else:
            _refuse_channels(self.program, node)
        return window_fact(node, rule), None if node.target in SEPARABLE else why

    def _meet(self, node: Node, sources: Names) -> None:
        """Decides what becomes of pools whose result meets the stream again: they slide, are gates, or stay windows."""
        pools = [n for n in self.program.graph.nodes if n.name in sources]
        originals = self.program.originals
        rules = [(n, self._rule(n)) for n in pools]
        if pools and _selected(node, pools):
            return
        stepwise = self.program.options.stride_mode == "step"  # dense strides have no up-sampling
        if (
            stepwise
            and pools
            and _as_long(node, pools)
            and all(r is not None and n in originals and r.slides_again(n, originals[n].dims) for n, r in rules)
        ):
            self._decide(written=sources)
        elif pools and _gives_entries(node) and all(r is not None and self._can_gate(n, r) for n, r in rules):
            per_entry = self.program.options.pool_scope == "frame"
            if per_entry and forgets_entry(self.program, pools, node):
                self._decide(windows=sources)
            else:
                self._decide(gates=sources)

    def _can_gate(self, node: Node, rule: Rule) -> bool:
        scope = self.program.options.pool_scope
        if scope == "recompute" or node.name in self.decisions.windows or any(map(is_window, node.all_input_nodes)):
            return False
        try:
            return rule.gate(node, scope) is not None
        except LayoutLost:
            return False


def _gives_entries(node: Node) -> bool:
    """Says whether an operator may have gates: a recurrent layer, of several results, only starts from a pool."""
    return isinstance(node.meta["val"], Tensor)


def _selected(node: Node, pools: Sequence[Node]) -> bool:
    """Says whether a single entry of the clip, as ``x[:, :, 3:4]``, meets what was pooled over all of them.

    No stride has left it alone: other clips have another such entry, and a gate would be that of yet another one.
    """
    finest = max(fact_of(n.all_input_nodes[0]).rate for n in pools)
    whole = max(fact_of(n.all_input_nodes[0]).clip for n in pools)
    met = [fact_of(n) for n in filter(is_stream, node.all_input_nodes)]
    return whole > 1 and any(f.clip == 1 and not f.per_entry and f.rate <= finest for f in met)


def _as_long(node: Node, pools: Sequence[Node]) -> bool:
    """Says whether a window result has as many entries as the streams that it meets have in the clip.

    A single entry says so only where those streams are slower than what was pooled: a stride has left them one entry.
    """
    finest = max(fact_of(n.all_input_nodes[0]).rate for n in pools)
    shapes = [shape_of(n) for n in filter(is_window, node.all_input_nodes)]
    for n in filter(is_stream, node.all_input_nodes):
        time = fact_of(n).time
        right = rank_of(n) - time.dim if time is not None else 0
        if time is None or (time.size == 1 and fact_of(n).rate <= finest):
            return False
        if any(len(s) < right or s[-right] != time.size for s in shapes):
            return False
    return True


def _per_entry_behind(node: Node) -> Names:
    """The names of what those operands come from which have one value for each entry of the stream."""

    def per_entry(n: Node) -> list[Node]:
        return [x for x in operands(n) if is_stream(x) and fact_of(x).per_entry]

    return frozenset(n.name for n in reached(per_entry(node), per_entry))


def _refuse_short_window(program: Program, node: Node) -> None:
    raise UsageError(
        f"window={program.options.window} is too short: nothing is left of it.",
        **where(node),
        hint="Take a longer window, or compile for a clip of that length.",
    )


def _refuse_channels(program: Program, node: Node) -> None:
    """Refuses a convolution that takes the time dim for its channels: the user named the wrong dim."""
    place = fact_of(node.all_input_nodes[0]).time
    if operator_name(node.target) != "aten.conv3d" or place is None or place.dim != 1 or not place.alone:
        return
    dims = [i.time_dim for i in program.inputs]
    raise UsageError(
        f"time_dim={dims[0] if len(set(dims)) == 1 else dims} is what the model takes for channels.",
        **where(node),
        hint="Give the dim that counts the frames; for (N, C, T, H, W) that is 2.",
    )
