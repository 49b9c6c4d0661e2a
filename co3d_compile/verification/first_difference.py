"""The first operator of a compiled file that does not compute what the model does.

The report in the file says which of its values hold the entries of which operator of the captured graph, and how late
they are. Some of them are made outputs of the file and compared with the same operator's result on the long clip; then
some of what lies before the first that differs, until all that an operator reads agrees and its result does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from torch import Tensor

from co3d_compile.compiler.compiled_model import CompiledModel
from co3d_compile.contract.model_contract import REPORT_KEY, Contract, resolve
from co3d_compile.contract.stored_report import stored_report
from co3d_compile.errors import Co3dError, ContractError, LoadError
from co3d_compile.ir.node_reading import module_path
from co3d_compile.ir.operator_row import as_rows
from co3d_compile.native.blocked_tensors import BLOCKED
from co3d_compile.step_graph.convolution_forms import BLOCK
from co3d_compile.verification.compared_steps import Frames, Stretch, Timeline
from co3d_compile.verification.comparison import spread
from co3d_compile.verification.findings import Bisection, Difference
from co3d_compile.verification.onnx_values import InnerValues
from co3d_compile.verification.output_plans import Wanted, wanted_at
from co3d_compile.verification.reference import Reference
from co3d_compile.verification.time_claims import NoReference

FACTOR = 10  # times the untouched model's own rounding at a place: more is a difference
LEAST = 2e-6  # standard deviations: less never is
BYTES = 500_000_000  # of results that are held at a time
MOST = 64  # operators that are looked at in one run
Row = dict[str, Any]
Values = dict[Wanted, list[Tensor]]
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
    """Looks for the operator.

    Args:
        path: The compiled file.
        info: Its contract.
        again: Compiles the model again, as the file says that it was.
        reference: The untouched model.
        timeline: How its steps lie.
        stretch: The steps on which it was found to differ.
    """

    def __init__(
        self,
        path: str,
        info: Contract,
        again: Callable[[], CompiledModel],
        reference: Reference,
        timeline: Timeline,
        stretch: Stretch,
    ) -> None:
        self.path, self.info, self.again = path, info, again
        self.reference, self.timeline, self.stretch = reference, timeline, stretch
        self.pulse, self.recurrent = timeline.pulse, timeline.recurrent
        self.errors: dict[int, Error] = {}
        self.unlike: set[int] = set()
        self.has_exact = True

    def run(self, progress: Callable[[int, int], None]) -> Bisection:
        """The operator, or why none was found."""
        try:
            self.inner = InnerValues(self.path, self.info, self.reference.inputs[0].shape[0])
            self.rows = self._matched()
            worst = self._search(progress)
        except (NoMatch, NoReference, LoadError, ContractError) as why:
            return Bisection(None, f"Where it differs first is not known: {str(why).splitlines()[0]}")
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
        if not any(row["values"] and self.inner.names.issuperset(row["values"]) for row in rows):
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
        return as_rows(twin.program.survey)

    def _known(self) -> list[int]:
        """The operators whose results are in the file."""
        return [at for at, row in enumerate(self.rows) if self._has(row) and at not in self.unlike]

    def _has(self, row: Row) -> bool:
        return bool(row["origin"] and row["values"]) and self.inner.names.issuperset(row["values"])

    def _before(self, at: int) -> tuple[list[int], list[int]]:
        """The nearest known operators that one reads, inputs among them, and those on the way that are not known."""
        known, through, seen = set(), [], set()
        stack = list(self.rows[at]["inputs"])
        while stack:
            i = stack.pop()
            if i in seen:
                continue
            seen.add(i)
            if self.rows[i]["kind"] == "input" or (self._has(self.rows[i]) and i not in self.unlike):
                known.add(i)
            else:
                through.append(i)
                stack += self.rows[i]["inputs"]
        return sorted(known), sorted(through)

    def _ancestors(self, at: int) -> set[int]:
        found: set[int] = set()
        stack = list(self.rows[at]["inputs"])
        while stack:
            i = stack.pop()
            if i not in found:
                found.add(i)
                stack += self.rows[i]["inputs"]
        return found

    # --- the search

    def _search(self, progress: Callable[[int, int], None]) -> int | None:
        """The first operator that differs while all that it reads agrees: found in float32, made sure of in float64."""
        while True:
            bad = sorted(at for at, error in self.errors.items() if error.differs)
            worst = bad[0] if bad else None
            exact = False
            suspects = self._suspects(worst)
            if not suspects and worst is not None and self.has_exact:
                read = [at for at in self._before(worst)[0] if at in self.errors]
                suspects, exact = [at for at in (*read, worst) if not self.errors[at].exact], True
            if not suspects:
                return worst
            self._compare(self._chosen(suspects), exact)
            progress(len(self.errors), len(self.errors) + len(suspects))

    def _suspects(self, worst: int | None) -> list[int]:
        """The operators that may differ before the first that is known to, and have not been looked at."""
        known = set(self._known())
        within = known if worst is None else self._ancestors(worst) & known
        cleared = set(self.errors)
        for at in within & set(self.errors):
            cleared |= self._ancestors(at)  # they agree most likely; what the operator itself reads is looked at last
        suspects = sorted(within - cleared)
        if not suspects and worst is not None:
            suspects = [
                at for at in self._before(worst)[0] if self.rows[at]["kind"] != "input" and at not in self.errors
            ]
        return suspects

    def _chosen(self, suspects: Sequence[int]) -> list[int]:
        """As many of them as fit, evenly spread: the one in the middle, or all."""
        clips = len(self.stretch.inside) / self.reference.clip + 2
        sizes = {at: math.prod(self.rows[at]["shape"]) * clips * 12 for at in suspects}  # float32 and float64
        count = min(MOST, len(suspects), max(1, int(BYTES / max(sizes.values()))))
        return [suspects[(2 * i + 1) * len(suspects) // (2 * count)] for i in range(count)]

    # --- one comparison

    def _compare(self, chosen: Sequence[int], exact: bool) -> None:
        """The errors of some operators, of all entries of each step."""
        rows = [(at, i) for at in chosen for i in range(self.rows[at]["entries"])]
        names = [self.rows[at]["values"][i] for at, i in rows]
        actual = self.inner.of_steps(names, self._frames(), self.stretch.steps, self.stretch.base)
        reference = self.reference.watching([self.rows[at]["origin"] for at, _ in rows])
        wanted = [w for k, (at, i) in enumerate(rows) for w in self._wanted(reference, k, at, i)]
        clip = self.stretch.clip
        others = [self._values(reference, wanted, frames) for frames in self.stretch.shaken(1)]
        if exact:
            others.append(self._values(reference, wanted, clip))
            try:
                right = self._values(reference.doubled(), wanted, clip)
            except NoReference:
                self.has_exact = False
                return
        else:
            right = self._values(reference, wanted, clip)
        for at in chosen:
            own = [w for w in wanted if rows[w.output][0] == at]
            self._note(at, [(w, actual[w.step][names[w.output]]) for w in own], right, others, exact)

    def _values(self, reference: Reference, wanted: Sequence[Wanted], clip: Frames) -> Values:
        stretch = self.stretch
        return reference.values(clip, stretch.front, stretch.inside, wanted, lambda: None)

    def _wanted(self, reference: Reference, output: int, at: int, entry: int) -> Iterable[Wanted]:
        row, plan = self.rows[at], reference.plans[output]
        back = row["entries"] - 1 - entry
        if plan.sort in ("stream", "entries") and self.pulse / plan.claim.rate != row["entries"]:
            return []
        steps = (
            wanted_at(output, plan, step, self.pulse, row["late"], range(back, back + 1), self.recurrent)
            for step in self.stretch.steps
        )
        return [w for w in steps if w is not None]

    def _note(
        self, at: int, pairs: Sequence[tuple[Wanted, Any]], right: Values, others: Sequence[Values], exact: bool
    ) -> None:
        """Writes an operator's error down; one that cannot be compared is as if the file did not have it."""
        errors = [_distance(value, right[w]) for w, value in pairs]
        if not pairs or None in errors:
            self.unlike.add(at)
            self.errors.pop(at, None)
            return
        scale = spread([v for w, _ in pairs for v in right[w][:1]])
        rounding = max(_distance(v[w][0].numpy(), right[w]) or 0.0 for v in others for w, _ in pairs if v[w])
        self.errors[at] = Error(max(e for e in errors if e is not None) / scale, rounding / scale, exact)

    def _frames(self) -> Iterable[list[Any]]:
        """The stretch's frames, step by step, as the file takes them."""
        reference, begin = self.reference, self.stretch.inside.start
        for step in range(len(self.stretch.inside) // self.pulse):
            cut = reference.cut(self.stretch.clip, begin + step * self.pulse, self.pulse)
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


def _is_row(row: Any, at: int) -> bool:
    """Whether a row of a report, which may come from anyone, is what the search counts on."""
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in TEXTS):
        return False
    lists: list[Any] = [row.get(name) for name in ("inputs", "shape", "values")]
    if not all(isinstance(x, list) for x in lists) or not all(isinstance(row.get(n), int) for n in ("entries", "late")):
        return False
    inputs, shape, values = lists
    before = all(isinstance(i, int) and 0 <= i < at for i in inputs)
    sizes = all(isinstance(s, int) and s > 0 for s in shape)
    return before and sizes and all(isinstance(v, str) for v in values) and len(values) in (0, row["entries"])


def _nodes(model: onnx.ModelProto) -> list[tuple[Any, ...]]:
    """What the operators of a file are, and how they are joined."""
    return [(n.op_type, n.name, *n.input, "", *n.output) for n in model.graph.node]


def _distance(actual: Any, candidates: Sequence[Tensor]) -> float | None:
    """The largest absolute difference from the nearest candidate; None where shapes do not fit."""
    found = []
    for candidate in candidates:
        pair = _alike(actual, candidate.numpy())
        if pair is None:
            return None
        with np.errstate(invalid="ignore"):
            difference = np.abs(pair[0].astype(np.float64) - pair[1].astype(np.float64))
        found.append(float(np.where(np.isfinite(difference), difference, np.inf).max(initial=0.0)))
    return min(found, default=None)


def _alike(actual: Any, wanted: Any) -> tuple[Any, Any] | None:
    """Both in one shape, dims of one aside; None if they are of others.

    A file's value may have zeros beyond the channels, or lack up to three, which are apart (passes/block_channels.py):
    what both have is compared.
    """
    if wanted.ndim in (actual.ndim, actual.ndim + 1) and actual.ndim > 1 and _bare(actual) != _bare(wanted):
        channels = min(actual.shape[1], wanted.shape[1])
        if wanted.shape[1] - channels < BLOCK:
            actual, wanted = actual[:, :channels], wanted[:, :channels]
    return (actual.reshape(wanted.shape), wanted) if _bare(actual) == _bare(wanted) else None


def _bare(array: Any) -> list[int]:
    return [size for size in array.shape if size != 1]


__all__ = ["Bisect"]
