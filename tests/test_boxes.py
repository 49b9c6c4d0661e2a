"""Inputs with rows of their own at each step: boxes, cut out of the features of the frame that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from marks import long
from pytorchvideo.models.resnet import create_resnet_with_roi_head
from pytorchvideo.models.slowfast import create_slowfast_with_roi_head
from torch import Tensor, nn
from torchvision.ops import roi_align, roi_pool

import co3d_compile as co3d
from co3d_compile.capture.torchvision_operators import without_compiled_part
from co3d_compile.contract.reader_loop import stepped
from co3d_compile.errors import Co3dError, SessionError, UnsupportedError, UsageError

T, SIZE = 6, 12
COUNTS = (2, 3, 0, 1, 4)  # boxes that come with one frame and the next


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """torchvision's own operators, in Python where its compiled part is missing."""
    with torch.compiler.set_stance("force_eager"):
        yield


class Detector(nn.Module):
    """Convolutions that pad no time, a pool over time, boxes, a layer."""

    def __init__(self, head: Callable[[Tensor, Tensor], Tensor], stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 3, (stride, 2, 2), (0, 1, 1))
        self.last, self.head = nn.Linear(4, 3), head

    def forward(self, x: Tensor, boxes: Tensor) -> Tensor:
        return self.last(self.head(torch.relu(self.conv(x)), boxes).amax((-2, -1)))


def align(y: Tensor, boxes: Any, samples: int = 2, aligned: bool = True) -> Tensor:
    return roi_align(y, boxes, (3, 2), 0.5, samples, aligned)


def kept_dim(y: Tensor, boxes: Tensor) -> Tensor:
    """The pool keeps its dim, as in pytorchvideo's heads."""
    pooled = nn.functional.avg_pool3d(y, (4, 1, 1), 1).squeeze(-3)
    rows = nn.functional.max_pool2d(align(pooled, boxes), 2, 1).unsqueeze(-3)
    return rows.permute(0, 2, 3, 4, 1).permute(0, 4, 1, 2, 3).flatten(3)


def whole_numbers(y: Tensor, boxes: Tensor) -> Tensor:
    with without_compiled_part():  # torchvision's own is there with its compiled part alone
        return roi_pool(y.mean(2), boxes, (3, 2), 0.5)


def beside_all(y: Tensor, boxes: Tensor) -> Tensor:
    """What is in a box, beside what is in all of the frame."""
    return align(y.amax(2), boxes) - y.mean((2, 3, 4))[:, :, None, None]


def among_boxes(y: Tensor, boxes: Tensor) -> Tensor:
    """A box beside the mean of all of them."""
    rows = align(y.mean(2), boxes)
    return rows - rows.mean(0, keepdim=True)


# Head, options, steps that boxes wait, frames of a step; the clip has 6 frames, from which 4 entries are pooled. Entry
# 2 of them lies at the clip's third frame, 3 frames before its newest one.
DETECTORS: dict[str, tuple[Callable[..., Tensor], dict[str, Any], int, int]] = {
    "samples": (lambda y, b: align(y.mean(2), b), {}, 3, 1),
    "one sample": (lambda y, b: align(y.mean(2), b, 1), {}, 3, 1),
    "as many samples as places": (lambda y, b: align(y.mean(2), b, -1, False), {}, 3, 1),
    "whole places": (whole_numbers, {}, 3, 1),
    "newest": (lambda y, b: align(y.mean(2), b), {"box_frame": "newest"}, 2, 1),
    "states that only move": (lambda y, b: align(y.mean(2), b), {"state_io": "renamed"}, 3, 1),
    "several frames a step": (lambda y, b: align(y.mean(2), b), {"frames_per_step": 2}, 1, 2),
    "a stride": (lambda y, b: align(y.mean(2), b), {}, 1, 2),
    "dense": (lambda y, b: align(y.mean(2), b), {"stride_mode": "dense"}, 2, 1),
    "a pool that keeps its dim": (kept_dim, {}, 3, 1),
    "no pool over time": (lambda y, b: align(y[:, :, -1], b), {}, 2, 1),
    "some of the entries": (lambda y, b: align(y[:, :, 1:].mean(2), b), {}, 3, 1),
    "a list of boxes": (lambda y, b: align(y.mean(2), [b[:, 1:]]), {}, 3, 1),
    "boxes in other units": (lambda y, b: align(y.mean(2), b * torch.tensor([1.0, 0.5, 1, 0.5, 1])), {}, 3, 1),
    "beside all of the frame": (beside_all, {}, 3, 1),
    "among boxes": (among_boxes, {}, 3, 1),
}


def some_boxes(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    corners = torch.rand((COUNTS[step % 5], 2, 2), generator=generator).sort(1).values * SIZE
    return torch.cat([torch.zeros(len(corners), 1), corners.flatten(1)], 1)


@cache
def detector(name: str) -> tuple[nn.Module, co3d.CompiledModel]:
    torch.manual_seed(0)
    head, options, _, _ = DETECTORS[name]
    network = Detector(head, 2 if name in ("a stride", "dense") else 1).eval()
    return network, co3d.compile(network, (torch.randn(1, 3, T, SIZE, SIZE), some_boxes(0)), **options)


def frames_of(steps: int, pulse: int) -> Tensor:
    return torch.randn(1, 3, steps * pulse, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", DETECTORS)
def test_boxes_wait_for_the_frame_that_they_belong_to(name: str) -> None:
    network, model = detector(name)
    *_, wait, pulse = DETECTORS[name]
    video, rows = frames_of(16, pulse), []
    clip = T - (name == "dense")  # a stride of 2 leaves the last frame unread
    with co3d.StreamSession(model) as session:
        for step in range(16):
            end = (step + 1) * pulse
            frames = video[:, :, end - pulse : end].numpy()
            got = session.step(frames[:, :, 0] if pulse == 1 else frames, some_boxes(step).numpy())
            rows.append(len(got))
            if end >= clip and step >= wait:
                with torch.no_grad():
                    wanted = network(video[:, :, end - clip : end], some_boxes(step - wait)).numpy()
                np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    assert rows == [0] * wait + [len(some_boxes(step)) for step in range(16 - wait)]
    boxes = model.info.inputs[1]
    assert (model.info.version, boxes.shape, boxes.waits) == (2, ("K", 5), wait)
    assert boxes.stream_column == (0 if name not in ("a list of boxes", "boxes in other units") else None)
    assert not model.info.recomputed


VERIFIED = "samples", "one sample", "newest", "a pool that keeps its dim", "several frames a step"


@pytest.mark.parametrize("name", VERIFIED)
def test_verified_with_boxes_that_change(name: str) -> None:
    network, model = detector(name)
    example = torch.randn(1, 3, T, SIZE, SIZE), some_boxes(0)
    assert co3d.verify(model, network, example).passed
    given = [(x.numpy(), some_boxes(j).numpy()) for j, x in enumerate(frames_of(12, 2).split(2, 2))]
    if name == "several frames a step":
        assert co3d.verify(model, network, example, frames=given).passed


# Network and example, options, what the error says.
REFUSED: dict[str, tuple[Callable[..., Tensor], dict[str, Any], type[Co3dError], str]] = {
    "both ends": (DETECTORS["samples"][0], {"boundary": "exact"}, UsageError, "no meaning for the input boxes"),
    "boxes of several frames": (
        lambda y, b: align(y.transpose(1, 2).flatten(0, 1), b),
        {},
        UnsupportedError,
        r"several frames at once.*co3d.roi_align.*Pool over time first",
    ),
    "a fixed number of boxes": (
        lambda y, b: align(y.mean(2), b) * torch.arange(2.0).view(2, 1, 1, 1),
        {},
        UnsupportedError,
        "fixes how many boxes there are",
    ),
}


@pytest.mark.parametrize("head, options, kind, message", REFUSED.values(), ids=REFUSED)
def test_refused(head: Callable[..., Tensor], options: dict[str, Any], kind: type[Co3dError], message: str) -> None:
    network = Detector(head).eval()
    with pytest.raises(kind, match=message):
        co3d.compile(network, (torch.randn(1, 3, T, SIZE, SIZE), some_boxes(0)), **options)


def test_an_exported_program_has_one_box() -> None:
    network = Detector(DETECTORS["samples"][0]).eval()
    with without_compiled_part():
        several, one = (
            torch.export.export(network, (torch.randn(1, 3, T, SIZE, SIZE), some_boxes(3)[:1].repeat(k, 1)))
            for k in (2, 1)
        )
    with pytest.raises(UsageError, match="one clip and one box"):
        co3d.compile(several)
    assert co3d.compile(one).info.outputs[0].shape == ("K", 3)


# Targets are in the table of test_targets.
ELSEWHERE: dict[str, Callable[[co3d.CompiledModel], object]] = {
    "A batch of 2": lambda model: co3d.StreamSession(model, batch=2),
    "Predictor": co3d.Predictor,
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_has_no_place_for_boxes_says_so(name: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"(?i){name}.*'boxes'|'boxes' .* no sequence of"):
        ELSEWHERE[name](detector("samples")[1])


BAD_BOXES: dict[str, tuple[Any, str]] = {
    "of another stream": (np.array([[0, 1, 1, 2, 2], [1, 1, 1, 2, 2]], np.float32), "Row 1 of input 'boxes' is of str"),
    "too few columns": (np.zeros((2, 4), np.float32), r"shape \(2, 4\), expected \('K', 5\)"),
    "a single box": (np.zeros(5, np.float32), "expected"),
    "float64": (np.zeros((2, 5)), "dtype float64"),
}


@pytest.mark.parametrize("boxes, message", BAD_BOXES.values(), ids=BAD_BOXES)
def test_bad_boxes(boxes: Any, message: str) -> None:
    frame = np.zeros((1, 3, SIZE, SIZE), np.float32)
    with co3d.StreamSession(detector("samples")[1]) as session:
        session.step(frame, some_boxes(0).numpy())
        before = session.get_state()
        with pytest.raises(SessionError, match=message):
            session.step(frame, boxes)
        assert all(np.array_equal(value, before[name]) for name, value in session.get_state().items())


@pytest.mark.parametrize("finite", ["ignore", "reset"])
def test_states_with_rows_go_in_and_out(finite: Any) -> None:
    model = detector("samples")[1]
    steps = [(frames_of(1, 1)[:, :, 0].numpy() * j, some_boxes(j).numpy()) for j in range(12)]
    session, other = (co3d.StreamSession(model, finite=finite) for _ in range(2))
    start = session.get_state()
    assert {len(v) for v, s in zip(start.values(), model.info.states, strict=True) if "K" in s.shape} == {0}
    for step in steps[:6]:
        session.step(*step)
    blob, state = session.snapshot(), session.get_state()
    wanted = [session.step(step) for step in steps[6:]]
    for put_back in (lambda: other.restore(blob), lambda: other.set_state(state)):
        put_back()
        for step, want in zip(steps[6:], wanted, strict=True):
            named = dict(zip([i.name for i in model.info.inputs], step, strict=True))
            np.testing.assert_array_equal(other.run(named)["output"], want)
    other.reset()
    assert all(np.array_equal(value, start[name]) for name, value in other.get_state().items())
    with pytest.raises(SessionError, match="damaged"):
        other.restore(blob[:-1])


def test_the_loop_of_the_contract() -> None:
    model = detector("states that only move")[1]
    plain = ort.InferenceSession(model.to_bytes(), providers=["CPUExecutionProvider"])
    names = [o.name for o in plain.get_outputs()]
    steps = [(frames_of(1, 1)[:, :, 0].numpy() * j, some_boxes(j).numpy()) for j in range(8)]
    loop = stepped(model.info, 1, steps, lambda given: dict(zip(names, plain.run(names, given), strict=True)))
    with co3d.StreamSession(model) as session:
        for step, values in zip(steps, loop, strict=True):
            np.testing.assert_array_equal(values["output"], session.step(step))


def _slowfast() -> nn.Module:
    pools = ((2, 1, 1), (8, 1, 1))
    dims: dict[str, Any] = {"stem_dim_outs": (8, 2), "slowfast_channel_reduction_ratio": (4,)}
    return create_slowfast_with_roi_head(model_num_class=8, head_pool_kernel_sizes=pools, dropout_rate=0.0, **dims)


def _resnet() -> nn.Module:
    pool = (4, 1, 1)
    return create_resnet_with_roi_head(model_num_class=8, stem_dim_out=8, head_pool_kernel_size=pool, dropout_rate=0.0)


@pytest.mark.parametrize(
    "build, frames, wait", [long(_resnet, (4,), 10), long(_slowfast, (2, 8), 12)], ids=["resnet", "slowfast"]
)
def test_heads_of_pytorchvideo(build: Callable[[], nn.Module], frames: Sequence[int], wait: int) -> None:
    torch.manual_seed(0)
    network, clips = build().eval(), [torch.randn(1, 3, t, 64, 64) for t in frames]
    example = clips[0] if len(clips) == 1 else clips, some_boxes(0) * 5
    model = co3d.compile(network, example)
    assert (model.info.inputs[-1].waits, model.info.outputs[0].shape) == (wait, ("K", 8))
    assert not model.info.recomputed
    assert co3d.verify(model, network, example).passed
