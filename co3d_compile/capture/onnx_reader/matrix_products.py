"""Matrix products: ``MatMul``, ``Gemm``, ``Einsum``, attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from co3d_compile.capture.onnx_reader.node_call import NodeCall, Result, reads


@reads("MatMul")
def matmul(call: NodeCall, x: Tensor, y: Tensor) -> Tensor:
    """Multiplies matrices. A constant matrix on the right is the weight of a linear layer."""
    is_weight = call.is_constant(1) and y.dim() == 2 and x.dim() >= 2
    return F.linear(x, y.t()) if is_weight else torch.matmul(x, y)


@reads("Gemm")
def gemm(call: NodeCall, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """Computes ``alpha * a @ b + beta * c``, a linear layer where nothing is scaled."""
    alpha, beta = call.number("alpha", 1.0), call.number("beta", 1.0)
    a = a.t() if call.integer("transA", 0) else a
    b = b if call.integer("transB", 0) else b.t()
    if alpha == 1.0 and (c is None or (beta == 1.0 and c.dim() == 1 and c.shape[0] == b.shape[0])):
        return F.linear(a, b, c)
    result = F.linear(a, b) * alpha
    return result if c is None else result + c * beta


@reads("Einsum")
def einsum(call: NodeCall, *operands: Tensor) -> Tensor:
    """Sums products over named dims."""
    return torch.einsum(call.text("equation", "").replace(" ", ""), *operands)


@reads("Attention")
def attention(
    call: NodeCall, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *cache: Tensor | None
) -> Result:
    """Computes scaled dot-product attention, on heads that are apart (4 dims) or joined (3 dims).

    Keys and values of a cache stand in front of the new ones.
    """
    if len(cache) > 2 and cache[2] is not None:
        raise call.refuse("is given rows of different lengths")
    joined, groups = q.dim() == 3, call.integer("kv_num_heads", 1)
    if joined:
        heads = zip((q, k, v), (call.integer("q_num_heads", 1), groups, groups), strict=True)
        q, k, v = (x.unflatten(-1, (count, -1)).transpose(1, 2) for x, count in heads)
    past = 0
    if cache and cache[0] is not None and cache[1] is not None:
        past = cache[0].shape[-2]
        k, v = torch.cat([cache[0], k], -2), torch.cat([cache[1], v], -2)
    present = (k, v)
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scale = call.number("scale", 0.0) or q.shape[-1] ** -0.5
    behind, ahead = call.integer("left_window_size", -1), call.integer("right_window_size", -1)
    ahead = 0 if call.integer("is_causal", 0) else ahead
    if max(behind, ahead) >= 0:
        band = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool)
        band = band.tril(past + ahead) if ahead >= 0 else band
        bias = _added(band.triu(past - behind) if behind >= 0 else band, q)
        mask = bias if mask is None else bias + _added(mask, q)
    result, scores = _attended(call, q, k, v, mask, scale)
    result = result.transpose(1, 2).flatten(2) if joined else result
    outputs = [result, *present] if scores is None else [result, *present, scores]
    return tuple(outputs[: len(call.node.outputs)])


def _attended(
    call: NodeCall, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Computes attention, and its scores where the node gives these: raw, capped, masked or behind the softmax."""
    cap, wanted = call.number("softcap", 0.0), call.integer("qk_matmul_output_mode", 0)
    if not cap and len(call.node.outputs) < 4:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale), None
    raw = q @ k.transpose(-1, -2) * scale
    capped = cap * torch.tanh(raw / cap) if cap else raw
    masked = capped if mask is None else capped + _added(mask, q)
    weights = torch.softmax(masked, -1)
    if mask is not None:  # what sees nothing is zero
        weights = weights.masked_fill(masked.isneginf().all(-1, keepdim=True), 0.0)
    return weights @ v, [raw, capped, masked, weights][wanted]


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """Turns a mask into numbers to add to scores."""
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(~mask, float("-inf"))
