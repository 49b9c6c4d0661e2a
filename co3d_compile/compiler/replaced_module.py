"""The clip network that a file computes, in PyTorch, where kernels read less of the future than in the model."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

from co3d_compile.canonical.limited_forms import limited
from co3d_compile.capture.decompositions import decompositions
from co3d_compile.capture.tracer import doubled, evaluated, export
from co3d_compile.ir.found_parts import Limited
from co3d_compile.support.silence_torch import quiet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClipNetwork:
    """What was compiled.

    Args:
        network: The clip network.
        clip: Its arguments for one clip.
        keywords: Those that it takes by keyword alone.
    """

    network: nn.Module | ExportedProgram
    clip: Sequence[Any] | None
    keywords: Mapping[str, Any]

    def replaced(self, rows: Sequence[Limited], fold: bool) -> nn.Module:
        """Replaces some kernels of a network, for any number of clips where it can be captured so.

        Args:
            rows: What reads less of the future.
            fold: Whether the weights of taps that are left out are added to the last one that is left.
        """
        exported = self._exported().run_decompositions(decompositions())
        graph = exported.graph
        nodes = {n.name: n for n in graph.nodes}
        for row in rows:
            _limit(nodes[row.node], row, fold)
        graph.lint()
        exported.graph_module.recompile()
        with quiet():
            return _own(exported.module(check_guards=False))

    def _exported(self) -> ExportedProgram:
        if isinstance(self.network, ExportedProgram):
            return self.network
        call = tuple(self.clip or ()), dict(self.keywords)
        clips, keywords = doubled(call) or call
        try:
            arguments = inspect.signature(self.network.forward).bind(*clips, **keywords).arguments
            shapes = pytree.tree_map(lambda value: {0: Dim.AUTO} if isinstance(value, Tensor) else None, arguments)
            with torch.no_grad(), evaluated(self.network), quiet():
                return torch.export.export(self.network, clips, keywords, dynamic_shapes=dict(shapes), strict=False)
        except Exception as why:  # the network fixes how many clips it takes
            log.info("the clip network is captured for the example's batch: %s", why)
        return export(self.network, call[0], two=False, keywords=call[1])


def _limit(node: Node, row: Limited, fold: bool) -> None:
    """Writes an operator of an exported graph as it is replaced."""

    def make(target: Any, *args: Any) -> Node:
        with node.graph.inserting_before(node):
            new = node.graph.call_function(target, args)
        new.meta = {key: value for key, value in node.meta.items() if key != "val"}
        return new

    new = limited(node, row.time_dim, row.later, row.dropped, fold, make)
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _own(module: nn.Module) -> nn.Module:
    """Gives the module parameters of its own, to be trained; ``train`` and ``eval`` change nothing in it."""
    for method in ("train", "eval"):
        vars(module).pop(method, None)
    parameters: dict[int, nn.Parameter] = {}
    buffers: dict[int, Tensor] = {}
    for part in module.modules():
        for name, tensor in part._parameters.items():
            if tensor is not None:
                part._parameters[name] = parameters.setdefault(id(tensor), nn.Parameter(tensor.detach().clone()))
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffers.setdefault(id(buffer), buffer.detach().clone())
    return module
