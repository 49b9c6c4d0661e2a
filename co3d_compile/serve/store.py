"""Snapshots of streams in a folder, one file each: there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from co3d_compile.errors import OutputError

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

    def save(self, name: str, about: dict[str, Any], blob: bytes) -> None:
        """Keep the newest snapshot of a stream. ``about``: JSON data. Raises OSError, and the one before stays."""
        line = json.dumps({**about, "name": name, "blob": blob[-32:].hex()}).encode()
        handle, written = tempfile.mkstemp(prefix=".", dir=self.folder)
        try:
            with os.fdopen(handle, "wb") as file:
                file.writelines([hashlib.sha256(line).hexdigest().encode(), b"\n", line, b"\n", blob])
            os.replace(written, self._path(name))
        except BaseException:
            Path(written).unlink(missing_ok=True)
            raise

    def load(self, name: str) -> tuple[dict[str, Any], bytes] | None:
        """What was saved last, or None if there is nothing or nothing whole."""
        try:
            with self._path(name).open("rb") as file:
                digest, line = file.readline(100).strip(), file.readline(_MAX_HEADER).rstrip(b"\n")
                blob = file.read()
        except OSError:
            return None
        if hashlib.sha256(line).hexdigest().encode() != digest:
            return None
        about: dict[str, Any] = json.loads(line)
        return (about, blob) if about["name"] == name and about["blob"] == blob[-32:].hex() else None

    def remove(self, name: str) -> None:
        """Forget a stream."""
        self._path(name).unlink(missing_ok=True)

    def sweep(self, seconds: float) -> int:
        """Remove what was written longer ago than this, half-written files too; says how many."""
        count = 0
        for path in self.folder.iterdir():
            try:
                if time.time() - path.stat().st_mtime > seconds:
                    path.unlink()
                    count += 1
            except OSError:  # another shard was faster
                continue
        return count

    def _path(self, name: str) -> Path:
        """A name may hold anything, a file name may not."""
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:40]}.snapshot"
