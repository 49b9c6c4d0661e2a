"""Decisions that a model makes in Python by the values of tensors that no input reaches: masks, ranges, buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import Argument
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

T = TypeVar("T")
Args: TypeAlias = tuple[Argument, ...]
Kwargs: TypeAlias = Mapping[str, Argument]
_DECIDES = {Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.item, Tensor.tolist}
_WRITES = {"__setitem__", "__set__"} | {
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
}


class ConstantsKnown(TorchFunctionMode):
    """A mode that knows the numbers of what is made from shapes, numbers and the model's own tensors in tracing.

    The tracer knows shapes only, so ``if mask.any():`` or ``int(torch.linspace(0, t - 1, 4)[i])`` stops it, though
    no input can change the answer. Everything that such tensors are made by is computed beside the tracer as well;
    random numbers are not, since they differ from call to call.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._known = WeakIdKeyDictionary()  # what the tracer knows as a shape: the same in numbers
        self._model, self._own = model, dict(_own(model))

    def numbers(self, tensor: Tensor) -> list[int] | None:
        """Reads the numbers of a row that the tracer knows as a shape; None where they are not known."""
        if tensor not in self._known:
            return None
        with _disable_current_modes():
            found: list[int] = self._known[tensor].flatten().tolist()
        return found

    def __torch_function__(
        self, func: Callable[..., T], types: Args, args: Args = (), kwargs: Kwargs | None = None
    ) -> T:
        """Runs a call, and beside the tracer on numbers if all of its tensors are known."""
        kwargs = kwargs or {}
        if torch._C._meta_in_tls_dispatch_include():  # inside the tracer, which computes shapes
            return func(*args, **kwargs)
        if self._own and isinstance(next(_own(self._model))[1], FakeTensor):  # the tracer's stand-ins are in place
            for name, stand_in in _own(self._model):
                self._know(stand_in, self._own[name])
            self._own = {}
        tensors = tensors_of((args, kwargs))
        known = [t in self._known for t in tensors]
        if tensors and all(known) and func in _DECIDES:
            return self._real(func, args, kwargs)[0]
        result = func(*args, **kwargs)
        made, writes = tensors_of(result), _writes(func, kwargs)
        if all(known) and (made or writes):
            values, random = self._real(func, args, kwargs)
            if not random:
                for tensor, value in zip(made, tensors_of(values), strict=True):
                    self._know(tensor, value)
            elif writes:
                self._known.clear()
        elif writes and any(t in self._known for t in tensors_of((args[:1], kwargs.get("out")))):
            self._known.clear()  # what is written may be a view of any of them
        return result

    def _know(self, tensor: Tensor, value: Tensor) -> None:
        """Remembers numbers. PyTorch is told a single one: it reads sizes, pads and slices from tensors by itself."""
        self._known[tensor] = value
        if isinstance(tensor, FakeTensor) and value.dim() == 0:
            with _disable_current_modes():
                number = value.item()
            tensor.item_memo = number

    def _real(self, func: Callable[..., T], args: Args, kwargs: Kwargs) -> tuple[T, bool]:
        """Makes the same call on numbers; says too whether it drew some at random."""
        args, kwargs = pytree.tree_map_only(Tensor, self._known.__getitem__, (args, kwargs))
        with _disable_current_modes():
            before = torch.get_rng_state()
            values = func(*args, **kwargs)
            random = not torch.equal(before, torch.get_rng_state())
            if random:
                torch.set_rng_state(before)
        return values, random


def _own(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the model's own tensors, by name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def tensors_of(values: pytree.PyTree) -> list[Tensor]:
    """Lists the tensors of a nest of lists, tuples and dicts, in their order."""
    return [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]


def _writes(func: Callable[..., T], kwargs: Kwargs) -> bool:
    """Says whether a call may write into one of its arguments."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _WRITES or bool(kwargs.get("inplace")) or kwargs.get("out") is not None
