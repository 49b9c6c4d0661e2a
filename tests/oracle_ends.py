"""The oracle of both ends: the streamed and flushed sequence against the clip model on the whole of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from oracle import Array, Check, Comparison, run_stream
from torch import Tensor, nn
from zoo import Entry
from zoo.longclip import as_tuple, eager


def check_boundary(
    what: Entry,
    *,
    clips: int = 1,
    tol: float = 1e-4,
    options: Mapping[str, Any] | None = None,
    replaced: Callable[[nn.Module], nn.Module] = lambda module: module,
) -> None:
    """With `boundary="exact"` the streamed and flushed sequence is the model's own output on the whole clip.

    Args:
        what: an entry whose outputs keep their time axis, or whose windows give one result per clip.
        clips: length of the sequence, in clips; 1 where the model has a window.
        replaced: makes of the model the network that the file computes.
    """
    entry = replace(what, options={**what.options, **(options or {}), "boundary": "exact"})
    run = Check(entry, 1, 0)
    lengths = [clips * n for n in run.clip.clip]
    assert all(n % pulse == 0 for n, pulse in zip(lengths, run.pulses, strict=True)), "whole steps only"
    frames = run.random(lengths[0] // run.pulses[0], 11)
    results = run_stream(run.session, frames, run.dims)
    results += [tuple(np.array(value) for value in as_tuple(result)) for result in run.session.flush()]
    module = replaced(entry.build())
    with eager():
        whole = as_tuple(module([t.clone() for t in frames]) if entry.as_list else module(*(t.clone() for t in frames)))
    comparison = Comparison(len(whole))
    for k, wanted in enumerate(whole):
        step, actual, part = _whole_result(run, k, results, wanted)
        comparison.add(k, step, actual, part)
    comparison.finish(tol, f"{entry.name}, boundary exact")


def _whole_result(run: Check, k: int, results: list[tuple[Array, ...]], wanted: Tensor) -> tuple[int, Array, Tensor]:
    """An output over the whole sequence, put together by index, and what it must be."""
    what, delay, pulse = run.outputs[k], run.delays[k], run.pulses[0]
    if not isinstance(what, int):
        read = what.reads[0]
        step = math.ceil((run.clip.lengths[read] + delay) / run.clip.entries(read, pulse)) - 1
        assert step < len(results), f"{run.entry.name}: results still due after flush()"
        return step, results[step][k], wanted
    dim, count = run.clip.reference.time_dims[what], run.clip.entries(what, pulse)
    shape = [count if d == dim else n for d, n in enumerate(wanted.shape)]
    streamed = np.concatenate([result[k].reshape(shape) for result in results], dim)
    begin, missing = max(delay, 0), max(-delay, 0)  # entry n stands at n + delay of all results joined
    take = wanted.shape[dim] - missing
    assert streamed.shape[dim] >= begin + take, f"{run.entry.name}: results still due after flush()"
    return len(results) - 1, np.take(streamed, range(begin, begin + take), dim), wanted.narrow(dim, missing, take)
