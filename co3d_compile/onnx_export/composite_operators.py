"""From ATen operators to several ONNX operators: attention, norms, statistics, resampling, rolls."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import torch
from torch.fx import Node
from torch.fx.node import Target

from co3d_compile.ir.aten_operators import LINEAR, NEAREST, reduced
from co3d_compile.ir.node_reading import operand, overloads, rank_of, shape_of, whole
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.onnx_export.batch_dims import grown_dims
from co3d_compile.onnx_export.emitter import DTYPES, Attribute, Emitted, Emitter, translates

aten = torch.ops.aten


# --- attention


@translates(aten.scaled_dot_product_attention.default)
def _attention(e: Emitter, node: Node) -> ir.Value:
    given = Arguments(node)
    q, k = given.tensor("query"), given.tensor("key")
    heads = shape_of(q)[-3] // shape_of(k)[-3] if given.integer("enable_gqa") else 1
    scale = shape_of(q)[-1] ** -0.5 if given.given("scale") is None else given.number("scale")
    query = e.op("Mul", q, e.scalar(scale, node))
    key, value = _heads(e, k, heads), _heads(e, given.tensor("value"), heads)
    order = list(range(rank_of(k)))
    order[-2:] = order[:-3:-1]
    scores = e.op("MatMul", query, e.op("Transpose", key, perm=order))
    mask = given.optional("attn_mask")
    if mask is not None:
        return _masked(e, scores, value, mask, node)
    if given.integer("is_causal"):
        rows, columns = shape_of(q)[-2], shape_of(k)[-2]
        later = np.triu(np.full((rows, columns), -np.inf, DTYPES[node.meta["val"].dtype].numpy()), 1)
        scores = e.op("Add", scores, e.initializer(f"causal.{later.dtype}.{rows}x{columns}", later))
    return e.op("MatMul", e.op("Softmax", scores, axis=-1), value)


def _heads(e: Emitter, x: Node, times: int) -> ir.Value:
    """Repeats each head of (…, heads, tokens, features) as often as there are queries to it."""
    if times == 1:
        return e.value(x)
    *outer, heads, tokens, features = shape_of(x)
    again = e.op("Unsqueeze", x, [len(outer) + 1])
    again = e.op("Tile", again, [*[1] * (len(outer) + 1), times, 1, 1])
    return e.op("Reshape", again, [*[0] * len(outer), heads * times, tokens, features])


def _masked(e: Emitter, scores: ir.Value, value: ir.Value, mask: Node, node: Node) -> ir.Value:
    """Takes a boolean mask for what may be seen, and adds another one. A row that may see nothing gives zero."""
    if mask.meta["val"].dtype is torch.bool:
        scores = e.op("Where", mask, scores, e.scalar(-math.inf, node))
    else:
        scores = e.op("Add", scores, e.typed(mask, node.meta["val"].dtype))
    weights = e.op("Softmax", scores, axis=-1)
    if mask.op != "get_attr" or _blind(e.program.constant(mask)):
        weights = e.op("Where", e.op("IsNaN", weights), e.scalar(0.0, node), weights)
    return e.op("MatMul", weights, value)


def _blind(mask: torch.Tensor) -> bool:
    """Says whether a mask has a row that may see nothing."""
    hidden = ~mask if mask.dtype is torch.bool else mask == -math.inf
    return bool(hidden.all(-1).any())


# --- determinants


@translates(aten._linalg_det.default)
def _determinant(e: Emitter, node: Node) -> list[ir.Value]:
    """Computes the determinant; what PyTorch keeps for gradients is read by nobody."""
    return [e.op("Det", Arguments(node).tensor("A"))]


@translates(aten._linalg_slogdet.default)
def _log_determinant(e: Emitter, node: Node) -> list[ir.Value]:
    determinant = e.op("Det", Arguments(node).tensor("A"))
    return [e.op("Sign", determinant), e.op("Log", e.op("Abs", determinant))]


# --- norms and statistics


@translates(aten.group_norm.default)
def _group_norm(e: Emitter, node: Node) -> ir.Value | None:
    given = Arguments(node)
    x, groups = given.tensor("input"), given.integer("num_groups")
    if set(grown_dims(x, e.larger)) - {0}:
        return None
    rows, one, zero = e.op("Reshape", x, [0, groups, -1]), e.filled([groups], 1.0, node), e.filled([groups], 0.0, node)
    normal = e.op("InstanceNormalization", rows, one, zero, epsilon=given.number("eps"))
    normal = e.op("Reshape", normal, [-1, *shape_of(x)[1:]])
    for operator, name in (("Mul", "weight"), ("Add", "bias")):
        vector = given.optional(name)
        if vector is not None:
            normal = e.op(operator, normal, e.op("Reshape", vector, [-1, *[1] * (rank_of(x) - 2)]))
    return normal


@translates(aten.instance_norm.default)
def _instance_norm(e: Emitter, node: Node) -> ir.Value | None:
    given = Arguments(node)
    x = given.tensor("input")
    if not given.integer("use_input_stats") or set(grown_dims(x, e.larger)) - {0}:
        return None
    channels = [shape_of(x)[1]]
    weight = given.optional("weight") or e.filled(channels, 1.0, node)
    bias = given.optional("bias") or e.filled(channels, 0.0, node)
    return e.op("InstanceNormalization", x, weight, bias, epsilon=given.number("eps"))


@translates(aten.var.correction, aten.std.correction)
def _variance(e: Emitter, node: Node) -> ir.Value | None:
    (x, dims, keep), given = reduced(node), Arguments(node)
    if set(dims) & set(grown_dims(x, e.larger)):
        return None
    correction = 1.0 if given.given("correction") is None else given.number("correction")
    free = math.prod(shape_of(x)[d] for d in dims) - float(correction)
    if free <= 0:
        return None
    off = e.op("Sub", x, e.op("ReduceMean", x, dims, keepdims=1))
    total = e.op("ReduceSum", e.op("Mul", off, off), dims, keepdims=int(keep))
    variance = e.op("Mul", total, e.scalar(1 / free, node))
    return e.op("Sqrt", variance) if node.target is aten.std.correction else variance


@translates(aten.linalg_vector_norm.default)
def _norm(e: Emitter, node: Node) -> ir.Value | None:
    given, x = Arguments(node), operand(node)
    name = {1.0: "ReduceL1", 2.0: "ReduceL2"}.get(given.number("ord"))
    if name is None or node.meta["val"].dtype != x.meta["val"].dtype:
        return None
    return e.op(name, x, given.dims(x), keepdims=given.integer("keepdim"))


@translates(aten.any.dim, aten.any.dims, aten.all.dim)
def _any(e: Emitter, node: Node) -> ir.Value:
    x, dims, keep = reduced(node)
    flags = e.op("Cast", e.typed(x, torch.bool), to=int(DTYPES[torch.int32]))
    found = e.op("ReduceMin" if node.target is aten.all.dim else "ReduceMax", flags, dims, keepdims=int(keep))
    return e.op("Cast", found, to=int(DTYPES[torch.bool]))


@translates(aten.argmax.default, aten.argmin.default)
def _arg(e: Emitter, node: Node) -> ir.Value | None:
    given = Arguments(node)
    if given.given("dim") is None:
        return None
    name = "ArgMax" if node.target is aten.argmax.default else "ArgMin"
    return e.op(name, operand(node), axis=given.integer("dim"), keepdims=given.integer("keepdim"))


@translates(aten.cumsum.default)
def _cumsum(e: Emitter, node: Node) -> ir.Value:
    x = e.typed(operand(node), node.meta["val"].dtype)
    return e.op("CumSum", x, e.int_scalar(Arguments(node).integer("dim")))


@translates(aten.topk.default, aten.sort.default, aten.sort.stable)
def _sorted(e: Emitter, node: Node) -> list[ir.Value]:
    """Puts the values and indices in order."""
    given, x = Arguments(node), operand(node)
    dim, topk = given.dim(x), node.target is aten.topk.default
    count = given.integer("k") if topk else shape_of(x)[dim]
    return e.outputs(2, "TopK", x, [count], axis=dim, largest=given.integer("largest" if topk else "descending"))


@translates(aten.median.dim, aten.kthvalue.default)
def _ranked(e: Emitter, node: Node) -> list[ir.Value]:
    """Takes the value of one rank and its index; the median is the lower one of two in the middle."""
    given, x = Arguments(node), operand(node)
    dim = given.dim(x)
    last = (shape_of(x)[dim] + 1) // 2 if node.target is aten.median.dim else given.integer("k")
    index = e.ints([last - 1]) if given.integer("keepdim") else e.int_scalar(last - 1)
    return [e.op("Gather", v, index, axis=dim) for v in e.outputs(2, "TopK", x, [last], axis=dim, largest=0)]


RUNNING: dict[Target, str] = {
    aten.cummax.default: "Max",
    aten.cummin.default: "Min",
    aten.cumprod.default: "Mul",
}


@translates(*RUNNING)
def _running(e: Emitter, node: Node) -> Emitted | None:
    """Takes the largest, least or product of all up to each, by doubling: of the last 2, 4, 8, … of them."""
    x, several = operand(node), node.target is not aten.cumprod.default
    if several and any(u.args[1] != 0 for u in node.users):
        return None
    dim, size, step = Arguments(node).dim(x), shape_of(x)[Arguments(node).dim(x)], 1
    value = e.typed(x, (node.meta["val"][0] if several else node.meta["val"]).dtype)
    while step < size:
        first, rest, before = (
            e.op("Slice", value, [a], [b], [dim]) for a, b in ((0, step), (step, size), (0, size - step))
        )
        value, step = e.op("Concat", first, e.op(RUNNING[node.target], rest, before), axis=dim), 2 * step
    return [value, value] if several else value


# --- moving entries about


@translates(aten.roll.default)
def _roll(e: Emitter, node: Node) -> ir.Value | None:
    given, x = Arguments(node), operand(node)
    if not given.given("dims") or set(given.dims(x, "dims")) & set(grown_dims(x, e.larger)):
        return None
    value = e.value(x)
    for axis, shift in zip(given.dims(x, "dims"), given.integers("shifts"), strict=True):
        at = -shift % shape_of(x)[axis]
        if at:
            parts = [e.op("Slice", value, [a], [b], [axis]) for a, b in ((at, 2**62), (0, at))]
            value = e.op("Concat", *parts, axis=axis)
    return value


@translates(aten.flip.default)
def _flip(e: Emitter, node: Node) -> ir.Value:
    x = operand(node)
    dims = Arguments(node).dims(x, "dims")
    starts, ends, steps = ([number] * len(dims) for number in (-1, -(2**62), -1))
    return e.op("Slice", x, starts, ends, dims, steps)


@translates(aten.glu.default)
def _glu(e: Emitter, node: Node) -> ir.Value:
    x = operand(node)
    axis = Arguments(node).dim(x)
    half = shape_of(x)[axis] // 2
    a, b = (e.op("Slice", x, [i], [i + half], [axis]) for i in (0, half))
    return e.op("Mul", a, e.op("Sigmoid", b))


@translates(aten.pixel_shuffle.default)
def _pixel_shuffle(e: Emitter, node: Node) -> ir.Value | None:
    if rank_of(node) != 4:
        return None
    return e.op("DepthToSpace", operand(node), blocksize=Arguments(node).integer("upscale_factor"), mode="CRD")


# How values between entries are found, and the ONNX mode of it.
RESIZE: dict[Target, str] = {
    overload: mode
    for packets, mode in ((NEAREST, "nearest"), (LINEAR, "linear"), ([aten.upsample_bicubic2d], "cubic"))
    for packet in packets
    for overload in overloads(packet)
    if "vec" in str(overload)
}


@translates(*RESIZE)
def _resize(e: Emitter, node: Node) -> ir.Value | None:
    """Resizes as PyTorch does: by the factor that the model gives, or by the ratio of the sizes."""
    given, mode = Arguments(node), RESIZE[node.target]
    x = given.tensor("input")
    if set(grown_dims(x, e.larger)) - {0}:
        return None
    factors = given.given("scale_factors")
    old, new = shape_of(x)[2:], shape_of(node)[2:]
    if factors is None and all(b % a == 0 for a, b in zip(old, new, strict=True)):
        factors = [b // a for a, b in zip(old, new, strict=True)]
    corners = "align_corners" if given.given("align_corners") else "half_pixel"
    how: dict[str, Attribute] = {
        "mode": mode,
        "coordinate_transformation_mode": "asymmetric" if mode == "nearest" else corners,
        "nearest_mode": "floor",
        "cubic_coeff_a": -0.75,
    }
    if isinstance(factors, (list, tuple)):
        array = np.array([1, 1, *factors], dtype=np.float32)
        scales = e.initializer("scales." + "_".join(map(str, array.tolist())), array)
        return e.op("Resize", x, None, scales, **how)
    outer = e.op("Shape", x, start=0, end=2)
    return e.op("Resize", x, None, None, e.op("Concat", outer, e.ints(new), axis=0), **how)


@translates(aten.grid_sampler_2d.default)
def _sampled(e: Emitter, node: Node) -> ir.Value:
    """Reads pictures at computed places."""
    kinds = {"mode": ("linear", "nearest", "cubic"), "padding_mode": ("zeros", "border", "reflection")}
    given = {name: words[whole(node, at)] for at, (name, words) in enumerate(kinds.items(), 2)}
    return e.op("GridSample", operand(node), operand(node, 1), align_corners=int(bool(node.args[4])), **given)
