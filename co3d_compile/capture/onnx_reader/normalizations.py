"""Normalizations by stored or computed statistics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from co3d_compile.capture.onnx_reader.node_call import NodeCall, reads


@reads("BatchNormalization")
def batch_norm(call: NodeCall, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Normalises each channel by stored statistics."""
    if call.integer("training_mode", 0):
        raise call.refuse("is in training mode", "Export the model in eval mode.")
    if mean.dim() > 1:  # before operator set 9 each place may have statistics of its own
        return (x - mean) * torch.rsqrt(variance + call.number("epsilon", 1e-5)) * weight + bias
    return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, call.number("epsilon", 1e-5))


@reads("InstanceNormalization")
def instance_norm(call: NodeCall, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalises each channel of each clip by itself."""
    return F.instance_norm(x, weight=weight, bias=bias, eps=call.number("epsilon", 1e-5))


@reads("GroupNormalization")
def group_norm(call: NodeCall, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalises groups of channels. Before operator set 21 scale and bias are one per group."""
    groups = call.integer("num_groups", 1)
    if weight.shape[0] != x.shape[1]:
        weight, bias = (t.repeat_interleave(x.shape[1] // groups) for t in (weight, bias))
    return F.group_norm(x, groups, weight, bias, call.number("epsilon", 1e-5))


@reads("LayerNormalization")
def layer_norm(call: NodeCall, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
    """Normalises over the dims from ``axis`` on."""
    axis, eps = call.integer("axis", -1) % x.dim(), call.number("epsilon", 1e-5)
    shape = list(x.shape[axis:])
    plain = list(weight.shape) == shape and (bias is None or list(bias.shape) == shape)
    result = F.layer_norm(x, shape, weight if plain else None, bias if plain else None, eps)
    if not plain:
        result = result * weight if bias is None else result * weight + bias
    if len(call.node.outputs) == 1:
        return (result,)
    dims = list(range(axis, x.dim()))
    mean = x.mean(dims, keepdim=True)
    return result, mean, torch.rsqrt((x - mean).square().mean(dims, keepdim=True) + eps)


@reads("RMSNormalization")
def rms_norm(call: NodeCall, x: Tensor, weight: Tensor) -> Tensor:
    """Divides by the root mean square over the dims from ``axis`` on."""
    dims = list(range(call.integer("axis", -1) % x.dim(), x.dim()))
    return x * torch.rsqrt(x.square().mean(dims, keepdim=True) + call.number("epsilon", 1e-5)) * weight


@reads("MeanVarianceNormalization")
def mean_variance_norm(call: NodeCall, x: Tensor) -> Tensor:
    """Takes the mean out and divides by the standard deviation, over given dims."""
    dims = call.integers("axes", (0, 2, 3)) or []
    centred = x - x.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True).sqrt() + 1e-9)


@reads("LpNormalization")
def lp_norm(call: NodeCall, x: Tensor) -> Tensor:
    """Divides by the norm along a dim."""
    dim, p = call.integer("axis", -1), call.integer("p", 2)
    length = x.abs().sum(dim, keepdim=True) if p == 1 else x.square().sum(dim, keepdim=True).sqrt()
    return torch.where(length == 0, torch.zeros_like(x), x / length)


@reads("LRN")
def local_response_norm(call: NodeCall, x: Tensor) -> Tensor:
    """Divides by the energy of neighbouring channels."""
    size = call.integer("size", 1)
    front = (size - 1) // 2
    squares = F.pad(x.square().movedim(1, -1), (front, size - 1 - front)).unfold(-1, size, 1).sum(-1).movedim(-1, 1)
    alpha, beta, bias = call.number("alpha", 1e-4), call.number("beta", 0.75), call.number("bias", 1.0)
    return x / (bias + alpha / size * squares) ** beta
