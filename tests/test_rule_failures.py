"""A bug of a rule costs its operator the stream and no more: compiled again, the operator is applied to a window."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from marks import slow
from torch import Tensor, nn

import co3d_compile as co3d
from co3d_compile.capture.loops import time_dims
from co3d_compile.rules import rule_for
from co3d_compile.rules.conv import Convolution
from co3d_compile.rules.failures import STRICT
from co3d_compile.rules.pool import Pool
from co3d_compile.rules.shape import View
from co3d_compile.user_operators import scope

CLIP = (1, 3, 8, 4, 4)


class Net(nn.Module):
    """Two branches of convolutions, a pool over time and space, a view and a head; nothing is padded over time."""

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Conv3d(3, 4, (5, 3, 3), padding=(0, 1, 1))
        self.far = nn.Conv3d(3, 4, 3, padding=(0, 1, 1), dilation=(2, 1, 1))
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.max_pool3d(self.near(x) + self.far(x), 3, 1, (0, 1, 1)).mean(2)
        return self.head(nn.functional.max_pool2d(y, 2).reshape(x.shape[0], -1))


def broken(*args: Any) -> Any:
    raise KeyError("axis")


def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Net().eval(), torch.randn(CLIP)


def agrees(compiled: co3d.CompiledModel, network: nn.Module, clip: Tensor) -> None:
    """The last frame of a clip gives what the network makes of that clip."""
    session = co3d.StreamSession(compiled)
    for t in range(clip.shape[2]):
        result = session.step(clip[:, :, t].numpy())
    np.testing.assert_allclose(result, network(clip).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("rule", "method", "operator"),
    [
        (Convolution, "flow", "aten.conv3d"),
        slow(Convolution, "strip", "aten.conv3d"),
        (Convolution, "lower", "aten.conv3d"),
        (Pool, "split", "aten.max_pool3d"),
        slow(Pool, "lower", "aten.max_pool3d"),
        (View, "layout", "aten.reshape"),
        (View, "window", "aten.reshape"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else value,
)
def test_a_rule_that_fails_makes_its_operator_a_window(
    rule: type, method: str, operator: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(STRICT)
    monkeypatch.setattr(rule, method, broken)
    module, clip = network()
    with (
        caplog.at_level(logging.WARNING, "co3d_compile"),
        pytest.warns(co3d.Co3dWarning, match=rf"The rule of {operator} in .* failed \(KeyError: 'axis'\)"),
    ):
        compiled = co3d.compile(module, (clip,))
    (warning, *_) = (w for w in compiled.report().warnings if w.startswith("The rule of"))
    assert warning.endswith("it is computed again on a window.") and warning in caplog.text
    if rule is not View:  # behind the mean all is a window anyway
        assert any(why == "has a rule that failed" for *_, why in recomputed(compiled))
    agrees(compiled, module, clip)


def recomputed(compiled: co3d.CompiledModel) -> list[tuple[str, str, str]]:
    return [(f.operator, f.module_path, f.reason) for f in compiled.program.notes.recomputed]


def test_only_the_operator_itself_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STRICT)
    own = Convolution.lower

    def lower(self: Convolution, node: Any, low: Any) -> Any:
        return broken() if "far" in str(node.args[1]) else own(self, node, low)

    monkeypatch.setattr(Convolution, "lower", lower)
    module, clip = network()
    with pytest.warns(co3d.Co3dWarning, match=r"aten\.conv3d in far failed"):
        compiled = co3d.compile(module, (clip,))
    assert ("aten.conv3d", "far", "has a rule that failed") in recomputed(compiled)
    assert not any(path == "near" for _, path, _ in recomputed(compiled))
    agrees(compiled, module, clip)


def test_where_fallbacks_are_refused_the_failure_is_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STRICT)
    monkeypatch.setattr(Convolution, "flow", broken)
    module, clip = network()
    with pytest.raises(co3d.UnsupportedError, match=r"aten\.conv3d in near: has a rule that failed"):
        co3d.compile(module, (clip,), unsupported="error")


def test_a_failure_is_raised_as_it_is_where_the_environment_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STRICT, "1")
    monkeypatch.setattr(Convolution, "flow", broken)
    module, clip = network()
    with pytest.raises(co3d.PassError, match=r"annotate_time broke the graph: KeyError"):
        co3d.compile(module, (clip,))


class Loop(nn.Module):
    """A layer over time, and another one on frame after frame of what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = nn.Conv3d(3, 4, 3, padding=(0, 1, 1)), nn.Conv2d(4, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.near(x)
        return torch.stack([self.far(y[:, :, t]) for t in range(y.shape[2])], 2)


def test_a_rule_that_fails_before_the_passes_leaves_a_loop_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rule = SimpleNamespace(layout=broken)
    conv3d = torch.ops.aten.conv3d.default
    monkeypatch.setattr(time_dims, "rule_for", lambda target: rule if target is conv3d else rule_for(target))
    module, clip = Loop().eval(), torch.randn(CLIP)
    with pytest.raises(KeyError):
        co3d.compile(module, (clip,))
    monkeypatch.delenv(STRICT)
    with caplog.at_level(logging.WARNING, "co3d_compile"), pytest.warns(co3d.Co3dWarning, match="no loop is looked"):
        compiled = co3d.compile(module, (clip,))
    (warning,) = (w for w in compiled.report().warnings if w.endswith("no loop is looked for behind it."))
    assert warning.startswith("The rule of aten.conv3d in near failed (KeyError: 'axis')") and warning in caplog.text
    assert co3d.verify(compiled, module, clip).passed


def test_a_users_own_rule_is_never_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STRICT)

    @torch.library.custom_op("failures::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return x * 2

    twice.register_fake(torch.empty_like)

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return twice(x)

    with scope():
        co3d.rule(twice, mixes=())(broken)
        with pytest.raises(co3d.Co3dError, match=r"KeyError.*failures\.twice"):
            co3d.compile(Twice(), (torch.randn(CLIP),))
