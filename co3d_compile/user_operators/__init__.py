"""Rules for users' own operators."""

from co3d_compile.user_operators.declare_rule import rule, scope, unregister

__all__ = ["rule", "scope", "unregister"]
