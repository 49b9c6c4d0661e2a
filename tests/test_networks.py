"""Every small network of the zoo: streamed from its file, equal to the untouched model, and honest about itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
from marks import few
from oracle import check
from oracle_ends import check_boundary
from zoo.small import SMALL

QUICK = ("p3d", "cnn_lstm", "unet_linear", "transformer", "two_heads", "se_mean-window")  # one of each kind


@pytest.mark.parametrize("network", few(SMALL, *QUICK))
def test_network(network: str) -> None:
    entry = SMALL[network]
    facts = check(entry)
    assert bool(facts.recomputed) == (entry.expect == "recompute"), f"falls back: {facts.recomputed}"
    if entry.causal:
        assert set(facts.delays) == {0}


STRIDE_1 = ("inception3d", "siamese", "wavenet_small", "ms_tcn", "folded_r2plus1d")


@pytest.mark.slow
@pytest.mark.parametrize("network", STRIDE_1)
def test_eight_frames_a_step_give_the_same_results(network: str) -> None:
    check(replace(SMALL[network], tight=False), options={"frames_per_step": 8}, batch=2)


DENSE = ("resnext3d", "densenet3d", "c3d", "st_gcn")


@pytest.mark.slow
@pytest.mark.parametrize("network", DENSE)
def test_dense_strides(network: str) -> None:
    facts = check(SMALL[network], options={"stride_mode": "dense"})
    assert facts.frames_per_step == (1,)


WINDOWS = {"p3d": 20, "tsn": 16, "densenet3d": 16, "two_heads": 24, "audio_visual": 12, "movinet-frame": 16}


@pytest.mark.slow
@pytest.mark.parametrize(("network", "window"), WINDOWS.items())
def test_longer_window(network: str, window: int) -> None:
    check(SMALL[network], options={"window": window})


BATCHES = (
    *("p3d", "cnn_lstm", "unet_linear", "se_mean-window", "nonlocal_i3d", "tsm_resnet", "st_gcn", "stack_taps"),
    *("transformer", "causal_attention", "cnn_bilstm", "group_norm-frame", "gate_beside-frame", "frame_by_frame"),
    *("shift_in_place", "norms_of_frames", "attention_grouped", "recurrent_both", "dual_path"),
    *("rows_lstm", "rows_learned", "graph_einsum-frame"),
    *("fold", "fold_upright", "subframes", "fold_per_frame"),
)


@pytest.mark.slow
@pytest.mark.parametrize("network", BATCHES)
def test_a_batch_of_streams(network: str) -> None:
    check(replace(SMALL[network], tight=False), batch=3)


BOUNDARY = (
    "inception3d",
    "frames_first",
    "siamese",
    "ms_tcn",
    "wavenet_small",
    "causal_tcn",
    "folded_r2plus1d",
    "shift_in_place",
    "tensor_unfold",
    "module_unfold",
    "written",
    "moving_average",
    "rows_lstm",
    "rows_given",
    "fold_padded",
    "fold_upright",
    "subframes",
    "index_put",
)
BOUNDARY_CLIP = ("frame_by_frame", "p3d", "densenet3d", "resnext3d", "st_gcn", "two_heads", "audio_visual")


@pytest.mark.slow
@pytest.mark.parametrize("network", BOUNDARY)
def test_exact_ends_of_a_long_sequence(network: str) -> None:
    check_boundary(SMALL[network], clips=3)


@pytest.mark.slow
@pytest.mark.parametrize("network", BOUNDARY_CLIP)
def test_exact_ends_of_one_clip(network: str) -> None:
    check_boundary(SMALL[network])
