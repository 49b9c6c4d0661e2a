"""Programs captured for one clip: which dim of size one is the batch is found out, or the batch stays at one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from zoo.small import SMALL

import co3d_compile as co3d


def captured_for_one(name: str) -> Any:
    entry = SMALL[name]
    module = entry.build()
    program = torch.export.export(module, entry.examples(), strict=False)
    return co3d.compile(program, time_dim=entry.time_dim, **entry.options)


@pytest.mark.parametrize("name", ["p3d", "tsm_resnet", "cnn_lstm", "nonlocal_i3d", "se_mean-window", "causal_tcn"])
def test_two_streams_are_as_one_and_one(name: str) -> None:
    compiled = captured_for_one(name)
    both, *alone = (co3d.StreamSession(compiled, batch=n) for n in (2, 1, 1))
    rng = np.random.default_rng(0)
    spec = both.info.inputs[0]
    for _ in range(both.info.warmup_steps + 2):
        frames = rng.standard_normal((2, *spec.shape[1:])).astype(np.float32)
        together = both.step(frames)
        each = [session.step(frames[i : i + 1]) for i, session in enumerate(alone)]
        np.testing.assert_allclose(together, np.concatenate(each), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["st_gcn", "transformer"])
def test_what_mixes_streams_is_for_one(name: str) -> None:
    with pytest.warns(co3d.Co3dWarning, match="fixes its batch at 1"):
        compiled = captured_for_one(name)
    assert {state.shape[0] for state in compiled.info.states} == {1}
    co3d.StreamSession(compiled, batch=1)
    with pytest.raises(co3d.Co3dError, match="compiled for a batch of 1, not 2"):
        co3d.StreamSession(compiled, batch=2)


@pytest.mark.parametrize("name", ["st_gcn", "transformer"])
def test_a_program_of_two_clips_is_for_any_number(name: str) -> None:
    entry = SMALL[name]
    program = torch.export.export(entry.build(), entry.examples(batch=2), strict=False)
    compiled = co3d.compile(program, time_dim=entry.time_dim, **entry.options)
    with co3d.StreamSession(compiled, batch=3) as session:
        (spec,) = session.info.inputs
        assert spec.shape[0] == "N"
        assert session.step(np.zeros((3, *spec.shape[1:]), np.float32)).shape[0] == 3
