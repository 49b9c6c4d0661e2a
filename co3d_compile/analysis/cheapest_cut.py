"""The cheapest nodes of a graph that every path goes through one of."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from itertools import pairwise
from math import inf

from torch.fx import Node

_Place = tuple[Node, int]
"""A node has two places, 0 where paths enter it and 1 where they leave: it costs to go between."""


def cheapest_cut(before: Mapping[Node, Iterable[Node]], ends: Iterable[Node], costs: Mapping[Node, float]) -> set[Node]:
    """Finds the nodes of the least cost without which no path is left; the largest flow says which (Ford, Fulkerson).

    Args:
        before: The nodes that stand before each node on the paths. Paths begin where there is none.
        ends: Where paths end.
        costs: Of the nodes that may be taken.

    Returns:
        The nodes; none at all where some path has no node that may be taken.
    """
    left: dict[_Place, dict[_Place, float]] = defaultdict(dict)
    for node, others in before.items():
        _join(left, (node, 0), (node, 1), costs.get(node, inf))
        for other in others:
            _join(left, (node, 1), (other, 0), inf)
    starts = [(node, 0) for node in dict.fromkeys(ends)]
    goals = {(node, 1) for node, others in before.items() if not list(others)}
    while (path := _path(left, starts, goals)[0]) is not None:
        steps = list(pairwise(path))
        flow = min(left[a][b] for a, b in steps)
        if flow == inf:
            return set()
        for a, b in steps:
            left[a][b] -= flow
            left[b][a] += flow
    reached = _path(left, starts, goals)[1]
    return {node for node in before if (node, 0) in reached and (node, 1) not in reached}


def _join(left: dict[_Place, dict[_Place, float]], a: _Place, b: _Place, cost: float) -> None:
    left[a][b] = cost
    left[b].setdefault(a, 0.0)


def _path(
    left: Mapping[_Place, Mapping[_Place, float]], starts: Iterable[_Place], goals: set[_Place]
) -> tuple[list[_Place] | None, set[_Place]]:
    """Finds a shortest path along which more may flow, and all places that can be reached."""
    came: dict[_Place, _Place | None] = dict.fromkeys(starts)
    queue = deque(came)
    while queue:
        at = queue.popleft()
        if at in goals:
            path: list[_Place] = [at]
            while (previous := came[path[-1]]) is not None:
                path.append(previous)
            return path[::-1], set(came)
        for to, more in left[at].items():
            if more > 1e-12 and to not in came:
                came[to] = at
                queue.append(to)
    return None, set(came)
