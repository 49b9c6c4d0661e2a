"""The untouched model, operator by operator in eager PyTorch, on one long clip.

It shares no code with the rewriting. Operators that slide over time run natively on the long clip, with their
padding at its ends. What the compiler says is a window runs unchanged, with all behind it, on slices of the newest
entries. A gate is its pool over one entry, or over the newest window. Only *where* time is, and what is a window, is
taken from the compiler's claims: a wrong claim ends in an error or a mismatch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence, Set
from fractions import Fraction

import torch
from torch import Tensor
from torch.fx import Interpreter, Node, map_arg
from torch.utils import _pytree as pytree

from co3d_compile.errors import first_line
from co3d_compile.ir.aten_operators import SIZED
from co3d_compile.ir.node_reading import operand, place_of, whole
from co3d_compile.ir.program import Program
from co3d_compile.ir.time_facts import Kind
from co3d_compile.verification.long_boxes import LongBoxes
from co3d_compile.verification.long_regions import LongRegion, not_captured
from co3d_compile.verification.long_values import Entries, Stream, Windows, as_many_entries, counted, extended
from co3d_compile.verification.replaced_kernels import ReplacedKernel
from co3d_compile.verification.resized_arguments import (
    BY_INDEX,
    SCATTERS,
    Resize,
    banded,
    call,
    computes_over,
    filled,
    fixes_time,
    for_rows,
    pointwise,
    reads_by_index,
    resized,
    scatter,
)
from co3d_compile.verification.time_claims import (
    NOTHING,
    Arguments,
    Claim,
    Named,
    NoReference,
    Value,
    claim_for,
    claim_of,
    is_kept,
    is_recurrent,
    is_single,
    is_window,
    runs_over_time,
)

aten = torch.ops.aten
FAILURES = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)
NORMS = {aten.group_norm.default, aten.layer_norm.default, aten.instance_norm.default}


class LongClip(Interpreter):
    """A run of the captured graph on a long clip.

    Args:
        program: As captured, untouched.
        claims: Where time is (:func:`claims_of`).
        starts: Positions: frames of the first input at which a clip starts, counted from ``front - phase``.
        offset: Index of the stream's first frame in the long clip.
        done: Called after each operator.
    """

    def __init__(
        self,
        program: Program,
        claims: dict[str, Claim],
        starts: Sequence[Fraction],
        offset: int,
        done: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(program.module, garbage_collect_values=True)
        self.claims, self.starts, self.offset, self.done = claims, starts, offset, done
        self.timed = {i.name: i.time_dim is not None for i in program.inputs}
        self.kernels: Mapping[str, ReplacedKernel] = {}
        self.double = False
        self.whole_windows = True  # what a gate gives before its window is whole is not known
        self.finite: dict[str, dict[int, bool]] = {}
        self.watched: set[str] = set()
        self.regions: Mapping[str, LongRegion] = {}
        self.longer: Callable[[str, tuple[str, ...]], LongRegion] = not_captured
        self.boxes: Mapping[str, LongBoxes] = {}
        self.inside: Set[str] = frozenset()  # nodes of regions that nothing else reads
        self._read: dict[str, Value] = {}
        self._firsts: dict[str, Tensor] = {}
        self._kept = {name.split(">")[0] for name, claim in claims.items() if claim.kept}

    def index(self, claim: Claim, frame: Fraction) -> int | None:
        """Finds the entry of the long clip at a frame of the stream, if there is one."""
        index = (frame + self.offset) / (claim.rate * claim.spacing)
        return int(index) if index.denominator == 1 and index >= 0 else None

    def run_node(self, n: Node) -> Value:
        self.done()
        if n.name in self.inside:
            return None
        value = self._region(n) if n.name in self.regions else self._node(n)
        if any(n.name in part.inputs for part in self.regions.values()):
            self._read[n.name] = value
        return value

    def _region(self, n: Node) -> Value:
        """Computes what is local in time as the network does, on all of the long clip."""
        part = self.regions[n.name]
        result = part.run([self._read[name] for name in part.inputs])
        return self._seen(n, Stream(result, self._claim(n)))

    def _node(self, n: Node) -> Value:
        if n.op == "placeholder":
            x = super().run_node(n)
            if n.name in self.boxes:
                return Windows([self.boxes[n.name].of_clip(start) for start in self.starts])
            return self._seen(n, Stream(x, self.claims[n.name])) if self.timed[n.name] else x
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self._arguments(n)
        if n.name in self._kept:
            first = self.index(args[0].claim, Fraction(0))
            self._firsts[n.name] = args[0].without_time(first, n.target is aten.select.int)
        if self.double and kwargs.get("dtype") in (torch.float32, torch.float16):
            kwargs = {**kwargs, "dtype": torch.float64}
        try:
            value = self._call(n, args, kwargs)
        except (NoReference, *FAILURES) as error:
            value = self._captured_again(n) if not self._all_constant(n) else self._constant(n, kwargs)
            if value is None and isinstance(error, NoReference):
                raise
            if value is None:
                raise NoReference(f"{place_of(n)}: {first_line(error)}") from error
        return self._seen(n, value)

    def _arguments(self, n: Node) -> tuple[Arguments, Named]:
        """Finds what an operator is given: of a stream of which it reads the first entry for ever, that entry."""

        def given(a: Node) -> Value:
            return self._firsts[a.name] if is_kept(a, n, self.claims) else self.env[a]

        return map_arg(n.args, given), map_arg(n.kwargs, given)

    def _captured_again(self, n: Node) -> Value:
        """Computes an operator of the stream that has its indices for one clip; None where the result is not known.

        It has those of the long clip where the network is captured on all of it.
        """
        given = {a.name: self.env[a] for a in n.all_input_nodes}
        if self._claim(n).kind is not Kind.STREAM or not all(isinstance(v, (Stream, Tensor)) for v in given.values()):
            return None
        streams = {name: v.value for name, v in given.items() if isinstance(v, Stream)}
        try:
            return self._streams(n, self.longer(n.name, tuple(streams)).graph(*streams.values()))
        except (NoReference, *FAILURES):
            return None

    def _seen(self, n: Node, value: Value) -> Value:
        """Notes which entries of a watched tensor are finite."""
        if n.name in self.watched and isinstance(value, Stream) and value.value.is_floating_point():
            place = value.claim.place
            if place is not None and place.alone:
                flags = value.value.movedim(place.dim, 0).flatten(1).isfinite().all(1).tolist()
                self.finite[n.name] = dict(enumerate(flags, value.first))
        return value

    def _call(self, n: Node, args: Arguments, kwargs: Named) -> Value:
        kinds = {type(v) for v in pytree.tree_leaves((args, kwargs))}
        claim = self._claim(n)
        if not kinds & {Stream, Windows, Entries}:
            return call(n, args, kwargs)
        if claim.kind is Kind.START:  # of the first entries alone, however many there are
            return _on_clip(n, args, kwargs)
        if n.target is operator.getitem:
            value, i = args
            if isinstance(value, Entries):
                return Entries([v[i] for v in value.values], claim)
            several = isinstance(value, Windows)
            return Windows([None if v is None else v[i] for v in value.values]) if several else value[i]
        if claim.gate is not None and kinds & {Windows, Entries} == set():
            return self._gate(n, claim, args, kwargs)
        if Windows in kinds or (is_window(n, self.claims) if Entries not in kinds else claim.kind is Kind.WINDOW):
            return self._windows(n, args, kwargs)
        if Entries in kinds or is_single(n, self.claims) or _one_by_one(n, args):
            return self._per_entry(n, claim, args, kwargs)
        return self._stream(n, claim, args, kwargs)

    def _claim(self, n: Node) -> Claim:
        return claim_of(n, self.claims)

    # --- operators on the whole long clip

    def _stream(self, n: Node, claim: Claim, args: Arguments, kwargs: Named) -> Value:
        if reads_by_index(n) and (found := self._captured_again(n)) is not None:
            return found
        constant = self._constant(n, kwargs)
        together = n.target in (aten.grid_sampler_2d.default, aten.bmm.default, *BY_INDEX) or beside(n, claim)
        if together or pointwise(n):
            streams = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Stream)]
            longest = max(streams, key=lambda v: v.value.dim())
            given = pytree.tree_map(counted, (args, kwargs)) if claim.kind is Kind.STREAM else (args, kwargs)
            args, kwargs = pytree.tree_map(lambda v: extended(v, longest, self.offset), as_many_entries(given))
        args, kwargs = pytree.tree_map(lambda v: v.value if isinstance(v, Stream) else v, (args, kwargs))
        if n.target is aten.cat.default and not beside(n, claim) and claim.place is not None:
            args = (filled(n, args[0], claim.place.dim), *args[1:])
        if n.target is aten.scaled_dot_product_attention.default and len(args) > 3 and args[3] is not None:
            args = (*args[:3], banded(args[3], args[0].shape[-2]), *args[4:])
        args = for_rows(n, args) if is_recurrent(n) else args
        if is_recurrent(n) and runs_over_time(n, self.claims):
            return self._recurrent(n, args, kwargs)
        kernel = self.kernels.get(n.name)
        result = self._apply(n, args, kwargs) if kernel is None else kernel.apply(n, args, kwargs)
        return self._streams(n, result, constant)

    def _streams(self, n: Node, result: Value, constant: Value = None) -> Value:
        """Computes the results of an operator on all of the long clip."""
        if isinstance(result, (tuple, list)):
            items = self._items(n)
            parts = constant if isinstance(constant, (tuple, list)) else [None] * len(result)
            return tuple(Stream(v, items.get(i, NOTHING), parts[i]) for i, v in enumerate(result))
        return Stream(result, self._claim(n), constant)

    def _items(self, n: Node) -> dict[int, Claim]:
        """What the compiler says of the outputs of an operator that has several, by their number."""
        return {whole(u, 1): self._claim(u) for u in n.users}

    def _all_constant(self, n: Node) -> bool:
        """Says whether an operator reads nothing but constants, some of which hang on the clip's shape."""
        read = [self.env[a] for a in n.all_input_nodes]
        return all(isinstance(v, Tensor) or (isinstance(v, Stream) and v.constant is not None) for v in read)

    def _constant(self, n: Node, kwargs: Named) -> Value:
        """Runs the operator on a single clip, where the compiler says that its values do not matter."""
        if self._claim(n).kind is not Kind.STATIC:
            return None

        def given(a: Node) -> Value:
            v = self.env[a]
            shape_alone = isinstance(v, Stream) and v.constant is None and v.claim.place is None
            return torch.zeros(a.meta["val"].shape, dtype=v.value.dtype) if shape_alone else v

        return _on_clip(n, map_arg(n.args, given), kwargs)

    def _recurrent(self, n: Node, args: Arguments, kwargs: Named) -> Value:
        """Computes the sequence, and the last state after every position: the frames from the first on."""
        x = claim_for(operand(n), n, self.claims)
        items = self._items(n)
        sequence, *last = call(n, args, kwargs)

        def state_at(start: Fraction) -> Sequence[Tensor | None]:
            newest = self.index(x, start + (x.length - 1) * x.rate * x.spacing)
            seen = Stream(args[0], x).span(0, newest + 1) if newest is not None else None
            return [None] * len(last) if seen is None else call(n, (seen, *args[1:]), kwargs)[1:]

        states = [state_at(start) for start in self.starts] if any(items) else []
        return (Stream(sequence, items.get(0, NOTHING)), *(Windows([s[k] for s in states]) for k in range(len(last))))

    # --- operators on one clip per position

    def _windows(self, n: Node, args: Arguments, kwargs: Named) -> Windows:
        return Windows([self._window(n, args, kwargs, p) for p in range(len(self.starts))])

    def _window(self, n: Node, args: Arguments, kwargs: Named, p: int) -> Value:
        def operand(v: Value) -> Value:
            if isinstance(v, Windows):
                return v.values[p]
            if isinstance(v, Stream):
                clip = v.span(self.index(v.claim, self.starts[p]), v.claim.length)
                return clip if v.constant is None else v.constant
            return v.entry(self.index(v.claim, self.starts[p])) if isinstance(v, Entries) else v

        before = pytree.tree_leaves((args, kwargs), is_leaf=lambda v: v is None)
        leaves = [operand(v) for v in before]
        if any(new is None and old is not None for old, new in zip(before, leaves, strict=True)):
            return None
        spec = pytree.tree_structure((args, kwargs), is_leaf=lambda v: v is None)
        return self._apply(n, *pytree.tree_unflatten(leaves, spec))

    # --- gates

    def _gate(self, n: Node, claim: Claim, args: Arguments, kwargs: Named) -> Value:
        """Computes a pool or norm over the one entry, or over the newest window, for every entry."""
        x = args[0]
        rest = pytree.tree_map(lambda v: v.value if isinstance(v, Stream) else v, args[1:])
        place, length = x.claim.place, x.claim.length

        def result(i: int) -> Value:
            if claim.gate == "frame":
                piece = x.claim.cut(x.value, i, 1)
                if fixes_time(n):  # the same entry as often as its kernel asks for
                    piece = piece.repeat_interleave(place.size, place.dim)
            else:
                first = max(0, i - length + 1)
                piece = x.claim.cut(x.value, first, min(length, x.count) if self.whole_windows else i + 1 - first)
            found = self._apply(n, (piece, *rest), kwargs)
            if n.target in NORMS:
                found = found.narrow(place.dim, found.shape[place.dim] - 1, 1)
            early = self.whole_windows and claim.gate == "window" and i < length - 1
            return pytree.tree_map(_unknown, found) if early else found

        results = list(map(result, range(x.count)))
        if isinstance(results[0], (tuple, list)):
            return tuple(self._joined(claim, parts) for parts in zip(*results, strict=True))
        return self._joined(claim, results)

    def _joined(self, claim: Claim, results: Sequence[Tensor]) -> Value:
        place = claim.place
        if place is None or not place.alone:
            return Entries(results, claim)
        return Stream(torch.cat(list(results), place.dim), claim)

    def _per_entry(self, n: Node, claim: Claim, args: Arguments, kwargs: Named) -> Value:
        """Computes what follows a gate, entry by entry, until it meets the stream again."""
        leaves = pytree.tree_leaves((args, kwargs))
        streams = [v for v in leaves if isinstance(v, Stream)]
        totals = [len(v.values) for v in leaves if isinstance(v, Entries)]
        place = streams[0].claim.place if streams and totals else None
        right = streams[0].value.dim() - place.dim if place is not None and place.alone and pointwise(n) else 0

        def operand(v: Value, i: int) -> Value:
            if isinstance(v, Stream):
                return v.claim.cut(v.value, i, 1)
            if not isinstance(v, Entries):
                return v
            x = v.values[i]  # expanded to the clip: any of the copies
            copies = place is not None and x.dim() >= right > 0 and x.shape[-right] == place.size
            return x.narrow(x.dim() - right, 0, 1) if copies else x

        def result(i: int) -> Value:
            return self._apply(n, *pytree.tree_map(lambda v: operand(v, i), (args, kwargs)))

        counts = [*totals, *(v.count for v in streams if v.claim.place is not None)]
        results = list(map(result, range(min(counts, default=1))))
        if isinstance(results[0], (tuple, list)):
            items = self._items(n)
            return tuple(self._joined(items.get(k, claim), v) for k, v in enumerate(zip(*results, strict=True)))
        return self._joined(claim, results) if streams or claim.one else Entries(results, claim)

    # --- sizes that were captured

    def _apply(self, n: Node, args: Arguments, kwargs: Named) -> Value:
        """Runs the operator on tensors. What was captured for T entries is said for as many as there are."""
        source = n.args[0][0] if isinstance(n.args[0], (list, tuple)) and n.args[0] else n.args[0]
        layout = self._claim(n).layout
        if self.boxes and n.target in SIZED and layout is not None:  # there may be any number of boxes
            args = (args[0], layout.sizes())
        before = claim_for(source, n, self.claims) if isinstance(source, Node) else NOTHING
        x = args[0]
        if n.target is aten.expand.default and before.place is None and isinstance(x, Tensor):
            sizes = [1] * (len(args[1]) - x.dim()) + list(x.shape)
            return x.expand([new if old == 1 else old for new, old in zip(args[1], sizes, strict=True)])
        if n.target in SCATTERS:
            return scatter(n, self._claim(n), args)
        if before.place is None or not isinstance(x, Tensor):
            return call(n, args, kwargs)
        clip, actual = before.place.size, before.entries(x)
        if clip == actual and n.target not in SIZED:
            return call(n, args, kwargs)
        return resized(Resize(n, before, self._claim(n), clip, actual), args, kwargs)


def _on_clip(n: Node, args: Arguments, kwargs: Named) -> Value:
    """Runs the operator on the first clip."""

    def cut(v: Value) -> Value:
        if not isinstance(v, Stream):
            return v
        return v.constant if v.constant is not None else v.span(0, v.claim.length)

    return call(n, *pytree.tree_map(cut, (args, kwargs)))


def _one_by_one(n: Node, args: Arguments) -> bool:
    """Says whether the dim along which entries are joined is another one to the operator: channels, or what it reduces.

    The clip has a single entry there, so that the operator never computes over several.
    """
    x = args[0]
    if not isinstance(x, Stream) or x.claim.place is None or (x.claim.place.size, x.claim.length) != (1, 1):
        return False
    return computes_over(n, args, x.claim.place.dim, x.value.dim())


def beside(n: Node, claim: Claim) -> bool:
    """Says whether it concatenates tensors over another dim than time."""
    if n.target is not aten.cat.default or claim.place is None:
        return False
    return (n.args[1] if len(n.args) > 1 else 0) % n.meta["val"].dim() != claim.place.dim


def _unknown(x: Tensor) -> Tensor:
    return torch.full_like(x, torch.nan) if x.is_floating_point() else x
