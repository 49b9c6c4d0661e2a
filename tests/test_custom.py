"""Users' own operators, a row per kind: streamed in ONNX Runtime against the module that calls the operator itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from onnxscript import opset18 as onnx
from oracle import check
from torch import Tensor, nn
from zoo import Reference, Window

import co3d_compile as co3d
from co3d_compile.user_operators.declare_rule import scope, unregister

pytestmark = pytest.mark.slow

CLIP = (1, 4, 8, 4, 4)


def define(function: Callable[..., Any]) -> Any:
    """A custom operator that PyTorch knows nothing about but its shapes."""
    operator = torch.library.custom_op(f"co3d_test::{function.__name__}", function, mutates_args=())
    operator.register_fake(function)
    return operator


def before(x: Tensor, d: int = 1) -> Tensor:
    """Entries ``d`` ago, zeros in front."""
    return F.pad(x, (0, 0, 0, 0, d, 0))[:, :, : x.shape[2]]


@define
def soft_clip(x: Tensor, limit: Tensor) -> Tensor:
    return limit * torch.tanh(x / limit)


@define
def blur(x: Tensor) -> Tensor:
    """Over space, each frame by itself; four or five dims."""
    return x + F.pad(x, (1, 0))[..., :-1] + F.pad(x, (0, 0, 1, 0))[..., :-1, :]


@define
def spread(x: Tensor, dim: int) -> Tensor:
    return x - x.mean(dim, keepdim=True)


@define
def blend(x: Tensor, y: Tensor) -> Tensor:
    """Two streams, channels mixed."""
    return x * y.mean(1, keepdim=True)


@define
def difference(x: Tensor, weight: Tensor, d: int = 1) -> Tensor:
    return x - weight[:, None, None, None] * before(x, d)


@define
def shift(x: Tensor) -> Tensor:
    """The shift of TSM: some channels from the entry before, some from the one after."""
    late = F.pad(x[:, 2:], (0, 0, 0, 0, 0, 1))[:, :, 1:]
    return torch.cat([before(x[:, :2]), late], 1)


@define
def every_second(x: Tensor) -> Tensor:
    """Stride 2, three taps, one entry of padding on both sides."""
    return F.max_pool3d(F.pad(x, (0, 0, 0, 0, 1, 1)), (3, 1, 1), (2, 1, 1))


@define
def cropped(x: Tensor) -> Tensor:
    """Two taps, one entry left out in front and at the end."""
    return (x[:, :, 1:-2] * 2 - x[:, :, 2:-1]).clone()


@define
def along_height(x: Tensor) -> Tensor:
    return x - F.pad(x, (0, 0, 1, 0))[:, :, :, :-1]


@define
def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x * 0.5, x.flip(2)


def entry_of_difference(entries: list[Tensor], weight: Tensor, d: int = 1) -> Tensor:
    old, new = entries
    return new - weight[:, None, None] * old


def entry_of_shift(entries: list[Tensor]) -> Tensor:
    old, _, late = entries
    n = old.shape[0]
    return torch.cat([old[:, :2].reshape(n, 2, *old.shape[2:]), late.chunk(2, 1)[1]], 1)


def onnx_difference(x: Any, weight: Any, d: int = 1) -> Any:
    """Reads the batch, which must not become a constant."""
    padded = onnx.Pad(onnx.Reshape(x, onnx.Shape(x)), [0, 0, d, 0, 0, 0, 0, 0, 0, 0])
    return onnx.Sub(x, onnx.Mul(onnx.Unsqueeze(weight, [1, 2, 3]), onnx.Slice(padded, [0], [-d], [2])))


class Net(nn.Module):
    """A convolution, the operator, another convolution."""

    def __init__(self, call: Callable[[Any, Tensor], Tensor], channels: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.call = call
        self.a = nn.Conv3d(4, 4, 3, padding=1)
        self.b = nn.Conv3d(channels, 4, (3, 1, 1), padding=(1, 0, 0))
        self.weight = nn.Parameter(torch.rand(4))
        self.limit = nn.Parameter(torch.rand(1, 4, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.call(self, self.a(x)))
        return y


Register = Callable[[], Any]


def row(name: str, call: Callable[[Any, Tensor], Tensor], register: Register, **fields: Any) -> Any:
    return pytest.param(call, register, fields, id=name.replace(" ", "-"))


def op(operator: Any) -> Any:
    """The operator as models call it."""
    return getattr(torch.ops.co3d_test, operator._qualname.split("::")[1])


TWO = co3d.Kernel(k=2, p=1)


def dilated(x: Tensor, weight: Tensor, d: int = 1) -> co3d.Kernel:
    return co3d.Kernel(k=2, d=d, p=d)


def calls_difference(m: Any, x: Tensor) -> Tensor:
    result: Tensor = difference(x, m.weight)
    return result


def folded(m: Any, x: Tensor) -> Tensor:
    """Frames as a batch, as image models are applied to video."""
    n, c, t, h, w = x.shape
    y = blur(x.transpose(1, 2).reshape(n * t, c, h, w))
    return y.view(n, t, c, h, w).transpose(1, 2)


def late_operand(m: Any, x: Tensor) -> Tensor:
    """The operands arrive at different times: one of them must be held back."""
    result: Tensor = blend(x, m.b(x))
    return result


POINTWISE = [
    row("pointwise as a function", lambda m, x: soft_clip(x, m.limit),
        lambda: co3d.rule(soft_clip, pointwise=True)(lambda x, limit: limit * torch.tanh(x / limit))),
    row("pointwise by decomposition", lambda m, x: soft_clip(x, m.limit),
        lambda: co3d.rule(soft_clip, pointwise=True, decomposition=lambda x, limit: limit * torch.tanh(x / limit))),
    row("pointwise in ONNX", lambda m, x: soft_clip(x, m.limit),
        lambda: co3d.rule(soft_clip, pointwise=True,
                          onnx=lambda x, limit: onnx.Mul(limit, onnx.Tanh(onnx.Div(x, limit))))),
]  # fmt: skip
ENTRIES = [
    row("entries as a function", lambda m, x: blur(x), lambda: co3d.rule(blur, mixes=())(blur._init_fn)),
    row("entries by decomposition", lambda m, x: blur(x),
        lambda: co3d.rule(blur, mixes=(), decomposition=blur._init_fn)),
    row("entries, frames as a batch", folded, lambda: co3d.rule(blur, mixes=(-1, -2))(blur._init_fn)),
    row("channels", lambda m, x: spread(x, 1),
        lambda: co3d.rule(spread, mixes=lambda x, dim: [dim])(lambda x, dim: x - x.mean(1, keepdim=True))),
    row("two operands", late_operand,
        lambda: co3d.rule(blend, mixes=(1,))(lambda x, y: x * y.mean(1, keepdim=True))),
    row("along another dim", lambda m, x: along_height(x),
        lambda: co3d.rule(along_height, kernel=TWO, dim=3)(lambda entries: entries[1] - entries[0])),
]  # fmt: skip
KERNELS = [
    row("kernel as a function", calls_difference,
        lambda: co3d.rule(op(difference), kernel=TWO)(entry_of_difference), delay=2),
    row("kernel by decomposition", calls_difference,
        lambda: co3d.rule(difference, kernel=TWO, decomposition=difference._init_fn), delay=2),
    row("kernel in ONNX", calls_difference, lambda: co3d.rule(difference, kernel=TWO, onnx=onnx_difference), delay=2),
    row("dilation", lambda m, x: difference(x, m.weight, 3),
        lambda: co3d.rule(difference, kernel=dilated)(entry_of_difference), delay=2),
    row("dilation by decomposition", lambda m, x: difference(x, m.weight, 3),
        lambda: co3d.rule(difference, kernel=dilated, decomposition=difference._init_fn), delay=2),
    row("shift", lambda m, x: shift(x),
        lambda: co3d.rule(shift, kernel=co3d.Kernel(k=3, p=1))(entry_of_shift), delay=3),
    row("stride", lambda m, x: every_second(x),
        lambda: co3d.rule(every_second, kernel=co3d.Kernel(k=3, s=2, p=1, p_end=1))(
            lambda entries: torch.stack(entries).amax(0))),
    row("stride by decomposition", lambda m, x: every_second(x),
        lambda: co3d.rule(every_second, kernel=co3d.Kernel(k=3, s=2, p=1, p_end=1),
                          decomposition=every_second._init_fn)),
    row("crop", lambda m, x: cropped(x), lambda: co3d.rule(cropped, kernel=co3d.Kernel(k=2, p=-1))(
        lambda entries: entries[0] * 2 - entries[1]), clip=(1, 4, 10, 4, 4)),
    row("crop by decomposition", lambda m, x: cropped(x),
        lambda: co3d.rule(cropped, kernel=co3d.Kernel(k=2, p=-1), decomposition=cropped._init_fn)),
    row("decomposition alone", calls_difference,
        lambda: co3d.rule(difference, decomposition=difference._init_fn), delay=2),
]  # fmt: skip


@pytest.mark.parametrize(("call", "register", "fields"), [*POINTWISE, *ENTRIES, *KERNELS])
def test_streams_like_the_module(call: Any, register: Register, fields: dict[str, Any]) -> None:
    clip, delay = fields.get("clip", CLIP), fields.get("delay")
    with scope():
        register()
        facts = check(Net(call).eval(), (torch.zeros(clip),), batch=2, tight=delay is not None)
    assert facts.recomputed == ()
    assert delay is None or facts.delays == (delay,)


@pytest.mark.parametrize("options", [{"frames_per_step": 4}, {"stride_mode": "dense"}], ids=["4-frames", "dense"])
@pytest.mark.parametrize("given", ["function", "decomposition"])
def test_stride_in_other_modes(options: dict[str, Any], given: str) -> None:
    kernel = co3d.Kernel(k=3, s=2, p=1, p_end=1)
    with scope():
        if given == "function":
            co3d.rule(every_second, kernel=kernel)(lambda entries: torch.stack(entries).amax(0))
        else:
            co3d.rule(every_second, kernel=kernel, decomposition=every_second._init_fn)
        check(Net(lambda m, x: every_second(every_second(x))).eval(), (torch.zeros(CLIP),), options=options)


def test_four_dims_at_one_frame_per_step() -> None:
    with scope():
        co3d.rule(difference, kernel=TWO)(entry_of_difference)
        compiled = co3d.compile(Net(calls_difference).eval(), (torch.zeros(CLIP),))
    assert all(len(n.meta["val"].shape) <= 4 for n in compiled.program.graph.nodes if n.op == "call_function")
    assert ("co3d_test.difference", "continual") in compiled.program.notes.actions


# Windows


def over_time(m: Any, x: Tensor) -> Tensor:
    result: Tensor = spread(x, 2)
    return result


WINDOWS = [
    row("time is mixed", over_time,
        lambda: co3d.rule(spread, mixes=lambda x, dim: [dim], decomposition=spread._init_fn)),
    row("translation alone", over_time, lambda: co3d.rule(
        spread, onnx=lambda x, dim: onnx.Sub(x, onnx.ReduceMean(x, onnx.Constant(value_ints=[dim]), keepdims=1)))),
    row("several results", lambda m, x: halves(x)[0] + halves(x)[1],
        lambda: co3d.rule(halves, onnx=lambda x: (onnx.Mul(x, 0.5), onnx.Slice(x, [-1], [-(2**40)], [2], [-1])))),
    row("entries behind", lambda m, x: blur(x.flip(2)), lambda: co3d.rule(blur, mixes=())(blur._init_fn)),
    row("kernel behind", lambda m, x: shift(x.flip(2)),
        lambda: co3d.rule(shift, kernel=co3d.Kernel(k=3, p=1))(entry_of_shift)),
    row("stride behind", lambda m, x: every_second(x.flip(2)),
        lambda: co3d.rule(every_second, kernel=co3d.Kernel(k=3, s=2, p=1, p_end=1),
                          decomposition=every_second._init_fn)),
    row("pointwise behind", lambda m, x: soft_clip(x.flip(2), m.limit),
        lambda: co3d.rule(soft_clip, pointwise=True)(lambda x, limit: limit * torch.tanh(x / limit))),
]  # fmt: skip


class Windowed(Net):
    """The operator at the end."""

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, self.a(x)).amax((2, 3, 4))


@pytest.mark.parametrize(("call", "register", "fields"), WINDOWS)
def test_on_a_window(call: Any, register: Register, fields: dict[str, Any]) -> None:
    def reference(m: Any) -> Reference:
        return Reference(m.a, (Window(lambda y: m.call(m, y).amax((2, 3, 4))),))

    options = {"window": 12}  # longer than the clip
    with scope():
        register()
        facts = check(Windowed(call).eval(), (torch.zeros(CLIP),), options=options, reference=reference, batch=2)
    assert facts.recomputed


# What is refused


def compiles(register: Register, call: Any = calls_difference) -> Any:
    with scope():
        register()
        return co3d.compile(Net(call).eval(), (torch.zeros(CLIP),))


WRONG: list[tuple[Register, str]] = [
    (lambda: co3d.rule(difference, kernel=TWO)(lambda entries, weight: entries[0] - entries[1]), "differ by"),
    (lambda: co3d.rule(difference, kernel=co3d.Kernel(k=2, p=0, p_end=1))(entry_of_difference), "differ by"),
    (lambda: co3d.rule(difference, kernel=co3d.Kernel(k=1), decomposition=difference._init_fn), "differ by"),
    (lambda: co3d.rule(difference, mixes=())(lambda x, weight: x), "differ by"),
    (lambda: co3d.rule(difference, kernel=co3d.Kernel(k=2, p=1, p_end=3))(entry_of_difference), "makes 11 entries"),
    (lambda: co3d.rule(difference, kernel=TWO)(lambda entries, weight: entries[0][:, :2]), "entry of shape"),
    (lambda: co3d.rule(difference, kernel=TWO)(lambda entries: entries[0]), "TypeError"),
    (lambda: co3d.rule(difference, kernel=lambda x: TWO)(entry_of_difference), "TypeError"),
    (lambda: co3d.rule(difference, kernel=TWO), "no ONNX operator"),
    (lambda: co3d.rule(difference, kernel=TWO, onnx=lambda x, weight: onnx.Sub(x, unknown)), "NameError"),  # noqa: F821
    (lambda: co3d.rule(difference, kernel=TWO, onnx=lambda x, weight: onnx.Gather(x, onnx.ArgMax(x, keepdims=0) + 9)),
     "cannot run the compiled file"),
    (lambda: unregister(difference), "no ONNX operator"),
]  # fmt: skip


@pytest.mark.parametrize(("register", "message"), WRONG)
def test_a_wrong_rule_names_the_operator(register: Register, message: str) -> None:
    with pytest.raises(co3d.Co3dError, match=message) as raised:
        compiles(register)
    assert raised.value.operator == "co3d_test.difference"


def test_a_function_must_not_depend_on_the_number_of_streams() -> None:
    def entry(entries: list[Tensor], weight: Tensor) -> Tensor:
        return entries[1] - weight[:, None, None] * entries[0] * torch.ones(entries[0].shape[0], 1, 1, 1)

    with pytest.raises(co3d.UsageError, match="number of streams"):
        compiles(lambda: co3d.rule(difference, kernel=TWO)(entry))


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        (difference, {}),
        (difference, {"pointwise": True, "mixes": ()}),
        (torch.ops.aten.relu, {"pointwise": True}),
        (halves, {"mixes": ()}),
        (torch.ops.aten.conv3d, {"kernel": TWO}),
        ("aten.relu", {"pointwise": True}),
    ],
)
def test_a_rule_that_cannot_be(operator: Any, arguments: dict[str, Any]) -> None:
    with scope(), pytest.raises(co3d.UsageError):
        co3d.rule(operator, **arguments)


def test_a_function_needs_to_know_what_it_is_for() -> None:
    with scope(), pytest.raises(co3d.UsageError, match="needs pointwise, mixes or kernel"):
        co3d.rule(difference, decomposition=difference._init_fn)(entry_of_difference)


def test_nothing_is_left_behind() -> None:
    with scope():
        co3d.rule(difference, kernel=TWO, onnx=onnx_difference)(entry_of_difference)
        co3d.rule(difference, kernel=TWO)(entry_of_difference)  # again, as in a notebook: the newest holds
        compiles(lambda: None)
    with pytest.raises(co3d.UnsupportedError, match="no ONNX operator"):
        compiles(lambda: None)
