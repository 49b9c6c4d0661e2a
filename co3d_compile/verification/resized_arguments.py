"""Sizes that a captured graph has for clips of T entries, changed to as many entries as there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from co3d_compile.ir.aten_operators import SIZED
from co3d_compile.ir.layout import TIME
from co3d_compile.ir.node_reading import index_of, operand_list, operator_name
from co3d_compile.ir.time_facts import Kind
from co3d_compile.verification.double_kernels import conv3d
from co3d_compile.verification.time_claims import Arguments, Claim, Named, NoReference, Value

aten = torch.ops.aten

COPIES = {aten.expand.default, aten.repeat.default}
SPLIT = aten.split_with_sizes.default
BY_INDEX = {  # as far as indices go
    aten.gather.default,
    *(getattr(aten.scatter, name) for name in ("src", "value", "reduce", "value_reduce")),
    aten.scatter_add.default,
    aten.scatter_reduce.two,
}
LOOKUPS = {aten.embedding.default, aten.index.Tensor}
PLACING = {  # they say where entries are, and compute nothing over them
    SPLIT,
    *BY_INDEX,
    aten.slice.Tensor,
    aten.select.int,
    aten.cat.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.index_select.default,
}
NOT_NAMED = object()
SCATTERS = {aten.slice_scatter.default, aten.select_scatter.default}


@dataclass(frozen=True)
class Resize:
    """An operator captured for ``clip`` entries of its operand, and how many there are."""

    node: Node
    before: Claim
    after: Claim
    clip: int
    actual: int

    @property
    def dim(self) -> int:
        """The dim of the operand that is time alone, or -1."""
        place = self.before.place
        return place.dim if place is not None and place.alone else -1

    @property
    def outer(self) -> int:
        """The dim of the operand along which entry follows entry, each of one place or of several; or -1."""
        place = self.before.place
        return place.dim if place is not None and place.outer == 1 else -1

    @property
    def again(self) -> bool:
        """Whether what a gate pooled is given to every entry again."""
        after = self.after.layout
        streams = self.before.kind is Kind.STREAM and self.after.kind is Kind.STREAM
        streams = streams and self.before.rate == self.after.rate  # else it is up-sampled: more entries, not the same
        return streams and self.clip == 1 and after is not None and after.time is not None and after.time.size > 1


def reads_by_index(n: Node) -> bool:
    """Says whether an operator has an index for each entry, so that its captured constants may be those of one clip."""
    if n.target is aten.index.Tensor:
        return sum(index is not None for index in index_of(n)) > 1
    return n.target in BY_INDEX


def call(n: Node, args: Arguments, kwargs: Named | None = None) -> Value:
    """Runs the operator of a node on other arguments."""
    assert callable(n.target)
    if n.target in BY_INDEX:
        return _by_index(n.target, *args, **(kwargs or {}))
    if n.target is aten.conv3d.default:
        return conv3d(*args, **(kwargs or {}))
    if n.target in LOOKUPS:
        return _looked_up(n.target, *args, **(kwargs or {}))
    return n.target(*args, **(kwargs or {}))


def _by_index(
    target: Callable[..., Tensor], x: Tensor, dim: int, index: Tensor, *rest: Value, **named: Value
) -> Tensor:
    """Reads or writes at indices. What is computed from frames that are not known (NaN) is no index of any entry."""
    outside = (index < 0) | (index >= x.shape[dim])
    result = target(x, dim, index.masked_fill(outside, 0), *rest, **named)
    if not bool(outside.any()) or not result.is_floating_point():
        return result
    unknown = outside if target is aten.gather.default else outside.any(dim, keepdim=True)
    fits = all(a in (1, b) for a, b in zip(unknown.shape, result.shape, strict=True))
    return result.masked_fill(unknown, torch.nan) if fits else result


def _looked_up(target: Callable[..., Tensor], x: Tensor, index: Value, *rest: Value, **named: Value) -> Tensor:
    """Reads rows of a table, at one or several indices of dims that lie side by side, in the same way."""
    several = list(index) if isinstance(index, (list, tuple)) else [index]
    dims = [d for d, i in enumerate(several) if i is not None]
    if any(several[d].dtype == torch.bool for d in dims) or dims != list(range(dims[0], dims[0] + len(dims))):
        return target(x, index, *rest, **named)
    outside = [(several[d] < -x.shape[d]) | (several[d] >= x.shape[d]) for d in dims]
    unknown = torch.stack(torch.broadcast_tensors(*outside)).any(0)
    for d, out in zip(dims, outside, strict=True):
        several[d] = several[d].masked_fill(out, 0)
    result = target(x, several if isinstance(index, (list, tuple)) else several[0], *rest, **named)
    if not bool(unknown.any()) or not result.is_floating_point():
        return result
    behind = result.dim() - dims[0] - unknown.dim()
    return result.masked_fill(unknown.reshape(*[1] * dims[0], *unknown.shape, *[1] * behind), torch.nan)


def resized(r: Resize, args: Arguments, kwargs: Named) -> Value:
    """Runs the operator with the sizes among its arguments changed."""
    target, name = r.node.target, str(r.node.target)
    x, *rest = args
    if r.again and (target in COPIES or "upsample" in name):
        assert r.after.layout is not None
        return x.expand(list(r.after.layout.resize(TIME, r.actual).shape))
    ends = target is aten.expand.default and r.after.layout is None and len(rest[0]) == x.dim()
    if ends and r.clip == 1 and r.dim >= 0:
        return x.expand([-1 if d == r.dim else s for d, s in enumerate(rest[0])])  # `filled` takes as many as it needs
    if target in SIZED:
        return _view(r, x, rest[0])
    if target is aten.slice.Tensor and (rest[0] if rest else 0) % x.dim() == r.outer:
        return _slice(r, x, *rest[1:])
    if target is aten.select.int and rest[0] % x.dim() == r.dim:
        return x.select(r.dim, _entry(r, rest[1]))
    if target is SPLIT and (rest[1] if len(rest) > 1 else kwargs.get("dim", 0)) % x.dim() == r.outer:
        return _split(r, x)
    if target in (aten.index.Tensor, aten.index_select.default):
        return _gather(r, x, rest)
    if "upsample" in name and rest[0] is not None and r.dim >= 2:
        sizes = list(rest[0])
        sizes[r.dim - 2] = sizes[r.dim - 2] * r.actual // r.clip
        return call(r.node, (x, sizes, *rest[1:]), kwargs)
    before, after = r.before.place, r.after.place
    if target is aten.col2im.default and before is not None and after is not None and before.dim == x.dim() - 1:
        sizes, along = list(rest[0]), after.dim - x.dim() + 1
        sizes[along] += (r.actual - r.clip) * rest[4][along]
        return call(r.node, (x, sizes, *rest[1:]), kwargs)
    if "_pool" in name:
        return call(r.node, (x, *_pool(r, x, name, rest)), kwargs)
    return call(r.node, args, kwargs)


def for_rows(n: Node, args: Arguments) -> Arguments:
    """Writes the arguments of a recurrent layer, with a state for each row that its input has."""
    x, hidden, *rest = args
    rows = x.shape[0 if n.args[8] else 1]

    def grown(state: Tensor) -> Tensor:
        return _grown(state, 1, rows - state.shape[1]) if state.shape[1] < rows else state

    return (x, grown(hidden) if isinstance(hidden, Tensor) else [grown(h) for h in hidden], *rest)


def _view(r: Resize, x: Tensor, sizes: Sequence[int]) -> Tensor:
    after = r.after.layout
    if r.clip != r.actual and after is not None and after.time is not None and after.time.size == r.clip:
        sizes = after.resize(TIME, r.actual).shape
    return x.expand(list(sizes)) if r.node.target is aten.expand.default else x.reshape(list(sizes))


def _entry(r: Resize, index: int) -> int:
    """Finds the index of a selection: from the front, but the newest is the newest."""
    index %= r.clip
    return r.actual - 1 if index == r.clip - 1 else index


def _slice(r: Resize, x: Tensor, start: int | None = None, end: int | None = None, step: int = 1) -> Tensor:
    each = r.before.places
    start, stop, _ = slice(start, end).indices(r.clip * each)
    behind = r.clip * each - max(start, stop)
    return aten.slice.Tensor(x, r.outer, start, r.actual * each - behind, step)


def _split(r: Resize, x: Tensor) -> tuple[Tensor, ...]:
    ends = list(accumulate((value.shape[r.outer] for value in r.node.meta["val"]), initial=0))
    return tuple(_slice(r, x, start, end) for start, end in pairwise(ends))


def _gather(r: Resize, x: Tensor, rest: Arguments) -> Tensor:
    """Takes evenly spaced indices as a slice. What stands at its ends is counted from the clip's, such as copies."""
    if r.node.target is aten.index_select.default:
        dim, index = rest[0] % x.dim(), rest[1]
    else:
        dim, index = next((d, i) for d, i in enumerate(rest[0]) if i is not None)
    clip = r.clip * r.before.places
    values = [v + clip if v < 0 else v for v in index.flatten().tolist()]
    first, stop = _longest_run(values)
    front, back = values[:first], [v - clip + x.shape[r.dim] for v in values[stop:]]
    whole = values[first:stop] == list(range(clip))  # what is mirrored at its ends may be longer than the clip
    if dim != r.dim or index.dim() != 1 or not (whole or stop - first > len(front) + len(back)):
        return call(r.node, (x, *rest))
    step = values[first + 1] - values[first] if stop - first > 1 else 1
    main = _slice(r, x, values[first], values[stop - 1] + 1, step)
    ends = [x.index_select(dim, torch.tensor(some, dtype=torch.int64)) for some in (front, back)]
    return torch.cat([ends[0], main, ends[1]], dim) if front or back else main


def _longest_run(values: Sequence[int]) -> tuple[int, int]:
    """Finds the first index, and the one behind the last, of the longest part of some indices that rise evenly."""
    best, first = (0, min(1, len(values))), 0
    for stop in range(2, len(values) + 1):
        step = values[stop - 1] - values[stop - 2]
        if step < 1:
            first = stop - 1
        elif stop - first > 2 and step != values[stop - 2] - values[stop - 3]:
            first = stop - 2
        best = max(best, (first, stop), key=lambda part: part[1] - part[0])
    return best


def _pool(r: Resize, x: Tensor, name: str, rest: Arguments) -> list[Value]:
    """Makes a kernel over the whole clip one over the whole window. An adaptive pool that keeps time keeps it."""
    n = int(name.split("pool")[1][0])
    axis = r.dim - (x.dim() - n)
    sizes = [rest[0]] * n if isinstance(rest[0], int) else list(rest[0]) * (n if len(rest[0]) == 1 else 1)
    sliding = r.after.kind is Kind.STREAM and r.after.gate is None
    adaptive = "adaptive" in name
    if axis >= 0 and sizes[axis] == r.clip and adaptive != (not sliding):
        sizes[axis] = r.actual
    return [sizes, *rest[1:]] if adaptive or sliding or len(rest) < 2 else [sizes, _spread(rest[1], n), *rest[2:]]


def _spread(value: Value, n: int) -> Value:
    return [value] * n if isinstance(value, int) else value


def scatter(n: Node, claim: Claim, args: Arguments) -> Tensor:
    """Writes a slice or an entry into a tensor. A constant among them grows with the other."""
    base, new = args[:2]
    place = claim.place
    dim, rest = args[2] % base.dim() if len(args) > 2 else 0, args[3:]
    selects = n.target is aten.select_scatter.default
    old_base, old_new = (a.meta["val"].shape for a in n.args[:2] if isinstance(a, Node))
    if place is not None:
        time = place.dim if place.alone else None
    else:  # a write into a slice that is written back: the dim that is longer than in the clip
        behind = [d + (selects and d >= dim) for d in range(new.dim()) if new.shape[d] != old_new[d]]
        time = next(iter([d for d in range(base.dim()) if base.shape[d] != old_base[d]] + behind), None)
    if time is None:
        return call(n, args)
    if selects and dim == time:  # one entry, which has no time: the clip's last one is the last of the long clip
        last = rest[0] % old_base[dim] == old_base[dim] - 1
        return call(n, (base, new, dim, -1 if last else rest[0]))
    there = time - (1 if selects and dim < time else 0)
    more = base.shape[time] - old_base[time], new.shape[there] - old_new[there]
    if dim == time and len(rest) > 2 and rest[2] > 1:  # every so many-th entry
        base = _grown(base, time, more[1] * rest[2] - more[0]) if more[0] < more[1] * rest[2] else base
        return call(n, (base, new, dim, rest[0], None, rest[2]))
    if not selects and dim == time and min(more) > 0:
        new = _filling(new, dim, slice(*rest[:2]).indices(old_base[dim])[:2], old_base[dim], old_new[dim])
        more = more[0], new.shape[dim] - old_new[dim]
    if more[0] < more[1]:
        base = _grown(base, time, more[1])
    elif dim != time and more[1] < more[0]:
        new = _grown(new, there, more[0])
    if not selects and dim == time:
        start, stop, _ = slice(*rest[:2]).indices(old_base[dim])
        if more[1] == 0 and stop == old_base[dim]:
            start += more[0]
        rest = (start, start + new.shape[dim], *rest[2:])
    return call(n, (base, new, dim, *rest))


def _filling(new: Tensor, dim: int, place: tuple[int, int], base: int, size: int) -> Tensor:
    """Takes as many entries as in the clip of what is written over an edge of a longer tensor, as a pad is."""
    start, stop = place
    if 2 * size >= base or (start > 0 and stop < base):
        return new
    return new.narrow(dim, 0 if start == 0 else new.shape[dim] - size, size)


def _grown(x: Tensor, dim: int, by: int) -> Tensor:
    """Gives a constant that is the same at every entry more of them."""
    one = x.narrow(dim, 0, 1)
    if not bool((x == one).all()):
        raise NoReference("a constant differs over time")
    return torch.cat([x, one.expand([by if d == dim else s for d, s in enumerate(x.shape)])], dim)


def filled(n: Node, parts: list[Tensor], dim: int) -> list[Tensor]:
    """Finds what stands before and behind the longest part of a concatenation along time.

    As many entries as in the clip.
    """
    sizes: list[int] = [p.meta["val"].shape[dim] for p in operand_list(n)]
    longest = sizes.index(max(sizes))

    def cut(i: int, part: Tensor, size: int) -> Tensor:
        begin = 0 if i < longest else part.shape[dim] - size
        return part if i == longest or part.shape[dim] <= size else part.narrow(dim, begin, size)

    return [cut(i, part, size) for i, (part, size) in enumerate(zip(parts, sizes, strict=True))]


def as_many(v: Tensor, dim: int, clip: int, entries: int) -> Tensor:
    """Repeats a constant that is the same for all frames, folded into another dim, for all that there are."""
    if dim < 0 or v.shape[dim] != clip or clip == entries or not bool((v == v.narrow(dim, 0, 1)).all()):
        return v
    return v.narrow(dim, 0, 1).repeat_interleave(entries, dim)


def banded(mask: Tensor, entries: int) -> Tensor:
    """Grows a mask that depends on the distance of two entries alone."""
    if mask.shape[-2:] == (entries, entries):
        return mask
    if not torch.equal(mask[..., 1:, 1:], mask[..., :-1, :-1]):
        raise NoReference("a mask differs over time")
    line = torch.cat([mask[..., 0, :].flip(-1), mask[..., 1:, 0]], -1)  # from all later ones to all earlier ones
    newest = mask.shape[-1] - 1
    index = torch.arange(entries)
    return line[..., (index[:, None] - index[None, :]).clamp(-newest, newest) + newest]


def computes_over(n: Node, args: Arguments, dim: int, rank: int) -> bool:
    """Says whether an operator computes over a dim, as over channels or what it reduces."""
    name = operator_name(n.target).removeprefix("aten.")
    if name in ("group_norm", "instance_norm"):
        return dim >= 2
    if name == "layer_norm":
        return dim >= rank - len(args[1])
    if name == "scaled_dot_product_attention":
        return dim == rank - 2
    if n.target not in PLACING and (dims := _dims_named(n, args)) is not NOT_NAMED:
        every = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        return dim in {d % rank for d in every}
    return dim == {"conv1d": 1, "conv2d": 1, "conv3d": 1, "linear": rank - 1}.get(name)


def _dims_named(n: Node, args: Arguments) -> Value:
    """Reads the dims that an operator is called with; ``NOT_NAMED`` if its schema has none."""
    if not isinstance(n.target, OpOverload):
        return NOT_NAMED
    for i, argument in enumerate(n.target._schema.arguments):
        if argument.name in ("dim", "dims"):
            return args[i] if i < len(args) else n.kwargs.get(argument.name, argument.default_value)
    return NOT_NAMED


def fixes_time(n: Node) -> bool:
    """Says whether a gate's arguments say how long the clip is."""
    name = str(n.target)
    return ("_pool" in name and "adaptive" not in name) or n.target is aten.layer_norm.default


def pointwise(n: Node) -> bool:
    return torch.Tag.pointwise in getattr(n.target, "tags", ())
