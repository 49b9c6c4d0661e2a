"""Settings of every test run."""

from __future__ import annotations

import gc

import torch
import zoo  # noqa: F401  makes torchvision importable beside a CPU build of torch
from hypothesis import HealthCheck, Phase, settings

torch.set_num_threads(1)
# Exports make millions of objects that stay for long: looking through them again and again was 40 % of the time.
gc.freeze()
gc.set_threshold(100_000, 20, 50)

# Each example compiles a network and opens a session: health checks and deadlines for quick functions do not apply.
_COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
_PHASES = (Phase.explicit, Phase.generate, Phase.shrink)
settings.register_profile("networks", max_examples=25, phases=_PHASES, print_blob=False, **_COMMON)
settings.register_profile("thorough", settings.get_profile("networks"), max_examples=50)
