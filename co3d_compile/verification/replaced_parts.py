"""What a file computes in place of the network's own pools and kernels, and what that makes of the network.

A file with gates is compared with the network that has the same gates, and one of which kernels read less of the future
with the network that has these kernels: so what they themselves change is looked at here, beside the untouched network
on the same clips. So is a result that never changes, whatever was replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from co3d_compile.contract.model_contract import Contract
from co3d_compile.support.plain_types import Array
from co3d_compile.support.readable_numbers import plural
from co3d_compile.verification.compared_steps import Frames, Segment
from co3d_compile.verification.comparison import spread
from co3d_compile.verification.reference import Reference
from co3d_compile.verification.time_claims import NoReference

UNTOUCHED = "the untouched network"
SAME = 1e-5  # standard deviations of the untouched network's output: two results that differ by less are the same
DIFFERENT = 1e-3  # standard deviations: two results that differ by more are not
Results: TypeAlias = Mapping[int, tuple[Array, ...]]


class ReplacedParts:
    """The gates of a network, and its kernels that read less of the future.

    Args:
        reference: The network.
        info: The contract of the file.

    Attributes:
        compared_with: What a file is compared with, in words.
        distance: The largest difference from the untouched network on the same clips, in standard deviations of its
            output; None where nothing is replaced, and where it cannot be told.
        constant: Outputs that do not depend on the input, where those of the untouched network do.
    """

    def __init__(self, reference: Reference, info: Contract) -> None:
        self.reference, self.info = reference, info
        gates, kernels = len(reference.gates()), len(reference.kernels)
        self.distance: float | None = None
        self.constant: list[str] = []
        scope, budget, by = (info.options.get(name) for name in ("pool_scope", "max_delay", "delay_by"))
        parts = [f"{plural(gates, 'gate')} over one {scope} (pool_scope={scope})"] if gates else []
        if kernels:
            parts.append(f"less of the future in {plural(kernels, 'kernel')} (max_delay={budget}, delay_by={by})")
        self.gates, self.any = gates, bool(parts)
        self.compared_with = f"the network with {' and '.join(parts)}" if parts else UNTOUCHED

    def look(self, segment: Segment, results: Results) -> None:
        """Compares with the untouched network on clips of the frames that were streamed.

        Args:
            segment: The first steps that were compared.
            results: The results of the file at all steps that were compared.
        """
        if self.info.free_rows is not None:
            return
        streamed = [np.stack(values) for values in zip(*results.values(), strict=True)]
        still = [len(v) > 1 and _moves_by(v) <= SAME * max(1.0, float(abs(v).max(initial=0))) for v in streamed]
        if not (self.any or any(still)):
            return
        clips = [self._clip(segment, offset) for offset in (0, len(segment.steps) // 2)]
        untouched = [self.reference.untouched(clip) for clip in clips]
        scales = [spread(values) for values in zip(*untouched, strict=True)]
        for k, output in enumerate(self.info.outputs):
            if untouched[0][k].is_floating_point() and not self.reference.plans[k].first_for_ever:
                moves = _largest_difference(untouched[0][k], untouched[1][k]) > DIFFERENT * scales[k]
                if moves and still[k] and _moves_by(streamed[k]) <= SAME * scales[k]:
                    self.constant.append(output.name)
        if not self.any:
            return
        try:
            replaced = [self.reference.replaced(clip) for clip in clips]
        except NoReference:
            return
        pairs = [
            pair for ours, theirs in zip(replaced, untouched, strict=True) for pair in zip(ours, theirs, strict=True)
        ]
        self.distance = max(
            _largest_difference(a, b) / scale for (a, b), scale in zip(pairs, scales * len(clips), strict=True)
        )

    def _clip(self, segment: Segment, offset: int) -> Frames:
        """Joins the frames of the compared steps to one clip, from a step on, and over again where they are few."""
        reference, steps = self.reference, len(segment.steps)
        pulse = len(segment.inside) // (segment.steps.stop - segment.base)
        clip = []
        for spec, x in zip(reference.inputs, segment.clip, strict=True):
            if spec.time_dim is not None:
                rate = reference.rates[spec.name]
                stop, each = int(segment.inside.stop / rate), int(pulse / rate)
                index = (torch.arange(spec.shape[spec.time_dim]) + each * offset) % (each * steps)
                x = x.index_select(spec.time_dim, index + stop - each * steps)
            clip.append(x)
        return clip

    @property
    def reason(self) -> str:
        """Why a file does not pass; empty if nothing is wrong."""
        if not self.constant:
            return ""
        names = ", ".join(f"'{name}'" for name in self.constant)
        what = f"Output {names} does not depend on the input, and that of the untouched network does"
        if not self.any:
            return f"{what}: inside of a long clip it is constant, and in a clip of the captured length it is not."
        way = "pool_scope='window' or 'recompute'" if self.gates else "a larger max_delay, or another delay_by"
        return f"{what}: {self.compared_with} is another network. Compile with {way}."


def _moves_by(results: Array) -> float:
    """Measures by how much a result changes from step to step."""
    return float(np.ptp(results.astype(np.float64), 0).max()) if results.size else 0.0  # of yes and no, too


def _largest_difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
