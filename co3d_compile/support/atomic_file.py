"""A file that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from co3d_compile.errors import OutputError


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a path to write to, in a hidden folder beside the final one and under its name. A link is followed.

    What was written there is moved into place when the block ends well, the file itself after those beside it (the
    external data of an ONNX file, say). A block that leaves no file there leaves nothing in place.

    Raises:
        OutputError: It cannot be written.
    """
    target = Path(os.path.realpath(path))
    folder = hidden_folder(target, os.fspath(path))
    written = Path(folder, target.name)
    try:
        yield written
        if written.exists():
            others = [each for each in Path(folder).iterdir() if each != written]
            for source in [*others, written]:
                os.replace(source, target.parent / source.name)
    except OutputError as error:  # of a writer that knows the hidden name alone
        raise OutputError(error.message.replace(str(written), os.fspath(path)), hint=error.hint) from error
    except OSError as error:
        if error.filename is not None and not str(error.filename).startswith(folder):
            raise
        raise OutputError(f"{os.fspath(path)} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def hidden_folder(target: Path, called: str) -> str:
    """Makes a folder beside a file that is to be written. Raises OutputError, which calls the file as told."""
    try:
        return tempfile.mkdtemp(prefix=f".{target.name[:100]}.", dir=target.parent)
    except OSError as error:
        raise OutputError(f"{called} cannot be written: {error.strerror}.") from error
