"""An operator of one's own in a small 3D CNN: compiled, streamed in ONNX Runtime, checked against the untouched model.

The operator is the temporal shift of TSM (Lin, Gan and Han, ICCV 2019): an eighth of the channels comes from the
entry before, an eighth from the entry after, the rest stays. PyTorch knows nothing about it but its shape.

Run: python examples/custom_operator.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import co3d_compile as co3d


@torch.library.custom_op("mylib::temporal_shift", mutates_args=())
def temporal_shift(x: Tensor, fold: int) -> Tensor:
    """Channels [0, fold) one entry later, [fold, 2 fold) one entry earlier; zeros come in at both ends."""
    y = torch.zeros_like(x)
    y[:, :fold, 1:] = x[:, :fold, :-1]
    y[:, fold : 2 * fold, :-1] = x[:, fold : 2 * fold, 1:]
    y[:, 2 * fold :] = x[:, 2 * fold :]
    return y


@temporal_shift.register_fake
def _(x: Tensor, fold: int) -> Tensor:
    return torch.empty_like(x)


@co3d.rule(temporal_shift, kernel=co3d.Kernel(k=3, p=1))
def shifted_entry(entries: list[Tensor], fold: int) -> Tensor:
    """One entry of the output, from the three that it reads: (N, C, H, W) each, oldest first."""
    before, now, after = entries
    return torch.cat([before[:, :fold], after[:, fold : 2 * fold], now[:, 2 * fold :]], dim=1)


class ShiftBlock(nn.Module):
    """A residual block: shift, then a convolution over space."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.norm = nn.BatchNorm3d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm(self.conv(temporal_shift(x, x.shape[1] // 8))))


def network() -> nn.Sequential:
    """Three blocks and a head over 8 frames of 64 x 64."""
    return nn.Sequential(
        nn.Conv3d(3, 16, (1, 3, 3), (1, 2, 2), (0, 1, 1)),
        *(ShiftBlock(16) for _ in range(3)),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    ).eval()


def main() -> None:
    """Compiles, streams 40 frames, and compares each answer with the untouched network."""
    torch.manual_seed(0)
    model = network()
    compiled = co3d.compile(model, (torch.rand(1, 3, 8, 64, 64),))
    video = torch.rand(1, 3, 40, 64, 64)
    with tempfile.TemporaryDirectory() as folder:
        session = co3d.StreamSession(str(compiled.save(Path(folder) / "shift.onnx")))
        answers = np.stack([session.step(video[:, :, t].numpy()) for t in range(40)])

    trunk, head = model[:4], model[4:]  # the head pools over the newest 8 entries
    delay = session.info.delays["output"]
    worst = 0.0
    with torch.no_grad():
        entries = trunk(video)
        for t in range(session.info.warmup_steps, 40):
            newest = t - delay  # the index of the newest entry that this answer has read
            expected = head(entries[:, :, newest - 7 : newest + 1]).numpy()
            worst = max(worst, float(np.abs(answers[t] - expected).max()))
    print(f"delay {delay} frames, receptive field {session.info.receptive_field}, warm-up {session.info.warmup_steps}")
    print(f"largest difference from the untouched network over {40 - session.info.warmup_steps} answers: {worst:.1e}")
    if worst > 1e-5:
        raise SystemExit("they differ")


if __name__ == "__main__":
    main()
