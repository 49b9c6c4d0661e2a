"""Modules that fail while a network is traced, where the network catches that and goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.fx import Tracer

_CALL = Tracer.call_module


@contextmanager
def failures_caught() -> Iterator[None]:
    """Lets a network catch what a module of it raises: PyTorch's tracer stays inside of such a module otherwise.

    ``try: x = layer(x, lengths)``, and ``except TypeError: x = layer(x)``: layers of any kind are called like this.
    """
    Tracer.call_module = _call  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Tracer.call_module = _CALL  # type: ignore[method-assign]


def _call(
    tracer: Tracer, module: nn.Module, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Calls a module, and leaves it also where it fails."""
    depth = len(tracer.module_stack)
    try:
        return _CALL(tracer, module, forward, tuple(args), dict(kwargs))
    except Exception:
        while len(tracer.module_stack) > depth:
            tracer.module_stack.popitem()
        raise
