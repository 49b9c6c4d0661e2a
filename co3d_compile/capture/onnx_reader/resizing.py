"""``Resize`` and ``Upsample`` in the modes of ONNX."""

from __future__ import annotations

from collections.abc import Callable
from math import floor

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from co3d_compile.capture.onnx_reader.node_call import NodeCall, Value, reads, whole_numbers
from co3d_compile.capture.onnx_reader.resampling_phases import phases


@reads("Resize", host=(1, 2, 3))
def resize(call: NodeCall, x: Tensor, roi: Value = None, scales: Value = None, sizes: Value = None) -> Tensor:
    """Resizes, by PyTorch's own operator where that means the same, else by a matrix per dim."""
    if call.opset == 10:
        return _by_scales(call, x, roi)
    if call.text("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        raise call.refuse("crops before it resizes")
    dims = [d % x.dim() for d in call.integers("axes") or range(x.dim())]
    factors = _factors(call, x, dims, scales, sizes)
    result = [
        whole_numbers(sizes)[dims.index(d)] if sizes is not None and d in dims and not _keeps(call) else
        floor(x.shape[d] * factors[d] + (0.5 if _keeps(call) else 0)) for d in range(x.dim())
    ]  # fmt: skip
    changed = [d for d in range(x.dim()) if result[d] != x.shape[d] or factors[d] != 1.0]
    own = _own_mode(call, x, changed, factors, result)
    if result == list(x.shape):
        return x  # so do runtimes, whatever the scales are
    if own is not None:
        mode, corners = own
        return F.interpolate(x, result[2:], None, mode, corners, antialias=bool(call.integer("antialias", 0)))
    for d in changed:
        x = _resized_dim(call, x, d, result[d], factors[d])
    return x


@reads("Upsample", host=(1,))
def upsample(call: NodeCall, x: Tensor, scales: Value = None) -> Tensor:
    """Resizes as operator sets before 10 do."""
    return _by_scales(call, x, scales)


def _by_scales(call: NodeCall, x: Tensor, scales: Value) -> Tensor:
    """Resizes as operator sets before 11 do: the coordinate divided by the scale."""
    given = scales.reshape(-1).tolist() if isinstance(scales, np.ndarray) else call.numbers("scales")
    is_nearest = call.text("mode", "nearest") == "nearest"
    for d, factor in enumerate(given):
        size = floor(np.float32(x.shape[d]) * np.float32(factor))
        if size == x.shape[d] and factor == 1.0:
            continue
        kind = "linear" if not is_nearest else "ceil" if factor < 1 and call.opset == 10 else "floor"
        x = _apply(x, d, _matrix(x.shape[d], size, _places("asymmetric", x.shape[d], size, factor), kind))
    return x


def _keeps(call: NodeCall) -> bool:
    """Says whether sizes are limits within which the aspect ratio is kept."""
    return call.text("keep_aspect_ratio_policy", "stretch") != "stretch"


def _factors(call: NodeCall, x: Tensor, dims: list[int], scales: Value, sizes: Value) -> list[float]:
    """Reads the scale of each dim."""
    factors = [1.0] * x.dim()
    if isinstance(scales, np.ndarray) and scales.size:
        for d, scale in zip(dims, scales.reshape(-1), strict=True):
            factors[d] = float(scale)
        return factors
    wanted = whole_numbers(sizes)
    ratios = [size / x.shape[d] for d, size in zip(dims, wanted, strict=True)]
    if _keeps(call):
        pick = min if call.text("keep_aspect_ratio_policy", "") == "not_larger" else max
        ratios = [pick(ratios)] * len(ratios)
    for d, ratio in zip(dims, ratios, strict=True):
        factors[d] = ratio
    return factors


def _own_mode(
    call: NodeCall, x: Tensor, changed: list[int], factors: list[float], result: list[int]
) -> tuple[str, bool | None] | None:
    """Finds the mode of PyTorch's own operator that gives the same, and its ``align_corners``."""
    mode, how = call.text("mode", "nearest"), call.text("coordinate_transformation_mode", "half_pixel")
    exact = all(abs(result[d] - x.shape[d] * factors[d]) < 1e-3 for d in changed)
    if min(changed, default=0) < 2 or not 3 <= x.dim() <= 5 or not exact:
        return None
    if call.integer("antialias", 0):
        alike = {"linear": "bilinear"} | ({"cubic": "bicubic"} if call.number("cubic_coeff_a", -0.75) == -0.5 else {})
        same = x.dim() == 4 and how == "half_pixel" and call.integer("exclude_outside", 0) and mode in alike
        return (alike[mode], False) if same else None
    if mode == "nearest":
        rounds = call.text("nearest_mode", "round_prefer_floor")
        whole = all(factors[d] == int(factors[d]) for d in changed)
        if how == "asymmetric" and rounds == "floor" and whole:
            return "nearest", None
        return ("nearest", None) if how == "half_pixel" and rounds.startswith("round") and whole else None
    if mode == "linear" and how in ("half_pixel", "align_corners", "pytorch_half_pixel"):
        if how == "pytorch_half_pixel" and any(result[d] == 1 for d in changed):
            return None
        return {3: "linear", 4: "bilinear", 5: "trilinear"}[x.dim()], how == "align_corners"
    if mode == "cubic" and x.dim() == 4 and how in ("half_pixel", "align_corners"):
        usual = call.number("cubic_coeff_a", -0.75) == -0.75 and not call.integer("exclude_outside", 0)
        return ("bicubic", how == "align_corners") if usual else None
    return None


def _places(how: str, entries: int, size: int, factor: float) -> NDArray[np.float32]:
    """Computes the coordinates that the rows of a resized dim read, in float32, as runtimes compute them."""
    at, half, scale = np.arange(size, dtype=np.float32), np.float32(0.5), np.float32(factor)
    if how == "align_corners":
        return at * np.float32(entries - 1) / np.float32(max(size - 1, 1))
    if how == "asymmetric":
        return at / scale
    if how == "tf_half_pixel_for_nn":
        return (at + half) / scale
    if how == "pytorch_half_pixel" and size == 1:
        return at
    middle = np.float32(0)
    if how == "half_pixel_symmetric":
        middle = np.float32(entries / 2) * (1 - np.float32(size) / (scale * np.float32(entries)))
    return middle + ((at + half) / scale - half)


def _resized_dim(call: NodeCall, x: Tensor, dim: int, size: int, factor: float) -> Tensor:
    """Resizes one dim by a matrix of weights, or by indices where each row has a single one."""
    entries, how = x.shape[dim], call.text("coordinate_transformation_mode", "half_pixel")
    places = _places(how, entries, size, factor)
    kind = call.text("mode", "nearest")
    if kind == "nearest":
        kind = call.text("nearest_mode", "round_prefer_floor")
    matrix = _matrix(
        entries,
        size,
        places,
        kind,
        cubic=call.number("cubic_coeff_a", -0.75),
        inside=bool(call.integer("exclude_outside", 0)),
        spread=max(1.0, 1 / factor) if call.integer("antialias", 0) else 1.0,
    )
    return _apply(x, dim, matrix)


def _matrix(
    entries: int, size: int, places: NDArray[np.float32], kind: str, cubic: float = -0.75, inside: bool = False,
    spread: float = 1.0,
) -> NDArray[np.float64]:  # fmt: skip
    """Computes the weights (size, entries) by which a dim is resized; ``places`` are the coordinates that rows read."""
    matrix = np.zeros((size, entries))
    rounds: dict[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
        "floor": np.floor,
        "ceil": np.ceil,
        "round_prefer_floor": lambda v: np.ceil(v - 0.5),
        "round_prefer_ceil": lambda v: np.floor(v + 0.5),
    }
    if kind in rounds:
        nearest = np.clip(rounds[kind](places), 0, entries - 1).astype(int)
        matrix[np.arange(size), nearest] = 1.0
        return matrix
    reach = spread if kind == "linear" else 2 * spread
    for row, place in enumerate(places):
        taps = np.arange(floor(place - reach) + 1, floor(place + reach) + 1)
        weights = _kernel(abs(taps - place) / spread, kind, cubic)
        if inside:
            weights = np.where((taps >= 0) & (taps < entries), weights, 0.0)
        weights = weights / weights.sum()
        np.add.at(matrix[row], np.clip(taps, 0, entries - 1), weights)
    return matrix


def _kernel(x: NDArray[np.float64], kind: str, a: float) -> NDArray[np.float64]:
    """The weight at a distance: of a triangle, or of Keys' cubic."""
    if kind == "linear":
        return np.clip(1 - x, 0, None)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _apply(x: Tensor, dim: int, matrix: NDArray[np.float64]) -> Tensor:
    """Resizes a dim by a matrix: entry by entry where that is enough, else by picking entries or by a product."""
    by_phases = phases(matrix, x, dim)
    if by_phases is not None:
        return by_phases.resized(x, dim)
    if ((matrix == 0) | (matrix == 1)).all():
        return x.index_select(dim, torch.from_numpy(matrix.argmax(1)))
    weights = torch.from_numpy(matrix).to(x.dtype)
    return torch.nn.functional.linear(x.movedim(dim, -1), weights).movedim(-1, dim)
