"""Random networks through the oracle: exact after the warm-up, with every number that is reported tight.

``make test`` runs 50 graphs and ``make test-long`` 2,000 others, in parts that xdist can share, the same ones each
time. By hand:

    pytest tests/test_random_graphs.py --hypothesis-profile thorough -n 1 [--hypothesis-seed 7]

runs 20,000 in 400 parts; the seed is printed with each part. A failure prints the shrunk `Net`, an expression to paste
into CASES below, where every failure that was found has its line.
"""

from __future__ import annotations

import pytest
from hypothesis import assume, given, seed, settings
from marks import long
from oracle import Check, _check_interior
from random_nets import Net, Op, Out, entry_of, nets
from random_nets.entry import TooLong
from random_nets.measure import dependence

TOLERANCE = 1e-4
PARTS = {"networks": 84, "thorough": 400}  # of 25 and 50 graphs
QUICK = 2  # the parts in make test


def verify(net: Net) -> None:
    """Streams a network from its file and compares values, delays, receptive field and warm-up."""
    try:
        entry = entry_of(net)
    except TooLong:
        assume(False)
    run = Check(entry, net.batch, 0)
    flows = net.flows()
    # A result over a window is told the delay of the newest entry that it reads, wherever the window begins.
    expected = tuple((f := flows[out.tensor]).delay - (f.crop if out.head else 0) for out in net.outputs)
    assert run.delays == expected, "delays"
    assert run.pulses[0] == net.pulse() * max(1, net.times), "frames per step"
    assert bool(run.info.recomputed) == any(out.head == "std" for out in net.outputs), "what falls back"
    _check_interior(run, run.random(run.warmup + 4, 11), TOLERANCE, nan_start=True)
    field, warmup = dependence(net, run, entry.build())  # type: ignore[arg-type]
    assert run.info.receptive_field == field, "receptive field"
    assert run.info.warmup_steps == warmup, "warm-up"


def _profile(config: pytest.Config) -> str:
    return "thorough" if config.getoption("--hypothesis-profile", None) == "thorough" else "networks"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "part" in metafunc.fixturenames:
        profile = _profile(metafunc.config)
        quick = PARTS[profile] if profile == "thorough" else QUICK
        metafunc.parametrize("part", [part if part < quick else long(part) for part in range(PARTS[profile])])


@pytest.mark.slow
def test_random_graphs(part: int, request: pytest.FixtureRequest) -> None:
    given_seed = int(request.config.getoption("--hypothesis-seed", None) or 0)
    print(f"--hypothesis-seed {given_seed}, part {part}")
    profile = settings.get_profile(_profile(request.config))
    seed(given_seed * 1000 + part)(profile(given(nets())(verify)))()


CASES = {
    "a pool in ceil mode looks beyond the clip": Net(
        (Op("maximum", (0,), {"k": 3, "s": 3, "p": 0, "d": 2, "ceil": True, "count": False, "space": 1}),),
        (Out(1, "sum"),),
    ),
    "two batch norms behind each other": Net(
        (
            Op("conv", (0,), {"k": 3, "d": 1, "s": 1, "p": 1, "groups": 1, "out": 4, "space": 1, "causal": False}),
            Op("norm", (1,)),
            Op("norm", (2,)),
        ),
        (Out(3),),
    ),
    "an output that hardly varies beside its size": Net(
        (
            Op("transposed", (0,), {"k": 1, "s": 1, "p": 0, "more": 0, "d": 1, "groups": 1, "out": 1}),
            Op("linear", (0,), {"r": 3}),
            Op("gate", (2,), {"pool": "amax"}),
            Op("mul", (3, 2)),
            Op("larger", (4, 3)),
            Op("slice", (5,), {"a": 3, "s": 1}),
            Op("fold", (6,)),
            Op("add", (7, 3)),
            Op("pad", (8,), {"a": 2, "b": 3, "value": 0.5}),
            Op("conv", (9,), {"k": 2, "d": 1, "s": 4, "p": 1, "groups": 1, "out": 1, "space": 1, "causal": False}),
            Op("conv", (10,), {"k": 4, "d": 1, "s": 1, "p": 2, "groups": 1, "out": 1, "space": 1, "causal": False}),
        ),
        (Out(11, "amax"),),
        dims=3,
        channels=1,
        size=1,
        time_dim=4,
        extra=3,
        times=1,
        captured=1,
    ),
    "a strided slice gave every entry": Net((Op("slice", (0,), {"a": 2, "s": 4}),), (Out(1),), times=2),
}


@pytest.mark.parametrize("name", CASES)
def test_found_case(name: str) -> None:
    verify(CASES[name])
