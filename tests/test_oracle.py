"""The oracle itself: a filter streamed by hand must pass, and each way to be wrong must fail."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from oracle import check
from torch import nn
from zoo import Entry

import co3d_compile as co3d


class HandMade:
    """y[o] = 1 x[o - 1] + 10 x[o] + 100 x[o + 1] in numpy, with the API of a compiled model and its session."""

    def __init__(
        self, delay: int = 1, warmup: int = 2, taps: tuple[float, ...] = (1, 10, 100), leak: float = 0
    ) -> None:
        self.taps, self.leak = np.array(taps, dtype=np.float32), leak
        self.info = SimpleNamespace(
            frames_per_step={"x": 1},
            delays={"y": delay},
            warmup_steps=warmup,
            receptive_field=3,
            recomputed=(),
            outputs=(SimpleNamespace(frames_per_entry=1.0),),
        )
        self.reset()

    def save(self, path: str) -> None:
        """Nothing: the session is the object itself."""

    def reset(self) -> None:
        self.state = np.zeros((1, 1, 3), dtype=np.float32)

    def get_state(self) -> dict[str, Any]:
        return {"state": self.state}

    def set_state(self, values: dict[str, Any]) -> None:
        self.state = values["state"]

    def step(self, frame: Any) -> Any:
        window = np.concatenate([self.state[:, :, 1:], frame], 2)
        result = (window * self.taps).sum(2, keepdims=True)
        if self.leak:
            result = result + self.leak * self.state[:, :, :1]
        self.state = window
        return result


def _fir() -> nn.Module:
    filter_ = nn.Conv1d(1, 1, 3, padding=1, bias=False)
    filter_.weight = nn.Parameter(torch.tensor([[[1.0, 10.0, 100.0]]]))
    return filter_


WRONG = {
    "another delay": {"delay": 2},
    "no delay": {"delay": 0},
    "warm-up too short": {"warmup": 1},
    "warm-up too long": {"warmup": 3},
    "a tap that is a little off": {"taps": (1, 10, 100.5)},
    "a state that outlives its use": {"leak": 1e-9},
}


@pytest.mark.parametrize("how", [None, *WRONG])
def test_the_oracle_passes_what_is_right_and_nothing_else(how: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    made = HandMade(**WRONG[how]) if how else HandMade()
    for name in ("compile", "StreamSession"):
        monkeypatch.setattr(co3d, name, lambda *args, **options: made)
    fir = Entry("filter", _fir, ((1, 1, 16),), tight=True)
    if how:
        with pytest.raises(AssertionError):
            check(fir)
    else:
        assert check(fir).error < 1e-6
