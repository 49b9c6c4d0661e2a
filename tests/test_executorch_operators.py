"""What ExecuTorch has no kernels for, in other operators: equal numbers, and none of those is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from marks import few
from torch import Tensor, nn
from torch.export import Dim
from zoo import Graph

from co3d_compile.targets.executorch_operators import for_executorch

NUMBERS = torch.tensor([[-(2**31), -7, -1, 0], [1, 6, 255, 2**31 - 1]], dtype=torch.int32)
FEW = torch.tensor([[0, 1, 2, 3], [4, 5, 30, 31]], dtype=torch.int32)
CONVOLUTIONS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "plain": (nn.Conv3d, {}),
    "padded": (nn.Conv3d, {"padding": (2, 1, 0)}),
    "everything": (nn.Conv3d, {"padding": 2, "stride": (2, 1, 2), "dilation": (2, 1, 1), "groups": 2, "bias": False}),
    "same": (nn.Conv3d, {"padding": "same"}),
    "one frame": (nn.Conv3d, {"kernel_size": (6, 1, 1)}),
    "transposed": (nn.ConvTranspose3d, {}),
    "transposed, everything": (
        nn.ConvTranspose3d,
        {"padding": (1, 0, 2), "stride": (3, 2, 1), "output_padding": (2, 1, 0), "dilation": (2, 1, 1), "groups": 2},
    ),
    "transposed, cut": (nn.ConvTranspose3d, {"padding": (3, 1, 1), "stride": (2, 1, 1)}),
}
SHIFTS: dict[str, tuple[Callable[[Any, Tensor], Tensor], torch.dtype]] = {
    "right": (lambda m, x: x >> 5, torch.int32),
    "right by all": (lambda m, x: x >> 31, torch.int32),
    "right, 64 bits": (lambda m, x: x >> 40, torch.int64),
    "right, bytes": (lambda m, x: x >> 3, torch.uint8),
    "right by a tensor": (lambda m, x: torch.bitwise_right_shift(x, FEW), torch.int32),
    "right by name": (lambda m, x: torch.bitwise_right_shift(x, 2), torch.int16),
    "left": (lambda m, x: x << 5, torch.int32),
    "left by all": (lambda m, x: x << 31, torch.int32),
    "left by a tensor": (lambda m, x: torch.bitwise_left_shift(x, FEW), torch.int32),
}


def rewritten(module: nn.Module, x: Tensor, batches: int) -> Any:
    """The program for any batch."""
    clip = x.repeat(batches, *[1] * (x.dim() - 1))
    return for_executorch(torch.export.export(module.eval(), (clip,), dynamic_shapes=(({0: Dim("batch")},),)))


@pytest.mark.parametrize("name", few(CONVOLUTIONS, "everything", "transposed, everything"))
def test_convolutions_over_three_dims(name: str) -> None:
    torch.manual_seed(0)
    kind, options = CONVOLUTIONS[name]
    layer = kind(4, 6, **{"kernel_size": (3, 2, 3), **options})
    program, x = (
        rewritten(Graph(lambda m, x: m.layer(x), layer=layer), torch.zeros(1, 4, 6, 7, 8), 2),
        torch.randn(3, 4, 6, 7, 8),
    )
    expected = layer(x)
    torch.testing.assert_close(program.module()(x), expected)
    convolutions = [n for n in program.graph.nodes if "conv" in str(n.target) and n.op == "call_function"]
    assert len(convolutions) == layer.kernel_size[0]
    assert all(n.args[0].meta["val"].dim() == 4 for n in convolutions)


@pytest.mark.parametrize("x", [torch.tensor([-0.0, float("nan"), -float("inf"), 0.0]), NUMBERS, NUMBERS > 0])
def test_copies(x: Tensor) -> None:
    def copied(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return (y := x[..., :3]), y.clone()

    program = for_executorch(torch.export.export(Graph(copied), (x,)))
    for result in program.module()(x):
        torch.testing.assert_close(result, x[..., :3], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(result.signbit(), x[..., :3].signbit())
    assert not any("clone" in str(n.target) for n in program.graph.nodes)


@pytest.mark.parametrize("name", SHIFTS)
def test_shifts_of_bits(name: str) -> None:
    call, dtype = SHIFTS[name]
    module, x = Graph(call), NUMBERS.to(dtype)
    program = rewritten(module, x[:1], 2) if "tensor" not in name else for_executorch(torch.export.export(module, (x,)))
    assert torch.equal(program.module()(x), module(x))
    assert not any("shift" in str(n.target) for n in program.graph.nodes)
