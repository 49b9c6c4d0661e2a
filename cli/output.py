"""The output file: checked before the long work, there whole or not at all after it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from co3d_compile.errors import OutputError


class Output:
    """A file to be written.

    Args:
        path: Where it shall be. A link is followed.

    Raises:
        OutputError: It cannot be written there.
    """

    def __init__(self, path: Path) -> None:
        self.given = path
        self.path = Path(os.path.realpath(path))
        if self.path.is_dir():
            raise OutputError(f"{path} is a directory.", hint="Give the name of the file to write.")
        if self.path.exists() and not self.path.is_file():
            raise OutputError(f"{path} is not an ordinary file.")
        if not self.path.parent.is_dir():
            raise OutputError(f"There is no directory {self.path.parent}.", hint="Make it first.")
        os.rmdir(self._folder())

    def _folder(self) -> str:
        try:
            return tempfile.mkdtemp(prefix=f".{self.path.name[:100]}.", dir=self.path.parent)
        except OSError as error:
            raise OutputError(f"{self.given} cannot be written: {error.strerror}.") from error

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """Gives a path to write to, beside the final one and under its name (ONNX external data repeats it).

        What is not `put` in place is removed, whatever happens.
        """
        folder = self._folder()
        try:
            yield Path(folder, self.path.name)
        except OSError as error:
            if error.filename is not None and not str(error.filename).startswith(folder):
                raise
            raise OutputError(f"{self.given} cannot be written: {error.strerror or error}.") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def put(self, written: Path) -> None:
        """Moves what was written into place, the file itself last."""
        others = [each for each in written.parent.iterdir() if each != written]
        for source in [*others, written]:
            os.replace(source, self.path.parent / source.name)


def size(path: Path) -> int:
    """Bytes of everything written so far, external data included."""
    return sum(each.stat().st_size for each in path.parent.iterdir())
