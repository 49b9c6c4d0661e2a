"""Sessions of small networks in both layouts: as the file is, and as this machine's kernels have it."""

from __future__ import annotations

import pytest

from co3d_compile.native import running_form

LAYOUTS = ("plain", "native")


@pytest.fixture(params=LAYOUTS, autouse=True)
def session_layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Files of any size are converted, or none."""
    name: str = request.param
    monkeypatch.setattr(running_form, "LEAST_BYTES", 0 if name == "native" else 1 << 62)
    return name
