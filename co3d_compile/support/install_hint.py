"""How to install what is missing, for someone who has this package from a checkout, from a wheel or from an index."""

from __future__ import annotations

import json
import shlex
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

PACKAGE = "co3d-compile"
CHECKOUT = Path(__file__).parents[2]


def install_command(requirement: str) -> str:
    """Writes a command that installs this; ``requirement``: as pip takes it, such as ``co3d-compile[video]``."""
    name, bracket, extras = requirement.partition("[")
    before, place, behind = _origin() if name == PACKAGE else ("", name, "")
    return f"pip install {before}{shlex.quote(place + bracket + extras + behind)}"


def _origin() -> tuple[str, str, str]:
    """Writes what pip was given for this installation, around the extras.

    Options, the package or its place, its address.
    """
    if (CHECKOUT / "pyproject.toml").is_file():  # an editable installation, or on the path without being installed
        return "-e ", str(CHECKOUT), ""
    try:
        origin = json.loads(metadata.distribution(PACKAGE).read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        origin = {}
    url = str(origin.get("url", ""))
    if url.startswith("file:"):
        return "", url2pathname(urlsplit(url).path), ""
    version_control = origin.get("vcs_info", {}).get("vcs")
    return "", PACKAGE, f" @ {version_control + '+' if version_control else ''}{url}" if url else ""
