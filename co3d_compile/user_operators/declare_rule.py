"""Users' own operators: what one does to time, how one entry of its output is computed, and how it goes to ONNX."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar
from unittest import mock

from torch._ops import OpOverload

from co3d_compile.capture.decompositions import DECOMPOSITIONS
from co3d_compile.errors import UsageError
from co3d_compile.ir.index_equation import Kernel
from co3d_compile.ir.node_reading import Operator, operator_name, overloads
from co3d_compile.onnx_export.by_torch_exporter import TRANSLATIONS
from co3d_compile.rules import RULES, is_pointwise
from co3d_compile.user_operators.custom_rule import CustomRule
from co3d_compile.user_operators.entry_function import Function

F = TypeVar("F", bound=Function)


def rule(
    operator: Operator,
    *,
    pointwise: bool = False,
    mixes: Sequence[int] | Callable[..., Sequence[int]] | None = None,
    kernel: Kernel | Callable[..., Kernel] | None = None,
    dim: int | Callable[..., int] = 2,
    decomposition: Function | None = None,
    onnx: Operator | None = None,
) -> Callable[[F], F]:
    """Says what an operator does to time. Used as a decorator, the function computes one entry of its output.

    At most one of ``pointwise``, ``mixes`` and ``kernel`` is given. Where one of them depends on the call, it is a
    function of the operator's own arguments, such as ``lambda x, dilation: co3d.Kernel(k=3, d=dilation)``.

    The decorated function takes the operator's arguments, time taken out of each: ``(N, C, T, H, W)`` comes as
    ``(N, C, H, W)``; with ``kernel`` the first is the list of the k entries that are read, oldest first. It returns
    one entry. It is written in PyTorch operators, which go to ONNX as such. Without it, the operator itself (or its
    ``decomposition``) is applied to these entries, stacked on the time dim.

    Args:
        operator: ``torch.ops.mylib.op``, one overload of it, or what ``torch.library.custom_op`` returned.
        pointwise: Each element is computed by itself; operands are broadcast.
        mixes: The dims over which it computes, of any operand; ``()`` means that each entry is computed by itself.
            With time among them it is applied to a window.
        kernel: It slides over time: ``y[o]`` reads ``x[o*s + i*d - p]`` of the first operand, and of no other.
        dim: The dim over which ``kernel`` slides; where that dim is not time, entries are computed by themselves.
        decomposition: The same in PyTorch operators, with the operator's own arguments. Given alone, it takes the
            operator's place when a model is captured, and nothing else need be said.
        onnx: The ONNX translation, an onnxscript function as ``torch.onnx.export`` takes it.

    Raises:
        UsageError: The arguments say nothing or too much, or the operator has a rule of its own.
    """
    given = [pointwise, mixes is not None, kernel is not None]
    targets = _overloads(operator)
    if not targets:
        hint = "Give torch.ops.mylib.op, or what torch.library.custom_op returned."
        raise UsageError(f"{operator!r} is no operator of PyTorch.", hint=hint)
    refuse(targets, sum(given), decomposition is None and onnx is None)
    unregister(operator)
    custom = CustomRule(pointwise, mixes, kernel, dim, decomposition, onnx is not None)
    _enter(targets, custom if any(given) else None, decomposition, onnx)

    def add(function: F) -> F:
        if not any(given):
            raise UsageError(
                "A function for one entry needs pointwise, mixes or kernel.", operator=operator_name(targets[0])
            )
        custom.function = function
        return function

    return add


def _overloads(operator: Operator) -> list[OpOverload]:
    """Lists the overloads of what a user gives as an operator; none of what is no operator of PyTorch."""
    found = overloads(getattr(operator, "_opoverload", operator))
    return [target for target in found if isinstance(target, OpOverload)]


def _enter(
    targets: list[OpOverload], custom: CustomRule | None, decomposition: Function | None, onnx: Operator | None
) -> None:
    """Enters what is said of an operator into the tables."""
    if onnx is not None:
        TRANSLATIONS.update(dict.fromkeys(targets, onnx))
    if custom is not None:
        RULES.update(dict.fromkeys(targets, custom))
    elif decomposition is not None:
        DECOMPOSITIONS.update(dict.fromkeys(targets, decomposition))


def refuse(targets: list[OpOverload], kinds: int, untranslated: bool) -> None:
    """Refuses a rule that says nothing or too much, or that another rule would hide."""
    name = operator_name(targets[0])
    if kinds > 1:
        raise UsageError("pointwise, mixes and kernel exclude each other.", operator=name)
    if not kinds and untranslated:
        raise UsageError(
            "The rule says nothing.", operator=name, hint="Give pointwise, mixes, kernel, decomposition or onnx."
        )
    for target in targets:
        owned = target.namespace == "aten" and is_pointwise(target)
        if owned or not isinstance(RULES.get(target, CustomRule()), CustomRule):
            raise UsageError("This operator has a rule of its own.", operator=name)
        if kinds and [str(r.type) for r in target._schema.returns] != ["Tensor"]:
            raise UsageError(
                "It does not return one tensor.",
                operator=name,
                hint="Give its decomposition alone, or onnx alone: then it is applied to a window.",
            )


def unregister(operator: Operator) -> None:
    """Forgets what :func:`rule` said about an operator."""
    for target in _overloads(operator):
        if isinstance(RULES.get(target), CustomRule):
            del RULES[target]
        TRANSLATIONS.pop(target, None)
        DECOMPOSITIONS.pop(target, None)


@contextmanager
def scope() -> Iterator[None]:
    """Forgets at the end what is registered inside: for tests."""
    with mock.patch.dict(RULES), mock.patch.dict(TRANSLATIONS), mock.patch.dict(DECOMPOSITIONS):
        yield
