"""Progress on stderr: a bar on a terminal, else nothing or a line where a stage begins; with -v one where it ends."""

from __future__ import annotations

import time
from types import TracebackType

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from co3d_compile.cli.common import stderr


class Progress:
    """A display that is called with ``(stage, done, total)``, and keeps the seconds of each stage.

    Args:
        verbose: As often as -v was given.
        announced: Whether each stage is said when it begins, where there is no terminal for a bar.
    """

    def __init__(self, verbose: int, *, announced: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self._lines = verbose > 0
        self._announced = announced and not stderr().isatty()
        self._bars: Bars | None = None
        self._task: TaskID | None = None
        self._stage: str | None = None
        self._started = time.perf_counter()
        # Logs and tracebacks of -vv and a live bar would overwrite each other.
        if stderr().isatty() and verbose < 2:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self._bars = Bars(
                *columns,
                TimeElapsedColumn(),
                console=Console(file=stderr()),
                transient=True,
                redirect_stdout=verbose > 0,
                redirect_stderr=verbose > 0,
            )

    def __enter__(self) -> Progress:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if self._bars:
            self._bars.stop()

    def __call__(self, stage: str, done: int = 0, total: int | None = None) -> None:
        if stage != self._stage:
            self._close()
            self._stage, self._started = stage, time.perf_counter()
            if self._announced and total:  # what has no total is over at once, or ends with an error
                click.echo(stage if total == 1 else f"{stage} ({done + 1} of {total})", file=stderr())
            if self._bars:
                self._task = self._bars.add_task(stage, total=total or None)
        if self._bars and self._task is not None:
            self._bars.update(self._task, completed=done, total=total or None)

    def _close(self) -> None:
        if self._stage is None:
            return
        spent = time.perf_counter() - self._started
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + spent
        if self._bars and self._task is not None:
            self._bars.remove_task(self._task)
        if self._lines:
            line = f"{self._stage}: {spent:.1f} s"
            if self._bars:
                self._bars.console.print(line, highlight=False)
            else:
                click.echo(line, file=stderr())
        self._stage = self._task = None
