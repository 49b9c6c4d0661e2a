"""How a picture becomes a model's frame: size, crop, value range, mean and std, layout (docs/contract.md, Preprocess).

Needs numpy alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from co3d_compile.contract.model_contract import InputSpec
from co3d_compile.errors import ContractError, UnsupportedError, UsageError
from co3d_compile.media.video import Image, center_crop, resize
from co3d_compile.support.plain_types import JsonObject
from co3d_compile.support.readable_numbers import did_you_mean

Settings: TypeAlias = Mapping[str, Any]
"""Values by the names of `Preprocess`, as a user or a file gives them: not checked yet."""
Size: TypeAlias = tuple[int, int]
"""Height and width in pixels."""

CHANNELS = {"rgb": 3, "bgr": 3, "gray": 1}
SLOWEST = 1e-3  # frames per second: one in a quarter of an hour
MAX_SIDE = 16384  # pixels; a larger picture is damage
MAX_ASPECT = 8  # what lies beyond is cut off first, or a thin picture would grow without bound
LUMA = np.array((0.299, 0.587, 0.114), np.float32)


@dataclass(frozen=True)
class Preprocess:
    """The way from a picture of any size to one frame of a model.

    Attributes:
        crop: Height and width of the result, cut from the middle; one number for both.
        size: What the picture is scaled to before: the shorter side in pixels, or height and width whatever the
            aspect. None: as small as the crop allows, without distortion.
        mean, std: Per channel, or one number for all; in units of ``value_range``.
        value_range: What black and white become, before ``mean`` and ``std``.
        channels: ``"rgb"``, ``"bgr"`` or ``"gray"``.
        layout: Dims of a clip of the model, N, C, T, H and W in some order.
        fps: Frames per second that the model was trained at; None: not known.

    Raises:
        UsageError: Values that make no sense, or that contradict each other.
    """

    crop: int | Size
    size: int | Size | None = None
    mean: float | Sequence[float] = 0.0
    std: float | Sequence[float] = 1.0
    value_range: Sequence[float] = (0.0, 1.0)
    channels: str = "rgb"
    layout: str = "NCTHW"
    fps: float | None = None

    def __post_init__(self) -> None:
        if self.channels not in CHANNELS:
            raise UsageError(f"channels is {self.channels!r}, not one of {', '.join(CHANNELS)}.")
        if not isinstance(self.layout, str) or sorted(self.layout.upper()) != sorted("NCTHW"):
            raise UsageError(f"{self.layout!r} is no layout such as NCTHW or NTHWC.")
        own = {
            "crop": _pair(self.crop),
            "size": self.size if self.size is None or isinstance(self.size, int) else _pair(self.size),
            "mean": _numbers("mean", self.mean, CHANNELS[self.channels]),
            "std": _numbers("std", self.std, CHANNELS[self.channels]),
            "value_range": _numbers("value_range", self.value_range, 2),
            "layout": self.layout.upper(),
        }
        for name, value in own.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        height, width = _pair(self.crop)
        if self.size is not None:
            tall, wide = _pair(self.size)
            exact = isinstance(self.size, tuple)
            if min(tall, wide) < min(height, width) or (exact and (tall < height or wide < width)):
                raise UsageError(f"A crop of {height}x{width} pixels does not fit a size of {_text(self.size)}.")
        if min(_tuple(self.std)) <= 0:
            raise UsageError("std must be above 0.")
        if self.value_range[0] == self.value_range[1]:
            raise UsageError("value_range takes two different numbers.")
        if self.fps is not None and not (_is_number(self.fps) and SLOWEST <= self.fps <= 1000):
            raise UsageError(f"{self.fps!r} is no frame rate.")

    def __call__(self, image: Image) -> npt.NDArray[np.float32]:
        """Prepares one frame of the model.

        Args:
            image: (height, width, 3), uint8, RGB, of any size.

        Returns:
            float32, contiguous, in the order of ``layout`` without T, N being 1: (1, C, H, W) for ``"NCTHW"``.
        """
        longest = MAX_ASPECT * max(1, min(image.shape[:2]))
        image = center_crop(image, min(image.shape[0], longest), min(image.shape[1], longest))
        scaled = resize(image, *self._scaled(*image.shape[:2]))
        values = center_crop(scaled, *_pair(self.crop)).astype(np.float32)
        if self.channels == "gray":
            values = (values @ LUMA)[..., None]
        elif self.channels == "bgr":
            values = values[..., ::-1]
        low, high = self.value_range
        std, mean = np.array(self.std, np.float32), np.array(self.mean, np.float32)
        values = values * ((high - low) / 255 / std).astype(np.float32) + ((low - mean) / std).astype(np.float32)
        order = ["HWC".index(dim) for dim in self.layout if dim in "HWC"]
        return np.expand_dims(np.ascontiguousarray(values.transpose(order)), self.layout.replace("T", "").index("N"))

    def to_dict(self) -> JsonObject:
        """Writes the ``preprocess`` object of the metadata."""
        data = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in data.items()}

    def _scaled(self, height: int, width: int) -> Size:
        """The height and width after scaling, never smaller than the crop."""
        if isinstance(self.size, tuple):
            return self.size
        least = _pair(self.crop)
        if self.size is None:
            scale = max(least[0] / height, least[1] / width)
        else:
            scale = self.size / min(height, width)
            scale = max(scale, least[0] / height, least[1] / width)
        return max(round(height * scale), least[0]), max(round(width * scale), least[1])


def check_names(given: Settings) -> None:
    """Refuses names that ``Preprocess`` has not. A file may hold some, of a newer compiler; a user means another name.

    Raises:
        UsageError: There is one.
    """
    known = [field.name for field in dataclasses.fields(Preprocess)]
    for name in given:
        if name not in known:
            hint = did_you_mean(str(name), known) or f"It has {', '.join(known)}."
            raise UsageError(f"Preprocessing has no {name!r}.", hint=hint)


def preprocess_for(spec: InputSpec, given: Settings | None = None) -> Preprocess:
    """Completes what is given of the preprocessing of one model input by the input's own shape.

    Args:
        spec: The input, as the contract describes it.
        given: Values by the names of ``Preprocess``; None and unknown names are skipped, ``crop`` is the model's own.

    Raises:
        UnsupportedError: The input takes no pictures. UsageError: What is given does not fit it.
    """
    known = {field.name for field in dataclasses.fields(Preprocess)} - {"crop"}
    values = {name: value for name, value in (given or {}).items() if name in known and value is not None}
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = tuple(value)
    layout = str(values.get("layout") or guess_layout(spec)).upper()
    dims = list(layout) if spec.frames_per_step != 1 else list(layout.replace("T", ""))
    if len(dims) != len(spec.shape) or spec.time_dim is None or layout.find("T") != spec.time_dim:
        raise UsageError(
            f"The layout {layout} does not fit input '{spec.name}' of shape {list(spec.shape)} with its time at dim "
            f"{spec.time_dim}.",
            hint="Give the dims of one clip, such as NCTHW or NTHWC.",
        )
    sizes = dict(zip(dims, spec.shape, strict=True))
    of_count: dict[int | str, str] = {1: "gray", 3: "rgb"}
    count = sizes["C"]
    values.setdefault("channels", of_count.get(count, "rgb"))
    if count != CHANNELS.get(str(values["channels"]), count) or count not in of_count:
        raise UnsupportedError(
            f"Input '{spec.name}' takes {count} channels, and pictures have 3 (rgb, bgr) or 1 (gray).",
            hint="Use StreamSession, which takes arrays of any kind.",
        )
    return Preprocess(crop=(int(sizes["H"]), int(sizes["W"])), **{**values, "layout": layout})


def stored_preprocess(spec: InputSpec, stored: Settings | None, given: Settings) -> Preprocess:
    """Reads the preprocessing that a file's metadata says, with what the user gives instead of it.

    Raises:
        ContractError: The metadata is damaged. Else as ``preprocess_for``.
    """
    try:
        preprocess_for(spec, stored)
    except (UsageError, TypeError, ValueError) as error:
        raise ContractError(
            f"The preprocessing in the file's metadata is no good: {error}", hint="Compile the model again."
        ) from error
    check_names(given)
    own = {name: value for name, value in given.items() if value is not None}
    if own.get("channels") and "mean" not in own and len(_tuple((stored or {}).get("mean", 0))) > 1:
        raise UsageError("Other channels need their own mean and std.", hint="Give --mean and --std too.")
    return preprocess_for(spec, {**(stored or {}), **own})


def guess_layout(spec: InputSpec) -> str:
    """Guesses the layout of a clip, from where time is and which dim could be the channels.

    Raises:
        UnsupportedError: The input is no sequence of pictures.
    """
    rank = len(spec.shape) + (spec.frames_per_step == 1)
    if spec.time_dim is None or rank != 5:
        raise UnsupportedError(
            f"Input '{spec.name}' of shape {list(spec.shape)} is no sequence of pictures.",
            hint="Use StreamSession, which takes arrays of any kind.",
        )
    others = [dim for index, dim in enumerate(spec.shape) if index != spec.time_dim or spec.frames_per_step == 1]
    last = others[-1] in (1, 3) and others[1] not in (1, 3)
    order = "NHWC" if last else "NCHW"
    return order[: spec.time_dim] + "T" + order[spec.time_dim :]


def _pair(value: Any) -> Size:
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(_is_whole(side) for side in pair):
        raise UsageError(f"{value!r} is no size in pixels: one number, or height and width.")
    return int(pair[0]), int(pair[1])


def _numbers(name: str, value: Any, count: int) -> tuple[float, ...]:
    values = _tuple(value)
    values = values * count if len(values) == 1 else values
    if len(values) != count or not all(_is_number(each) for each in values):
        raise UsageError(f"{name} takes {count} numbers, not {value!r}.")
    return tuple(float(each) for each in values)


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_SIDE


def _text(size: int | Size) -> str:
    return f"{size} pixels" if isinstance(size, int) else f"{size[0]}x{size[1]} pixels"
