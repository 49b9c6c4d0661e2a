"""Whether a file can have been compiled from a model: both take the same tensors, by order, shape, kind and time.

Names do not count: an archive, a TorchScript file and the module that both were made from call one input differently.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from co3d_compile.contract.model_contract import Contract, InputSpec
from co3d_compile.errors import UsageError
from co3d_compile.support.readable_numbers import plural

Dims = list[int | str]


def check_inputs(info: Contract, clip: Sequence[Tensor]) -> None:
    """Compares what the file takes with one clip for the model.

    Raises:
        UsageError: They differ; the message says what each takes.
    """
    dims = [spec.time_dim for spec in info.inputs] + [None] * len(clip)
    model = _shapes([list(x.shape) for x in clip], dims)
    file = _shapes([_as_clip(spec) for spec in info.inputs], dims)
    kinds = [str(x.dtype).removeprefix("torch.") for x in clip]
    dtypes = [spec.dtype for spec in info.inputs]
    if (file, dtypes) != (model, kinds):
        raise _other_model("takes", _text(file, dtypes), _text(model, kinds))


def check_outputs(info: Contract, count: int) -> None:
    """Raises UsageError if the model has not as many outputs as the file."""
    if count != len(info.outputs):
        raise _other_model("has", plural(len(info.outputs), "output"), plural(count, "output"))


def _other_model(verb: str, file: str, model: str) -> UsageError:
    return UsageError(f"The file was not compiled from this model: it {verb} {file}, the model {model}.")


def _as_clip(spec: InputSpec) -> Dims:
    """Adds the time dim that is gone at one frame per step."""
    dims: Dims = list(spec.shape)
    if spec.time_dim is not None and spec.frames_per_step == 1:
        dims.insert(spec.time_dim, 1)
    return dims


def _shapes(shapes: list[Dims], time_dims: Sequence[int | None]) -> list[Dims]:
    """Opens the batch, which is the session's affair, and time.

    A clip has 1, 2, … times T frames, as the window has.
    """
    timed = [d if d is not None and d < len(s) else None for s, d in zip(shapes, time_dims, strict=False)]
    least = min((int(s[d]) for s, d in zip(shapes, timed, strict=True) if d is not None), default=1)

    def size(shape: Dims, d: int, time: int | None) -> int | str:
        if d == time:
            return f"{int(shape[d]) / least:g}T".removeprefix("1T") or "T"
        return "N" if d == 0 else shape[d]

    return [[size(shape, d, time) for d in range(len(shape))] for shape, time in zip(shapes, timed, strict=True)]


def _text(shapes: list[Dims], kinds: list[str]) -> str:
    texts = [f"({', '.join(map(str, dims))}) {kind}" for dims, kind in zip(shapes, kinds, strict=True)]
    return " and ".join(texts) or "nothing"
