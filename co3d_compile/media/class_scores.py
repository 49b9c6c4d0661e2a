"""From an output of a model to scores of classes with names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from co3d_compile.contract.model_contract import Contract, OutputSpec
from co3d_compile.errors import UnsupportedError, UsageError
from co3d_compile.media.class_labels import clean_labels
from co3d_compile.support.plain_types import Array
from co3d_compile.support.readable_numbers import did_you_mean

ACTIVATIONS = ("auto", "softmax", "sigmoid", "none")


@dataclass(frozen=True)
class Ranked:
    """One class of a result: its number, its name (the number, if names are not known) and its score."""

    index: int
    label: str
    score: float

    def to_dict(self) -> dict[str, int | str | float]:
        """Writes the class as JSON data."""
        return {"class": self.index, "label": self.label, "score": self.score}


def best_classes(scores: npt.NDArray[np.float32], labels: Sequence[str], count: int) -> list[Ranked]:
    """Ranks the classes with the highest scores, best first."""
    order = [int(index) for index in np.argsort(-scores, kind="stable")[:count]]
    return [Ranked(index, label_of(labels, index), float(scores[index])) for index in order]


def label_of(labels: Sequence[str], index: int) -> str:
    """Names a class; by its number where it has no name."""
    return labels[index] if index < len(labels) else str(index)


def find_class(name: str | int, count: int, labels: Sequence[str]) -> int:
    """Finds the number of a class that is given by its name or number.

    Raises:
        UsageError: There is none.
    """
    if name in labels:
        return labels.index(str(name))
    if str(name).isascii() and str(name).isdigit() and int(name) < count:
        return int(name)
    some = f", such as {', '.join(labels[:3])}" if labels else ""
    hint = did_you_mean(str(name), labels) or f"It has {count} classes{some}."
    raise UsageError(f"The model has no class {name!r}.", hint=hint)


class ClassScores:
    """A reader of one output as scores of classes.

    Args:
        output: Name of the output. Default: the first.
        labels: Names of the classes. Default: those in the file.
        activation: What makes probabilities of it: "softmax", "sigmoid" or "none"; "auto": none if the first result is
            a distribution already, else softmax (sigmoid for a single class).

    Attributes:
        index, spec: Which output it is.
        labels: Names of the classes; empty if not known.

    Raises:
        UnsupportedError: The output is no list of class scores. UsageError: What is given does not fit the model.
    """

    def __init__(
        self,
        info: Contract,
        output: str | None = None,
        labels: Sequence[str] | None = None,
        activation: str = "auto",
    ) -> None:
        if activation not in ACTIVATIONS:
            raise UsageError(f"activation is {activation!r}, not one of {', '.join(ACTIVATIONS)}.")
        self.index = _find_output(info, output)
        self.spec = info.outputs[self.index]
        self.classes = _class_count(self.spec)
        self.labels = clean_labels(labels if labels is not None else info.labels or ())
        if self.labels and len(self.labels) != self.classes:
            whose = "Given" if labels is not None else "The file has"
            raise UsageError(f"{whose} {len(self.labels)} labels, but the model has {self.classes} classes.")
        self._activation = activation

    def entries(self, values: Array) -> Array:
        """Takes (entries, …) of the one stream from an output's values, oldest first."""
        if self.spec.time_dim is None or self.spec.entries_per_step <= 1:
            return values[None]
        return np.moveaxis(values, self.spec.time_dim, 0)

    def of(self, entries: Array) -> npt.NDArray[np.float32]:
        """Computes entries as (entries, classes), probabilities."""
        values = entries.reshape(len(entries), self.classes).astype(np.float32)
        if self._activation == "auto":
            self._activation = _guess_activation(values)
        if self._activation == "softmax":
            powers = np.exp(values - values.max(axis=1, keepdims=True))
            return np.asarray(powers / powers.sum(axis=1, keepdims=True), np.float32)
        if self._activation == "sigmoid":
            return np.asarray(1 / (1 + np.exp(-np.clip(values, -80, 80))), np.float32)
        return values


def _find_output(info: Contract, name: str | None) -> int:
    names = [output.name for output in info.outputs]
    if name is None:
        return 0
    if name not in names:
        raise UsageError(f"The model has no output '{name}'.", hint=f"It has {', '.join(names)}.")
    return names.index(name)


def _class_count(spec: OutputSpec) -> int:
    """Counts the classes of an output of class scores, one list of them per entry."""
    has_entries = spec.time_dim is not None and spec.entries_per_step > 1
    dims = [d for at, d in enumerate(spec.shape) if not (has_entries and at == spec.time_dim) and d not in ("N", 1)]
    if len(dims) > 1:
        raise UnsupportedError(
            f"Output '{spec.name}' of shape {list(spec.shape)} is no list of class scores.",
            hint="Use StreamSession, which returns arrays of any kind, or choose another output.",
        )
    return int(dims[0]) if dims else 1


def _guess_activation(values: Array) -> str:
    if values.shape[1] == 1:
        return "none" if values.min() >= 0 and values.max() <= 1 else "sigmoid"
    spread = values.min() >= 0 and np.allclose(values.sum(axis=1), 1, atol=1e-3)
    return "none" if spread else "softmax"
