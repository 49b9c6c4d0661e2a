"""Parts of a network of which something was found: local in time, cut off, reading less of the future."""

from __future__ import annotations

from dataclasses import dataclass

from co3d_compile.ir.resized_graph import Captures


@dataclass(frozen=True)
class Region:
    """A part of the clip graph that is local in time.

    Args:
        name: The name of its result in the captured graph.
        operator, module_path: The operator that has no extension, with which it begins.
        captures: It, at any length.
        inputs: The names of its inputs in the captured graph.
        dims: The time dim of each input.
        dim: The time dim of its result.
        before: Entries that it reads in front of a block.
        after: Entries that it reads behind a block.
        period: Entries of a block, which are computed at once.
        shortest: Entries of the shortest clip of which one block was confirmed.
    """

    name: str
    operator: str
    module_path: str
    captures: Captures
    inputs: tuple[str, ...]
    dims: tuple[int, ...]
    dim: int
    before: int
    after: int
    period: int
    shortest: int


@dataclass(frozen=True)
class RegionRun:
    """A region as a step runs it: on ``entries`` entries, with so many multiply-adds for one stream.

    Where its ends are exact, they are so for streams of ``least_frames`` frames or more.
    """

    region: Region
    entries: int
    multiply_adds: int
    least_frames: int = 0


@dataclass(frozen=True)
class StreamedCrop:
    """A slice or selection over time of a stream with exact ends: first entry, end, and entries of what it is cut from.

    ``where``: Operator and module path, for people.
    ``from_end``: Whether it says itself that its start counts from the end of the clip; None: it leaves open from where
    its ends count.
    """

    start: int
    end: int
    entries: int
    from_end: bool | None
    where: str


@dataclass(frozen=True)
class Limited:
    """A convolution or pool over time that reads less of the future than the model's own (``max_delay``).

    Args:
        node: Its name in the captured graph.
        time_dim: The dim of its operand that is time.
        later: Entries by which the whole kernel stands later.
        dropped: Taps that are left out at its end, or folded into the last one that is left.
        future: Entries of its future that it still reads.
        share: The share of its weights that read entries of the future which it reads no more.
    """

    node: str
    operator: str
    module_path: str
    time_dim: int
    later: int
    dropped: int
    future: int
    share: float
