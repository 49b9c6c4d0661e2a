"""Networks that cut, move and pad time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import Entry, Reference, Window, by_clip, long_clip, seeded


class Between(nn.Module):
    """A convolution, an operation on time, a convolution."""

    def __init__(self, operation: Callable[[Tensor], Tensor], channels: int = 6, padding: int = 1) -> None:
        super().__init__()
        self.operation = operation
        self.conv1 = nn.Conv1d(4, 6, 3, padding=padding)
        self.conv2 = nn.Conv1d(channels, 5, 3, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.operation(F.relu(self.conv1(x))))


def frame_difference(x: Tensor) -> Tensor:
    return torch.cat([x[:, :, 1:] - x[:, :, :-1], torch.zeros_like(x[:, :, :1])], 2)


def chunk_and_mix(x: Tensor) -> Tensor:
    a, b = torch.chunk(x, 2, dim=1)
    return torch.cat([b, a * 2], 1)


def shift_forth(x: Tensor) -> Tensor:
    return F.pad(x, (2, 0))[:, :, :-2]


def causal_replicate(x: Tensor) -> Tensor:
    return F.pad(x, (2, 0), mode="replicate")


def join_neighbours(x: Tensor) -> Tensor:
    """Old and new crops at one index: a difference over two frames."""
    return x[:, :, 2:] + x[:, :, :-2]


def stack_taps(x: Tensor) -> Tensor:
    padded = F.pad(x, (1, 1))
    t = x.shape[2]
    return torch.stack([padded.narrow(2, k, t) for k in range(3)]).amax(0)


def roll_and_clear(x: Tensor) -> Tensor:
    """A shift on, and one back, by ``roll``: what has come around the end is overwritten."""
    on, back = torch.roll(x, -1, 2), torch.roll(x, (1,), dims=(2,))
    on[:, :, -1] = 0
    back[:, :, :1] = 0
    return on + 2 * back


def overlapping_blocks(x: Tensor) -> Tensor:
    """Blocks of four frames that overlap by two, as strides in the memory of blocks that lie side by side."""
    y = x.transpose(1, 2).contiguous()
    n, t, c = y.shape
    y = y.view(n, t // 4, 4, c)
    a, b, *rest = y.stride()
    return y.as_strided((n, t // 2 - 1, 4, c), (a, b // 2, *rest)).amax(2).transpose(1, 2)


def differences_in_a_list(x: Tensor) -> Tensor:
    """Frame by frame, with zeros for the one that the last frame has no difference to."""
    frames = x.unbind(2)
    return torch.stack([*(b - a for a, b in pairwise(frames)), torch.zeros_like(frames[0])], 2)


def windows_before(x: Tensor) -> Tensor:
    """Each frame with the two before it, cut one by one; the first windows are filled up with zeros."""
    first = [torch.cat([x.new_zeros(*x.shape[:2], 2 - i), x[:, :, : i + 1]], 2) for i in range(2)]
    return torch.stack([*first, *(x[:, :, i - 2 : i + 1] for i in range(2, x.shape[2]))], 2).amax(3)


def windows_around(x: Tensor) -> Tensor:
    """Each frame with those beside it, cut one by one and padded where the clip ends."""
    t = x.shape[2]
    return torch.stack(
        [F.pad(x[:, :, max(0, i - 1) : i + 2], (int(i == 0), int(i == t - 1))) for i in range(t)], 2
    ).mean(3)


# Each keeps its time axis and extends: the module itself on a long clip is the reference.
STREAMING: dict[str, Callable[[Tensor], Tensor]] = {
    "unfold_mean": lambda x: x.unfold(2, 4, 1).mean(-1),
    "crop_front": lambda x: x[:, :, 2:],
    "crop_back": lambda x: x[:, :, :-3],
    "crop_both": lambda x: x[:, :, 1:-1],
    "narrow": lambda x: x.narrow(2, 1, x.shape[2] - 1),
    "strided_slice": lambda x: x[:, :, ::2],
    "strided_slice_offset": lambda x: x[:, :, 1::2],
    "chunk_channels": chunk_and_mix,
    "pad_both": lambda x: F.pad(x, (2, 2)),
    "pad_constant": lambda x: F.pad(x, (3, 0), value=1.5),
    "pad_replicate": causal_replicate,
    "shift_forth": shift_forth,
    "frame_difference": frame_difference,
    "differences_in_a_list": differences_in_a_list,
    "join_neighbours": join_neighbours,
    "stack_taps": stack_taps,
    "indices_of_the_frames_before": lambda x: x - x[:, :, [0, 0, *range(x.shape[2] - 2)]],
    "indices_of_the_frames_behind": lambda x: x - x[:, :, (torch.arange(x.shape[2]) + 1).clamp(max=x.shape[2] - 1)],
    "mirrored_ends": lambda x: x[:, :, [2, 1, *range(x.shape[2]), -2, -3]],
    "windows_before": windows_before,
    "windows_around": windows_around,
    "roll_and_clear": roll_and_clear,
    "overlapping_blocks": overlapping_blocks,
    "concat_zeros": lambda x: torch.cat([x.new_zeros(x.shape[0], x.shape[1], 2), x], 2)[:, :, :-2],
}

WHOLE_BLOCKS = {"overlapping_blocks"}  # a step takes them, of which not every frame is seen

# Each has no extension: it is applied to the newest T entries, and what follows runs again.
FRAMES = 8
_INDEX = torch.tensor([0, 1, 4, 6])
RECOMPUTED: dict[str, Callable[[Tensor], Tensor]] = {
    "flip": lambda x: x.flip(2),
    "roll": lambda x: torch.roll(x, 1, dims=2),
    "softmax": lambda x: x.softmax(2),
    "adaptive_to_four": lambda x: F.adaptive_avg_pool1d(x, 4),
    "gather": lambda x: x[:, :, _INDEX],
    "align_corners": lambda x: F.interpolate(x, scale_factor=2.0, mode="linear", align_corners=True),
}


def halves(x: Tensor) -> Tensor:
    """Both halves of the clip side by side: two crops, so it streams, x[o] beside x[o + T/2]."""
    return torch.cat(torch.chunk(x, 2, dim=2), 1)


def _halves_reference(model: Any) -> Reference:
    half = FRAMES // 2
    model.operation = lambda x: torch.cat([x[:, :, :-half], x[:, :, half:]], 1)
    return Reference(model)


class Taken(nn.Module):
    """A convolution and one entry of time, selected."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x))[:, :, self.index])


def _taken_reference(model: Any) -> Reference:
    """Selecting keeps the index equation of a crop: each step gives one entry, the one its delay names."""
    return Reference(lambda x: model.fc(F.relu(model.conv(x)).transpose(1, 2)), time_dims=(1,))


class Gathered(nn.Module):
    """Frames picked by a constant index at the very start, as the slow pathway's input is."""

    def __init__(self) -> None:
        super().__init__()
        self.index: Tensor
        self.register_buffer("index", torch.tensor([0, 2, 5, 7]))
        self.conv = nn.Conv1d(4, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.index_select(x, 2, self.index)).mean(2)


_SERIES = (1, 4, FRAMES)


def _streaming(name: str) -> Entry:
    build = seeded(lambda: Between(STREAMING[name]), _SERIES)
    return Entry(name, build, (_SERIES,), reference=long_clip(2), tight=name not in WHOLE_BLOCKS)


def _recomputed(name: str) -> Entry:
    def make(model: Any) -> Reference:
        return Reference(model.conv1, (Window(lambda y: model.conv2(model.operation(F.relu(y)))),))

    build = seeded(lambda: Between(RECOMPUTED[name]), _SERIES)
    return Entry(name, build, (_SERIES,), "recompute", reference=make)


SLICES = (
    *(_streaming(name) for name in STREAMING),
    *(_recomputed(name) for name in RECOMPUTED),
    Entry(
        "chunk_time", seeded(lambda: Between(halves, 12), _SERIES), (_SERIES,), reference=_halves_reference, tight=True
    ),
    Entry("last_entry", seeded(lambda: Taken(-1), _SERIES), (_SERIES,), "window", reference=_taken_reference),
    Entry("first_entry", seeded(lambda: Taken(0), _SERIES), (_SERIES,), "window", reference=_taken_reference),
    Entry("gathered_frames", seeded(Gathered, _SERIES), (_SERIES,), "recompute", reference=by_clip()),
)
