"""What a compiled model must answer at every step, from the untouched model on one long clip."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from functools import cache, partial
from math import ceil, lcm
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from co3d_compile.capture.capture_model import captured_again
from co3d_compile.capture.far_places import TimeDims, look_far
from co3d_compile.capture.longer_clips import refuted
from co3d_compile.contract.model_contract import LocalRegion
from co3d_compile.errors import VerificationError
from co3d_compile.ir.graph_edits import erase_dead
from co3d_compile.ir.graph_walks import computed_from
from co3d_compile.ir.node_reading import module_path, returned
from co3d_compile.ir.options import Options
from co3d_compile.ir.program import Program
from co3d_compile.verification.captured_model import captured_model
from co3d_compile.verification.clip_model import Example, Model, eager
from co3d_compile.verification.long_boxes import boxes_of, frames_ahead
from co3d_compile.verification.long_clip import LongClip
from co3d_compile.verification.long_regions import LongRegions
from co3d_compile.verification.long_values import Entries, Stream, Windows
from co3d_compile.verification.measured_field import MeasuredField
from co3d_compile.verification.needed_entries import NeededClip, NeededEntries, NotCovered, Part, joined
from co3d_compile.verification.output_plans import ResultIndex, plan_of, sort_of
from co3d_compile.verification.replaced_kernels import ReplacedKernel, check_places
from co3d_compile.verification.time_claims import NoReference, Value, claim_of, claims_of, remembers_all

Clip: TypeAlias = Sequence[Tensor]  # one tensor per input
NONE: Mapping[str, ReplacedKernel] = MappingProxyType({})


class Reference:
    """The untouched model as it is captured, with what the compiler says of time.

    Args:
        model: The clip model.
        example_inputs: The arguments of one clip; None for a program that carries its own.
        options: As the model was compiled.
        regions: What the file says is local in time.
        kernels: What reads less of the future than in the model, by the name of its node.
        known: The graph that the compiler has captured, where it is at hand.

    Raises:
        VerificationError: The captured graph does not compute what the model does.
    """

    def __init__(
        self,
        model: Model,
        example_inputs: Example,
        options: Options,
        regions: Sequence[LocalRegion] = (),
        kernels: Mapping[str, ReplacedKernel] = NONE,
        known: Program | None = None,
    ) -> None:
        self.program, self.random_clips, self.captured = captured_model(model, example_inputs, options, known)
        self.regions = LongRegions(model, example_inputs, options, self.program, regions)
        self.kernels = kernels
        check_places(kernels, {n.name: n for n in self.program.graph.nodes})
        self.inputs = self.program.inputs
        self.dense = options.stride_mode == "dense"
        self.program.refuted |= known.refuted if known is not None else frozenset()
        self.claims = claims_of(self.program, regions)
        again = partial(captured_again, model, example_inputs, options, False, self.program)
        far = cache(partial(look_far, model, example_inputs, {})) if known is None else _known_already
        while wrong := refuted(self.program, again, far):
            self.program.refuted |= wrong
            self.claims = claims_of(self.program, regions)
        self._plan()
        streams = [self.claims[n.name] for n, s in self._sorts.items() if s == "stream" and n.name in self.claims]
        blocks = [(part.period * self.claims[part.result].rate).numerator for part in regions]
        self.unit = lcm(*(int(c.spacing) if self.dense else c.rate.numerator for c in streams), *blocks)
        self.clip = next(int(i.shape[i.time_dim]) for i in self.inputs if i.time_dim is not None)
        self.rates = {n.name: self.claims[n.name].rate for n in self.program.placeholders()}
        self._double = False

    def _plan(self) -> None:
        """Plans how each node, and so each result, is computed on the long clip."""
        timed = {i.name for i in self.inputs if i.time_dim is not None}
        sorts: dict[Node, str] = {}
        for node in self.program.graph.nodes:
            sorts[node] = sort_of(node, sorts, self.claims, timed)
        self.plans = [plan_of(n, sorts, self.claims) for n in returned(self.program.graph)]
        self.fields: list[int] = []
        self._sorts = sorts

    def watching(self, names: Sequence[str]) -> Reference:
        """The reference with nodes of the captured graph for results; what they do not need is not run."""
        graph = copy.deepcopy(self.program.graph)
        nodes = {n.name: n for n in graph.nodes}
        graph.output_node().args = (tuple(nodes[name] for name in names),)
        erase_dead(graph)
        return self._with(GraphModule(self.program.module, graph))

    def doubled(self) -> Reference:
        """The reference in float64: slower, and without rounding errors of its own."""
        twin = self._with(GraphModule(self.program.module, copy.deepcopy(self.program.graph)).double())
        twin._double = True
        return twin

    def _with(self, module: GraphModule) -> Reference:
        twin = copy.copy(self)
        twin.program = replace(self.program, module=module)
        twin._plan()
        return twin

    # --- what is known before anything runs

    def recurrent_paths(self) -> set[str]:
        """Lists the module paths of recurrent layers and of all that they read.

        States there start as the clip's own do.
        """
        operators = [n for n in self.program.graph.nodes if n.op == "call_function"]
        read = computed_from(*(n for n in operators if remembers_all(n, self.claims)))
        return {module_path(n) or "model" for n in read if n.op == "call_function"}

    @property
    def has_halves(self) -> bool:
        """Whether the network itself computes in float16."""
        values = [n.meta.get("val") for n in self.program.graph.nodes]
        return any(isinstance(v, Tensor) and v.dtype is torch.float16 for v in values)

    def gates(self) -> list[str]:
        """Lists the operators that are replaced by what they are in the stream."""
        return [
            n.name
            for n in self.program.graph.nodes
            if n.op == "call_function" and n.target is not operator.getitem and claim_of(n, self.claims).gate
        ]

    # --- the long clip

    def length(self, frames: int) -> int:
        """Finds the least number of frames, at least as many, at which all entries of the long clip are whole.

        A network that computes in blocks of frames takes whole blocks: how long they are, its clip says.
        """
        units = self.clip // self.unit
        found = []
        for block in (k for k in range(1, max(units, 1) + 1) if units % k == 0 or (units - 1) % k == 0):
            step = block * self.unit
            found.append(self.clip + ceil(max(0, frames - self.clip) / step) * step)
            if self.regions.take(self.shapes(found[-1])):
                break
        else:
            found = found[:1]
        return found[-1] + (self.unit - 1 if self.dense else 0)

    def shapes(self, total: int) -> list[list[int]]:
        """Computes the shape of so many frames of every input."""
        return [
            [int(total / self.rates[i.name]) if d == i.time_dim else s for d, s in enumerate(i.shape)]
            for i in self.inputs
        ]

    def cut(self, frames: Clip, start: Fraction | int, count: int) -> list[Tensor]:
        """Cuts frames out of every input that has time."""
        return [
            x
            if i.time_dim is None
            else x.narrow(i.time_dim, int(start / self.rates[i.name]), int(count / self.rates[i.name]))
            for i, x in zip(self.inputs, frames, strict=True)
        ]

    def values(
        self,
        frames: Clip,
        front: int,
        inside: range,
        indices: Sequence[ResultIndex],
        done: Callable[[], None] = lambda: None,
        field: int | None = None,
    ) -> dict[ResultIndex, list[Tensor]]:
        """Computes the results of the model on a long clip.

        Args:
            frames: The long clip.
            front: Where frame 0 of the stream is in it; below 0, where the clip begins later.
            inside: Where the frames are in it that the stream has seen.
            indices: The results, by entries or clip starts counted from frame 0 of the stream.
            done: Called after each operator.
            field: The receptive field that the file claims, if it is to be measured.

        Raises:
            NoReference: The model cannot be run on a long clip.
        """
        run = partial(self._run, frames, front, inside, indices, done, field)
        if not (self.dense or self.regions.regions or self.recurrent_paths() or any(i.boxes for i in self.inputs)):
            with suppress(NotCovered):
                return run(True)
        return run(False)

    def _run(
        self,
        frames: Clip,
        front: int,
        inside: range,
        indices: Sequence[ResultIndex],
        done: Callable[[], None],
        field: int | None,
        partly: bool,
    ) -> dict[ResultIndex, list[Tensor]]:
        """Computes them; ``partly``: with no other entries of each tensor than these need."""
        pairs = zip(self.inputs, frames, strict=True)
        total = next(x.shape[i.time_dim] for i, x in pairs if i.time_dim is not None)
        total -= self.unit - 1 if self.dense else 0
        with_boxes = any(i.boxes is not None for i in self.inputs)
        ahead = frames_ahead(self.plans, self.program.options.box_frame == "newest") if with_boxes else 0
        boxes = boxes_of(self.inputs, frames, inside.start - front, len(inside), ahead)
        found: dict[ResultIndex, dict[Fraction | None, Tensor]] = {index: {} for index in indices}
        finite: dict[str, dict[int, bool]] = {}
        for phase in sorted({p for index in indices for p in self._phases(index)} or {0}):
            starts = sorted({s for index in indices for s in index.starts if self._phase(s) == phase})
            run = NeededClip(self.program, self.claims, starts, front - phase, done)
            run.double, run.kernels, run.boxes = self._double, self.kernels, boxes
            run.whole_windows = not self.recurrent_paths()  # else the clip begins with the stream, and it is known
            run.regions = self.regions.at(self.shapes(total), self._double)
            run.longer = partial(self.regions.part, self.shapes(total), self._double)
            run.inside = self.regions.inside
            run.watched = {read.name for p in self.plans for read in p.reads} | {p.name for p in self.plans}
            run.parts = self._parts(run, indices, inside, field) if partly else {}
            clip = self.cut(frames, phase, total)
            with eager():
                outputs = run.run(*[x.double() if run.double and x.is_floating_point() else x for x in clip])
            for name, flags in run.finite.items():
                step = self.claims[name].spacing
                finite.setdefault(name, {}).update({phase + i * step: flag for i, flag in flags.items()})
            for index in indices:
                found[index] |= self._found(index, outputs[index.output], run)
        results = {index: self._joined(index, parts) for index, parts in found.items()}
        if partly and not all(results.values()):
            raise NotCovered
        if field is not None:
            self.fields += self._measured().fields(finite, inside, field if partly else None)
        return results

    def _measured(self) -> MeasuredField:
        return MeasuredField(self.plans, self.claims, None if self.dense else self.unit)

    def _parts(
        self, run: LongClip, indices: Sequence[ResultIndex], inside: range, field: int | None
    ) -> dict[str, Part]:
        """Finds what is needed of each tensor: what is compared, and what says how large the receptive field is."""

        measured = self._measured()

        def around(n: Node, starts: Sequence[Fraction], length: int) -> range | None:
            there = [at for start in starts if (at := run.index(claim_of(n, self.claims), start)) is not None]
            if not there:
                return None
            first, stop = min(there), max(there) + length
            more = measured.more(n.name, stop - first, inside, field) if field is not None else 0
            return range(max(0, first - more), stop + more)

        results: dict[Node, range | None] = {}
        for k, (n, plan) in enumerate(zip(returned(self.program.graph), self.plans, strict=True)):
            if plan.streams:
                entries = [Fraction(at) for index in indices if index.output == k for at in index.entries]
                read = around(n, [at * plan.claim.rate for at in entries], 1)
                results[n] = joined(results[n], read) if n in results else read

        def windows(n: Node) -> range | None:
            return around(n, run.starts, claim_of(n, self.claims).length)

        return NeededEntries(self.program.graph, self.claims, self._sorts, windows, self.kernels).parts(results)

    def _phase(self, frame: Fraction) -> int:
        return int(frame) % self.unit if self.dense else 0

    def _phases(self, index: ResultIndex) -> set[int]:
        rate = self.plans[index.output].claim.rate
        return {self._phase(s) for s in index.starts} | {self._phase(n * rate) for n in index.entries}

    def _found(self, index: ResultIndex, value: Value, run: LongClip) -> dict[Fraction | None, Tensor]:
        """Computes what a run on a long clip says of a result, by entry or by the start of a clip."""
        if isinstance(value, Windows):
            results = zip(run.starts, value.values, strict=True)
            return {start: x.clone() for start, x in results if start in index.starts and x is not None}
        plan = self.plans[index.output]
        claim = plan.claim
        if not isinstance(value, (Stream, Entries)):
            place = claim.place if plan.first_for_ever else None
            return {None: value.narrow(place.dim, 0, index.kept) if place is not None and place.alone else value}
        if self.plans[index.output].sort == "static":
            return {None: value.constant} if isinstance(value, Stream) and value.constant is not None else {}
        entries = {Fraction(n): value.entry(run.index(claim, n * claim.rate)) for n in index.entries}
        return {n: x.clone() for n, x in entries.items() if x is not None}

    def _joined(self, index: ResultIndex, parts: dict[Fraction | None, Tensor]) -> list[Tensor]:
        plan = self.plans[index.output]
        if plan.sort in ("window", "static"):
            return list(parts.values())
        if set(parts) != set(index.entries):
            return []
        ordered = [parts[Fraction(n)] for n in index.entries]
        place = plan.claim.place if plan.sort == "stream" else None
        return ordered[-1:] if place is None else [torch.cat(ordered, place.dim)]

    def clips(self, frames: Clip, front: int, indices: Sequence[ResultIndex]) -> dict[ResultIndex, list[Tensor]]:
        """Computes the results of the untouched model, each on one clip: right where nothing pads time.

        Raises:
            VerificationError: Kernels are replaced, so that it is not what the file computes.
        """
        if self.kernels or any(i.boxes is not None for i in self.inputs):
            what = "it has other kernels" if self.kernels else "boxes belong to one frame of it"
            raise VerificationError(f"The model cannot be run on a long clip, and on a clip {what}.")
        results: dict[ResultIndex, list[Tensor]] = {}
        for index in indices:
            claim = self.plans[index.output].claim
            newest = (claim.place.size - 1 if claim.place else 0) * claim.spacing
            starts = [*index.starts, *((n - newest) * claim.rate for n in index.entries)]
            values = []
            if starts and min(starts) + front >= 0:
                with eager():
                    values = [
                        self.program.module(*self.cut(frames, s + front, self.clip))[index.output] for s in starts
                    ]
            if values and index.entries and claim.place is not None:
                dim = claim.place.dim
                values = [torch.cat([v.narrow(dim, v.shape[dim] - 1, 1) for v in values], dim)]
            results[index] = values
        return results

    def untouched(self, clip: Clip) -> list[Tensor]:
        """Computes the results of the model itself on one clip."""
        with eager():
            return list(self.program.module(*clip))

    def replaced(self, clip: Clip) -> list[Tensor]:
        """Runs the replaced model on one clip. The windows of its first entries have what there is.

        Raises:
            NoReference: An operator cannot be run so.
        """
        run = LongClip(self.program, self.claims, [Fraction(0)], 0)
        run.whole_windows, run.kernels = False, self.kernels
        with eager():
            outputs = run.run(*clip)
        results = []
        for value in outputs:
            if isinstance(value, Stream):
                value = value.value
            elif isinstance(value, (Windows, Entries)):
                value = value.values[-1]
            if value is None:
                raise NoReference("the clip is too short")
            results.append(value)
        return results


def _known_already(_dims: TimeDims) -> None:
    """What the compiler has found far out is noted in the graph that it has captured."""
