"""Pictures with motion in them, drawn with numpy: what the examples film instead of downloading a video."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]


def moving_shapes(
    frames: int, height: int = 240, width: int = 320, shapes: int = 6, scene: int = 40, seed: int = 0
) -> Iterator[Image]:
    """Yield ``frames`` pictures (height, width, 3), uint8, RGB: discs over a drifting background.

    Every ``scene`` frames the discs, their directions and the background change.
    """
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    for start in range(0, frames, scene):
        rng = np.random.default_rng([seed, start])
        background, drift = rng.uniform(30, 225, 3), rng.uniform(-4, 4, 2)
        colors = rng.uniform(0, 255, (shapes, 3))
        places = rng.uniform(0, 1, (shapes, 2)) * (width, height)
        speeds = rng.uniform(-6, 6, (shapes, 2))
        radii = rng.uniform(0.08, 0.25, shapes) * height
        for step in range(min(scene, frames - start)):
            waves = np.sin((x + drift[0] * step) / 23) + np.sin((y + drift[1] * step) / 31)
            picture = background + 25 * waves[..., None]
            for color, place, speed, radius in zip(colors, places, speeds, radii, strict=True):
                left, top = np.mod(place + speed * step, (width, height))
                picture[(x - left) ** 2 + (y - top) ** 2 < radius**2] = color
            yield picture.clip(0, 255).astype(np.uint8)
