"""The tracer: from a module or exported program to an FX graph of ATen operators (``torch.export``)."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from co3d_compile.batch import doubled
from co3d_compile.canonical_resampling import EXACT_OVERLOADS
from co3d_compile.constants import ConstantsKnown
from co3d_compile.decompositions import DECOMPOSITIONS as OURS
from co3d_compile.errors import CaptureError, UnsupportedError, UsageError
from co3d_compile.program import Input, Options, Output, Program, module_path, operator_name, set_constant
from co3d_compile.quiet import quiet
from co3d_compile.rules import RULES, is_pointwise
from co3d_compile.unrolled import roll

aten = torch.ops.aten
DECIDE = "Decide it in Python before the model is captured, or compute both and choose with torch.where."

# Kept whole beside the operators that have a rule: they are rewritten by a pass, or have an ONNX operator of their own.
KEEP = {
    aten.batch_norm.default,
    aten._native_batch_norm_legit_no_training.default,
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.max_pool3d.default,
    aten.adaptive_max_pool1d.default,
    aten.adaptive_max_pool2d.default,
    aten.adaptive_max_pool3d.default,
    aten.scaled_dot_product_attention.default,
    aten.im2col.default,
    aten.select_scatter.default,
    *EXACT_OVERLOADS,
}

_REAL = "Write it with real numbers, such as two matrix products for the parts of a Fourier transform."
NO_NUMBERS = {
    torch.bfloat16: "Switch autocast off (torch.autocast('cpu', enabled=False)) and take casts to bfloat16 out.",
    torch.complex64: _REAL,
    torch.complex128: _REAL,
}
"""Kinds of numbers that ONNX runtimes have no kernels for, and the way out."""

CONVOLUTIONS = [f"{name}{n}d" for name in ("conv", "conv_transpose") for n in (1, 2, 3)]
"""Operators that ONNX Runtime does not compute in double precision."""

DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {}
"""What takes the place of users' own operators when a model is captured."""


def capture(
    model: nn.Module | ExportedProgram, example_inputs: Sequence[Any] | None, options: Options, *, two: bool = True
) -> Program:
    """Captures the clip graph.

    Args:
        model: A module, or what ``torch.export`` made of one.
        example_inputs: The arguments of one clip; may be None for an exported program that carries its own.
        options: The options of ``compile``.
        two: Whether one clip may be captured as two, so that the batch can be told from other dims.

    Raises:
        UsageError: What was given is no model, or no arguments.
        CaptureError: The model refuses the clip, or ``torch.export`` cannot capture it.
    """
    _check_kinds(model, example_inputs)
    name = _class_name(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's own, about its own tree specs
        exported = model if isinstance(model, ExportedProgram) else export(model, example_inputs, two)
        check_parameters(exported)
        exported = exported.run_decompositions(decompositions())
    module, outputs = unlift(exported)
    check_operators(module)
    inputs = describe_inputs(module, options)
    program = Program(module, options, inputs, [Output(n) for n in outputs], name=name)
    roll(program)
    program.follow()
    return program


def _check_kinds(model: object, example_inputs: object) -> None:
    if not isinstance(model, (nn.Module, ExportedProgram)):
        hint = "Give a torch.nn.Module, or what torch.export.load has read."
        raise UsageError(f"A {type(model).__name__} is no model.", hint=hint)
    if isinstance(example_inputs, torch.Tensor):
        hint = "Write (clip,): a tuple of the arguments of one clip."
        raise UsageError("example_inputs is a tensor; the model would be called with its rows.", hint=hint)


def _class_name(model: nn.Module | ExportedProgram) -> str:
    """The class of the network; an exported program remembers it at its operators."""
    if not isinstance(model, ExportedProgram):
        return type(model).__name__
    stacks = (node.meta.get("nn_module_stack") for node in model.graph.nodes)
    outermost = next((next(iter(stack.values())) for stack in stacks if stack), ("", "Network"))
    return str(outermost[1]).rpartition(".")[2]


def export(model: nn.Module, example_inputs: Sequence[Any] | None, two: bool = True) -> ExportedProgram:
    """``torch.export`` with the module in eval mode, and errors that people can act on."""
    if example_inputs is None:
        raise UsageError(
            "example_inputs is needed: the arguments of one clip, such as (torch.randn(1, 3, 16, 112, 112),)."
        )
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with torch.no_grad():
            clips = doubled(example_inputs) if two else None
            if clips is not None:
                with contextlib.suppress(Exception):  # a model for a single clip is captured as such below
                    return traced(model, clips)
            return traced(model, tuple(example_inputs))
    except GuardOnDataDependentSymNode as error:
        raise CaptureError(
            f"{type(model).__name__} chooses in Python by the values of a tensor{_where(error)}.", hint=DECIDE
        ) from error
    except Exception as error:
        message = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CaptureError(
            f"{type(model).__name__} cannot be captured with inputs of shape {_shapes(example_inputs)}: "
            f"{message.rstrip('.:')}.",
            hint=_way_out(model),
        ) from error
    finally:
        for m in training:
            m.training = True


def _where(error: Exception) -> str:
    """The line of the model that the tracer names, if it names one."""
    found = re.search(r'call raised this error:\s+File "([^"]+)", line (\d+), in .*\n\s*(\S.*)', str(error))
    return f" ({Path(found[1]).name}, line {found[2]}: {found[3]})" if found else ""


def traced(model: nn.Module, example_inputs: tuple[Any, ...]) -> ExportedProgram:
    """``torch.export``, also of a model that reads ``x.data`` (outside the tracer's sight, so it is ``x.detach()``) or
    decides in Python by the values of constants."""
    with quiet():
        try:
            return torch.export.export(model, example_inputs, strict=False)
        except Exception:
            with _DataDetached(), ConstantsKnown(model):
                return torch.export.export(model, example_inputs, strict=False)


class _DataDetached(TorchFunctionMode):
    """Makes ``x.data`` of an activation an operator that can be traced."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _READ_DATA and not isinstance(args[0], nn.Parameter):
            return args[0].detach()
        return func(*args, **(kwargs or {}))


_READ_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


def _way_out(model: nn.Module) -> str:
    scripted = next((name for name, m in model.named_modules() if name and isinstance(m, torch.jit.ScriptModule)), None)
    reduced = next((name for name, p in model.named_parameters() if p.dtype in (torch.float16, torch.bfloat16)), None)
    if reduced is not None:
        return f"Its parameter {reduced} is in half precision: convert the model first, model.float()."
    if scripted is not None:
        return f"Its part {scripted} is TorchScript: build it without torch.jit.script, or script the whole model."
    return "Check the clip shape (long enough for the model's pools?), and that the model runs on it."


def _shapes(inputs: Any) -> str:
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor)]
    return ", ".join("x".join(map(str, t.shape)) for t in tensors)


def check_parameters(exported: ExportedProgram) -> None:
    """Refuses half precision, other devices and weights that are no numbers: all would end in a wrong or slow file."""
    weights = set(exported.graph_signature.parameters)
    for name, tensor in exported.state_dict.items():
        if tensor.device.type != "cpu":
            raise CaptureError(
                f"The parameter {name} is on the device {tensor.device}.",
                hint="Move the model to the CPU first: model.cpu().",
            )
        if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64):
            raise CaptureError(
                f"The parameter {name} is {tensor.dtype}.", hint="Convert the model first: model.float()."
            )
        if name in weights and not bool(torch.isfinite(tensor).all()):
            raise CaptureError(
                f"The parameter {name} contains NaN or infinity.", hint="Take weights from before training diverged."
            )


def check_operators(module: GraphModule) -> None:
    """Refuses kinds of numbers that the operators of an ONNX runtime do not compute with, and what reads memory."""
    for node in module.graph.nodes:
        if node.target is aten.as_strided.default:  # what is left of it: a step has other strides
            raise UnsupportedError(
                "It walks through memory from one dim into another.",
                operator=operator_name(node.target),
                module_path=module_path(node),
                hint="Write it with slices, unfold or reshape.",
            )
        value = node.meta.get("val")
        way_out = NO_NUMBERS.get(value.dtype) if isinstance(value, torch.Tensor) else None
        if getattr(node.target, "_opname", None) in CONVOLUTIONS and value.dtype == torch.float64:
            way_out = "Convert the model first: model.float()."
        if way_out is not None:
            raise CaptureError(
                f"The model computes in {value.dtype} here.",
                operator=operator_name(node.target) if node.op == "call_function" else None,
                module_path=module_path(node),
                hint=way_out,
            )


def decompositions() -> dict[Any, Any]:
    """PyTorch's own decompositions, less the operators that have a rule of their own."""
    table = torch.export.default_decompositions()
    for operator in list(table.keys()):
        if operator in RULES or operator in KEEP or is_pointwise(operator):
            table.pop(operator)
    table.update(OURS)
    table.update(DECOMPOSITIONS)
    return table


def unlift(exported: ExportedProgram) -> tuple[GraphModule, list[str]]:
    """A graph module with parameters and buffers as attributes and the user's inputs and outputs alone."""
    signature = exported.graph_signature
    root = nn.Module()
    constants = {**exported.state_dict, **exported.constants}
    graph = Graph()
    env: dict[Node, Node] = {}
    specs = {spec.arg.name: spec for spec in signature.input_specs}
    user = [i for i, spec in enumerate(signature.output_specs) if spec.kind is OutputKind.USER_OUTPUT]
    returned = next(n for n in exported.graph.nodes if n.op == "output").args[0]
    tensors = [isinstance(returned[i], Node) for i in user]  # a model may return None or a number beside tensors
    for node in exported.graph.nodes:
        if node.op == "placeholder" and specs[node.name].kind is not InputKind.USER_INPUT:
            target = str(specs[node.name].target)
            set_constant(root, target, constants[target])
            env[node] = graph.get_attr(target)
            env[node].meta = dict(node.meta)
            env[node].meta["parameter"] = specs[node.name].kind is InputKind.PARAMETER
        elif node.op == "get_attr" and isinstance(getattr(exported.graph_module, str(node.target), None), nn.Module):
            raise CaptureError(
                f"{type_of_control(node)} in the model chooses what is computed by the values of its input.",
                module_path=module_path(node),
                hint=DECIDE,
            )
        elif node.op == "output":
            graph.output(tuple(env[returned[i]] for i, tensor in zip(user, tensors, strict=True) if tensor))
        else:
            env[node] = graph.node_copy(node, lambda n: env[n])
    for node in list(graph.nodes):
        if node.op == "placeholder" and not isinstance(node.meta.get("val"), torch.Tensor):
            if node.users:
                raise CaptureError(
                    f"The input {node.name} is no tensor.", hint="Bake it into the model with a wrapper."
                )
            graph.erase_node(node)
    module = GraphModule(root, graph)
    return module, output_names(exported, tensors)


def type_of_control(node: Node) -> str:
    """``torch.cond`` and the like: what a part of a captured graph is given to."""
    users = [str(getattr(user.target, "__name__", user.target)) for user in node.users]
    return f"torch.{users[0]}" if users else "Control flow"


def output_names(exported: ExportedProgram, tensors: list[bool]) -> list[str]:
    """Names of the outputs: dict keys where there are any, else ``output`` or ``output_0``, ``output_1``, …

    Args:
        tensors: For each leaf that the model returns, whether it is a tensor.
    """
    count = sum(tensors)
    spec = exported.call_spec.out_spec
    if spec is not None:
        paths = [p for p, _ in pytree.tree_leaves_with_path(pytree.tree_unflatten([0] * spec.num_leaves, spec))]
        keys = ["_".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in p) for p in paths]
        if len(keys) == len(tensors) and all(k and not k[0].isdigit() for k in keys):
            return [key for key, tensor in zip(keys, tensors, strict=True) if tensor]
    return ["output"] if count == 1 else [f"output_{i}" for i in range(count)]


def describe_inputs(module: GraphModule, options: Options) -> list[Input]:
    """The user's inputs with their time dims.

    Raises:
        UsageError: A time dim that an input does not have.
    """
    nodes = [n for n in module.graph.nodes if n.op == "placeholder"]
    dims = options.time_dim
    per_input = [dims] * len(nodes) if dims is None or isinstance(dims, int) else list(dims)
    if len(per_input) != len(nodes):
        raise UsageError(f"time_dim names {len(per_input)} inputs, but the model has {len(nodes)}.")
    inputs = []
    for node, dim in zip(nodes, per_input, strict=True):
        shape = tuple(int(s) for s in node.meta["val"].shape)
        if dim is not None:
            if not -len(shape) <= dim < len(shape) or dim % len(shape) == 0:
                raise UsageError(
                    f"time_dim={dim} is no time dim of the input {node.name} with shape {'x'.join(map(str, shape))}.",
                    hint="Give the dim that counts the frames, for (N, C, T, H, W) that is 2; dim 0 is the batch.",
                )
            dim %= len(shape)
        inputs.append(Input(node.name, shape, node.meta["val"].dtype, dim))
    if all(i.time_dim is None for i in inputs):
        raise UsageError("No input has a time dim.")
    return inputs
