"""ONNX Runtime's own profile of a session's first steps, put where the user wants it."""

from __future__ import annotations

import os
import shutil
import weakref
from pathlib import Path

import onnxruntime as ort

from co3d_compile.errors import OutputError
from co3d_compile.support.atomic_file import hidden_folder

STEPS = 100  # each takes some hundred kilobytes of the file


class Profile:
    """A profile of the first ``STEPS`` steps of one session. Its file appears whole, with the last step or at the end.

    Args:
        path: The JSON file to write.
        options: Of the onnxruntime session that is to be opened; profiling is switched on there.

    Raises:
        OutputError: It cannot be written there.
    """

    def __init__(self, path: str | os.PathLike[str], options: ort.SessionOptions) -> None:
        self._path = Path(path)
        if self._path.is_dir():
            raise OutputError(f"{path} is a directory.", hint="Give the name of the file to write.")
        # onnxruntime adds the time of day to the name: a folder of its own keeps that off the user's
        folder = hidden_folder(self._path, os.fspath(path))
        self._clean = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._left = STEPS
        options.enable_profiling = True
        options.profile_file_prefix = os.path.join(folder, "profile")

    def stepped(self, session: ort.InferenceSession) -> None:
        """Counts a step; after the last one that is recorded it writes the file. Raises OutputError."""
        self._left -= 1
        if self._left == 0:
            self.finish(session)

    def finish(self, session: ort.InferenceSession) -> None:
        """Writes the file, if it is not there yet. Raises OutputError."""
        if not self._clean.alive:
            return
        try:
            os.replace(session.end_profiling(), self._path)
        except OSError as error:
            raise OutputError(f"{self._path} cannot be written: {error.strerror}.") from error
        finally:
            self._clean()
