"""Operators decomposed once for each kind: what PyTorch's own way gives for the whole program, and the same numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from zoo.small import SMALL

from co3d_compile.capture import decompose
from co3d_compile.capture.decompose import ALONE, decomposed
from co3d_compile.capture.decompositions import decompositions
from co3d_compile.capture.exported_graph import unlift
from co3d_compile.capture.tracer import export
from co3d_compile.ir.aten_operators import VIEWS

CLIP = (1, 3, 4, 5, 5)


class Net(nn.Module):
    """A convolution, a norm, and a body that may write into its operands."""

    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.body = nn.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.norm(self.conv(x)))


def read_after(x: Tensor) -> Tensor:
    y = x.relu_()
    return y.add_(x)


def read_before(x: Tensor) -> Tensor:
    before = x.sigmoid()
    return before * x.relu_()


def a_view_sees_it(x: Tensor) -> Tensor:
    part = x[:, :2]
    x.relu_()
    return part + x[:, 2:]


def into_a_view(x: Tensor) -> Tensor:
    x[:, :2].mul_(3)
    return x + 1


def with_itself(x: Tensor) -> Tensor:
    return x.mul_(x)


def into_views_of_views(x: Tensor) -> Tensor:
    before, rows = x + 0, x[:, 1:]
    y = x.new_zeros(x.shape)
    for t in range(4):
        y[:, :, t] = x[:, :, t] * t
        y[:, 1:].transpose(1, 2)[:, t, 0, 1:].masked_fill_(y[:, 0, t, 1:] > 0, 2.0)
    x.add_(1)
    rows.unsqueeze(1)[:, 0, 0] = 5
    return before + x + y + rows[:, :1]


def the_result_of_a_write_into_a_view(x: Tensor) -> Tensor:
    x[:, :2].mul_(3).add_(1)
    return x + 1


def a_copy_beside(x: Tensor) -> Tensor:
    y = x.transpose(1, 2).reshape(x.shape[0], -1)
    x[:, 0] = 0
    return y + x.flatten(1)


def behind_casts(x: Tensor) -> Tensor:
    """Casts to the type that a tensor has give the tensor itself: what is written into them is seen in it."""
    y = torch.zeros(x.shape).to(x.device)
    beside = y.type_as(x)
    other, copied = y.to(torch.float64), y.to(torch.float32, copy=True)
    for t in range(4):
        y[:, :, t] = x[:, :, t] * t
    copied[:, 0] = 7
    return beside + y + other.float() + copied


def several_results(x: Tensor) -> Tensor:
    a, b = x.unbind(1)[:2]
    return torch.einsum("nthw,nthw->nt", a, b)


def checked(x: Tensor) -> Tensor:
    return x @ torch.linalg.inv(x.mT @ x + torch.eye(5))


BODIES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {  # and whether it needs PyTorch's own way
    "in place": (nn.ReLU(inplace=True), False),
    "read after": (read_after, False),
    "read before": (read_before, False),
    "several results": (several_results, False),
    "a view sees it": (a_view_sees_it, False),
    "into a view": (into_a_view, False),
    "into views of views": (into_views_of_views, False),
    "behind casts": (behind_casts, False),
    "the result of a write into a view": (the_result_of_a_write_into_a_view, True),
    "a copy beside": (a_copy_beside, True),
    "dropout in place": (nn.Dropout(inplace=True), False),
    "with itself": (with_itself, False),
    "whether a matrix could be inverted": (checked, False),
}


@pytest.mark.parametrize("name", BODIES)
def test_writes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body, whole = BODIES[name]
    torch.manual_seed(0)
    network = Net(body).eval()
    program = export(network, (torch.rand(CLIP),))
    sizes: list[int] = []
    own = ExportedProgram.run_decompositions

    def counted(self: ExportedProgram, *args: object, **kwargs: object) -> ExportedProgram:
        sizes.append(sum(node.op == "placeholder" and node.name == "p_conv_weight" for node in self.graph.nodes))
        return own(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(ExportedProgram, "run_decompositions", counted)
    module, _, _ = decomposed(program, decompositions())
    assert (sizes == [1]) == whole
    x = torch.rand(2, *CLIP[1:])
    torch.testing.assert_close(module(x.clone())[0], network(x.clone()))


USUAL: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x * torch.arange(5) + torch.arange(2, 7) - torch.arange(0, 10, 2),
    lambda x: torch.cat(x.chunk(2, 2)[::-1], 2).contiguous(),
    lambda x: x.transpose(1, 2).contiguous() + x.detach().transpose(1, 2),
    lambda x: torch.einsum("ncthw,nctvw->ncthv", x, x),
    lambda x: x.as_strided((x.shape[0], 3, 4), (300, 100, 25)),
    lambda x: (
        x[:, :2].as_strided((x.shape[0], 3), (300, 25), 125) - x[:, 1:].as_strided((x.shape[0], 3), (300, 25), 125)
    ),
    lambda x: x[:, :1].expand_as(x).flatten(1),
    lambda x: x.transpose(1, 3).flatten(2) * torch.hann_window(60),
    lambda x: torch.view_as_complex(x[..., :2].contiguous()).real + torch.fft.rfft(x[..., 0], dim=3).imag[..., :1],
    lambda x: x.index_add(2, torch.tensor([0, 0, 1, 3]), x) + torch.linspace(0, 1, 5),
    lambda x: x @ x.mT + x.movedim(1, 2).movedim(2, 1) @ torch.triu(torch.ones(5, 5)),
    lambda x: torch.cat(
        [x.narrow(2, 1, 2), x.new_zeros(x.shape[0], 3, 1, 5, 5), x.new_ones(x.shape[0], 3, 1, 5, 5)], 2
    ),
    lambda x: torch.stack([torch.zeros_like(x), torch.ones_like(x), torch.zeros(5) + x], 2),
    lambda x: (z := torch.fft.rfft(x)).real + z.imag,  # one operand of both
    lambda x: ((z := torch.fft.rfft(x)) * 2 + torch.zeros_like(z) + torch.full_like(z, 1 + 2j)).abs(),
    lambda x: x.std(2) + torch.var_mean(x, 3)[0].mean() + x.sum() + (x > 0).all(),
    lambda x: torch.stack(x.unbind(2)[::-1], 2).unflatten(2, (2, 2)).reshape(-1, 3, 2, 2, 25),
    lambda x: torch.nn.functional.pad(torch.dropout(x, 0.5, False), (1, 0), value=2.0).view_as(
        x.new_zeros(2, 3, 4, 5, 6)
    ),
    lambda x: torch.cat(x.split(3, 2)[::-1], 2) * ((x > 0.2) & (x < 0.8) | (x == 1)).to(torch.int64),
    lambda x: torch.where(x > 0.5, 1.0, 0.0) + torch.where(x > 0.5, x, 0.0) + torch.where(x > 0.5, 0.0, x),
    lambda x: (
        x.index_put((torch.tensor([0, 1]),), x[:1])
        + x.argsort(2).type_as(x)
        + x.argsort(3).to("cpu").to(torch.device("cpu"), x.dtype)
    ),
    lambda x: x.index_put((x > 0.5,), torch.tensor(0.0)) + x.index_put((torch.tensor([1]),), x[:1], True),
    lambda x: x.repeat_interleave(2, 2)[:, :, 1:5] + (10 * x).floor_divide(3) + torch.empty_like(x).fill_(1.0),
    lambda x: x[0, 0, 0].t() + x[0, 0, :, 0, 0].split(3)[0].repeat_interleave(5).reshape(3, 5)[:1].t().squeeze(-1),
    lambda x: torch.nn.functional.pad(x, (1, 2, 0, 1, 2, 0), "reflect")[..., :5],
    lambda x: torch.nn.functional.pad(x, (1, 2, 0, 1, 2, 0), "replicate")[..., :5],
)


def test_what_is_traced_alone_has_the_parts_that_pytorch_gives_it() -> None:
    class Usual(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [body(x) for body in USUAL]

    program = export(Usual(), (torch.rand(2, *CLIP[1:]),))
    assert {str(operator) for operator in ALONE} <= {str(node.target) for node in program.graph.nodes}
    expected, _, _ = unlift(program.run_decompositions(decompositions()))
    found, _, _ = decomposed(program, decompositions())
    assert operators(found) == operators(expected)


class Cells(nn.Module):
    """A loop over frames with a cell in each turn."""

    def __init__(self, kind: Callable[..., nn.Module], bias: bool = True) -> None:
        super().__init__()
        self.cell, self.several = kind(3, 4, bias=bias), kind is nn.LSTMCell

    def forward(self, x: Tensor) -> Tensor:
        h, c = x.new_zeros(x.shape[0], 4), x.new_zeros(x.shape[0], 4)
        for t in range(5):
            h, c = self.cell(x[:, t], (h, c)) if self.several else (self.cell(x[:, t], h), c)
        return h + c


def test_cells_of_a_loop_are_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turn takes another frame, which lies elsewhere in memory."""
    cells: list[Node] = []
    own = decompose.Cell

    def counted(node: Node, *args: Any) -> Any:
        cells.append(node)
        return own(node, *args)

    network, x = Cells(nn.LSTMCell).eval(), torch.rand(2, 5, 3)
    program = export(network, (x,))
    monkeypatch.setattr(decompose, "Cell", counted)
    module, _, _ = decomposed(program, decompositions())
    assert len(cells) == 1
    with torch.no_grad():
        torch.testing.assert_close(module(x)[0], network(x))


KINDS: dict[str, Callable[..., nn.Module]] = {
    "LSTM": nn.LSTMCell,
    "GRU": nn.GRUCell,
    "tanh": nn.RNNCell,
    "relu": partial(nn.RNNCell, nonlinearity="relu"),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_cells_have_the_parts_that_pytorch_gives_them(kind: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    program = export(Cells(KINDS[kind], bias).eval(), (torch.rand(2, 5, 3),))
    expected, _, _ = unlift(program.run_decompositions(decompositions()))
    monkeypatch.delattr(ExportedProgram, "run_decompositions")
    found, _, _ = decomposed(program, decompositions())
    assert operators(found) == operators(expected)


def name_of(node: Node) -> str:
    """The operator; ours has one way to write a view."""
    return str(torch.ops.aten.reshape.default if node.target in VIEWS else node.target)


def operators(module: GraphModule) -> list[str]:
    """Each operator with its operands and arguments."""
    numbers = {node: f"%{i}" for i, node in enumerate(module.graph.nodes) if node.op != "get_attr"}
    return [
        f"{name_of(n)} {map_arg(n.args, lambda x: numbers.get(x, 'constant'))} {n.kwargs}" for n in module.graph.nodes
    ]


@pytest.mark.parametrize("network", ["c3d", "p3d", "st_gcn", "cnn_lstm", "se_mean-frame", "causal_attention", "ms_tcn"])
def test_the_same_operators_as_by_pytorch(network: str) -> None:
    entry = SMALL[network]
    program = export(entry.build().eval(), entry.examples())
    expected, _, _ = unlift(program.run_decompositions(decompositions()))
    found, _, _ = decomposed(program, decompositions())
    expected.graph.eliminate_dead_code()  # not all weights are read
    kinds = [Counter(name_of(n) for n in m.graph.nodes if n.op == "call_function") for m in (expected, found)]
    assert kinds[0] == kinds[1]
