"""The step in PyTorch, eager and exported: the numbers of the ONNX file, for every kind of state."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from target_kinds import compiled_kind
from torch import Tensor, nn
from zoo.small import SMALL

import co3d_compile as co3d
from co3d_compile.errors import ContractError, LoadError, SessionError, UnsupportedError, UsageError
from co3d_compile.verification.exported_step import load_step, verify_step
from co3d_compile.verification.verify_model import verify

pytestmark = pytest.mark.slow

# Name of a small network, options. Every kind of model is in the table of test_targets.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "past entries": ("p3d", {}),
    "states that only move": ("p3d", {"state_io": "renamed"}),
    "counters and flags": ("p3d", {"boundary": "exact"}),
    "queues": ("wavenet_small", {}),
}


@cache
def compiled_row(row: str) -> Any:
    name, options = ROWS[row]
    entry = SMALL[name]
    return co3d.compile(entry.build(), entry.examples(), time_dim=entry.time_dim, **{**entry.options, **options})


def frames_of(compiled: Any, batch: int, steps: int) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, *item.shape[1:]) for item in compiled.info.inputs]
    return [tuple(torch.randn(shape, generator=generator) for shape in shapes) for _ in range(steps)]


def streamed(compiled: Any, steps: list[tuple[Tensor, ...]]) -> list[tuple[Any, ...]]:
    session = co3d.StreamSession(compiled, batch=len(steps[0][0]), threads=1)
    results = [session.step(*(frame.numpy() for frame in frames)) for frames in steps]
    return [each if isinstance(each, tuple) else (each,) for each in results]


def positional(
    call: Callable[..., Any], compiled: Any, steps: list[tuple[Tensor, ...]], own: Any = tuple
) -> list[tuple[Any, ...]]:
    """The loop of a reader that has the exported program alone."""
    batch, results = len(steps[0][0]), []
    state = compiled.to_module().initial_state(batch)
    flags = [torch.ones(batch, compiled.info.inputs[0].frames_per_step, dtype=torch.bool)] * bool(compiled.info.valid)
    for frames in steps:
        values = call(*frames, *flags, *state)
        count = len(compiled.info.outputs)
        state = own(values[count:])
        results.append(own(values[:count]))
    return results


def assert_equal(actual: list[tuple[Any, ...]], expected: list[tuple[Any, ...]]) -> None:
    for step, (rows, wanted) in enumerate(zip(actual, expected, strict=True)):
        for one, other in zip(rows, wanted, strict=True):
            scale = float(np.std(other)) or 1.0
            np.testing.assert_allclose(one.numpy() / scale, other / scale, atol=1e-4, err_msg=f"step {step}")


def test_an_archive_has_the_states_of_the_file(tmp_path: Path) -> None:
    compiled = compiled_row("counters and flags")
    _, info = load_step(compiled.save_exported_program(tmp_path / "step.pt2"))
    assert [(s.input, s.shape, s.initial) for s in info.states] == [
        (s.input, s.shape, s.initial) for s in compiled.info.states
    ]


def test_a_fixed_batch() -> None:
    program = compiled_row("past entries").to_exported_program(batch=1)
    shapes = [node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder"]
    assert all(isinstance(size, int) for shape in shapes for size in shape)
    for batch in (0, True, "2"):
        with pytest.raises(UsageError, match="positive whole number"):
            compiled_row("past entries").to_exported_program(batch=batch)


def test_exported_heads_are_in_2d() -> None:
    compiled = compiled_kind("head behind the pool")
    program = compiled.to_exported_program()
    assert not any("conv3d" in str(node.target) for node in program.graph.nodes)
    steps = frames_of(compiled, 3, compiled.info.warmup_steps + 2)
    assert_equal(positional(program.module(), compiled, steps), streamed(compiled, steps))


def test_next_states_are_tensors_of_their_own() -> None:
    program = compiled_row("states that only move").to_exported_program()
    outputs = [spec.arg.name for spec in program.graph_signature.output_specs]
    assert len(set(outputs)) == len(outputs)
    assert not set(outputs) & {spec.arg.name for spec in program.graph_signature.input_specs}


# --- training ---------------------------------------------------------------------------------------------------


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 3, (3, 1, 1), padding=(1, 0, 0))
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x).mean((3, 4))
        return y


def trained(**options: Any) -> tuple[Any, Any, Tensor]:
    torch.manual_seed(0)
    compiled = co3d.compile(Trunk().eval(), (torch.rand(1, 2, 8, 6, 6),), **options)
    return compiled, compiled.to_module(), torch.randn(2, 2, 12, 6, 6)


@pytest.mark.parametrize("options", [{}, {"frames_per_step": 4}, {"state_io": "renamed"}], ids=["1", "4", "renamed"])
def test_a_trained_step_becomes_onnx_again(options: dict[str, Any]) -> None:
    compiled, module, clip = trained(**options)
    before = [p.detach().clone() for p in module.parameters()]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    losses = []
    for _ in range(4):
        results, _ = module.run(clip)
        loss = (results - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert all(bool((old != new).any()) for old, new in zip(before, module.parameters(), strict=True))
    new = compiled.with_weights(module)
    with torch.no_grad():
        expected, _ = module.run(clip)
    session = co3d.StreamSession(new, batch=2, threads=1)
    pulse = session.info.frames_per_step["x"]
    for j in range(12 // pulse):
        frames = clip[:, :, j * pulse : (j + 1) * pulse].squeeze(2).numpy()
        np.testing.assert_allclose(session.step(frames), expected[:, j].numpy(), atol=1e-5)
    assert any(bool((old != kept).any()) for old, kept in zip(before, new.to_module().parameters(), strict=True))
    assert all(bool((old == kept).all()) for old, kept in zip(before, compiled.to_module().parameters(), strict=True))


def test_parameters_keep_the_network_s_names() -> None:
    """A kernel in another form is named after what it is made of, and a folded norm after its convolution."""
    network = nn.Sequential(
        nn.Conv3d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 4, 3, padding=1), nn.BatchNorm3d(4), nn.Conv3d(4, 6, 1),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, 2),
    ).eval()  # fmt: skip
    step = co3d.compile(network, (torch.rand(1, 3, 8, 8, 8),)).to_module()
    names = [name.removeprefix("graph.") for name, _ in step.named_parameters()]
    named = {re.sub(r"(_as|_tap)_\d+$", "", name).replace("fused_", "") for name in names}
    assert named == {name for name, _ in network.named_parameters() if not name.startswith("3.")}
    assert {name.partition("_weight")[0] for name in names if "fused" in name} == {"2.fused", "2.fused_bias"}


def test_gradients_are_those_of_the_network() -> None:
    """Each frame's share of a result is what the clip network's own gradient says."""
    torch.manual_seed(0)
    network = Trunk().eval()
    clip = torch.randn(1, 2, 12, 6, 6, requires_grad=True)
    compiled = co3d.compile(network, (torch.rand(1, 2, 12, 6, 6),))
    (delay,) = compiled.info.delays.values()
    (expected,) = torch.autograd.grad(network(clip)[:, :, 6].sum(), clip)
    results, _ = compiled.to_module().run(clip)
    (actual,) = torch.autograd.grad(results[:, 6 + delay].sum(), clip)
    np.testing.assert_allclose(actual.numpy(), expected.numpy(), atol=1e-5)


BAD: dict[str, tuple[Callable[[Any, Any, Tensor], Any], type[Exception], str]] = {
    "no frames": (lambda c, m, x: m(), UsageError, "Got 0 inputs, expected 1.*x"),
    "two clips": (lambda c, m, x: m.run(x, x), UsageError, "Got 2 inputs"),
    "no whole step": (lambda c, m, x: m.run(x[:, :, :3]), UsageError, "whole number of steps.*x: 2"),
    "no step": (lambda c, m, x: m.run(x[:, :, :0]), UsageError, "whole number of steps"),
    "too few states": (lambda c, m, x: m(x[:, :, :2], state=()), UsageError, "Got 0 states"),
    "flags": (lambda c, m, x: m(x[:, :, :2], valid=torch.ones(2, 2)), UsageError, "boundary="),
    "too short for exact ends": (
        lambda c, m, x: compiled_kind("region with a least length").to_module()(
            torch.zeros(1, 4, 2), valid=torch.tensor([[True, False]])
        ),
        SessionError,
        "Stream 0 ends after 1 frame",
    ),
    "another model": (lambda c, m, x: c.with_weights(compiled_row("queues").to_module()), UsageError, "another model"),
    "ends": (
        lambda c, m, x: compiled_row("counters and flags").with_weights(compiled_row("past entries").to_module()),
        UnsupportedError,
        "boundary='stream'",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_wrong_use(call: Callable[[Any, Any, Tensor], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(*trained(frames_per_step=2))


# --- files ------------------------------------------------------------------------------------------------------


def test_an_archive_that_differs_is_found(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(2, 3, 3, padding=1), nn.ReLU())
    clip = torch.rand(1, 2, 8, 6, 6)
    compiled = co3d.compile(network, (clip,))
    onnx = compiled.save(tmp_path / "step.onnx")
    found = verify(onnx, network, (clip,))
    assert verify_step(compiled.save_exported_program(tmp_path / "step.pt2"), onnx, found).passed
    network[0].weight.data[0] *= 1.01  # type: ignore[union-attr, operator, index]
    other = co3d.compile(network, (clip,)).save_exported_program(tmp_path / "other.pt2")
    result = verify_step(other, onnx, found)
    assert not result.passed
    assert "torch.export program" in result.worst and "differs" in result.reason


def test_archives_that_are_no_step(tmp_path: Path) -> None:
    path = tmp_path / "clip.pt2"
    torch.export.save(torch.export.export(nn.ReLU(), (torch.rand(2),)), path)
    with pytest.raises(ContractError, match="no compiled step"):
        load_step(path)
    path.write_bytes(b"nothing")
    with pytest.raises(LoadError, match=r"no torch\.export archive"):
        load_step(path)
