"""What the passes decided, operator by operator: when each result is there, what it has seen, what it costs.

Taken once the graph is aligned and before time leaves it, for the report and its drawing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Interpreter, Node
from torch.utils.flop_counter import FlopCounterMode

from co3d_compile.facts import KEY, Fact, Kind, fact_of
from co3d_compile.primitive import history, outside, shift, take, window
from co3d_compile.program import Program, bytes_of, module_path, operator_name
from co3d_compile.rules import rule_for
from co3d_compile.rules.base import operand

if TYPE_CHECKING:
    from collections.abc import Iterator

MARKERS = (history, take, shift, outside, window)


@dataclass(frozen=True)
class Operator:
    """One operator over a stream, or over a window of one.

    Attributes:
        name: Of the node in the graph.
        operator, module_path: What it is and where it comes from.
        kind: "input", "stream", "window" (computed afresh from the newest entries).
        done: What the passes made of it: "continual", "gate over one frame", …; empty: it was left as it was.
        inputs: Indices of the operators that it reads.
        held: Of each input, by how many entries it is delayed; None where it is not over time.
        shape: Of its result in the clip.
        taps: Entries that it reads along time, from the first to the last.
        padding: Zeros that it had in front, on the time axis.
        rate: Frames of the first input from one entry to the next.
        delay: Frames by which its newest entry lags behind the newest frame.
        first, last: Frames that an entry at frame 0 reads, relative to it, at most; None: without bound.
        macs_clip, macs_step: Multiply-adds for a clip, and for a step.
        state_bytes: Of one stream.
        origin: Name of the node in the captured graph that has this result; empty: none has.
        entries: New ones at every step.
        late: Its own entries by which the newest one lags behind, as for an output of the model.
        values: The ONNX values that hold its new entries, oldest first; empty where there are none.
    """

    name: str
    operator: str
    module_path: str
    kind: str
    done: str
    inputs: tuple[int, ...]
    held: tuple[int | None, ...]
    shape: tuple[int, ...]
    taps: int
    padding: int
    rate: float
    delay: float
    first: float | None
    last: float | None
    macs_clip: int = 0
    macs_step: int = 0
    state_bytes: int = 0
    origin: str = ""
    entries: int = 1
    late: int = 0
    values: tuple[str, ...] = ()

    @property
    def field(self) -> int | None:
        """Frames that one entry depends on."""
        if self.first is None or self.last is None:
            return None
        return int(self.last - self.first) + 1


@dataclass
class Costs:
    """Multiply-adds by module path, of a whole graph at batch one."""

    by_path: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return self.by_path.total()


def costs(program: Program) -> Costs:
    """Multiply-adds of the graph's convolutions and matrix products at batch one, by PyTorch's own counter."""
    mode = next(n.meta["val"].fake_mode for n in program.graph.nodes if hasattr(n.meta.get("val"), "fake_mode"))
    nodes = program.placeholders()
    batch = max(1, int(nodes[0].meta["val"].shape[0]))
    found: Counter[str] = Counter()
    with torch.no_grad(), mode, FlopCounterMode(display=False) as counter:

        class Counting(Interpreter):
            def run_node(self, n: Node) -> Any:
                before = counter.get_total_flops() if n.op == "call_function" else 0
                result = super().run_node(n)
                if n.op == "call_function" and (more := counter.get_total_flops() - before):
                    found[module_path(n)] += more
                return result

        Counting(program.module).run(*[torch.empty(n.meta["val"].shape, dtype=n.meta["val"].dtype) for n in nodes])
    return Costs(Counter({path: flops // 2 // batch for path, flops in found.items()}))


def survey(program: Program) -> list[Operator]:
    """Describes an aligned graph. Costs and states are added later, by ``with_costs``."""
    rows: list[Operator] = []
    index: dict[Node, int] = {}
    extents: dict[Node, tuple[Fraction, Fraction] | None] = {}
    origins = _origins(program)
    for node in program.graph.nodes:
        fact: Fact | None = node.meta.get(KEY)
        if fact is None or node.op not in ("placeholder", "call_function") or fact.kind is Kind.STATIC:
            continue
        extents[node] = _extent(node, fact, extents)
        if node.target in MARKERS:
            continue
        sources = [_source(n) for n in node.all_input_nodes if _source(n)[0] in index]
        index[node] = len(rows)
        row = _row(node, fact, [(index[n], held) for n, held in sources], extents[node])
        rows.append(replace(row, origin=origins.get(node.name, "")))
    return rows


def _origins(program: Program) -> dict[str, str]:
    """The captured node that each node has the value of; one that is still there is its own."""
    places = program.places()
    found: dict[str, str] = {}
    for captured, name in places.items():
        if name == captured or name not in found:
            found[name] = captured
    return found


def with_values(rows: list[Operator], program: Program) -> list[Operator]:
    """Adds the ONNX values of an exported program that hold the entries of each operator."""
    found: dict[str, dict[int, str]] = {}
    for (name, entry), value in program.values.items():
        found.setdefault(name, {})[entry] = value
    result = []
    for row in rows:
        own = found.get(row.name, {})
        whole = own and len(own) == row.entries
        result.append(replace(row, values=tuple(own[i] for i in sorted(own))) if whole else row)
    return result


def with_costs(rows: list[Operator], clip: Costs, step: Costs, program: Program) -> list[Operator]:
    """Adds what each module costs and remembers, at the operator of the module that does most with time."""
    states: Counter[str] = Counter()
    for state in program.states:
        path = state.input.removeprefix("state.").rpartition(".")[0]
        states[path] += bytes_of(state.shape, state.dtype)
    result = list(rows)
    for name, amounts in (("macs_clip", clip.by_path), ("macs_step", step.by_path), ("state_bytes", states)):
        for path, amount in amounts.items():
            at = _owner(rows, path, remembers=name == "state_bytes")
            if at is not None:
                result[at] = replace(result[at], **{name: getattr(result[at], name) + amount})
    return result


def as_rows(rows: list[Operator]) -> list[dict[str, Any]]:
    """Plain JSON data."""
    return [{**asdict(row), "field": row.field} for row in rows]


def _row(node: Node, fact: Fact, inputs: list[tuple[int, int | None]], extent: Any) -> Operator:
    kernel = node.meta.get("kernel")
    value = node.meta.get("val")
    streams = fact.kind is Kind.STREAM
    left_out = fact.crop * fact.rate if streams else Fraction(0)  # by a select: its entry is named for the first one
    return Operator(
        name=node.name,
        operator="input" if node.op == "placeholder" else operator_name(node.target),
        module_path="" if node.op == "placeholder" else module_path(node),
        kind="input" if node.op == "placeholder" else fact.kind.value,
        done=_done(node, fact),
        inputs=tuple(at for at, _ in inputs),
        held=tuple(held for _, held in inputs),
        shape=tuple(int(size) for size in value.shape) if isinstance(value, torch.Tensor) else (),
        taps=(kernel.k - 1) * kernel.d + 1 if kernel is not None else 1,
        padding=max(0, kernel.p) if kernel is not None else 0,
        rate=float(fact.rate),
        delay=float(fact.delay * fact.rate - left_out) if streams else float(_window_delay(node)),
        first=None if extent is None else float(extent[0] - left_out),
        last=None if extent is None else float(extent[1] - left_out),
        entries=int(fact.pulse) if streams else 1,
        late=fact.delay - fact.crop if streams else _late(node),
    )


def _done(node: Node, fact: Fact) -> str:
    if fact.kind is Kind.WINDOW:
        return "on a window"
    if _carries(node, fact):
        return "carries its state"
    if "gate" in node.meta:
        return "gate over one frame" if node.meta["gate"] == "frame" else "gate over a window"
    if "kernel" in node.meta and any(m.target is history for n in node.all_input_nodes for m in _markers(n)):
        return "continual"
    held = [h for n in node.all_input_nodes if (h := _source(n)[1])]
    return f"operand delayed by {max(held)}" if held else ""


def _carries(node: Node, fact: Fact) -> bool:
    rule = rule_for(node.target)
    return fact.kind is Kind.STREAM and rule is not None and rule.remembers_all(node)


def _source(node: Node) -> tuple[Node, int | None]:
    """The operator behind the markers, and by how many of its entries it is held back."""
    fact: Fact | None = node.meta.get(KEY)
    n = node
    while n.target in MARKERS:
        n = n.args[0]  # type: ignore[assignment]
    own: Fact | None = n.meta.get(KEY)
    if fact is None or own is None or fact.kind is not Kind.STREAM or own.kind is not Kind.STREAM:
        return n, None
    if not any(m.target is take for m in _markers(node)):
        return n, 0
    return n, max(0, fact.delay - own.delay)


def _markers(node: Node) -> Iterator[Node]:
    while node.target in MARKERS:
        yield node
        node = node.args[0]  # type: ignore[assignment]


def _window_delay(node: Node) -> Fraction:
    """Frames by which the newest entry lags that a window result has read."""
    return min((newest(m) * fact_of(operand(m)).rate for m in _windows(node)), default=Fraction(0))


def _late(node: Node) -> int:
    """The same in entries, less what a selection leaves out."""
    return min((newest(m) for m in _windows(node)), default=0)


def newest(marker: Node) -> int:
    """The delay of the newest entry that a window reads, once windows that meet are aligned."""
    return int(marker.meta.get("newest", fact_of(operand(marker)).delay))


def _windows(node: Node) -> list[Node]:
    """The windows that a result comes from."""
    found, stack, seen = [], list(node.all_input_nodes), set()
    while stack:
        n = stack.pop()
        if n in seen:
            continue
        seen.add(n)
        if n.target is window:
            found.append(n)
        elif fact_of(n).kind is Kind.WINDOW:
            stack.extend(n.all_input_nodes)
    return found


def _extent(node: Node, fact: Fact, known: dict[Node, Any]) -> tuple[Fraction, Fraction] | None:
    """The frames that an entry reads, from the one at its own index on."""
    if node.op == "placeholder":
        return Fraction(0), Fraction(0)
    parts = [known[n] for n in node.all_input_nodes if n in known]
    if not parts:
        return Fraction(0), Fraction(0)
    if any(part is None for part in parts) or _carries(node, fact):
        return None
    first, last = min(part[0] for part in parts), max(part[1] for part in parts)
    before: Fact = next(n.meta[KEY] for n in node.all_input_nodes if n in known)
    if node.target is window or node.meta.get("gate") == "window":
        return first - (before.length - 1) * before.spacing * before.rate, last
    if node.target is shift:
        move = int(node.args[1]) * before.rate  # type: ignore[arg-type]
        return first - move, last - move
    kernel = node.meta.get("kernel")
    if kernel is None and fact.kind is Kind.WINDOW:
        return first, last
    if kernel is None:  # behind an up-sampling the later entries of a group read what lies before them
        return first - max(Fraction(0), before.rate - fact.rate), last
    kernel = before.flowing(kernel)
    return first - kernel.p * before.rate, last + ((kernel.k - 1) * kernel.d - kernel.p) * before.rate


def _owner(rows: list[Operator], path: str, *, remembers: bool) -> int | None:
    """The operator that a module's costs are shown at: one that remembers, or the first that computes."""
    parts = [at for at, row in enumerate(rows) if row.operator != "input"]
    named = "" if path == "model" else path
    own = [at for at in parts if rows[at].module_path == named] or (parts[-1:] if path == "model" else [])
    heavy = [at for at in own if any(word in rows[at].operator for word in ("conv", "linear", "mm", "attention"))]
    with_past = [at for at in own if rows[at].done]
    if remembers:
        return next(iter(with_past or heavy or own), None)
    return next(iter(heavy or own), None)
