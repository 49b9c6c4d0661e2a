"""Gates whose answer is copied to every entry, in the ways in which code bases write it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import Entry, seeded
from .gates import ScopedPool, gated

_VIDEO = (1, 3, 6, 6, 6)


class CopiedGate(nn.Module):
    """Squeeze-and-excitation whose answer, a vector, is copied to the shape of its operand; or stands beside it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.pool, self.fc = how, nn.AdaptiveAvgPool3d(1), nn.Linear(6, 6)
        self.across = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        gate = torch.sigmoid(self.fc(self.pool(x).flatten(1))).view(n, c, 1, 1, 1)
        if self.how == "repeat":
            return x * gate.repeat(1, 1, *x.shape[2:])
        if self.how == "beside":
            return torch.cat([x, gate.expand(-1, -1, *x.shape[2:])], 1)[:, 3:9]
        if self.how == "across":  # ECA: a convolution over the channels of what was pooled
            gate = self.across(self.pool(x).squeeze(-1).squeeze(-1).transpose(-1, -2)).transpose(-1, -2)
            return x * torch.sigmoid(gate)[..., None, None].expand_as(x)
        if self.how == "resampled":
            gate = F.interpolate(gate, size=x.shape[2:], mode="trilinear", align_corners=False)
            return torch.cat([x, gate], 1)[:, 3:9]
        return x * gate.expand_as(x)

    def scoped(self, window: int) -> nn.Module:
        return _ScopedCopy(self, window)


class _ScopedCopy(nn.Module):
    def __init__(self, gate: CopiedGate, window: int) -> None:
        super().__init__()
        self.gate, self.pool = gate, ScopedPool("mean", window)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(x)
        if self.gate.how == "across":
            rows = pooled.movedim(1, -1)
            return x * torch.sigmoid(self.gate.across(rows.reshape(-1, 1, 6)).view(rows.shape).movedim(-1, 1))
        gate = torch.sigmoid(self.gate.fc(pooled.movedim(1, -1))).movedim(-1, 1)
        if self.gate.how in ("beside", "resampled"):
            return torch.cat([x, gate.expand_as(x)], 1)[:, 3:9]
        return x * gate


HOW = ("expand_as", "repeat", "beside", "resampled", "across")


def _copied(how: str, scope: str) -> Entry:
    window = 1 if scope == "frame" else _VIDEO[2]
    build = seeded(
        lambda: nn.Sequential(nn.Conv3d(3, 6, 3, padding=1), CopiedGate(how), nn.Conv3d(6, 4, 3, padding=1)), _VIDEO
    )
    return Entry(f"gate_{how}-{scope}", build, (_VIDEO,), options={"pool_scope": scope}, reference=gated(window))


COPIED_GATES = tuple(_copied(how, scope) for how in HOW for scope in ("frame", "window"))
