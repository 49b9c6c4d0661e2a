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

from onnx_cases import Outcome, node_tests, run  # noqa: E402

from co3d_compile.capture.onnx_reader.control_flow import CONTROL  # noqa: E402
from co3d_compile.capture.onnx_reader.node_call import TABLE  # noqa: E402

PAGE = ROOT / "docs" / "onnx.md"
OPERATORS = "## Operators"
TEXT = """## Operators

ONNX carries tests of each operator: {passed} of {every} ({share:.1%}) of those for the operators below pass. They have
inputs and outputs of floats, whole numbers or truth values, in the newest operator set; an operator without such a test
has 0 of 0. `benchmarks/onnx_operators.py` writes the table, and a test compares it.

| operator | tests |
| --- | --- |
{operators}

## Tests that fail

| test | why |
| --- | --- |
{failed}
"""


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
    counts = {"passed": passed.total(), "every": every.total(), "share": passed.total() / every.total()}
    return TEXT.format(**counts, operators="\n".join(rows), failed="\n".join(failed))


if __name__ == "__main__":
    main()
