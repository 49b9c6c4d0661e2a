"""The options of a compilation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from co3d_compile.errors import UsageError

CHOICES = {
    "pool_scope": ("frame", "window", "recompute"),
    "stride_mode": ("step", "dense"),
    "boundary": ("stream", "exact"),
    "unsupported": ("window", "error"),
    "state_io": ("paired", "renamed"),
    "recurrence": ("state", "window"),
    "delay_by": ("fold", "shift", "drop"),
    "box_frame": ("middle", "newest"),
}
MOST_FRAMES = 100_000  # of a window or a step


@dataclass(frozen=True)
class Options:
    """The options of :func:`co3d_compile.compile`; see there. ``time_said``: somebody said which dim is time."""

    window: int | None = None
    frames_per_step: int | None = None
    pool_scope: str = "frame"
    stride_mode: str = "step"
    boundary: str = "stream"
    unsupported: str = "window"
    state_io: str = "paired"
    time_dim: int | Sequence[int | None] = 2
    also: Sequence[str] = ()
    recurrence: str = "state"
    max_delay: int | None = None
    delay_by: str = "fold"
    time_said: bool = True
    box_frame: str = "middle"

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise UsageError(f"{name}={value!r} is none of {', '.join(map(repr, allowed))}.")
        for name in ("window", "frames_per_step"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise UsageError(f"{name} must be a positive whole number of frames, not {value!r}.")
            if value is not None and value > MOST_FRAMES:  # would fill the memory long before it fails
                raise UsageError(f"{name}={value} makes no sense: at most {MOST_FRAMES} frames.")
        if isinstance(self.also, str) or not all(isinstance(path, str) for path in self.also):
            raise UsageError(f"also={self.also!r} is no list of module paths.", hint="Give a list, such as ['trunk'].")
        if len(set(self.also)) < len(self.also):
            raise UsageError("A module is named twice in also.", hint="Name each once.")
        if self.max_delay is not None and (isinstance(self.max_delay, bool) or not isinstance(self.max_delay, int)):
            raise UsageError(f"max_delay must be a whole number of frames, not {self.max_delay!r}.")
        if self.max_delay is not None and self.max_delay < 0:
            raise UsageError(f"max_delay={self.max_delay}: nothing is known of frames that have not come yet.")
        dims = [self.time_dim] if self.time_dim is None or isinstance(self.time_dim, int) else self.time_dim
        if not isinstance(dims, Sequence) or any(not isinstance(d, int | None) for d in dims):
            what = f"time_dim={self.time_dim!r} is neither a dim nor a list of them."
            raise UsageError(what, hint="Give the dim that counts the frames, for (N, C, T, H, W) that is 2.")
        if self.boundary == "exact" and self.stride_mode == "dense":
            raise UsageError(
                "boundary='exact' has no meaning with stride_mode='dense': clips at every phase have no common end.",
                hint="Use stride_mode='step', or boundary='stream'.",
            )
