"""What was read from an ONNX clip model, beside the untouched file in ONNX Runtime.

Verification of such a model has two steps: the network that was read against the file, here, and then the compiled file
against that network, as for every model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from co3d_compile.capture.onnx_reader.onnx_file import OnnxSource, is_onnx, read_onnx
from co3d_compile.capture.onnx_reader.onnx_module import OnnxModule
from co3d_compile.errors import VerificationError
from co3d_compile.support.cpu_session import cpu_session
from co3d_compile.verification.clip_model import Example, Model
from co3d_compile.verification.onnx_floats import in_float32

CLIPS = 3
HARDLY = 0.01  # of the largest number
TOLERANCE = 1e-3
"""Standard deviations of an output: random networks amplify rounding."""


def read_clip_model(program: Model | OnnxSource, example_inputs: Example) -> tuple[Model, Example, tuple[str, ...]]:
    """Reads the network to compare with; one read from ONNX is run beside that file first, which a note says."""
    if is_onnx(program):
        clip = read_onnx(program, [tuple(t.shape) for t in example_inputs or ()])
        program, example_inputs = clip.module, example_inputs or clip.example_inputs
    if not isinstance(program, OnnxModule) or program.onnx_source is None or example_inputs is None:
        return program, example_inputs, ()
    shapes = [t.shape for t in example_inputs]
    return program, example_inputs, (check_reading(program, program.onnx_source, shapes),)


def check_reading(module: OnnxModule, source: str | os.PathLike[str] | ir.Model, shapes: list[torch.Size]) -> str:
    """Runs some clips through both, and says how far they are from each other.

    ONNX Runtime runs without its graph optimisations, of which some change values.

    Args:
        module: What was read.
        source: The file that it was read from.
        shapes: The shape of each input.

    Raises:
        VerificationError: They differ; names the first node. A file in half precision or 8 bits is compared in float32.
    """
    session = _session(_bytes(source) if isinstance(source, ir.Model) else source)
    said, apart = "the ONNX file", ""
    if not module.is_exact:
        far, _ = _compared(module, session, shapes)
        session = _session(in_float32(ir.to_proto(module.onnx_model)).SerializeToString())
        said, apart = (
            "the ONNX file, cast to float32 and without rounding to 8 bits,",
            f", and {far:.0e} from the file as it is",
        )
    worst, clip = _compared(module, session, shapes)
    if worst > TOLERANCE:
        where = _first_difference(module, clip) if module.is_exact else ""
        raise VerificationError(
            f"The network that was read is {worst:.1e} standard deviations from {said} in ONNX Runtime{where}.",
            hint="Please report the operator: it is read wrongly.",
        )
    return f"The network that was read is {worst:.0e} standard deviations from {said} in ONNX Runtime{apart}."


def _compared(module: OnnxModule, session: Any, shapes: list[torch.Size]) -> tuple[float, list[NDArray[np.generic]]]:
    """Measures how far what was read is from a file on some clips; also gives the last one of these."""
    generator = torch.Generator().manual_seed(1)
    read, expected = [], []
    for _ in range(CLIPS):
        for floats in (torch.randn, torch.rand):  # a logarithm or a root takes no numbers below zero
            kinds = zip(shapes, session.get_inputs(), strict=True)
            clip = [_random(shape, i.type, floats, generator) for shape, i in kinds]
            found = _run(session, clip)
            if all(np.isfinite(x).all() for x in found if x.dtype.kind == "f"):
                break
        with torch.no_grad():
            read.append([t.numpy() for t in module(*map(torch.from_numpy, clip)).values()])
        expected.append(found)
    outputs = zip(zip(*read, strict=True), zip(*expected, strict=True), strict=True)
    return max(_distance(_clips(a), _clips(b)) for a, b in outputs), clip


def _session(source: Any) -> Any:
    """Opens the file in ONNX Runtime.

    Raises:
        VerificationError: ONNX Runtime cannot open it.
    """
    try:
        return cpu_session(source, optimized=False)
    except Exception as error:  # ONNX Runtime has no classes of errors to name
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise VerificationError(f"ONNX Runtime cannot open the clip model itself: {first}.") from error


def _clips(results: Sequence[Any]) -> NDArray[np.generic]:
    """Joins what several clips give to one array."""
    return np.stack([np.asarray(r) for r in results])


def _run(session: Any, clip: list[NDArray[np.generic]]) -> list[NDArray[np.generic]]:
    """Computes what the file gives for a clip.

    Raises:
        VerificationError: ONNX Runtime cannot run it.
    """
    try:
        results: list[NDArray[np.generic]] = session.run(
            None, {i.name: x for i, x in zip(session.get_inputs(), clip, strict=True)}
        )
    except Exception as error:  # ONNX Runtime has no classes of errors to name
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise VerificationError(f"ONNX Runtime cannot run the clip model itself: {first}.") from error
    return results


def _bytes(model: ir.Model) -> bytes:
    content: bytes = ir.serde.serialize_model(model).SerializeToString()
    return content


def _random(
    shape: torch.Size, kind: str, draw: Callable[..., torch.Tensor], generator: torch.Generator
) -> NDArray[np.generic]:
    floats = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}
    if kind in floats:
        return draw(shape, generator=generator).numpy().astype(floats[kind])
    whole = torch.randint(0, 2 if "bool" in kind else 100, shape, generator=generator).numpy()
    return whole.astype(kind.removeprefix("tensor(").removesuffix(")"))


def _distance(a: NDArray[np.generic], b: NDArray[np.generic]) -> float:
    """Measures the largest difference in standard deviations, of all that is expected or of parts that hardly vary."""
    if a.shape != b.shape:
        return float("inf")
    expected = b.astype(np.float64)
    difference = np.abs(a.astype(np.float64) - expected)
    spread = max(float(expected.std()), HARDLY * float(np.abs(expected).max(initial=0.0)))
    return float(difference.max(initial=0.0) / (spread + 1e-9)) if expected.size else 0.0


def _first_difference(module: OnnxModule, clip: list[NDArray[np.generic]]) -> str:
    """Finds the first node whose output differs, if each node's output can be asked for."""
    model = ir.from_proto(ir.to_proto(module.onnx_model))
    values = [v for node in model.graph for v in node.outputs if v.name]
    graph_outputs = list(model.graph.outputs)
    model.graph.outputs.extend(v for v in values if v not in graph_outputs)
    try:
        session = cpu_session(_bytes(model), optimized=False)
        feeds = {i.name: x for i, x in zip(session.get_inputs(), clip, strict=True)}
        found = dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))
    except Exception:  # a file may have outputs of kinds that ONNX Runtime cannot give
        return ""
    seen = module.all_values([torch.from_numpy(x) for x in clip])
    for node in module.onnx_model.graph:
        for value in node.outputs:
            read = seen.get(value.name or "")
            if read is not None and value.name in found and _distance(read, np.asarray(found[value.name])) > TOLERANCE:
                return f", first at the node {node.name or '?'} ({node.op_type})"
    return ""
