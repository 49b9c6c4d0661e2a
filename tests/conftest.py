"""Settings of every test run."""

from __future__ import annotations

import atexit
import functools
import gc
import logging
import os
import shutil
import tempfile
import typing
from collections.abc import Generator

import pytest
import torch
import torch._export.utils as torch_export
import torch._ops
import torch.fx.experimental.proxy_tensor as proxy_tensor
import zoo  # noqa: F401  makes torchvision importable beside a CPU build of torch
from hypothesis import HealthCheck, Phase, settings

from co3d_compile.analysis import promises
from co3d_compile.onnx_export.by_torch_exporter import library_kept

torch.set_num_threads(1)
promises.always = True
os.environ["CO3D_CACHE"] = tempfile.mkdtemp(prefix="co3d-forms-")  # not the user's own
atexit.register(shutil.rmtree, os.environ["CO3D_CACHE"], ignore_errors=True)
os.environ["CO3D_STRICT_RULES"] = "1"  # a rule that fails is a bug to be seen (co3d_compile/rules/failures.py)
# Exports make millions of objects that stay for long: looking through them again and again was 40 % of the time.
gc.freeze()
gc.set_threshold(100_000, 20, 50)

# What PyTorch does anew at each export, though nothing changes in between, was a third to half of the time of a test:
# it looks up all composite operators in each namespace, and makes the types of 5,000 nested functions.
torch_export._materialize_cpp_cia_ops = functools.cache(torch_export._materialize_cpp_cia_ops)
torch._ops.Callable = typing.Callable  # type: ignore[attr-defined]  # the one that remembers what it has made
# PyTorch's exporter to ONNX reads its library of translations anew for each network: most of the time of a small one.
_LIBRARY = library_kept()  # it ends with its context manager
_LIBRARY.__enter__()
# It describes each tensor of a graph twice; nothing reads the second description.
proxy_tensor._extract_tensor_metadata = lambda *_args, **_kwargs: None  # type: ignore[attr-defined]
# Pytest listens to loggers that pass nothing on, and PyTorch writes each graph down for one that somebody listens to.
logging.getLogger("torch.__trace").propagate = True
logging.getLogger("torch.__trace").handlers.clear()

# Each example compiles a network and opens a session: health checks and deadlines for quick functions do not apply.
_COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
_PHASES = (Phase.explicit, Phase.generate, Phase.shrink)
settings.register_profile("networks", max_examples=25, phases=_PHASES, print_blob=False, **_COMMON)
settings.register_profile("thorough", settings.get_profile("networks"), max_examples=50)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests with one value of the argument ``network`` behind the first: they share what it compiles to.

    The order of everything else stays, so that workers, which take runs of tests, seldom make anything twice.
    """
    first: dict[str, int] = {}
    places = {item: first.setdefault(_network(item) or item.nodeid, place) for place, item in enumerate(items)}
    items.sort(key=places.__getitem__)


def _network(item: pytest.Item) -> str | None:
    """The network of the zoo that a test is about."""
    if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
        return None
    name = item.callspec.params.get("network")
    return None if name is None else f"network {name}".removesuffix("-small")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With CO3D_NO_SKIPS a test that is skipped has failed (make test-targets)."""
    report = yield
    if report.skipped and os.environ.get("CO3D_NO_SKIPS"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"{reason} (CO3D_NO_SKIPS is set)"
    return report
