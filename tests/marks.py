"""Which target of make runs a case of a test."""

from __future__ import annotations

import pytest


def long(*values: object) -> object:
    """A case of a test for ``make test-long`` alone."""
    return pytest.param(*values, marks=[pytest.mark.long, pytest.mark.slow])
