"""The kinds of compiled models that targets are tried on: each has another kind of state, input or output."""

from __future__ import annotations

from functools import cache
from typing import Any

from zoo.small import SMALL

import co3d_compile as co3d

# Network, options, batch.
TARGET_ROWS: dict[str, tuple[str, dict[str, Any], int]] = {
    "past entries": ("p3d", {}, 1),
    "states that only move": ("p3d", {"state_io": "renamed"}, 1),
    "a batch": ("p3d", {}, 3),
    "flags and counters": ("p3d", {"boundary": "exact"}, 1),
    "pasts of minus infinity": ("resnext3d", {"boundary": "exact"}, 1),
    "queues": ("wavenet_small", {}, 1),
    "recurrent": ("cnn_lstm", {}, 2),
    "several frames a step": ("unet_linear", {}, 1),
    "several rates": ("audio_visual", {}, 1),
    "several outputs": ("two_heads", {}, 1),
    "recomputed window": ("transformer", {}, 1),
}


@cache
def compiled_row(row: str) -> co3d.CompiledModel:
    name, options, _ = TARGET_ROWS[row]
    entry = SMALL[name]
    return co3d.compile(entry.build(), entry.examples(), time_dim=entry.time_dim, **{**entry.options, **options})
