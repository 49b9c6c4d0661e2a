"""Streams of unlike length in one session, each compared with the clip model on its own clip."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from oracle import open_session
from torch import Tensor, nn
from zoo.longclip import eager

import co3d_compile as co3d


def run(session: Any, clips: list[Tensor], steps: int, hold: Callable[[int], None] = lambda j: None) -> list[Any]:
    """Streams of unlike length in one session; what comes after an end is noise."""
    pulse = next(iter(session.info.frames_per_step.values()))
    rng = np.random.default_rng(0)
    results = []
    for j in range(steps):
        hold(j)
        frames, valid = [], []
        for clip in clips:
            part = clip[:, :, j * pulse : (j + 1) * pulse].numpy()
            there = part.shape[2]
            noise = rng.standard_normal((*part.shape[:2], pulse - there, *part.shape[3:])).astype(np.float32)
            frames.append(np.concatenate([part, noise], 2))
            valid.append([True] * there + [False] * (pulse - there))
        results.append(session.step(np.concatenate(frames), valid=np.array(valid)))
    return results


def streams(module: nn.Module, expected: nn.Module, lengths: list[int], clip_frames: int = 8, **options: Any) -> None:
    """N streams that end when they like: each output entry of each is the clip model's on that clip alone."""
    shape = next(p.shape for p in module.parameters() if p.dim() > 2)
    space = [4, 4] if len(shape) == 5 else []
    torch.manual_seed(3)
    compiled = co3d.compile(module, (torch.randn(1, 4, clip_frames, *space),), boundary="exact", **options)
    session = open_session(compiled, len(lengths))
    clips = [torch.randn(1, 4, n, *space) for n in lengths]
    pulse = next(iter(session.info.frames_per_step.values()))
    steps = math.ceil(max(lengths) / pulse) + session.info.flush_steps
    results = run(session, clips, steps)
    for k, output in enumerate(session.info.outputs):
        for n, clip in enumerate(clips):
            with eager():
                wanted = expected(clip)
            wanted = (wanted if isinstance(wanted, tuple) else (wanted,))[k][0].numpy()
            values = [(r if isinstance(r, tuple) else (r,))[k][n] for r in results]
            if not output.has_time:
                np.testing.assert_allclose(values[-1], wanted, atol=1e-4)
                continue
            joined = np.concatenate(values, 1) if output.entries_per_step > 1 else np.stack(values, 1)
            got = joined[:, output.delay : output.delay + wanted.shape[1]]
            np.testing.assert_allclose(got, wanted, atol=1e-4)
