"""Passes and the manager that runs them: what each requires and ensures is checked, and a culprit is named."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

from co3d_compile.errors import Co3dError, OutputError, PassError
from co3d_compile.ir.graph_text import text_of
from co3d_compile.ir.program import Program

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
Check = Callable[[Program], "str | None"]


class Pass:
    """One rewrite of a :class:`Program`. Subclasses implement :meth:`run`.

    Attributes:
        requires: Promises that must hold before.
        ensures: Promises that hold afterwards.
        breaks: Promises that no longer hold afterwards.
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset()
    breaks: ClassVar[frozenset[str]] = frozenset()

    @property
    def name(self) -> str:
        """The name under which the pass is found in a list of passes: ``fold_batch_norm`` for ``FoldBatchNorm``."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    def run(self, program: Program) -> bool:
        """Rewrites ``program`` in place; returns whether anything changed."""
        raise TypeError(f"{type(self).__name__} does not say what to do: implement run(program)")

    def __repr__(self) -> str:
        return f"<pass {self.name}>"


class PassList(list[Pass]):
    """A plain list of passes that can also be edited by name."""

    def position(self, name: str) -> int:
        """Finds the index of the pass of this name.

        Raises:
            PassError: There is none.
        """
        for i, p in enumerate(self):
            if p.name == name:
                return i
        raise PassError(f"There is no pass {name!r}; there are {', '.join(p.name for p in self)}.")

    def before(self, name: str, new: Pass) -> PassList:
        """Copies the list with ``new`` in front of the named pass."""
        i = self.position(name)
        return PassList([*self[:i], new, *self[i:]])

    def after(self, name: str, new: Pass) -> PassList:
        """Copies the list with ``new`` behind the named pass."""
        i = self.position(name)
        return PassList([*self[: i + 1], new, *self[i + 1 :]])

    def replace(self, name: str, new: Pass) -> PassList:
        """Copies the list with ``new`` in place of the named pass."""
        i = self.position(name)
        return PassList([*self[:i], new, *self[i + 1 :]])

    def without(self, name: str) -> PassList:
        """Copies the list without the named pass."""
        i = self.position(name)
        return PassList([*self[:i], *self[i + 1 :]])


def check_passes(passes: Sequence[object]) -> None:
    """Raises PassError for what is in the list and is no pass, or makes no promises that can be looked up."""
    for p in passes:
        if not isinstance(p, Pass):
            what = f"the class {p.__name__}" if isinstance(p, type) else f"a {type(p).__name__}"
            raise PassError(f"A list of passes holds {what}.", hint="Put objects of subclasses of co3d.Pass into it.")
        for kind in ("requires", "ensures", "breaks"):
            if isinstance(getattr(p, kind), str):
                raise PassError(f"{kind} of the pass {p.name} is a text.", hint="Make it a frozenset of names.")


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    *,
    dump: Path | None = None,
    progress: Progress | None = None,
    checks: Mapping[str, Check] = MappingProxyType({}),
) -> dict[str, float]:
    """Runs passes in order and returns the seconds each took.

    Args:
        program: What they rewrite.
        passes: In their order.
        dump: A folder for the graph as text, before the first pass and after each.
        progress: Told the name of each pass, its number and how many there are.
        checks: By promise, what says why it does not hold; looked at after each pass for all that is promised.

    Raises:
        PassError: A pass lacks what it requires, broke the graph, or a promise that it gives or says nothing of does
            not hold behind it; the message names it.
        OutputError: The dumps cannot be written.
    """
    seconds: dict[str, float] = {}
    breakers: dict[str, str] = {}
    _dump(program, dump, "00_captured")
    for i, p in enumerate(passes):
        if progress is not None:
            progress(p.name, i, len(passes))
        _check_required(program, p, breakers)
        start = time.perf_counter()
        modified = run_one(program, p)
        seconds[p.name] = time.perf_counter() - start
        log.info("pass %s: %.3f s%s", p.name, seconds[p.name], "" if modified else ", nothing to change")
        breakers.update(dict.fromkeys(p.breaks, p.name))
        program.promises = (program.promises - p.breaks) | p.ensures
        _dump(program, dump, f"{i + 1:02d}_{p.name}")
        for name in sorted(program.promises & checks.keys()):
            problem = checks[name](program)
            if problem is not None:
                raise _lie(p, name, problem)
    return seconds


def _dump(program: Program, folder: Path | None, name: str) -> None:
    """Writes the graph as text into a folder, if one is given."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_text(text_of(program))
    except OSError as error:
        raise OutputError(f"Cannot write dumps into {folder}: {error.strerror}.", hint="Give a folder.") from error


def _check_required(program: Program, p: Pass, breakers: Mapping[str, str]) -> None:
    """Raises PassError where a pass requires what does not hold; ``breakers``: which pass broke a promise."""
    missing = sorted(p.requires - program.promises)
    if missing:
        lost = "; ".join(
            f"{m!r} was broken by {breakers[m]}" if m in breakers else f"no pass before ensures {m!r}" for m in missing
        )
        raise PassError(
            f"The pass {p.name} requires {', '.join(missing)}: {lost}.",
            hint="Put the pass that ensures it in front, or move this one.",
        )


def _lie(p: Pass, promise: str, problem: str) -> PassError:
    """Writes the error of a pass behind which a promise does not hold."""
    if promise in p.ensures:
        what, cure = f"ensures '{promise}', and that is not so", f"take '{promise}' out of its ensures"
    else:
        what, cure = f"broke '{promise}'", f"name '{promise}' in its breaks and move it"
    return PassError(f"The pass {p.name} {what}: {problem}.", hint=f"Rewrite the pass, or {cure}.")


def run_one(program: Program, p: Pass) -> bool:
    """Runs one pass and checks that it left a sound graph."""
    try:
        modified = p.run(program)
        program.graph.lint()
        bare = [n.name for n in program.graph.nodes if n.op in ("call_function", "get_attr") and "val" not in n.meta]
        if bare:
            raise PassError(
                f"The pass {p.name} left nodes without a shape: {', '.join(bare[:3])}.",
                hint="Insert nodes with co3d_compile.passes.insert, which computes it.",
            )
        if modified is not False:  # who says nothing may have changed it
            program.module.recompile()
    except Co3dError:
        raise
    except Exception as error:
        raise PassError(
            f"The pass {p.name} broke the graph: {type(error).__name__}: {str(error).rstrip('.')}.",
            hint="Run with -v -v (or catch the cause in Python) for the full trace.",
        ) from error
    return modified
