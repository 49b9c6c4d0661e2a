"""A file that appears whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from co3d_compile.errors import OutputError


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, in a hidden folder beside the final one and under its name.

    What was written there is moved into place when the block ends well, the file itself after those beside it (the
    external data of an ONNX file, say).

    Raises:
        OutputError: It cannot be written.
    """
    target = Path(path)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name[:100]}.") as folder:
            written = Path(folder) / target.name
            yield written
            others = [each for each in Path(folder).iterdir() if each != written]
            for source in [*others, written]:
                os.replace(source, target.parent / source.name)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}.") from error


__all__ = ["whole_file"]
