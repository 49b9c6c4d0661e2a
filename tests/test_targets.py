"""Every target and precision on every kind of model: the numbers of the plain ONNX step, or a refusal by name."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from target_cells import REFUSALS, REFUSED, cell, refused
from target_kinds import KINDS
from target_readers import Missing
from target_runs import TARGETS

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from targets_table import NOT_RUN, PAGE, kinds_text, read


def row(kind: str, target: str) -> Any:
    marks = [pytest.mark.slow, *([pytest.mark.long] if TARGETS[target].long else [])]
    return pytest.param(
        kind, target, marks=marks, id="-".join(re.sub(r"\W+", "_", n.replace("+", "p")) for n in (target, kind))
    )


CELLS = [row(kind, target) for kind in KINDS for target in TARGETS]


@pytest.mark.parametrize(("network", "target"), CELLS)
def test_it_agrees_or_refuses(network: str, target: str, tmp_path: Path) -> None:
    try:
        TARGETS[target].check()
    except Missing as error:
        pytest.skip(str(error))
    reason = REFUSED.get(target, {}).get(network)
    if reason is None:
        assert cell(target, network, tmp_path) <= TARGETS[target].limit
        return
    with pytest.raises(REFUSALS) as found:
        cell(target, network, tmp_path)
    assert reason in str(found.value) and TARGETS[target].word.lower() in str(found.value).lower()


@pytest.mark.parametrize("target", TARGETS)
def test_the_page_says_what_was_run(target: str) -> None:
    row = read()[target]
    assert row.refuses == ("; ".join(refused(target)) or "none"), "run benchmarks/targets_table.py"
    assert float(row.limit) == TARGETS[target].limit and row.version
    if row.agree != NOT_RUN:
        assert row.agree == f"{len(KINDS) - len(refused(target))} of {len(KINDS)}"
        assert float(row.difference) <= TARGETS[target].limit


def test_the_page_has_all_kinds() -> None:
    assert kinds_text() in PAGE.read_text() and list(read()) == list(TARGETS)


def test_what_is_refused_is_in_the_table() -> None:
    assert set(REFUSED) <= set(TARGETS) and all(set(kinds) <= set(KINDS) for kinds in REFUSED.values())
