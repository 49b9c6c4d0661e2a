"""Predictions and the frames that they speak of, on videos in which brightness is the frame's number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from film import Brightness, compiled, frames, gray, level_of, ramp, video
from torch import Tensor, nn

import co3d_compile as co3d
from co3d_compile.errors import UnsupportedError, UsageError
from co3d_compile.media.annotated_video import AnnotatedVideo, fitted, video_size
from co3d_compile.media.predictor import Prediction, as_dict
from co3d_compile.media.video import VideoFrame, read_frames


def check(predictions: list[Prediction], fps: float = 20.0) -> None:
    """Every result says how bright the frame is that it claims to speak of."""
    for p in predictions:
        if not p.warmup:
            assert p.scores[0] == pytest.approx(level_of(p.frame), abs=0.01)
            assert p.time == pytest.approx(p.frame / fps)


@pytest.mark.parametrize(
    ("options", "delay"),
    [
        ({}, 2),
        ({"taps": 1}, 0),
        ({"taps": 7}, 3),
        ({"dense": True}, 2),
        ({"taps": 3, "stride": 2}, None),
        ({"taps": 3, "stride": 2, "dense": True}, None),
    ],
)
@pytest.mark.parametrize("frames_per_step", [None, 4])
def test_results_carry_the_time_of_the_frames_that_they_speak_of(
    options: dict[str, int], delay: int | None, frames_per_step: int | None
) -> None:
    model = compiled(Brightness(**options), frames_per_step=frames_per_step)  # type: ignore[arg-type]
    with co3d.Predictor(model) as predictor:
        found = list(predictor.predict(frames()))
    sure = [p for p in found if not p.warmup]
    assert len(sure) >= 5
    check(found)
    assert [p.frame for p in sure] == sorted({p.frame for p in sure})
    if delay is not None and frames_per_step is None:
        assert all(p.newest_frame - p.frame == delay for p in sure)
    assert all(p.newest_time == pytest.approx(p.newest_frame / 20) for p in found)


def test_strided_windows_with_several_entries_per_step() -> None:
    """The delay counts entries of two frames, though a step takes eight."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.then = (
                Brightness(3, 2, dense=True),
                nn.Conv3d(2, 1, (5, 1, 1), padding=(2, 0, 0), bias=False),
            )
            with torch.no_grad():
                self.then.weight.zero_()
                self.then.weight[0, 0, 2] = 1

        def forward(self, clip: Tensor) -> Tensor:
            level = self.then(self.first(clip)[..., None, None])[:, :, -1, 0, 0]
            return torch.cat([level, 1 - level], 1)

    with co3d.Predictor(compiled(Two(), frames_per_step=8)) as predictor:
        assert predictor.info.outputs[0].delay > 0
        check(list(predictor.predict(frames())))


@pytest.mark.parametrize("dense", [True, False])
def test_with_exact_ends_every_frame_has_its_result(dense: bool) -> None:
    with co3d.Predictor(compiled(Brightness(dense=dense), boundary="exact")) as predictor:
        found = list(predictor.predict(frames()))
    check(found)
    assert [p.frame for p in found] == list(range(40))
    assert not found[-1].warmup


def test_two_inputs_at_two_rates_share_the_video() -> None:
    class SlowFast(nn.Module):
        def forward(self, slow: Tensor, fast: Tensor) -> Tensor:
            level = slow[:, :1].mean((3, 4))[:, :, -1], fast[:, :1].mean((3, 4))[:, :, -1]
            return torch.cat([level[0], level[1], 1 - level[0] - level[1]], 1)

    clips = (torch.rand(1, 3, 2, 16, 16), torch.rand(1, 3, 8, 16, 16))
    model = co3d.compile(SlowFast(), clips).to_bytes()
    with co3d.Predictor(model, activation="none") as predictor:
        found = list(predictor.predict(frames()))
        assert sorted(predictor.info.frames_per_step.values()) == [1, 4]
    for index, p in enumerate(found):
        np.testing.assert_allclose(p.scores[:2], [level_of(4 * index), level_of(4 * index + 3)], atol=0.01)


def times(predictor: co3d.Predictor, seconds: list[float]) -> list[float]:
    found: list[Prediction] = []
    for index, at in enumerate(seconds):
        found += predictor.push(VideoFrame(gray(100), at, index))
    return [p.time for p in found]


@pytest.fixture
def at_ten() -> Iterator[co3d.Predictor]:
    with co3d.Predictor(compiled(Brightness(taps=1)), preprocess={"fps": 10}) as predictor:
        yield predictor


def test_a_faster_video_is_thinned_out(at_ten: co3d.Predictor) -> None:
    kept = times(at_ten, [i / 30 for i in range(60)])
    np.testing.assert_allclose(kept, [i / 10 for i in range(20)])
    assert (at_ten.skipped, at_ten.repeated, at_ten.restarts) == (40, 0, 0)


def test_a_slower_video_is_repeated(at_ten: co3d.Predictor) -> None:
    assert len(times(at_ten, [i / 5 for i in range(20)])) == 39
    assert at_ten.repeated == 19


def test_rates_that_do_not_divide_and_times_rounded_to_milliseconds(at_ten: co3d.Predictor) -> None:
    kept = times(at_ten, [round(i / 23.976, 3) for i in range(240)])
    assert len(kept) == pytest.approx(100, abs=1) and np.diff(kept).max() < 0.15
    at_ten.reset()
    assert len(times(at_ten, [round(i / 10, 3) + 0.001 * (i % 2) for i in range(100)])) == 100


def test_lost_frames_are_filled_and_jumps_start_the_clock_again(at_ten: co3d.Predictor) -> None:
    assert times(at_ten, [0, 0.1, 0.5, 0.6]) == [0, 0.1, 0.5, 0.5, 0.5, 0.5, 0.6]
    assert times(at_ten, [50, 50.1, 3.0, 3.1]) == [50, 50.1, 3.0, 3.1]
    assert at_ten.restarts == 2


@pytest.mark.parametrize("boundary", ["stream", "exact"])
@pytest.mark.parametrize(("away", "anew"), [(0.2, False), (5.0, True)])
def test_a_live_source_that_comes_back_begins_anew_where_the_gap_is_longer_than_an_answer_sees(
    away: float, anew: bool, boundary: str
) -> None:
    """Behind a long gap answers are those of a new stream; behind a short one those of a stream that went on."""
    video = [VideoFrame(f.image, f.time + away * (f.index >= 20), f.index, away * (f.index == 20)) for f in frames()]
    with co3d.Predictor(compiled(Brightness(dense=True), boundary=boundary)) as predictor:
        found = list(predictor.predict(video))
        assert (predictor.anew, round(predictor.missed)) == (anew, round(20 * away))
        parts = [video[:20], video[20:]] if anew else [[VideoFrame(f.image, f.time, f.index) for f in video]]
        wanted = []
        for part in parts:
            predictor.reset()
            wanted += list(predictor.predict(VideoFrame(f.image, f.time, f.index) for f in part))
    for name in ("frame", "time", "newest_frame", "warmup"):
        assert [getattr(p, name) for p in found] == [getattr(p, name) for p in wanted]
    np.testing.assert_array_equal([p.scores for p in found], [p.scores for p in wanted])


def test_logits_become_probabilities_and_distributions_stay() -> None:
    model = compiled(nn.Sequential(nn.Conv3d(3, 3, 1), nn.AdaptiveAvgPool3d(1), nn.Flatten()))
    with co3d.Predictor(model) as auto, co3d.Predictor(model, activation="none") as raw:
        scores, logits = ([p.scores for p in one.predict(frames(12))] for one in (auto, raw))
    powers = np.exp(np.stack(logits))
    np.testing.assert_allclose(np.stack(scores), powers / powers.sum(1, keepdims=True), atol=1e-5)
    with co3d.Predictor(compiled()) as predictor:
        assert list(predictor.predict(frames(12)))[-1].scores.sum() == pytest.approx(1)
    one = compiled(nn.Sequential(nn.Conv3d(3, 1, 1), nn.AdaptiveAvgPool3d(1), nn.Flatten()))
    with co3d.Predictor(one, activation="sigmoid") as predictor:
        assert all(0 < p.scores[0] < 1 for p in predictor.predict(frames(12)))


def test_labels_and_ranks() -> None:
    model = compiled(labels=["dark\x1b[2J", "bright"])
    with co3d.Predictor(model, labels=["bright", "dark"]) as predictor:
        last = list(predictor.predict(frames()))[-1]
    assert [(r.index, r.label) for r in last.top(5)] == [(0, "bright"), (1, "dark")]
    assert as_dict(last, 1)["top"] == [{"class": 0, "label": "bright", "score": last.top(1)[0].score}]
    with co3d.Predictor(model) as predictor:
        assert all(label.isprintable() for label in predictor.labels)
    with co3d.Predictor(compiled()) as predictor:
        assert next(iter(predictor.predict(frames(12)))).top(1)[0].label in "01"
    with pytest.raises(UsageError, match="3 labels"):
        co3d.Predictor(model, labels=["a", "b", "c"])
    with pytest.raises(UsageError, match="labels are the text"):
        co3d.Predictor(model, labels="labels.txt")
    with pytest.raises(UsageError, match=r"read_source\(\.\.\.\)"):
        list(co3d.predict(model, "video.mp4"))  # type: ignore[arg-type]


def test_reset_forgets_a_video() -> None:
    with co3d.Predictor(compiled()) as predictor:
        first = list(predictor.predict(frames()))
        predictor.reset()
        again = list(predictor.predict(frames()))
    np.testing.assert_array_equal([p.scores for p in first], [p.scores for p in again])
    assert [(p.frame, p.warmup) for p in first] == [(p.frame, p.warmup) for p in again]


def test_models_without_class_scores_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="class scores"):
        co3d.Predictor(compiled(nn.Conv3d(3, 2, 3)))
    with pytest.raises(UnsupportedError, match="pictures"):
        co3d.Predictor(co3d.compile(nn.Conv1d(4, 2, 3), (torch.zeros(1, 4, 9),)).to_bytes())
    with pytest.raises(UsageError, match="no output"):
        co3d.Predictor(compiled(), output="boxes")


def test_a_recomputed_window_gives_its_newest_entry() -> None:
    class Flip(nn.Module):
        def forward(self, clip: Tensor) -> Tensor:
            level = clip.mean((1, 3, 4)).sort(1).values.flip(1).flip(1)[:, None]
            return torch.cat([level, 1 - level], 1)

    with co3d.Predictor(compiled(Flip())) as predictor:
        assert predictor.info.recomputed
        found = list(predictor.predict(frames()))
    assert len(found) == 40
    check(found)


def test_api_of_readme_size(tmp_path: Path) -> None:
    path = video(tmp_path / "v.mp4")
    found = list(co3d.predict(compiled(), co3d.read_source(path)))
    assert len(found) == 38
    check(found)


def test_each_frame_of_the_annotated_video_has_the_result_that_speaks_of_it(tmp_path: Path) -> None:
    """The bar is as long as the higher score, and that follows from the brightness of the frame below it."""
    images = [VideoFrame(np.full((320, 480, 3), i.mean(), np.uint8), n / 20, n) for n, i in enumerate(ramp())]
    with co3d.Predictor(compiled(labels=["b", "d"])) as predictor, AnnotatedVideo(tmp_path / "a.mp4", 20, 1) as out:
        for frame in images:
            out.add(frame, predictor.push(frame))
        out.add(None, predictor.finish())
    written = list(read_frames(tmp_path / "a.mp4"))
    assert len(written) == 40
    np.testing.assert_allclose([f.time for f in written], np.arange(40) / 20, atol=1e-3)
    for frame in written[10:37]:
        blue = (frame.image[..., 2].astype(int) - frame.image[..., 0]) > 100
        row = blue[240:].sum(1).argmax() + 240
        length = blue[row].sum() / (19 * 15 - 2 * 9)
        assert length == pytest.approx(max(level_of(frame.index), 1 - level_of(frame.index)), abs=0.03)


def test_frames_between_those_of_the_model_and_of_other_sizes_are_written_too(tmp_path: Path) -> None:
    model = compiled(preprocess={"fps": 5})
    with co3d.Predictor(model) as predictor, AnnotatedVideo(tmp_path / "a.mkv", 20) as out:
        for frame in frames():
            shape = (90, 50) if frame.index > 20 else (32, 48)
            changed = VideoFrame(gray(frame.image.mean(), *shape), frame.time, frame.index)
            out.add(changed, predictor.push(changed))
    written = list(read_frames(tmp_path / "a.mkv"))
    assert len(written) == 40 and {f.image.shape for f in written} == {(320, 480, 3)}


def test_sizes_of_the_annotated_video() -> None:
    assert video_size(2160, 3840) == (720, 1280)
    assert video_size(241, 321) == (320, 426)
    assert video_size(480, 640) == (480, 640)
    image = fitted(gray(200, 10, 40), 40, 40)
    assert image[20].min() == 200 and image[:14].max() == 0
