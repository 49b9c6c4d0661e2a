"""The tracer: from a module or exported program to an FX graph of ATen operators (``torch.export``)."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree
from torch.utils._pytree import PyTree

from co3d_compile.capture.also_outputs import add_outputs
from co3d_compile.capture.boxes import box_inputs, one_box
from co3d_compile.capture.chunks.join import join_chunks
from co3d_compile.capture.complex_numbers import as_real_numbers
from co3d_compile.capture.decompose import decomposed
from co3d_compile.capture.decompositions import decompositions
from co3d_compile.capture.exported_graph import Unlifted, with_free_names
from co3d_compile.capture.known_constants import tensors_of
from co3d_compile.capture.longer_clips import note_loop_starts
from co3d_compile.capture.loops.counted_numbers import CountedNumbers
from co3d_compile.capture.loops.frames_at_once import take_frames_at_once
from co3d_compile.capture.loops.roll import roll_loops, tidy
from co3d_compile.capture.model_checks import check_operators, check_parameters
from co3d_compile.capture.native_norms import name_norms
from co3d_compile.capture.torchvision_operators import use_own_operators, without_compiled_part
from co3d_compile.capture.tracer import Clip, Model, check_runs, export
from co3d_compile.capture.written_out.join import join_written_out
from co3d_compile.errors import CaptureError, UsageError, first_line
from co3d_compile.ir.options import Options
from co3d_compile.ir.program import Input, Output, Program
from co3d_compile.ir.resized_graph import NotResizable
from co3d_compile.ir.stack_traces import without_stack_traces
from co3d_compile.support.silence_torch import quiet

aten = torch.ops.aten


def capture(model: Model, clip: Clip | None, options: Options, *, two: bool = True) -> Program:
    """Captures the clip graph.

    Args:
        model: A module, or what ``torch.export`` made of one.
        clip: The arguments of one clip; may be None for an exported program that carries its own.
        options: The options of ``compile``.
        two: Whether one clip may be captured as two, so that the batch can be told from other dims.

    Raises:
        UsageError: What was given is no model, or no arguments.
        CaptureError: The model refuses the clip, ``torch.export`` cannot capture it, or it returns nothing.
    """
    check_kinds(model, clip)
    name = _class_name(model)
    module, outputs, learned = _captured(model, clip, two)
    outputs += add_outputs(module, options.also)
    if not outputs:
        raise CaptureError(
            f"{name} returns no tensor for such a clip.",
            hint="It may return None in this mode, or keep its results elsewhere: wrap it in one that returns them.",
        )
    inputs = describe_inputs(module, options)
    names = _distinct(outputs, {i.name for i in inputs})
    program = Program(module, options, inputs, [Output(n) for n in names], name=name, learned=learned)
    as_real_numbers(program)
    name_norms(program)
    tidy(program)
    join_chunks(program)
    counted = CountedNumbers(program)
    roll_loops(program)
    counted.restore()
    take_frames_at_once(program)
    roll_loops(program, ends=True)
    join_written_out(program)
    note_loop_starts(program)
    program.follow()
    return program


def leaves_sizes_open(program: ExportedProgram) -> bool:
    """Says whether a program is for clips of several sizes (dynamic shapes): no rule can read its sizes."""
    values = (n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder")
    return any(isinstance(size, torch.SymInt) for v in values if isinstance(v, Tensor) for size in v.shape)


def as_module(
    program: ExportedProgram, clip: Clip | None, keywords: Mapping[str, PyTree] | None
) -> tuple[nn.Module, Clip | None, Mapping[str, PyTree]]:
    """Gives a program that leaves sizes open as a module, and a clip to capture it in, its own where none is given."""
    own, named = program.example_inputs or (None, {})
    return program.module(check_guards=False), own if clip is None else clip, named if keywords is None else keywords


def _distinct(names: Sequence[str], taken: set[str]) -> list[str]:
    """Gives outputs names, other ones where an input or an output before has them: ``{"x": …}`` of an input x."""
    found: list[str] = []
    for name in names:
        others = (f"{name}_out{i or ''}" for i in itertools.count())
        found.append(
            name if name not in {*taken, *found} else next(n for n in others if n not in {*taken, *names, *found})
        )
    return found


def _captured(model: Model, clip: Clip | None, two: bool) -> Unlifted:
    """Captures a network. Of boxes there are as many as clips: any number takes their place."""
    with warnings.catch_warnings(), without_compiled_part(), without_stack_traces():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's own, about its own tree specs
        exported = _exported(model, clip, two)
        check_parameters(exported)
        module, outputs, learned = decomposed(with_free_names(exported), decompositions())
    check_operators(module)
    use_own_operators(module.graph)
    nodes = [n for n in module.graph.nodes if n.op == "placeholder"]
    boxes = box_inputs(module.graph)
    rows = [n in boxes for n in nodes]
    if not any(rows):
        return module, outputs, learned
    sizes = {n.meta["val"].shape[0] for n in nodes}
    if len(sizes) == 1:
        return module, outputs, learned
    fitted = None if isinstance(model, ExportedProgram) or clip is None else one_box(clip, rows)
    if fitted is None or len({t.shape[0] for t in tensors_of(fitted)}) > 1:
        raise UsageError(
            "A network that takes boxes is compiled for one clip and one box, which stands for any number of them.",
            hint="Give the module with one clip at once, or export it with one box.",
        )
    return _captured(model, fitted, two)


def _exported(model: Model, clip: Clip | None, two: bool) -> ExportedProgram:
    """Runs the tracer, of a program that leaves sizes open too: in the sizes of the clip, or of its own example."""
    if not isinstance(model, ExportedProgram):
        return export(model, clip, two)
    if not leaves_sizes_open(model):
        return model
    module, clip, keywords = as_module(model, clip, None)
    return export(module, clip, two, keywords)


def captured_again(
    model: Model, clip: Clip | None, options: Options, two: bool, program: Program, factor: int, more: bool
) -> Program | None:
    """Captures the same network for longer clips, or for one more clip at once.

    Args:
        model, clip, options, two: As it was captured.
        program: What was captured.
        factor: How many times as long the clips are.
        more: Whether there is one more clip at once.

    Returns:
        None where it was captured for a single clip, and ``more`` is asked for.

    Raises:
        NotResizable: It cannot be captured so.
    """
    if isinstance(model, ExportedProgram) or clip is None:
        raise NotResizable("an exported program cannot be captured for longer clips")
    batch = program.inputs[0].shape[0]
    given = tensors_of(clip)
    if len(given) != len(program.inputs):
        raise NotResizable("some of its inputs are no tensors of the model")
    if more and batch == 1:
        return None
    dims = iter([i.time_dim for i in program.inputs])

    def longer(x: Tensor) -> Tensor:
        dim = next(dims)
        x = x if dim is None else torch.cat([x] * factor, dim)
        return torch.cat([x] * (batch + 1))[: batch + 1] if more else x

    try:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            other = pytree.tree_map_only(Tensor, longer, tuple(clip))
            check_runs(model, other, clip)
            return capture(model, other, options, two=two and not more)
    except Exception as error:  # a network refuses other clips in any way it likes
        what = first_line(error)[:200].rstrip(".")
        raise NotResizable(f"it cannot be captured for longer clips ({what})") from error


def arguments_of(clip: Sequence[Any] | Tensor | None) -> Sequence[Any] | None:
    """Makes the arguments of one clip; a tensor by itself is the only one, as in ``torch.onnx.export``."""
    return (clip,) if isinstance(clip, Tensor) else clip


def check_kinds(model: PyTree, clip: PyTree) -> None:
    """Refuses what people give in place of a model, and of the arguments of one clip."""
    if not isinstance(model, (nn.Module, ExportedProgram)):
        hint = "Give a torch.nn.Module, or what torch.export.load has read."
        raise UsageError(f"A {type(model).__name__} is no model.", hint=hint)
    if isinstance(clip, Mapping):
        hint = "Write (clip,) where the model takes the dict itself, or example_kwargs=clip for arguments by keyword."
        raise UsageError("example_inputs is a dict; the model would be called with its keys.", hint=hint)
    if any(isinstance(value, np.ndarray) for value in pytree.tree_leaves(clip)):
        raise UsageError("example_inputs holds a numpy array.", hint="Give tensors: torch.from_numpy(clip).")


def _class_name(model: Model) -> str:
    """Names the class of the network; an exported program remembers it at its operators."""
    if not isinstance(model, ExportedProgram):
        return type(model).__name__
    stacks = (node.meta.get("nn_module_stack") for node in model.graph.nodes)
    outermost = next((next(iter(stack.values())) for stack in stacks if stack), ("", "Network"))
    return str(outermost[1]).rpartition(".")[2]


def _usual(dim: int, shapes: list[tuple[int, ...]]) -> int:
    """The dim that counts frames where nobody says it: a series of single numbers, (N, T), has but one."""
    return 1 if shapes and all(len(shape) == 2 for shape in shapes) else dim


def _checked(dim: int, name: str, shape: tuple[int, ...], said: bool) -> int:
    """Counts a time dim from the front.

    Raises:
        UsageError: The input does not have it.
    """
    if -len(shape) <= dim < len(shape) and dim % len(shape):
        return dim % len(shape)
    shown = ", ".join(["N", *map(str, shape[1:])]) if shape else ""
    if not said:
        raise UsageError(
            f"Which dim of {name} ({shown}) counts the frames was not said, and it has no dim {dim}.",
            hint="Give time_dim with a number for each input, and None for one without time, such as [2, None] "
            "(--time-dim 2 --time-dim none).",
        )
    raise UsageError(
        f"time_dim={dim} is no time dim of the input {name} ({shown}).",
        hint="Give the dim that counts the frames, for (N, C, T, H, W) that is 2; dim 0 is the batch. "
        "For a network that takes its frames as rows, compile a module that takes (N, T, …) and calls it "
        "with x.flatten(0, 1).",
    )


def describe_inputs(module: GraphModule, options: Options) -> list[Input]:
    """Describes the user's inputs, with their time dims.

    Raises:
        UsageError: A time dim that an input does not have.
    """
    nodes = [n for n in module.graph.nodes if n.op == "placeholder"]
    dims, boxes = options.time_dim, box_inputs(module.graph)
    shapes = [tuple(int(s) for s in n.meta["val"].shape) for n in nodes]
    if not options.time_said and isinstance(dims, int):
        dims = _usual(dims, [s for n, s in zip(nodes, shapes, strict=True) if n not in boxes])
    per_input = [None if n in boxes else dims for n in nodes] if dims is None or isinstance(dims, int) else list(dims)
    if len(per_input) != len(nodes):
        raise UsageError(f"time_dim names {len(per_input)} inputs, but the model has {len(nodes)}.")
    inputs = []
    for node, shape, dim in zip(nodes, shapes, per_input, strict=True):
        if dim is not None:
            dim = _checked(dim, node.name, shape, options.time_said)
        inputs.append(Input(node.name, shape, node.meta["val"].dtype, dim, boxes=boxes.get(node)))
    if all(i.time_dim is None for i in inputs):
        raise UsageError("No input has a time dim.")
    _check_clips(inputs)
    return inputs


def _check_clips(inputs: list[Input]) -> None:
    """Refuses an input without time that has something else than clips in dim 0, such as the layers of a state.

    Raises:
        UsageError: It names the input.
    """
    timed = next(i for i in inputs if i.time_dim is not None)
    for i in inputs:
        if i.time_dim is None and i.boxes is None and i.shape and i.shape[0] != timed.shape[0]:
            raise UsageError(
                f"The input {i.name} ({', '.join(map(str, i.shape))}) has no clips in dim 0: "
                f"{timed.name} has {timed.shape[0]} there.",
                hint="Make a constant of what is the same for all clips, such as the zeros that a state starts from: "
                "a buffer of the module, in an ONNX file an initializer of that name "
                "(model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))).",
            )
