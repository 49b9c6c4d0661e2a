"""Draws docs/images/architecture.svg and writes the table of docs/architecture.md, in place.

Both come from the code. The imports are read by grimp, the floors are those of the import contract in pyproject.toml,
and the sentences are the first ones of the packages' docstrings. ``--check`` writes nothing and ends with exit code 1
when the files differ from what the code says.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
import tomllib
from dataclasses import dataclass
from html import escape
from pathlib import Path

import grimp
import networkx

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "co3d_compile"
PICTURE = ROOT / "docs" / "images" / "architecture.svg"
PAGE = ROOT / "docs" / "architecture.md"
TABLE = re.compile(r"(?<=<!-- draw_architecture.py writes from here -->\n).*(?=<!-- to here -->)", re.DOTALL)
WAY = ("capture", "passes", "onnx_export", "verification", "runtime")  # of a model; the page tells it by these numbers

WIDTH, MARGIN, GAP, TOP = 900, 16, 10, 44
HEAD, LINE, CHARACTER = 28, 16, 7.0  # pixels above the first line, per line, and per character of a wide font
WINGS = {
    "The compiler: needs torch": (MARGIN, 532),
    "What runs a compiled model: no torch": (572, WIDTH - MARGIN - 572),
}
STYLE = """
text { font-family: -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; font-size: 13px; fill: #1f2328; }
.name { font-weight: 700; font-size: 15px; } .uses { font-style: italic; fill: #59636e; }
.wing { font-size: 14px; fill: #59636e; } .way { font-weight: 700; fill: #ffffff; text-anchor: middle; }
.card { fill: #ffffff; } .compiler { fill: #e3edfb; stroke: #7aa2dc; } .runs { fill: #e2f3e5; stroke: #79b888; }
.dot { fill: #bc4c00; }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc; } .uses, .wing { fill: #b1bac4; } .card { fill: #161b22; }
  .compiler { fill: #1c2f4a; stroke: #4a76b5; } .runs { fill: #1b3824; stroke: #4b8a5b; }
}
"""


@dataclass(frozen=True)
class Room:
    """A package as the page shows it: its sentence, and the packages that it imports."""

    name: str
    sentence: str
    needs_torch: bool
    uses: tuple[str, ...]  # without those that are reached through others, too


def floors() -> list[list[str]]:
    """The names on each floor of the import contract, top floor first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [layer.split(" | ") for layer in layers if not layer.startswith("_")]  # __main__ has no sentence of its own


def sentence(file: Path) -> str:
    """The first sentence of a module's docstring, on one line."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return re.split(r"(?<=\.)\s", docstring)[0].replace("``", "`")


def rooms() -> dict[str, Room]:
    """The packages by name, with what their imports say."""
    names = [name for floor in floors() for name in floor]
    sys.path.insert(0, str(ROOT))
    imports = grimp.build_graph(PACKAGE, include_external_packages=True, cache_dir=None)
    files = {name: ROOT / PACKAGE / name for name in names}
    sentences = {n: sentence(f / "__init__.py" if f.is_dir() else f.with_suffix(".py")) for n, f in files.items()}
    between = networkx.DiGraph()
    between.add_nodes_from(names)
    for module in imports.find_descendants(PACKAGE):
        for imported in imports.find_modules_directly_imported_by(module):
            ends = [package_of(module), package_of(imported)]
            if ends[0] != ends[1] and ends[1] in names:
                between.add_edge(*ends)
    direct = networkx.transitive_reduction(between)
    torch = {name for name in names if imports.find_shortest_chain(f"{PACKAGE}.{name}", "torch", as_packages=True)}
    return {n: Room(n, sentences[n], n in torch, tuple(m for m in names if m in direct[n])) for n in names}


def package_of(module: str) -> str:
    """The name below the package: ``ir`` for ``co3d_compile.ir.program``."""
    return module.removeprefix(PACKAGE + ".").split(".")[0]


def table(rooms: dict[str, Room]) -> str:
    """One row per floor and package."""
    lines = ["", "| floor | package | what is in it | imports |", "| --- | --- | --- | --- |"]
    for height, floor in zip(range(len(floors()), 0, -1), floors(), strict=True):
        for room in (rooms[name] for name in floor):
            uses = ", ".join(f"`{name}`" for name in room.uses)
            lines.append(f"| {height} | `{room.name}` | {room.sentence} | {uses} |")
    return "\n".join([*lines, "", ""])


def picture(rooms: dict[str, Room]) -> str:
    """The floors of both wings as SVG, each package a box; nothing in it depends on the machine."""
    wings = [
        Wing(title, *place, storeys(rooms, torch))
        for (title, place), torch in zip(WINGS.items(), (True, False), strict=True)
    ]
    height = TOP + max(sum(wing.heights()) for wing in wings) + MARGIN
    parts = [f'<rect class="card" width="{WIDTH}" height="{height}" rx="10"/>']
    for wing in wings:
        parts.append(f'<text class="wing" x="{wing.left}" y="30">{escape(wing.title)}</text>')
        spare = (height - TOP - MARGIN - sum(wing.heights())) / len(wing.storeys)
        y = float(TOP)
        for floor, least in zip(wing.storeys, wing.heights(), strict=True):
            width = wing.box_width(floor)
            for column, room in enumerate(floor):
                parts += drawn(room, wing.left + column * (width + GAP), y, width, least + spare - GAP)
            y += least + spare
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>", ""])


def storeys(rooms: dict[str, Room], needs_torch: bool) -> list[list[Room]]:
    """The floors of one wing, top floor first, without those that have no room there."""
    here = [[rooms[name] for name in floor if rooms[name].needs_torch == needs_torch] for floor in floors()]
    return [floor for floor in here if floor]


@dataclass(frozen=True)
class Wing:
    """The half of the picture for the packages with or without torch."""

    title: str
    left: int
    width: int
    storeys: list[list[Room]]

    def box_width(self, floor: list[Room]) -> float:
        """Pixels of each box on a floor."""
        return (self.width - GAP * (len(floor) - 1)) / len(floor)

    def heights(self) -> list[int]:
        """The least pixels per floor, the gap below it included."""
        most = [max(len(lines(room, self.box_width(floor))) for room in floor) for floor in self.storeys]
        return [HEAD + LINE * count + GAP for count in most]


def lines(room: Room, width: float) -> list[tuple[str, str]]:
    """What stands below the name, broken to the box: each line with its class."""
    columns = int((width - 12) / CHARACTER)
    uses = textwrap.wrap("imports " + ", ".join(room.uses), columns) if room.uses else []
    about = textwrap.wrap(room.sentence.replace("`", ""), columns)
    return [*(("about", line) for line in about), *(("uses", line) for line in uses)]


def drawn(room: Room, x: float, y: float, width: float, height: float) -> list[str]:
    """A box with name, sentence and imports, and the package's number on the way of a model."""
    look = "compiler" if room.needs_torch else "runs"
    parts = [f'<rect class="{look}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="6"/>']
    parts.append(f'<text class="name" x="{x + 8:.1f}" y="{y + 18:.1f}">{room.name}</text>')
    for number, (kind, line) in enumerate(lines(room, width)):
        below = y + HEAD + 9 + LINE * number
        parts.append(f'<text class="{kind}" x="{x + 8:.1f}" y="{below:.1f}">{escape(line)}</text>')
    if room.name in WAY:
        centre = x + width - 14
        parts.append(f'<circle class="dot" cx="{centre:.1f}" cy="{y + 14:.1f}" r="9"/>')
        parts.append(f'<text class="way" x="{centre:.1f}" y="{y + 19:.1f}">{WAY.index(room.name) + 1}</text>')
    return parts


def main(*arguments: str) -> None:
    """Writes both files; with ``--check``, says which of them are not as the code is."""
    found = rooms()
    page = PAGE.read_text(encoding="utf-8")
    new = {PICTURE: picture(found), PAGE: TABLE.sub(lambda _: table(found), page)}
    stale = [path for path, text in new.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in arguments:
        sys.exit("".join(f"{path.name} is not as the code is: run docs/draw_architecture.py\n" for path in stale) or 0)
    for path in stale:
        path.write_text(new[path], encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
