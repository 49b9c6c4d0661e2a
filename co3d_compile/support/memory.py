"""Memory of this process and of this machine, in bytes."""

from __future__ import annotations

import math
import sys

from co3d_compile.support.linux_facts import linux_bytes


def process_memory() -> int | None:
    """Counts the bytes of memory that this process has now; None where the system does not say."""
    return linux_bytes("self/status", "VmRSS")


def memory_left() -> float:
    """Counts the bytes of memory that new buffers can have, as Linux says it; infinity where it is not said."""
    return linux_bytes("meminfo", "MemAvailable") or math.inf


def peak_memory() -> int:
    """Counts the most bytes of memory that the process has had; 0 where the system does not say."""
    # rusage also counts what the parent had before this program was loaded.
    said = linux_bytes("self/status", "VmHWM")
    if said is not None:
        return said
    try:
        import resource  # POSIX alone has it
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
