"""What a session keeps its tensors in, and what keeps a second thread out: numpy and onnxruntime only."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort

from co3d_compile.contract.model_contract import Contract, InputSpec, OutputSpec, StateSpec, resolve
from co3d_compile.errors import SessionError
from co3d_compile.support.memory import memory_left
from co3d_compile.support.plain_types import Array

CPU = ("cpu", 0)
# States that hand a value on, in that order, and the buffers that it moves through.
Ring: TypeAlias = "tuple[tuple[StateSpec, ...], list[Buffer]]"
_MANY, _READY_BYTES = 16, 1 << 16  # arrays for results that wait, and the most that they take
_MAX_PERIOD = 128  # of the bindings, one for each step until all states lie as before


def no_memory(more: str = "") -> SessionError:
    """Makes the error for states that do not fit."""
    return SessionError(f"There is no memory for the states{more}.", hint="Use a smaller batch.")


def check_memory(contract: Contract, batch: int) -> None:
    """Refuses what the machine has no room for: the shapes in a file may be anything, and Linux promises any amount."""
    specs: list[InputSpec | OutputSpec] = [*contract.inputs, *contract.outputs]
    tensors = [(spec.shape, spec.dtype, 1) for spec in specs]
    tensors += [(chain[0].shape, chain[0].dtype, len(chain) + 1) for chain in contract.chains()]
    wanted = sum(math.prod(resolve(shape, batch)) * np.dtype(dtype).itemsize * n for shape, dtype, n in tensors)
    if wanted > memory_left():
        raise no_memory(f": {wanted / 1e9:.3g} GB for {batch} streams, and {memory_left() / 1e9:.3g} GB are left")


class Guard:
    """A guard that refuses a second caller while one is inside, and everyone once closed. It waits for nobody.

    Attributes:
        turn: Has one entry while nobody is inside. To pop it is a single call that cannot be interrupted, and behind a
            run, where all caches are cold, it takes half of what a Lock does.
    """

    def __init__(self) -> None:
        self.turn: list[None] = [None]
        self.closed = False

    def __enter__(self) -> None:
        try:
            self.turn.pop()
        except IndexError:
            raise self.refusal() from None

    def __exit__(self, *_: object) -> None:
        if not self.closed:
            self.turn.append(None)

    def refusal(self) -> SessionError:
        """Makes the error for who comes while there is no turn to take."""
        if self.closed:
            return SessionError("This session is closed.", hint="Open a new StreamSession.")
        hint = "Give each thread a StreamSession of its own."
        return SessionError("This session is in use by another thread.", hint=hint)


class Buffer:
    """One tensor that lives as long as the session, in host memory or on the provider's device."""

    def __init__(self, shape: tuple[int, ...], dtype: str | np.dtype[Any], device: tuple[str, int]) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.nbytes = math.prod(shape) * self.dtype.itemsize
        raw = np.zeros(self.nbytes + 64, np.uint8)  # 64: what onnxruntime's own allocator aligns to
        start = -raw.ctypes.data % 64
        host = raw[start : start + self.nbytes].view(self.dtype).reshape(shape)
        self.value = ort.OrtValue.ortvalue_from_numpy(host, *device)
        self.host: Array | None = host if device == CPU else None

    def read(self) -> Array:
        """Copies into host memory."""
        return np.array(self.value.numpy()) if self.host is None else self.host.copy()

    def write(self, values: Array) -> None:
        """Takes over values of the same shape and dtype."""
        if self.host is None:
            self.value.update_inplace(np.ascontiguousarray(values))
        else:
            self.host[...] = values

    def put(self, values: float | Array, index: int | slice | Array, dim: int = 0) -> None:
        """Sets what lies at ``index`` of a dim: to one value, or to an array of that part's shape."""
        part = (slice(None),) * dim + (index,)
        if self.host is None:
            whole = self.read()
            whole[part] = values
            self.write(whole)
        else:
            self.host[part] = values

    def take(self, index: slice | Array, dim: int, scratch: Scratch) -> Array:
        """Takes what lies at ``index`` of a dim, contiguous.

        The buffer's own memory where that is, else in ``scratch``.
        """
        host = self.value.numpy() if self.host is None else self.host
        if isinstance(index, slice):
            part = host[(slice(None),) * dim + (index,)]
            if part.flags.c_contiguous:
                return part
            index = np.arange(index.start, index.stop)
        shape = (*self.shape[:dim], len(index), *self.shape[dim + 1 :])
        # "clip" because numpy buffers the result with "raise"; the session has checked the index
        return np.take(host, index, axis=dim, out=scratch.array(shape, self.dtype), mode="clip")


class Results:
    """New arrays with what one tensor holds after each run.

    Behind a run all caches are cold, and to make an array takes 30 microseconds. So several small ones are made at a
    time; a copy into one that is there, by ``memoryview`` and not by numpy, takes 10.
    """

    def __init__(self, buffer: Buffer) -> None:
        self._buffer = buffer
        self._source = None if buffer.host is None else _as_bytes(buffer.host)
        self._many = min(_MANY, _READY_BYTES // max(buffer.nbytes, 1))
        self._ready: list[Array] = []
        self._rooms: list[memoryview] = []  # the memory of each; to let go of one at every step would take 10 more

    def new(self) -> Array:
        """Makes a copy that will not change."""
        if self._source is None or self._many < 2:
            return self._buffer.read()
        if not self._ready:
            self._ready = [np.empty(self._buffer.shape, self._buffer.dtype) for _ in range(self._many)]
            self._rooms = [_as_bytes(array) for array in self._ready]
        array = self._ready.pop()
        self._rooms[len(self._ready)][:] = self._source
        return array


def _as_bytes(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


class Scratch:
    """Memory that is used again, as whatever array is wanted: fresh pages cost more than the copy into them."""

    def __init__(self) -> None:
        self._raw = np.empty(0, np.uint8)

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Makes an array whose values are what was there before."""
        size = math.prod(shape) * dtype.itemsize
        if len(self._raw) < size:
            self._raw = np.empty(size, np.uint8)
        return self._raw[:size].view(dtype).reshape(shape)


def make_rings(contract: Contract, batch: int, device: tuple[str, int]) -> tuple[list[Ring], int]:
    """Makes the buffers of each chain, one more than it has states; says after how many steps all lie as before."""
    chains = contract.chains()
    sizes = [len(chain) + 1 for chain in chains]
    period = math.lcm(*sizes)
    if period > _MAX_PERIOD:  # spare buffers make the rings meet sooner
        sizes = [1 << (size - 1).bit_length() for size in sizes]
        period = max(sizes)
    rings = []
    for chain, size in zip(chains, sizes, strict=True):
        tensor = resolve(chain[0].shape, batch), chain[0].dtype, device
        rings.append((chain, [Buffer(*tensor) for _ in range(size)]))
    return rings, period
