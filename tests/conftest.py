"""Settings of every test run."""

from __future__ import annotations

import torch
import zoo  # noqa: F401  makes torchvision importable beside a CPU build of torch
from hypothesis import HealthCheck, Phase, settings

torch.set_num_threads(1)

# Each example compiles a network and opens a session: health checks and deadlines for quick functions do not apply.
_COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
_PHASES = (Phase.explicit, Phase.generate, Phase.shrink)
settings.register_profile("networks", max_examples=25, phases=_PHASES, print_blob=False, **_COMMON)
settings.register_profile("thorough", settings.get_profile("networks"), max_examples=50)
