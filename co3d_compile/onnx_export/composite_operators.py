"""From ATen operators to several ONNX operators: attention, norms, statistics, resampling, rolls."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.fx import Node

from co3d_compile.ir.aten_operators import LINEAR, NEAREST, reduced
from co3d_compile.ir.node_reading import argument, norm_dims, operand, overloads, rank_of, shape_of
from co3d_compile.onnx_export.batch_dims import grown_dims
from co3d_compile.onnx_export.emitter import translates

if TYPE_CHECKING:
    import onnx_ir as ir

    from co3d_compile.onnx_export.emitter import Emitter

aten = torch.ops.aten


# --- attention


@translates(aten.scaled_dot_product_attention.default)
def _attention(e: Emitter, node: Node) -> ir.Value:
    q, k, v = (operand(node, i) for i in range(3))
    heads = shape_of(q)[-3] // shape_of(k)[-3] if argument(node, 7, "enable_gqa", False) else 1
    scale = argument(node, 6, "scale")
    query = e.op("Mul", e.value(q), e.scalar(shape_of(q)[-1] ** -0.5 if scale is None else scale, node))
    key, value = _heads(e, k, heads), _heads(e, v, heads)
    order = list(range(rank_of(k)))
    order[-2:] = order[:-3:-1]
    scores = e.op("MatMul", query, e.op("Transpose", key, perm=order))
    mask = argument(node, 3, "attn_mask")
    if isinstance(mask, Node):
        return _masked(e, scores, value, mask, node)
    if argument(node, 5, "is_causal", False):
        rows, columns = shape_of(q)[-2], shape_of(k)[-2]
        later = np.triu(np.full((rows, columns), -np.inf, e.dtype(node.meta["val"].dtype).numpy()), 1)
        scores = e.op("Add", scores, e.initializer(f"causal.{later.dtype}.{rows}x{columns}", later))
    return e.op("MatMul", e.op("Softmax", scores, axis=-1), value)


def _heads(e: Emitter, x: Node, times: int) -> ir.Value:
    """Each head of (…, heads, tokens, features) as often as there are queries to it."""
    if times == 1:
        return e.value(x)
    rank, (heads, tokens, features) = rank_of(x), shape_of(x)[-3:]
    again = e.op("Unsqueeze", e.value(x), e.ints([rank - 2]))
    again = e.op("Tile", again, e.ints([*[1] * (rank - 2), times, 1, 1]))
    return e.op("Reshape", again, e.ints([*[0] * (rank - 3), heads * times, tokens, features]))


def _masked(e: Emitter, scores: ir.Value, value: ir.Value, mask: Node, node: Node) -> ir.Value:
    """A boolean mask says what may be seen, another one is added. A row that may see nothing gives zero."""
    number = e.value(mask)
    if mask.meta["val"].dtype is torch.bool:
        scores = e.op("Where", number, scores, e.scalar(-math.inf, node))
    else:
        scores = e.op("Add", scores, e.cast(mask, node.meta["val"].dtype))
    weights = e.op("Softmax", scores, axis=-1)
    if mask.op != "get_attr" or _blind(e.program.constant(mask)):
        weights = e.op("Where", e.op("IsNaN", weights), e.scalar(0.0, node), weights)
    return e.op("MatMul", weights, value)


def _blind(mask: torch.Tensor) -> bool:
    """Whether a mask has a row that may see nothing."""
    hidden = ~mask if mask.dtype is torch.bool else mask == -math.inf
    return bool(hidden.all(-1).any())


# --- norms and statistics


@translates(aten.group_norm.default)
def _group_norm(e: Emitter, node: Node) -> ir.Value | None:
    x, groups = operand(node), int(argument(node, 1, "num_groups"))
    if any(d for d in grown_dims(x, e.larger)):
        return None
    rows = e.op("Reshape", e.value(x), e.ints([0, groups, -1]))
    one, zero = e.filled([groups], 1.0, node), e.filled([groups], 0.0, node)
    eps = float(argument(node, 4, "eps", 1e-5))
    normal = e.op(
        "Reshape", e.op("InstanceNormalization", rows, one, zero, epsilon=eps), e.ints([-1, *shape_of(x)[1:]])
    )
    return _affine(e, normal, rank_of(x) - 2, argument(node, 2, "weight"), argument(node, 3, "bias"))


def _affine(e: Emitter, x: ir.Value, space: int, weight: Any, bias: Any) -> ir.Value:
    """A weight and a bias per channel."""
    for operator, vector in (("Mul", weight), ("Add", bias)):
        if isinstance(vector, Node):
            x = e.op(operator, x, e.op("Reshape", e.value(vector), e.ints([-1, *[1] * space])))
    return x


@translates(aten.instance_norm.default)
def _instance_norm(e: Emitter, node: Node) -> ir.Value | None:
    x = operand(node)
    if not argument(node, 5, "use_input_stats") or any(d for d in grown_dims(x, e.larger)):
        return None
    channels = shape_of(x)[1]
    vectors = [
        e.value(v) if isinstance(v := argument(node, i, name), Node) else e.filled([channels], number, node)
        for i, name, number in ((1, "weight", 1.0), (2, "bias", 0.0))
    ]
    return e.op("InstanceNormalization", e.value(x), *vectors, epsilon=float(argument(node, 7, "eps", 1e-5)))


@translates(aten.var.correction, aten.std.correction)
def _variance(e: Emitter, node: Node) -> ir.Value | None:
    x, dims, keep = reduced(node)
    if set(dims) & set(grown_dims(x, e.larger)):
        return None
    count = math.prod(shape_of(x)[d] for d in dims)
    correction = argument(node, 2, "correction", 1)
    free = count - float(1 if correction is None else correction)
    if free <= 0:
        return None
    off = e.op("Sub", e.value(x), e.op("ReduceMean", e.value(x), e.ints(dims), keepdims=1))
    total = e.op("ReduceSum", e.op("Mul", off, off), e.ints(dims), keepdims=int(keep))
    variance = e.op("Mul", total, e.scalar(1 / free, node))
    return e.op("Sqrt", variance) if "std" in str(node.target) else variance


@translates(aten.linalg_vector_norm.default)
def _norm(e: Emitter, node: Node) -> ir.Value | None:
    name = {1: "ReduceL1", 2: "ReduceL2"}.get(argument(node, 1, "ord", 2))
    x = operand(node)
    dims = norm_dims(argument(node, 2, "dim"), rank_of(x))
    if name is None or node.meta["val"].dtype != x.meta["val"].dtype:
        return None
    return e.op(name, e.value(x), e.ints(dims), keepdims=int(bool(argument(node, 3, "keepdim", False))))


@translates(aten.any.dim, aten.any.dims, aten.all.dim)
def _any(e: Emitter, node: Node) -> ir.Value:
    x, dims, keep = reduced(node)
    flags = e.op("Cast", e.cast(x, torch.bool), to=int(e.dtype(torch.int32)))
    found = e.op("ReduceMax" if "any" in str(node.target) else "ReduceMin", flags, e.ints(dims), keepdims=int(keep))
    return e.op("Cast", found, to=int(e.dtype(torch.bool)))


@translates(aten.argmax.default, aten.argmin.default)
def _arg(e: Emitter, node: Node) -> ir.Value | None:
    dim = argument(node, 1, "dim")
    if dim is None:
        return None
    keep = int(bool(argument(node, 2, "keepdim", False)))
    return e.op("ArgMax" if "argmax" in str(node.target) else "ArgMin", e.value(operand(node)), axis=dim, keepdims=keep)


@translates(aten.cumsum.default)
def _cumsum(e: Emitter, node: Node) -> ir.Value:
    return e.op("CumSum", e.cast(operand(node), node.meta["val"].dtype), e.int_scalar(node.args[1]))


@translates(aten.topk.default, aten.sort.default, aten.sort.stable, aten.median.dim, aten.kthvalue.default)
def _sorted(e: Emitter, node: Node) -> list[ir.Value] | None:
    """Values and indices in order; the median is the lower one of two in the middle."""
    x, name = operand(node), str(node.target).split(".")[1]
    at = {"topk": 2, "sort": 2 if "stable" in str(node.target) else 1, "median": 1, "kthvalue": 2}[name]
    dim = argument(node, at, "dim", -1) % rank_of(x)
    size = shape_of(x)[dim]
    if name in ("topk", "sort"):
        count = int(argument(node, 1, "k")) if name == "topk" else size
        largest = bool(argument(node, at + 1, "largest" if name == "topk" else "descending", name == "topk"))
        first = e.op("TopK", e.value(x), e.ints([count]), outputs=2, axis=dim, largest=int(largest))
        return e.outputs_of(first)
    last = (size + 1) // 2 if name == "median" else int(argument(node, 1, "k"))
    keep = bool(argument(node, at + 1, "keepdim", False))
    first = e.op("TopK", e.value(x), e.ints([last]), outputs=2, axis=dim, largest=0)
    index = e.ints([last - 1]) if keep else e.int_scalar(last - 1)
    return [e.op("Gather", value, index, axis=dim) for value in e.outputs_of(first)]


@translates(aten.cummax.default, aten.cummin.default, aten.cumprod.default)
def _running(e: Emitter, node: Node) -> list[ir.Value] | ir.Value | None:
    """The largest, least or product of all up to each, by doubling: the last 2, 4, 8, … of them."""
    x, name = operand(node), str(node.target).split(".")[1]
    several = name != "cumprod"
    if several and any(u.args[1] != 0 for u in node.users):
        return None
    dim = int(node.args[1]) % rank_of(x)  # type: ignore[arg-type]
    value, size, step = e.cast(x, (node.meta["val"][0] if several else node.meta["val"]).dtype), shape_of(x)[dim], 1
    while step < size:
        first, rest, before = (
            e.op("Slice", value, e.ints([a]), e.ints([b]), e.ints([dim]))
            for a, b in ((0, step), (step, size), (0, size - step))
        )
        joined = e.op({"cummax": "Max", "cummin": "Min", "cumprod": "Mul"}[name], rest, before)
        value, step = e.op("Concat", first, joined, axis=dim), 2 * step
    return [value, value] if several else value


# --- moving entries about


@translates(aten.roll.default)
def _roll(e: Emitter, node: Node) -> ir.Value | None:
    x, dims = operand(node), list(argument(node, 2, "dims", []))
    shifts: list[int] = list(node.args[1])  # type: ignore[arg-type]
    if not dims or {d % rank_of(x) for d in dims} & set(grown_dims(x, e.larger)):
        return None
    value = e.value(x)
    for dim, shift in zip(dims, shifts, strict=True):
        axis = dim % rank_of(x)
        at = -shift % shape_of(x)[axis]
        if at:
            ends = [(at, 2**62), (0, at)]
            parts = [e.op("Slice", value, e.ints([a]), e.ints([b]), e.ints([axis])) for a, b in ends]
            value = e.op("Concat", *parts, axis=axis)
    return value


@translates(aten.flip.default)
def _flip(e: Emitter, node: Node) -> ir.Value:
    x = operand(node)
    dims = norm_dims(argument(node, 1, "dims"), rank_of(x))
    ends = [e.ints([number] * len(dims)) for number in (-1, -(2**62))]
    return e.op("Slice", e.value(x), *ends, e.ints(dims), e.ints([-1] * len(dims)))


@translates(aten.glu.default)
def _glu(e: Emitter, node: Node) -> ir.Value:
    x = operand(node)
    axis = argument(node, 1, "dim", -1) % rank_of(x)
    half = shape_of(x)[axis] // 2
    a, b = (e.op("Slice", e.value(x), e.ints([i]), e.ints([i + half]), e.ints([axis])) for i in (0, half))
    return e.op("Mul", a, e.op("Sigmoid", b))


@translates(aten.pixel_shuffle.default)
def _pixel_shuffle(e: Emitter, node: Node) -> ir.Value | None:
    if rank_of(node) != 4:
        return None
    return e.op("DepthToSpace", e.value(operand(node)), blocksize=node.args[1], mode="CRD")


@translates(aten.gather.default)
def _gather(e: Emitter, node: Node) -> ir.Value:
    x, dim, index = node.args[:3]
    return e.op("GatherElements", e.value(x), e.value(index), axis=dim)


@translates(
    *(o for packet in (*NEAREST, *LINEAR, aten.upsample_bicubic2d) for o in overloads(packet) if "vec" in str(o))
)
def _resize(e: Emitter, node: Node) -> ir.Value | None:
    """As PyTorch has it: by the factor that the model gives, or by the ratio of the sizes."""
    x, name = operand(node), str(node.target)
    nearest = "nearest" in name
    if set(grown_dims(x, e.larger)) - {0}:
        return None
    factors = argument(node, 2 if nearest else 3, "scale_factors")
    old, new = shape_of(x)[2:], shape_of(node)[2:]
    if factors is None and all(b % a == 0 for a, b in zip(old, new, strict=True)):
        factors = [b // a for a, b in zip(old, new, strict=True)]
    corners = not nearest and bool(node.args[2])
    how: dict[str, Any] = {
        "mode": "nearest" if nearest else "cubic" if "cubic" in name else "linear",
        "coordinate_transformation_mode": "asymmetric" if nearest else "align_corners" if corners else "half_pixel",
        "nearest_mode": "floor",
        "cubic_coeff_a": -0.75,
    }
    if factors is not None:
        array = np.array([1, 1, *factors], dtype=np.float32)
        scales = e.initializer("scales." + "_".join(map(str, array.tolist())), array)
        return e.op("Resize", e.value(x), None, scales, **how)
    outer = e.op("Shape", e.value(x), start=0, end=2)
    return e.op("Resize", e.value(x), None, None, e.op("Concat", outer, e.ints(new), axis=0), **how)
