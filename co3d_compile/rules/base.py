"""The table of rules: one rule per family of operators says what they do to time, and how one entry is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import ClassVar, TypeVar

from torch.fx import Node
from torch.fx.node import Target

from co3d_compile.errors import UnsupportedError
from co3d_compile.ir.index_equation import Kernel, Outside, Reads
from co3d_compile.ir.layout import TIME, Layout
from co3d_compile.ir.node_reading import operands, overloads, where
from co3d_compile.ir.time_facts import (
    Fact,
    NoExtension,
    Uneven,
    combine,
    fact_of,
    is_stream,
    known,
    own_of,
    touches_time,
)
from co3d_compile.step_graph.step_graph import StepGraph

RULES: dict[Target, Rule] = {}
R = TypeVar("R", bound="type[Rule]")


class Rule:
    """What one family of operators does to time.

    A family overrides what is special about it. The defaults describe an operator that treats time as batch.
    """

    built_in: ClassVar[bool] = True
    """Whether it is the compiler's own, and none that a user declared."""
    why: ClassVar[str] = "computes over the whole time axis"
    """Why its operators have no extension, for people."""

    def remembers_all(self, node: Node) -> bool:
        """Says whether an entry depends on all entries before it, by a state that is carried along."""
        return False

    def past(self, node: Node) -> int:
        """Counts the entries of the past that it reads by itself, where no kernel says so."""
        return 0

    def block(self, node: Node) -> int:
        """Counts the entries that it computes at once: a step takes whole blocks."""
        return 1

    def begins(self, node: Node) -> bool:
        """Says whether, in a stream with ends, it cannot run on the padding in front of the first frame."""
        return self.remembers_all(node) or own_of(node).gate == "window"

    def mixes(self, node: Node) -> Iterable[tuple[Node, Iterable[int]]]:
        """Names per operand the dims over which the operator computes: time must not be among them."""
        return ()

    def layout(self, node: Node) -> Layout:
        """Says where the dims of the output come from. Structural: holds for streams and for windows."""
        return known(operands(node)[0])

    def kernel(self, node: Node) -> Kernel | None:
        """Gives the index equation, for an operator that slides over time."""
        return None

    def reads(self, node: Node) -> Reads:
        """Says which entries of its first operand an entry is computed from."""
        kernel = self.kernel(node)
        return kernel.reads if kernel is not None else Reads()

    def outside(self, node: Node) -> tuple[Outside, Outside]:
        """Says what an operator that slides over time reads before the first entry, and behind the last one."""
        return 0.0, 0.0

    def strip(self, node: Node) -> None:
        """Takes the temporal padding out of the operator's arguments, where it has any there."""

    def flow(self, node: Node) -> Fact:
        """Computes the fact of the output of an operator with a streaming operand.

        Raises:
            NoExtension: The operator has no meaning beyond the clip.
        """
        if any(map(is_stream, self.weights(node))):
            raise NoExtension("has weights that are computed from the frames")
        for operand, dims in self.mixes(node):
            if touches_time(operand, dims):
                raise NoExtension(self.reason(node))
        places = [known(n).time for n in node.all_input_nodes if is_stream(n)]
        if len({place.size for place in places if place is not None and place.size > 1}) > 1:
            raise Uneven
        return combine([fact_of(n) for n in node.all_input_nodes], self.layout(node))

    def weights(self, node: Node) -> Iterable[object]:
        """Lists the arguments that must be the same for all entries, as weights are."""
        return ()

    def reason(self, node: Node) -> str:
        """Says why the operator has no extension, for people."""
        return self.why

    def gate(self, node: Node, scope: str) -> Fact | None:
        """Computes the fact of the output where ``pool_scope`` makes a pool or norm over time part of the stream."""
        return None

    def slides_again(self, node: Node, dims: Sequence[int]) -> bool:
        """Says whether, for a pool over the whole clip, the model's own pool would go on with the next entries.

        Args:
            node: The pool.
            dims: Along which the model's own pool has a stride as long as its kernel.
        """
        return False

    def resamples_again(self, node: Node) -> bool:
        """Says whether an expansion is up-sampling that finds more than the clip's one entry in a stream."""
        return False

    def layouts(self, node: Node) -> list[Layout]:
        """Says where the dims of each output come from, of an operator that has several.

        Raises:
            NoExtension: Nothing is known of them.
        """
        raise NoExtension("has several outputs")

    def items(self, node: Node, fact: Fact) -> list[Fact]:
        """Computes the facts of the outputs of an operator that has several: as one of them, each with its layout."""
        return [replace(fact, layout=layout) for layout in self.layouts(node)]

    def split(self, node: Node) -> tuple[Node, Node] | None:
        """Splits a pool into its part over space, which streams, and its part over time; both are in the graph."""
        return None

    def lower(self, node: Node, low: StepGraph) -> list[Node]:
        """Writes the streaming entries of the output, time taken out of each."""
        return [low.of_rank(self.entry(node, low, i), known(node)) for i in range(low.pulse(node))]

    def entry(self, node: Node, low: StepGraph, i: int) -> Node:
        """Writes entry ``i`` of the output from entries ``i`` of the operands.

        Default: the operator on a time dim of one.
        """
        return low.with_time_of_one(node, i)

    def over_newest(self, node: Node, low: StepGraph, past: int, step: int) -> list[Node]:
        """Computes a gate over the newest entries, for each new one (``pool_scope="window"``).

        Args:
            past: How many entries before the new one are among them.
            step: Of these every ``step``-th is.
        """
        raise NotImplementedError

    def lower_items(self, node: Node, low: StepGraph) -> list[list[Node]]:
        """Writes the streaming entries of each output, where :meth:`items` gives several."""
        raise NotImplementedError

    def window(self, node: Node, low: StepGraph) -> Node:
        """Writes the operator on a window: as it stands in the clip."""
        return low.same(node)


def register(*operators: Target) -> Callable[[R], R]:
    """Decorates the class of the rule that serves these operators (overloads, or packets with all of theirs)."""

    def add(cls: R) -> R:
        instance = cls()
        for operator in operators:
            for overload in overloads(operator):
                RULES[overload] = instance
        return cls

    return add


def in_table(target: Target) -> Rule | None:
    """Finds the rule in the table for an operator, or for the class of operators that it is of."""
    return RULES.get(target) or RULES.get(type(target))


def refuse_dense(node: Node, what: str = "Up-sampling over time") -> None:
    """Refuses with dense strides what gives several entries per entry, and not one result per frame.

    Raises:
        UnsupportedError: ``stride_mode`` is dense.
    """
    if any(fact_of(n).dense for n in node.all_input_nodes):
        raise no_dense_form(what, node)


def no_dense_form(what: str, node: Node) -> UnsupportedError:
    """Words the refusal of what gives no one result per frame when ``stride_mode`` is dense."""
    text = f"{what} has no meaning with stride_mode='dense'."
    return UnsupportedError(text, **where(node), hint="Use stride_mode='step'.")


def one_entry(fact: Fact, layout: Layout) -> Fact:
    """A streaming fact whose clip has a single entry: what a gate makes of a pool over time."""
    time = fact.time
    pooled = None
    if fact.layout is not None and time is not None and time.alone:
        pooled = (fact.layout.rank - time.dim, time.size, fact.length)
    return replace(fact, layout=layout.resize(TIME, 1), length=1, per_entry=True, pooled=pooled)
