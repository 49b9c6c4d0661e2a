"""The pipeline as users edit it: by name, with promises that are kept, culprits that are named, and dumps to read."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import co3d_compile as co3d
from co3d_compile.analysis import promises
from co3d_compile.capture.capture_model import capture
from co3d_compile.ir.graph_text import text_of
from co3d_compile.ir.markers import history, store, take
from co3d_compile.ir.options import Options
from co3d_compile.ir.pass_manager import run_one, run_passes
from co3d_compile.ir.program import Program
from co3d_compile.ir.time_facts import Kind, amend, amend_own
from co3d_compile.onnx_export import export_program
from co3d_compile.onnx_export.emitter import TABLE
from co3d_compile.passes import insert

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


class Claims(co3d.Pass):
    """Does nothing, and ensures something."""

    def __init__(self, *promises: str) -> None:
        self.ensures = frozenset(promises)  # type: ignore[misc]

    def run(self, program: Program) -> bool:
        return False


class ForgetsFacts(co3d.Pass):
    """Puts an operator into the graph without saying how it flows, nor that it does so."""

    def run(self, program: Program) -> bool:
        node = next(n for n in program.graph.nodes if n.op == "call_function" and n.target is torch.ops.aten.add.Tensor)
        node.replace_input_with(node.args[0], insert(program, node, torch.ops.aten.relu.default, node.args[0]))
        return True


class ForgetsDelays(co3d.Pass):
    """Lets a residual read what is there instead of what waited for it."""

    def run(self, program: Program) -> bool:
        taken = [n for n in program.graph.nodes if n.target is take and n.args[0].target is history]
        node = next(n for n in taken if n.args[1] == 0)
        node.replace_all_uses_with(node.args[0].args[0])
        return True


class ForgetsStores(co3d.Pass):
    """Deletes what gives a counter its next value."""

    def run(self, program: Program) -> bool:
        for node in [n for n in program.graph.nodes if n.target is store]:
            program.graph.erase_node(node)
        return True


class Spoils(co3d.Pass):
    """Changes something behind the back of a promise."""

    def __init__(self, change: Callable[[Program], object]) -> None:
        self.change = change

    def run(self, program: Program) -> bool:
        self.change(program)
        return True


def of(program: Program, target: Any) -> Any:
    """The first node of an operator."""
    return next(n for n in program.graph.nodes if n.target is target)


def copies_the_input(program: Program) -> None:
    add = of(program, aten.add.Tensor)
    add.replace_input_with(add.args[0], insert(program, add, aten.clone.default, add.args[0]))


def pads_again(program: Program) -> None:
    conv = of(program, aten.conv3d.default)
    conv.args = (*conv.args[:4], [1, 1, 1], *conv.args[5:])


def crops_the_input(program: Program) -> None:
    (x,) = program.placeholders()
    x.meta["val"] = x.meta["val"][..., :-1]


def drops_a_result(program: Program) -> None:
    output = next(n for n in program.graph.nodes if n.op == "output")
    output.args = (output.args[0][:-1],)


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


LIES: dict[str, tuple[str, co3d.Pass, str]] = {
    "not canonical": (
        "canonicalize",
        Claims("no_batch_norm"),
        r"ensures 'no_batch_norm'.*in norm\) is there",
    ),
    "padded": ("annotate_time", Claims("unpadded"), r"ensures 'unpadded'.*aten\.conv3d in conv\) has temporal padding"),
    "not continual": (
        "strip_temporal_padding",
        Claims("continual"),
        r"ensures 'continual'.*reads 1 entries and needs 3",
    ),
    "no windows": ("continual", Claims("windowed"), r"ensures 'windowed'.*reads the stream"),
    "not aligned": ("windows_and_gates", Claims("aligned"), r"ensures 'aligned'.*have the delays \[0, 1\]"),
    "not lowered": ("mark_ends", Claims("lowered"), r"ensures 'lowered'.*still a marker"),
    "not threaded": ("lower", Claims("threaded"), r"ensures 'threaded'.*still a marker"),
    "facts": ("annotate_time", ForgetsFacts(), r"forgets_facts broke 'time': relu.* has no fact"),
    "delays": ("delay_residuals", ForgetsDelays(), r"forgets_delays broke 'aligned'.*have the delays \[0, 1\]"),
    "a copy": ("canonicalize", Spoils(copies_the_input), r"spoils broke 'canonical': clone.* has no canonical form"),
    "half an entry": (
        "annotate_time",
        Spoils(lambda p: amend(of(p, aten.add.Tensor), pulse=Fraction(1, 2))),
        r"spoils broke 'time': add.* has 1/2 entries per step",
    ),
    "no layout": (
        "annotate_time",
        Spoils(lambda p: amend(of(p, aten.add.Tensor), layout=None)),
        r"spoils broke 'time': add.* streams, and where time is in it is not known",
    ),
    "first entries": (
        "join_starts",
        Spoils(lambda p: amend(of(p, aten.conv3d.default), kind=Kind.START)),
        r"spoils broke 'joined': conv3d_1.* reads first entries and is no marker",
    ),
    "padding": (
        "strip_temporal_padding",
        Spoils(pads_again),
        r"spoils broke 'unpadded': conv3d.*has temporal padding",
    ),
    "an equation": (
        "strip_temporal_padding",
        Spoils(lambda p: amend_own(of(p, aten.conv3d.default), slides=None)),
        r"spoils broke 'unpadded': conv3d.*has lost its index equation",
    ),
    "no ends": ("delay_residuals", Claims("ends"), r"ensures 'ends'.*no input says which frames are there"),
    "an input": (
        "lower",
        Spoils(crops_the_input),
        r"spoils broke 'lowered': the input .* has the shape \(\d, 2, 6, 5\) instead of",
    ),
    "a state": (
        "thread_states",
        Spoils(lambda p: p.step.states.pop()),
        r"spoils broke 'threaded': there are \d+ inputs",
    ),
    "a result": ("thread_states", Spoils(drops_a_result), r"spoils broke 'threaded': there are \d+ outputs instead"),
    "stores": ("lower", ForgetsStores(), r"forgets_stores broke 'lowered'.*is a state that 0 nodes store"),
}


@pytest.mark.parametrize(("behind", "liar", "says"), LIES.values(), ids=LIES)
def test_a_pass_that_lies_is_named(behind: str, liar: co3d.Pass, says: str) -> None:
    program = captured(boundary="exact" if "ends" in says or "stores" in says else "stream")
    passes = co3d.default_passes().after(behind, liar)
    with pytest.raises(co3d.PassError, match=says):
        run_passes(program, passes, checks=promises.PROMISES)


def test_promises_are_checked_with_a_dump_and_have_no_other_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert set(promises.PROMISES) == {name for p in co3d.default_passes() for name in p.ensures}
    monkeypatch.setattr(promises, "always", False)
    passes = co3d.default_passes().after("annotate_time", Claims("unpadded"))
    compiles(passes)
    with pytest.raises(co3d.PassError, match="The pass claims ensures 'unpadded'"):
        compiles(passes, dump=tmp_path)


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
