"""Writes the table of docs/targets.md: each target on each kind of model, beside the plain ONNX step.

    targets_table.py                 the targets that are installed here
    targets_table.py "LiteRT, XNNPACK"

Rows of other targets stay as they are on the page. So does that of one that somewhere neither agrees nor refuses as
tests/target_cells.py says, and the script says where. `make test-targets` installs the runtimes (tests/targets.sh).
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import warnings
from dataclasses import astuple, dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from target_cells import REFUSALS, REFUSED, cell, refused  # noqa: E402
from target_kinds import KINDS  # noqa: E402
from target_readers import Missing  # noqa: E402
from target_runs import TARGETS  # noqa: E402

PAGE = ROOT / "docs" / "targets.md"
HEAD = "| target | what ran | kinds that agree | largest difference | limit | refuses |\n" + "| --- " * 6 + "|\n"
NOT_RUN = "not run"
KINDS_HEAD = "| kind | what it has | refused by |\n| --- | --- | --- |\n"


@dataclass(frozen=True)
class Row:
    """One line of the table, as text."""

    target: str
    version: str
    agree: str
    difference: str
    limit: str
    refuses: str

    def line(self) -> str:
        """As it stands on the page."""
        return "| " + " | ".join(astuple(self)) + " |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", choices=[[], *TARGETS], metavar="TARGET")
    chosen = parser.parse_args().targets
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    wrong = False
    for target in chosen or TARGETS:
        try:
            TARGETS[target].check()
        except Missing as error:
            print(f"{target}: left as it is: {error}", flush=True)
            continue
        found, problems = tried(target)
        if problems:
            wrong = True
            print("\n".join(problems), flush=True)
        else:
            write({target: row_of(target, found)})
            print(f"{target}: {found:.0e}", flush=True)
    sys.exit(1 if wrong else 0)


def tried(target: str) -> tuple[float, list[str]]:
    """The largest difference of a target over all kinds, and what is not as it should be."""
    worst, problems = 0.0, []
    for kind in KINDS:
        found, problem = outcome(target, kind)
        worst = max(worst, found)
        if problem:
            problems.append(f"{target} on {kind}: {problem}")
    return worst, problems


def outcome(target: str, kind: str) -> tuple[float, str]:
    """The difference of a cell, 0 for one that is refused; and what is not as it should be."""
    reason, found = REFUSED.get(target, {}).get(kind), 0.0
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = cell(target, kind, Path(folder))
    except REFUSALS as error:
        expected = reason is not None and reason in str(error) and TARGETS[target].word in str(error)
        return 0.0, "" if expected else f"refused: {error}"
    except Exception as error:
        return 0.0, f"{type(error).__name__}: {error}"
    if reason is not None:
        return 0.0, f"{found:.1e}, where it should refuse"
    return found, "" if found <= TARGETS[target].limit else f"{found:.1e} off"


def row_of(target: str, found: float) -> Row:
    """What is on the page of a target that was run."""
    agree = f"{len(KINDS) - len(refused(target))} of {len(KINDS)}"
    return Row(target, TARGETS[target].version(), agree, f"{found:.0e}", *_limits(target))


def _limits(target: str) -> tuple[str, str]:
    return f"{TARGETS[target].limit:.0e}", "; ".join(refused(target)) or "none"


def kinds_text() -> str:
    """The table of the kinds, which says of each who refuses it."""
    lines = []
    for kind, row in KINDS.items():
        by = ", ".join(target for target in TARGETS if kind in REFUSED.get(target, {}))
        lines.append(f"| {kind} | {row.has} | {by or 'none'} |\n")
    return KINDS_HEAD + "".join(lines)


def read() -> dict[str, Row]:
    """The rows on the page."""
    found = _place("targets").search(PAGE.read_text())
    lines = found[2].splitlines()[2:] if found else []
    rows = [Row(*(part.strip() for part in line.strip().strip("|").split("|"))) for line in lines]
    return {row.target: row for row in rows}


def write(rows: dict[str, Row]) -> None:
    """Writes rows into the table, and the kinds."""
    absent = {target: Row(target, NOT_RUN, NOT_RUN, NOT_RUN, *_limits(target)) for target in TARGETS}
    merged = {**absent, **read(), **rows}
    text = PAGE.read_text()
    table = HEAD + "".join(merged[target].line() for target in TARGETS)
    for name, content in (("targets", table), ("kinds", kinds_text())):
        text = _place(name).sub(rf"\g<1>{content}\g<3>", text)
    PAGE.write_text(text)


def _place(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- begin {name} -->\n)(.*?)(<!-- end {name} -->)", re.DOTALL)


if __name__ == "__main__":
    main()
