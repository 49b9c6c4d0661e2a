"""Snapshots of streams in a folder, one file each: there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

from co3d_compile.errors import OutputError
from co3d_compile.serve.stream import Reply
from co3d_compile.support.atomic_file import whole_file

_MAX_HEADER = 1_000_000


class SnapshotStore:
    """Snapshots by stream name, for every process and machine that sees the folder.

    A file holds a digest of the line that follows it, that line (JSON: what the snapshot is of), and the snapshot,
    which has a digest of its own. Whatever does not fit is no snapshot.

    Raises:
        OutputError: The folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise OutputError(f"Snapshots cannot be kept in {folder}: {error.strerror}.") from error

    def save(self, name: str, about: Reply, blob: bytes) -> None:
        """Saves the newest snapshot of a stream. ``about``: JSON data. Raises OutputError, and the one before stays."""
        line = json.dumps({**about, "name": name, "blob": blob[-32:].hex()}).encode()
        with whole_file(self._path(name)) as file:
            file.write_bytes(b"\n".join([hashlib.sha256(line).hexdigest().encode(), line, blob]))

    def load(self, name: str) -> tuple[Reply, bytes] | None:
        """Reads what was saved last, or None if there is nothing or nothing whole."""
        try:
            with self._path(name).open("rb") as file:
                digest, line = file.readline(100).strip(), file.readline(_MAX_HEADER).rstrip(b"\n")
                blob = file.read()
        except OSError:
            return None
        if hashlib.sha256(line).hexdigest().encode() != digest:
            return None
        about: Reply = json.loads(line)
        return (about, blob) if about["name"] == name and about["blob"] == blob[-32:].hex() else None

    def remove(self, name: str) -> None:
        """Forgets a stream."""
        self._path(name).unlink(missing_ok=True)

    def sweep(self, seconds: float) -> int:
        """Removes what was written longer ago than this, half-written files too. Returns how many files that were."""
        count = 0
        for path in self.folder.iterdir():
            try:
                if time.time() - path.stat().st_mtime > seconds:
                    _remove(path)
                    count += 1
            except OSError:  # another shard was faster
                continue
        return count

    def _path(self, name: str) -> Path:
        """Makes a file name of a name, which may hold anything."""
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:40]}.snapshot"


def _remove(path: Path) -> None:
    """Removes a snapshot, or the folder in which one was written when its process died."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
