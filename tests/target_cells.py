"""The table of targets and kinds of models: what a cell must give, and what is refused where."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
from target_job import Job, Results, by_the_loop
from target_kinds import KINDS, compiled_kind, steps_of
from target_readers import Refusal
from target_runs import TARGETS

import co3d_compile as co3d

REFUSALS = (co3d.Co3dError, Refusal)
_NO_ROWS = {"boxes": "no place for the input 'boxes'"}
_LENGTHS = ("region with a least length", "U-Net with exact ends")
_VERSION = dict.fromkeys(("boxes", *_LENGTHS), "contract version 1")
_MOVED = {"renamed": "an output per state"}
_FLAGS = {
    kind: 'model with boundary="exact" cannot be quantised'
    for kind, row in KINDS.items()
    if row.options.get("boundary") == "exact"
}
REFUSED: Mapping[str, Mapping[str, str]] = {
    "`--native`": _NO_ROWS,
    "float16 states": {**_NO_ROWS, "float64": "only states of float64", "no state": "no state"},
    "8 bits": {**_NO_ROWS, **_FLAGS},
    "PyTorch, eager": _NO_ROWS,
    "`torch.export` archive": _NO_ROWS,
    "AOTInductor": _NO_ROWS,
    "ExecuTorch, XNNPACK": _NO_ROWS,
    "LiteRT, XNNPACK": {
        **_NO_ROWS,
        **dict.fromkeys(_LENGTHS, "contract version 1"),
        **dict.fromkeys(("float64", "uint8 frames"), "converter does not take this step"),
    },
    "OpenVINO, its own states": {**_VERSION, **_MOVED},
    "OpenVINO, states outside": {**_VERSION, **_MOVED},
    "OpenVINO, bfloat16": {**_VERSION, **_MOVED},
    "Node.js": _VERSION,
    "Browser's WebAssembly": _VERSION,
    "C++": _VERSION,
    "Triton's batcher": {
        **_NO_ROWS,
        "renamed": "States that only move have no output of their own",
        **dict.fromkeys(_LENGTHS, "only in streams of"),
    },
    "`co3d serve`": {
        **_NO_ROWS,
        "one stream only": "compiled for a batch of 1",
        "input without time": "has no time",
    },
}
"""What a target refuses, and what the error says of the reason. Every other cell must agree."""


@cache
def expected(kind: str, ends: bool) -> Results:
    """What the plain file gives."""
    return by_the_loop(Job(kind, compiled_kind(kind), steps_of(kind, ends), Path()))


def cell(target: str, kind: str, folder: Path) -> float:
    """Runs a target on a kind of model. Returns the largest difference from the plain file.

    It is in standard deviations of each output. Raises whatever the target refuses the model with.
    """
    model = compiled_kind(kind)
    ends = TARGETS[target].ends or model.info.valid is None
    results = TARGETS[target].call(Job(kind, model, steps_of(kind, ends), folder))
    return difference(results, expected(kind, ends))


def difference(actual: Results, wanted: Results) -> float:
    """The largest difference of two runs, in standard deviations of each output."""
    worst = 0.0
    assert len(actual) == len(wanted)
    for mine, theirs in zip(zip(*actual, strict=True), zip(*wanted, strict=True), strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
        found, right = (np.concatenate([x.ravel() for x in side]).astype(np.float64) for side in (mine, theirs))
        assert np.isfinite(right).all() and right.any()
        worst = max(worst, float(np.nan_to_num(np.abs(found - right), nan=np.inf).max()) / float(right.std()))
    return worst


def refused(target: str) -> list[str]:
    """The kinds that a target refuses."""
    return [kind for kind in KINDS if kind in REFUSED.get(target, {})]
