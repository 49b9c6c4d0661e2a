"""Which target of make runs a case of a test."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from _pytest.mark import ParameterSet


def slow(*values: object) -> object:
    """A case of a test that ``make check`` leaves out."""
    return pytest.param(*values, marks=pytest.mark.slow)


def few(cases: Iterable[Any], *quick: object) -> list[object]:
    """Cases of which ``make check`` runs these alone, one of each kind; those of ``pytest.param`` go by their id."""
    rows: list[object] = []
    for case in cases:
        if isinstance(case, ParameterSet):
            marks = [*case.marks, *([] if case.id in quick else [pytest.mark.slow])]
            rows.append(pytest.param(*case.values, id=case.id, marks=marks))
        elif case in quick:
            rows.append(case)
        else:
            rows.append(slow(*case) if isinstance(case, tuple) else slow(case))
    return rows


def all_but(cases: Iterable[Any], *left_out: object) -> list[object]:
    """Cases of which ``make check`` leaves these out; those of ``pytest.param`` go by their id."""
    cases = list(cases)
    names = [case.id if isinstance(case, ParameterSet) else case for case in cases]
    assert set(left_out) <= set(names), set(left_out) - set(names)
    return few(cases, *(name for name in names if name not in left_out))


def long(*values: object) -> object:
    """A case of a test that ``make test-long`` alone runs."""
    return pytest.param(*values, marks=[pytest.mark.long, pytest.mark.slow])
