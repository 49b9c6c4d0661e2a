"""The clip model as it was given: its arguments on one clip, and how it is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from co3d_compile.capture.tracer import evaluated, export
from co3d_compile.errors import UsageError, VerificationError
from co3d_compile.ir.random_runs import equal

Model: TypeAlias = nn.Module | ExportedProgram
Example: TypeAlias = Sequence[Any] | None  # the arguments of one clip; None: those of the exported program
SAME = 1e-5  # in standard deviations: two eager runs of the same clip


@contextmanager
def eager() -> Iterator[None]:
    """Runs eagerly inside, without gradients and without NNPACK, which smears NaN over a whole tensor."""
    with torch.inference_mode(), torch.backends.nnpack.flags(enabled=False):
        yield


def off_by_rounding(clip: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Puts each number of a clip off by as much as float32 rounds."""
    eps = torch.finfo(torch.float32).eps
    floats = torch.float32
    return [x * (1 + eps * (torch.rand(x.shape, generator=generator) - 0.5)) if x.dtype == floats else x for x in clip]


@contextmanager
def results_inside(module: Callable[..., Any], paths: Sequence[str]) -> Iterator[list[Tensor]]:
    """Gives what these modules return while the model runs; nothing, of a program that has no modules any more."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, result: Any) -> None:
        found.extend(t.clone() for t in pytree.tree_leaves(result) if isinstance(t, Tensor))

    known = dict(module.named_modules()) if isinstance(module, nn.Module) else {}
    hooks = [known[path].register_forward_hook(keep) for path in paths if path in known]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def example_of(model: Model, example_inputs: Example) -> tuple[Any, Any]:
    """Makes the arguments of one clip, by place and by keyword."""
    if example_inputs is not None:
        return tuple(example_inputs), {}
    if isinstance(model, ExportedProgram) and model.example_inputs is not None:
        return model.example_inputs
    raise UsageError("example_inputs is needed: the arguments of one clip.")


def by_keyword(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ExportedProgram:
    """Exports a network that takes arguments by keyword alone, with the example that it is verified on.

    Raises:
        VerificationError: What was exported computes something else than the network on these arguments.
    """
    program = export(model, args, False, kwargs)
    with eager(), evaluated(model) as module:
        wanted = pytree.tree_leaves(module(*deepcopy(tuple(args)), **deepcopy(dict(kwargs))))
        got = pytree.tree_leaves(program.module()(*args, **kwargs))
    if not all(equal(a, b, SAME) for a, b in zip(got, wanted, strict=True) if isinstance(b, Tensor)):
        raise VerificationError("The exported network does not compute what the network does.")
    return program


def tensors_of(model: Model, example_inputs: Example) -> list[Tensor]:
    """Lists the tensors of one clip, in the order in which the model takes them."""
    return [t for t in pytree.tree_leaves(example_of(model, example_inputs)) if isinstance(t, Tensor)]


def batch_of(model: Model, example_inputs: Example) -> int:
    """Reads the batch of the example."""
    tensors = tensors_of(model, example_inputs)
    return int(tensors[0].shape[0]) if tensors and tensors[0].dim() else 1
