"""The front end of TorchScript: from a scripted or traced module to an exported program."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from co3d_compile.capture.known_constants import Args, Kwargs, T, tensors_of
from co3d_compile.errors import CaptureError

aten = torch.ops.aten
DECIDE = "Decide it in Python before the model is captured, or compute both and choose with torch.where."


def exported_script(script: torch.jit.ScriptModule, clip: tuple[pytree.PyTree, ...]) -> ExportedProgram:
    """Exports a script by PyTorch's converter, or its operators one by one as they run on the clip.

    The converter leaves open what a script computes from sizes in Python (``x.size(0) // 8``), which no rule can read,
    and the sizes of the clip, which are those of the example here as they are for other networks.
    """
    from torch._export.converter import TS2EPConverter

    try:
        program = TS2EPConverter(script, clip, {}).convert()
        if any(node.target is aten._local_scalar_dense.default for node in program.graph.nodes):
            return _run(script, clip)
        return torch.export.export(program.module(), clip, strict=False)
    except Exception:
        return _run(script, clip)


def _run(script: torch.jit.ScriptModule, clip: tuple[pytree.PyTree, ...]) -> ExportedProgram:
    """Records the operators of one run."""

    def watched(*values: pytree.PyTree) -> pytree.PyTree:
        with _NothingDecided(values):
            return script(*values)

    graph = make_fx(watched, _error_on_data_dependent_ops=False)(*clip)
    return torch.export.export(graph, clip, strict=False)


class _NothingDecided(TorchDispatchMode):
    """A mode that refuses to read a number from a tensor that depends on the clip: another one has another number."""

    def __init__(self, clip: tuple[pytree.PyTree, ...]) -> None:
        super().__init__()
        self._depends = WeakIdKeyDictionary(dict.fromkeys(tensors_of(clip), True))

    def __torch_dispatch__(
        self, func: Callable[..., T], types: Args, args: Args = (), kwargs: Kwargs | None = None
    ) -> T:
        """Runs an operator; what it computes depends on the clip if an operand does."""
        depends = any(t in self._depends for t in tensors_of((args, kwargs)))
        if depends and func is aten._local_scalar_dense.default:
            raise CaptureError("The script chooses by the values of a tensor.", hint=DECIDE)
        result = func(*args, **(kwargs or {}))
        if depends:
            self._depends.update(dict.fromkeys(tensors_of(result), True))
        return result
