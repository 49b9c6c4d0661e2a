"""The pages hold: their Python runs, their links lead somewhere, what they name exists.

Every block fenced as ``python`` in README.md and docs/ is run, those of one page in order, in one namespace and an
empty folder. Code that is not to be run is fenced as ``text``. Two names are there already, for pages about compiled
files: ``path`` of a small one, and ``frames`` that it takes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from marks import slow
from torch import nn

import co3d_compile as co3d

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
BLOCK = re.compile(r"^(?P<fence>`{3,})(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=fence)\s*$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")  # links and pictures
DEFINED = re.compile(r"^\[[^\]]+\]: +(\S+)$", re.MULTILINE)


def python_of(page: Path) -> str:
    """The page's Python, at the line numbers that it has on the page."""
    text = page.read_text(encoding="utf-8")
    source, line = "", 1
    for block in BLOCK.finditer(text):
        if block["language"] == "python":
            start = text.count("\n", 0, block.start("code")) + 1
            source += "\n" * (start - line) + block["code"]
            line = start + block["code"].count("\n")
    return source


def anchors(page: Path) -> set[str]:
    """The names that links into this page can end in: its headings, as code hosts spell them."""
    headings = re.findall(r"^#+ +(.+)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    network = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten()).eval()
    path = tmp_path_factory.mktemp("docs") / "model.onnx"
    co3d.compile(network, (torch.zeros(1, 3, 4, 16, 16),)).save(path)
    return {"path": str(path), "frames": np.zeros((12, 1, 3, 16, 16), np.float32)}


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


LONGEST = ("docs/custom_passes.md", "docs/custom_operators.md", "docs/verify.md")


@pytest.mark.parametrize("page", [slow(p) if page_id(p) in LONGEST else p for p in PAGES if python_of(p)], ids=page_id)
def test_python_on_the_page_runs(
    page: Path, given: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(python_of(page), str(page), "exec"), {"__name__": "__main__", **given})


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_to_pages_of_this_repository(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for link in INLINE.findall(text) + DEFINED.findall(text):
        target, _, anchor = link.partition("#")
        if "://" in target:  # without a network only its form can be looked at
            parts = urlsplit(target)
            assert parts.scheme == "https" and "." in parts.netloc and parts.path, f"{page_id(page)}: {link}"
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page_id(page)} links to {target}, which is not there"
        assert path.is_relative_to(ROOT), f"{page_id(page)} links to {target}, outside of the repository"
        if anchor:
            assert anchor in anchors(path), f"{page_id(page)} links to {link}, which has no such heading"


def test_every_link_that_is_named_is_defined() -> None:
    for page in PAGES:
        text = BLOCK.sub("", page.read_text(encoding="utf-8"))
        text = re.sub(r"`[^`]*`|^ {4}.*$", "", text, flags=re.MULTILINE)  # code
        defined = set(re.findall(r"^\[([^\]]+)\]: ", text, re.MULTILINE))
        named = set(re.findall(r"(?<!\])\[([^\]\n]+)\](?![(:\[])", text))
        assert named <= defined, f"{page_id(page)} names {named - defined}"


def test_the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = re.findall(r"^::: co3d_compile\.(\w+)$", page, re.MULTILINE)
    assert sorted(named) == sorted(co3d.__all__)
    assert set(re.findall(r"`co3d\.(\w+)", page)) == set(named), "who reads the file sees what each name is"


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """Every page is in the navigation, no link or anchor is broken, every public name has its docstring there."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, str(ROOT / "docs" / "build_site.py"), str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "site" / "docs" / "api.html").read_text(encoding="utf-8")
    for name in co3d.__all__:
        assert f'id="co3d_compile.{name}"' in reference, name
    assert "\\|" not in (tmp_path / "site" / "docs" / "run.html").read_text(encoding="utf-8")


def test_every_block_says_what_it_is() -> None:
    known = {"python", "text", "sh", "json", "diff", "kotlin"}
    for page in PAGES:
        for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
            assert block["language"] in known, f"{page_id(page)} has a block fenced as {block['language'] or 'nothing'}"


def test_make_targets_on_the_pages_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"(?:`|^)make (\w+)", page.read_text(encoding="utf-8"), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page_id(page)} names `make {target}`"


def test_the_citation_is_of_this_version() -> None:
    assert f"\nversion: {co3d.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_workflow_names_tests_that_exist() -> None:
    named = re.findall(r"tests/\w+\.py", (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert named and all((ROOT / name).exists() for name in named)


def test_every_package_is_installed() -> None:
    """A folder of modules that is no package is missing from wheels, and so is one that no link leads to."""
    assert {ROOT / "co3d_compile" / name for name in ("cli", "passes")} <= set(
        map(Path, os.scandir(ROOT / "co3d_compile"))
    )
    for folder, _, files in os.walk(ROOT / "co3d_compile", followlinks=True):
        if any(file.endswith(".py") for file in files):
            assert "__init__.py" in files, f"{folder} has no __init__.py"


def test_every_requirement_is_pinned() -> None:
    """Whoever installs with the constraints gets what was tested."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pinned = {normal(name) for name in pins}
    for requirement in chain(project["dependencies"], *project["optional-dependencies"].values()):
        name = normal(re.split(r"[\[<>=~! ]", requirement)[0])
        assert name == project["name"] or name in pinned, f"{requirement} has no version in constraints.txt"


def normal(name: str) -> str:
    """A package name as indexes compare them."""
    return re.sub(r"[-_.]+", "-", name).lower()
