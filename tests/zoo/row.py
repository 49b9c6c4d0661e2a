"""A real network in two sizes: the same code with fewer channels, blocks and pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import Entry, Expect, MakeReference, Shape, randomise


@dataclass(frozen=True)
class Real:
    """A real network in two sizes.

    Attributes:
        name: what tests and reports call it.
        factory: `factory(small)` builds the plain module.
        shapes: clip shapes at full size.
        small_shapes: clip shapes of the small variant.
        reference: how it runs untouched (`Entry.reference`).
        gain: scale of the batch norms' weights (`randomise`).
    """

    name: str
    factory: Callable[[bool], nn.Module]
    shapes: tuple[Shape, ...]
    small_shapes: tuple[Shape, ...]
    reference: MakeReference
    expect: Expect = "window"
    as_list: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    gain: float = 1.0
    _entries: dict[bool, Entry] = field(default_factory=dict, compare=False)

    def entry(self, small: bool = True) -> Entry:
        """The network as a zoo entry, the same one each time."""
        return self._entries.setdefault(small, self._entry(small))

    def _entry(self, small: bool) -> Entry:
        shapes = self.small_shapes if small else self.shapes
        return Entry(
            self.name + ("-small" if small else ""),
            lambda: self.build(small),
            shapes,
            self.expect,
            options=self.options,
            reference=self.reference,
            as_list=self.as_list,
        )

    def build(self, small: bool = True) -> nn.Module:
        """The seeded module in eval mode."""
        torch.manual_seed(0)
        shapes = self.small_shapes if small else self.shapes
        generator = torch.Generator().manual_seed(5)
        shapes = (_longer(shapes[0]),) if len(shapes) == 1 else shapes  # several inputs keep their ratio
        clips = [torch.randn(shape, generator=generator) for shape in shapes]
        examples = [clips] if self.as_list else clips
        return _temper(randomise(self.factory(small), *examples, gain=self.gain), examples)


def _longer(shape: Shape) -> Shape:
    """A clip of few frames is mostly padding: norms calibrated on it let the values of a stream grow out of bounds."""
    batch, channels, frames, *space = shape
    return (batch, channels, frames if frames >= 8 else 16, *space)


def _temper(model: Any, examples: list[Any]) -> nn.Module:
    """Scales the projection in front of a softmax: a saturated output would hide every error."""
    head: Any = model.blocks[-1] if hasattr(model, "blocks") else None
    if not isinstance(getattr(head, "activation", None), nn.Softmax):
        return model
    logits: list[Tensor] = []
    hook = head.proj.register_forward_hook(lambda module, args, output: logits.append(output))
    with torch.no_grad():
        model(*examples)
        spread = logits[0].std()
        head.proj.weight /= spread
        head.proj.bias /= spread
    hook.remove()
    return model
