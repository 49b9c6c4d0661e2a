"""What a pass promises is so: a pass that lies about it, or breaks it without a word, is named."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from test_passes import captured, compiles

import co3d_compile as co3d
from co3d_compile.analysis import promises
from co3d_compile.ir.markers import history, store, take
from co3d_compile.ir.pass_manager import run_passes
from co3d_compile.ir.program import Program
from co3d_compile.ir.time_facts import Kind, amend, amend_own
from co3d_compile.passes import insert

aten = torch.ops.aten


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
