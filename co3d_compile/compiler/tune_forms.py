"""``tune=True``: the form of each continual convolution by measurement on this machine, in ONNX Runtime."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

from co3d_compile.errors import OutputError
from co3d_compile.runtime.session import StreamSession
from co3d_compile.step_graph.convolution_forms import FORMS, Layer, chosen, forced
from co3d_compile.support.atomic_file import whole_file
from co3d_compile.support.machine import cpu_name

if TYPE_CHECKING:
    from co3d_compile.compiler.compiled_model import CompiledModel

CONVOLUTIONS: dict[int, Any] = {0: nn.Conv1d, 1: nn.Conv2d, 2: nn.Conv3d}
OUTSIDE = 8  # channels before and behind the layer that is measured
ROUNDS, SECONDS = 3, 0.05
Progress = Callable[[str, int, int], None]
CompileLayer: TypeAlias = "Callable[[nn.Module, torch.Tensor], CompiledModel]"


def tuned(build: Callable[[], CompiledModel], compile_layer: CompileLayer, progress: Progress | None) -> CompiledModel:
    """Compiles to see which convolutions there are, and again with the fastest form of each.

    Args:
        build: Compiles the model.
        compile_layer: Compiles a network of a single layer, with the clip that it takes.
        progress: Called with ("tune", done, total).
    """
    layers: list[Layer] = []
    with chosen(layers.append):
        compiled = build()
    if not layers:
        return compiled
    with chosen(tune(layers, compile_layer, progress).get):
        return build()


def tune(layers: Iterable[Layer], compile_layer: CompileLayer, progress: Progress | None = None) -> dict[Layer, str]:
    """Finds the fastest form of each layer, measured once for each shape, kind of machine and version of ONNX Runtime.

    Results are kept in ``co3d-compile/tune.json`` of the user's cache folder (``XDG_CACHE_HOME``, or ``~/.cache``). All
    forms are exact, so a wrong choice costs time and nothing else. Nothing else should run meanwhile.

    Args:
        layers: Shapes as ``choose`` meets them (``step_graph/convolution_forms.py``).
        compile_layer: Compiles a network of a single layer, with the clip that it takes.
        progress: Called with ("tune", done, total).
    """
    wanted = [layer for layer in dict.fromkeys(layers) if _is_plain(layer)]
    kept = _read()
    missing = [layer for layer in wanted if _key(layer) not in kept]
    for done, layer in enumerate(missing):
        if progress is not None:
            progress("tune", done, len(missing))
        kept[_key(layer)] = _fastest(layer, compile_layer)
    if missing:
        _write(kept)
    return {layer: kept[_key(layer)] for layer in wanted}


def _is_plain(layer: Layer) -> bool:
    """Says whether a layer at one frame per step is this one: its taps lie evenly, the newest on the new entry."""
    gaps = {a - b for a, b in zip(layer.ages, layer.ages[1:], strict=False)}
    return len(gaps) == 1 and layer.ages[-1] == 0 and min(gaps) > 0 and len(layer.kernel) in CONVOLUTIONS


def _fastest(layer: Layer, compile_layer: CompileLayer) -> str:
    """Compiles the layer between two pointwise ones in each form, and lets these take turns."""
    network, clip = _network(layer)
    sessions = {form: _session(network, clip, form, compile_layer) for form in FORMS}
    frame = np.zeros([1, *clip.shape[1:2], *clip.shape[3:]], np.float32)
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    for _ in range(ROUNDS):
        for form, session in sessions.items():
            times[form].append(_milliseconds(session, frame))
    for session in sessions.values():
        session.close()
    return min(FORMS, key=lambda form: min(times[form]))


def _network(layer: Layer) -> tuple[nn.Module, torch.Tensor]:
    space = len(layer.kernel)
    kind = CONVOLUTIONS[space]
    apart = layer.ages[0] - layer.ages[1]
    body = kind(
        layer.channels,
        layer.outputs,
        (len(layer.ages), *layer.kernel),
        (1, *layer.stride),
        (0, *layer.padding),
        (apart, *layer.dilation),
        layer.groups,
    )
    network = nn.Sequential(
        kind(OUTSIDE, layer.channels, 1), nn.ReLU(), body, nn.ReLU(), kind(layer.outputs, OUTSIDE, 1)
    )
    return network.eval(), torch.zeros(1, OUTSIDE, layer.ages[0] + 1, *layer.size)


def _session(network: nn.Module, clip: torch.Tensor, form: str, compile_layer: CompileLayer) -> StreamSession:
    with forced(form), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return StreamSession(compile_layer(network, clip), layout="plain")


def _milliseconds(session: StreamSession, frame: np.ndarray) -> float:
    """Measures the median of some steps."""
    samples: list[float] = []
    session.step(frame)
    end = time.perf_counter() + SECONDS
    while len(samples) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        session.step(frame)
        samples.append(time.perf_counter() - start)
    return float(np.median(samples)) * 1e3


def _key(layer: Layer) -> str:
    return json.dumps([cpu_name(), os.cpu_count(), ort.__version__, *astuple(layer)])


def _path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "co3d-compile" / "tune.json"


def _read() -> dict[str, str]:
    """Reads what was measured before; nothing, if that cannot be read."""
    try:
        content = json.loads(_path().read_text())
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in content.items() if v in FORMS} if isinstance(content, dict) else {}


def _write(content: dict[str, str]) -> None:
    """Keeps the results; where that is not possible they are measured again next time."""
    path = _path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as written:
            written.write_text(json.dumps(content, indent=0))
    except (OSError, OutputError) as error:
        warnings.warn(f"What was tuned cannot be kept: {error}", stacklevel=2)
