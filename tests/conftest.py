"""Settings of every test run."""

from __future__ import annotations

import torch
import zoo  # noqa: F401  makes torchvision importable beside a CPU build of torch

torch.set_num_threads(1)
