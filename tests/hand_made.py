"""Small ONNX models made by hand, with their contract, and what numpy says of them, to test the running side."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from co3d_compile.contract.model_contract import Contract, InputSpec, OutputSpec, Recomputed, StateSpec
from co3d_compile.runtime.session import StreamSession

KINDS = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}
GOOD = np.zeros((2, 2, 3), np.float32)  # a frame of two streams for ``fir``
FIR = ((0.5, -2.0),)  # the taps behind the newest frame, one tuple for each chain of states
ROOT = Path(__file__).parents[1]


class Nodes(list[onnx.NodeProto]):
    """A graph being written: ``nodes("Add", "a", "b")`` returns the name of the result."""

    def __call__(self, operator: str, *inputs: str, result: str | None = None, **attributes: Any) -> str:
        name = result or f"t{len(self)}"
        self.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def constant(self, value: Any, dtype: str = "float32") -> str:
        return self("Constant", value=onnx.numpy_helper.from_array(np.asarray(value, dtype)))


def build(nodes: Nodes, contract: Contract, metadata: str | None = None) -> bytes:
    inputs = [(item.name, item.dtype, item.shape) for item in contract.inputs]
    if contract.valid:
        inputs.append((contract.valid, "bool", ("N", contract.inputs[0].frames_per_step or 1)))
    inputs += [(state.input, state.dtype, state.shape) for state in contract.states]
    outputs = [(item.name, item.dtype, item.shape) for item in contract.outputs]
    renamed = {state.input for state in contract.states}
    outputs += [(state.output, state.dtype, state.shape) for state in contract.states if state.output not in renamed]
    sides = [[helper.make_tensor_value_info(n, KINDS[d], shape) for n, d, shape in side] for side in (inputs, outputs)]
    graph = helper.make_graph(nodes, "g", sides[0], sides[1])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    helper.set_model_props(model, {"co3d": contract.to_json() if metadata is None else metadata})
    return model.SerializeToString()


def fir_parts(
    chains: tuple[tuple[float, ...], ...] = FIR, renamed: bool = False, initial: float = 0.0, reduce: str = "Add"
) -> tuple[Nodes, Contract]:
    """x (N, 2, T, 3) in the clip; y[n] = x[n] + sum over chains and k of taps[k] * x[n-1-k]; a state for each slot."""
    nodes, states = Nodes(), []
    total = nodes("Identity", "x")
    for c, taps in enumerate(chains):
        value = nodes("Identity", "x", result=f"next.{c}.0")
        for k, tap in enumerate(taps):
            name = f"state.conv.{c}.{k}"
            states.append(StateSpec(name, value, ("N", 2, 3), "float32", initial, 0))
            total = nodes(reduce, total, nodes("Mul", name, nodes.constant(tap)))
            if k + 1 < len(taps):
                value = name if renamed else nodes("Identity", name, result=f"next.{c}.{k + 1}")
    nodes("Identity", total, result="y")
    longest = max((len(taps) for taps in chains), default=0)
    contract = Contract(
        compiler_version="0",
        inputs=(InputSpec("x", ("N", 2, 3), "float32", 1, 2),),
        outputs=(OutputSpec("y", ("N", 2, 3), "float32", 0, True, 2, 1),),
        states=tuple(states),
        frames_per_step={"x": 1},
        receptive_field=longest + 1,
        warmup_steps=longest,
        recomputed=(Recomputed("aten.flip", "head", "looks ahead"),),
        options={"state_io": "renamed" if renamed else "paired"},
        labels=("a", "b"),
    )
    return nodes, contract


def fir(*args: Any, **kwargs: Any) -> bytes:
    return build(*fir_parts(*args, **kwargs))


def fir_oracle(x: np.ndarray, chains: tuple[tuple[float, ...], ...] = FIR) -> np.ndarray:
    """x and y (steps, N, 2, 3), zeros before the start."""
    y = x.copy()
    for taps in chains:
        for k, tap in enumerate(taps):
            y[k + 1 :] += np.float32(tap) * x[: max(len(x) - k - 1, 0)]
    return y


def pair() -> bytes:
    """Two inputs at two rates and one without time; two outputs; states of two dtypes, one with its batch at dim 1.

    fast (N, 4, 2), slow (N, 2), gain (N, 1); a = fast * gain + the slow before; b = slow + number of the step.
    """
    nodes = Nodes()
    before = nodes("Transpose", "state.before", perm=[1, 0, 2])
    nodes("Add", nodes("Mul", "fast", nodes("Unsqueeze", "gain", nodes.constant([2], "int64"))), before, result="a")
    nodes("Add", "slow", nodes("Cast", "state.count", to=TensorProto.FLOAT), result="b")
    nodes("Unsqueeze", "slow", nodes.constant([0], "int64"), result="next.before")
    nodes("Add", "state.count", nodes.constant(1, "int64"), result="next.count")
    contract = Contract(
        compiler_version="0",
        inputs=(
            InputSpec("fast", ("N", 4, 2), "float32", 4, 1),
            InputSpec("slow", ("N", 2), "float32", 1, 1),
            InputSpec("gain", ("N", 1), "float32", None, None),
        ),
        outputs=(
            OutputSpec("a", ("N", 4, 2), "float32", -1, True, 1, 4),
            OutputSpec("b", ("N", 2), "float32", 2, False, None, 1),
        ),
        states=(
            StateSpec("state.before", "next.before", (1, "N", 2), "float32", 0.0, 1),
            StateSpec("state.count", "next.count", ("N", 1), "int64", 5.0, 0),
        ),
        frames_per_step={"fast": 4, "slow": 1},
        receptive_field=None,
        warmup_steps=0,
    )
    return build(nodes, contract)


def exact(flush_steps: int = 2) -> bytes:
    """y[n] = x[n] + x[n-2] with x zero wherever it is not valid, two frames a step; x (N, 2, 3)."""
    nodes = Nodes()
    mask = nodes("Unsqueeze", "valid", nodes.constant([2], "int64"))
    inside = nodes("Where", mask, "x", nodes.constant(0.0))
    nodes("Add", inside, "state.0", result="y")
    nodes("Identity", inside, result="next.0")
    contract = Contract(
        compiler_version="0",
        inputs=(InputSpec("x", ("N", 2, 3), "float32", 2, 1),),
        outputs=(OutputSpec("y", ("N", 2, 3), "float32", 0, True, 1, 2),),
        states=(StateSpec("state.0", "next.0", ("N", 2, 3), "float32", 0.0, 0),),
        frames_per_step={"x": 2},
        receptive_field=3,
        warmup_steps=1,
        boundary="exact",
        valid="valid",
        flush_steps=flush_steps,
    )
    return build(nodes, contract)


def frames(steps: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((steps, *shape)).astype(np.float32)


def run(session: StreamSession, x: np.ndarray) -> np.ndarray:
    return np.stack([np.asarray(session.step(frame)) for frame in x])


CHAINS = {
    "fir": FIR,
    "one slot": ((3.0,),),
    "no state": (),
    "delay of 8": ((0.0,) * 7 + (1.0,),),
    "rings of 2, 3 and 5": ((1.0,), (0.5, 2.0), (0.0, 1.0, 0.0, 4.0)),
    "rings that never meet": tuple((float(k),) * k for k in (1, 2, 4, 6, 10)),
}


def metadata(model: bytes) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(onnx.load_from_string(model).metadata_props[0].value)
    return data


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """An edit of metadata: ``states.0.shape`` becomes value; deleted if value is Ellipsis."""

    def edit(data: Any) -> None:
        *steps, last = path.split(".")
        for step in steps:
            data = data[int(step) if isinstance(data, list) else step]
        key = int(last) if isinstance(data, list) else last
        if value is ...:
            del data[key]
        else:
            data[key] = value

    return edit


def python(*arguments: object) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout
