"""The output file: checked before the long work, there whole or not at all after it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from co3d_compile.errors import OutputError, UsageError
from co3d_compile.support.atomic_file import hidden_folder, whole_file


class Output:
    """A file to be written.

    Args:
        path: Where it shall be. A link is followed.

    Raises:
        OutputError: It cannot be written there. UsageError: It is ``-``.
    """

    def __init__(self, path: Path) -> None:
        if str(path) == "-":
            raise UsageError(
                "What is written here is a file, not standard output.", hint="Give a name; ./- for this one."
            )
        self.given = path
        self.path = Path(os.path.realpath(path))
        if self.path.is_dir():
            raise OutputError(f"{path} is a directory.", hint="Give the name of the file to write.")
        if self.path.exists() and not self.path.is_file():
            raise OutputError(f"{path} is not an ordinary file.")
        if not self.path.parent.is_dir():
            raise OutputError(f"There is no directory {self.path.parent}.", hint="Make it first.")
        os.rmdir(hidden_folder(self.path, str(path)))

    def writing(self) -> AbstractContextManager[Path]:
        """Opens it by ``whole_file``."""
        return whole_file(self.given)


def keep_apart(outputs: Sequence[Path | None], **inputs: str | Path | None) -> None:
    """Refuses outputs that would overwrite each other, or what is read.

    Args:
        outputs: Files to be written; None: not asked for.
        inputs: What is read, by what to call it; it need not be a file.

    Raises:
        UsageError: Two are the same file.
    """
    given = [path for path in outputs if path is not None]
    if len({os.path.realpath(path) for path in given}) < len(given):
        raise UsageError("Two outputs have the same name.", hint="Give another file.")
    for name, read in inputs.items():
        for path in given:
            if read is not None and os.path.exists(path) and os.path.exists(read) and os.path.samefile(path, read):
                raise UsageError(f"{path} is the {name} itself.", hint="Give another output file.")


def page_output(path: Path | None) -> Output | None:
    """Gives where a page is to be written, if one is wanted. What it takes to make it is checked before the long work.

    Raises:
        OutputError: As for ``Output``. Co3dError: Jinja2 is missing.
    """
    if path is None:
        return None
    from co3d_compile.report.web_page import page_tools

    page_tools()
    return Output(path)


def size(path: Path) -> int:
    """Counts the bytes of everything written so far, external data included."""
    return sum(each.stat().st_size for each in path.parent.iterdir())
