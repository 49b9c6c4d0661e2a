"""The first operator of a compiled file that does not compute what the model does.

The report in the file says which of its values are the entries of which operator of the captured graph, and by how many
entries each is delayed. The search makes some of these values outputs of the file, and compares them with the results
of the same operators on the long clip. It goes on before the first operator that differs, until all that an operator
reads agrees and its result does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from torch import Tensor

from co3d_compile.compiler.compiled_model import CompiledModel
from co3d_compile.contract.json_readers import Json
from co3d_compile.contract.model_contract import REPORT_KEY, Contract, resolve
from co3d_compile.contract.stored_report import stored_report
from co3d_compile.errors import Co3dError, ContractError, LoadError, first_line
from co3d_compile.ir.graph_walks import reached
from co3d_compile.ir.node_reading import module_path
from co3d_compile.ir.operator_row import as_rows
from co3d_compile.native.blocked_tensors import BLOCKED
from co3d_compile.report.report_rows import Row
from co3d_compile.step_graph.convolution_forms import BLOCK
from co3d_compile.support.plain_types import Array
from co3d_compile.verification.compared_steps import Frames, Segment, Timeline
from co3d_compile.verification.comparison import Expected, absolute_difference, sizes_but_one, spread
from co3d_compile.verification.findings import Bisection, Difference
from co3d_compile.verification.onnx_values import InnerValues
from co3d_compile.verification.output_plans import ResultIndex
from co3d_compile.verification.reference import Reference
from co3d_compile.verification.time_claims import NoReference

FACTOR = 10  # times the untouched model's own rounding at a place: more is a difference
LEAST = 2e-6  # standard deviations: less never is
BYTES = 500_000_000  # of results that are in memory at a time
MOST = 64  # operators that are looked at in one run
TEXTS = ("operator", "module_path", "kind", "origin")


class NoMatch(Exception):
    """The file's operators cannot be matched with the model's. The message is the reason."""


@dataclass(frozen=True)
class Error:
    """The largest error of an operator's result, and what rounding makes of that result.

    ``exact`` says that both are errors beside the model in float64; else beside the model in float32, and beside the
    same with frames that are off by rounding.
    """

    error: float
    rounding: float
    exact: bool

    @property
    def differs(self) -> bool:
        return not self.error <= max(LEAST, FACTOR * self.rounding)


class Bisect:
    """The search for the operator.

    Args:
        path: The compiled file.
        info: Its contract.
        again: Compiles the model again, as the file says that it was.
        reference: The untouched model.
        timeline: How its steps lie.
        segment: The steps on which it was found to differ.
    """

    def __init__(
        self,
        path: str,
        info: Contract,
        again: Callable[[], CompiledModel],
        reference: Reference,
        timeline: Timeline,
        segment: Segment,
    ) -> None:
        self.path, self.info, self.again = path, info, again
        self.reference, self.timeline, self.segment = reference, timeline, segment
        self.pulse = timeline.pulse
        self.errors: dict[int, Error] = {}
        self.unlike: set[int] = set()
        self.has_exact = True

    def run(self, progress: Callable[[int, int], None]) -> Bisection:
        """Finds the operator, or says why none was found."""
        try:
            self.inner = InnerValues(self.path, self.info, self.reference.inputs[0].shape[0])
            self.rows = self._matched()
            worst = self._search(progress)
        except (NoMatch, NoReference, LoadError, ContractError) as why:
            return Bisection(None, f"Where it differs first is not known: {first_line(why)}")
        compared, known = len(self.errors), len(self._known())
        if worst is None:
            return Bisection(None, self._nothing(), compared, known)
        difference = self._difference(worst)
        return Bisection(difference, f"The first operator that differs is {difference}.", compared, known)

    # --- which values are which operator's

    def _matched(self) -> list[Row]:
        """The rows of the file's report, checked against the model.

        Raises:
            NoMatch: They are not of this model.
        """
        if any(node.domain == BLOCKED for node in self.inner.model.graph.node):
            raise NoMatch("its values lie in the blocks of one machine (--native): look at the file without --native.")
        rows = self._stored()
        nodes = {n.name: n for n in self.reference.program.graph.nodes if n.op == "call_function"}
        for row in rows:
            if row["kind"] == "input" or not row["values"] or not row["origin"]:
                continue
            node = nodes.get(row["origin"])
            if node is None:
                raise NoMatch(f"the model has no operator {row['origin']} ({row['operator']} in {row['module_path']}).")
            shape = [int(s) for s in getattr(node.meta.get("val"), "shape", ())]
            if len(shape) != len(row["shape"]) or sum(a != b for a, b in zip(shape, row["shape"], strict=True)) > 1:
                what = f"{module_path(node) or 'the model'} gives {shape}, by the file {row['shape']}"
                raise NoMatch(f"{row['operator']} of {what}.")
        if not any(row["values"] and self.inner.has(row["values"]) for row in rows):
            raise NoMatch("the file has none of the values that its report names: another tool has rewritten it.")
        return rows

    def _stored(self) -> list[Row]:
        """The operators as the file's report has them, or as compiling the model again gives them."""
        stored = {p.key: p.value for p in self.inner.model.metadata_props}
        rows: list[Row] = stored_report(stored[REPORT_KEY]).get("table", []) if REPORT_KEY in stored else []
        if rows and all(_is_row(row, at) for at, row in enumerate(rows)):
            return rows
        why = "the file does not say which of its values are whose (metadata co3d_report)"
        try:
            twin = self.again()
        except Co3dError as error:
            raise NoMatch(f"{why}, and the model does not compile with its options: {error.message}") from error
        if _nodes(ir.to_proto(twin.model)) != _nodes(self.inner.model):
            raise NoMatch(f"{why}, and node by node it is not what compiling the model again gives.")
        return as_rows(twin.program.notes.survey)

    def _known(self) -> list[int]:
        """The operators whose results are in the file."""
        return [at for at, row in enumerate(self.rows) if self._is_known(at) and row["kind"] != "input"]

    def _is_known(self, at: int) -> bool:
        """Says whether a value of the model is in the file: an input, or a result that can be compared."""
        row = self.rows[at]
        there = bool(row["origin"] and row["values"]) and self.inner.has(row["values"])
        return row["kind"] == "input" or (there and at not in self.unlike)

    def _before(self, at: int) -> tuple[list[int], list[int]]:
        """Finds the nearest known values that an operator reads, inputs too, and what is not known on the way."""
        reached = sorted(self._reached(at, lambda i: not self._is_known(i)))
        return [i for i in reached if self._is_known(i)], [i for i in reached if not self._is_known(i)]

    def _ancestors(self, at: int) -> set[int]:
        return self._reached(at, lambda i: True)

    def _reached(self, at: int, beyond: Callable[[int], bool]) -> set[int]:
        """Lists what an operator reads, and what that reads in turn where ``beyond`` says so."""
        return set(reached(self.rows[at]["inputs"], lambda i: self.rows[i]["inputs"] if beyond(i) else []))

    # --- the search

    def _search(self, progress: Callable[[int, int], None]) -> int | None:
        """Finds the first operator that differs while all that it reads agrees: in float32, made sure of in float64."""
        while True:
            worst = min((at for at, error in self.errors.items() if error.differs), default=None)
            suspects, exact = self._suspects(worst), False
            if not suspects and worst is not None and self.has_exact:
                read = [at for at in self._before(worst)[0] if at in self.errors]
                suspects, exact = [at for at in (*read, worst) if not self.errors[at].exact], True
            if not suspects:
                return worst
            self._compare(self._chosen(suspects), exact)
            progress(len(self.errors), len(self.errors) + len(suspects))

    def _suspects(self, worst: int | None) -> list[int]:
        """Lists the operators that may differ before the first that is known to, and have not been looked at."""
        known = set(self._known())
        within = known if worst is None else self._ancestors(worst) & known
        compared = within & set(self.errors)
        # What those read agrees most likely; what the operator itself reads is looked at last.
        suspects = within.difference(self.errors, *map(self._ancestors, compared))
        if not suspects and worst is not None:
            suspects = (set(self._before(worst)[0]) & known).difference(self.errors)
        return sorted(suspects)

    def _chosen(self, suspects: Sequence[int]) -> list[int]:
        """Chooses as many of them as fit, evenly spread: the one in the middle, or all."""
        clips = len(self.segment.inside) / self.reference.clip + 2
        sizes = {at: math.prod(self.rows[at]["shape"]) * clips * 12 for at in suspects}  # float32 and float64
        count = min(MOST, len(suspects), max(1, int(BYTES / max(sizes.values()))))
        return [suspects[(2 * i + 1) * len(suspects) // (2 * count)] for i in range(count)]

    # --- one comparison

    def _compare(self, chosen: Sequence[int], exact: bool) -> None:
        """Notes the errors of some operators, of all entries of each step."""
        rows = [(at, i) for at in chosen for i in range(self.rows[at]["entries"])]
        names = [self.rows[at]["values"][i] for at, i in rows]
        actual = self.inner.of_steps(names, self._frames(), self.segment.steps, self.segment.base)
        reference = self.reference.watching([self.rows[at]["origin"] for at, _ in rows])
        indices = [index for k, (at, i) in enumerate(rows) for index in self._indices(reference, k, at, i)]
        right = self._values(reference, indices, self.segment.clip)
        others = [self._values(reference, indices, frames) for frames in self.segment.perturbed(1)]
        if exact:
            try:
                right, others = self._values(reference.doubled(), indices, self.segment.clip), [*others, right]
            except NoReference:
                self.has_exact = False
                return
        for at in chosen:
            own = [index for index in indices if rows[index.output][0] == at]
            self._note(at, [(index, actual[index.step][names[index.output]]) for index in own], right, others, exact)

    def _values(self, reference: Reference, indices: Sequence[ResultIndex], clip: Frames) -> Expected:
        return reference.values(clip, self.segment.front, self.segment.inside, indices)

    def _indices(self, reference: Reference, output: int, at: int, entry: int) -> Iterable[ResultIndex]:
        """Computes what one entry of an operator's result is at each step."""
        row, plan = self.rows[at], reference.plans[output]
        back = row["entries"] - 1 - entry
        if plan.sort in ("stream", "entries") and self.pulse / plan.claim.rate != row["entries"]:
            return []
        steps = (
            self.timeline.index(output, plan, step, row["late"], range(back, back + 1)) for step in self.segment.steps
        )
        return [index for index in steps if index is not None]

    def _note(
        self,
        at: int,
        pairs: Sequence[tuple[ResultIndex, Array]],
        right: Expected,
        others: Sequence[Expected],
        exact: bool,
    ) -> None:
        """Writes an operator's error down; one that cannot be compared is as if the file did not have it."""
        errors = [distance for index, value in pairs if (distance := _distance(value, right[index])) is not None]
        if not pairs or len(errors) < len(pairs):
            self.unlike.add(at)
            self.errors.pop(at, None)
            return
        scale = spread([v for index, _ in pairs for v in right[index][:1]])
        own = [_distance(v[index][0].numpy(), right[index]) or 0.0 for v in others for index, _ in pairs if v[index]]
        self.errors[at] = Error(max(errors) / scale, max(own, default=0.0) / scale, exact)

    def _frames(self) -> Iterable[list[Array]]:
        """Yields the segment's frames, step by step, as the file takes them."""
        reference, begin = self.reference, self.segment.inside.start
        for step in range(len(self.segment.inside) // self.pulse):
            cut = reference.cut(self.segment.clip, begin + step * self.pulse, self.pulse)
            yield [
                np.ascontiguousarray(x.numpy().reshape(resolve(spec.shape, x.shape[0])))  # without a time dim of one
                for spec, x in zip(self.info.inputs, cut, strict=True)
            ]

    # --- words

    def _difference(self, at: int) -> Difference:
        row, error = self.rows[at], self.errors[at]
        known, through = self._before(at)
        inputs = [self.errors[i].error for i in known if i in self.errors]
        strange = [self.rows[i] for i in through if not self.rows[i]["origin"]]
        node = next(n for n in self.reference.program.graph.nodes if n.name == row["origin"])
        return Difference(
            operator=row["operator"] if row["operator"] != "getitem" else self.rows[row["inputs"][0]]["operator"],
            module_path=row["module_path"] or module_path(node),
            before=max(inputs, default=0.0),
            after=error.error,
            rounding=error.rounding,
            through=tuple(f"{r['operator']} in {r['module_path'] or 'the model itself'}" for r in strange),
        )

    def _nothing(self) -> str:
        errors = self.errors.values()
        if not errors:
            return "Where it differs first is not known: none of the file's values can be compared with the model's."
        agree = f"All {len(errors)} operators that were compared agree with the model"
        for spec in self.info.outputs:
            for row in self.rows:
                if spec.name in row["values"] and row["late"] != spec.delay:
                    said = f"the file says that '{spec.name}' has a delay of {spec.delay}, and it is {row['late']}"
                    return f"{agree}: {said}."
        return f"{agree} when streamed afresh, from states as at the start of a stream, up to the same frames."


def _is_row(row: Json, at: int) -> bool:
    """Says whether a row of a report, which may come from anyone, is what the search counts on."""
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in TEXTS):
        return False
    inputs, shape, values = (row.get(name) for name in ("inputs", "shape", "values"))
    entries, late = row.get("entries"), row.get("late")
    if not (isinstance(inputs, list) and isinstance(shape, list) and isinstance(values, list)):
        return False
    before = all(isinstance(i, int) and 0 <= i < at for i in inputs)
    sizes = all(isinstance(s, int) and s > 0 for s in shape)
    names = all(isinstance(v, str) for v in values) and len(values) in (0, entries)
    return before and sizes and names and isinstance(entries, int) and isinstance(late, int)


def _nodes(model: onnx.ModelProto) -> list[tuple[str, ...]]:
    """Reads what the operators of a file are, and how they are joined."""
    return [(n.op_type, n.name, *n.input, "", *n.output) for n in model.graph.node]


def _distance(actual: Array, candidates: Sequence[Tensor]) -> float | None:
    """Measures the largest absolute difference from the nearest candidate; None where shapes do not fit."""
    found = []
    for candidate in candidates:
        pair = _alike(actual, candidate.numpy())
        if pair is None:
            return None
        found.append(float(absolute_difference(*pair).max(initial=0.0)))
    return min(found, default=None)


def _alike(actual: Array, expected: Array) -> tuple[Array, Array] | None:
    """Gives both one shape, dims of one aside; None if they are of others.

    A file's value may have zeros beyond the channels, or lack up to three, which are apart (passes/block_channels.py):
    what both have is compared.
    """
    fits = sizes_but_one(actual) == sizes_but_one(expected)
    if expected.ndim in (actual.ndim, actual.ndim + 1) and actual.ndim > 1 and not fits:
        channels = min(actual.shape[1], expected.shape[1])
        if expected.shape[1] - channels < BLOCK:
            actual, expected = actual[:, :channels], expected[:, :channels]
    return (actual.reshape(expected.shape), expected) if sizes_but_one(actual) == sizes_but_one(expected) else None
