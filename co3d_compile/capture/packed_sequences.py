"""Sequences that a network packs by their lengths: packed, those as long as the clip are the clip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from co3d_compile.capture.known_constants import Args, ConstantsKnown, Kwargs
from co3d_compile.errors import CaptureError

LAYERS = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
HINT = (
    "A stream has no lengths: call the layer on the sequence as it is, or make the lengths a constant, each that of "
    "the clip (torch.full((x.shape[0],), x.shape[1]))."
)


class PackedSequences(TorchFunctionMode):
    """A mode in which sequences as long as the clip are packed as (frames x clips, features), which can be traced.

    Their order by length is the one that they have.
    """

    def __init__(self, constants: ConstantsKnown) -> None:
        super().__init__()
        self._constants = constants
        self._clips = WeakIdKeyDictionary()  # how many there are, by the sizes of the batch that packing gave

    def __torch_function__(
        self, func: Callable[..., Any], types: Args, args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        """Runs a call; one that packs, or takes what is packed, as a view of the clip."""
        given: list[Any] = list(args)
        named: dict[str, Any] = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if torch._C._meta_in_tls_dispatch_include():  # inside the tracer, which computes shapes
            return func(*given, **named)
        if name == "_pack_padded_sequence":
            return self._packed(*given, **named)
        sizes = next((t for t in given[:2] if isinstance(t, Tensor) and t in self._clips), None)
        if name == "index_select" and len(given) == 3 and self._in_order(*given):
            return given[0]
        if sizes is None:
            return func(*given, **named)
        frames, clips = sizes.shape[0], self._clips[sizes]
        if name == "__getitem__" and given[1] == 0:
            return clips
        if name == "_pad_packed_sequence":
            return _padded(given[0].unflatten(0, (frames, clips)), *given[2:], **named)
        if name in LAYERS:
            sequence, *last = func(given[0].unflatten(0, (frames, clips)), *given[2:], False, **named)
            return (sequence.flatten(0, 1), *last)
        return func(*given, **named)

    def _packed(self, x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
        """Puts the frames in the order of time, and counts how many clips have each.

        Raises:
            CaptureError: The lengths depend on an input, or some are shorter than the clip.
        """
        known = self._constants.numbers(lengths)
        x = x.transpose(0, 1) if batch_first else x
        if known is None or set(known) != {x.shape[0]}:
            what = "lengths that depend on an input" if known is None else "lengths that are not that of the clip"
            raise CaptureError(f"The model packs sequences by {what} (pack_padded_sequence).", hint=HINT)
        sizes = torch.full((x.shape[0],), x.shape[1])
        self._clips[sizes] = x.shape[1]
        return x.flatten(0, 1), sizes

    def _in_order(self, x: Tensor, dim: int, index: Tensor) -> bool:
        """Says whether all of a dim is selected, each entry where it is."""
        return self._constants.numbers(index) == list(range(x.shape[dim]))


def _padded(x: Tensor, batch_first: bool, value: float, length: int) -> tuple[Tensor, Tensor]:
    """Pads the sequences with ``value`` behind them, and measures their lengths."""
    lengths = torch.full((x.shape[1],), x.shape[0])
    x = F.pad(x, [0, 0] * (x.dim() - 1) + [0, length - x.shape[0]], value=value) if length > x.shape[0] else x
    return x.transpose(0, 1) if batch_first else x, lengths
