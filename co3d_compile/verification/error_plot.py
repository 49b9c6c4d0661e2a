"""The error of a verification over time, as a picture: SVG, PNG, or a page for a browser."""

from __future__ import annotations

import html
import io
import math
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from co3d_compile.errors import Co3dError, UsageError
from co3d_compile.support.atomic_file import whole_file
from co3d_compile.support.install_hint import install_command
from co3d_compile.verification.findings import StepError

PICTURES = (".svg", ".png")
FORMATS = (*PICTURES, ".html")
LEAST = 1e-9  # standard deviations: what is below is drawn there


def check_plot(path: str | os.PathLike[str], formats: Sequence[str] = FORMATS) -> Path:
    """Checks that a plot can be written under such a name, and gives it back.

    Raises:
        UsageError: Another kind of file. Co3dError: matplotlib is missing.
    """
    target = Path(path)
    if target.suffix.lower() not in formats:
        raise UsageError(f"{target} is no name for a plot.", hint=f"It must end with {', '.join(formats)}.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise Co3dError("A plot needs matplotlib.", hint=install_command("co3d-compile[plot]")) from error
    return target


def save_plot(
    path: str | os.PathLike[str], title: str, errors: tuple[StepError, ...], tolerance: float, said: Sequence[str]
) -> Path:
    """Writes the plot to a temporary file, which is then renamed.

    Args:
        path: Ends with one of the ``FORMATS``.
        title: Stands above the plot.
        errors: The error of every step that was compared, in order.
        tolerance: The relative error that is allowed.
        said: Lines of text for a page.

    Raises:
        UsageError, Co3dError: As ``check_plot``. OutputError: The path cannot be written.
    """
    target = check_plot(path)
    kind = target.suffix.lower().removeprefix(".")
    data = _page(title, errors, tolerance, said) if kind == "html" else _picture(title, errors, tolerance, kind)
    with whole_file(target) as written:
        written.write_bytes(data)
    return target


def runs(errors: tuple[StepError, ...]) -> list[list[StepError]]:
    """Groups the errors of steps that follow each other."""
    found = [list(errors[:1])] if errors else []
    for last, error in pairwise(errors):
        if error.step == last.step + 1:
            found[-1].append(error)
        else:
            found.append([error])
    return found


def _picture(title: str, errors: tuple[StepError, ...], tolerance: float, kind: str) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes: Any = figure.add_subplot()
    for part in runs(errors):
        heights = [_height(e.relative) for e in part]
        axes.plot([e.step for e in part], heights, color="tab:blue", marker=".", linewidth=1)
        lost = [e.step for e in part if not math.isfinite(e.relative)]
        axes.plot(lost, [1.0] * len(lost), "x", color="tab:red")
    axes.axhline(tolerance, color="tab:red", linewidth=1, linestyle="--")
    axes.annotate(
        f"tolerance {tolerance:.0e}", (0.995, tolerance), xycoords=("axes fraction", "data"),
        ha="right", va="bottom", color="tab:red", fontsize=8,
    )  # fmt: skip
    axes.set(yscale="log", xlabel="step", ylabel="error in standard deviations", title=title)
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _height(error: float) -> float:
    return max(LEAST, error) if math.isfinite(error) else math.nan


def _page(title: str, errors: tuple[StepError, ...], tolerance: float, said: Sequence[str]) -> bytes:
    picture = _picture("", errors, tolerance, "svg").decode()
    picture = picture[picture.index("<svg") :]
    rows = "".join(f"<tr><td>{e.step}<td>{e.absolute:.3g}<td>{e.relative:.3g}" for e in errors)
    text = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        "<style>body{font:14px sans-serif;max-width:60em;margin:2em auto;padding:0 1em}svg{width:100%;height:auto}"
        "td,th{text-align:right;padding:0 1.5em 0 0;font-variant-numeric:tabular-nums}</style>"
        f"<h1>{html.escape(title)}</h1>{''.join(f'<p>{html.escape(line)}</p>' for line in said)}{picture}"
        f"<table><tr><th>step<th>absolute<th>relative{rows}</table></html>\n"
    )
    return text.encode()
