"""Builds the pages as a site: ``make docs``, or ``python docs/build_site.py [FOLDER]``.

The site is made of the repository as it is laid out, README.md first, so that a link means the same in both. MkDocs
wants its pages in a folder below that of its configuration: one of links is made for it. Another folder holds the
package as it installs, for the reference. The file is a hook of MkDocs, too.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CHANGELOG.md", "LICENSE", "docs", "examples", "benchmarks")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Pipes in the code of a table: code hosts want them escaped, Python-Markdown shows the backslash."""
    lines = (line.replace("\\|", "|") if line.startswith("|") else line for line in markdown.split("\n"))
    return "\n".join(lines)


def lay_out(folder: Path) -> None:
    """``source`` and ``package`` in a folder, as links."""
    shutil.rmtree(folder, ignore_errors=True)
    source, package = folder / "source", folder / "package" / "co3d_compile"
    source.mkdir(parents=True)
    package.mkdir(parents=True)
    for name in PAGES:
        (source / name).symlink_to(ROOT / name)
    for part in [*(ROOT / "co3d_compile").iterdir(), ROOT / "passes", ROOT / "cli"]:
        if not (package / part.name).is_symlink():
            (package / part.name).symlink_to(part)


def main(site: str = str(ROOT / "build" / "site")) -> None:
    """Builds into a folder; a warning, such as a link that leads nowhere, ends it with exit code 1."""
    from mkdocs.__main__ import cli

    lay_out(ROOT / "build" / "docs")
    cli(["build", "--strict", "--config-file", str(ROOT / "mkdocs.yml"), "--site-dir", site])


if __name__ == "__main__":
    main(*sys.argv[1:])
