"""One file per operator family: what its operators do to time, and how one entry of their output is computed."""

import pkgutil
from importlib import import_module

from torch.fx import Node
from torch.fx.node import Target

from co3d_compile.ir.aten_operators import is_pointwise
from co3d_compile.ir.time_facts import own_of
from co3d_compile.rules.base import RULES, Rule, in_table, register
from co3d_compile.rules.pointwise import POINTWISE


def rule_for(target: Target) -> Rule | None:
    """Finds the rule of an operator, or None: it is applied to a window."""
    rule = in_table(target)
    if rule is None and is_pointwise(target):
        return POINTWISE
    return rule


def rule_of(node: Node) -> Rule | None:
    """Gives the rule of a node's operator, or None: there is none, or it failed at this node and is not asked again."""
    return None if own_of(node).by_decree else rule_for(node.target)


for _family in pkgutil.iter_modules(__path__, f"{__name__}."):
    import_module(_family.name)  # registers its rules: a new family is a new file, in no list

__all__ = ["RULES", "Rule", "is_pointwise", "register", "rule_for", "rule_of"]
