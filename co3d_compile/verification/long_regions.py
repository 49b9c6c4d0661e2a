"""Parts of a network that are local in time, as it computes them itself on a long clip: it is captured again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from co3d_compile.capture.capture_model import capture
from co3d_compile.capture.fewer_clips import for_one_clip
from co3d_compile.contract.model_contract import LocalRegion
from co3d_compile.errors import CaptureError, VerificationError
from co3d_compile.ir.graph_walks import reached
from co3d_compile.ir.node_reading import operands
from co3d_compile.ir.options import Options
from co3d_compile.ir.program import Program
from co3d_compile.ir.resized_graph import NotResizable, check_same, in_float64, part_of
from co3d_compile.support.silence_torch import quiet
from co3d_compile.verification.clip_model import Example, Model
from co3d_compile.verification.long_values import Stream
from co3d_compile.verification.region_entries import wrong_inside
from co3d_compile.verification.time_claims import NoReference


@dataclass(frozen=True)
class LongRegion:
    """What computes the result of a region on a long clip, and the names of the nodes that it reads."""

    graph: GraphModule
    inputs: tuple[str, ...]
    look: Callable[[Sequence[Stream]], None] = lambda _: None

    def run(self, given: Sequence[Stream]) -> Tensor:
        """Computes its result, NaN where it depends on entries that nobody has seen (NaN).

        Zero times NaN is NaN, though nothing depends on it: other numbers are drawn for such entries, twice.
        """
        self.look(given)
        if not any(len(_unseen(v)) for v in given):
            return self.graph(*[v.value for v in given])
        draws = torch.Generator().manual_seed(0)
        one: Tensor = self.graph(*[_drawn(v, draws) for v in given])
        if not one.is_floating_point():
            return self.graph(*[v.value for v in given])
        other = self.graph(*[_drawn(v, draws) for v in given])
        return one.masked_fill(one != other, torch.nan)


class LongRegions:
    """The regions of a network, for long clips of any length.

    Args:
        model: The network.
        example: The arguments of one clip.
        options: As it was captured.
        program: What was captured.
        regions: What the file says is local in time.

    Attributes:
        wrong: What is wrong about one of them inside of a long clip; empty if nothing was found.
    """

    def __init__(
        self, model: Model, example: Example, options: Options, program: Program, regions: Sequence[LocalRegion]
    ) -> None:
        self.model, self.example, self.options, self.program, self.regions = model, example, options, program, regions
        self._known = {tuple(tuple(i.shape) for i in program.inputs): program.module}
        self._seen: set[str] = set()
        self.wrong = ""
        nodes = {n.name: n for n in program.graph.nodes}
        for part in regions:
            if not {part.result, *part.inputs} <= nodes.keys():
                raise VerificationError(
                    f"The model has no {part.result} that is local in time, as the file says.",
                    hint="Give the model that the file was compiled from, or compile it again.",
                )
        self.inside = frozenset(n.name for n in _inside(regions, nodes))

    def at(self, shapes: Sequence[Sequence[int]], double: bool) -> dict[str, LongRegion]:
        """Finds the regions on clips of these shapes, by the names of their results.

        Raises:
            NoReference: The network cannot be captured so.
        """
        parts = {spec.result: self.part(shapes, double, spec.result, spec.inputs) for spec in self.regions}
        looks = {spec.result: partial(self._look, shapes, spec) for spec in self.regions}
        return {result: replace(part, look=looks[result]) for result, part in parts.items()}

    def part(self, shapes: Sequence[Sequence[int]], double: bool, result: str, inputs: tuple[str, ...]) -> LongRegion:
        """Finds what computes a node from others on clips of these shapes.

        Raises:
            NoReference: The network cannot be captured so.
        """
        module = self._captured(shapes)
        nodes = list(module.graph.nodes)
        order = {n: i for i, n in enumerate(nodes)}
        place = {n.name: i for i, n in enumerate(self.program.graph.nodes)}
        graph = part_of(module, [nodes[place[name]] for name in inputs], nodes[place[result]], order)
        return LongRegion(in_float64(graph) if double else graph, inputs)

    def _look(self, shapes: Sequence[Sequence[int]], spec: LocalRegion, given: Sequence[Stream]) -> None:
        """Notes what is wrong about a region inside of a long clip of these shapes, when it is first computed."""
        if spec.result in self._seen:
            return
        self._seen.add(spec.result)
        own, draws = [list(i.shape) for i in self.program.inputs], torch.Generator().manual_seed(0)
        short, long = (self.part(of, True, spec.result, spec.inputs).graph for of in (own, shapes))
        if why := wrong_inside(spec, short, long, [replace(v, value=_drawn(v, draws)) for v in given]):
            self.wrong = self.wrong or f"{spec.place} is local in time, the file says: {why}."

    def take(self, shapes: Sequence[Sequence[int]]) -> bool:
        """Says whether the network can be captured so, if it has regions at all."""
        try:
            return not self.regions or self._captured(shapes) is not None
        except NoReference:
            return False

    def _captured(self, shapes: Sequence[Sequence[int]]) -> GraphModule:
        key = tuple(tuple(shape) for shape in shapes)
        if key not in self._known:
            self._known[key] = self._capture(key)
        return self._known[key]

    def _capture(self, shapes: tuple[tuple[int, ...], ...]) -> GraphModule:
        if isinstance(self.model, ExportedProgram) or self.example is None:
            raise NoReference("an exported program cannot be captured for a long clip")
        left = iter(shapes)

        def longer(x: Tensor) -> Tensor:
            shape = next(left)
            for d, (old, new) in enumerate(zip(x.shape, shape, strict=True)):
                x = torch.cat([x] * -(-new // old), d).narrow(d, 0, new)
            return x

        clip = pytree.tree_map_only(Tensor, longer, tuple(self.example))
        try:
            try:
                return self._like_the_short_one(clip, two=False)
            except NotResizable:  # the short one may have been captured for two clips: rows of one are another graph
                return self._like_the_short_one(clip, two=True)
        except (NotResizable, CaptureError) as why:
            raise NoReference(str(why)) from why

    def _like_the_short_one(self, clip: tuple[pytree.PyTree, ...], two: bool) -> GraphModule:
        """Captures the network for a longer clip, as it is or by way of two clips.

        Raises:
            NotResizable: Its operators are others.
        """
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            program: Program | None = capture(self.model, clip, self.options, two=two)
            program = for_one_clip(program) if two and program is not None else program
        if program is None:
            raise NotResizable("the network has other operators for a longer clip")
        check_same([self.program.module, program.module])
        return program.module


def _unseen(v: Stream) -> Tensor:
    """Finds the indices of entries that are NaN everywhere."""
    if v.claim.place is None or not v.claim.place.alone or not v.value.is_floating_point():
        return torch.tensor([], dtype=torch.long)
    return v.value.movedim(v.claim.place.dim, 0).flatten(1).isnan().all(1).nonzero().flatten()


def _drawn(v: Stream, draws: torch.Generator) -> Tensor:
    """Puts random numbers into the entries that nobody has seen."""
    unseen, place = _unseen(v), v.claim.place
    if not len(unseen) or place is None:
        return v.value
    noise = torch.randn(v.value.shape, generator=draws).to(v.value.dtype)
    return v.value.index_copy(place.dim, unseen, noise.index_select(place.dim, unseen))


def not_captured(_: str, __: tuple[str, ...]) -> LongRegion:
    """Raises NoReference: nothing is captured on the long clip."""
    raise NoReference("the network is not captured on the long clip")


def _inside(regions: Sequence[LocalRegion], nodes: dict[str, Node]) -> set[Node]:
    """Finds the nodes of the captured graph between the inputs of regions and their results, which no others read."""
    results = {nodes[part.result] for part in regions}
    ends = results | {nodes[name] for part in regions for name in part.inputs}
    between = set().union(*(_between(part, nodes) for part in regions)) - ends
    inside: set[Node] = set()
    for node in reversed(nodes.values()):
        if node in between and inside | results >= node.users.keys():
            inside.add(node)
    return inside


def _between(part: LocalRegion, nodes: dict[str, Node]) -> set[Node]:
    """Finds the operators that the result of a region is computed by."""
    inputs = {nodes[name] for name in part.inputs}
    found = reached(operands(nodes[part.result]), lambda n: [] if n in inputs else operands(n))
    return {n for n in found if n.op == "call_function"}
