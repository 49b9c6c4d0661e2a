"""Programs captured for one clip: which dim of size one is the batch is found out, or the batch stays at one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from marks import slow
from torch import Tensor, nn
from zoo import Graph, randomise
from zoo.small import SMALL

import co3d_compile as co3d
from co3d_compile.verification.verify_model import verify

CLIP = (1, 4, 12, 6, 6)


def head(forward: Callable[..., Any]) -> nn.Module:
    return randomise(
        Graph(forward, a=nn.Conv3d(4, 4, 3, padding=1), l=nn.Linear(4, 3), g=nn.GRU(4, 4)), torch.zeros(CLIP)
    )


def each_clip(m: Any, x: Tensor) -> Tensor:
    """A loop over the clips of a batch, as where clips were padded to the longest."""
    return m.l(torch.stack([y[:, :12].mean((1, 2, 3)) for y in m.a(x)]))


def twice(m: Any, x: Tensor) -> Tensor:
    """A loop whose state is (features, 2 * batch)."""
    state, results = torch.zeros(4, 2 * x.shape[0]), []
    for frame in x.mean((3, 4)).unbind(2):
        state = torch.tanh(state * 0.5 + frame.T.repeat(1, 2))
        results.append(state.view(4, 2, -1).mean(1).T)
    return torch.stack(results, 2)


def captured_for_one(name: str) -> Any:
    entry = SMALL[name]
    module = entry.build()
    program = torch.export.export(module, entry.examples(), strict=False)
    return co3d.compile(program, time_dim=entry.time_dim, **entry.options)


@pytest.mark.parametrize("name", ["p3d", "tsm_resnet", "cnn_lstm", "nonlocal_i3d", "se_mean-window", "causal_tcn"])
def test_two_streams_are_as_one_and_one(name: str) -> None:
    compiled = captured_for_one(name)
    both, *alone = (co3d.StreamSession(compiled, batch=n) for n in (2, 1, 1))
    rng = np.random.default_rng(0)
    spec = both.info.inputs[0]
    for _ in range(both.info.warmup_steps + 2):
        frames = rng.standard_normal((2, *spec.shape[1:])).astype(np.float32)
        together = both.step(frames)
        each = [session.step(frames[i : i + 1]) for i, session in enumerate(alone)]
        np.testing.assert_allclose(together, np.concatenate(each), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["st_gcn", "transformer"])
def test_what_mixes_streams_is_for_one(name: str) -> None:
    with pytest.warns(co3d.Co3dWarning, match="fixes its batch at 1"):
        compiled = captured_for_one(name)
    assert {state.shape[0] for state in compiled.info.states} == {1}
    co3d.StreamSession(compiled, batch=1)
    with pytest.raises(co3d.Co3dError, match="compiled for a batch of 1, not 2"):
        co3d.StreamSession(compiled, batch=2)


@pytest.mark.parametrize("name", ["st_gcn", "transformer"])
def test_a_program_of_two_clips_is_for_any_number(name: str) -> None:
    entry = SMALL[name]
    program = torch.export.export(entry.build(), entry.examples(batch=2), strict=False)
    compiled = co3d.compile(program, time_dim=entry.time_dim, **entry.options)
    with co3d.StreamSession(compiled, batch=3) as session:
        (spec,) = session.info.inputs
        assert spec.shape[0] == "N"
        assert session.step(np.zeros((3, *spec.shape[1:]), np.float32)).shape[0] == 3


def test_a_squeeze_leaves_the_batch() -> None:
    """``squeeze()`` of one stream's answer would take its batch dim too."""
    module = head(lambda m, x: m.l(m.a(x).mean((2, 3, 4), True).squeeze()))
    compiled = co3d.compile(module, (torch.zeros(CLIP),))
    for batch in (1, 2):
        with co3d.StreamSession(compiled, batch=batch) as session:
            assert session.step(np.zeros((batch, 4, 6, 6), np.float32)).shape == (batch, 3)


@pytest.mark.parametrize(
    ("forward", "shape"),
    [
        (lambda m, x: m.l(m.a(x).mean((2, 3, 4)).view(-1)), (3,)),
        (lambda m, x: m.l(m.a(x).mean((2, 3, 4))[0]), (3,)),
        (lambda m, x: m.a(x).sum(), ()),
        (each_clip, (1, 3)),
        (lambda m, x: torch.stack([m.a(y[None]).mean((0, 2, 3, 4)) for y in x.unbind(0)]), (1, 4)),
        (lambda m, x: m.l((y := m.a(x).mean((2, 3, 4))) * y.mean(0)), (1, 3)),
        (lambda m, x: m.l(m.a(x).mean((2, 3, 4)).softmax(0)), (1, 3)),
        (lambda m, x: (y := m.l(m.a(x).mean((2, 3, 4)))).T.reshape(y.shape), (1, 3)),
        (twice, (1, 4)),
    ],
)
def test_what_is_written_for_one_clip_runs_on_one_stream(forward: Callable[..., Any], shape: tuple[int, ...]) -> None:
    module, clip = head(forward), (torch.randn(CLIP),)
    with pytest.warns(co3d.Co3dWarning, match="fixes its batch at 1"):
        compiled = co3d.compile(module, clip)
    assert compiled.info.outputs[0].shape == shape and not compiled.info.recomputed
    result = verify(compiled, module, clip)
    assert result.passed, result.reason


def over_time(m: Any, x: Tensor) -> Tensor:
    return x[..., 1:, :] - x[..., :-1, :]  # over the last dim but one


def layer_in_front(m: Any, x: Tensor) -> Tensor:
    """A loop whose state is (1, batch, features)."""
    state, results = torch.zeros(1, x.shape[0], 4), []
    for frame in x.mean((3, 4)).unbind(2):
        state = torch.tanh(m.l(state).sum(-1, keepdim=True) + frame[None])
        results.append(state[0])
    return torch.stack(results, 2)


FREE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "channels in front of the batch": lambda m, x: over_time(m, x.mean(4).transpose(0, 1).flatten(0, 1)).unflatten(
        0, (4, -1)).transpose(0, 1),
    "places and channels in front of it": lambda m, x: over_time(m, x.mean(4).permute(3, 1, 0, 2).flatten(1, 2)[
        ..., None]).squeeze(-1).unflatten(1, (4, -1)).permute(2, 1, 3, 0),
    "a state with a layer in front of it": layer_in_front,
    "places in front of it, of one entry": lambda m, x: m.g(
        x.mean(4)[:, :, -1:].permute(2, 3, 0, 1).flatten(0, 1))[1][0],
}  # fmt: skip
TWO: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "every pair of clips": lambda m, x: (
        (y := m.a(x).mean((3, 4)).flatten(1))[:, None] - y).reshape(len(x), len(x), -1).norm(dim=-1),
    "a state that is there twice": twice,
    "rows of all clips but one": lambda m, x: (y := m.a(x).mean((3, 4)).flatten(0, 1)[1:]).cumsum(0) + y.flip(1),
    "sums over the clips": lambda m, x: m.a(x).mean((3, 4)).cumsum(0),
    "products of the clips": lambda m, x: m.a(x).mean((3, 4)).cumprod(0),
    "normed over the clips": lambda m, x: F.batch_norm(m.a(x), None, None, training=True),
}  # fmt: skip


@pytest.mark.parametrize("name", FREE)
def test_a_batch_behind_others_is_free(name: str) -> None:
    module = head(FREE[name])
    compiled = co3d.compile(module, (torch.randn(2, *CLIP[1:]),))
    assert compiled.info.inputs[0].shape[0] == "N" and not compiled.info.recomputed
    result = verify(compiled, module, (torch.randn(3, *CLIP[1:]),))
    assert result.passed, result.reason


@pytest.mark.parametrize("name", TWO)
def test_what_computes_over_two_clips_is_for_two(name: str) -> None:
    module, clips = head(TWO[name]), (torch.randn(2, *CLIP[1:]),)
    with pytest.warns(co3d.Co3dWarning, match="fixes its batch at 2"):
        compiled = co3d.compile(module, clips)
    result = verify(compiled, module, clips)
    assert result.passed, result.reason


def test_what_reads_the_last_clip_but_one_is_for_three() -> None:
    """It is no other for the first two."""
    module = head(lambda m, x: (y := m.a(x).mean((3, 4))) + F.pad(y, (0, 0, 0, 0, 2, -2)))
    clips = (torch.randn(3, *CLIP[1:]),)
    with pytest.warns(co3d.Co3dWarning, match="fixes its batch at 3"):
        compiled = co3d.compile(module, clips)
    result = verify(compiled, module, clips)
    assert result.passed, result.reason


def test_where_the_batch_of_one_clip_ends_is_said() -> None:
    with pytest.warns(co3d.Co3dWarning, match=r"fixes its batch at 1 \(at aten\."):
        co3d.compile(head(lambda m, x: m.l(m.a(x).mean((2, 3, 4)).view(-1))), (torch.randn(CLIP),))


def attention_of_each_channel(m: Any, x: Tensor) -> Tensor:
    """Two heads over all frames, with the channels in the batch: PatchTST."""
    rows = m.a(x).mean(4).flatten(0, 1).unflatten(2, (2, 3))
    scores = torch.einsum("blhe,bshe->bhls", rows, rows * 2).softmax(-1)
    result: Tensor = torch.einsum("bhls,bshd->blhd", scores, rows).flatten(2).view(-1, 4, 12, 6).mean((2, 3))
    return result


def test_channels_in_the_batch_of_a_window_leave_it_free() -> None:
    module = head(attention_of_each_channel)
    compiled = co3d.compile(module, (torch.zeros(CLIP),))
    assert compiled.info.recomputed and compiled.info.inputs[0].shape[0] == "N"
    result = verify(compiled, module, (torch.randn(3, *CLIP[1:]),))
    assert result.passed, result.reason


class LearnedStart(nn.Module):
    """A recurrent layer that does not start at zero. PyTorch's operator does not check for how many rows a start is."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.start = nn.LSTM(4, 4, batch_first=True), nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        start = self.start.expand(1, x.shape[0], 4).contiguous()
        result: Tensor = self.rnn(x, (start, torch.zeros_like(start)))[0]
        return result


def test_a_start_for_other_rows_is_not_tried() -> None:
    """It was run, and wrote beyond its memory."""
    module, clip = LearnedStart().eval(), (torch.randn(1, 10, 4),)
    compiled = co3d.compile(module, clip, time_dim=1)
    result = verify(compiled, module, clip)
    assert result.passed, result.reason


def test_a_constant_may_be_returned() -> None:
    module = head(lambda m, x: (m.a(x), torch.ones(5)))
    compiled = co3d.compile(module, (torch.zeros(CLIP),))
    assert compiled.info.outputs[1].shape == (5,) and verify(compiled, module, (torch.zeros(CLIP),)).passed


def shifted(m: Any, x: Tensor) -> Tensor:
    """A temporal shift of what 2D layers make of a single clip's frames."""
    y = m.a(x[0])
    y = y.view(1, *y.shape)
    z = torch.zeros_like(y)
    z[:, :-1, :2], z[:, 1:, 2:] = y[:, 1:, :2], y[:, :-1, 2:]
    return z.view(y.shape[1:])


def places_of_one(m: Any, x: Tensor) -> Tensor:
    """Attention over the places of each frame, places first. PyTorch puts a dim in front to take q, k, v apart."""
    y = m.a(x).mean(4).permute(0, 2, 3, 1).reshape(12, 6, 4).transpose(0, 1)
    attended: Tensor = m.attention(y, y, y, need_weights=False)[0]
    return attended.transpose(0, 1)[None]


def pooled_features_of_one(m: Any, x: Tensor) -> Tensor:
    """A pool over the features of each frame, with a dim of one where its channels are."""
    rows = m.a(x).mean((3, 4)).mT.view(12, 4)
    return F.max_pool1d(rows[None].transpose(0, 1), 2).view(1, 12, 2)


@pytest.mark.parametrize("forward", [places_of_one, pooled_features_of_one])
def test_frames_of_a_single_clip_in_the_batch(forward: Callable[..., Any]) -> None:
    clip = (torch.randn(CLIP),)
    module = randomise(Graph(forward, a=nn.Conv3d(4, 4, 3, padding=1), attention=nn.MultiheadAttention(4, 2)), *clip)
    compiled = co3d.compile(module, clip)
    assert compiled.info.inputs[0].shape[0] == "N" and not compiled.info.recomputed
    result = verify(compiled, module, clip)
    assert result.passed, result.reason


def test_a_single_clip_streams_by_its_index_equations() -> None:
    """``view(1, T, …)`` makes a clip of its frames again, as ``x[0][None]`` does: no region, the next frame's delay."""
    clip = torch.randn(1, 8, 4, 6, 6)
    module = randomise(Graph(shifted, a=nn.Conv2d(4, 4, 3, padding=1)), clip)
    compiled = co3d.compile(module, (clip,), time_dim=1)
    assert (compiled.info.regions, compiled.info.recomputed, compiled.info.delays) == ((), (), {"output": 1})
    assert verify(compiled, module, (clip,)).passed


ALONG_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "differences": lambda y: y[1:] - y[:-1],
    "as many differences": lambda y: torch.cat([y[1:] - y[:-1], y[-1:] - y[-1:]]),
    "behind zeros": lambda y: F.pad(y, (0, 0, 2, 0)),
    "sums": lambda y: y.cumsum(0),
    "the last": lambda y: y[-1],
}


@pytest.mark.parametrize("boundary", ["stream", slow("exact")])
@pytest.mark.parametrize("rows", [lambda x: x.flatten(0, 1), slow(lambda x: x[0])], ids=["folded", "selected"])
def test_along_the_rows_of_a_single_clip(rows: Callable[[Tensor], Tensor], boundary: str) -> None:
    def forward(m: Any, x: Tensor) -> dict[str, Tensor]:
        y = m.a(rows(x)).mean((2, 3))
        return {name: m.l(along(y)) for name, along in ALONG_ROWS.items()}

    clip = (torch.randn(1, 8, 4, 6, 6),)
    module = randomise(Graph(forward, a=nn.Conv2d(4, 4, 3), l=nn.Linear(4, 3)), *clip)
    compiled = co3d.compile(module, clip, time_dim=1, boundary=boundary)
    assert not compiled.info.recomputed
    result = verify(compiled, module, clip)
    assert result.passed, result.reason


def attend_to_nothing(m: Any, x: Tensor) -> Tensor:
    """Attention and a recurrent layer over zeros, divided by a count: none of it is run."""
    y = (x - x).mT
    result: Tensor = m.cell(F.scaled_dot_product_attention(y, y, y))[0] / torch.arange(1, 9)[:, None]
    return result


# What hangs on no frame, and its shape for 3 streams.
CONSTANTS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "zeros for each clip": (lambda m, x: torch.zeros(x.shape[0], 4), (3, 4)),
    "zeros for each clip behind them": (lambda m, x: torch.zeros(4, x.shape[0]), (4, 3)),
    "zeros": (lambda m, x: torch.zeros(2, 4), (2, 4)),
    "nothing, pooled": (lambda m, x: (x - x).mean(2), (3, 1)),
    "a norm over one number": (lambda m, x: m.norm(x.mT).mT.amax(2), (3, 1)),
    "attention to nothing": (attend_to_nothing, (3, 8, 1)),
    "products that round each row otherwise": (
        lambda m, x: m.out((x - x).flatten(1).repeat(1, 4) + m.out.weight[0]),
        (3, 3),
    ),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_what_hangs_on_no_frame_has_a_row_for_each_stream(name: str) -> None:
    forward, shape = CONSTANTS[name]
    torch.manual_seed(1)
    cell = nn.GRU(1, 1, batch_first=True)
    out, norm = nn.Linear(32, 3), nn.LayerNorm(1)
    module = Graph(lambda m, x: (x * 2, forward(m, x)), norm=norm, cell=cell, out=out).eval()
    clip = torch.randn(1, 1, 8)
    compiled = co3d.compile(module, (clip,))
    with co3d.StreamSession(compiled, batch=3) as session:
        result = session.step(np.ones((3, 1), np.float32))[1]
    assert result.shape == shape
    with torch.no_grad():
        np.testing.assert_allclose(result, module(torch.randn(3, 1, 8))[1], atol=1e-6)
    found = co3d.verify(compiled, module, (clip,))
    assert found.passed, found.reason
