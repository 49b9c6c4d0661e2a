"""Networks of the zoo, compiled once for all tests of them that a worker runs one after another."""

from __future__ import annotations

from typing import Any

from zoo import Entry

import co3d_compile as co3d

_KEPT = 8  # models at a time: `conftest` puts the tests of one network together
_made: dict[Any, tuple[co3d.CompiledModel, Entry]] = {}


def compiled(entry: Entry) -> co3d.CompiledModel:
    """The compiled model of an entry; the same one for an entry of the same function and options."""
    options = repr(sorted(entry.options.items()))
    key = entry.build, entry.shapes, entry.time_dim, options
    if key not in _made:
        while len(_made) >= _KEPT:
            del _made[next(iter(_made))]
        model = co3d.compile(entry.build(), entry.examples(), time_dim=entry.time_dim, **entry.options)
        _made[key] = model, entry  # with the entry its options stay alive, whose address `repr` may give
    return _made[key][0]
