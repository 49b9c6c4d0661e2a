"""What a session keeps its tensors in, and what keeps a second thread out: numpy and onnxruntime only."""

from __future__ import annotations

import math
import threading
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from co3d_compile.errors import SessionError

Array: TypeAlias = NDArray[Any]
CPU = ("cpu", 0)


def memory_left() -> float:
    """Bytes of memory that new buffers can have, as Linux says it; infinity where it is not said."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024.0
    except (OSError, KeyError, ValueError):
        return math.inf


class Guard:
    """Refuses a second caller while one is inside, and everyone once closed; waits for nobody."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.closed = False

    def __enter__(self) -> None:
        if not self.lock.acquire(blocking=False):
            hint = "Give each thread a StreamSession of its own."
            raise SessionError("This session is in use by another thread.", hint=hint)
        if self.closed:
            self.lock.release()
            raise SessionError("This session is closed.", hint="Open a new StreamSession.")

    def __exit__(self, *_: object) -> None:
        self.lock.release()


class Buffer:
    """One tensor that lives as long as the session, in host memory or on the provider's device."""

    def __init__(self, shape: tuple[int, ...], dtype: str, device: tuple[str, int]) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.nbytes = math.prod(shape) * self.dtype.itemsize
        raw = np.zeros(self.nbytes + 64, np.uint8)  # 64: what onnxruntime's own allocator aligns to
        start = -raw.ctypes.data % 64
        host = raw[start : start + self.nbytes].view(self.dtype).reshape(shape)
        self.value = ort.OrtValue.ortvalue_from_numpy(host, *device)
        self.host: Array | None = host if device == CPU else None

    def read(self) -> Array:
        """A copy in host memory."""
        return np.array(self.value.numpy() if self.host is None else self.host)

    def write(self, values: Array) -> None:
        """Take over values of the same shape and dtype."""
        if self.host is None:
            self.value.update_inplace(np.ascontiguousarray(values))
        else:
            np.copyto(self.host, values)

    def fill(self, value: float, index: tuple[slice | int, ...] = (slice(None),)) -> None:
        """Set one value everywhere in ``index``."""
        if self.host is None:
            values = self.read()
            values[index] = value
            self.write(values)
        else:
            self.host[index] = value
