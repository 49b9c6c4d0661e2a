"""``verify`` agrees with what is right, and with nothing else."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from compiled import compiled as zoo_compiled
from onnx import numpy_helper
from torch import Tensor, nn
from torch._export.converter import TS2EPConverter
from zoo import Graph, randomise
from zoo.real import REAL

import co3d_compile as co3d
from co3d_compile.contract.model_contract import METADATA_KEY
from co3d_compile.contract.read_contract import parse
from co3d_compile.ir.options import Options
from co3d_compile.support.machine import block_channels
from co3d_compile.verification.compared_steps import Step, Timeline, random_frames
from co3d_compile.verification.long_clip import LongClip
from co3d_compile.verification.reference import Reference
from co3d_compile.verification.replaced_parts import ReplacedParts
from co3d_compile.verification.time_claims import NoReference
from co3d_compile.verification.verification import Verification
from co3d_compile.verification.verify_model import verify

pytestmark = pytest.mark.slow

CLIP = (1, 4, 8)
VIDEO = (1, 3, 6, 5, 5)


def conv(kernel: int = 3, padding: int = 1, stride: int = 1, channels: int = 4) -> nn.Conv1d:
    return nn.Conv1d(channels, 4, kernel, stride, padding)


def squeeze(pool: Callable[[Tensor], Tensor]) -> nn.Module:
    """A convolution gated by a pool over its whole clip, and one behind it."""
    return Graph(
        lambda m, x: m.b((y := F.relu(m.a(x))) * torch.sigmoid(m.f(pool(y)))),
        a=nn.Conv3d(3, 4, 3, padding=1), b=nn.Conv3d(4, 4, 3, padding=1), f=nn.Conv3d(4, 4, 1),
    )  # fmt: skip


def squeeze_flat() -> nn.Module:
    """The gate's pool without a dim for time."""
    return Graph(
        lambda m, x: m.b((y := m.a(x)) * m.f(F.adaptive_avg_pool3d(y, 1).flatten(1)).view(-1, 4, 1, 1, 1)),
        a=nn.Conv3d(3, 4, 3, padding=1), b=nn.Conv3d(4, 4, 3, padding=1), f=nn.Linear(4, 4),
    )  # fmt: skip


def scale_and_shift() -> nn.Module:
    """What one pool gives is split in two."""

    def forward(m: Any, x: Tensor) -> Tensor:
        scale, shift = m.f((y := m.a(x)).mean((2, 3, 4), True)).split(4, 1)
        result: Tensor = m.b(y * scale + shift)
        return result

    a, b = nn.Conv3d(3, 4, 3, padding=1), nn.Conv3d(4, 4, 3, padding=1)
    return Graph(forward, a=a, b=b, f=nn.Conv3d(4, 8, 1))


def one_patch() -> nn.Module:
    """One patch over the whole clip, whose time has no dim of its own for a while, up-sampled again."""

    def forward(m: Any, x: Tensor) -> Tensor:
        tokens = m.mix(m.patch(x).flatten(2).mT)
        low = tokens.view(x.shape[0], 1, 5, 5, 4).permute(0, 4, 1, 2, 3)
        result: Tensor = m.out(torch.cat([m.up(low), x], 1))
        return result

    patch, up = nn.Conv3d(3, 4, (6, 1, 1), (6, 1, 1)), nn.ConvTranspose3d(4, 3, (6, 1, 1), (6, 1, 1))
    return Graph(forward, patch=patch, up=up, mix=nn.Linear(4, 4), out=nn.Conv3d(6, 3, 3, padding=1))


def attend(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).transpose(1, 2)
    return torch.softmax(m.q(y) @ m.k(y).transpose(1, 2), 2) @ y


def counts(x: Tensor) -> Tensor:
    """How many values of a frame fall into each of five bins: a window from the input on, and constants like it."""
    bins = (2 * x + 2).long().clamp(0, 4)
    return torch.zeros(*x.shape[:2], 5).scatter_add(2, bins, torch.ones_like(x))


def moved(y: Tensor) -> Tensor:
    """Half of the channels comes from the next frame, half from the one before, written into zeros."""
    frames = y.unsqueeze(0)
    result = torch.zeros_like(frames)
    result[:, :-1, :2], result[:, 1:, 2:] = frames[:, 1:, :2], frames[:, :-1, 2:]
    return result.flatten(0, 1)


# name: factory, clip shapes, options
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...], dict[str, Any]]] = {
    "residual": (lambda: Graph(lambda m, x: x + m.b(F.relu(m.a(x))), a=conv(), b=conv(5, 2)), (CLIP,), {}),
    "batch norm": (
        lambda: nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(3, 1, 1)),
        (VIDEO,), {},
    ),
    "mean gate, frame": (lambda: squeeze(lambda y: y.mean((2, 3, 4), True)), (VIDEO,), {}),
    "mean gate, window": (lambda: squeeze(lambda y: y.mean((2, 3, 4), True)), (VIDEO,), {"pool_scope": "window"}),
    "mean gate, recompute": (lambda: squeeze(lambda y: y.mean((2, 3, 4), True)), (VIDEO,), {"pool_scope": "recompute"}),
    "max gate, frame": (lambda: squeeze(lambda y: F.adaptive_max_pool3d(y, 1)), (VIDEO,), {}),
    "max gate, window": (lambda: squeeze(lambda y: F.adaptive_max_pool3d(y, 1)), (VIDEO,), {"pool_scope": "window"}),
    "whole kernel gate": (lambda: squeeze(lambda y: F.avg_pool3d(y, y.shape[2:])), (VIDEO,), {}),
    "flat gate": (squeeze_flat, (VIDEO,), {}),
    "scale and shift": (scale_and_shift, (VIDEO,), {}),
    "one patch": (one_patch, (VIDEO,), {}),
    "group norm, window": (
        lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv3d(4, 4, 3)), ((1, 3, 8, 6, 6),),
        {"pool_scope": "window"},
    ),
    "norm and dropout, window": (  # a gate and, behind it, what is left out of the graph
        lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.InstanceNorm3d(4), nn.Dropout(), nn.Conv3d(4, 4, 3)),
        ((1, 3, 8, 6, 6),), {"pool_scope": "window"},
    ),
    "strides": (
        lambda: Graph(
            lambda m, x: m.l((m.s(y := F.relu(m.a(x))) + m.b(y)).mean(2)),
            a=conv(3, 1, 2), b=conv(3, 1, 2), s=conv(1, 0, 2), l=nn.Linear(4, 3),
        ),
        ((1, 4, 16),), {},
    ),
    "a pool of the two entries that are left, beside a stride": (
        lambda: Graph(
            lambda m, x: m.l(torch.cat([m.b(y := F.relu(m.a(x))), F.avg_pool1d(y, 2)], 1).mean(2)),
            a=conv(3, 1, 2), b=conv(3, 1, 2), l=nn.Linear(8, 3),
        ),
        ((1, 4, 4),), {},
    ),
    "dense": (lambda: nn.Sequential(conv(3, 1, 2), nn.ReLU(), conv(3, 1, 2), conv()), ((1, 4, 16),),
              {"stride_mode": "dense"}),
    "dense head": (lambda: Graph(lambda m, x: m.a(x).mean(2), a=conv(3, 1, 2)), ((1, 4, 16),),
                   {"stride_mode": "dense", "frames_per_step": 3}),
    "mean head": (lambda: Graph(lambda m, x: m.l(m.a(x).mean(2)), a=conv(), l=nn.Linear(4, 3)), (CLIP,), {}),
    "whole kernel head, window 20": (
        lambda: Graph(lambda m, x: m.l(F.avg_pool1d(m.a(x), 8, 1).flatten(1)), a=conv(), l=nn.Linear(4, 3)), (CLIP,),
        {"window": 20},
    ),
    "linear over time": (lambda: Graph(lambda m, x: m.l(m.a(x).flatten(1)), a=conv(), l=nn.Linear(32, 3)), (CLIP,), {}),
    "attention": (lambda: Graph(attend, a=conv(), q=nn.Linear(4, 4), k=nn.Linear(4, 4)), (CLIP,), {}),
    "two inputs": (lambda: Graph(lambda m, x, y: m.a(x) + y, a=conv()), (CLIP, CLIP), {}),
    "the second input alone": (lambda: Graph(lambda m, x, y: m.a(y), a=conv()), (CLIP, CLIP), {}),
    "two rates": (
        lambda: Graph(lambda m, x, y: torch.cat([m.a(x).mean(2), m.b(y).mean(2)], 1), a=conv(), b=conv(5, 2)),
        (CLIP, (1, 4, 32)), {},
    ),
    "two outputs": (lambda: Graph(lambda m, x: (m.a(x), m.b(x).mean(2)), a=conv(), b=conv(5, 2)), (CLIP,), {}),
    "last entry": (lambda: Graph(lambda m, x: m.a(x)[:, :, -1], a=conv()), (CLIP,), {}),
    "last entry of a long clip": (lambda: Graph(lambda m, x: m.a(x)[:, :, -1], a=conv()), ((1, 4, 24),), {}),
    "lstm": (lambda: Graph(lambda m, x: m.r(x.transpose(1, 2))[0], r=nn.LSTM(4, 5, batch_first=True)), (CLIP,), {}),
    "lstm, last hidden": (
        lambda: Graph(lambda m, x: m.r(F.relu(m.a(F.pad(x, (2, 0)))).transpose(1, 2))[1][0],
                      a=conv(3, 0), r=nn.LSTM(4, 5, batch_first=True)), (CLIP,), {},
    ),
    "cumulative sum": (lambda: Graph(lambda m, x: m.a(F.pad(x, (2, 0))).cumsum(2), a=conv(3, 0)), (CLIP,), {}),
    "up and down": (
        lambda: nn.Sequential(conv(4, 1, 2), nn.ReLU(), nn.Upsample(scale_factor=2, mode="linear")), ((1, 4, 16),), {},
    ),
    "mean of what is up-sampled": (
        lambda: Graph(lambda m, x: m.l((x + F.interpolate(F.max_pool1d(m.a(x), 4), scale_factor=4)).mean(2)),
                      a=conv(), l=nn.Linear(4, 3)), ((1, 4, 16),), {},
    ),
    "crops": (lambda: Graph(lambda m, x: x[:, :, 1:-1] + m.a(x[:, :, :]), a=conv(3, 0)), (CLIP,), {}),
    "folded time": (
        lambda: Graph(lambda m, x: m.a(m.l(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (2, 8)).transpose(1, 2)),
                      a=conv(), l=nn.Linear(4, 4)), ((2, 4, 8),), {},
    ),
    "four frames a step": (lambda: nn.Sequential(conv(), nn.ReLU(), conv(5, 2)), (CLIP,), {"frames_per_step": 4}),
    "counts of values": (lambda: Graph(lambda m, x: m.l(counts(x)), l=nn.Linear(5, 3)), ((1, 7, 12),), {"time_dim": 1}),
    "channels moved over time": (
        lambda: Graph(lambda m, x: moved(m.a(x[0])).mean(0, True), a=nn.Conv2d(4, 4, 3, padding=1)),
        ((1, 6, 4, 5, 5),), {"time_dim": 1},
    ),
    "no state": (lambda: nn.Conv3d(3, 4, (1, 3, 3)), (VIDEO,), {}),
}  # fmt: skip


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]:
    factory, shapes, options = MODELS[name]
    generator = torch.Generator().manual_seed(3)
    example = tuple(torch.randn(shape, generator=generator) for shape in shapes)
    return randomise(factory(), *example), example, options


@cache
def compiled(name: str) -> co3d.CompiledModel:
    module, example, options = build(name)
    return co3d.compile(module, example, **options)


@pytest.mark.parametrize("network", MODELS)
def test_passes_what_is_right(network: str) -> None:
    module, example, _ = build(network)
    result = verify(compiled(network), module, example)
    assert result.passed, result
    assert result.relative_error < 2e-5 and result.steps >= 3
    assert json.loads(json.dumps(result.to_dict()))["passed"]


def saved(name: str, folder: Path) -> tuple[Path, nn.Module, tuple[Tensor, ...]]:
    module, example, _ = build(name)
    return compiled(name).save(folder / "model.onnx"), module, example


def rewrite(path: Path, **changes: Any) -> None:
    """Puts other claims into a file."""
    model = onnx.load(path)
    for entry in model.metadata_props:
        if entry.key == METADATA_KEY:
            entry.value = replace(parse(entry.value), **changes).to_json()
    onnx.save(model, path)


def contract(path: Path) -> Any:
    return next(parse(e.value) for e in onnx.load(path).metadata_props if e.key == METADATA_KEY)


WRONG = ["residual", "mean gate, window", "strides", "dense", "mean head", "attention", "two rates", "last entry"]


@pytest.mark.parametrize("network", WRONG)
@pytest.mark.parametrize("by", [-1, 1])
def test_fails_on_another_delay(network: str, by: int, tmp_path: Path) -> None:
    path, module, example = saved(network, tmp_path)
    first, *rest = contract(path).outputs
    rewrite(path, outputs=(replace(first, delay=first.delay + by), *rest))
    result = verify(path, module, example)
    assert not result.passed and result.relative_error > 1e-2, result


@pytest.mark.parametrize("network", WRONG)
def test_fails_on_a_short_warm_up(network: str, tmp_path: Path) -> None:
    path, module, example = saved(network, tmp_path)
    warmup = contract(path).warmup_steps
    rewrite(path, warmup_steps=warmup - 1)
    result = verify(path, module, example)
    assert not result.passed and f"at step {warmup - 1}" in result.worst, result


@pytest.mark.parametrize("network", ["residual", "mean gate, window", "dense", "mean head", "attention", "two inputs"])
def test_fails_on_a_small_receptive_field(network: str, tmp_path: Path) -> None:
    path, module, example = saved(network, tmp_path)
    field = contract(path).receptive_field
    rewrite(path, receptive_field=field - 1)
    result = verify(path, module, example)
    assert not result.passed and f"at least {field} frames" in result.reason, result


@pytest.mark.parametrize("network", [*WRONG, "lstm", "flat gate", "folded time"])
def test_fails_on_other_weights(network: str, tmp_path: Path) -> None:
    path, module, example = saved(network, tmp_path)
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 1.01
    result = verify(path, other, example)
    assert not result.passed and result.relative_error > 1e-3, result


def test_fails_on_another_scope(tmp_path: Path) -> None:
    path, module, example = saved("mean gate, frame", tmp_path)
    rewrite(path, options={**contract(path).options, "pool_scope": "window"})
    assert not verify(path, module, example).passed


def test_says_where_and_what(tmp_path: Path) -> None:
    path, module, example = saved("mean gate, frame", tmp_path)
    seen: list[tuple[str, int, int]] = []

    def progress(*state: Any) -> None:
        seen.append(state)  # type: ignore[arg-type]

    result = verify(path, module, example, steps=2, tolerance=1e-30, bisect=False, progress=progress)
    assert not result.passed and result.steps == 2
    assert result.worst.startswith("output 'output' at step ") and ", index (0, " in result.worst
    assert result.compared_with == "the network with 1 gate over one frame (pool_scope=frame)"
    assert [seen[0][0], seen[-1][0]] == ["stream", "reference"]
    assert all(0 < done <= total for _, done, total in seen)


@pytest.mark.parametrize("name", ["residual", "mean gate, frame", "max gate, window", "group norm, window"])
def test_says_how_far_gates_are_from_the_untouched_network(name: str) -> None:
    module, example, options = build(name)
    result = verify(co3d.compile(module, example, **options), module, example)
    assert result.passed and (result.replaced_distance is None) == (name == "residual")
    if result.replaced_distance is None:
        assert result.compared_with == "the untouched network"
    else:
        scope = options.get("pool_scope", "frame")
        assert result.compared_with == f"the network with 1 gate over one {scope} (pool_scope={scope})"
        assert 1e-3 < result.replaced_distance < 10
    assert result.to_dict()["compared_with"] == result.compared_with


def gated_by_its_mean() -> nn.Module:
    return randomise(Graph(lambda m, x: (y := m.a(x)) * torch.sigmoid(y.mean(2, True)), a=conv()), torch.zeros(CLIP))


@pytest.mark.parametrize("still", [False, True])
@pytest.mark.parametrize("answers", ["nothing", "numbers"])
def test_results_that_do_not_depend_on_the_input(still: bool, answers: str) -> None:
    """Zeros from a network that gates have made another; the untouched one tells frames apart that differ."""
    module, example = gated_by_its_mean(), (torch.randn(CLIP),)
    info = co3d.compile(module, example).info
    reference = Reference(module, example, Options(time_dim=[2]))
    timeline = Timeline(reference, info, 8)
    frames = random_frames(reference, 1, 0)
    first = next(frames)
    numbers = np.random.default_rng(0).random((timeline.stop, 1, 4), np.float32) * (answers == "numbers")
    run = [Step(first if still else next(frames), (each,)) for each in numbers]
    segment = next(timeline.segments(run))
    pools = ReplacedParts(reference, info)
    pools.look(segment, segment.results)
    wrong = answers == "nothing" and not still
    assert pools.constant == (["output"] if wrong else [])
    assert ("does not depend on the input" in pools.reason) == wrong


def test_notices_weights_that_were_changed_by_little(tmp_path: Path) -> None:
    """Less than any tolerance: only the digest in the metadata shows it, and a file without one says so."""
    path, module, example = saved("mean head", tmp_path)
    assert verify(path, module, example).notes == () and co3d.StreamSession(path, check=True)
    model = onnx.load(path)
    weight = next(i for i in model.graph.initializer if i.data_type == onnx.TensorProto.FLOAT and len(i.dims) > 1)
    values = numpy_helper.to_array(weight).copy()
    values.flat[0] = np.nextafter(values.flat[0], np.float32(9))
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, path)
    result = verify(path, module, example)
    assert not result.passed and result.relative_error < 1e-5 and "weights in the file are not those" in result.reason
    with pytest.raises(co3d.ContractError, match="weights in the file are not those"):
        co3d.StreamSession(path, check=True)
    co3d.StreamSession(path)
    rewrite(path, weights_sha256=None)
    result = verify(path, module, example)
    assert result.passed and "does not say what its weights were" in result.notes[0]
    with pytest.raises(co3d.ContractError, match="does not say what its weights were"):
        co3d.StreamSession(path, check=True)


def conversions() -> dict[str, Callable[[co3d.CompiledModel], co3d.CompiledModel]]:
    frames = [np.random.default_rng(n).random((1, 3, 8, 8), np.float32) for n in range(20)]
    found: dict[str, Callable[[co3d.CompiledModel], co3d.CompiledModel]] = {
        "half states": co3d.CompiledModel.with_half_states,
        "8 bits": lambda model: model.to_int8(frames),
        "other weights": lambda model: model.with_weights(model.to_module()),
    }
    return found | ({"native": co3d.CompiledModel.to_native} if block_channels() > 1 else {})


@pytest.mark.parametrize("name", conversions())
def test_what_the_compiler_converts_has_its_own_digest(name: str, tmp_path: Path) -> None:
    example = (torch.randn(1, 3, 8, 8, 8),)
    network = randomise(nn.Sequential(nn.Conv3d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv3d(16, 16, 3)), *example)
    compiled = co3d.compile(network, example)
    other = conversions()[name](compiled)
    co3d.StreamSession(other.save(tmp_path / "other.onnx"), check=True)
    co3d.StreamSession(other.to_bytes(), check=True)
    same = compiled.info.weights_sha256 == other.info.weights_sha256
    assert same == (name in ("other weights", "half states")), "the weights are the same, or they are not"


# file: what it is verified against, a clip for that, and what it is told
STRANGERS: dict[str, tuple[str, Callable[[], nn.Module], tuple[Tensor, ...], str]] = {
    "more channels": ("mean head", lambda: conv(channels=5), (torch.zeros(1, 5, 8),),
                      "it takes (N, 4, T) float32, the model (N, 5, T) float32."),
    "more dims": ("mean head", lambda: nn.Conv3d(4, 4, 1), (torch.zeros(1, 4, 8, 6, 6),),
                  "it takes (N, 4, T) float32, the model (N, 4, T, 6, 6) float32."),
    "no time": ("mean head", lambda: nn.Linear(4, 3), (torch.zeros(1, 4),),
                "it takes (N, 4, T) float32, the model (N, 4) float32."),
    "another kind of number": ("mean head", conv, (torch.zeros(1, 4, 8, dtype=torch.int64),),
                               "it takes (N, 4, T) float32, the model (N, 4, T) int64."),
    "more inputs": ("mean head", lambda: build("two inputs")[0], (torch.zeros(CLIP),) * 2,
                    "it takes (N, 4, T) float32, the model (N, 4, T) float32 and (N, 4, 8) float32."),
    "fewer inputs": ("two inputs", conv, (torch.zeros(CLIP),),
                     "it takes (N, 4, T) float32 and (N, 4, T) float32, the model (N, 4, T) float32."),
    "more outputs": ("mean head", lambda: build("two outputs")[0], (torch.zeros(CLIP),),
                     "it has 1 output, the model 2 outputs."),
    "another rate": ("two rates", lambda: build("two inputs")[0], (torch.zeros(CLIP),) * 2,
                     "(N, 4, 4T) float32, the model (N, 4, T) float32 and (N, 4, T) float32."),
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGERS)
def test_refuses_a_file_of_another_model(name: str, tmp_path: Path) -> None:
    of, other, clip, says = STRANGERS[name]
    path, _, _ = saved(of, tmp_path)
    with pytest.raises(co3d.UsageError, match=f"not compiled from this model: .*{re.escape(says)}"):
        verify(path, other(), clip)


def test_refuses_no_steps(tmp_path: Path) -> None:
    path, module, example = saved("mean head", tmp_path)
    with pytest.raises(co3d.UsageError, match="steps"):
        verify(path, module, example, steps=0)


@pytest.mark.parametrize("name", ["mean head", "two rates"])
def test_names_of_inputs_do_not_count(name: str) -> None:
    """TorchScript, an archive and the module call one input differently."""
    module, example, _ = build(name)
    script = torch.jit.trace(module, example)
    forms = [module, torch.export.export(module, example), TS2EPConverter(script, example, {}).convert()]
    files = [co3d.compile(form, example) for form in forms]
    assert len({tuple(i.name for i in file.info.inputs) for file in files}) > 1
    for file, form in product(files, forms):
        result = verify(file, form, example)
        assert result.passed and result.relative_error < 2e-5


def test_a_model_that_depends_on_chance_has_no_reference() -> None:
    module = Graph(lambda m, x: m.a(x), a=conv())
    compiled = co3d.compile(module, (torch.randn(CLIP),))
    loud = Graph(lambda m, x: m.a(x) + torch.rand_like(x), a=conv())
    with pytest.raises(co3d.VerificationError, match="does not compute what the model does"):
        verify(compiled, loud, (torch.randn(CLIP),))


def no_long_clip(*_: Any) -> None:
    raise NoReference("no such operator")


def test_falls_back_to_single_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LongClip, "run", no_long_clip)
    example = (torch.randn(CLIP),)
    for name, module in (("streams", conv(3, 0)), ("head", Graph(lambda m, x: m.a(x).mean(2), a=conv(3, 0)))):
        result = verify(co3d.compile(module, example), module, example)
        assert result.passed and "each clip" in result.notes[0] and "no such operator" in result.notes[0], name
    padded = conv()
    with pytest.raises(co3d.VerificationError, match="cannot be run on a long clip: no such operator"):
        verify(co3d.compile(padded, example), padded, example)


def test_an_exported_program_with_its_own_example(tmp_path: Path) -> None:
    module, example, options = build("strides")
    program = torch.export.export(module, example)
    result: Verification = verify(co3d.compile(program, **options), program)
    assert result.passed, result


@pytest.mark.parametrize("network", ["x3d_xs"])
def test_a_real_network(network: str) -> None:
    entry = REAL[network].entry(small=True)
    result = verify(zoo_compiled(entry), entry.build(), entry.examples())
    assert result.passed, result


def beside_zeros(m: Any, x: Tensor) -> Tensor:
    return torch.cat([m.net(x), torch.zeros(x.shape[0], 2, *x.shape[2:])], 1)


@pytest.mark.parametrize(
    "middle",
    [
        lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.InstanceNorm3d(4)),
        lambda: Graph(beside_zeros, net=nn.Conv3d(4, 2, 3, padding=1)),
    ],
)
def test_a_single_entry_of_time_in_the_middle(middle: Callable[[], nn.Module]) -> None:
    """Behind its strides a short clip has one entry left, where the long clip has many."""
    layers = (nn.Conv3d(3, 4, 3, padding=1), middle(), nn.Conv3d(4, 3, 3, padding=1))
    model, clip = randomise(nn.Sequential(*layers), seed=3), torch.zeros(1, 3, 1, 6, 6)
    checked = verify(co3d.compile(model, (clip,)), model, (clip,))
    assert checked.passed, checked.reason
