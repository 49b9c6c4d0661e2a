"""A session of ONNX Runtime on the CPU for a file as it is: to look at a file, and to time one."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeAlias

import onnxruntime as ort

from co3d_compile.support.plain_types import Array

Values: TypeAlias = dict[str, Array]
SILENT = 4  # ONNX Runtime's level of fatal errors: what it would warn of is raised, or is no matter here


def cpu_session(
    model: str | os.PathLike[str] | bytes, *, threads: int = 0, optimized: bool = True
) -> ort.InferenceSession:
    """Opens a file.

    Args:
        model: Its path or its bytes.
        threads: Of one run; 0: as many as ONNX Runtime chooses.
        optimized: Whether ONNX Runtime may rewrite the graph, which changes the last bits of some values.
    """
    options = ort.SessionOptions()
    options.log_severity_level = SILENT
    options.intra_op_num_threads = threads
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def by_name(session: ort.InferenceSession) -> Callable[[Values], Values]:
    """Makes a function that runs a session: from all inputs to all outputs, by their names."""
    names = [output.name for output in session.get_outputs()]
    return lambda given: dict(zip(names, session.run(names, given), strict=True))
