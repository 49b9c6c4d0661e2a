"""Where a step spends its time, by module: from the profile that ONNX Runtime writes of a run.

The runtime renames what it fuses and rearranges. Names lead back to nodes of the file, and these carry module paths;
what leads nowhere (its own reorderings of memory) is kept apart, by kind of operator. Needs onnx, and no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from co3d_compile.errors import Co3dError, LoadError, UsageError
from co3d_compile.report.report_rows import Row

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

MADE_BY = "Make one with co3d run --profile FILE.json, or StreamSession(..., profile=FILE)."
# Operators that do the work. A fused kernel is one of them, under the name of the last operator fused into it.
HEAVY = ("ConvTranspose", "Conv", "MatMul", "Gemm", "LSTM", "GRU", "RNN")
# Endings of names that its graph optimisers add.
ADDED = (r"_nchwc$", r"_nhwc$", r"_token_\d+$", r"/[^/]*$")
FUSION = r"/\w+Fusion/?$"  # what it appends to the name of the last node that it fuses
STATE = r"next\.state\.(.*)\.\d+(?:\.plain)?(?:_nchwc)?"


@dataclass
class KernelTimes:
    """Microseconds inside kernels, over all steps of a profile but the first, which allocates memory.

    Attributes:
        steps: That were counted.
        by_path: Microseconds by module path; "" is the model itself.
        unmatched: Microseconds of kernels that belong to no module, by ONNX operator.
        by_operator: Microseconds of all kernels, by ONNX operator as the runtime has fused it.
        kernels: How many of them ran, by ONNX operator.
    """

    steps: int
    by_path: Counter[str] = field(default_factory=Counter)
    unmatched: Counter[str] = field(default_factory=Counter)
    by_operator: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return self.by_path.total() + self.unmatched.total()


def read_times(profile: Path, model: Path) -> KernelTimes:
    """Reads the times of a profile, by the modules of the compiled file that was run.

    Raises:
        LoadError: The profile cannot be read, or says nothing of operators. UsageError: It is of another model.
        Co3dError: The package onnx is missing.
    """
    steps, kernels = _kernels(profile)
    nodes = _Nodes(_graph(model), {name for name, _, _ in kernels})
    times = KernelTimes(steps)
    for name, operator, microseconds in kernels:
        times.by_operator[operator] += microseconds
        times.kernels[operator] += 1
        path = nodes.path_of(name, operator)
        if path is None:
            times.unmatched[operator] += microseconds
        else:
            times.by_path[path] += microseconds
    if not times.by_path and times.unmatched:
        raise UsageError(f"{profile} is the profile of another model.", hint=MADE_BY)
    return times


def with_shares(rows: Iterable[Row], times: KernelTimes) -> tuple[list[Row], dict[str, float]]:
    """Gives each row of a report its ``time_share`` from 0 to 1, and says the share of what has no row, by name.

    As with multiply-adds, the time of a module stands at that of its operators that does most.
    """
    result: list[Row] = [{**row, "time_share": 0.0} for row in rows]
    total = times.total or 1
    rest = {operator: amount / total for operator, amount in times.unmatched.items()}
    for path, amount in times.by_path.items():
        own = [row for row in result if row["kind"] != "input" and row["module_path"] == path]
        heavy = [r for r in own if any(word in r["operator"] for word in ("conv", "linear", "mm", "attention"))]
        at = next(iter(heavy or own), None)
        if at is None:
            rest[path or "the model"] = amount / total
        else:
            at["time_share"] += amount / total
    return result, dict(sorted(rest.items(), key=lambda item: -item[1]))


def _kernels(profile: Path) -> tuple[int, list[tuple[str, str, int]]]:
    """Counts the steps, and reads the name, operator and microseconds of each kernel that ran in one."""
    try:
        events = json.loads(profile.read_text(encoding="utf-8"))
        runs = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == "model_run"]
        begin = min(end for _, end in runs) if len(runs) > 1 else -math.inf
        found = [
            (str(e["name"]).removesuffix("_kernel_time"), str(e["args"]["op_name"]), int(e["dur"]))
            for e in events
            if e.get("cat") == "Node" and str(e["name"]).endswith("_kernel_time") and e["ts"] >= begin
        ]
    except OSError as error:
        raise LoadError(f"Cannot read the profile: {error}.", hint=MADE_BY) from error
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{profile} is no profile of ONNX Runtime, or not a whole one.", hint=MADE_BY) from error
    if not found:
        raise LoadError(f"{profile} has no times of operators.", hint=MADE_BY)
    return max(1, len(runs) - 1), found


def _graph(model: Path) -> GraphProto:
    try:
        import onnx
    except ImportError as error:
        hint = "Install it with pip install onnx."
        raise Co3dError("Reading a profile needs the package onnx.", hint=hint) from error
    return onnx.load(str(model), load_external_data=False).graph


class _Nodes:
    """The nodes of a file, found by the names that kernels have.

    Args:
        graph: The ONNX graph.
        kernels: All names in the profile.
    """

    def __init__(self, graph: GraphProto, kernels: Iterable[str]) -> None:
        self._by_name = {node.name: node for node in graph.node}
        self._producer = {output: node for node in graph.node for output in node.output}
        self._with_kernel = {id(node) for name in kernels if (node := self._find(name)) is not None}

    def path_of(self, kernel: str, operator: str) -> str | None:
        """Finds the module path of what a kernel computes; None if it is of no node."""
        node = self._find(kernel)
        if node is None or (node.domain and _path(node) == ""):  # a file that the runtime has laid out has its own
            return None
        kind = next((kind for kind in HEAVY if kind in operator), None)
        if kind is not None and node.op_type != kind:
            node = self._fused(node, kind) or node
        return _path(node)

    def _find(self, kernel: str) -> NodeProto | None:
        """Finds the node of this name or with a result of this name.

        Endings that the runtime has added are taken off.
        """
        while kernel:
            node = self._by_name.get(kernel) or self._producer.get(kernel)
            if node is not None:
                return node
            kernel = next((kernel[: end.start()] for ending in ADDED if (end := re.search(ending, kernel))), "")
        return None

    def _fused(self, last: NodeProto, kind: str) -> NodeProto | None:
        """Finds the nearest node of a kind before ``last`` that has no kernel of its own: it was fused with it."""
        front, seen = deque([last]), {id(last)}
        while front:
            for name in front.popleft().input:
                node = self._producer.get(name)
                if node is None or id(node) in seen:
                    continue
                if node.op_type == kind and id(node) not in self._with_kernel:
                    return node
                seen.add(id(node))
                if node.op_type not in HEAVY:
                    front.append(node)
        return None


def _path(node: NodeProto) -> str:
    """Reads the module path off the name of a node, ``<module path>/<operator>``, or of the state that it computes."""
    scope = re.sub(FUSION, "", node.name).rpartition("/")[0]
    state = re.fullmatch(STATE, scope or node.name)
    path = state[1] if state else scope
    return "" if path == "model" else path
