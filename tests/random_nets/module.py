"""The module that a description stands for, and the same module in the two ways the oracle needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.gates import newest_max, newest_mean

from .describe import Net, Op

CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
AVERAGE: dict[int, Any] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
MAXIMUM: dict[int, Any] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
NORM: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
ADAPTIVE: dict[int, Any] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "relu": F.relu, "sigmoid": torch.sigmoid, "hardswish": F.hardswish,
}  # fmt: skip


class RandomNet(nn.Module):
    """A description as a module: takes (N, C, T, ...), or with time elsewhere, and returns one tensor or a tuple."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net
        self.gate_lengths: dict[int, int] | None = None  # set in the oracle's copy: entries that each gate pools
        self.probe = False  # set in the copy that is perturbed: every tap counts, nothing saturates
        channels = [f.channels for f in net.flows()]
        for i, op in enumerate(net.ops):
            layer = _layer(net, op, channels[op.inputs[0]])
            if layer is not None:
                self.add_module(f"op{i}", layer)

    def forward(self, x: Tensor) -> Any:
        tensors = self.tensors(x)
        results = []
        for k, out in enumerate(self.net.outputs):
            y = tensors[out.tensor]
            results.append(self.head(k)(y) if out.head else self.restored(y))
        return results[0] if len(results) == 1 else tuple(results)

    def trunk(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the outputs are made of, with a time axis."""
        tensors = self.tensors(x)
        return tuple(tensors[o.tensor] if o.head else self.restored(tensors[o.tensor]) for o in self.net.outputs)

    def tensors(self, x: Tensor) -> list[Tensor]:
        """All tensors that are used; unused ones are the input."""
        tensors = [x.movedim(self.net.time_dim, 2)]
        used = set(self.net.used())
        for i, op in enumerate(self.net.ops):
            done = self.apply_op(i, op, *(tensors[k] for k in op.inputs)) if i + 1 in used else tensors[0]
            tensors.append(done)
        return tensors

    def restored(self, x: Tensor) -> Tensor:
        return x.movedim(2, self.net.time_dim) if self.net.restore else x

    def head(self, k: int) -> Callable[[Tensor], Tensor]:
        kind = self.net.outputs[k].head
        dims = tuple(range(2, 2 + self.net.dims))
        if kind == "mean":
            return lambda x: x.mean(dims)
        if kind == "amax" and not self.probe:
            return lambda x: x.amax(dims)
        if kind == "adaptive":
            return lambda x: ADAPTIVE[self.net.dims](x, 1).flatten(1)
        if kind == "std" and not self.probe:
            return lambda x: x.std(dims)
        return lambda x: x.sum(2)

    def apply_op(self, i: int, op: Op, x: Tensor, *more: Tensor) -> Tensor:
        layer = getattr(self, f"op{op.args.get('share', i)}", None)
        if op.kind in ("average", "maximum"):
            return self._pool(op, layer, x)
        if op.kind in ("add", "mul", "cat", "larger"):
            return self._join(op.kind, x, *more)
        if op.kind == "gate":
            # Bounded: ONNX Runtime's Sigmoid is right to 1e-7, which is much of what an almost closed gate lets pass.
            return x * torch.sigmoid(F.softsign(layer(self._squeeze(i, op["pool"], x))))  # type: ignore[misc]
        if op.kind == "project":
            return layer(x.movedim(1, -1)).movedim(-1, 1)  # type: ignore[misc]
        if op.kind == "fold":
            n, c, t, *space = x.shape
            y = layer(x.transpose(1, 2).reshape(n * t, c, *space))  # type: ignore[misc]
            return y.reshape(n, t, c, *space).transpose(1, 2)
        if op.kind == "conv" and op["causal"]:
            x = F.pad(x, (*(0, 0) * (x.dim() - 3), (op["k"] - 1) * op["d"], 0))
        if layer is not None:
            return layer(x)
        return self._moved(op, x)

    def _moved(self, op: Op, x: Tensor) -> Tensor:
        """Operators without weights."""
        if op.kind == "crop":
            return x[:, :, op["a"] : x.shape[2] - op["b"]]
        if op.kind == "slice":
            return x[:, :, op["a"] :: op["s"]]
        if op.kind == "pad":
            return F.pad(x, (*(0, 0) * (x.dim() - 3), op["a"], op["b"]), value=op["value"])
        if op.kind == "front":
            return torch.cat([x.new_zeros(x.shape[0], x.shape[1], op["a"], *x.shape[3:]), x], 2)
        if op.kind == "act":
            return F.leaky_relu(x, 0.3) if self.probe else ACTS[op["name"]](x)
        scale = (float(op["r"]), *(1.0,) * (self.net.dims - 1))
        mode = "nearest" if op.kind == "nearest" else LINEAR[self.net.dims]
        return F.interpolate(x, scale_factor=scale, mode=mode)

    def _pool(self, op: Op, layer: Any, x: Tensor) -> Tensor:
        if not self.probe or op.kind == "average":
            return layer(x)
        c, dims = x.shape[1], self.net.dims - 1
        weight = torch.linspace(0.5, 1.0, op["k"], dtype=x.dtype).view(1, 1, -1, *(1,) * dims)
        weight = weight.expand(c, 1, op["k"], *(op["space"],) * dims)
        conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[self.net.dims]
        entries = layer(x).shape[2]  # in ceil mode the last may reach beyond the clip
        missing = (entries - 1) * op["s"] + (op["k"] - 1) * op["d"] + 1 - 2 * op["p"] - x.shape[2]
        x = F.pad(x, (*(0, 0) * dims, 0, max(0, missing)))
        geometry = [[op[name], *(rest,) * dims] for name, rest in (("s", 1), ("p", op["space"] // 2), ("d", 1))]
        return conv(x, weight, None, *geometry, c)[:, :, :entries]

    def _join(self, kind: str, x: Tensor, y: Tensor) -> Tensor:
        length = min(x.shape[2], y.shape[2])
        x, y = x[:, :, :length], y[:, :, :length]
        if kind == "cat":
            return torch.cat([x, y], 1)
        if kind == "mul":
            return x * torch.sigmoid(y)
        return torch.maximum(x, y) if kind == "larger" and not self.probe else x + y

    def _squeeze(self, i: int, pool: str, x: Tensor) -> Tensor:
        space = tuple(range(3, x.dim()))
        dims = (2, *space)
        if self.gate_lengths is None:
            if pool == "adaptive":
                return ADAPTIVE[self.net.dims](x, 1)
            return x.amax(dims, True) if pool == "amax" else x.mean(dims, True)
        length = self.gate_lengths[i]
        if pool == "amax" and not self.probe:
            return newest_max(x.amax(space, True) if space else x, length)
        return newest_mean(x.mean(space, True) if space else x, length)


def _layer(net: Net, op: Op, channels: int) -> nn.Module | None:
    """The layer of an op, if it has one of its own."""
    dims, rest = net.dims, net.dims - 1
    if op.kind == "conv" and "share" not in op.args:
        space = op["space"]
        pad = 0 if op["causal"] else op["p"]
        return CONV[dims](
            channels, op["out"], (op["k"], *(space,) * rest), (op["s"], *(1,) * rest), (pad, *(space // 2,) * rest),
            (op["d"], *(1,) * rest), op["groups"],
        )  # fmt: skip
    if op.kind == "transposed":
        ones, zeros = (1,) * rest, (0,) * rest
        return TRANSPOSED[dims](
            channels, op["out"], (op["k"], *ones), (op["s"], *ones), (op["p"], *zeros), (op["more"], *zeros),
            op["groups"], True, (op["d"], *ones),
        )  # fmt: skip
    if op.kind in ("average", "maximum"):
        geometry = [
            (op[name], *(sizes,) * rest) for name, sizes in (("k", op["space"]), ("s", 1), ("p", op["space"] // 2))
        ]
        if op.kind == "average":
            return AVERAGE[dims](*geometry, op["ceil"], op["count"])
        return MAXIMUM[dims](*geometry, (op["d"], *(1,) * rest), False, op["ceil"])
    if op.kind == "gate":
        return CONV[dims](channels, channels, 1)
    if op.kind == "fold":
        return CONV[max(1, rest)](channels, channels, 1 if net.size == 1 else 3, 1, net.size // 2)
    if op.kind == "project":
        return nn.Linear(channels, channels)
    return NORM[dims](channels) if op.kind == "norm" else None
