"""Random networks of many families, each through the oracle; `random_families/search.py` runs thousands by hand.

A quick run has one part of 10 networks, ``make test-long`` the other 49. What a part must reach is written here, before
it runs: no wrong number or metadata, no internal error, and nearly all stream: windows everywhere would be right, too.
"""

from __future__ import annotations

from collections import Counter

import pytest
from marks import long
from random_families import Block, Sketch, draw, examine

PART, PARTS = 10, 50
MUST_STREAM = 0.9  # of the networks without one of the kinds that may be recomputed (FALLS)
MAY_BE_REFUSED = 1  # of a part


@pytest.mark.slow
@pytest.mark.parametrize("part", [part if part < 1 else long(part) for part in range(PARTS)])
def test_random_families(part: int) -> None:
    found = {seed: examine(draw(seed)) for seed in range(part * PART, (part + 1) * PART)}
    bad = {seed: outcome for seed, outcome in found.items() if outcome.verdict in ("wrong", "internal")}
    assert not bad
    tally = Counter(outcome.verdict for outcome in found.values())
    assert tally["refused"] <= MAY_BE_REFUSED
    assert tally["right"] >= MUST_STREAM * PART - MAY_BE_REFUSED, found


CASES: dict[str, Sketch] = {
    "a band of attention behind a crop begins later": Sketch(
        (Block("crop", {"a": 2, "b": 2, "s": 1}), Block("attend", {"band": 2, "hand": True}))
    ),
    "branches of other strides, in dense mode": Sketch(
        (
            Block(
                "join",
                {"how": "add"},
                (Block("conv", {"k": 3, "d": 1, "s": 1, "p": 1, "causal": True, "ks": 1, "out": 2, "groups": 1}),),
                (Block("unfold", {"how": "columns", "k": 1, "s": 2, "p": 1}),),
            ),
        ),
        frames=8,
        dense=True,
        head="std",
    ),
    "all of a window flattened, behind a norm and an activation": Sketch(
        (Block("statistics", {"how": "group"}), Block("act", {"how": "silu"})),
        inputs="tokens",
        channels=4,
        places=3,
        frames=13,
        head="flatten",
        scope="window",
        batch=2,
    ),
    "a graph made of whole numbers": Sketch(
        (Block("graph", {"how": "einsum"}),), inputs="tokens", channels=4, places=4, head="mean"
    ),
    "what counts by twos, before the stream begins": Sketch(
        (
            Block("shift", {"how": "written", "n": 2}),
            Block("attend", {"band": 2, "hand": False}),
            Block(
                "join",
                {"how": "cat"},
                (Block("conv", {"k": 2, "d": 1, "s": 2, "p": 0, "causal": False, "ks": 1, "out": 2, "groups": 1}),),
                (
                    Block("columns", {"kind": "gru", "both": True, "layers": 1, "first": False, "last": True}),
                    Block("cumulative"),
                ),
            ),
        ),
        channels=1,
        frames=13,
    ),
    "a recurrent layer over places beside a shift": Sketch(
        (
            Block("rows", {"kind": "gru", "both": True, "layers": 2, "first": False, "last": True}),
            Block("shift", {"how": "written", "n": 1}),
        )
    ),
    "a graph that a mean over time makes, with exact ends": Sketch(
        (Block("graph", {"how": "matmul"}), Block("overlap", {"how": "index", "k": 3, "s": 2})), ends=(13, 18)
    ),
    "pools that count what is there, behind whole numbers": Sketch(
        (
            Block(
                "pool",
                {"k": 3, "s": 2, "p": 1, "d": 1, "ceil": True, "count": False, "divisor": None, "maximum": False},
            ),
            Block("attend", {"band": 2, "hand": False}),
        ),
        inputs="tokens",
        time_dim=1,
        ends=(14, 15),
    ),
    "windows over time that take padding behind a batch norm for theirs": Sketch(
        (
            Block("pad", {"a": 3, "b": 1, "value": 0.5}),
            Block("norm", {"how": "batch"}),
            Block("unfold", {"how": "tensor", "k": 3, "s": 1, "p": 0}),
        ),
        channels=2,
        places=3,
        frames=16,
        head="mean",
    ),
    "a slow input and a window": Sketch(
        (Block("conv", {"k": 3, "d": 1, "s": 1, "p": 1, "causal": False, "ks": 3, "out": 2, "groups": 1}),),
        inputs="slow",
        head="mean",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_drawn_network(name: str) -> None:
    outcome = examine(CASES[name])
    assert outcome.verdict == "right", outcome
