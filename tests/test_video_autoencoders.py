"""The autoencoders of ``diffusers``, in its own code: the rows of docs/networks.md, whole streams with both ends.

``diffusers`` is no package of this project's environment; benchmarks/video_autoencoders.py says how to install it.
"""

from __future__ import annotations

import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from video_autoencoders import ROWS, Row, line, written

pytestmark = [pytest.mark.slow, pytest.mark.long]
MOST = 60  # seconds of one core, with both boundaries and what runs them
EXACT = 1e-4


@pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is not installed")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.network} {row.part}")
def test_row_is_what_compiling_gives(row: Row) -> None:
    began = time.process_time()
    *cells, error, _ = [cell.strip() for cell in line(row).split("|")]
    assert row.network != "Wan 2.1" or time.process_time() - began < MOST
    (known,) = [text for text in written()[1].splitlines() if text.startswith(f"| {row.network} {row.part} |")]
    assert [cell.strip() for cell in known.split("|")][:-2] == cells, "run benchmarks/video_autoencoders.py"
    assert error == "on a window" or float(error) < EXACT
