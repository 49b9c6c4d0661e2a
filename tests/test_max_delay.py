"""``max_delay``: kernels read less of the future, no more than the budget needs, and the file is that network."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiled import compiled
from marks import few, slow
from oracle import check
from oracle_ends import check_boundary
from torch import Tensor, nn
from zoo import Entry, Graph, Reference, Window, randomise

import co3d_compile as co3d
from co3d_compile.cli.time_options import frames_of

CLIP = (1, 4, 24)
Rows = Sequence[Mapping[str, Any]]


class Past(nn.Module):
    """A convolution or pool of a network as a row of the contract says that it is replaced."""

    def __init__(self, layer: Any, row: Mapping[str, Any], by: str) -> None:
        super().__init__()
        self.layer, self.original, self.later = copy.deepcopy(layer), layer, row["later"]
        self.replicate = getattr(layer, "behind_edges", False)
        dims = int(type(layer).__name__[-2])
        first, *rest = each(layer.kernel_size, dims)
        kept = first - row["dropped"]
        self.layer.kernel_size, self.layer.stride = (kept, *rest), each(layer.stride, dims)
        if layer.padding == "same":
            self.front = (first - 1) * layer.dilation[0] // 2
            self.back = (first - 1) * layer.dilation[0] - self.front
            self.layer.padding = (0,) * dims
        else:
            self.front, *space = each(layer.padding, dims)
            self.back, self.layer.padding = self.front, (0, *space)
        if row["dropped"] and hasattr(layer, "weight"):
            weight = layer.weight.detach()[:, :, :kept].clone()
            if by == "fold":
                weight[:, :, -1] += layer.weight.detach()[:, :, kept:].sum(2)
            self.layer.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        entries = self.original(x).shape[2]
        pad = [0] * 2 * (x.dim() - 3) + [self.later + self.front, self.back]
        fill = -math.inf if "Max" in type(self.layer).__name__ else 0.0
        padded = F.pad(x, pad, mode="replicate") if self.replicate else F.pad(x, pad, value=fill)
        return self.layer(padded)[:, :, :entries]  # type: ignore[no-any-return]


def each(value: Any, dims: int) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,) * dims


def replaced(module: nn.Module, rows: Rows, by: str) -> nn.Module:
    """A copy of a network with some layers replaced."""
    module = copy.deepcopy(module)
    for row in rows:
        owner, _, name = row["module_path"].rpartition(".")
        parent = module.get_submodule(owner)
        setattr(parent, name, Past(getattr(parent, name), row, by))
    return module


def limited(entry: Entry, budget: int, by: str) -> tuple[Entry, Rows]:
    """The entry with a budget, and the layers that this replaces in its reference."""
    late = replace(entry, options={**entry.options, "max_delay": budget, "delay_by": by})
    rows: Rows = compiled(late).info.options["limited"]
    make = entry.reference or (lambda m: Reference(m, time_dims=(entry.time_dims()[0],)))
    return replace(late, reference=lambda m: make(replaced(m, rows, by)), tight=False), rows


def conv(kernel: int = 3, dilation: int = 1, stride: int = 1, padding: int | None = None, c: int = 4) -> nn.Conv1d:
    return nn.Conv1d(c, 4, kernel, stride, (kernel - 1) // 2 * dilation if padding is None else padding, dilation)


def behind_edges() -> nn.Conv1d:
    layer = conv(padding=0)
    layer.behind_edges = True  # its operand was padded by copies of the edges, and is padded so further
    return layer


def entry(name: str, factory: Callable[[], nn.Module], *shapes: tuple[int, ...], **fields: Any) -> Any:
    clips = shapes or (CLIP,)
    generator = torch.Generator().manual_seed(5)
    examples = [torch.randn(shape, generator=generator) for shape in clips]
    return pytest.param(
        Entry(name, lambda: randomise(factory(), *examples), clips, **fields), id=name.replace(" ", "-")
    )


def of(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(layer() for layer in layers))


def fn(forward: Callable[..., Any], **layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Graph(forward, **{name: make() for name, make in layers.items()})


def pooled(m: Any) -> Reference:
    return Reference(m.trunk, (Window(lambda x: m.head(x.mean(2))),))


CASES = [
    entry("chain", of(conv, nn.ReLU, lambda: conv(5), nn.ReLU, conv)),
    entry("batch norm", of(conv, lambda: nn.BatchNorm1d(4), nn.ReLU, conv, lambda: nn.BatchNorm1d(4))),
    entry("dilated", of(lambda: conv(3, 2), nn.ReLU, lambda: conv(3, 4))),
    entry("even", of(lambda: conv(4, padding=2), nn.ReLU, lambda: conv(2, padding=1))),
    entry("not padded", of(lambda: conv(padding=0), nn.ReLU, conv)),
    entry("much padding", of(lambda: conv(padding=3), nn.ReLU, lambda: conv(5))),
    entry("same", of(lambda: nn.Conv1d(4, 4, 4, padding="same"), lambda: nn.Conv1d(4, 4, 5, padding="same"))),
    entry("strided", of(conv, lambda: conv(5, stride=2), nn.ReLU, conv, lambda: conv(3, stride=2))),
    entry("pools", of(lambda: nn.MaxPool1d(3, 1, 1), conv, lambda: nn.AvgPool1d(3, 1, 1))),
    entry("strided pools", of(conv, lambda: nn.MaxPool1d(3, 2, 1), conv, lambda: nn.AvgPool1d(3, 2, 1))),
    entry("pools of other kinds", of(lambda: nn.AvgPool1d(3, 1, 1, count_include_pad=False),
                                     lambda: nn.MaxPool1d(3, 2, 1, ceil_mode=True), conv)),
    entry("residual", fn(lambda m, x: torch.relu(x + m.b(torch.relu(m.a(x)))), a=conv, b=conv)),
    entry("residual of residuals", fn(lambda m, x: m.c(x + m.a(x)) + x + m.b(x), a=conv, b=lambda: conv(5), c=conv)),
    entry("inception", fn(lambda m, x: m.last(torch.cat([m.a(x), m.b(m.c(x)), m.d(m.pool(x))], 1)),
                          a=lambda: conv(1), b=conv, c=conv, d=lambda: conv(1), pool=lambda: nn.MaxPool1d(3, 1, 1),
                          last=lambda: conv(c=12))),
    entry("dense", fn(lambda m, x: m.b(torch.cat([x, m.a(x)], 1)), a=conv, b=lambda: conv(c=8))),
    entry("padded by itself", fn(lambda m, x: m.b(m.a(F.pad(x, (2, 0)))), a=lambda: conv(padding=0), b=conv)),
    entry("padded in front of a chain", fn(lambda m, x: m.c(m.b(m.a(F.pad(x, (4, 0))))), a=lambda: conv(padding=0),
                                           b=lambda: conv(padding=0), c=conv)),
    entry("replicate", fn(lambda m, x: m.b(m.a(F.pad(x, (1, 1), mode="replicate"))), a=behind_edges, b=conv)),
    entry("several outputs", fn(lambda m, x: ((a := m.a(x)), m.b(a), m.c(x)), a=conv, b=conv, c=lambda: conv(1)),
          reference=lambda m: Reference(m, (0, 1, 2), (2, 2, 2))),
    entry("recurrent", fn(lambda m, x: m.rnn(m.a(x).transpose(1, 2))[0].transpose(1, 2), a=lambda: conv(5),
                          rnn=lambda: nn.GRU(4, 2, batch_first=True)), (1, 4, 8), nan_start=False, causal=True),
    entry("window", fn(lambda m, x: m.head(m.trunk(x).mean(2)), trunk=of(conv, nn.ReLU, lambda: conv(5)),
                       head=lambda: nn.Linear(4, 3)), reference=pooled),
    entry("longer window", fn(lambda m, x: m.head(m.trunk(x).mean(2)), trunk=of(conv, nn.ReLU, lambda: conv(5)),
                              head=lambda: nn.Linear(4, 3)), (1, 4, 8), reference=pooled, options={"window": 16}),
    entry("transposed", of(conv, lambda: nn.ConvTranspose1d(4, 4, 4, 2, 1), lambda: conv(5))),
    entry("up-sampling", of(conv, lambda: nn.Upsample(scale_factor=2, mode="linear"), lambda: conv(5))),
    entry("nearest", of(lambda: conv(5, stride=2), lambda: nn.Upsample(scale_factor=2), conv)),
    entry("dense strides", of(conv, lambda: conv(3, stride=2), conv), options={"stride_mode": "dense"}),
    entry("several rates", fn(lambda m, slow, fast: m.last(torch.cat([m.a(slow), m.lateral(m.b(fast))], 1)), a=conv,
                              b=conv, lateral=lambda: conv(5, stride=2), last=lambda: conv(c=8)),
          (1, 4, 6), (1, 4, 12)),
    entry("frames in space", of(lambda: nn.Conv3d(2, 3, 3, padding=1), nn.ReLU,
                                lambda: nn.MaxPool3d(3, (1, 2, 2), 1), lambda: nn.Conv3d(3, 2, 3, padding=1)),
          (1, 2, 8, 6, 6)),
]  # fmt: skip
HELD = [
    # what has no causal form, and the least that its network can do with
    pytest.param(entry("crop", fn(lambda m, x: m.a(x[:, :, 2:]), a=conv)).values[0], 2, id="crop"),
    pytest.param(entry("transposed", of(conv, lambda: nn.ConvTranspose1d(4, 4, 6, 2, 2), conv)).values[0], 1,
                 id="transposed"),
]  # fmt: skip


def late(model: co3d.CompiledModel) -> int:
    """Frames from the newest one back to what the latest output is about."""
    return max(math.ceil((1 + o.delay) * Fraction(o.frames_per_entry or 1)) - 1 for o in model.info.outputs)


def least(case: Entry) -> int:
    """What strides leave of it: an entry is about its first frame, and comes with its last one."""
    return max(math.ceil(o.frames_per_entry or 1) - 1 for o in compiled(case).info.outputs)


QUICK = (
    "dilated",
    "same",
    "pools-of-other-kinds",
    "residual",
    "dense",
    "replicate",
)


@pytest.mark.parametrize("case", few(CASES, *QUICK))
def test_budgets_down_to_none(case: Entry) -> None:
    natural, first = late(compiled(case)), least(case)
    assert natural > first
    half = (natural + first) // 2
    for budget, by in ((natural, "shift"), (natural - 1, "shift"), (half, "drop"), (first, "shift"), (first, "fold")):
        told, rows = limited(case, budget, by)
        assert late(compiled(told)) <= budget
        assert bool(rows) == (budget < natural)
        if rows:
            check(told)


@pytest.mark.parametrize("case, lowest", HELD)
def test_a_budget_that_cannot_be_had(case: Entry, lowest: int) -> None:
    told, _ = limited(case, lowest, "shift")
    assert late(compiled(told)) <= lowest
    check(told)
    with pytest.raises(co3d.UnsupportedError, match=f"than the {lowest} frames? that this network needs") as caught:
        co3d.compile(case.build(), case.examples(), max_delay=lowest - 1)
    assert f"max_delay={lowest}" in str(caught.value)


# One has no ends, one no clip of its own, and of one a clip must have ended before it is known what is cut off there.
WITHOUT_ENDS = {"dense-strides", "longer-window", "not-padded"}


@pytest.mark.parametrize("case", few((c for c in CASES if c.id not in WITHOUT_ENDS), *QUICK))
def test_with_both_ends(case: Entry) -> None:
    budget = least(case) + (case.name == "replicate")  # copies of the first frame come with that frame, not before
    for by in ("shift", "fold"):
        told, rows = limited(replace(case, options={**case.options, "boundary": "exact"}), budget, by)
        assert late(compiled(told)) <= budget
        check_boundary(told, replaced=lambda m, rows=rows, by=by: replaced(m, rows, by))  # type: ignore[misc]


def video() -> nn.Module:
    """A small network for videos: batch norm, a residual, a gate, a head."""
    return Graph(
        lambda m, x: m.head(
            (y := torch.relu(m.bn(m.a(x)))).add(m.b(y) * m.gate(y.mean((2, 3, 4), True))).mean((2, 3, 4))
        ),
        a=nn.Conv3d(2, 4, 3, padding=1),
        bn=nn.BatchNorm3d(4),
        b=nn.Conv3d(4, 4, (5, 3, 3), padding=(2, 1, 1)),
        gate=nn.Sequential(nn.Conv3d(4, 4, 1), nn.Sigmoid()),
        head=nn.Linear(4, 3),
    ).eval()


@pytest.mark.parametrize("by", [slow("shift"), slow("drop"), "fold"])
def test_the_clip_network_is_fine_tuned_and_compiled_again(by: str) -> None:
    torch.manual_seed(0)
    network, clip = video(), torch.randn(1, 2, 8, 5, 5)
    model = co3d.compile(network, (clip,), max_delay=1, delay_by=by)
    rows = model.info.options["limited"]
    assert model.info.delays == {"output": 1} and {row["module_path"] for row in rows} == {"a", "b"}
    module = model.replaced_module()
    clips = torch.randn(3, 2, 8, 5, 5)
    torch.testing.assert_close(module(clips), replaced(network, rows, by)(clips))
    assert module.state_dict().keys() == network.state_dict().keys()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.SGD(module.train().parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        module(clips).square().sum().backward()
        optimizer.step()
    assert all(bool((value == before[name]).all()) for name, value in network.state_dict().items())
    assert not torch.equal(module.get_parameter("a.weight"), network.get_parameter("a.weight"))
    again = co3d.compile(module, (clip,))
    assert again.info.delays == {"output": 1}
    result = co3d.verify(again, module, (clip,))
    assert result.passed, result.reason
    network.load_state_dict(module.state_dict())
    result = co3d.verify(co3d.compile(network, (clip,), max_delay=1, delay_by=by), network, (clip,))
    assert result.passed, result.reason


def test_what_is_said_of_it() -> None:
    network, clip = video(), (torch.randn(1, 2, 8, 5, 5),)
    model = co3d.compile(network, clip, max_delay=0, delay_by="shift")
    assert [row["module_path"] for row in model.report().to_dict()["limited"]] == ["a", "b"]
    assert dict(model.report().facts())["reads less of the future"] == "aten.conv3d a, aten.conv3d b"
    result = co3d.verify(model, network, clip)
    assert result.passed and "1 gate over one frame" in result.compared_with
    assert "less of the future in 2 kernels (max_delay=0, delay_by=shift)" in result.compared_with
    assert result.replaced_distance is not None and result.replaced_distance > 0
    other = Graph(lambda m, x: m.head(m.c(x).mean((2, 3, 4))), c=nn.Conv3d(2, 4, 3), head=nn.Linear(4, 3)).eval()
    with pytest.raises(co3d.VerificationError, match="no such operator"):
        co3d.verify(model, other, clip)


@pytest.mark.parametrize("given", [-1, 1.5, True])
def test_budgets_that_are_none(given: Any) -> None:
    with pytest.raises(co3d.UsageError, match="max_delay"):
        co3d.compile(conv().eval(), (torch.randn(CLIP),), max_delay=given)


def test_seconds_on_the_command_line() -> None:
    assert [frames_of(delay, 10) for delay in (3, "0.5s", "0.19s", None)] == [3, 5, 1, None]
    with pytest.raises(co3d.UsageError, match="no rate is given"):
        frames_of("0.5s", None)


def test_the_future_that_weighs_least_goes_first() -> None:
    """Of three kernels in a row the lightest; of two branches and what stands behind them the cheaper side."""
    chain = nn.Sequential(conv(), conv(), conv()).eval()
    for layer, future in zip(chain, (0.5, 0.1, 0.3), strict=True):
        layer.weight.data = torch.ones_like(layer.weight)
        layer.weight.data[:, :, 2] = future
    example = (torch.randn(CLIP),)
    chosen = [co3d.compile(chain, example, max_delay=b).info.options["limited"] for b in (2, 1)]
    assert [[row["module_path"] for row in rows] for rows in chosen] == [["1"], ["1", "2"]]
    for behind, expected in ((0.15, {"last"}), (5.0, {"a", "b"})):
        branches = Graph(lambda m, x: m.last(m.a(x) + m.b(x)), a=conv(), b=conv(), last=conv()).eval()
        for name, future in (("a", 0.1), ("b", 0.1), ("last", behind)):
            weight = branches.get_submodule(name).weight
            weight.data = torch.ones_like(weight)
            weight.data[:, :, 2] = future
        rows = co3d.compile(branches, example, max_delay=1).info.options["limited"]
        assert {row["module_path"] for row in rows} == expected


def test_no_more_than_the_budget_needs() -> None:
    """A kernel over seven frames is left two frames of its future where one must go."""
    model = co3d.compile(conv(7).eval(), (torch.randn(CLIP),), max_delay=2, delay_by="shift")
    assert [(row["later"], row["future"]) for row in model.info.options["limited"]] == [(1, 2)]
