"""What ``compile`` gives: the ONNX step model, its contract and its report, and the forms it can take."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import nn
from torch.export import ExportedProgram

from co3d_compile.compiler.program_report import details
from co3d_compile.compiler.replaced_module import ClipNetwork
from co3d_compile.contract import model_contract as metadata
from co3d_compile.contract.weights_digest import weights_digest
from co3d_compile.errors import OutputError, UsageError
from co3d_compile.ir.program import Program, bytes_of
from co3d_compile.media.class_labels import clean_labels
from co3d_compile.media.preprocess import check_names, preprocess_for
from co3d_compile.onnx_export.export_program import export
from co3d_compile.report.report import Report
from co3d_compile.support.atomic_file import whole_file
from co3d_compile.support.plain_types import JsonObject
from co3d_compile.targets.table import TARGETS

if TYPE_CHECKING:
    from co3d_compile.targets.torch_step import StepModule

LARGE = 2_000_000_000  # bytes from which weights go into a file of their own (protobuf ends at 2 GiB)


class CompiledModel:
    """A compiled model: the ONNX step model, its contract and its report.

    Attributes:
        program: The program after the last pass; ``program.graph`` is the step graph.
        model: The ONNX model (``onnx_ir``).
        info: The contract that is stored in the file (``docs/contract.md``), with the digest of the weights.
        source: What was compiled; None for what another compiled model was made into.
        captured: Its graph, as it was captured.
    """

    source: ClipNetwork | None = None
    captured: Program | None = None

    def __init__(self, program: Program, model: ir.Model, info: metadata.Contract, report: Report) -> None:
        self.program = program
        self.model = model
        self.info = dataclasses.replace(info, weights_sha256=weights_digest(model))
        self.model.metadata_props[metadata.METADATA_KEY] = self.info.to_json()
        self._report = report

    def captured_of(self, model: object) -> Program | None:
        """Gives the graph that was captured of this very model, if it was compiled from it in this process."""
        return self.captured if self.source is not None and self.source.network is model else None

    def report(self) -> Report:
        """Says what was done, and what it costs."""
        return self._report

    def to_bytes(self) -> bytes:
        """Writes the ONNX file as bytes.

        Raises:
            OutputError: It is over 2 GB: use :meth:`save`.
        """
        if self.is_large:
            raise OutputError(
                "The model is over 2 GB, which one ONNX file cannot hold.",
                hint="Use save(path): it keeps the weights in a second file.",
            )
        content: bytes = ir.to_proto(self.model).SerializeToString()
        return content

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of all constants."""
        return sum(v.const_value.nbytes for v in self.model.graph.initializers.values() if v.const_value is not None)

    @property
    def is_large(self) -> bool:
        """Whether its weights need a file of their own."""
        return self.weight_bytes > LARGE

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the ONNX file: to a temporary file first, which is then renamed.

        Weights over 2 GB go into a second file beside it, ``<name>.data``.

        Raises:
            OutputError: The path cannot be written.
        """
        with whole_file(path) as written:
            if self.is_large:
                ir.save(self.model, written, external_data=f"{written.name}.data")
            else:
                written.write_bytes(self.to_bytes())
        return Path(path)

    def describe(self, preprocess: Mapping[str, Any] | None = None, labels: Sequence[str] | None = None) -> None:
        """Stores preprocessing and labels, as for :func:`compile`; None leaves what is there.

        Raises:
            UsageError, UnsupportedError: The preprocessing does not fit the model's inputs, or no output has so many
                classes.
        """
        changes: JsonObject = {}
        if preprocess is not None:
            check_names(preprocess)
            changes["preprocess"] = next(preprocess_for(spec, preprocess) for spec in self.info.inputs).to_dict()
        if labels is not None:
            changes["labels"] = clean_labels(labels)
            if not any(len(labels) in output.shape for output in self.info.outputs):
                shapes = ", ".join(f"{o.name} ({', '.join(map(str, o.shape))})" for o in self.info.outputs)
                raise UsageError(f"Given {len(labels)} labels, but no output has so many classes: {shapes}.")
        self.info = dataclasses.replace(self.info, **changes)
        self.model.metadata_props[metadata.METADATA_KEY] = self.info.to_json()

    def to_html(self, verification: Mapping[str, Any] | None = None) -> str:
        """Writes the report as one page that needs nothing else: a drawing over time, bars, a table of all operators.

        Args:
            verification: What ``verify`` found (``Verification.to_dict()``), to be said on the page.

        Raises:
            Co3dError: Jinja2 is missing.
        """
        from co3d_compile.report.web_page import page

        found = None if verification is None else dict(verification)
        return page(details(self._report, self.program.notes.survey), self.info, verification=found)

    def to_native(self) -> CompiledModel:
        """Makes the model one for machines like this alone, and faster: states too are in the blocked layout of ONNX
        Runtime's CPU kernels, so that no step reorders them. ``state_io="renamed"`` goes well with it.

        Only ONNX Runtime's CPU provider runs it; a session refuses it where blocks are of another size. What
        :meth:`StreamSession.get_state` returns is in that layout.

        Raises:
            UnsupportedError: ONNX Runtime has no blocked layout here.
        """
        self._wide("to_native")
        return self._converted("native")

    def replaced_module(self) -> nn.Module:
        """Makes the clip network that this model computes, in PyTorch.

        With ``max_delay`` that with the replaced kernels.

        Its parameters are copies, under the network's own names, so that it can be fine-tuned on clips (with the batch
        norms as in eval mode), compiled again without ``max_delay``, and its ``state_dict`` be loaded into the network.
        Gates are the pools that the network has; they become gates again.

        Raises:
            UsageError: It is not what :func:`compile` returned.
        """
        if self.source is None:
            hint = "Call it on what co3d.compile returned."
            raise UsageError("A model that was made of another one has no clip network.", hint=hint)
        return self.source.replaced(self.program.notes.limited, self.program.options.delay_by == "fold")

    def to_module(self) -> StepModule:
        """Makes the step in eager PyTorch, with explicit state and trainable weights (docs/pytorch.md)."""
        from co3d_compile.targets.torch_step import StepModule

        self._wide("to_module")
        return StepModule(self.program, self.info)

    def with_weights(self, module: StepModule) -> CompiledModel:
        """Makes a compiled model with the weights of a step module that was trained.

        Raises:
            UsageError: The module is of another compiled model.
            UnsupportedError: The model was compiled with ``boundary="exact"``.
        """
        from co3d_compile.targets.torch_step import with_weights

        self._wide("with_weights")
        program = with_weights(self.program, module)
        model = export(program)
        return CompiledModel(program, model, self.info, self._report)

    def with_half_states(self) -> CompiledModel:
        """Makes the same model with its float32 states kept as float16: half the bytes, no longer exact."""
        return self._converted("half-states")

    def to_int8(self, frames: Iterable[Any]) -> CompiledModel:
        """Makes convolutions and matrix products 8-bit ones, by ONNX Runtime's quantisation.

        The model is no longer exact.

        Args:
            frames: For calibration, what :meth:`StreamSession.step` takes for one stream: more steps than the warm-up.

        Raises:
            UsageError, SessionError: Too few frames, or not what the model takes.
        """
        return self._converted("int8", frames)

    def _converted(self, name: str, *more: Iterable[Any]) -> CompiledModel:
        """Converts the program by a row of the table of targets. The report says if that is not exact."""
        metadata.refuse_free_rows(self.info, f"The form '{name}'")
        target, report = TARGETS[name], self._report
        model, info = target.converter()(self.model, self.info, *more)
        if target.inexact:
            size = sum(bytes_of(s.shape, getattr(torch, s.dtype)) for s in info.states)
            note = f"{target.inexact}: results are near those of the clip model, not equal to them."
            report = dataclasses.replace(report, state_bytes=size, warnings=[*report.warnings, note])
            model.metadata_props[metadata.REPORT_KEY] = json.dumps(details(report, self.program.notes.survey))
        return CompiledModel(self.program, model, info, report)

    def to_exported_program(self, batch: int | None = None, *, executorch: bool = False) -> ExportedProgram:
        """Exports the step as a ``torch.export`` program with explicit state, for AOTInductor, ExecuTorch and the like.

        Its arguments are the inputs of the ONNX file in their order: frames, ``valid`` if there is one, then one per
        state. It returns the results, then the next state of each state.

        Args:
            batch: The number of streams, fixed; None: any number.
            executorch: Writes what ExecuTorch has no kernels for, such as 3D convolutions, in other operators.

        Raises:
            UsageError: The model itself fixes another batch.
        """
        from co3d_compile.targets.executorch_operators import for_executorch
        from co3d_compile.targets.torch_step import exported_program

        self._wide("to_exported_program")
        program = exported_program(self.program, batch)
        return for_executorch(program) if executorch else program

    def save_exported_program(self, path: str | os.PathLike[str]) -> Path:
        """Writes :meth:`to_exported_program` as a ``.pt2`` archive, with the contract as its extra file ``co3d``.

        Raises:
            OutputError: The path cannot be written.
        """
        from co3d_compile.targets.torch_step import positional_contract

        with whole_file(path) as written:
            extra = {metadata.METADATA_KEY: positional_contract(self.info)}
            torch.export.save(self.to_exported_program(), written.with_suffix(".pt2"), extra_files=extra)
            written.with_suffix(".pt2").rename(written)  # PyTorch warns of other endings
        return Path(path)

    def __repr__(self) -> str:
        facts = dict(self._report.facts())
        return f"<CompiledModel {facts['model']}; receptive field {facts['receptive field']}; state {facts['state']}>"

    def _wide(self, what: str) -> None:
        metadata.refuse_free_rows(self.info, what)
        if self.info.options.get("state_dtype") == "float16" or self.info.options.get("int8"):
            raise UsageError(f"{what} needs a model in full precision.", hint="Call it on the model as it was before.")

    def _repr_html_(self) -> str:
        return self._report.to_html()
