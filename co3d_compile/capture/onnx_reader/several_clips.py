"""Whether a file that is written for one clip is right for several, and where these lie in its tensors.

Sizes that a file stores are those of one clip. Which of them counts the clips is tried: two clips are run together
beside each by itself, and every value behind the first such size is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from co3d_compile.capture.onnx_reader.clip_places import Place, behind, behind_a_view
from co3d_compile.capture.onnx_reader.control_flow import Values
from co3d_compile.capture.onnx_reader.graph_facts import nodes_of
from co3d_compile.capture.onnx_reader.node_call import Value
from co3d_compile.capture.onnx_reader.onnx_module import OnnxModule
from co3d_compile.errors import Co3dError

SAME = 1e-3  # of the largest number
CLIPS = 2
TRIES = 64  # places that are tried before it is given up
STORED = {"Reshape": (1,), "Expand": (1,), "ConstantOfShape": (0,), "ScatterElements": (0, 1), "ScatterND": (0, 1)}
"""Operators that take a shape, or a tensor with the shape of a clip, and where."""


def is_right_for_several(module: OnnxModule, clip: Sequence[Tensor]) -> bool:
    """Runs two clips together and one by one, if the file stores shapes; the module then knows where clips lie."""
    first = next((i for i, node in enumerate(module.onnx_graph) if _stores_a_shape(node)), None)
    if first is None:
        return True
    try:
        with torch.no_grad():
            module.onnx_clips = 1
            one: Values = dict(zip(module.onnx_graph.inputs, clip, strict=True))
            module.run(module.onnx_graph, one)
            right = _Search(module, one).run(first) or _Search(module, one).run(0)
    except (Co3dError, RuntimeError, ValueError):
        right = False
    if not right:
        module.onnx_places = {}
    return right


def _stores_a_shape(node: ir.Node) -> bool:
    every = range(len(node.inputs)) if node.op_type == "Concat" else STORED.get(node.op_type, ())
    stored = [node.inputs[i] for i in every if i < len(node.inputs)]
    as_attribute = node.op_type == "Reshape" and "shape" in node.attributes
    return as_attribute or any(v is not None and v.const_value is not None for v in stored)


class _Search:
    """A run of two clips together, node by node. It goes back to its last choice where a value is not each clip's.

    In front of the first node that stores a shape only the shapes are computed.

    Args:
        module: Runs the file.
        one: Every value of one clip.
    """

    def __init__(self, module: OnnxModule, one: Values) -> None:
        self.module = module
        self.nodes = list(module.onnx_graph)
        self.apart: list[Values] = [one, {}]
        self.values: Values = {}
        module.onnx_places = {}

    def run(self, first: int) -> bool:
        """Says whether every value from a node on is found to be that of each clip."""
        start = self._begin(first)
        if start is None:
            return False
        waiting: list[tuple[int, list[Place | None]]] = [(start, self._choices(self.nodes[start]))]
        tries = 0
        while waiting:
            at, choices = waiting.pop()
            choice, *rest = choices
            if rest:
                waiting.append((at, rest))
            if not self._step(self.nodes[at], choice):
                tries += 1
                if tries > TRIES:
                    return False
                continue
            if at + 1 == len(self.nodes):
                return all(self.module.onnx_places.get(v) is not None for v in self.module.onnx_graph.outputs)
            waiting.append((at + 1, self._choices(self.nodes[at + 1])))
        return False

    def _begin(self, first: int) -> int | None:
        """Puts two clips in front of a node, or of an earlier one that leaves open where they lie.

        Returns:
            The place of the node; None where the shapes before it are not those of two clips.
        """
        at = self._shapes_before(first)
        if at is None:
            return None
        one, other = self.apart
        read = {v for node in self.nodes[at:] for v in _read(node)} | set(self.module.onnx_graph.outputs)
        for value in [v for v in self.values if v in read]:
            x, place = one[value], self.module.onnx_places.get(value)
            if isinstance(x, Tensor):
                apart = [x, x.flip(-1) if place is not None and x.dim() and x.is_floating_point() else x]
                other[value] = apart[1]
                self.values[value] = x if place is None else place.joined(apart)
            else:
                other[value] = x
        self.module.onnx_clips = 1
        for node in self.nodes[at:]:
            other.update(zip(node.outputs, self.module.results_of(node, other), strict=False))
        self.module.onnx_clips = CLIPS
        return at

    def _shapes_before(self, first: int) -> int | None:
        """Notes where clips lie in front of a node, by the shapes of what is computed there."""
        self.module.onnx_clips = CLIPS
        with FakeTensorMode(allow_non_fake_inputs=True):
            for value in self.module.onnx_graph.inputs:
                x = self.apart[0][value]
                assert isinstance(x, Tensor)
                self.values[value] = x.new_empty([CLIPS * x.shape[0], *x.shape[1:]])
                self.module.onnx_places[value] = Place(0, x.shape[0])
            for at, node in enumerate(self.nodes[:first]):
                choice, *rest = self._choices(node)
                if rest or (choice is not None and choice.is_stored):
                    return at
                if not self._step(node, choice, in_value=False):
                    return None
        return first

    def _choices(self, node: ir.Node) -> list[Place | None]:
        """Finds where clips may lie behind a view, by its shape; one that is computed says in which dim."""
        source = node.inputs[0] if node.inputs else None
        place = self.module.onnx_places.get(source) if source is not None else None
        if node.op_type != "Reshape" or place is None or source is None:
            return [None]
        found = behind_a_view(place, self._shape(source), self._shape(node.outputs[0]))
        shape = node.inputs[1] if len(node.inputs) > 1 else None
        if shape is not None and shape in self.values:
            one, both = self.apart[0].get(shape), self.values[shape]
            if not isinstance(one, np.ndarray) or not isinstance(both, np.ndarray):
                return [None]
            if (one != both).any():
                found = [replace(p, is_stored=False) for p in found if one[p.dim] != both[p.dim]]
        return [*found] or [None]

    def _shape(self, value: ir.Value) -> tuple[int, ...]:
        found = self.apart[0][value]
        assert isinstance(found, Tensor | np.ndarray)
        return tuple(found.shape)

    def _step(self, node: ir.Node, choice: Place | None, in_value: bool = True) -> bool:
        """Runs a node; says whether its results are those of each clip, in value or in shape alone."""
        places = self.module.onnx_places
        for output in node.outputs:
            places.pop(output, None)
        if choice is not None:
            places[node.outputs[0]] = choice
        try:
            results = self.module.results_of(node, self.values)
            self.values.update(zip(node.outputs, results, strict=False))
            for output, result in zip(node.outputs, results, strict=False):
                if isinstance(result, Tensor):
                    self._compare(node, output, result, choice, in_value)
        except (Co3dError, ValueError):
            return False
        return True

    def _compare(self, node: ir.Node, output: ir.Value, result: Tensor, choice: Place | None, in_value: bool) -> None:
        """Notes where clips lie in a result.

        Raises:
            ValueError: It is not what each clip gives by itself.
        """
        places = self.module.onnx_places
        given = {p: self._shape(v)[p.dim] for v in node.inputs if v is not None and (p := places.get(v)) is not None}
        place = choice or behind(given, self._shape(output), result.shape, CLIPS)
        if place is not None:
            places[output] = place
        for i, values in enumerate(self.apart if in_value else ()):
            if not _same(result if place is None else place.clip(result, i, CLIPS), values[output]):
                raise ValueError("two clips together do not give what each gives by itself")


def _read(node: ir.Node) -> set[ir.Value]:
    """The values that a node reads, and those that graphs inside of it read."""
    inside = [a.as_graph() for a in node.attributes.values() if a.type is ir.AttributeType.GRAPH]
    return {v for n in [node, *(n for g in inside for n in nodes_of(g))] for v in n.inputs if v is not None}


def _same(a: Tensor, b: Value) -> bool:
    if not isinstance(b, Tensor):
        return isinstance(b, np.ndarray) and a.shape == b.shape
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    return not a.numel() or bool(((a - b).abs() <= SAME * b.abs().max() + 1e-12).all()) or not bool(b.isfinite().all())
