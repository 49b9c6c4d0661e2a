"""Convolutions and pools that read less of the future than the network's own, as the file says (``limited``)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from co3d_compile.contract.model_contract import Contract
from co3d_compile.errors import VerificationError
from co3d_compile.ir.node_reading import called, module_path, schema_of, spread
from co3d_compile.verification.time_claims import Arguments, Named

aten = torch.ops.aten
FLAT = 2  # weights have their output and input channels in front of the dims over which they slide


@dataclass(frozen=True)
class ReplacedKernel:
    """One of them.

    Args:
        node: Its name in the captured graph.
        module_path: Where it is in the network.
        time_dim: The dim of its operand that is time.
        later: Entries by which it reads everything later.
        dropped: Taps that it has not at its end.
        fold: Whether the weights of these are added to the last one that it has.
    """

    node: str
    module_path: str
    time_dim: int
    later: int
    dropped: int
    fold: bool

    def apply(self, n: Node, args: Arguments, kwargs: Named) -> Tensor:
        """Runs the operator as it is replaced, on tensors of any length."""
        names = [a.name for a in schema_of(n).arguments]
        given: dict[str, Any] = {a.name: a.default_value for a in schema_of(n).arguments}
        given |= dict(zip(names, args, strict=False)) | dict(kwargs)
        x: Tensor = given[names[0]]
        like = {k: torch.empty_like(v, device="meta") if isinstance(v, Tensor) else v for k, v in given.items()}
        entries = called(n.target)(*like.values()).shape[self.time_dim]
        dims = given["weight"].dim() - FLAT if "weight" in given else len(given["kernel_size"])
        axis = self.time_dim - (x.dim() - dims)
        pads = _pads(given, dims)
        front, back = pads[axis]
        # what is behind the clip's end is padding as before; the entries that it makes too many are cut off
        pads[axis] = (front + self.later, back)
        flat = [size for pad in reversed(pads) for size in pad]
        lowest = "max_pool" in names_of(n)
        counted = given.get("count_include_pad", True)
        if not counted:  # over space padding counts as little as before
            flat = [size for a in reversed(range(dims)) for size in (pads[a] if a == axis else (0, 0))]
        given[names[0]] = _filled(n, x, flat, (self.time_dim, *pads[axis]), -math.inf if lowest else 0.0)
        given["padding"] = [0 if counted or a == axis else pads[a][0] for a in range(dims)]
        self._shorten(given, axis, dims)
        result = _unpadded(n)(*given.values())
        return result.narrow(self.time_dim, 0, entries)

    def _shorten(self, given: dict[str, Any], axis: int, dims: int) -> None:
        """Leaves taps out at the end of the kernel."""
        if "weight" not in given:
            kernel = spread(given["kernel_size"], dims)
            given["stride"] = spread(given["stride"] or kernel, dims)
            given["kernel_size"] = [size - self.dropped * (a == axis) for a, size in enumerate(kernel)]
        elif self.dropped:
            weight, dim = given["weight"], FLAT + axis
            kept, rest = weight.split([weight.shape[dim] - self.dropped, self.dropped], dim)
            if self.fold:
                kept = kept.clone()
                kept.select(dim, -1).add_(rest.sum(dim))
            given["weight"] = kept


def _filled(n: Node, x: Tensor, flat: list[int], over_time: tuple[int, int, int], value: float) -> Tensor:
    """Adds to the operand what is read outside of it: over time, where a pad repeats its edges, the edge again."""
    source = n.args[0]
    dim, front, back = over_time
    if isinstance(source, Node) and "replication_pad" in names_of(source) and sum(flat) == front + back:
        parts = [x.narrow(dim, 0, 1)] * front + [x] + [x.narrow(dim, x.shape[dim] - 1, 1)] * back
        return torch.cat(parts, dim)
    return torch.constant_pad_nd(x, flat, value)


def names_of(n: Node) -> str:
    """Writes the operator of a node as text."""
    return str(n.target)


def _unpadded(n: Node) -> Any:
    """Writes the operator with its padding in numbers: ``conv3d.padding`` takes a word."""
    target: Any = n.target
    return target.overloadpacket.default if target._overloadname == "padding" else target


def _pads(given: Mapping[str, Any], dims: int) -> list[tuple[int, int]]:
    """Reads the padding in front and at the end of each dim."""
    padding = given["padding"]
    if not isinstance(padding, str):
        return [(size, size) for size in spread(padding, dims)]
    if padding == "valid":
        return [(0, 0)] * dims
    sizes = zip(given["weight"].shape[FLAT:], spread(given["dilation"], dims), strict=True)
    return [((k - 1) * d // 2, (k - 1) * d - (k - 1) * d // 2) for k, d in sizes]


def replaced_kernels(info: Contract) -> dict[str, ReplacedKernel]:
    """Reads what a file says of its kernels, by the name of their node in the captured graph.

    Raises:
        VerificationError: What it says is damaged.
    """
    fold = info.options.get("delay_by") == "fold"
    try:
        rows = [
            ReplacedKernel(
                str(row["node"]), str(row["module_path"]), int(row["time_dim"]), int(row["later"]),
                int(row["dropped"]), fold,
            )
            for row in info.options.get("limited", ())
        ]  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise VerificationError(
            f"What the file says of its kernels is damaged: {error!r}.", hint="Compile the model again."
        ) from error
    return {row.node: row for row in rows}


def check_places(kernels: Mapping[str, ReplacedKernel], nodes: Mapping[str, Node]) -> None:
    """Checks that the kernels of a file are there in a captured graph.

    Raises:
        VerificationError: One is not: the file was compiled from another network.
    """
    for name, kernel in kernels.items():
        if name not in nodes or module_path(nodes[name]) != kernel.module_path:
            raise VerificationError(
                f"The file says that {name} in {kernel.module_path or 'the model'} reads less of the future, and the "
                "network has no such operator.",
                hint="Give the network that it was compiled from.",
            )
