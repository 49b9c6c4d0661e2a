"""``bench``: milliseconds per frame of a network, run as people run it now and compiled, side by side."""

from __future__ import annotations

import re
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from co3d_compile.bench.one_tap_floor import floor_passes
from co3d_compile.bench.timing import SIDES, Progress, time_in_turns
from co3d_compile.capture.tracer import export
from co3d_compile.compiler.compile_model import compile
from co3d_compile.compiler.compiled_model import CompiledModel
from co3d_compile.contract.model_contract import refuse_free_rows
from co3d_compile.errors import Co3dError, Co3dWarning, UnsupportedError, UsageError
from co3d_compile.report.facts import work_text
from co3d_compile.support.install_hint import install_command
from co3d_compile.support.plain_types import JsonObject
from co3d_compile.support.silence_torch import quiet


def bench(
    model: nn.Module | ExportedProgram,
    example_inputs: Sequence[Any] | None = None,
    *,
    sides: Sequence[str] = tuple(SIDES),
    rounds: int = 3,
    seconds: float = 1.0,
    threads: int = 2,
    more: Mapping[str, tuple[str, Path]] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> JsonObject:
    """Times a clip model and what it compiles to, in turns, each turn in a process of its own.

    Args:
        model: The clip model, as for :func:`co3d_compile.compile`; also ``example_inputs``.
        sides: Which of :data:`co3d_compile.bench.timing.SIDES`.
        rounds: Turns of each side.
        seconds: Length of a turn.
        threads: Of ONNX Runtime and PyTorch.
        more: Further sides: {name: (kind of :func:`co3d_compile.bench.timing.turn`, file)}.
            Their calls count as a step's.
        progress: Called with (stage, done, total).
        options: Options of ``compile``.

    Returns:
        Plain data: ``sides`` with milliseconds per frame of the first input (median, quartiles, medians of the rounds,
        calls) and bytes of memory, ``left_out`` with reasons, ``ratios`` of medians, GMAC, state, ``machine``. A clip
        model is run once for each answer that the compiled model gives, so with strides once per ``frames_per_step``.

    Raises:
        UsageError: An unknown side, or nothing to time.
        Co3dError: The model does not compile, or a side cannot be run.
    """
    unknown = set(sides) - set(SIDES)
    if unknown or rounds < 1 or threads < 1:
        what = f"No side is called {', '.join(sorted(unknown))}." if unknown else "Time at least one round."
        raise UsageError(what, hint=f"There are {', '.join(SIDES)}." if unknown else None)
    say = progress or (lambda *_: None)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        say("compile", 0, 1)
        compiled = compile(model, example_inputs, **options)
        refuse_free_rows(compiled.info, "A timing")
        facts = {"compile_seconds": time.perf_counter() - start, **_facts(compiled)}
        maker = _Maker(model, example_inputs, compiled, Path(folder), options)
        files, left_out = maker.files(sides, say)
        files.update(more or {})
        frames = next(iter(compiled.info.frames_per_step.values()))
        return {**facts, **time_in_turns(files, rounds, seconds, threads, frames, say, left_out)}


class _Maker:
    """A writer of the files of the sides."""

    def __init__(
        self,
        model: nn.Module | ExportedProgram,
        examples: Sequence[Any] | None,
        compiled: CompiledModel,
        folder: Path,
        options: JsonObject,
    ) -> None:
        self.model, self.examples, self.compiled = model, examples, compiled
        self.folder, self.options = folder, options

    def files(self, sides: Sequence[str], say: Progress) -> tuple[dict[str, tuple[str, Path]], dict[str, str]]:
        """Makes the files: {side: (kind, file)}, and why a side has none."""
        made: dict[str, tuple[str, Path]] = {}
        left_out: dict[str, str] = {}
        wanted = [side for side in SIDES if side in sides]
        for done, side in enumerate(wanted):
            say(f"write {side}", done, len(wanted))
            try:
                made[side] = (KINDS.get(side, side), FILES[side](self))
            except Co3dError as error:
                left_out[side] = str(error)
        return made, left_out

    @cached_property
    def _program(self) -> ExportedProgram:
        if isinstance(self.model, ExportedProgram):
            return self.model
        return export(self.model, self.examples, two=False)

    def archive(self) -> Path:
        """Writes the clip model as a torch.export archive."""
        path = self.folder / "clip.pt2"
        torch.export.save(self._program, path)
        return path

    def clip(self) -> Path:
        """Writes the clip model as an ONNX file."""
        path = self.folder / "clip.onnx"
        if not path.exists():
            try:
                with torch.inference_mode(), quiet(stdout=True):
                    torch.onnx.export(self._program, (), path, dynamo=True, verbose=False)
            except torch.onnx.errors.OnnxExporterError as error:
                what = f"PyTorch's exporter does not take the clip model: {_first_cause(error)}."
                raise UnsupportedError(what, hint="Nothing else needs it: it stays out of the comparison.") from error
        return path

    def window(self) -> Path:
        """Writes the clip model, for a window of frames that is moved over its input."""
        if any(i.time_dim not in (None, 2) for i in self.compiled.info.inputs) or len(self.compiled.info.inputs) > 1:
            raise UsageError("A moving window is timed for one input with time at dim 2.")
        return self.clip()

    def openvino(self) -> Path:
        """Writes the clip model, for OpenVINO."""
        if find_spec("openvino") is None:
            raise UsageError("OpenVINO is not installed.", hint=install_command("co3d-compile[openvino]"))
        return self.clip()

    def step(self) -> Path:
        """Writes the compiled file."""
        path = self.folder / "step.onnx"
        return path if path.exists() else self.compiled.save(path)

    def floor(self) -> Path:
        """Writes the compiled file of the network without its taps over time."""
        options = {"window": 1, **self.options, "passes": floor_passes()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Co3dWarning)  # that nothing is remembered is what a floor is for
            floor = compile(self.model, self.examples, **options)
        return floor.save(self.folder / "floor.onnx")


KINDS = {"floor": "step"}  # of the turns of a side, where it is not called like the side
FILES: dict[str, Callable[[_Maker], Path]] = {
    "pytorch": _Maker.archive,
    "clip": _Maker.clip,
    "window": _Maker.window,
    "openvino": _Maker.openvino,
    "openvino32": _Maker.openvino,
    "step": _Maker.step,
    "plain": _Maker.step,
    "floor": _Maker.floor,
}


def _first_cause(error: BaseException) -> str:
    """The first line of what set off an error that PyTorch has wrapped, without its colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    return re.sub(r"\x1b\[\d*m", "", str(error)).strip().partition("\n")[0].rstrip(".")


def _facts(compiled: CompiledModel) -> JsonObject:
    report = compiled.report().to_dict()
    keys = (
        "gmac_clip",
        "gmac_frame",
        "gmac_ratio",
        "state_bytes",
        "warmup_steps",
        "receptive_field",
        "frames_per_step",
    )
    return {"work": work_text(report), **{key: report[key] for key in keys}}
