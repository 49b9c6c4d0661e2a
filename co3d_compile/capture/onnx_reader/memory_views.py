"""Views of memory, which an exporter writes as indices into all entries of a tensor, as reshapes again."""

from __future__ import annotations

from math import prod

import numpy as np
import onnx_ir as ir


def reshape_views(graph: ir.Graph) -> None:
    """Rewrites ``Gather(Reshape(x, [-1]), indices)`` to ``Reshape(x, shape)``, where ``indices`` count all entries."""
    for node in list(graph):
        source, shape = _viewed(node)
        if source is None:
            continue
        name = f"{node.outputs[0].name}.shape"
        value = ir.Value(name=name, const_value=ir.tensor(np.array(shape, np.int64), name=name))
        graph.register_initializer(value)
        node.replace_input_with(0, source)
        node.replace_input_with(1, value)
        node.op_type = "Reshape"
        node.attributes.clear()


def _viewed(node: ir.Node) -> tuple[ir.Value | None, tuple[int, ...]]:
    """Finds the tensor that a node takes all entries of, in their order, and the shape that it gives them."""
    nothing = None, ()
    if node.op_type != "Gather" or len(node.inputs) != 2:
        return nothing
    axis, (flat, indices) = node.attributes.get("axis"), node.inputs
    if (axis is not None and axis.as_int() != 0) or indices is None or indices.const_value is None or flat is None:
        return nothing
    before = flat.producer()
    if before is None or before.op_type != "Reshape" or len(before.inputs) != 2 or before.inputs[0] is None:
        return nothing
    target, source = before.inputs[1], before.inputs[0]
    places = indices.const_value.numpy()
    is_flat = target is not None and target.const_value is not None and target.const_value.numpy().tolist() == [-1]
    sizes = list(source.shape) if source.shape is not None else [None]
    known = [int(s) for s in sizes if isinstance(s, int)]
    if not is_flat or len(known) != len(sizes) or prod(known) != places.size or not places.ndim:
        return nothing
    return (source, places.shape) if bool((places.reshape(-1) == np.arange(places.size)).all()) else nothing
