"""Failures of the compiler's own rules: bugs, which cost a user speed at one operator, and never the whole model."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch.fx import Node

from co3d_compile.errors import Co3dError, PassError
from co3d_compile.ir.markers import MARKERS
from co3d_compile.ir.node_reading import module_path, operator_name
from co3d_compile.ir.program import Program
from co3d_compile.rules import rule_for

log = logging.getLogger(__name__)
STRICT = "CO3D_STRICT_RULES"
"""The environment variable with which a failure is raised as it is, as in this project's own tests.

Without it, :func:`co3d_compile.compile` runs its passes again with the operator on a window, and the report says so.
"""


class RuleFailure(PassError):
    """A rule of the compiler failed for no reason that the compiler knows.

    Args:
        program: What was compiled.
        node: The node that the rule was asked about; one that a pass added serves those that read it.
        error: What the rule raised.
    """

    def __init__(self, program: Program, node: Node, error: Exception) -> None:
        nodes = [node, *node.users]
        for reader in nodes:
            nodes += reader.users if reader.target in MARKERS else ()
        self.names = tuple(name for n in nodes for name in program.names_of(n))
        what = f"{type(error).__name__}: {str(error).rstrip('.')}"
        name, path = operator_name(node.target), module_path(node)
        self.who = f"The rule of {name} in {path or 'the model'} failed ({what})"
        self.warning = f"{self.who}: it is computed again on a window."
        hint = "Please report it; run with -v -v (or catch the cause in Python) for the full trace."
        super().__init__(f"The rule of an operator failed: {what}.", operator=name, module_path=path, hint=hint)


@contextmanager
def blaming(program: Program, node: Node) -> Iterator[None]:
    """Blames a node's rule for an unexpected exception inside; that of a user's own rule is raised as it is.

    Raises:
        RuleFailure: The rule is the compiler's, and ``CO3D_STRICT_RULES`` is not set.
    """
    try:
        yield
    except Co3dError:
        raise
    except Exception as error:
        rule = rule_for(node.target)
        if os.environ.get(STRICT) or (rule is not None and not rule.built_in):
            raise
        raise RuleFailure(program, node, error) from error


@contextmanager
def noting(program: Program, node: Node) -> Iterator[None]:
    """Warns of an unexpected exception of a node's rule inside, and goes on: for questions before the passes begin.

    Whoever asks takes no answer for "no": a loop stays as it was captured.
    """
    try:
        with blaming(program, node):
            yield
    except RuleFailure as failure:
        warning = f"{failure.who}: no loop is looked for behind it."
        if warning not in program.notes.warnings:
            log.warning("%s", warning)
            program.notes.warnings.append(warning)
