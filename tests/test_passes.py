"""The pipeline as users edit it: by name, with promises that are kept, culprits that are named, and dumps to read."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import co3d_compile as co3d
from co3d_compile.capture.capture_model import capture
from co3d_compile.ir.graph_text import text_of
from co3d_compile.ir.options import Options
from co3d_compile.ir.pass_manager import run_one, run_passes
from co3d_compile.ir.program import Program
from co3d_compile.onnx_export import export_program
from co3d_compile.onnx_export.emitter import TABLE

aten = torch.ops.aten
NAMES = [
    "canonicalize",
    "fold_batch_norm",
    "limit_delay",
    "annotate_time",
    "join_starts",
    "strip_temporal_padding",
    "continual",
    "windows_and_gates",
    "delay_residuals",
    "mark_ends",
    "lower",
    "block_channels",
    "thread_states",
]
CLIP = (1, 2, 8, 6, 6)


class Block(nn.Module):
    """A residual block and a head: every pass finds something to do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 18, 3, padding=1)
        self.norm = nn.BatchNorm3d(18)
        self.back = nn.Conv3d(18, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.back(self.norm(self.conv(x)))).mean((2, 3, 4))


class Nothing(co3d.Pass):
    """Leaves the graph as it is."""

    def run(self, program: Program) -> bool:
        return False


class Forgetful(co3d.Pass):
    """Moves nothing, and says that the facts of time no longer hold."""

    breaks = frozenset({"time"})

    def run(self, program: Program) -> bool:
        return True


class DropsAnOperand(co3d.Pass):
    """Erases a node that others read."""

    def run(self, program: Program) -> bool:
        node = next(n for n in program.graph.nodes if n.op == "call_function")
        program.graph.erase_node(node)
        return True


class Unsound(co3d.Pass):
    """Puts a reader in front of what it reads."""

    def run(self, program: Program) -> bool:
        nodes = [n for n in program.graph.nodes if n.op == "call_function"]
        nodes[0].prepend(nodes[-1])
        return True


class Lost(co3d.Pass):
    """Has no run."""


def names(passes: list[co3d.Pass]) -> list[str]:
    return [p.name for p in passes]


def captured(**options: Any) -> Program:
    torch.manual_seed(0)
    return capture(Block().eval(), (torch.zeros(CLIP),), Options(**options))


def compiles(passes: Any, **options: Any) -> co3d.CompiledModel:
    return co3d.compile(Block().eval(), (torch.zeros(CLIP),), passes=passes, **options)


# The list


def test_the_default_list_is_the_documented_one_and_new_each_time() -> None:
    assert names(co3d.default_passes()) == NAMES
    assert co3d.default_passes() is not co3d.default_passes()


EDITS: list[tuple[Any, list[str]]] = [
    (lambda p: p.before("lower", Nothing()), [*NAMES[:10], "nothing", *NAMES[10:]]),
    (lambda p: p.after("lower", Nothing()), [*NAMES[:11], "nothing", *NAMES[11:]]),
    (lambda p: p.before("canonicalize", Nothing()), ["nothing", *NAMES]),
    (lambda p: p.after("thread_states", Nothing()), [*NAMES, "nothing"]),
    (lambda p: p.replace("fold_batch_norm", Nothing()), [NAMES[0], "nothing", *NAMES[2:]]),
    (lambda p: p.without("fold_batch_norm"), [NAMES[0], *NAMES[2:]]),
    (lambda p: p.before("lower", Nothing()).without("lower"), [*NAMES[:10], "nothing", *NAMES[11:]]),
    (lambda p: [*p, Nothing()], [*NAMES, "nothing"]),
]


@pytest.mark.parametrize(("edit", "expected"), EDITS)
def test_edited_by_name(edit: Any, expected: list[str]) -> None:
    passes = co3d.default_passes()
    assert names(edit(passes)) == expected
    assert names(passes) == NAMES, "an edit must not change the list it starts from"


@pytest.mark.parametrize("edit", ["before", "after", "replace", "without"])
def test_an_unknown_name_lists_the_known_ones(edit: str) -> None:
    arguments = ["fuse"] if edit == "without" else ["fuse", Nothing()]
    with pytest.raises(co3d.PassError, match="no pass 'fuse'; there are canonicalize, fold_batch_norm"):
        getattr(co3d.default_passes(), edit)(*arguments)


def behind_each(new: co3d.Pass) -> list[co3d.Pass]:
    """The default passes with ``new`` behind each of them."""
    return [q for p in co3d.default_passes() for q in (p, new)]


def test_a_pass_that_does_nothing_changes_nothing_anywhere() -> None:
    torch.manual_seed(0)
    plain = compiles(co3d.default_passes())
    torch.manual_seed(0)
    other = compiles(behind_each(Nothing()))
    assert text_of(other.program) == text_of(plain.program)
    assert other.to_bytes() == plain.to_bytes()


class Recurrent(nn.Module):
    """Convolutions and a GRU over what they make of each frame: a state that its layer writes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 4, 3, padding=1)
        self.gru = nn.GRU(4, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(self.conv(x).relu().mean((3, 4)).transpose(1, 2))[0]


class Sweeps(co3d.Pass):
    """Deletes what FX takes for dead code."""

    def run(self, program: Program) -> bool:
        return bool(program.graph.eliminate_dead_code())


@pytest.mark.parametrize("boundary", ["stream", "exact"])
@pytest.mark.parametrize("model", [nn.Conv3d(2, 3, 3, padding=1), Recurrent()], ids=["conv", "gru"])
def test_dead_code_may_be_deleted_after_each_pass(model: nn.Module, boundary: str) -> None:
    """States are read and written by nodes that FX sees, so none of them is dead code anywhere in the list."""
    torch.manual_seed(0)
    clip = torch.randn(CLIP)
    plain = co3d.compile(model.eval(), (clip,), boundary=boundary)
    swept = co3d.compile(model, (clip,), boundary=boundary, passes=behind_each(Sweeps()))
    assert plain.info.states == swept.info.states != ()
    for expected, result in zip(streamed(plain, clip), streamed(swept, clip), strict=True):
        assert np.array_equal(expected, result)


def streamed(compiled: co3d.CompiledModel, clip: Tensor) -> list[np.ndarray]:
    """What a session in ONNX Runtime gives for a clip, frame by frame."""
    session = co3d.StreamSession(compiled)
    results = [session.step(frame.numpy()) for frame in clip.unbind(2)]
    if compiled.info.valid is not None:
        results += session.flush()
    return [np.asarray(r) for r in results]


# Promises


@pytest.mark.parametrize("name", NAMES)
def test_each_pass_runs_alone_after_what_it_requires(name: str) -> None:
    """Just the passes whose promises it needs, and those that they need, in the order of the list."""
    passes = co3d.default_passes()
    needed: list[co3d.Pass] = [passes[passes.position(name)]]
    required = set(needed[0].requires)
    for p in reversed(passes[: passes.position(name)]):
        if p.ensures & required:
            needed.insert(0, p)
            required |= p.requires
    program = captured()
    run_passes(program, needed)
    assert needed[-1].ensures <= program.promises
    program.graph.lint()


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_pass_alone_says_what_it_misses(name: str) -> None:
    passes = co3d.default_passes()
    alone = passes[passes.position(name)]
    with pytest.raises(co3d.PassError, match=f"pass {name} requires") as raised:
        run_passes(captured(), [alone])
    for promise in alone.requires:
        assert f"no pass before ensures '{promise}'" in str(raised.value)


def test_the_page_lists_the_promises_of_each_pass() -> None:
    page = (Path(__file__).parents[1] / "docs" / "custom_passes.md").read_text()
    for p in co3d.default_passes():
        row = re.search(rf"^\| `{p.name}` \|(.*)\|(.*)\|(.*)\|$", page, re.MULTILINE)
        assert row is not None, p.name
        assert [set(re.findall(r"`(\w+)`", cell)) for cell in row.groups()] == [p.requires, p.ensures, p.breaks], p.name


def test_the_culprit_that_broke_a_promise_is_named() -> None:
    with pytest.raises(co3d.PassError, match=r"pass continual requires time.*'time' was broken by forgetful"):
        compiles(co3d.default_passes().before("continual", Forgetful()))


def test_a_promise_that_is_renewed_holds() -> None:
    passes = co3d.default_passes().before("join_starts", Forgetful())
    compiles(passes.after("forgetful", passes[passes.position("annotate_time")]))


@pytest.mark.parametrize("culprit", [Unsound(), DropsAnOperand()], ids=lambda p: p.name)
def test_a_pass_that_breaks_the_graph_is_named(culprit: co3d.Pass) -> None:
    with pytest.raises(co3d.PassError, match=f"The pass {culprit.name} broke the graph") as raised:
        compiles(co3d.default_passes().after("canonicalize", culprit))
    assert raised.value.exit_code == 5
    assert raised.value.__cause__ is not None, "the cause is kept for debugging"


def test_a_pass_without_run_is_told_so() -> None:
    with pytest.raises(co3d.PassError, match=r"pass lost broke the graph: TypeError: Lost .*implement run\(program\)"):
        compiles(co3d.default_passes().after("canonicalize", Lost()))


class Texts(co3d.Pass):
    requires = "canonical"  # type: ignore[assignment]


BAD_LISTS: dict[str, tuple[Callable[[], list[Any]], str]] = {
    "a class": (lambda: co3d.default_passes().after("canonicalize", Lost), "the class Lost"),  # type: ignore[arg-type]
    "a name": (lambda: ["canonicalize"], "holds a str"),
    "a text of promises": (lambda: [Texts()], "requires of the pass texts is a text"),
    "nothing": (list, "default_passes"),
    "no end": (lambda: co3d.default_passes().without("thread_states"), "ends with thread_states"),
}


@pytest.mark.parametrize(("make", "says"), BAD_LISTS.values(), ids=BAD_LISTS)
def test_bad_lists(make: Callable[[], list[Any]], says: str) -> None:
    with pytest.raises(co3d.PassError, match=says):
        compiles(make())


def test_errors_of_the_compiler_pass_through() -> None:
    class Refuses(co3d.Pass):
        def run(self, program: Program) -> bool:
            raise co3d.UnsupportedError("Not this one.", operator="aten.conv3d")

    with pytest.raises(co3d.UnsupportedError, match="Not this one"):
        compiles(co3d.default_passes().after("canonicalize", Refuses()))


def test_a_pass_reports_whether_it_changed_anything() -> None:
    class Cloned(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.clone())

    program = capture(Cloned().eval(), (torch.zeros(CLIP),), Options())
    passes = co3d.default_passes()
    for p in passes:
        program.promises |= p.requires
        changed = p.name not in ("limit_delay", "join_starts", "mark_ends")  # no budget, no start of its own, no ends
        assert run_one(program, p) is changed, f"{p.name} has something to do in this network"
        program.promises |= p.ensures


def test_every_table_of_the_exporter_is_read() -> None:
    """An operator of a table that is not imported would go through PyTorch's exporter without a word."""
    folder = Path(export_program.__file__).parent
    tables = {file.stem for file in folder.glob("*_operators.py")}
    assert tables and all(f"co3d_compile.onnx_export.{name}" in sys.modules for name in tables)
    assert {torch.ops.aten.conv2d.default, torch.ops.aten.relu.default, torch.ops.aten.gelu.default} <= set(TABLE)
