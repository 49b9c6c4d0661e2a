"""The stack of Python calls that PyTorch notes for each operator that it traces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import fx


@contextmanager
def without_stack_traces() -> Iterator[None]:
    """Captures no stack of Python calls for each operator: nothing reads it, and a small X3D-S took a fifth longer."""
    before, fx.config.do_not_emit_stack_traces = fx.config.do_not_emit_stack_traces, True
    try:
        yield
    finally:
        fx.config.do_not_emit_stack_traces = before
