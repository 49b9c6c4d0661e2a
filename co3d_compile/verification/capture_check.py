"""Whether the graph that was captured computes what the clip model does: both run on one random clip."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from math import inf

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter
from torch.utils import _pytree as pytree

from co3d_compile.capture.tracer import evaluated
from co3d_compile.errors import VerificationError
from co3d_compile.ir.node_reading import drawn_by_chance
from co3d_compile.ir.program import Program
from co3d_compile.ir.random_runs import equal
from co3d_compile.verification.clip_model import (
    SAME,
    Example,
    Model,
    eager,
    example_of,
    off_by_rounding,
    results_inside,
)
from co3d_compile.verification.random_clips import RandomClips

ROUNDING = 1e-4  # standard deviations: more is not put down to rounding in float32


class CaptureCheck:
    """The captured graph beside the model itself.

    Args:
        program: The captured graph.
        model: What it was captured from.
        example: The arguments of one clip.
    """

    def __init__(self, program: Program, model: Model, example: Example) -> None:
        self.program, self.model = program, model
        self.leaves, self.spec = pytree.tree_flatten(example_of(model, example))
        self.clip: Sequence[Tensor] = ()
        self.wanted: list[Tensor] = []

    def run(self, random_clips: RandomClips) -> None:
        """Runs both on one random clip.

        Raises:
            VerificationError: They differ by more than rounding.
        """
        captured = Interpreter(self.program.module)
        with eager():
            clip, got = random_clips.settle(lambda clip: captured.run(*[x.clone() for x in clip]))
        with results_inside(self.model, self.program.options.also) as inside:
            wanted = self._called(self.model, clip)
        self.clip, self.wanted = clip, [x.clone() for x in wanted]  # it may write into what it has returned
        count = len(wanted) if self.program.options.also else len(got)
        if not self._alike(got[:count], wanted, clip):
            raise VerificationError(
                f"The captured graph does not compute what the model does{drawn_by_chance(self.program.graph.nodes)}.",
                hint="Two calls of the model with the same clip must give the same: take out what draws by chance "
                "(functional dropout: training=self.training), counts calls or changes its own buffers.",
            )
        for name, a in zip([o.name for o in self.program.outputs[len(wanted) :]], got[len(wanted) :], strict=True):
            if inside and all(_distance([a], [b]) > SAME for b in inside):
                raise VerificationError(
                    f"The output '{name}' is not what that module returns.", hint="Name another module in also."
                )

    def repeats(self) -> bool:
        """Says whether the model gives the same for the clip again, behind another one: the frames backwards."""
        largest = max((x.numel() for x in self.clip), default=0)
        backwards = [x.flip(tuple(range(1, x.dim()))) if x.numel() == largest else x for x in self.clip]
        with suppress(Exception):  # it may refuse what is no clip of it
            self._called(self.model, backwards)
        again = self._called(self.model, self.clip)
        return all(equal(a, b, SAME) for a, b in zip(again, self.wanted, strict=True))

    def _called(self, model: Model, clip: Sequence[Tensor]) -> list[Tensor]:
        """Computes what the model gives for a clip."""
        tensors = iter(clip)
        leaves = [next(tensors).clone() if isinstance(v, Tensor) else v for v in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        with eager(), evaluated(model) as module:
            return [v for v in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(v, Tensor)]

    def _alike(self, got: Sequence[Tensor], wanted: Sequence[Tensor], clip: Sequence[Tensor]) -> bool:
        """Says whether nothing but rounding is different: sums in another order, in a network that amplifies them."""
        off = _distance(got, wanted)
        if off <= SAME:
            return True
        if off <= ROUNDING:  # as far as the model is from itself where its frames are rounded otherwise
            rounded = self._called(self.model, off_by_rounding(clip, torch.Generator().manual_seed(0)))
            if off <= 4 * _distance(rounded, wanted):
                return True
        return self._alike_in_float64(clip)

    def _alike_in_float64(self, clip: Sequence[Tensor]) -> bool:
        if not isinstance(self.model, nn.Module):
            return False
        doubled = [x.double() if x.is_floating_point() else x.clone() for x in clip]
        try:
            wanted = self._called(copy.deepcopy(self.model).double(), doubled)
            graph = copy.deepcopy(self.program.graph)
            with eager():
                got = Interpreter(GraphModule(self.program.module, graph).double()).run(*doubled)
        except (IndexError, RuntimeError, TypeError, ValueError):
            return False
        return _distance(got[: len(wanted)], wanted) <= SAME


def _distance(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Measures the largest difference in standard deviations of what is wanted; infinite where another is finite.

    So it is where there are fewer results, as of a graph that cannot be run.
    """
    if len(got) != len(wanted):
        return inf
    return max((_off(a, b) for a, b in zip(got, wanted, strict=True)), default=0.0)


def _off(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return inf
    a, b = a.double(), b.double()
    finite = b[b.isfinite()]
    scale = (float(finite.std(correction=0)) if finite.numel() else 0.0) or 1.0
    same = (a == b) | (a.isnan() & b.isnan())
    off = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=inf)
    return float(off.max()) / scale if off.numel() else 0.0
