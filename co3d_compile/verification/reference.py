"""What a compiled model must answer at every step, from the untouched model on one long clip."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from math import ceil, lcm
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from co3d_compile.capture.capture_model import capture
from co3d_compile.capture.tracer import _evaluated, traced
from co3d_compile.errors import CaptureError, UsageError, VerificationError
from co3d_compile.ir.node_reading import module_path
from co3d_compile.ir.options import Options
from co3d_compile.verification.long_clip import Entries, LongClip, Stream, Windows
from co3d_compile.verification.output_plans import Wanted, plan_of, sort_of
from co3d_compile.verification.time_claims import NOTHING, claim_of, claims_of, remembers_all

SAME = 1e-5  # in standard deviations: two eager runs of the same clip


@contextmanager
def eager() -> Iterator[None]:
    """Eager runs without gradients and without NNPACK, which smears NaN over a whole tensor."""
    with torch.inference_mode(), torch.backends.nnpack.flags(enabled=False):
        yield


class Reference:
    """The untouched model as it is captured, with what the compiler says of time.

    Args:
        model: The clip model.
        example_inputs: The arguments of one clip; None for a program that carries its own.
        options: As the model was compiled.

    Raises:
        VerificationError: The captured graph does not compute what the model does.
    """

    def __init__(self, model: nn.Module | ExportedProgram, example_inputs: Sequence[Any] | None, options: Options):
        self.program = capture(_exported(model, example_inputs), None, options)
        self.inputs = self.program.inputs
        self.dense = options.stride_mode == "dense"
        self.claims = claims_of(self.program)
        sorts = self._plan()
        streams = [self.claims[n.name] for n, s in sorts.items() if s == "stream" and n.name in self.claims]
        self.unit = lcm(*(int(c.spacing) if self.dense else c.rate.numerator for c in streams))
        timed = [i for i in self.inputs if i.time_dim is not None]
        self.clip = int(timed[0].shape[timed[0].time_dim])  # type: ignore[index]
        self.rates = {n.name: self.claims[n.name].rate for n in self.program.placeholders()}
        self._double = False
        self._check_capture(model, example_inputs)

    def _plan(self) -> dict[Node, str]:
        """How each result is computed on the long clip; returns how each node is."""
        timed = {i.name for i in self.inputs if i.time_dim is not None}
        sorts: dict[Node, str] = {}
        for node in self.program.graph.nodes:
            sorts[node] = sort_of(node, sorts, self.claims, timed)
        output = next(n for n in self.program.graph.nodes if n.op == "output")
        self.plans = [plan_of(n, sorts, self.claims) for n in output.args[0]]
        self.fields: list[int] = []
        self._finite: dict[str, dict[int, bool]] = {}
        return sorts

    def watching(self, names: Sequence[str]) -> Reference:
        """This reference with nodes of the captured graph for results; what they do not need is not run."""
        graph = copy.deepcopy(self.program.graph)
        nodes = {n.name: n for n in graph.nodes}
        next(n for n in graph.nodes if n.op == "output").args = (tuple(nodes[name] for name in names),)
        graph.eliminate_dead_code()
        return self._with(GraphModule(self.program.module, graph))

    def doubled(self) -> Reference:
        """This reference in float64: slower, and without rounding errors of its own."""
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
        """Module paths of recurrent layers and of all that they read: states there start as the clip's own do."""
        stack = [n for n in self.program.graph.nodes if n.op == "call_function" and remembers_all(n, self.claims)]
        seen: set[Node] = set()
        while stack:
            n = stack.pop()
            if n not in seen:
                seen.add(n)
                stack += n.all_input_nodes
        return {module_path(n) or "model" for n in seen if n.op == "call_function"}

    def gates(self) -> list[str]:
        """The operators that are replaced by what they are in the stream."""
        return [
            n.name
            for n in self.program.graph.nodes
            if n.op == "call_function" and n.target is not operator.getitem and claim_of(n, self.claims).gate
        ]

    def _check_capture(self, model: nn.Module | ExportedProgram, example_inputs: Sequence[Any] | None) -> None:
        """The captured graph on one random clip, beside the model itself."""
        args, kwargs = _example(model, example_inputs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        clip = iter(self.random([i.shape for i in self.inputs], torch.Generator().manual_seed(1)))
        leaves = [next(clip) if isinstance(v, Tensor) else v for v in leaves]
        args, kwargs = pytree.tree_unflatten([v.clone() if isinstance(v, Tensor) else v for v in leaves], spec)
        with eager(), _evaluated(model) as module:
            wanted = [v for v in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(v, Tensor)]
            got = Interpreter(self.program.module).run(*[v.clone() for v in leaves if isinstance(v, Tensor)])
        for a, b in zip(got, wanted, strict=True):
            scale = float(b.double().std(correction=0)) or 1.0
            if a.shape != b.shape or not bool(((a - b).abs() <= SAME * scale + 1e-30).all()):
                raise VerificationError(
                    "The captured graph does not compute what the model does.",
                    hint="Does the model depend on the values of its input, or on chance?",
                )

    # --- the long clip

    def random(self, shapes: Sequence[Sequence[int]], generator: torch.Generator) -> list[Tensor]:
        """Random inputs of these shapes."""
        results = []
        for spec, shape in zip(self.inputs, shapes, strict=True):
            if spec.dtype.is_floating_point:
                x = torch.randn(*shape, generator=generator)
            else:
                x = torch.randint(0, 2, list(shape), generator=generator)
            results.append(x.to(spec.dtype))
        return results

    def length(self, frames: int) -> int:
        """The least number of frames, at least as many, at which all entries of the long clip are whole."""
        whole = self.clip + ceil(max(0, frames - self.clip) / self.unit) * self.unit
        return whole + (self.unit - 1 if self.dense else 0)

    def frames(self, total: int, seed: int) -> list[Tensor]:
        """So many random frames of every input (of the first one, the others by their rate)."""
        return self.random(self.shapes(total), torch.Generator().manual_seed(seed))

    def shapes(self, total: int) -> list[list[int]]:
        """The shape of so many frames of every input."""
        return [
            [int(total / self.rates[i.name]) if d == i.time_dim else s for d, s in enumerate(i.shape)]
            for i in self.inputs
        ]

    def cut(self, frames: Sequence[Tensor], start: Fraction | int, count: int) -> list[Tensor]:
        """Frames of every input; an input without time stays as it is."""
        return [
            x
            if i.time_dim is None
            else x.narrow(i.time_dim, int(start / self.rates[i.name]), int(count / self.rates[i.name]))
            for i, x in zip(self.inputs, frames, strict=True)
        ]

    def values(
        self, frames: Sequence[Tensor], front: int, inside: range, wanted: Sequence[Wanted], done: Callable[[], None]
    ) -> dict[Wanted, list[Tensor]]:
        """What is wanted, from the model on a long clip.

        Args:
            frames: The long clip.
            front: Where frame 0 of the stream is in it; below 0, where the clip begins later.
            inside: Where the frames are in it that the stream has seen.
            wanted: Results, by entries or clip starts counted from frame 0 of the stream.
            done: Called after each operator.

        Raises:
            NoReference: The model cannot be run on a long clip.
        """
        timed = next(k for k, i in enumerate(self.inputs) if i.time_dim is not None)
        total = frames[timed].shape[self.inputs[timed].time_dim] - (self.unit - 1 if self.dense else 0)  # type: ignore
        found: dict[Wanted, dict[Any, Tensor]] = {w: {} for w in wanted}
        for phase in sorted({p for w in wanted for p in self._phases(w)} or {0}):
            starts = sorted({s for w in wanted for s in w.starts if self._phase(s) == phase})
            run = LongClip(self.program, self.claims, starts, front - phase, done)
            run.double = self._double
            run.watched = {r.name for p in self.plans for r in p.reads} | {p.name for p in self.plans}
            with eager():
                outputs = run.run(
                    *[x.double() if run.double and x.is_floating_point() else x for x in self.cut(frames, phase, total)]
                )
            for name, flags in run.finite.items():
                step = self.claims[name].spacing
                self._finite.setdefault(name, {}).update({phase + i * step: flag for i, flag in enumerate(flags)})
            for w in wanted:
                self._take(w, outputs[w.output], run, found[w])
        self._measure(inside.start, inside.stop)
        return {w: self._joined(w, parts) for w, parts in found.items()}

    def _phase(self, frame: Fraction) -> int:
        return int(frame) % self.unit if self.dense else 0

    def _phases(self, w: Wanted) -> set[int]:
        rate = self.plans[w.output].claim.rate
        return {self._phase(s) for s in w.starts} | {self._phase(n * rate) for n in w.entries}

    def _take(self, w: Wanted, value: Any, run: LongClip, found: dict[Any, Tensor]) -> None:
        """Takes what this run says of a result."""
        claim = self.plans[w.output].claim
        if isinstance(value, Windows):
            for start, result in zip(run.starts, value.values, strict=True):
                if start in w.starts and result is not None:
                    found[start] = result.clone()
        elif isinstance(value, (Stream, Entries)):
            for n in w.entries:
                index = run.index(claim, n * claim.rate)
                if isinstance(value, Entries) and index is not None and index < len(value.values):
                    found[n] = value.values[index].clone()
                elif isinstance(value, Stream) and index is not None and index < claim.entries(value.value):
                    found[n] = claim.cut(value.value, index, 1).clone()
        else:
            found[None] = value

    def _joined(self, w: Wanted, parts: dict[Any, Tensor]) -> list[Tensor]:
        plan = self.plans[w.output]
        if plan.sort in ("window", "static"):
            return list(parts.values())
        if set(parts) != set(w.entries):
            return []
        ordered = [parts[n] for n in w.entries]
        alone = plan.sort == "stream" and plan.claim.place is not None
        return [torch.cat(ordered, plan.claim.place.dim)] if alone else ordered[-1:]  # type: ignore[union-attr]

    def clips(self, frames: Sequence[Tensor], front: int, wanted: Sequence[Wanted]) -> dict[Wanted, list[Tensor]]:
        """What is wanted, each from the untouched model on one clip: right where nothing pads time."""
        results: dict[Wanted, list[Tensor]] = {}
        for w in wanted:
            plan = self.plans[w.output]
            starts = list(w.starts)
            if w.entries:
                last = (plan.claim.place.size - 1 if plan.claim.place else 0) * plan.claim.spacing
                starts = [(n - last) * plan.claim.rate for n in w.entries]
            if not starts or min(starts) + front < 0:
                results[w] = []
                continue
            with eager():
                values = [self.program.module(*self.cut(frames, s + front, self.clip))[w.output] for s in starts]
            if w.entries and plan.claim.place is not None:
                dim = plan.claim.place.dim
                values = [torch.cat([v.narrow(dim, v.shape[dim] - 1, 1) for v in values], dim)]
            results[w] = values
        return results

    def _measure(self, begin: int, end: int) -> None:
        """Notes a lower bound of the receptive field, where frames before ``begin`` and from ``end`` on are NaN.

        Entries between the last NaN before and the first behind a run of finite ones repeat every ``unit`` frames.
        """
        reads = [r for p in self.plans for r in p.reads]
        for name, flags in self._finite.items():
            claim = self.claims.get(name, NOTHING)
            every = 1 if self.dense else int(max(self.unit / claim.rate, Fraction(1)))
            # A window holds so many entries of each of the places that repeat; up-sampled ones differ by place.
            repeats = max(((r.newest - r.oldest + 1) // every - 1 for r in reads if r.name == name), default=0)
            beyond = max(repeats, 0) * every * claim.spacing * claim.rate
            if set(flags) != set(range(len(flags))):
                continue
            for first in range(every):
                own = [flags[i] for i in range(first, len(flags), every)]
                best = _longest(own)
                if best is not None and best[0] > 0 and best[1] < len(own) - 1:
                    field = end - begin + 2 - (best[1] - best[0] + 2) * every * claim.rate
                    self.fields.append(int(field + beyond))


def _longest(flags: Sequence[bool]) -> tuple[int, int] | None:
    """First and last index of the longest run of true flags."""
    best, start = None, None
    for i, flag in enumerate([*flags, False]):
        if flag and start is None:
            start = i
        elif not flag and start is not None:
            if best is None or i - start > best[1] - best[0] + 1:
                best = (start, i - 1)
            start = None
    return best


def _example(model: nn.Module | ExportedProgram, example_inputs: Sequence[Any] | None) -> tuple[Any, Any]:
    if example_inputs is not None:
        return tuple(example_inputs), {}
    if isinstance(model, ExportedProgram) and model.example_inputs is not None:
        return model.example_inputs
    raise UsageError("example_inputs is needed: the arguments of one clip.")


def tensors_of(model: nn.Module | ExportedProgram, example_inputs: Sequence[Any] | None) -> list[Tensor]:
    """The tensors of one clip, in the order in which the model takes them."""
    return [t for t in pytree.tree_leaves(_example(model, example_inputs)) if isinstance(t, Tensor)]


def batch_of(model: nn.Module | ExportedProgram, example_inputs: Sequence[Any] | None) -> int:
    """The batch of the example."""
    tensors = tensors_of(model, example_inputs)
    return int(tensors[0].shape[0]) if tensors and tensors[0].dim() else 1


def _exported(model: nn.Module | ExportedProgram, example_inputs: Sequence[Any] | None) -> ExportedProgram:
    """The model's graph for the example's own batch."""
    if isinstance(model, ExportedProgram):
        return model
    args, _ = _example(model, example_inputs)
    try:
        with torch.no_grad(), _evaluated(model):
            return traced(model, args)
    except Exception as error:
        what = str(error).strip().split("\n")[0]
        raise CaptureError(f"{type(model).__name__} cannot be captured with the example inputs: {what}") from error


__all__ = ["Reference", "batch_of", "tensors_of"]
