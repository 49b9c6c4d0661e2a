"""A module that runs the nodes of an ONNX graph with PyTorch, to be traced by ``torch.export`` as any other.

Shapes and indices are plain numbers while the model is traced (``numpy`` arrays); everything that depends on frames is
a tensor. An operator whose inputs are all numbers is computed by ONNX's own reference implementation.
"""

from __future__ import annotations

import inspect
import keyword
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.fx import GraphModule

from co3d_compile.capture.onnx_reader import (  # noqa: F401  (they fill TABLE)
    convolutions,
    elementwise_operators,
    fourier_operators,
    indexing,
    matrix_products,
    normalizations,
    pools,
    quantization,
    recurrent_layers,
    reductions,
    resizing,
    shape_operators,
    tensor_lists,
)
from co3d_compile.capture.onnx_reader.clip_places import Place, for_all_clips
from co3d_compile.capture.onnx_reader.constants import core, counted
from co3d_compile.capture.onnx_reader.control_flow import CONTROL, Values, controlled
from co3d_compile.capture.onnx_reader.graph_facts import (
    check_operators,
    graphs_of,
    has_half_precision,
    is_quantized,
    nodes_of,
)
from co3d_compile.capture.onnx_reader.node_call import TABLE, Compute, Host, NodeCall, Result, Value, as_tensor
from co3d_compile.errors import Co3dError, LoadError, UsageError

SHAPE_LIKE = 1 << 20  # whole numbers, at most so many, may be shapes or indices; more are data


class Scope(nn.Module):
    """A module of the network that the file was exported from. It gives the operators inside their module path."""

    def forward(self, compute: Compute, call: NodeCall, inputs: Sequence[Value]) -> Result:
        """Computes one operator."""
        return compute(call, *inputs)


class OnnxModule(nn.Module):
    """The network of an ONNX file. ``forward`` takes its inputs by their names and returns a dict of its outputs.

    Attributes:
        onnx_model: The model whose nodes are run, its functions written out.
        onnx_source: The file, or the model as it was given.
        is_exact: Whether the numbers are those of the file: neither half precision nor 8 bits stand in it.
        is_for_several: Whether several clips may be given, where the file fixes its batch.
    """

    def __init__(self, model: ir.Model, source: str | os.PathLike[str] | ir.Model | None = None) -> None:
        super().__init__()
        self.onnx_model, self.onnx_graph = model, model.graph
        self.onnx_source = source
        self.onnx_clips = 1
        self.onnx_places: dict[ir.Value, Place] = {}
        self.is_for_several = True
        self.is_exact = not _approximates(model.graph)
        self.onnx_opset = model.graph.opset_imports.get("", model.opset_imports.get("", 1))
        self._names: dict[ir.Value, str] = {}
        self._host: dict[ir.Value, Host] = {}
        self._scalars: dict[ir.Value, Host] = {}
        self._shapes: dict[ir.Value, tuple[int, ...]] = {}
        check_operators(model.graph, self.onnx_opset)
        for graph in graphs_of(model.graph):
            for value in graph.initializers.values():
                self._add_constant(value)
        for node in nodes_of(model.graph):
            self._submodule(_scope_path(node))
        names = [identifier(v.name) for v in model.graph.inputs]
        parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
        run = self._run_model

        def forward(*args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
            return run(*args, *kwargs.values())

        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        self.forward = forward

    # --- constants and module paths

    def _add_constant(self, value: ir.Value) -> None:
        """Keeps a constant as a number list if it may be a shape, else as a buffer under its own name."""
        assert value.const_value is not None
        array = value.const_value.numpy()
        if str(array.dtype) in ("float16", "bfloat16"):
            array = array.astype(np.float32)
        whole = array.dtype.kind in "iub" and array.size <= SHAPE_LIKE
        if (
            whole
            or (array.ndim <= 1 and any(_wants_host(*use) for use in value.uses()))
            or array.dtype.kind not in "fiub"
        ):
            self._host[value] = array
            return
        if counted(array) is not None:
            self._host[value] = array
            return
        if array.size == 1:
            self._scalars[value] = array
        self._shapes[value], array = array.shape, core(array)
        path = _module_path(value.name or "constant")
        owner = self._submodule(path[:-1])
        name = path[-1]
        while hasattr(owner, name):
            name += "_"
        owner.register_buffer(name, torch.from_numpy(np.array(array)))
        self._names[value] = ".".join([*path[:-1], name])

    def _submodule(self, path: Sequence[str]) -> nn.Module:
        """Finds the submodule at a path, or makes it."""
        module: nn.Module = self
        for name in path:
            child = module._modules.get(name)
            if child is None:
                child = Scope()
                module.register_module(name, child)
            module = child
        return module

    # --- running

    def _run_model(self, *inputs: Tensor) -> dict[str, Tensor]:
        values = self._given(inputs)
        self.onnx_clips = self._clips(inputs)
        if self.onnx_clips > 1 and not self.is_for_several:
            raise UsageError("The file is for one clip at a time.")
        results = self.run(self.onnx_graph, values)
        named = zip(self.onnx_graph.outputs, results, strict=True)
        tensors = ((v, as_tensor(r) if isinstance(r, np.ndarray) else r) for v, r in named)
        return {identifier(v.name): r for v, r in tensors if isinstance(r, Tensor)}

    def _given(self, inputs: Sequence[Tensor]) -> Values:
        """Names the inputs as the file does. Those in half precision are converted, as weights are."""
        whole = (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in inputs)
        return dict(zip(self.onnx_graph.inputs, whole, strict=True))

    def _clips(self, inputs: Sequence[Tensor]) -> int:
        """Counts how many clips are given for each one that the file is written for."""
        given = set()
        for x, value in zip(inputs, self.onnx_graph.inputs, strict=True):
            size = value.shape[0] if x.dim() and value.shape is not None else None
            if isinstance(size, int) and size and x.shape[0] % size == 0:
                given.add(x.shape[0] // size)
        return given.pop() if len(given) == 1 else 1

    def all_values(self, inputs: Sequence[Tensor]) -> dict[str, Host]:
        """Computes every value of the outermost graph by its name, to find where two runs differ."""
        values = self._given(inputs)
        with torch.no_grad():
            self.run(self.onnx_graph, values)
        named = {v.name or "": x for v, x in values.items() if isinstance(x, (Tensor, np.ndarray))}
        return {name: x.numpy() if isinstance(x, Tensor) else x for name, x in named.items()}

    def reads_numbers(self, value: ir.Value) -> bool:
        """Says whether an input is a shape, an axis or a size, which must be known while the model is traced."""
        return bool(value.uses()) and all(_wants_host(user, i) for user, i in value.uses())

    def run(self, graph: ir.Graph, values: Values) -> list[Value]:
        """Runs the nodes of a graph; ``values`` are its inputs, and what lies around it."""
        for node in graph:
            results = self.results_of(node, values)
            values.update(zip(node.outputs, results, strict=False))
        outputs = [self._value(v, values) for v in graph.outputs]
        if any(v is None for v in outputs):
            raise LoadError("The ONNX file has an output that nothing computes.")
        return outputs

    def _value(self, value: ir.Value | None, values: Mapping[ir.Value, Value]) -> Value:
        if value is None or (not value.name and value.producer() is None):
            return None
        if value in values:
            return values[value]
        if value in self._host:
            return self._host[value]
        if value not in self._names:
            raise LoadError(f"The ONNX file reads the value {value.name!r}, which nothing computes.")
        found: Tensor = self.get_buffer(self._names[value])
        return found if found.shape == self._shapes[value] else found.expand(self._shapes[value])

    def results_of(self, node: ir.Node, values: Values) -> Sequence[Value]:
        """Runs one node of a graph. Whatever is wrong with it is said of this node."""
        call = NodeCall(node, self.onnx_opset, (), self.onnx_clips)
        if self.onnx_clips > 1 and self.onnx_places:
            places = tuple(None if v is None else self.onnx_places.get(v) for v in node.inputs)
            call = replace(call, place=self.onnx_places.get(node.outputs[0]), places=places)
        try:
            inputs = [self._value(v, values) for v in node.inputs]
            host = tuple(
                v if isinstance(v, np.ndarray) else self._scalars.get(source) if source is not None else None
                for v, source in zip(inputs, node.inputs, strict=True)
            )
            return self._results(replace(call, host=host), inputs, values)
        except Co3dError:
            raise
        except WRONG as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise call.refuse(f"cannot be computed: {first}") from error

    def _results(self, call: NodeCall, inputs: list[Value], values: Values) -> Sequence[Value]:
        if call.node.op_type in CONTROL:
            return controlled(self.run, call, inputs, values)
        if (
            inputs
            and all(v is None or known is not None for v, known in zip(inputs, call.host, strict=True))
            and _stays_small(call.node, call.host)
        ):
            return reference(call, call.host)
        if call.node.op_type not in TABLE:
            raise call.refuse("cannot be read: it is known for constants only")
        reader = TABLE[call.node.op_type]
        arguments: list[Value] = []
        for i, v in enumerate(inputs):
            if i in reader.host and isinstance(v, Tensor):
                raise call.refuse("has a shape, an axis or a size that depends on the values of frames")
            arguments.append(as_tensor(v) if isinstance(v, np.ndarray) and i not in reader.host else v)
        while arguments and arguments[-1] is None:
            arguments.pop()
        if call.places:
            axis = call.integer("axis", 0)
            arguments = for_all_clips(call.node.op_type, axis, arguments, call.places, call.clips)
        result = self._compute(reader.compute, call, arguments)
        call.check_attributes()
        return result if isinstance(result, tuple) else (result,)

    def _compute(self, compute: Compute, call: NodeCall, arguments: list[Value]) -> Result:
        """Computes an operator inside of the module that it comes from."""
        path = _scope_path(call.node)
        if not path:
            return compute(call, *arguments)
        result: Result = self._submodule(path)(compute, call, arguments)
        return result


WRONG = (
    RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, ArithmeticError, MemoryError,
)  # fmt: skip
"""What PyTorch, numpy and ONNX raise of operators that do not fit their operands."""
LARGE = ("Expand", "Tile", "QuantizeLinear", "DequantizeLinear")
"""Operators that may make something large of few numbers, or weights: tensors, so that they can be followed."""
TENSORS = ("ConstantOfShape", "SequenceConstruct", "SplitToSequence")
"""Operators that make tensors, or lists of them, also of numbers."""


def _stays_small(node: ir.Node, inputs: Sequence[Host | None]) -> bool:
    """Says whether numbers make numbers, and not a large tensor of floats."""
    if node.op_type in TENSORS:
        return False
    return node.op_type not in LARGE or all(v is None or v.dtype.kind in "iub" for v in inputs)


def reference(call: NodeCall, inputs: Sequence[Host | None]) -> tuple[Value, ...]:
    """Computes an operator on numbers by ONNX's own reference implementation."""
    node = ir.serde.serialize_node(call.node)
    names = [f"in_{i}" if v is not None else "" for i, v in enumerate(inputs)]
    outputs = [f"out_{i}" for i in range(len(call.node.outputs))]
    del node.input[:], node.output[:]
    node.input.extend(names)
    node.output.extend(outputs)
    graph = onnx.helper.make_graph(
        [node],
        "constants",
        [
            onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for n, v in zip(names, inputs, strict=True)
            if v is not None
        ],
        [onnx.ValueInfoProto(name=n) for n in outputs],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", call.opset)])
    feeds = {n: v for n, v in zip(names, inputs, strict=True) if v is not None}
    return tuple(np.asarray(v) for v in ReferenceEvaluator(model).run(None, feeds))


def _approximates(graph: ir.Graph) -> bool:
    return has_half_precision(graph) or is_quantized(graph)


def _wants_host(node: ir.Node, position: int) -> bool:
    reader = TABLE.get(node.op_type)
    return reader is not None and position in reader.host


def _scope_path(node: ir.Node) -> list[str]:
    """The path of the module that a node comes from.

    As PyTorch's newer exporter stores it, or as node names say.
    """
    stored = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if stored:
        scopes: list[str] = re.findall(r"'([^']*)'", stored)[:-1]
        return [_part(p) for p in scopes[-1].split(".")] if scopes and scopes[-1] else []
    parts = [p for p in (node.name or "").split("/") if p]
    return [_part(p) for part in parts[:-1] for p in part.split(".")]


def _module_path(name: str) -> list[str]:
    """Writes the name of a constant as a path: ``blocks.0.weight``, or ``onnx::Conv_12`` as a single part."""
    return [_part(p) for p in name.replace("/", ".").split(".") if p] or ["constant"]


def _part(name: str) -> str:
    """Writes a part of a module path: letters, digits and underscores, and no name that a module has itself."""
    part = re.sub(r"\W", "_", name)
    taken = hasattr(OnnxModule, part) or hasattr(GraphModule, part) or part in OWN or keyword.iskeyword(part)
    return f"{part}_" if taken and not part.isdigit() else part


OWN = (
    "onnx_model",
    "onnx_graph",
    "onnx_source",
    "onnx_opset",
    "onnx_clips",
    "onnx_places",
    "is_exact",
    "is_for_several",
    "training",
)
"""Attributes that a module has from its making on."""


def identifier(name: str | None) -> str:
    """Writes a name that Python takes for an argument."""
    part = re.sub(r"\W", "_", name or "value")
    return f"_{part}" if part[:1].isdigit() else f"{part}_" if keyword.iskeyword(part) else part
