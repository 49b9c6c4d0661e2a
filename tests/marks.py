"""Which target of make runs a case of a test."""

from __future__ import annotations

import pytest


def slow(*values: object) -> object:
    """A case of a test that ``make check`` leaves out."""
    return pytest.param(*values, marks=pytest.mark.slow)


def long(*values: object) -> object:
    """A case of a test that ``make test-long`` alone runs."""
    return pytest.param(*values, marks=[pytest.mark.long, pytest.mark.slow])
