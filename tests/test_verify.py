"""``verify`` agrees with what is right, and with nothing else."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from compiled import compiled as zoo_compiled
from onnx import numpy_helper
from torch import Tensor, nn
from torch._export.converter import TS2EPConverter
from verified_networks import CLIP, MODELS, build, compiled, contract, conv, rewrite, saved
from zoo import Graph, randomise
from zoo.real import REAL

import co3d_compile as co3d
from co3d_compile.ir.options import Options
from co3d_compile.support.machine import block_channels
from co3d_compile.verification.compared_steps import Step, Timeline, random_frames
from co3d_compile.verification.long_clip import LongClip
from co3d_compile.verification.reference import Reference
from co3d_compile.verification.replaced_parts import ReplacedParts
from co3d_compile.verification.time_claims import NoReference
from co3d_compile.verification.verification import Verification
from co3d_compile.verification.verify_model import _Check, verify

pytestmark = pytest.mark.slow


# A capture of one clip has another view there than one of two.
NOT_NAMED = {"across blocks", "last states of a layer over windows of frames"}


@pytest.mark.parametrize("network", MODELS)
def test_passes_what_is_right_and_blames_nothing(network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator that differs is looked for all the same, as it is where numbers are wrong."""
    explained = _Check._explained
    monkeypatch.setattr(_Check, "_explained", lambda check: (explained(check)[0], True))
    module, example, _ = build(network)
    result = verify(compiled(network), module, example)
    assert result.passed, result
    assert result.relative_error < 2e-5 and result.steps >= 3
    assert json.loads(json.dumps(result.to_dict()))["passed"]
    assert (result.bisection is None) == (compiled(network).info.free_rows is not None)
    if result.bisection is not None:
        assert result.bisection.difference is None, result.bisection
        if network in NOT_NAMED:
            assert "has no operator" in result.bisection.message
        else:
            assert result.bisection.compared == result.bisection.operators > 0


WRONG = ["residual", "mean gate, window", "strides", "dense", "mean head", "attention", "two rates", "last entry"]
WRONG += ["taken off the next entry, by its index"]


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


class Recurrent(nn.Module):
    """A GRU over frames, and a layer for each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 8, batch_first=True)
        self.linear = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.gru(x)[0])


@pytest.mark.slow
def test_a_file_of_a_traced_network_is_verified_against_the_network_itself() -> None:
    """Its states have other names."""
    network, clip = Recurrent().eval(), torch.randn(1, 300, 4)
    compiled = co3d.compile(torch.jit.trace(network, clip), clip, time_dim=1)
    result = co3d.verify(compiled, network, clip)
    assert result.passed, result.reason


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


class Remembering(nn.Module):
    """A recurrent network that goes on from where the clip before ended."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.state = nn.Linear(4, 4), torch.zeros(1, 4)

    def forward(self, x: Tensor) -> Tensor:
        """The state of each frame."""
        states = []
        for frame in x.unbind(1):
            self.state = torch.tanh(self.mix(frame) + self.state)
            states.append(self.state)
        return torch.stack(states, 1)


def test_says_that_a_network_keeps_something_from_call_to_call() -> None:
    network, clip = Remembering(), torch.randn(1, 6, 4)
    compiled = co3d.compile(network, clip, time_dim=1)
    with torch.no_grad():
        network(clip)
    result = verify(compiled, network, (clip,))
    assert not result.passed and "from call to call" in result.reason


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
