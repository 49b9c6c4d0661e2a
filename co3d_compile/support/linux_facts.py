"""What Linux says of a process or a machine, in files of lines such as ``MemAvailable:  1024 kB``."""

from __future__ import annotations

import contextlib


def linux_fact(file: str, name: str) -> str | None:
    """Reads the first value of this name in a file under ``/proc``; None where there is none."""
    with contextlib.suppress(OSError), open(f"/proc/{file}", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    return None


def linux_bytes(file: str, name: str) -> int | None:
    """Reads a value in kB as bytes."""
    value = linux_fact(file, name)
    return None if value is None else int(value.split()[0]) * 1024
