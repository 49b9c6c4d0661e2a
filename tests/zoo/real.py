"""Real video networks by name, at full size and small (`row.Real`)."""

from __future__ import annotations

from .pytorchvideo_nets import RESNETS, X3D
from .torchvision_nets import TORCHVISION

REAL = {row.name: row for row in (*X3D, *RESNETS, *TORCHVISION)}
