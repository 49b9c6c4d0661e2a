"""A LiteRT file (``.tflite``) for phones: states as inputs and outputs, the contract in its metadata.

The package litert-torch lowers the step's graph, and ai-edge-litert runs the file here, beside ONNX Runtime. Neither is
imported before a file is written.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from co3d_compile.contract.model_contract import METADATA_KEY, Contract, refuse_free_rows
from co3d_compile.errors import Co3dWarning, UnsupportedError
from co3d_compile.support.atomic_file import whole_file
from co3d_compile.support.install_hint import install_command
from co3d_compile.targets.settings import Settings, setting

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options(Settings):
    """What a LiteRT file fixes.

    Raises:
        UsageError: A number that makes no sense, or another word.
    """

    batch: int = setting(1, "Streams that advance together in a LiteRT file.", metavar="STREAMS")
    tensors: str = setting(
        "auto",
        "The layout of a LiteRT file's inputs, outputs and states of four dims: channels first, as in the ONNX file, "
        "channels last, as LiteRT's kernels take them, or the one with fewer transposed bytes.",
        choices=("auto", "channels-first", "channels-last"),
    )


def write_tflite(
    model: str | os.PathLike[str],
    contract: Contract,
    file: str | os.PathLike[str],
    *,
    name: str | None = None,
    options: Options | None = None,
) -> Path:
    """Writes a compiled ONNX file as a LiteRT file, after it gave the same results here; returns its path.

    Its signature is called ``step``. Its inputs are the frames, ``valid`` if there is one, and the states; its outputs
    are the results and the next states. The metadata entry ``co3d`` is the contract of this file (docs/litert.md).

    Args:
        model: The compiled ONNX file.
        contract: Its metadata.
        file: Where to write.
        name: What the file's description says; default the name of the ONNX file.
        options: What the file fixes.

    Raises:
        UnsupportedError: The file is of a form that LiteRT cannot take; the message names it.
        VerificationError: LiteRT gives other results here than ONNX Runtime.
        OutputError: The path cannot be written.
    """
    refuse_free_rows(contract, "LiteRT")
    options = options or Options()
    _check(contract, options)
    with _packages():
        from co3d_compile.targets.litert_file import transposed_bytes, wide_shapes, with_metadata
        from co3d_compile.targets.litert_step import LiteRtStep, compare

        layouts = {"auto": (False, True), "channels-first": (False,), "channels-last": (True,)}[options.tensors]
        steps = [LiteRtStep(model, contract, options.batch, channels_last=last) for last in layouts]
        written = [(step, step.converted()) for step in steps]
        step, content = min(written, key=lambda pair: transposed_bytes(pair[1]))
        content = with_metadata(content, {METADATA_KEY: json.dumps(step.contract(content))}, name or Path(model).stem)
        compare(content, Path(model), step)
    if wide := sorted(wide_shapes(content)):
        shapes = ", ".join("x".join(map(str, shape)) for shape in wide)
        message = f"Tensors of more than four dims are left: {shapes}. GPU delegates of LiteRT take none."
        warnings.warn(message, Co3dWarning, stacklevel=2)
    with whole_file(file) as path:
        path.write_bytes(content)
    return Path(file)


@contextlib.contextmanager
def _packages() -> Iterator[None]:
    """Says what to install where a package is missing, and keeps what they print from the terminal."""
    printed = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
            warnings.simplefilter("ignore")
            yield
    except ModuleNotFoundError as error:
        hint = f"Install what it needs: {install_command('co3d-compile[litert]')}."
        raise UnsupportedError(f"A LiteRT file needs the package {error.name}.", hint=hint) from error
    log.debug("%s", printed.getvalue())


def _check(contract: Contract, options: Options) -> None:
    """Refuses forms of a file that are not for LiteRT."""
    of = contract.options
    why = None
    if contract.native is not None:
        why = "Its states are in the layout of one machine (native)", "Export the file as it was before."
    elif of.get("int8") or of.get("state_dtype") == "float16":
        why = "It is in reduced precision", "Export the file in full precision, and quantize with LiteRT's own tools."
    fixed = {spec.shape[0] for spec in contract.inputs if spec.shape and spec.shape[0] != "N"}
    if why is None and fixed and fixed != {options.batch}:
        why = f"Its batch is fixed at {min(fixed)}", f"Give batch={min(fixed)} (--batch)."
    if why is not None:
        raise UnsupportedError(f"This file cannot become a LiteRT file: {why[0]}.", hint=why[1])
