"""Canonical forms: how an operator is written with fewer kinds of operators. One small function each."""

from __future__ import annotations

import torch
from torch.fx import Node
from torch.fx.node import Argument, Target

from co3d_compile.canonical.clip_forms import one_clip
from co3d_compile.canonical.constant_forms import differences, no_sum, product_with_zero, sum_of_constants
from co3d_compile.canonical.copy_forms import columns, expansion, repetition
from co3d_compile.canonical.index_forms import gather, selection
from co3d_compile.canonical.merged_forms import REDUCTIONS, part_of_merged, reduction_of_merged
from co3d_compile.canonical.overlap_forms import OVERLAPS
from co3d_compile.canonical.reduction_forms import OVER_ALL, SUMS, cast_first, over_all
from co3d_compile.canonical.resampling_forms import RESAMPLING
from co3d_compile.canonical.write_forms import reading, writing
from co3d_compile.ir.aten_operators import CONVOLUTIONS, DIMS, TRANSPOSED_CONVOLUTIONS, PoolArgs, adaptive_max, reduced
from co3d_compile.ir.graph_edits import Rewrite, insert, insert_constant, reads_first_alone, replace, replace_first
from co3d_compile.ir.node_reading import operand, rank_of, shape_of, spread, whole
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.program import Original, Program
from co3d_compile.ir.time_facts import constant_of

aten = torch.ops.aten

WITH_INDICES: dict[Target, Target] = {
    aten.max_pool2d_with_indices.default: aten.max_pool2d.default,
    aten.max_pool3d_with_indices.default: aten.max_pool3d.default,
}
ADAPTIVE_AVERAGE: dict[Target, Target] = {
    aten.adaptive_avg_pool1d.default: aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default: aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default: aten.adaptive_avg_pool3d.default,
    aten._adaptive_avg_pool2d.default: aten.adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool3d.default: aten.adaptive_avg_pool3d.default,
}
ADAPTIVE_MAX: dict[Target, int] = {
    aten.adaptive_max_pool1d.default: 1,
    aten.adaptive_max_pool2d.default: 2,
    aten.adaptive_max_pool3d.default: 3,
}


def _pool(program: Program, node: Node) -> None:
    """Splits whole axes off a pool: they are a mean or a maximum."""
    pool = PoolArgs.of(node)
    rank, n = rank_of(pool.x), len(pool.kernel)
    sizes = shape_of(pool.x)[-n:]
    whole = [a for a in range(n) if pool.kernel[a] == sizes[a] != 1 and pool.padding[a] == 0 and pool.dilation[a] == 1]
    if not whole or pool.divisor is not None:
        return
    tiling = [rank - n + a for a in whole if pool.stride[a] == pool.kernel[a]]
    for a in whole:
        pool.kernel[a] = pool.stride[a] = 1
    x = pool.x
    if any((k, s, p) != (1, 1, 0) for k, s, p in zip(pool.kernel, pool.stride, pool.padding, strict=True)):
        x = insert(program, node, node.target, *pool.args(x, list(range(n))))
    reduction = insert(
        program, node, aten.mean.dim if pool.average else aten.amax.default, x, [rank - n + a for a in whole], True
    )
    kernel = [sizes[a] if a in whole else 1 for a in range(n)]
    program.originals[reduction] = Original(node.target, (kernel, kernel), tuple(tiling))  # type: ignore[arg-type]
    replace(node, reduction)


def _adaptive_average(program: Program, node: Node) -> None:
    """Writes one entry on an axis as a mean over it, as many as there are as nothing (but a longer window has more)."""
    x = operand(node)
    target = ADAPTIVE_AVERAGE[node.target]
    sizes = list(shape_of(node))
    n = int(str(target).split("pool")[1][0])
    first = rank_of(x) - n
    longer = program.options.window is not None
    means = [d for d in range(first, first + n) if sizes[d] == 1 and (longer or shape_of(x)[d] != 1)]
    rest = [1 if d in means else sizes[d] for d in range(first, first + n)]
    old = [1 if d in means else shape_of(x)[d] for d in range(first, first + n)]
    if means:
        x = insert(program, node, aten.mean.dim, x, means, True)
    if rest != old:
        x = insert(program, node, target, x, rest)
    if x is not node.args[0] or rest == old:
        replace(node, x)


def _convolution(program: Program, node: Node) -> None:
    """Writes the general ``convolution`` as the operator of its rank and kind."""
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = node.args
    n = rank_of(operand(node, 1)) - 2
    sizes = [spread(v, n) for v in (stride, padding, dilation, output_padding)]
    if transposed:
        target = TRANSPOSED_CONVOLUTIONS[n - 1]
        rest: list[Argument] = [sizes[3], groups, sizes[2]]
    else:
        target, rest = CONVOLUTIONS[n - 1], [sizes[2], groups]
    replace(node, insert(program, node, target, x, weight, bias, *sizes[:2], *rest))


def _same_padding(program: Program, node: Node) -> None:
    """Writes ``padding="same"`` and ``"valid"`` in numbers; an uneven one is a pad of its own."""
    given = Arguments(node)
    x, weight = given.tensor("input"), given.tensor("weight")
    n = rank_of(weight) - 2
    dilation = given.integers("dilation", n)
    same = given.given("padding") == "same"
    total = [same * d * (k - 1) for d, k in zip(dilation, shape_of(weight)[2:], strict=True)]
    if any(t % 2 for t in total):
        flat = [v for t in reversed(total) for v in (0, t % 2)]
        x = insert(program, node, aten.constant_pad_nd.default, x, flat, 0.0)
    args = (
        x,
        weight,
        given.optional("bias"),
        given.integers("stride", n),
        [t // 2 for t in total],
        dilation,
        given.integer("groups"),
    )
    replace(node, insert(program, node, CONVOLUTIONS[n - 1], *args))


def _only_first(program: Program, node: Node, target: Target, *args: Argument, **kwargs: Argument) -> Node | None:
    """Writes an operator of which only the first output is read as the operator with one output; else gives None."""
    if not reads_first_alone(node):
        return None
    result = insert(program, node, target, *args, **kwargs)
    replace_first(node, result)
    return result


def _addmm(program: Program, node: Node) -> None:
    """Writes ``addmm(bias, x, weight.t())`` as a linear layer."""
    bias, x, transposed = (operand(node, i) for i in range(3))
    if transposed.target in (aten.permute.default, aten.transpose.int) and not node.kwargs:
        replace(node, insert(program, node, aten.linear.default, x, operand(transposed), bias))


def _adaptive_max(program: Program, node: Node) -> None:
    x = operand(node)
    n = ADAPTIVE_MAX[node.target]
    old, new = shape_of(x)[-n:], tuple(node.meta["val"][0].shape)[-n:]
    if not reads_first_alone(node):
        return
    dims = [rank_of(x) - n + a for a in range(n) if new[a] == 1 and old[a] != 1]
    result = insert(program, node, aten.amax.default, x, dims, True) if dims else x
    if tuple(result.meta["val"].shape)[-n:] != new:
        result = insert(program, node, adaptive_max, result, list(new))
    replace_first(node, result)


def _with_indices(program: Program, node: Node) -> None:
    result = _only_first(program, node, WITH_INDICES[node.target], *node.args, **node.kwargs)
    if result is not None:
        _pool(program, result)


def _max_dim(program: Program, node: Node) -> None:
    """Writes ``max`` and ``min`` over a dim, of which only the values are read, as ``amax`` and ``amin``."""
    target = aten.amax.default if node.target is aten.max.dim else aten.amin.default
    _only_first(program, node, target, node.args[0], [node.args[1]], bool(Arguments(node).integer("keepdim")))


def _split(program: Program, node: Node) -> None:
    """Writes the parts of a ``split`` as slices."""
    x = operand(node)
    dim = Arguments(node).dim(x)
    sizes = [int(v.shape[dim]) for v in node.meta["val"]]
    for user in list(node.users):
        i = whole(user, 1)
        start = sum(sizes[:i])
        replace(user, insert(program, user, aten.slice.Tensor, x, dim, start, start + sizes[i]))


def _prelu(program: Program, node: Node) -> None:
    """Writes a slope per channel as a constant that broadcasts."""
    x, weight = operand(node), operand(node, 1)
    space = [1] * (rank_of(x) - 2)
    slope = insert(program, node, aten.reshape.default, weight, [-1, *space]) if rank_of(x) > 1 else weight
    replace(node, insert(program, node, aten._prelu_kernel.default, x, slope))


def _rrelu(program: Program, node: Node) -> None:
    """Writes the random slope as the mean of its bounds, which it is outside of training."""
    low, high = (Arguments(node).number(name) for name in ("lower", "upper"))
    replace(node, insert(program, node, aten.leaky_relu.default, operand(node), (low + high) / 2))


def _moments(program: Program, node: Node) -> None:
    """Writes ``var_mean`` as two operators."""
    (x, every, keep), correction = reduced(node), Arguments(node).given("correction")
    for user in list(node.users):
        if user.args[1] == 0:
            new = insert(program, user, aten.var.correction, x, every, correction=correction, keepdim=keep)
        else:
            new = insert(program, user, aten.mean.dim, x, every, keep)
        replace(user, new)


def _instance_norm(program: Program, node: Node) -> None:
    """Writes instance norm with running statistics as a batch norm."""
    x, weight, bias, mean, variance, use_input_stats, _, eps = node.args[:8]
    if not use_input_stats:
        args = (x, weight, bias, mean, variance, False, 0.0, eps, False)
        replace(node, insert(program, node, aten.batch_norm.default, *args))


def _squeeze_all(program: Program, node: Node) -> None:
    """Says which dims ``squeeze()`` means: not the batch, which is one when a single stream runs."""
    x = operand(node)
    dims = [d for d, size in enumerate(shape_of(x)) if size == 1]
    replace(node, insert(program, node, aten.squeeze.dims, x, dims) if dims else x)


def _select(program: Program, node: Node) -> None:
    """Writes ``x[0]`` of a batch of one as the same without that dim."""
    x, dim, _ = node.args
    if isinstance(x, Node) and dim == 0 and shape_of(x)[0] == 1:
        replace(node, insert(program, node, aten.squeeze.dims, x, [0]))


def _join(program: Program, node: Node) -> None:
    """Makes all parts of a ``cat`` of one type, and drops empty ones: zeros in front of a kernel of one tap."""
    dtype = node.meta["val"].dtype
    given: list[Node] = list(node.args[0])  # type: ignore[arg-type]
    kept = parts = [_of_type(program, node, p, dtype) for p in given]
    if any(p.meta["val"].numel() for p in parts):
        kept = [p for p in parts if p.meta["val"].numel()]
    if len(kept) == 1 and shape_of(kept[0]) == shape_of(node):
        replace(node, kept[0])
    elif kept != given:
        node.update_arg(0, kept)


def _of_type(program: Program, node: Node, x: Node, dtype: torch.dtype) -> Node:
    """Casts a tensor to the type that a node gives."""
    return x if x.meta["val"].dtype is dtype else insert(program, node, aten._to_copy.default, x, dtype=dtype)


REWRITES: dict[Target, Rewrite] = {
    aten.cat.default: _join,
    **dict.fromkeys((*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS), one_clip),
    **dict.fromkeys(DIMS, _pool),
    **dict.fromkeys(ADAPTIVE_AVERAGE, _adaptive_average),
    **dict.fromkeys(ADAPTIVE_MAX, _adaptive_max),
    **dict.fromkeys(WITH_INDICES, _with_indices),
    aten.max.dim: _max_dim,
    aten.min.dim: _max_dim,
    **dict.fromkeys(SUMS, cast_first),
    **dict.fromkeys(OVER_ALL, over_all),
    aten.split_with_sizes.default: _split,
    aten.slice_scatter.default: writing,
    aten.select_scatter.default: writing,
    aten.slice.Tensor: reading,
    aten.add.Tensor: sum_of_constants,
    aten.sub.Tensor: differences,
    aten.mul.Tensor: product_with_zero,
    aten.squeeze.default: _squeeze_all,
    aten.select.int: _select,
    aten.convolution.default: _convolution,
    aten.conv1d.padding: _same_padding,
    aten.conv2d.padding: _same_padding,
    aten.conv3d.padding: _same_padding,
    aten.addmm.default: _addmm,
    aten.instance_norm.default: _instance_norm,
    aten.prelu.default: _prelu,
    aten.rrelu.default: _rrelu,
    aten.var_mean.correction: _moments,
    aten.expand.default: expansion,
    aten.repeat.default: repetition,
    aten.im2col.default: columns,
    **RESAMPLING,
}


def _bmm(program: Program, node: Node) -> None:
    """Writes a product with one constant matrix, copied for each row of the batch, as a linear layer."""
    x, weight = operand(node), operand(node, 1)
    if rank_of(x) != 3 or rank_of(weight) != 3 or shape_of(x)[0] != shape_of(weight)[0]:
        return
    left = x.op == "get_attr"
    if left:
        x, weight = weight, x
    if 0 not in constant_of(weight).alike or shape_of(weight)[0] == 1:
        return
    value = program.constant(weight)[0]
    shared = insert_constant(program, node, f"constant.{node.name}", (value if left else value.t()).contiguous())
    x = insert(program, node, aten.transpose.int, x, 1, 2) if left else x
    result = insert(program, node, aten.linear.default, x, shared)
    replace(node, insert(program, node, aten.transpose.int, result, 1, 2) if left else result)


GATHERS: dict[Target, Rewrite] = {
    aten.index.Tensor: gather,
    aten.index_select.default: selection,
    aten.bmm.default: _bmm,
    aten.matmul.default: _bmm,
    aten.slice.Tensor: part_of_merged,
    aten.add.Tensor: no_sum,
    aten.sub.Tensor: no_sum,
    **dict.fromkeys(REDUCTIONS, reduction_of_merged),
    **OVERLAPS,
}
"""Run after constants are computed, since these need them."""
