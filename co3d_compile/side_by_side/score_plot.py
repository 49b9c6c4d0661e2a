"""Scores over time, of several runs, as a picture. Needs matplotlib."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from co3d_compile.side_by_side.comparison import Comparison
from co3d_compile.support.atomic_file import whole_file
from co3d_compile.verification.error_plot import PICTURES, check_plot

MOST = 4  # classes
COLORS = ("silver", "tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")


def save_scores(path: Path, comparison: Comparison, title: str) -> Path:
    """Draws a panel for each of the classes that matter most, with a line for each run; what is true is shaded.

    Raises:
        UsageError, Co3dError: As ``check_plot``. OutputError: The path cannot be written.
    """
    target = check_plot(path, PICTURES)
    from matplotlib.figure import Figure

    shown = comparison.shown(MOST)
    figure = Figure(figsize=(9, 1.2 + 1.5 * len(shown)), layout="constrained")
    panels: Any = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (index, label) in zip(panels, shown, strict=True):
        for segment in comparison.segments:
            if segment.index == index:
                axes.axvspan(segment.begin, segment.end, color="tab:green", alpha=0.15, linewidth=0)
        for at, track in enumerate(comparison.tracks):
            color, width = COLORS[at % len(COLORS)], 1.2 if at else 3.5
            axes.plot(comparison.times, track.scores[:, index], color=color, linewidth=width, label=track.name)
        axes.set_ylabel(label[:24], rotation=0, ha="right", va="center")
        axes.grid(alpha=0.3)
        axes.margins(x=0)
    panels[-1].set_xlabel("seconds")
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    lines, names = panels[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", fontsize=8, ncols=4)
    data = io.BytesIO()
    figure.savefig(data, format=target.suffix.lower().removeprefix("."), dpi=150)
    with whole_file(target) as written:
        written.write_bytes(data.getvalue())
    return target
