"""Whether a file that is written for one clip is right for several: its shapes are read for as many as there are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from co3d_compile.capture.onnx_reader.onnx_module import OnnxModule
from co3d_compile.errors import Co3dError

SAME = 1e-3  # of the largest number


def is_right_for_several(module: OnnxModule, clip: Sequence[Tensor]) -> bool:
    """Runs two clips together and one by one, where the file reshapes to a batch that it fixes."""
    if not any(_fixes_batch(module, i) for i in range(len(module.onnx_graph))):
        return True
    other = [x.flip(-1) if x.is_floating_point() else x for x in clip]
    try:
        with torch.no_grad():
            both = module(*(torch.cat([a, b]) for a, b in zip(clip, other, strict=True))).values()
            apart = zip(module(*clip).values(), module(*other).values(), strict=True)
            return all(_same(x, torch.cat(pair)) for x, pair in zip(both, apart, strict=True))
    except (Co3dError, RuntimeError):
        return False


def _fixes_batch(module: OnnxModule, index: int) -> bool:
    node = module.onnx_graph[index]
    if node.op_type != "Reshape":
        return False
    target = node.inputs[1] if len(node.inputs) > 1 else None
    if target is None or target.const_value is None:
        return target is None
    sizes = target.const_value.numpy().reshape(-1)
    return bool(sizes.size) and int(sizes[0]) > 0


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    return bool(((a - b).abs() <= SAME * b.abs().max()).all())
