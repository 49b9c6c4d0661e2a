"""Converted files that are kept between two runs, in a folder of the user's own. What goes wrong with it never matters.

An entry is one file: a line that says what it is, the SHA-256 of the rest, the rest. It appears whole or not at all,
and what is not whole is as good as not there. The folder is bounded in size; what was used longest ago goes first.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from co3d_compile.errors import OutputError
from co3d_compile.support.atomic_file import whole_file

if sys.platform != "win32":
    import fcntl

VARIABLE = "CO3D_CACHE"  # the folder, or a word of OFF
OFF = ("off", "0", "no", "none")
MAX_BYTES = 1 << 31  # of all entries together
PATIENCE, PAUSE = 3.0, 0.05  # seconds to wait for who converts the same file, and between two looks
_MAGIC, _ENDING, _LOCK = b"co3d form 1\n", ".form", ".lock"
_STALE = 3600.0  # seconds after which what is half written belongs to a process that has died
log = logging.getLogger(__name__)


def cache_folder() -> Path | None:
    """Finds the folder of converted files: as ``CO3D_CACHE`` says, else in the platform's place; None: nowhere."""
    said = os.environ.get(VARIABLE, "").strip()
    if said.lower() in OFF:
        return None
    try:
        return (Path(said).expanduser() if said else _platform_folder() / "co3d-compile") / "forms"
    except RuntimeError:  # a user without a home
        return None


def _platform_folder() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    said = os.environ.get("XDG_CACHE_HOME", "")
    return Path(said) if os.path.isabs(said) else Path.home() / ".cache"


class FormCache:
    """The entries in one folder, by key. No method raises for what is wrong with the folder or an entry.

    Args:
        folder: It is made where it is missing, for this user alone; None: nothing is kept.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def load(self, key: str) -> bytes | None:
        """Reads what is kept under this key; None: nothing, or nothing whole."""
        if self.folder is None or not _is_own(self.folder):
            return None
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        start = len(_MAGIC) + 32
        content = data[start:]
        if data[:start] != _MAGIC + hashlib.sha256(content).digest():
            log.info("%s is damaged, and is made again", path)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used now
        return content

    def store(self, key: str, content: bytes) -> str:
        """Keeps an entry, and lets go of those that were used longest ago. Returns what went wrong, or nothing."""
        if self.folder is None:
            return "nothing is kept"
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_own(self.folder):
                return f"{self.folder} is not this user's alone"
            with whole_file(self._path(key)) as file:
                file.write_bytes(b"".join([_MAGIC, hashlib.sha256(content).digest(), content]))
                file.chmod(0o600)
        except OSError as error:
            return f"{self.folder} cannot be written: {error.strerror or error}"
        except OutputError as error:
            return error.message.rstrip(".")
        _bound(self.folder, keep=self._path(key))
        return ""

    @contextlib.contextmanager
    def turn(self, key: str) -> Iterator[bool]:
        """Says whether this process is the one that makes this entry now. It waits a little for another that does."""
        handle = self._open_lock(key)
        if handle is None:
            yield True
            return
        try:
            yield _locked(handle)
        finally:
            os.close(handle)

    def _open_lock(self, key: str) -> int | None:
        if self.folder is None or sys.platform == "win32":
            return None
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return os.open(self.folder / f"{key}{_LOCK}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError:
            return None

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}{_ENDING}"


def _locked(handle: int) -> bool:
    """Takes the lock, or waits in vain. The system lets go of it when the process ends, however it ends."""
    if sys.platform == "win32":
        return True
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(PAUSE)
        except OSError:  # a file system without locks
            return True


def _is_own(folder: Path) -> bool:
    """Says whether nobody else can write there; the user's own folder is made so."""
    if sys.platform == "win32":
        return folder.is_dir()
    try:
        found = folder.lstat()  # a link may lead anywhere
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            return False
        if found.st_mode & 0o077:
            folder.chmod(0o700)
    except OSError:
        return False
    return True


def _bound(folder: Path, keep: Path) -> None:
    """Removes what was used longest ago, until the rest is small enough, and what dead processes have left."""
    entries, total, now = [], 0, time.time()
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            with contextlib.suppress(OSError):  # another process was faster
                found = path.stat()
                if path.suffix == _ENDING:
                    entries.append((found.st_mtime, found.st_size, path))
                    total += found.st_size
                elif now - found.st_mtime > _STALE and (path.suffix == _LOCK or f"{_ENDING}." in path.name):
                    _remove(path)
    for _, size, path in sorted(entries):
        if total <= MAX_BYTES:
            break
        if path != keep or size > MAX_BYTES:
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size


def _remove(path: Path) -> None:
    """Removes a lock, or the folder in which an entry was being written."""
    if not path.is_dir():
        path.unlink()
        return
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
