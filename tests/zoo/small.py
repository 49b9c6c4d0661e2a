"""All small networks by name."""

from __future__ import annotations

from .attention import ATTENTION, RECURRENT
from .convnets import CONVNETS
from .dual_path import DUAL_PATH
from .fourier import FOURIER
from .gated import GATED
from .overlaps import OVERLAPS
from .sequences import SEQUENCES
from .slices import SLICES
from .styles import STYLES
from .video_transformers import VIDEO_TRANSFORMERS

_SEQUENCES = (*SEQUENCES, *ATTENTION, *VIDEO_TRANSFORMERS, *RECURRENT, *DUAL_PATH, *OVERLAPS, *FOURIER)
SMALL = {entry.name: entry for entry in (*CONVNETS, *_SEQUENCES, *GATED, *SLICES, *STYLES)}
