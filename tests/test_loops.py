"""Loops over frames written by hand: layers with state, exact from the first frame and for as long as a stream runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from loop_near_misses import NEAR_MISSES
from loop_nets import CASES, Case
from loop_network import SERIES, Network
from marks import few, slow
from torch import nn

import co3d_compile as co3d
from co3d_compile.capture.loops.memory import memory_of

FRAMES = 20  # three times a clip
STARTED = ("started_by_a_layer", "both_states_started_by_layers", "change_of_features")
LONG = (
    "one_cell_for_both_loops",
    "layers_in_a_list",
    "one_loop_after_the_other",
    "lstm_cell",
    "learned_start",
    "frames_of_a_network",
    "per_pixel",
    "weighing_the_last_states",
    "conv_lstm_with_peepholes",
    "on_each_frame_twice",
    *STARTED,
)


def build(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return Network(case.forward).eval()


def stream(compiled: co3d.CompiledModel, x: torch.Tensor) -> tuple[np.ndarray, Any]:
    """The result of each step, on a new first dim, and the session."""
    session = co3d.StreamSession(compiled, batch=x.shape[0], threads=1)
    (pulse,) = session.info.frames_per_step.values()
    steps = [session.step(x[:, j : j + pulse].numpy()) for j in range(0, x.shape[1], pulse)]
    steps += session.flush() if session.info.boundary == "exact" else []
    return np.stack(steps), session


def check(case: Case, net: nn.Module, compiled: co3d.CompiledModel, batch: int = 2) -> None:
    """Compares a stream with the untouched network on one long clip."""
    x = torch.randn(batch, FRAMES, *case.shape[2:])
    results, session = stream(compiled, x)
    (delay,), (pulse,) = session.info.delays.values(), session.info.frames_per_step.values()
    exact = session.info.boundary == "exact"
    with torch.inference_mode():
        if case.last:
            expected = torch.stack([net(x[:, : (j + 1) * pulse]) for j in range(len(results))]).numpy()
        else:
            expected = net(x).movedim(case.dim, 0).numpy()
            results = results if pulse == 1 else np.concatenate(np.moveaxis(results, case.dim + 1, 1))
            results = results[delay : delay + FRAMES]
            first = 0 if exact else max(0, session.info.warmup_steps * pulse - delay)
            results, expected = results[first:], expected[first : FRAMES if exact else FRAMES - 2 * delay]
    np.testing.assert_allclose(results[: len(expected)], expected, rtol=1e-4, atol=1e-5)
    assert not exact or len(results) == len(expected) == FRAMES


@pytest.mark.parametrize("name", [slow(name) if name in LONG else name for name in CASES])
def test_a_loop_is_a_layer_with_state(name: str) -> None:
    case = CASES[name]
    net = build(case)
    compiled = co3d.compile(net, (torch.randn(case.shape),), time_dim=1)
    report = compiled.report()
    assert not report.recomputed and len(compiled.info.states) == case.states
    assert compiled.info.receptive_field == case.field
    assert report.gmac_step < 0.3 * report.gmac_clip
    check(case, net, compiled)


@pytest.mark.parametrize("boundary", ["stream", "exact"])
@pytest.mark.parametrize("pulse", [1, 4])
@pytest.mark.parametrize(
    "name",
    few(
        (
            *("conv_lstm", "last_of_lstm_cell", "learned_start", "behind_a_look_ahead"),
            *("smoothed_from_the_first_frame", "mean_and_variance_so_far"),
        ),
        *("conv_lstm", "smoothed_from_the_first_frame"),
    ),
)
def test_several_frames_a_step_and_exact_ends(name: str, pulse: int, boundary: str) -> None:
    case = CASES[name]
    net = build(case)
    compiled = co3d.compile(net, (torch.randn(case.shape),), time_dim=1, frames_per_step=pulse, boundary=boundary)
    assert not compiled.report().recomputed
    if not (case.last and boundary == "exact"):
        check(case, net, compiled, batch=3)


@pytest.mark.parametrize("name", [slow("gru_cell"), slow("last_of_gru_cell"), slow("conv_lstm"), "less_the_background"])
def test_a_loop_starts_again_with_each_window(name: str) -> None:
    case = CASES[name]
    net = build(case)
    compiled = co3d.compile(net, (torch.randn(case.shape),), time_dim=1, recurrence="window")
    x = torch.randn(2, FRAMES, *case.shape[2:])
    results, session = stream(compiled, x)
    assert [r.operator for r in session.info.recomputed] == ["frame_loop"] and session.info.receptive_field == 6
    with torch.inference_mode():
        expected = torch.stack([net(x[:, t - 5 : t + 1]) for t in range(5, FRAMES)])
    np.testing.assert_allclose(results[5:], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("pulse", "steps"), [(1, 4), (2, 2), (3, 2)])
def test_a_bounded_past_is_forgotten_in_time(pulse: int, steps: int) -> None:
    case = CASES["caches_of_two_layers"]
    info = co3d.compile(build(case), (torch.randn(case.shape),), time_dim=1, frames_per_step=pulse).info
    assert info.warmup_steps == steps and info.receptive_field >= case.field


def test_the_report_says_that_a_state_runs_on() -> None:
    case = CASES["layers_in_a_list"]
    report = co3d.compile(build(case), (torch.randn(case.shape),), time_dim=1).report()
    text = "in layers: 2 values handed on, and runs on for longer than a clip"
    assert report.loops == [text] and ("loop over frames", text) in report.facts()


def test_values_that_are_made_of_each_other_are_looked_at_once() -> None:
    """There are more ways from one of thirty values to the next than anybody can follow."""
    graph = torch.fx.Graph()
    states = [graph.placeholder(f"state_{i}") for i in range(30)]
    total = states[0]
    for state in states[1:]:
        total = graph.call_function(torch.ops.aten.add.Tensor, (total, state))
    graph.output((*[total] * len(states), total))
    for node in graph.nodes:
        node.meta["val"] = torch.zeros(2)
    assert memory_of(torch.fx.GraphModule({}, graph), states, {}) is None


AS_CHEAP = {"summed", "largest", "refined", "beside_empty_places"}  # pools over the clip; frames that are shared


@pytest.mark.parametrize("name", few(NEAR_MISSES, "summed", "largest"))
def test_what_is_no_layer_with_state_stays_a_window(name: str) -> None:
    torch.manual_seed(0)
    net = Network(NEAR_MISSES[name]).eval()
    x = torch.randn(2, FRAMES, 4)
    compiled = co3d.compile(net, (torch.randn(SERIES),), time_dim=1)
    results, session = stream(compiled, x)
    assert session.info.receptive_field == 6 and not compiled.report().loops
    assert (name in AS_CHEAP) == (not compiled.report().recomputed)
    with torch.inference_mode():
        expected = torch.stack([net(x[:, t - 5 : t + 1]) for t in range(5, FRAMES)])
    np.testing.assert_allclose(results[5:].reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)


def started_by_the_batch(m: Any, x: torch.Tensor) -> torch.Tensor:
    """The first state is computed over the batch, and so not for all frames at once, which stand there too."""
    h, out = m.embed(x[:, 0]), []
    h = h * h.sum(0, keepdim=True).sigmoid()
    for t in range(x.shape[1]):
        h = m.layers[0](x[:, t], h)
        out.append(h)
    return torch.stack(out, 1)


def test_a_start_that_is_computed_over_the_batch_is_left_as_it_is() -> None:
    torch.manual_seed(0)
    net, x = Network(started_by_the_batch).eval(), torch.randn(1, FRAMES, 4)
    results, _ = stream(co3d.compile(net, (torch.randn(1, 6, 4),), time_dim=1), x)
    with torch.inference_mode():
        expected = net(x[:, :6])
    np.testing.assert_allclose(results[5].reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)
