"""A snapshot in the middle of a stream: another session goes on with it, in either layout, whatever the states hold."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
from target_cells import difference, expected
from target_kinds import KINDS, Values, compiled_kind, steps_of
from target_runs import FULL

import co3d_compile as co3d
from co3d_compile.native import running_form
from co3d_compile.support.machine import block_channels

pytestmark = pytest.mark.slow

LAYOUTS: tuple[Any, ...] = ("plain", "auto")
# Some whose states move or are images of channels: others may run as they are in both layouts.
CONVERTED = ("past entries", "renamed", "three streams", "exact ends", "exact ends of pools", "queues")


@pytest.fixture(autouse=True)
def _files_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running_form, "LEAST_BYTES", 0)


def results(session: co3d.StreamSession, steps: list[Values]) -> Iterator[tuple[Any, ...]]:
    """What a session gives for these steps."""
    info = session.info
    for step in steps:
        valid = None if info.valid is None else step[info.valid]
        result = session.step([step[spec.name] for spec in info.inputs], valid=valid)
        yield result if isinstance(result, tuple) else (result,)


def opened(kind: str, layout: Any, batch: int | None = None) -> co3d.StreamSession:
    return co3d.StreamSession(compiled_kind(kind), batch or KINDS[kind].batch, threads=1, layout=layout)


@pytest.mark.parametrize("network", KINDS)
def test_another_session_goes_on(network: str) -> None:
    steps, blobs, whole = steps_of(network), {}, {}
    middle = compiled_kind(network).info.warmup_steps // 2 + 2
    for layout in LAYOUTS:
        with opened(network, layout) as session:
            assert session.layout == "plain" or layout == "auto"
            before = list(results(session, steps[:middle]))
            blobs[layout] = session.snapshot()
            whole[layout] = [*before, *results(session, steps[middle:])]
            assert session.snapshot() != blobs[layout] or not session.info.states
        assert difference(whole[layout], expected(network, True)) <= FULL
    for layout, other in product(LAYOUTS, LAYOUTS):
        with opened(network, other) as session:
            list(results(session, steps[:3]))  # what it held before is gone
            session.restore(blobs[layout])
            assert session.snapshot() == blobs[layout]
            after = list(results(session, steps[middle:]))
        if layout == other:
            pairs = zip(after, whole[layout][middle:], strict=True)
            assert all(np.array_equal(x, y) for row, wanted in pairs for x, y in zip(row, wanted, strict=True))
        assert difference([*whole[layout][:middle], *after], expected(network, True)) <= FULL


@pytest.mark.parametrize("network", [kind for kind, row in KINDS.items() if row.batch > 1])
def test_a_stream_moves_to_a_session_of_another_batch(network: str) -> None:
    steps, middle = steps_of(network), compiled_kind(network).info.warmup_steps // 2 + 2
    row = [{name: x[1:2] for name, x in step.items()} for step in steps[middle:]]
    for layout, other in product(LAYOUTS, LAYOUTS):
        with opened(network, layout) as session, opened(network, other, batch=1) as alone:
            list(results(session, steps[:middle]))
            alone.restore(session.snapshot(stream=1))
            wanted = [tuple(x[1:2] for x in values) for values in expected(network, True)[middle:]]
            assert difference(list(results(alone, row)), wanted) <= FULL


@pytest.mark.parametrize("network", ["region with a least length"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_how_long_a_stream_is_goes_along(network: str, layout: Any) -> None:
    """A stream that is too short for exact ends is too short in another session, too."""
    steps = steps_of(network)
    with opened(network, layout) as session, opened(network, "plain") as other:
        list(results(session, steps[:1]))
        other.restore(session.snapshot())
        with pytest.raises(co3d.SessionError, match="ends after 2 frames"):
            other.flush()


@pytest.mark.skipif(block_channels() == 1, reason="ONNX Runtime has no blocked layout on this machine")
@pytest.mark.parametrize("network", CONVERTED)
def test_both_layouts_are_run(network: str) -> None:
    with opened(network, "auto") as session:
        assert session.layout == "native"
