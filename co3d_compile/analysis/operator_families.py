"""What operators do to single numbers: move them, compute with them one by one, or over whole dims.

Dependence is tracked number by number, and for that an operator is one of a few kinds. An operator that is in none of
these sets is taken to compute every number from every other.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from co3d_compile.ir.node_reading import norm_dims, operator_name
from co3d_compile.ir.operator_arguments import Arguments


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


MOVES = _names("""
    view _unsafe_view reshape permute transpose t numpy_T movedim expand expand_as squeeze unsqueeze slice select narrow
    split split_with_sizes chunk unbind unsafe_split unsafe_chunk cat stack repeat repeat_interleave flip roll unfold
    as_strided clone contiguous detach alias diagonal tile flatten unflatten tril triu pixel_shuffle pixel_unshuffle
    channel_shuffle im2col col2im replication_pad1d replication_pad2d replication_pad3d reflection_pad1d
    reflection_pad2d reflection_pad3d constant_pad_nd lift_fresh_copy lift_fresh dropout upsample_nearest1d
    upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
    upsample_linear1d upsample_bilinear2d upsample_trilinear3d avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d
    max_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d
    slice_scatter select_scatter diagonal_scatter
""")
"""Move numbers, or add up some of them: applied to marks, they say where marked numbers have a part."""
TWO_SOURCES = _names("slice_scatter select_scatter diagonal_scatter")
"""Of these, what writes one tensor into another."""
GATHERS = {"index": 1, "index_select": 2, "gather": 2, "take_along_dim": 1, "embedding": 1}
"""Read numbers at indices: the position of the argument with these."""
SCATTERS = _names("scatter scatter_add scatter_reduce index_put index_add index_copy")
"""Write numbers at indices."""
REDUCTIONS = _names("""
    sum mean amax amin max min prod var std var_mean std_mean norm linalg_vector_norm any all argmax argmin logsumexp
    median nanmedian nansum mode aminmax
""")
ORDERS = _names("""
    softmax _softmax log_softmax _log_softmax sort topk argsort cumsum cumprod cummax cummin logcumsumexp kthvalue msort
""")
"""Compute over one whole dim, which stays."""
PRODUCTS = _names("""
    mm bmm matmul linear addmm baddbmm mv dot convolution conv1d conv2d conv3d conv_transpose1d conv_transpose2d
    conv_transpose3d
""")
NORMS = _names("layer_norm native_layer_norm group_norm instance_norm native_group_norm")
FORGET_LOW = _names("amax max argmax logsumexp softmax _softmax log_softmax _log_softmax")
"""What a number far below the others has no part in."""
FORGET_ZERO = _names("sum nansum norm linalg_vector_norm")
"""What a zero has no part in."""
KEEP_ZERO = _names("abs neg sqrt tanh sin sign _to_copy to leaky_relu erf square")
"""Zero where their operand is zero."""
POINTWISE = _names("full_like where masked_fill bucketize _to_copy to type_as clamp prelu batch_norm "
                   "_native_batch_norm_legit_no_training")  # fmt: skip
"""Pointwise, though PyTorch does not say so."""


def name_of(node: Node) -> str:
    """Names an operator without its namespace."""
    return operator_name(node.target).removeprefix("aten.")


def is_pointwise(node: Node) -> bool:
    """Says whether each number of a result is computed from one number of each operand."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or name_of(node) in POINTWISE


def reduced_dims(node: Node, rank: int) -> list[int]:
    """Reads the dims over which an operator computes."""
    given, name = Arguments(node), name_of(node)
    if name in ("layer_norm", "native_layer_norm"):
        return list(range(rank - len(given.integers("normalized_shape")), rank))
    if name in ("group_norm", "native_group_norm"):
        return list(range(1, rank))
    if name == "instance_norm":
        return list(range(2, rank))
    dims = given.given("dim")
    if dims is None and name == "sort":
        dims = -1
    return norm_dims(None if dims is None else given.integers("dim"), rank)


def keeps_dims(node: Node) -> bool:
    """Says whether a reduction leaves dims of one."""
    return bool(Arguments(node).given("keepdim"))
