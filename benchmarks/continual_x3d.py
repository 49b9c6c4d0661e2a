"""CoX3D of continual-inference as an ONNX file, with its states as inputs and outputs."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from continual.onnx import OnnxWrapper
from continual.utils import flatten
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from zoo.continual_x3d import continual_x3d


def export_continual(model: nn.Module, clip_shape: tuple[int, ...], path: Path) -> Path:
    """Writes the step of a CoX3D with the weights of an X3D."""
    net: Any = continual_x3d(copy.deepcopy(model))  # it works on the modules themselves
    frame = torch.zeros(*clip_shape[:2], *clip_shape[3:])
    with torch.no_grad():
        for _ in range(3 * clip_shape[2] + 60):  # until a step gives a result
            net.forward_step(frame)
    states = flatten(_states(net), remove_none=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what tracing says of the library's own branches, line by line
        torch.onnx.export(OnnxWrapper(net), (frame, *states), path, dynamo=False, opset_version=17)
    return path


def _states(module: Any) -> Any:
    """What each module remembers, nested as the modules are."""
    if isinstance(module._state_shape, list):
        return [_states(child) for child in module]
    return list(module.get_state()) if module._state_shape else []


__all__ = ["export_continual"]
