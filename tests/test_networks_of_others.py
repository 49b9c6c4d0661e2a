"""Networks as people hand them over: results in a dataclass, lazy layers, wrappers, arguments by keyword."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from marks import all_but
from torch import Tensor, nn

import co3d_compile as co3d
from co3d_compile.verification.verify_model import verify


@dataclass
class Scores:
    """What many code bases return: a record of tensors, some of them left out."""

    logits: Tensor
    features: Tensor | None = None


class Shifted(nn.Module):
    """A temporal shift on frames that are folded into the batch, with sizes that Python computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        n, c, t, h, w = x.shape
        y = torch.relu(self.first(x.transpose(1, 2).reshape(n * t, c, h, w)))
        frames = y.view(y.size(0) // 8, 8, *y.shape[1:])
        shifted = torch.zeros_like(frames)
        shifted[:, 1:, :2], shifted[:, :, 2:] = frames[:, :-1, :2], frames[:, :, 2:]
        return self.fc(self.second(shifted.view_as(y)).mean((2, 3)).view(n, t, -1)).mean(1)


class Late(nn.Module):
    """A mask that is made at the first call, and kept."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv3d(3, 4, 3, padding=1), nn.LazyLinear(2)
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = torch.linspace(0.5, 1.5, x.shape[-1])
        return self.head((self.conv(x) * self.mask).mean((2, 3, 4)))


class Recorded(nn.Module):
    """A network that returns a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Scores:
        features = self.conv(x)
        return Scores(features.mean((2, 3, 4)), features)


class Padded(nn.Module):
    """A mask of the frames that there are, in the dtype of what it is for: it reads nothing of that."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(3, 4, 3, padding=1), nn.Conv3d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        missing = torch.zeros(x.shape[0], 1, x.shape[2], 1, 1, dtype=torch.bool)
        away = missing.type_as(y).masked_fill(missing, -1e4)
        return self.second(y + away.view(-1, x.shape[2] // 2, 2).flatten(1)[:, None, :, None, None])


class HeadsInFront(nn.Module):
    """Attention over the places of each frame, its heads joined along the batch, as the Set Transformer has them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.all, self.out = nn.Conv3d(3, 8, 3, padding=1), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).permute(0, 2, 3, 4, 1)
        rows = y.flatten(0, 1).flatten(1, 2)
        q, k, v = (torch.cat(part.chunk(2, -1), 0) for part in self.all(rows).split(8, -1))
        heads = (q @ k.mT / 2).softmax(-1) @ v
        result: Tensor = self.out(torch.cat(heads.split(len(rows), 0), -1)).view_as(y)
        return result


class InTurn(nn.Module):
    """Every second frame goes through a branch of its own; the results are listed in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.even, self.odd = nn.Conv3d(3, 4, 3, padding=1), nn.Conv3d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        branches = self.even(x[:, :, ::2]).movedim(2, 0), self.odd(x[:, :, 1::2]).unbind(2)
        return torch.stack([frame for even, odd in zip(*branches, strict=True) for frame in (even, odd.sigmoid())], 2)


class InParts(nn.Module):
    """Layers of which PyTorch's core operators have several results."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.MaxPool3d(3, 1, 1), nn.BatchNorm3d(8))
        self.norm, self.linear, self.pool = nn.LayerNorm(8), nn.Linear(8, 6), nn.AdaptiveMaxPool3d((None, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.norm(self.front(x).movedim(1, -1))).movedim(-1, 1)
        return self.pool(y).flatten(2)


class Asked(nn.Module):
    """A learned query that the network repeats for its batch, and that attends to the places of each frame."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.query = nn.Conv3d(3, 4, 3, padding=1), nn.Parameter(torch.randn(1, 1, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).permute(0, 2, 3, 4, 1)
        query = self.query.repeat(x.shape[0], 1, 1)
        asked = [self.attention(query, frame, frame)[0] for frame in y.flatten(2, 3).unbind(1)]
        return torch.cat(asked, 1)


class CopiedAsObjects(nn.Module):
    """A network that copies tensors as Python copies objects, as those for sign language do with lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lengths = nn.Conv3d(3, 4, 3, padding=1), torch.tensor([8.0])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y, lengths = copy.deepcopy(self.conv(x)), copy.deepcopy(self.lengths)
        lengths -= 2
        return {"scores": copy.copy(y) * 2, "lengths": lengths}


class Sized(nn.Module):
    """Operators whose parts in PyTorch read the sizes of a clip: a pool, a recurrent layer, a sum over named dims."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv3d(3, 4, 3, padding=1), nn.AdaptiveAvgPool3d((None, 1, 1))
        self.rnn, self.out = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.rnn(self.pool(self.conv(x)).flatten(2).transpose(1, 2))[0]
        return torch.einsum("ntc,dc->ndt", y, self.out.weight)


def for_any_batch(model: nn.Module) -> torch.export.ExportedProgram:
    """Exports a network with an open batch, as a server has it."""
    clips = torch.randn(2, *VIDEO[1:])
    return torch.export.export(model.eval(), (clips,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))


VIDEO = (1, 3, 8, 6, 6)
CLOTHES: dict[str, Callable[[], Any]] = {
    "scripted": lambda: torch.jit.script(nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.ReLU()).eval()),
    "traced": lambda: torch.jit.trace(Shifted().eval(), torch.randn(VIDEO)),
    "traced, with sizes": lambda: torch.jit.trace(Sized().eval(), torch.randn(VIDEO)),
    "frozen": lambda: torch.jit.freeze(torch.jit.trace(Sized().eval(), torch.randn(VIDEO))),
    "exported for any batch": lambda: for_any_batch(Sized()),
    "module of an exported program": lambda: torch.export.export(Shifted().eval(), (torch.randn(VIDEO),)).module(),
    "decomposed": lambda: torch.export.export(InParts().eval(), (torch.randn(VIDEO),)).run_decompositions(),
    "decomposed, with group norms": lambda: torch.export.export(
        nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Conv3d(4, 4, 3, padding=1)).eval(),
        (torch.randn(VIDEO),),
    ).run_decompositions(),
    "made at the first call": lambda: Late().eval(),
    "a dataclass": lambda: Recorded().eval(),
    "every second frame, in turn": lambda: InTurn().eval(),
    "heads in front of the batch": lambda: HeadsInFront().eval(),
    "a mask in the dtype of a stream": lambda: Padded().eval(),
    "a learned query, repeated": lambda: Asked().eval(),
    "tensors copied as objects": lambda: CopiedAsObjects().eval(),
}


@pytest.mark.parametrize("name", all_but(CLOTHES, "traced, with sizes", "exported for any batch", "decomposed"))
def test_networks_in_the_clothes_that_people_give_them(name: str) -> None:
    torch.manual_seed(0)
    model, clip = CLOTHES[name](), (torch.randn(VIDEO),)
    compiled = co3d.compile(model, clip)
    assert not compiled.info.recomputed and compiled.info.inputs[0].shape[0] == "N"
    result = verify(compiled, model, clip)
    assert result.passed, result.reason


@pytest.mark.parametrize(
    ("changed", "says"),
    [(lambda x: x.half(), "is torch.float16"), (lambda x: x.to("meta"), "is on the device meta")],
    ids=["half precision", "another device"],
)
def test_weights_that_no_runtime_computes_with_are_named(changed: Callable[[Any], Any], says: str) -> None:
    with pytest.raises(co3d.CaptureError, match=rf"The parameter weight {says}"):
        co3d.compile(changed(nn.Conv3d(3, 4, 3)).eval(), (changed(torch.zeros(VIDEO)),))


def test_fields_of_a_dataclass_name_the_outputs() -> None:
    compiled = co3d.compile(Recorded().eval(), (torch.randn(VIDEO),))
    assert [output.name for output in compiled.info.outputs] == ["logits", "features"]


def test_what_is_made_at_the_first_call_stays_usable() -> None:
    model, clip = Late().eval(), torch.randn(VIDEO)
    co3d.compile(model, (clip,))
    assert model(clip).shape == (1, 2), "no stand-in of the tracer is left in the model"


class ByKeyword(nn.Module):
    """A network that takes a second clip by keyword alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 3, padding=1)

    def forward(self, x: Tensor, *, beside: Tensor, scale: Tensor | None = None) -> Tensor:
        result: Tensor = self.conv(x) + self.conv(beside)
        return result if scale is None else result * scale


def test_arguments_by_keyword_alone() -> None:
    model, clip, more = ByKeyword().eval(), (torch.randn(VIDEO),), {"beside": torch.randn(VIDEO)}
    compiled = co3d.compile(model, clip, example_kwargs=more)
    assert [spec.name for spec in compiled.info.inputs] == ["x", "beside"] and compiled.program.step.fixed_batch is None
    result = verify(compiled, torch.export.export(model, clip, more))
    assert result.passed, result.reason
