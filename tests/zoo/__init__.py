"""Networks that the compiler must get right, and how each is run untouched.

An `Entry` names a network, its clip shape and what is expected of it. A `Reference` says how the untouched
modules give the expected value of every streamed result: most networks simply run on a longer clip, a network
with a window (global pool, flatten, attention over time) is split into the trunk that streams and the head
that runs on the newest entries.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

# The wheel of torchvision beside a CPU build of torch lacks compiled operators that no video model uses.
sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))

Expect = Literal["streams", "window", "recompute"]
Shape = tuple[int, ...]


def random_tensor(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random numbers of a dtype: whole ones are from 0 to 7."""
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=dtype)
    return torch.randint(0, 8, shape, generator=generator).to(dtype)


@dataclass(frozen=True)
class Window:
    """A model output that `fn` computes on the newest entries of the trunk's tensors in `reads`.

    `crop`: entries that these tensors leave out in front. The delay that a reader is told is less by as many: it is
    that of the newest entry read, wherever the window begins.
    """

    fn: Callable[..., Tensor]
    reads: tuple[int, ...] = (0,)
    crop: int = 0


@dataclass(frozen=True)
class Reference:
    """The untouched model, run so that every streamed result has an expected value.

    Attributes:
        trunk: takes the model's inputs at any length, returns a tensor or a tuple of tensors with a time axis.
        outputs: per model output, the trunk tensor that it is, or the window that gives it.
        time_dims: per trunk tensor, where time is.
        by_clip: the trunk is the input itself and `Window.fn` the whole model: each result is the answer to
            one clip of the newest frames. Right wherever no temporal padding stands before the first window.
        stride: with by_clip, the frames from one clip start to the next (the model's total stride).
    """

    trunk: Callable[..., Any]
    outputs: tuple[int | Window, ...] = (0,)
    time_dims: tuple[int, ...] = (2,)
    by_clip: bool = False
    stride: int = 1


@dataclass(frozen=True)
class Entry:
    """One network of the zoo.

    Attributes:
        name: what tests and reports call it.
        build: returns the seeded module in eval mode.
        shapes: clip shape of each input, batch first.
        expect: how the whole model flows. "streams": every output keeps its time axis; "window": the newest T
            entries give one result; "recompute": part of the network runs again on a buffered window.
        options: keyword arguments of `co3d.compile`.
        time_dim: of all inputs, or per input.
        reference: makes the reference from the module; None: the module itself on a long clip.
        causal: exact from the very first frame, with zero states.
        nan_start: whether all states may start at NaN (recurrent layers may not).
        as_list: the model takes its inputs as one list.
        tight: whether one frame's influence is large enough to be seen at the far end of the receptive field.
        dtypes: of the inputs; none where all are float32.
        captured: the batch of the example clip.
    """

    name: str
    build: Callable[[], nn.Module]
    shapes: tuple[Shape, ...]
    expect: Expect = "streams"
    options: Mapping[str, Any] = field(default_factory=dict)
    time_dim: int | tuple[int, ...] = 2
    reference: Callable[[Any], Reference] | None = None
    causal: bool = False
    nan_start: bool = True
    as_list: bool = False
    tight: bool = False
    dtypes: tuple[torch.dtype, ...] = ()
    captured: int = 1

    def time_dims(self) -> tuple[int, ...]:
        """The time dim of each input."""
        return self.time_dim if isinstance(self.time_dim, tuple) else (self.time_dim,) * len(self.shapes)

    def all_dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtype of each input."""
        return self.dtypes or (torch.float32,) * len(self.shapes)

    def examples(self, batch: int = 1, seed: int = 1) -> tuple[Any, ...]:
        """One random clip, as the arguments of the module's forward."""
        generator = torch.Generator().manual_seed(seed)
        clips = [
            random_tensor((max(batch, self.captured), *shape[1:]), dtype, generator)
            for shape, dtype in zip(self.shapes, self.all_dtypes(), strict=True)
        ]
        return (clips,) if self.as_list else tuple(clips)


MakeReference = Callable[[Any], Reference]


def by_clip(
    *, stride: int = 1, outputs: int = 1, time_dims: tuple[int, ...] = (2,), as_list: bool = False
) -> MakeReference:
    """Reference of a model that gives one result per clip and has no temporal padding before its first window."""

    def make(module: nn.Module) -> Reference:
        def run(k: int) -> Callable[..., Tensor]:
            def fn(*clips: Tensor) -> Tensor:
                result = module(list(clips)) if as_list else module(*clips)
                return result[k] if isinstance(result, (tuple, list)) else result

            return fn

        reads = tuple(range(len(time_dims)))
        windows = tuple(Window(run(k), reads) for k in range(outputs))
        return Reference(lambda *clips: clips, windows, time_dims, by_clip=True, stride=stride)

    return make


def split(trunk: Callable[[Any], Any], head: Callable[[Any], Any], time_dim: int = 2) -> MakeReference:
    """Reference of a model that is `head(trunk(x))`; both are picked from the module."""

    def make(module: nn.Module) -> Reference:
        return Reference(trunk(module), (Window(head(module)),), (time_dim,))

    return make


def long_clip(*time_dims: int) -> MakeReference:
    """Reference of a model whose outputs keep their time axis, at the given dims."""
    return lambda module: Reference(module, tuple(range(len(time_dims))), time_dims)


class Graph(nn.Module):
    """A few layers and the lines of Python that join them."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: Tensor) -> Any:
        return self._forward(self, *inputs)


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def randomise(module: nn.Module, *examples: Any, seed: int = 0, gain: float = 1.0) -> nn.Module:
    """Gives a module seeded weights and non-trivial statistics, and puts it in eval mode.

    Batch norms get the statistics of a random clip, then perturbed, so that no layer dies or explodes; every
    other norm and every bias is random too, so that a lost bias or a wrong order shows.

    Args:
        gain: Scale of the batch norms' weights. At 1 a deep residual network amplifies rounding, as no trained one
            does, whose branches add little each: X3D-L is then 1e-4 from itself in float64, at 0.3 it is 3e-5.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.empty_like(like).uniform_(low, high, generator=generator)

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel() if "pos" not in name else 1
                parameter.normal_(0, fan_in**-0.5 * 1.2, generator=generator)
            elif name.endswith("weight"):
                parameter.copy_(uniform(parameter, 0.6, 1.4))
            else:
                parameter.normal_(0, 0.2, generator=generator)
        norms = [m for m in module.modules() if isinstance(m, _NORMS)]
        for norm in norms:
            norm.weight.mul_(gain)
        _calibrate(module.eval(), norms, examples)
        for norm in norms:
            assert norm.running_mean is not None and norm.running_var is not None
            spread = norm.running_var.sqrt()
            norm.running_mean += spread * uniform(spread, -0.3, 0.3)
            norm.running_var *= uniform(spread, 0.7, 1.4)
            # A channel that this clip left silent would blow up the rounding errors of the next clip.
            norm.running_var.clamp_(min=0.1 * float(norm.running_var.mean()))
    return module


def seeded(factory: Callable[[], nn.Module], *shapes: Shape) -> Callable[[], nn.Module]:
    """Returns what builds a module and gives it seeded weights, with the statistics of a random clip."""

    def build() -> nn.Module:
        generator = torch.Generator().manual_seed(5)
        return randomise(factory(), *(torch.randn(shape, generator=generator) for shape in shapes))

    return build


def _calibrate(module: nn.Module, norms: list[Any], examples: tuple[Any, ...]) -> None:
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    module(*examples)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
