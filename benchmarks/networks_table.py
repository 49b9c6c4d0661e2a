"""Writes docs/networks.md: one line per network, with what streams, what it costs and how exact it is.

    networks_table.py small          the rows that take seconds each, as the test regenerates them
    networks_table.py rejoined       loops over frames, and parts that are local in time
    networks_table.py c3d x3d_s      single rows, by name
    networks_table.py full           the rows at full size, which take minutes each
    networks_table.py --no-run full  full-size rows without the oracle: their error reads "not run"

Rows that are not asked for stay as they are on the page. The error comes from the oracle of the tests: the untouched
network on a long clip against the compiled file in ONNX Runtime, its states started at NaN.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
import time
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from compiled import compiled  # noqa: E402
from oracle import check  # noqa: E402
from rejoined import REJOINED  # noqa: E402
from zoo import Entry  # noqa: E402
from zoo.real import REAL  # noqa: E402
from zoo.small import SMALL  # noqa: E402

PAGE = ROOT / "docs" / "networks.md"
NOT_RUN = "not run"
TABLES = ("full size", "rejoined", "small")
HEADINGS = {
    "network": "network",
    "clip": "clip",
    "streams": "what streams",
    "windowed": "on a window",
    "gates": "gates",
    "gmac_clip": "GMAC clip",
    "gmac_frame": "GMAC frame",
    "ratio": "ratio",
    "delay": "delay",
    "field": "receptive field",
    "warmup": "warm-up",
    "state": "state MB",
    "pulse": "frames per step",
    "error": "error",
}


@dataclass(frozen=True)
class Row:
    """One line of the table, as text."""

    network: str
    clip: str
    streams: str
    windowed: str
    gates: str
    gmac_clip: str
    gmac_frame: str
    ratio: str
    delay: str
    field: str
    warmup: str
    state: str
    pulse: str
    error: str

    def line(self) -> str:
        return "| " + " | ".join(asdict(self).values()) + " |"

    @staticmethod
    def parse(line: str) -> Row:
        return Row(*(cell.strip() for cell in line.strip().strip("|").split("|")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = ["small", "full", "rejoined", *REJOINED, *small_names(), *REAL]
    parser.add_argument("networks", nargs="+", choices=choices, metavar="NETWORK")
    parser.add_argument("--no-run", action="store_true", help="compile only, leave the error empty")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for name in small_names():
        if name in args.networks or "small" in args.networks:
            update("small", {name: small_row(name, run=not args.no_run)})
    for name in REJOINED:
        if name in args.networks or "rejoined" in args.networks:
            update("rejoined", {name: make_row(name, REJOINED[name], run=not args.no_run)})
    for name in REAL if "full" in args.networks else [n for n in args.networks if n in REAL]:
        start = time.perf_counter()
        update("full size", {name: make_row(name, REAL[name].entry(small=False), run=not args.no_run, margin=4)})
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        gc.collect()


def small_names() -> list[str]:
    """All rows that take seconds: the small zoo, and the real networks with fewer channels and pixels."""
    return [*SMALL, *(f"{name}-small" for name in REAL)]


def small_row(name: str, run: bool = True) -> Row:
    entry = SMALL[name] if name in SMALL else REAL[name.removesuffix("-small")].entry(small=True)
    return make_row(name, entry, run=run)


def make_row(name: str, entry: Entry, run: bool = True, margin: int | None = None) -> Row:
    """Compiles a network, and streams it against the untouched one where it is to be run."""
    report = compiled(entry).report()
    delays = dict.fromkeys(str(o["delay"]) for o in report.outputs)
    unbounded = report.receptive_field is None
    facts: dict[str, Any] = {
        "network": name,
        "clip": ", ".join("x".join(map(str, shape)) for shape in entry.shapes),
        "streams": streams(report),
        "windowed": recomputed(report),
        "gates": gates(report),
        "gmac_clip": number(report.gmac_clip),
        "gmac_frame": number(report.gmac_frame),
        "ratio": f"{report.gmac_ratio:.1f}" if report.gmac_clip else "",
        "delay": ", ".join(delays),
        "field": "unbounded" if unbounded else str(report.receptive_field),
        "warmup": str(report.warmup_steps),
        "state": number(report.state_bytes / 1e6),
        "pulse": ", ".join(map(str, report.frames_per_step.values())),
    }
    error = f"{check(entry, margin=margin).error:.0e}" if run else NOT_RUN
    return Row(**facts, error=error)


def streams(report: Any) -> str:
    """How far the network streams."""
    timed = [o["has_time"] for o in report.outputs]
    if report.recomputed:
        return "up to the first recomputed operator"
    if report.window is None or all(timed):
        return "all"
    return f"all up to the head, which reads {report.window} frames"


def recomputed(report: Any) -> str:
    """What is computed again on a window at every step: the operators that began one."""
    names: dict[str, str] = {}
    for fallback in report.recomputed:
        names.setdefault(fallback["operator"].removeprefix("aten."), fallback["module_path"] or "the model")
    return "; ".join(f"{operator} in {path}" for operator, path in names.items()) or "none"


def gates(report: Any) -> str:
    scopes = [gate["scope"] for gate in report.gates]
    return ", ".join(f"{scopes.count(scope)} over one {scope}" for scope in dict.fromkeys(scopes)) or "none"


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def read(page: Path = PAGE) -> dict[str, dict[str, Row]]:
    """The rows of each table on the page."""
    text = page.read_text() if page.exists() else ""
    return {table: _parse(text, table) for table in TABLES}


def _parse(text: str, table: str) -> dict[str, Row]:
    found = re.search(rf"<!-- begin {table} -->\n(.*?)<!-- end {table} -->", text, re.DOTALL)
    lines = found.group(1).strip().splitlines()[2:] if found else []
    return {row.network: row for row in map(Row.parse, lines)}


def update(table: str, rows: dict[str, Row], page: Path = PAGE) -> None:
    """Writes rows into one table of the page, between its markers; the others stay."""
    merged = {**read(page)[table], **rows}
    order = {"full size": list(REAL), "rejoined": list(REJOINED), "small": small_names()}[table]
    lines = [merged[name].line() for name in order if name in merged]
    head = ["| " + " | ".join(HEADINGS[f.name] for f in fields(Row)) + " |", "| --- " * len(fields(Row)) + "|"]
    body = "\n".join([*head, *lines]) + "\n"
    pattern = rf"(<!-- begin {table} -->\n).*?(<!-- end {table} -->)"
    page.write_text(re.sub(pattern, lambda m: m.group(1) + body + m.group(2), page.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
