"""What is remembered of fake tensors, operators and kinds of them is what PyTorch says anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

import co3d_compile as co3d
from co3d_compile.ir.fake_values import computed

aten = torch.ops.aten
X, W = torch.zeros(2, 3, 8, 6), torch.zeros(4, 3, 3, 3)
CALLS: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.conv2d.default, (X, W, None, [1, 1], [1, 1])),
    (aten.slice.Tensor, (X, 2, 3, 7, 2)),
    (aten.select.int, (X, 1, -1)),
    (aten.permute.default, (X, [3, 0, 1, 2])),
    (aten.as_strided.default, (X[:, 1], [2, 4], [24, 2])),
    (aten.split_with_sizes.default, (X, [1, 2], 1)),
    (aten.max.dim, (X, 2)),
    (aten.mul.Tensor, (X, 2)),
    (aten.mul.Tensor, (X, 2.0)),
    (aten.mul.Tensor, (X.long(), True)),
    (aten.mul.Tensor, (X.long(), 1)),
    (aten.mul.Tensor, (X.long(), 1.0)),
    (aten.sum.dim_IntList, (X.to(torch.uint8), [0])),
    (aten.cat.default, ([X, X], 0)),
    (aten.expand.default, (X[:, :, :1], [-1, -1, 5, -1])),
    (aten.select.int, (X[:, :, :0].transpose(0, 1), 0, 1)),
]


def described(result: Any) -> Any:
    def of(t: Tensor) -> Any:
        return type(t), tuple(t.shape), t.stride(), t.storage_offset(), t.dtype, t.device

    return pytree.tree_map_only(Tensor, of, result)


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize(("target", "args"), CALLS, ids=lambda v: str(v) if callable(v) else None)
def test_shapes_are_those_of_pytorch(target: Any, args: tuple[Any, ...], times: int) -> None:
    mode = FakeTensorMode()
    given = pytree.tree_map_only(Tensor, mode.from_tensor, args)
    with mode:
        wanted = target(*given)
    for _ in range(times):
        found = computed(mode, target, given, {})
        assert described(found) == described(wanted)
        assert all(t.fake_mode is mode for t in pytree.tree_leaves(found))


def test_what_hangs_on_numbers_is_not_remembered() -> None:
    mode = FakeTensorMode()
    with mode:
        one, two = (torch.tensor(n) for n in (1, 2))
    assert [computed(mode, aten.item.default, (x,), {}) for x in (one, two)] == [1, 2]
    assert isinstance(computed(mode, aten.add.Tensor, (one, two), {}), FakeTensor)


def test_an_operator_that_does_not_fit_is_refused_each_time() -> None:
    mode = FakeTensorMode()
    x, w = mode.from_tensor(torch.zeros(1, 5, 8, 8)), mode.from_tensor(W)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            computed(mode, aten.conv2d.default, (x, w), {})


def test_another_decomposition_is_heeded_at_the_next_compilation() -> None:
    """What an operator has become before is forgotten where users say that it becomes something else."""
    from co3d_compile.capture.decompositions import DECOMPOSITIONS

    class Spread(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.std(1, keepdim=True)

    def operators() -> set[str]:
        compiled = co3d.compile(Spread(), torch.zeros(1, 3, 8))
        assert compiled.captured is not None
        return {str(n.target) for n in compiled.captured.graph.nodes if n.op == "call_function"}

    usual = operators()
    DECOMPOSITIONS[aten.std.correction] = lambda x, dim, correction=1, keepdim=False: x.amax(dim, keepdim)
    try:
        assert operators() == {"aten.amax.default"} != usual
    finally:
        del DECOMPOSITIONS[aten.std.correction]
    assert operators() == usual
