"""Norms that are written out in smaller operators, as one operator again: found by the numbers they compute."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from co3d_compile.capture.written_out.regions import Region, computes_floats, join_regions
from co3d_compile.ir.graph_edits import insert, insert_constant
from co3d_compile.ir.node_reading import operand, rank_of, shape_of
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.program import Program
from co3d_compile.rules import is_pointwise

aten = torch.ops.aten
MEANS = {aten.mean.dim}
SUMS = {aten.sum.dim_IntList, aten.var.correction, aten.std.correction}  # what they give depends on how many there are
ROOTS = {
    aten.sqrt.default,
    aten.rsqrt.default,
    aten.std.correction,
    aten.pow.Tensor_Scalar,
    aten.pow.Tensor_Tensor,
}
FEW = 3  # entries of a dim on whose size nothing depends
SAME = 1e-9
DRAWS = 6


@dataclass(frozen=True)
class Norm:
    """A norm over the last dims: ``(x - mean) / sqrt(variance + eps) * scale + shift``."""

    first: int
    eps: float
    scale: Tensor
    shift: Tensor


def join_norms(program: Program) -> None:
    """Rewrites ``(x - mean) / sqrt(variance + eps) * scale + shift``, however it is written, to a norm."""

    def joined(region: Region) -> Node | None:
        norm = _norm(region)
        return None if norm is None else _written(program, region, norm)

    join_regions(program, computes_floats, _may, joined)


def _may(node: Node) -> bool:
    if node.op != "call_function" or not isinstance(node.meta["val"], Tensor):
        return False
    return is_pointwise(node.target) or node.target in MEANS | SUMS or node.target is aten.unsqueeze.default


def _norm(region: Region) -> Norm | None:
    """Finds the norm that a region computes, if it computes one."""
    x, targets = region.source, {n.target for n in region.nodes}
    reductions = [n for n in region.nodes if n.target in MEANS | SUMS]
    plain = x.op != "get_attr" and isinstance(x.meta["val"], Tensor) and x.meta["val"].is_floating_point()
    if not plain or not reductions or not targets & ROOTS or shape_of(x) != shape_of(region.result):
        return None
    over = {tuple(sorted(Arguments(n).dims(operand(n)))) for n in reductions if rank_of(operand(n)) == rank_of(x)}
    dims = over.pop() if over else ()
    if over or not dims or dims != tuple(range(dims[0], rank_of(x))) or dims[0] == 0:
        return None
    sizes = _sizes(region, dims)
    if sizes is None or prod(sizes[dims[0] :]) < 2:
        return None
    for eps in sorted({0.0, *(n for n in region.numbers() if 0 < n < 1)}, reverse=True):
        norm = _confirmed(region, sizes, dims[0], eps)
        if norm is not None:
            return norm
    return None


def _sizes(region: Region, dims: tuple[int, ...]) -> list[int] | None:
    """Chooses the sizes to try the region with: few entries along each dim on whose size nothing depends."""
    shape = shape_of(region.source)
    fixed = set(dims) if any(n.target not in MEANS and n.target in SUMS for n in region.nodes) else set()
    if any(float(prod(shape[d] for d in dims)) in (n, 1 / n) for n in region.numbers() if n):
        fixed |= set(dims)
    for value in region.values.values():
        if value.dim() > len(shape):
            return None
        fixed |= {len(shape) - right for right in range(1, value.dim() + 1) if value.shape[-right] != 1}
    return [size if d in fixed else min(size, FEW) for d, size in enumerate(shape)]


def _confirmed(region: Region, sizes: list[int], first: int, eps: float) -> Norm | None:
    """Makes the norm with this eps, if the region computes it: scale and shift are solved for, and then tried."""
    generator = torch.Generator().manual_seed(0)

    def draw(scale: float) -> Tensor:
        return scale * torch.randn(sizes, generator=generator, dtype=torch.float64)

    def plain(x: Tensor) -> Tensor:
        return F.layer_norm(x, sizes[first:], eps=eps)

    try:
        shift = region.run(torch.zeros(sizes, dtype=torch.float64)) if eps else None
        draws = [draw(1.0) for _ in range(DRAWS)]
        norms, results = torch.stack([plain(x) for x in draws]), torch.stack([region.run(x) for x in draws])
        if results.shape != norms.shape:
            return None
        shift = results.mean(0) - norms.mean(0) if shift is None else shift
        scale = ((results - shift) * norms).sum(0) / norms.square().sum(0)
        scale, shift = (_one_per_size(t, sizes, shape_of(region.source)) for t in (scale, shift))
        for size in (1.0, 30.0, 1e-2, eps**0.5 or 1e-3):
            x = draw(size) + draw(size).mean()
            if not torch.allclose(region.run(x), plain(x) * scale + shift, rtol=SAME, atol=SAME):
                return None
    except (RuntimeError, TypeError, ValueError, IndexError):  # an operator that takes no other sizes, or no float64
        return None
    return Norm(first, eps, scale, shift)


def _one_per_size(value: Tensor, sizes: list[int], shape: tuple[int, ...]) -> Tensor:
    """Gives a scale or shift with a single entry along the dims that were shortened, or along which it is the same."""
    for d, (size, whole) in enumerate(zip(sizes, shape, strict=True)):
        one = value.narrow(d, 0, 1)
        if size != whole or torch.allclose(value, one, rtol=SAME, atol=SAME):
            value = one
    return value


def _written(program: Program, region: Region, norm: Norm) -> Node:
    """Writes the norm as one operator, with its scale and shift behind it."""
    x, node, dtype = region.source, region.result, region.source.meta["val"].dtype
    if norm.first == 2 and rank_of(x) > 2:
        nothing = (None, None, None, None, True, 0.0)
        result = insert(program, node, aten.instance_norm.default, x, *nothing, norm.eps, False)
    else:
        shape = list(shape_of(x)[norm.first :])
        result = insert(program, node, aten.layer_norm.default, x, shape, None, None, norm.eps, False)
    for operator, value, neutral in ((aten.mul.Tensor, norm.scale, 1.0), (aten.add.Tensor, norm.shift, 0.0)):
        if not torch.allclose(value, torch.full_like(value, neutral), rtol=SAME, atol=SAME):
            constant = insert_constant(program, node, f"{node.name}_affine", value.to(dtype))
            result = insert(program, node, operator, result, constant)
    return result
