"""Triton's sequence batcher as its documentation describes it, around a model in ONNX Runtime.

States live outside of the model, one set per correlation id, from ``initial_state`` at the start flag until the end
flag. "oldest" batches the oldest requests of different sequences; "direct" gives each sequence a slot of the batch for
as long as it lasts, and fills slots without a request with nulls.
"""

from __future__ import annotations

import math
import re
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

REPEATED = {"input", "output", "state", "dims", "parameters", "instance_group"}
TOKEN = re.compile(r'\s*(?:#[^\n]*\n\s*)*("(?:[^"\\]|\\.)*"|[\w.+-]+|[{}:])')
DTYPES = {"FP16": "float16", "FP32": "float32", "FP64": "float64", "BOOL": "bool"}


def parse(text: str) -> dict[str, Any]:
    """The text format of protobuf, as far as a model configuration needs it."""
    words = deque(TOKEN.findall(text))

    def message() -> dict[str, Any]:
        found: dict[str, Any] = {}
        while words and words[0] != "}":
            key = words.popleft()
            if words.popleft() == "{":
                value: Any = message()
                assert words.popleft() == "}"
            else:
                word = words.popleft()
                value = word[1:-1] if word[0] == '"' else int(word) if word.isdigit() else word
            if key in REPEATED:
                found.setdefault(key, []).append(value)
            else:
                assert key not in found, key
                found[key] = value
        return found

    result = message()
    assert not words
    return result


@dataclass
class Request:
    """What a client sends: the inputs have a batch of one."""

    sequence: int
    start: bool
    end: bool
    inputs: dict[str, Any]


class Server:
    """One instance of a model in a repository."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = parse((folder / "config.pbtxt").read_text())
        self.batching = {"state": [], **self.config.get("sequence_batching", {})}  # without states: any batches
        self.model = ort.InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])
        self.slots: list[int | None] = [None] * max(1, self.config["max_batch_size"])
        self.states: dict[int, dict[str, Any]] = {}
        self.waiting: deque[Request] = deque()
        self.sizes: list[int] = []

    def send(self, request: Request) -> None:
        """Puts a request in the queue, checked as the server checks it."""
        batched = self.config["max_batch_size"] > 0
        assert {item["name"] for item in self.config["input"]} == set(request.inputs)
        for item in self.config["input"]:
            value = request.inputs[item["name"]]
            assert value.dtype == dtype(item) and list(value.shape) == [1] * batched + item["dims"]
        self.waiting.append(request)

    def work(self) -> list[tuple[Request, dict[str, Any]]]:
        """Runs one batch; the requests in it with their results."""
        batch = self._direct() if "direct" in self.batching else self._oldest()
        if not any(batch):
            return []
        for request in batch:
            if request is not None:
                self.waiting.remove(request)
                assert request.start or request.sequence in self.states, "no sequence has started"
                if request.start:
                    self.states[request.sequence] = self._initial()
        self.sizes.append(len(batch))
        return self._run(batch)

    def _oldest(self) -> list[Request | None]:
        chosen: dict[int, Request] = {}
        for request in self.waiting:
            chosen.setdefault(request.sequence, request)
        limit = self.batching.get("oldest")
        assert limit is None or len(self.states) <= limit["max_candidate_sequences"]
        return list(chosen.values())[: len(self.slots)]

    def _direct(self) -> list[Request | None]:
        batch: list[Request | None] = [None] * len(self.slots)
        for request in self.waiting:
            if request.start and request.sequence not in self.slots and None in self.slots:
                self.slots[self.slots.index(None)] = request.sequence
            if request.sequence in self.slots:
                slot = self.slots.index(request.sequence)
                batch[slot] = batch[slot] or request
        while batch and batch[-1] is None:
            batch.pop()
        return batch

    def _run(self, batch: list[Request | None]) -> list[tuple[Request, dict[str, Any]]]:
        def joined(rows: list[Any]) -> Any:
            some = next(row for row in rows if row is not None)
            return np.concatenate([np.zeros_like(some) if row is None else row for row in rows])

        given = {
            name: joined([r.inputs[name] if r else None for r in batch])
            for name in (item["name"] for item in self.config["input"])
        }
        for state in self.batching["state"]:
            name = state["input_name"]
            given[name] = joined([self.states[r.sequence][name] if r else None for r in batch])
        names = [item["name"] for item in self.config["output"]] + [s["output_name"] for s in self.batching["state"]]
        values = dict(zip(names, self.model.run(names, given), strict=True))
        results = []
        for row, request in enumerate(batch):
            if request is None:
                continue
            for state in self.batching["state"]:
                self.states[request.sequence][state["input_name"]] = values[state["output_name"]][row : row + 1]
            results.append((request, {o["name"]: values[o["name"]][row : row + 1] for o in self.config["output"]}))
            if request.end:
                del self.states[request.sequence]
                self.slots = [None if each == request.sequence else each for each in self.slots]
        return results

    def _initial(self) -> dict[str, Any]:
        batched = self.config["max_batch_size"] > 0
        values = {}
        for state in self.batching["state"]:
            initial = state["initial_state"]
            assert (initial["data_type"], initial["dims"]) == (state["data_type"], state["dims"])
            shape = [1] * batched + initial["dims"]
            if initial.get("zero_data") == "true":
                values[state["input_name"]] = np.zeros(shape, dtype(state))
            else:
                path = self.folder / "initial_state" / initial["data_file"]
                values[state["input_name"]] = np.fromfile(path, dtype(state)).reshape(shape)
                assert path.stat().st_size == math.prod(shape) * np.dtype(dtype(state)).itemsize
        return values


def dtype(item: dict[str, Any]) -> str:
    """The numpy name of a data type."""
    name = str(item["data_type"]).removeprefix("TYPE_")
    return DTYPES.get(name, name.lower())
