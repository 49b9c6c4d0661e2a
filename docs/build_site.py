"""Builds the pages as a site: ``make docs``, or ``python docs/build_site.py [FOLDER]``.

The site is made of the repository as it is laid out, README.md first, so that a link means the same in both. MkDocs
wants its pages in a folder below that of its configuration: one of links is made for it. The file is a hook of MkDocs,
too.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FILES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff", "LICENSE")
FOLDERS = ("docs", "examples", "benchmarks")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Pipes in the code of a table: code hosts want them escaped, Python-Markdown shows the backslash."""
    lines = (line.replace("\\|", "|") if line.startswith("|") else line for line in markdown.split("\n"))
    return "\n".join(lines)


def lay_out(source: Path) -> None:
    """Makes the folder of pages: links to what is in the repository."""
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    for name in (*FILES, *FOLDERS):
        (source / name).symlink_to(ROOT / name)


def main(site: str = str(ROOT / "build" / "site")) -> None:
    """Builds into a folder; a warning, such as a link that leads nowhere, ends it with exit code 1."""
    from mkdocs.__main__ import cli

    lay_out(ROOT / "build" / "docs" / "source")
    cli(["build", "--strict", "--config-file", str(ROOT / "mkdocs.yml"), "--site-dir", site])


if __name__ == "__main__":
    main(*sys.argv[1:])
