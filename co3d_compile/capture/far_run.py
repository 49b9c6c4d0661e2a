"""A network is run on clips of which only the sizes are known: what it does at places far out shows at little cost.

Each operator on the frames is an event. Of what no frame reaches, such as counts, masks and tables, the numbers are
computed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from math import prod
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, UntypedStorage, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from co3d_compile.capture.known_constants import Args, Kwargs, tensors_of
from co3d_compile.capture.tracer import evaluated
from co3d_compile.support.silence_torch import quiet

aten = torch.ops.aten
R = TypeVar("R")
Sign: TypeAlias = tuple[object, ...]
LARGEST = 1 << 20  # numbers of a tensor that are computed
LAYERS = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
LIKE = {aten.zeros_like.default: 0, aten.ones_like.default: 1, aten.new_zeros.default: 0, aten.new_ones.default: 1}
FULL = {aten.full_like.default: 1, aten.new_full.default: 2}


class TooLong(Exception):
    """A clip is too long to be run on."""


@dataclass
class Trace:
    """What a network does with the frames of a clip.

    Args:
        frames: Of the first input.
        signs: What each operator is, apart from its numbers.
        numbers: The numbers of each operator.
        behind: How many operators before it computed what it reads, and which of the results that is.
        sums: Of each constant that it reads.
        lists: Of the lists of tensors that it reads, as ``behind`` has it.
        constants: The tensors that an operator reads and no frame reaches.
    """

    frames: int
    signs: list[Sign] = field(default_factory=list)
    numbers: list[tuple[float, ...]] = field(default_factory=list)
    behind: list[tuple[float, ...]] = field(default_factory=list)
    sums: list[tuple[float, ...]] = field(default_factory=list)
    lists: dict[int, list[tuple[float, ...]]] = field(default_factory=dict)
    constants: dict[int, list[Tensor]] = field(default_factory=dict)


def trace(model: nn.Module, call: tuple[Args, Kwargs], dims: Sequence[int | None], factor: int, most: int) -> Trace:
    """Runs a network on a longer clip.

    Args:
        model: The network, which stays as it is.
        call: Its arguments for one clip, by place and by keyword.
        dims: The time dim of each tensor among them.
        factor: How many times as long the clip is.
        most: Operators that are run at most.

    Raises:
        TooLong: It takes more operators, or larger constants.
        Exception: The network refuses such a clip, or reads the numbers of frames.
    """
    places = iter(dims)
    own = deepcopy(model, {id(p): p for p in model.parameters()})  # it may keep what it computes
    found = Trace(next(x.shape[d] for x, d in zip(tensors_of(call), dims, strict=True) if d is not None) * factor)
    mode = _Far(own, found, most)

    def longer(x: Tensor) -> Tensor:
        dim = next(places)
        shape = [n * factor if d == dim else n for d, n in enumerate(x.shape)]
        return mode.given(torch.empty(shape, dtype=x.dtype, device="meta"))

    args, kwargs = pytree.tree_map_only(Tensor, longer, call)
    with torch.no_grad(), quiet(), evaluated(own) as run, torch.random.fork_rng([]), _Layers(), mode:
        run(*args, **kwargs)
    return found


class _Layers(TorchFunctionMode):
    """A mode in which recurrent layers walk over one frame alone: it says the shapes of their results."""

    def __torch_function__(
        self, func: Callable[..., R], types: Args, args: Args = (), kwargs: Kwargs | None = None
    ) -> R | tuple[Tensor, ...]:
        """Runs a call."""
        x = args[0] if args else None
        whole = getattr(func, "__name__", "") in LAYERS and len(args) == 9 and isinstance(x, Tensor)
        if not whole or not isinstance(x, Tensor):
            return func(*args, **(kwargs or {}))
        time = 1 if args[-1] else 0  # the last argument is batch_first
        first, *last = tensors_of(func(x.narrow(time, 0, 1), *pytree.tree_map_only(Tensor, _sized, args[1:])))
        return first.expand(*[x.shape[d] if d == time else n for d, n in enumerate(first.shape)]), *last


class _Far(TorchDispatchMode):
    """A mode in which tensors have sizes, and numbers too where no frame reaches them."""

    def __init__(self, model: nn.Module, found: Trace, most: int) -> None:
        super().__init__()
        self.found, self.most = found, most
        self._weights = {id(p): name for name, p in model.named_parameters()}
        self._known = WeakIdKeyDictionary()  # the numbers of what has sizes
        self._made = WeakIdKeyDictionary()  # by which operator it was computed, and which of its results it is
        self._results: dict[Hashable, tuple[torch.Size, tuple[int, ...], torch.dtype]] = {}
        self._reached: dict[int, UntypedStorage] = {}  # memory into which something was written that frames reach

    def given(self, x: Tensor) -> Tensor:
        """Notes an input."""
        self._made[x] = (-1, len(self._made))
        return x

    def __torch_dispatch__(
        self, func: OpOverload, types: Args, args: Args = (), given: Kwargs | None = None
    ) -> pytree.PyTree:
        """Runs an operator: on numbers where all of its tensors are known, else on sizes."""
        kwargs: dict[str, pytree.PyTree] = dict(given or {})
        if (made := self._like(func, args, kwargs)) is not None:
            return self._wrapped(made)
        tensors = tensors_of((args, kwargs))
        values = {id(t): self._value(t) for t in tensors}
        if all(v is not None for v in values.values()):
            return self._computed(func, args, kwargs, values)
        for t in tensors[:1] if func._schema.is_mutable else []:
            if (value := values[id(t)]) is not None:
                storage = value.untyped_storage()
                self._reached[storage._cdata] = storage
        self._note(func, args, kwargs, values)
        result = self._of_sizes(func, args, kwargs)
        if func._schema.is_mutable and isinstance(args[0], Tensor):
            result = args[0] if isinstance(result, Tensor) else result
            self._made[args[0]] = (len(self.found.signs) - 1, 0)
        for k, t in enumerate(tensors_of(result)):
            self._made[t] = (len(self.found.signs) - 1, k)
        return result

    def _of_sizes(self, func: OpOverload, args: Args, kwargs: dict[str, pytree.PyTree]) -> pytree.PyTree:
        """Runs an operator on sizes: once for the same ones, since each turn of a loop has them again."""
        key = func, _key(args), _key(sorted(kwargs.items()))
        if (known := self._results.get(key)) is not None:
            return torch.empty_strided(known[0], known[1], dtype=known[2], device="meta")
        sized = pytree.tree_map_only(Tensor, _sized, (args, kwargs))
        result = func(*sized[0], **{**sized[1], **({"device": "meta"} if "device" in kwargs else {})})
        if not func._schema.is_mutable and isinstance(result, Tensor):
            self._results[key] = result.shape, result.stride(), result.dtype
        return result

    def _value(self, t: Tensor) -> Tensor | None:
        """The numbers of a tensor; None where frames reach them."""
        value = self._known.get(t) if t.is_meta else t
        return None if value is None or value.untyped_storage()._cdata in self._reached else value

    def _like(self, func: OpOverload, args: Args, kwargs: dict[str, pytree.PyTree]) -> Tensor | None:
        """Makes what has the size of a tensor, and not its numbers."""
        x = args[0] if args else None
        if not isinstance(x, Tensor) or (func not in LIKE and func not in FULL):
            return None
        given: Sequence[pytree.PyTree] = args
        shape = tuple(given[1]) if str(func).startswith("aten.new_") else tuple(x.shape)
        if prod(shape) > LARGEST:
            return None
        fill = LIKE[func] if func in LIKE else given[FULL[func]]
        return torch.full(shape, fill, dtype=kwargs.get("dtype") or x.dtype)

    def _computed(
        self, func: OpOverload, args: Args, kwargs: dict[str, pytree.PyTree], values: dict[int, Tensor | None]
    ) -> pytree.PyTree:
        """Computes what no frame reaches."""
        takes_device = any(a.name == "device" for a in func._schema.arguments)
        if not values or max(v.numel() for v in values.values() if v is not None) ** 2 > LARGEST:  # as large, perhaps
            sized = pytree.tree_map_only(Tensor, _sized, (args, kwargs))
            self._check(func(*sized[0], **{**sized[1], **({"device": "meta"} if takes_device else {})}))
        own = {id(v): t for t in tensors_of((args, kwargs)) if (v := values[id(t)]) is not None}
        real = pytree.tree_map_only(Tensor, lambda t: values[id(t)], (args, kwargs))
        if "device" in kwargs or not own:
            real[1]["device"] = torch.device("cpu")
        result = func(*real[0], **{k: v for k, v in real[1].items() if k != "device" or takes_device})
        if "empty" in str(func):
            result.zero_()
        return pytree.tree_map_only(Tensor, lambda t: own[id(t)] if id(t) in own else self._wrapped(t), result)

    def _wrapped(self, value: Tensor) -> Tensor:
        self._check(value)
        sizes = _sized(value)
        self._known[sizes] = value
        return sizes

    def _check(self, result: pytree.PyTree) -> None:
        """Refuses a result that is too large.

        Raises:
            TooLong: It is.
        """
        if any(t.numel() > LARGEST for t in tensors_of(result)):
            raise TooLong

    def _note(
        self, func: OpOverload, args: Args, kwargs: dict[str, pytree.PyTree], values: dict[int, Tensor | None]
    ) -> None:
        """Notes an operator on frames."""
        found, at = self.found, len(self.found.signs)
        if at >= self.most:
            raise TooLong
        sign: list[object] = [str(func)]
        numbers: list[float] = []
        behind: list[float] = []
        sums: list[float] = []
        for value in (*args, *kwargs.values()):
            if isinstance(value, (list, tuple)):
                sign.append("list")
                rows = [self._behind(v, at, values) for v in value if isinstance(v, Tensor)]
                found.lists.setdefault(at, []).extend(zip(*rows, strict=True))
                numbers += [float(v) for v in value if isinstance(v, (int, float))]
            elif isinstance(value, Tensor):
                known = values[id(value)]
                sign.append("frames" if known is None else self._weights.get(id(known), known.dim()))
                behind += self._behind(value, at, values)
                if known is not None and id(known) not in self._weights:
                    found.constants.setdefault(at, []).append(known.clone())
                    sums.append(float(known.double().nan_to_num(0.0, 0.0, 0.0).sum()))
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                sign.append("number")
                numbers.append(float(value))
            else:
                sign.append(str(value))
        found.signs.append(tuple(sign))
        found.numbers.append(tuple(numbers))
        found.behind.append(tuple(behind))
        found.sums.append(tuple(sums))

    def _behind(self, value: Tensor, at: int, values: dict[int, Tensor | None]) -> tuple[float, float]:
        """Counts back to the operator that computed what it reads, and names its result; of constants 0."""
        before, which = self._made.get(value, (-1, 0)) if values[id(value)] is None else (at, 0)
        return float(at - before), float(which)


def _key(value: pytree.PyTree) -> Hashable:
    """What the sizes of a result depend on, of an argument."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    return tuple(map(_key, value)) if isinstance(value, (list, tuple)) else (type(value), value)


def _sized(x: Tensor) -> Tensor:
    """A tensor of the same sizes, without numbers."""
    return x if x.is_meta else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
