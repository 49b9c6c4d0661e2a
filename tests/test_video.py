"""Video in and out through a real encoder and decoder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from co3d_compile.errors import Co3dError, LoadError, OutputError, UsageError
from co3d_compile.media.video import Image, VideoWriter, center_crop, read_frames, resize, write_video


def pictures(count: int = 12, height: int = 48, width: int = 64) -> list[Image]:
    """Smooth gradients that move by one step per frame: what a lossy encoder keeps nearly as it is."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [
        (128 + 90 * np.sin((x + 3 * i) / 15), 128 + 90 * np.cos(y / 11), 40 + 10.0 * i + 0 * x) for i in range(count)
    ]
    return [np.stack(channel, axis=-1).astype(np.uint8) for channel in channels]


def test_what_is_written_is_read_again_in_order_with_its_times(tmp_path: Path) -> None:
    images = pictures()
    frames = list(read_frames(write_video(tmp_path / "v.mp4", images, fps=12.5)))
    assert [frame.index for frame in frames] == list(range(12))
    np.testing.assert_allclose([frame.time for frame in frames], np.arange(12) / 12.5, atol=1e-3)
    for frame, image in zip(frames, images, strict=True):
        assert frame.image.dtype == np.uint8 and frame.image.shape == (48, 64, 3)
        assert np.abs(frame.image.astype(int) - image).mean() < 8


@pytest.mark.parametrize("fps", [1, 15, 23.976, 29.97, 60])
def test_frame_rates_survive(tmp_path: Path, fps: float) -> None:
    times = [frame.time for frame in read_frames(write_video(tmp_path / "v.mp4", pictures(6), fps))]
    np.testing.assert_allclose(np.diff(times), 1 / fps, rtol=1e-2)


def test_an_interrupted_writer_leaves_a_file_that_can_be_read(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "v.mp4") as writer:
        for image in pictures(5):
            writer.write(image)
        raise KeyboardInterrupt
    assert len(list(read_frames(tmp_path / "v.mp4"))) == 5


def test_a_truncated_file_ends_or_fails_cleanly(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "v.mp4", pictures(40)).read_bytes()
    for share in (0.1, 0.5, 0.9):
        (tmp_path / "cut.mp4").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(LoadError, match=r"cut\.mp4"):
            list(read_frames(tmp_path / "cut.mp4"))


def test_sources_that_are_no_video_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name in ("text.mp4", "empty.mp4", "missing.mp4"):
        with pytest.raises(LoadError, match=name):
            next(read_frames(tmp_path / name))


def test_wrong_pictures_and_paths_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "no" / "such" / "folder.mp4", tmp_path / "v.nothing-known"):
        with pytest.raises(OutputError, match=path.name):
            write_video(path, pictures(2))
    with pytest.raises(UsageError, match="frame rate"):
        VideoWriter(tmp_path / "v.mp4", fps=0)
    with pytest.raises(UsageError, match="even"), VideoWriter(tmp_path / "v.mp4") as writer:
        writer.write(np.zeros((31, 64, 3), np.uint8))
    with pytest.raises(UsageError, match="one size"), VideoWriter(tmp_path / "v.mp4") as writer:
        writer.write(np.zeros((32, 64, 3), np.uint8))
        writer.write(np.zeros((64, 32, 3), np.uint8))


def test_crop_takes_the_middle_and_resize_interpolates() -> None:
    image = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    np.testing.assert_array_equal(center_crop(image, 4, 4), image[1:5, 2:6])
    ramp = np.repeat(np.linspace(0, 254, 128).astype(np.uint8)[None, :, None], 64, axis=0).repeat(3, axis=2)
    half = resize(ramp, 32, 64)
    assert half.shape == (32, 64, 3)
    np.testing.assert_allclose(half[16, :, 1].astype(int), ramp[0, ::2, 0].astype(int) + 1, atol=2)


def test_without_pyav_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(Co3dError, match=r"pip install .*\[video\]"):
        next(read_frames("v.mp4"))


def test_running_a_model_on_video_does_not_import_torch() -> None:
    check = "import sys, co3d_compile.media.predictor, co3d_compile.media.video; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
