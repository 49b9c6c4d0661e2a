"""One file per operator family: what its operators do to time, and how one entry of their output is computed."""

from co3d_compile.rules import combine, conv, matmul, order, pool, recurrent, reduce, resample, shape, slices
from co3d_compile.rules.base import RULES, Rule, register
from co3d_compile.rules.pointwise import POINTWISE, is_pointwise

FAMILIES = (combine, conv, matmul, order, pool, recurrent, reduce, resample, shape, slices)


def rule_for(target: object) -> Rule | None:
    """The rule of an operator, or None: it is applied to a window."""
    rule = RULES.get(target)
    if rule is None and is_pointwise(target):
        return POINTWISE
    return rule


__all__ = ["FAMILIES", "RULES", "Rule", "is_pointwise", "register", "rule_for"]
