"""The bytes of a snapshot: what model and how many streams it is of, their states, and a digest of it all."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from co3d_compile.errors import SessionError

_MAGIC = b"co3dsnp1"
_HEADER = struct.Struct("<8s32sI")  # magic, SHA-256 of the model, number of streams
_DAMAGED = "Take a new one with session.snapshot()."


def pack(fingerprint: bytes, streams: int, states: Sequence[bytes]) -> bytes:
    """Packs a snapshot. ``fingerprint``: SHA-256 of the model."""
    body = b"".join([_HEADER.pack(_MAGIC, fingerprint, streams), *states])
    return body + hashlib.sha256(body).digest()


def unpack(blob: object, fingerprint: bytes, streams: int, size: int | None) -> memoryview:
    """Reads the state bytes of an undamaged snapshot of this model: ``size`` of them, None for as many as there are.

    Raises SessionError if it is anything else.
    """
    blob = bytes(blob) if isinstance(blob, (bytes, bytearray, memoryview)) else b""
    body, digest = blob[:-32], blob[-32:]
    if len(body) < _HEADER.size or not body.startswith(_MAGIC) or hashlib.sha256(body).digest() != digest:
        raise SessionError("This is no snapshot, or a damaged one.", hint=_DAMAGED)
    _, model, count = _HEADER.unpack_from(body)
    if model != fingerprint:
        raise SessionError("The snapshot is of another model.", hint="Restore it with the file that it was taken with.")
    if count != streams:
        raise SessionError(f"The snapshot holds {count} streams, not {streams}.", hint=f"Open it with batch={count}.")
    if size is not None and len(body) != _HEADER.size + size:
        raise SessionError("The snapshot is damaged.", hint=_DAMAGED)
    return memoryview(body)[_HEADER.size :]
