"""Memory of this process and of this machine, in bytes."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import sys
from pathlib import Path


def held_memory() -> int | None:
    """Bytes of memory that this process holds; None where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def memory_left() -> float:
    """Bytes of memory that new buffers can have, as Linux says it; infinity where it is not said."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024.0
    except (OSError, KeyError, ValueError):
        return math.inf


def _peak() -> int:
    """The most memory that the process has held, in bytes."""
    status = Path("/proc/self/status")  # rusage has what the parent held before this program was loaded
    if status.exists():
        return int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
