"""The options that name a model, and how it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from co3d_compile.cli.common import FILE, MODEL, Options, Report, option, together

if TYPE_CHECKING:
    from co3d_compile.capture.load_model import Loaded
    from co3d_compile.contract.model_contract import Contract


class ShapeType(click.ParamType[Any]):
    """A shape: ``1x3x16x224x224``, or with commas, as PyTorch prints it."""

    name = "shape"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        sizes = value.lower().replace(",", "x").split("x")
        if not all(size.isascii() and size.isdigit() and 0 < int(size) < 2**31 for size in sizes):
            self.fail(f"{value!r} is no shape such as 1x3x16x224x224.", param, ctx)
        return tuple(int(size) for size in sizes)


class NamedShapeType(click.ParamType[Any]):
    """A shape with a name: ``NAME=1x3x16x224x224``."""

    name = "named shape"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, tuple[int, ...]]:
        if isinstance(value, tuple):
            return value
        name, equals, shape = value.partition("=")
        if not equals or not name.isidentifier():
            self.fail(f"{value!r} is no named shape such as video=1x3x16x224x224.", param, ctx)
        return name, ShapeType().convert(shape, param, ctx)


def parse_kwargs(ctx: click.Context, param: click.Parameter, value: str | None) -> Report | None:
    """Reads what ``--kwargs`` gives."""
    if value is None:
        return None
    try:
        content = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"""not JSON, such as {{"num_classes": 400}}: {error}.""", ctx, param) from error
    if not isinstance(content, dict):
        raise click.BadParameter('a JSON object is wanted, such as {"num_classes": 400}.', ctx, param)
    return content


# Where a model comes from; `load_model` takes them.
model_options = together(
    option("--shape", "shapes", type=ShapeType(), multiple=True, group=MODEL, metavar="1x3x16x224x224",
           help="Shape of one clip (N, C, T, H, W). Once per input. A torch.export archive knows its own, "
                "and so does a compiled file that the model stands beside."),
    option("--input", "named", type=NamedShapeType(), multiple=True, group=MODEL, metavar="NAME=SHAPE",
           help="Shape of one clip that a factory's model takes by keyword alone. Once per such input."),
    option("--weights", type=FILE, group=MODEL, metavar="FILE",
           help="State dict for a factory's model: torch.save or safetensors, also somewhere in a checkpoint."),
    option("--weights-key", group=MODEL, metavar="KEY",
           help="Where in it the weights are, if several would do, such as state_dict_ema or ema.module."),
    option("--kwargs", callback=parse_kwargs, group=MODEL, metavar="JSON",
           help="""Arguments of a factory, such as '{"num_classes": 400}'."""),
    option("--trust-pickle", is_flag=True, group=MODEL,
           help="Open a pickled module. This runs whatever code the file holds."),
)  # fmt: skip

# The model that a compiled file stands beside.
against_option = option(
    "--against",
    required=True,
    metavar="MODEL",
    group=MODEL,
    help="The model it was compiled from: a file, package.module:factory or folder/file.py:factory.",
)


def load_model(model: str, options: Options, compiled: Contract | None = None) -> Loaded:
    """Loads a model as `model_options` say; takes those options out of ``options``.

    Args:
        model: What the user gives.
        options: Those of the command line.
        compiled: What a file says that was compiled from this model: where nothing else does, the clip's shape is its.
    """
    from co3d_compile.capture.load_model import load
    from co3d_compile.contract.clip_shapes import clip_shapes

    assumed = [] if compiled is None else clip_shapes(compiled)
    names = ("shapes", "weights", "weights_key", "kwargs", "trust_pickle")
    given = {name: options.pop(name) for name in names}
    return load(model, named=dict(options.pop("named")), assumed=assumed, **given)


def is_plain_onnx(path: Path) -> bool:
    """Says whether this is an ONNX file that the compiler has not written."""
    from co3d_compile.runtime.stored_metadata import is_compiled

    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        return file.read(1) == b"\x08" and not is_compiled(path)


def is_source(model: str) -> bool:
    """Says whether this is a model that is still to be compiled.

    A factory, an archive, a pickle or an ONNX clip model.
    """
    path = Path(model)
    if not path.exists():
        return ":" in model
    if not path.is_file():
        return False
    from co3d_compile.runtime.stored_metadata import is_compiled

    with path.open("rb") as file:
        first = file.read(1)
    return first in (b"P", b"\x80") or (first == b"\x08" and not is_compiled(path))
