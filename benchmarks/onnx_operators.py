"""Writes the tables of docs/onnx.md: the operators that the reader knows, and ONNX's own tests that it does not pass.

onnx_operators.py      runs all node tests that the package onnx carries for these operators (half a minute)
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from onnx_cases import CONTROL, TABLE, Outcome, node_tests, run  # noqa: E402

PAGE = ROOT / "docs" / "onnx.md"
OPERATORS, FAILED = "## Operators", "## Tests that fail"


def main() -> None:
    warnings.filterwarnings("ignore")
    outcomes = [run(test) for test in node_tests()]
    text = PAGE.read_text(encoding="utf-8").partition(OPERATORS)[0]
    PAGE.write_text(text + tables(outcomes), encoding="utf-8")


def tables(outcomes: list[Outcome]) -> str:
    """Both tables, as they stand at the end of the page."""
    passed, every = Counter(o.operator for o in outcomes if o.passed), Counter(o.operator for o in outcomes)
    rows = [f"| `{name}` | {passed[name]} of {every[name]} |" for name in sorted({*TABLE, *CONTROL})]
    failed = [f"| `{o.name.removeprefix('test_')}` | {o.reason.split('): ')[-1]} |" for o in outcomes if not o.passed]
    share = passed.total() / every.total()
    return (
        f"{OPERATORS}\n\nONNX carries tests of each operator; {passed.total()} of {every.total()} ({share:.1%}) of those for the"
        " operators below pass: inputs and outputs\nof floats, whole numbers or truth values, the newest operator set. Operators"
        " without a test in the package have 0 of 0. The table is\nwritten by `benchmarks/onnx_operators.py`, and a test"
        " compares.\n\n| operator | tests |\n| --- | --- |\n" + "\n".join(rows) + f"\n\n{FAILED}\n\n| test | why |\n| --- | --- |\n"
        + "\n".join(failed) + "\n"
    )  # fmt: skip


if __name__ == "__main__":
    main()
