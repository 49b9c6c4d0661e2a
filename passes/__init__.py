"""The rewrites, one a file, in the order in which they run, and what a pass of your own is written with."""

from co3d_compile.ir.graph_edits import delay, insert, insert_constant, insert_marker, replace
from co3d_compile.ir.node_reading import module_path
from co3d_compile.ir.pass_manager import Pass, PassList
from co3d_compile.ir.program import Output, Program
from co3d_compile.passes.annotate_time import AnnotateTime
from co3d_compile.passes.block_channels import BlockChannels
from co3d_compile.passes.canonicalize import Canonicalize
from co3d_compile.passes.continual_convolutions import Continual
from co3d_compile.passes.delay_residuals import DelayResiduals
from co3d_compile.passes.fold_batch_norm import FoldBatchNorm
from co3d_compile.passes.join_starts import JoinStarts
from co3d_compile.passes.limit_delay import LimitDelay
from co3d_compile.passes.lower import Lower
from co3d_compile.passes.mark_ends import MarkEnds
from co3d_compile.passes.strip_temporal_padding import StripTemporalPadding
from co3d_compile.passes.thread_states import ThreadStates
from co3d_compile.passes.windows_and_gates import WindowsAndGates


def default_passes() -> PassList:
    """Makes a new list of the passes that :func:`co3d_compile.compile` runs."""
    return PassList(
        [
            Canonicalize(),
            FoldBatchNorm(),
            LimitDelay(),
            AnnotateTime(),
            JoinStarts(),
            StripTemporalPadding(),
            Continual(),
            WindowsAndGates(),
            DelayResiduals(),
            MarkEnds(),
            Lower(),
            BlockChannels(),
            ThreadStates(),
        ]
    )


__all__ = [
    "AnnotateTime",
    "BlockChannels",
    "Canonicalize",
    "Continual",
    "DelayResiduals",
    "FoldBatchNorm",
    "JoinStarts",
    "LimitDelay",
    "Lower",
    "MarkEnds",
    "Output",
    "Pass",
    "PassList",
    "Program",
    "StripTemporalPadding",
    "ThreadStates",
    "WindowsAndGates",
    "default_passes",
    "delay",
    "insert",
    "insert_constant",
    "insert_marker",
    "module_path",
    "replace",
]
