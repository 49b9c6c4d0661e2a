"""docs/networks.md says of every small network what compiling it says now. The errors there are measured elsewhere."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from marks import long, slow
from rejoined import REJOINED
from zoo.real import REAL
from zoo.small import SMALL

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from networks_table import NOT_RUN, Row, make_row, read, small_names

PAGE = read()
EXACT = 1e-4  # the tolerance of the oracle


@pytest.mark.parametrize("network", [*map(slow, SMALL), *map(long, REJOINED)])
def test_row_is_what_compiling_gives(network: str) -> None:
    """Other tests of ``make test`` compile and run the rejoined ones."""
    written = PAGE["small" if network in SMALL else "rejoined"][network]
    entry = SMALL.get(network) or REJOINED[network]
    assert replace(make_row(network, entry, run=False), error=written.error) == written, (
        "run benchmarks/networks_table.py"
    )


def test_every_network_has_its_line() -> None:
    assert list(PAGE["small"]) == small_names()
    assert list(PAGE["rejoined"]) == list(REJOINED)
    assert list(PAGE["full size"]) == list(REAL)


@pytest.mark.parametrize("row", [*PAGE["rejoined"].values(), *PAGE["small"].values()], ids=lambda row: row.network)
def test_errors_are_within_the_tolerance(row: Row) -> None:
    assert row.error == NOT_RUN or float(row.error) <= EXACT


@pytest.mark.parametrize("row", PAGE["full size"].values(), ids=lambda row: row.network)
def test_errors_at_full_size_are_rounding(row: Row) -> None:
    """The oracle, which wrote them, allows more than 1e-4 where the untouched network rounds as badly itself."""
    assert float(row.error) <= 10 * EXACT
