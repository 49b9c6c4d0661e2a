"""Pictures to frames, and labels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import co3d_compile as co3d
from co3d_compile.contract.model_contract import InputSpec
from co3d_compile.errors import ContractError, LoadError, UnsupportedError, UsageError
from co3d_compile.media.class_labels import clean_labels, read_labels
from co3d_compile.media.preprocess import Preprocess, preprocess_for, stored_preprocess


@pytest.mark.parametrize(("height", "width"), [(240, 320), (320, 240), (50, 700), (160, 160), (2, 5000)])
@pytest.mark.parametrize("size", [None, 182, (171, 200)])
def test_a_frame_has_the_crop_s_size_and_is_normalised(
    height: int, width: int, size: int | tuple[int, int] | None
) -> None:
    prepare = Preprocess(crop=160, size=size, mean=(0.45, 0.45, 0.45), std=0.225)
    frame = prepare(np.full((height, width, 3), 51, np.uint8))
    assert frame.shape == (1, 3, 160, 160) and frame.dtype == np.float32 and frame.flags.c_contiguous
    np.testing.assert_allclose(frame, (0.2 - 0.45) / 0.225, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.2, 0.1)}, [1.0, 0.0, -3.0]),
        ({"channels": "bgr"}, [0.0, 0.4, 1.0]),
        ({"value_range": (-1, 1)}, [1.0, -0.2, -1.0]),
        ({"value_range": (0, 255), "mean": (104, 117, 123)}, [151.0, -15.0, -123.0]),
        ({"channels": "gray"}, [0.299 + 0.4 * 0.587]),
    ],
)
def test_channels_and_values(options: dict[str, object], expected: list[float]) -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    image[..., 0], image[..., 1] = 255, 102
    np.testing.assert_allclose(Preprocess(crop=8, **options)(image)[0, :, 3, 3], expected, atol=1e-3)  # type: ignore[arg-type]


def test_the_middle_is_cut_out_and_layouts_are_orders_of_dims() -> None:
    image = np.zeros((4, 6, 3), np.uint8)
    image[:, 1, 0] = 255  # the first column of the middle
    np.testing.assert_array_equal(Preprocess(crop=4)(image)[0, 0, 0], [1, 0, 0, 0])
    assert Preprocess(crop=(4, 6), layout="NTHWC")(image).shape == (1, 4, 6, 3)
    assert Preprocess(crop=(4, 6), layout="ntchw")(image)[0, 0, 0, 1] == 1


@pytest.mark.parametrize(
    "options",
    [
        {"crop": 0},
        {"crop": 100, "size": 99},
        {"crop": (10, 20), "size": (20, 10)},
        {"crop": 8, "size": (1, 2, 3)},
        {"crop": 8, "std": (1, 0, 1)},
        {"crop": 8, "mean": (0, 0)},
        {"crop": 8, "mean": "red"},
        {"crop": 8, "value_range": (1, 1)},
        {"crop": 8, "channels": "cmyk"},
        {"crop": 8, "layout": "NCHW"},
        {"crop": 8, "fps": 0},
        {"crop": 8, "fps": 1e-300},
        {"crop": 10**9},
    ],
)
def test_impossible_preprocessing_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Preprocess(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "frames", "time_dim", "layout", "channels"),
    [
        (("N", 3, 20, 30), 1, 2, "NCTHW", "rgb"),
        (("N", 3, 8, 20, 30), 8, 2, "NCTHW", "rgb"),
        (("N", 1, 20, 30), 1, 2, "NCTHW", "gray"),
        (("N", 8, 3, 20, 30), 8, 1, "NTCHW", "rgb"),
        (("N", 20, 30, 3), 1, 1, "NTHWC", "rgb"),
        (("N", 8, 20, 30, 3), 8, 1, "NTHWC", "rgb"),
    ],
)
def test_the_input_says_what_is_not_given(
    shape: tuple[object, ...], frames: int, time_dim: int, layout: str, channels: str
) -> None:
    spec = InputSpec("x", shape, "float32", frames, time_dim)  # type: ignore[arg-type]
    found = preprocess_for(spec, {"fps": 5, "crop": [1, 1], "unknown": 3})
    assert (found.layout, found.channels, found.crop, found.fps) == (layout, channels, (20, 30), 5)


@pytest.mark.parametrize(
    ("shape", "frames", "time_dim"), [(("N", 64), 1, 2), (("N", 2, 8, 8), 1, 2), (("N", 3, 8, 8), None, None)]
)
def test_inputs_that_take_no_pictures_are_named(shape: tuple[object, ...], frames: int | None, time_dim: int) -> None:
    with pytest.raises(UnsupportedError, match="'x'"):
        preprocess_for(InputSpec("x", shape, "float32", frames, time_dim))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "stored", [{"mean": [1, 2]}, {"std": "1"}, {"size": -3}, {"fps": "fast"}, {"layout": 5}, {"value_range": [None]}]
)
def test_damaged_metadata_is_an_error_of_the_file(stored: dict[str, object]) -> None:
    with pytest.raises(ContractError, match="metadata"):
        stored_preprocess(InputSpec("x", ("N", 3, 8, 8), "float32", 1, 2), stored, {})


def test_compile_stores_preprocessing_and_labels_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv3d(3, 2, 3, padding=1), nn.AdaptiveAvgPool3d(1), nn.Flatten()).eval()
    clip = (torch.zeros(1, 3, 4, 8, 10),)
    compiled = co3d.compile(network, clip, preprocess={"size": 9, "mean": 0.45}, labels=["a", "b"])
    with co3d.StreamSession(compiled.save(tmp_path / "m.onnx")) as session:
        assert session.info.labels == ("a", "b")
        assert session.info.preprocess == {
            "crop": [8, 10],
            "size": 9,
            "mean": [0.45] * 3,
            "std": [1.0] * 3,
            "value_range": [0.0, 1.0],
            "channels": "rgb",
            "layout": "NCTHW",
            "fps": None,
        }
    with pytest.raises(UsageError, match="3 labels"):
        co3d.compile(network, clip, labels=["a", "b", "c"])
    with pytest.raises(UsageError, match="layout"):
        co3d.compile(network, clip, preprocess={"layout": "NTCHW"})


@pytest.mark.parametrize(
    "text",
    [
        "left\nright\nup\n",
        "\ufeffleft\r\nright\r\nup\r\n\n",
        '["left", "right", "up"]',
        '{"left": 0, "up": 2, "right": 1}',
        '{"0": "left", "1": "right", "2": "up"}',
        '{"\\"left\\"": 0, "\\"right\\"": 1, "\\"up\\"": 2}',
    ],
)
def test_labels_are_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "labels").write_text(text, encoding="utf-8", newline="")
    assert read_labels(tmp_path / "labels") == ("left", "right", "up")


@pytest.mark.parametrize(
    "content", [b"", b" \n", b"\xff\xfe\x00", b"[1, ", b"[[1]]", b'{"a": 0, "b": 0}', b'{"a": 5}', b'{"a": "b"}']
)
def test_files_without_labels_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "labels").write_bytes(content)
    with pytest.raises(LoadError, match="labels"):
        read_labels(tmp_path / "labels")
    with pytest.raises(LoadError, match="nothing"):
        read_labels(tmp_path / "nothing")


def test_labels_cannot_write_to_the_terminal() -> None:
    (name,) = clean_labels(["\x1b[2Jred\n"])
    assert name.isprintable() and "red" in name
    assert json.dumps(name)
