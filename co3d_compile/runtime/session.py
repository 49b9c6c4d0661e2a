"""Runs a compiled model, one step at a time, with numpy and onnxruntime: imports neither torch nor onnx."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

import numpy as np
import onnxruntime as ort

from co3d_compile.contract.model_contract import Contract, InputSpec, StateSpec, contract_text, resolve
from co3d_compile.contract.weights_digest import check_weights
from co3d_compile.errors import SessionError, UsageError
from co3d_compile.runtime.buffers import (
    CPU,
    Array,
    Buffer,
    Guard,
    Results,
    Scratch,
    check_memory,
    make_rings,
    no_memory,
)
from co3d_compile.runtime.finite_values import CHOICES, Finite, FiniteCheck
from co3d_compile.runtime.open_model import (
    Provider,
    Serializable,
    device_of,
    open_source,
    read_contract,
    read_source,
)
from co3d_compile.runtime.snapshot import pack, unpack
from co3d_compile.runtime.step_profile import Profile
from co3d_compile.support.readable_numbers import plural


class StreamSession:
    """A compiled model and the state of ``batch`` streams that advance together.

    For one thread: a second call while one is running raises SessionError. Give each thread its own session.

    Args:
        model: Path of an ONNX file, its bytes, or a compiled model. A file with external data only by its path.
        batch: Number of streams N.
        providers: onnxruntime execution providers by falling priority, as for ``onnxruntime.InferenceSession``.
            Default: the CPU.
        threads: CPU threads that one step may use. Default: onnxruntime's choice, one per core.
        finite: What to do when a step spoils a stream: NaN in an output, NaN or infinity in a state of unbounded memory
            (a recurrent layer's), which would stay there for good. "ignore": nothing; "reset": put that stream back to
            its start, see ``spoilt``; "raise": raise SessionError, the states are those of before the step.
        profile: A JSON file to write: onnxruntime's profile of the first 100 steps, for ``co3d inspect --profile``.
            It appears with the last of them, or with ``close``.
        check: Whether to compare the weights with the digest in the file's metadata. Needs the package onnx-ir.

    Attributes:
        info: The contract in the file.
        spoilt: With ``finite="reset"``: the streams that the last step has put back, by their index in the batch, each
            with what was not finite. Its results are returned as they are.

    Raises:
        LoadError: The model cannot be read. ContractError: It was not compiled by co3d-compile, or is damaged; with
            ``check`` also that its weights were changed after compiling, or that it does not say what they were.
        UsageError: An unknown provider; a batch or number of threads that makes no sense.
        OutputError: The profile cannot be written.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | bytes | Serializable,
        batch: int = 1,
        providers: Sequence[Provider] | None = None,
        threads: int | None = None,
        profile: str | os.PathLike[str] | None = None,
        finite: Finite = "ignore",
        check: bool = False,
    ) -> None:
        self.batch = _whole("batch", batch, 1)
        if finite not in CHOICES:
            raise UsageError(f"finite is {finite!r}, not one of {', '.join(CHOICES)}.")
        self.spoilt: dict[int, str] = {}
        self._guard = Guard()
        source, self._fingerprint = read_source(model)
        options = ort.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = _whole("threads", threads, 1)
        self._profile = None if profile is None else Profile(profile, options)
        self._ort = open_source(source, providers, options)
        self.info = read_contract(self._ort, self.batch)
        self._check = None if finite == "ignore" else FiniteCheck(self.info, self.batch, raises=finite == "raise")
        if check:
            check_weights(self.info, source)
        device = device_of(self._ort)
        if device == CPU:
            check_memory(self.info, self.batch)
        self._inputs = [(s.name, resolve(s.shape, self.batch), np.dtype(s.dtype)) for s in self.info.inputs]
        if self.info.valid:
            flags = (self.batch, self.info.inputs[0].frames_per_step or 1)
            self._inputs.append((self.info.valid, flags, np.dtype(np.bool_)))
        try:
            self._outputs = [Buffer(resolve(s.shape, self.batch), s.dtype, CPU) for s in self.info.outputs]
            self._results = [Results(buffer) for buffer in self._outputs]
            self._only = self._results[0] if len(self._results) == 1 else None
            self._rings, self._period = make_rings(self.info, self.batch, device)
            self._here = device == CPU
            own = not self._here or self._period > _MAX_KEPT
            self._buffers = [Buffer(shape, dtype, device) for _, shape, dtype in self._inputs] if own else []
        except (MemoryError, ValueError) as error:  # ValueError: beyond the address space
            raise no_memory() from error
        self._scratch = {state.input: Scratch() for state in self.info.states}
        self._fixed = any(state.shape[state.batch_dim] != "N" for state in self.info.states)
        self._phase = 0
        self._bindings = [self._bind(phase) for phase in range(self._period)]
        # The arrays of the step before, and those whose memory each binding reads.
        self._last: Sequence[Array] = [_NOTHING] * len(self._inputs)
        self._bound = [[_NOTHING] * len(self._inputs) for _ in self._bindings]
        self._all_valid = [np.ones(self._inputs[-1][1], np.bool_)] if self.info.valid else []
        self.reset()

    def step(
        self, *frames: Array | Sequence[Array], valid: Array | None = None, streams: Sequence[int] | None = None
    ) -> Array | tuple[Array, ...]:
        """Advance all streams, or some of them, by one step.

        Args:
            frames: One array per model input, in model order, or one tuple or list of them. Shape: that of the ONNX
                input. At one frame per step a time dim of size 1 may be there too. onnxruntime reads them where they
                lie: leave them alone until ``step`` returns. The session may keep a reference to the last ones.
            valid: For ``boundary="exact"``: which frames are there, bool (N, frames_per_step) or (N,). Default: all.
            streams: Indices in the batch of those that advance, in the order of the rows of ``frames``; N is then their
                number. The others stay as they are. Costs a copy of the states of those that advance. Default: all.

        Returns:
            New arrays, the session never writes to them again: a tuple in model order, the array itself if there is
            one output. At one frame per step they have no time dim.

        Raises:
            SessionError: Wrong number of inputs, shape or dtype, or onnxruntime failed. The state stays as it was.
        """
        arrays = frames[0] if len(frames) == 1 and isinstance(frames[0], (tuple, list)) else frames
        turn = self._guard.turn  # as `with self._guard` does, without its two calls
        try:
            turn.pop()
        except IndexError:
            raise self._guard.refusal() from None
        try:
            if streams is None or list(streams) == list(range(self.batch)):
                return self._step(arrays, valid) if self._check is None else self._checked_step(arrays, valid)
            return self._step_some(arrays, valid, self._indices(streams))
        finally:
            turn.append(None)

    def step_one(self, frame: Array, *, valid: Array | None = None, streams: Sequence[int] | None = None) -> Array:
        """Advance a model of one input and one output by one step: ``step`` with one array in and one array out.

        Raises:
            SessionError: As ``step``; or the model has several inputs or outputs.
        """
        inputs, outputs = len(self.info.inputs), len(self.info.outputs)
        if (inputs, outputs) != (1, 1):
            what = f"step_one is for one input and one output; this model has {inputs} and {outputs}."
            raise SessionError(what, hint="Use run({name: frames}), which returns {name: array}.")
        result = self.step(frame, valid=valid, streams=streams)
        return result[0] if isinstance(result, tuple) else result

    def run(
        self, frames: Mapping[str, Array], *, valid: Array | None = None, streams: Sequence[int] | None = None
    ) -> dict[str, Array]:
        """Advance by one step, with inputs and outputs by their names: ``step`` for models of any number of either.

        Raises:
            SessionError: As ``step``; or the names are not those of the inputs.
        """
        names = [spec.name for spec in self.info.inputs]
        if set(frames) != set(names):
            what = f"Got inputs named {', '.join(map(str, frames)) or 'nothing'}."
            raise SessionError(what, hint=f"The model takes {', '.join(names)}.")
        return _by_name(self.info, self.step(*(frames[name] for name in names), valid=valid, streams=streams))

    def flush(self) -> list[Array | tuple[Array, ...]]:
        """The results that are still due when all streams have ended, as ``step`` returns them, oldest first.

        Call ``reset`` before the next stream. Raises SessionError for a model without ``boundary="exact"``.
        """
        if self.info.valid is None:
            raise SessionError("This model has no valid flags to flush with.", hint=_NO_VALID)
        *nothing, none = [np.zeros(shape, dtype) for _, shape, dtype in self._inputs]
        with self._guard:
            return [self._step(nothing, none) for _ in range(self.info.flush_steps)]

    def reset(self, stream: int | None = None) -> None:
        """Put the state back to its start, for all streams or for the one with this index in the batch."""
        index = slice(None) if stream is None else _whole("stream", stream, 0, self.batch - 1)
        with self._guard:
            self._begin(index)

    def get_state(self) -> dict[str, Array]:
        """A copy of the state: {name of the state input: array}."""
        with self._guard:
            return {state.input: buffer.read() for state, buffer in self._current()}

    def set_state(self, values: Mapping[str, Array]) -> None:
        """Put back what ``get_state`` returned. Raises SessionError, and changes nothing, if any of it does not fit."""
        odd = sorted(map(str, {state.input for state in self.info.states} ^ set(values)))
        if odd:
            hint = "Give all that get_state() returns, and no others."
            raise SessionError(f"These are not the states of this model: {', '.join(odd[:5])}.", hint=hint)
        with self._guard:
            for state, buffer in self._current():
                _checked("State", state.input, values[state.input], buffer.shape, buffer.dtype)
            for state, buffer in self._current():
                buffer.write(values[state.input])
            if self._check is not None:
                self._check.begin(slice(None), warm=True)

    def snapshot(self, stream: int | None = None) -> bytes:
        """The state as bytes, for ``restore`` in any process that has the same model.

        Of all streams, for a session of the same batch. Of the one with this index, for a place in any session: it is
        what a session of batch 1 gives.
        """
        index, count = self._part(stream)
        with self._guard:
            parts = [buffer.take(index, state.batch_dim, Scratch()).tobytes() for state, buffer in self._current()]
        return pack(self._fingerprint, count, parts)

    def restore(self, blob: bytes, stream: int | None = None) -> None:
        """Put back a snapshot: of all streams, or a snapshot of one as the one with this index.

        Raises SessionError, and changes nothing, if it is damaged, of another model or of another number of streams.
        """
        index, count = self._part(stream)
        with self._guard:
            current = self._current()
            shapes = [resolve(state.shape, count) for state, _ in current]
            sizes = [math.prod(shape) * b.dtype.itemsize for shape, (_, b) in zip(shapes, current, strict=True)]
            states = unpack(blob, self._fingerprint, count, sum(sizes))
            for (state, buffer), shape, size in zip(current, shapes, sizes, strict=True):
                buffer.put(np.frombuffer(states[:size], buffer.dtype).reshape(shape), index, state.batch_dim)
                states = states[size:]
            if self._check is not None:
                self._check.begin(index, warm=True)

    def close(self) -> None:
        """Free the model and the state. Every later call raises SessionError."""
        with self._guard:
            if self._profile is not None:
                self._profile.finish(self._ort)
            self._guard.closed = True
            self._bindings, self._bound, self._last, self._rings, self._buffers = [], [], [], [], []
            self._outputs, self._results, self._only = [], [], None
            del self._ort

    def __repr__(self) -> str:
        streams = "closed" if self._guard.closed else plural(self.batch, "stream")
        return f"<StreamSession: {streams}; {contract_text(self.info)}>"

    def __enter__(self) -> StreamSession:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._guard.closed:
            self.close()

    def _step(self, frames: Sequence[Any], valid: Array | None) -> Array | tuple[Array, ...]:
        # The caches are cold behind a run: what is called first costs 10 to 30 microseconds. So little is called here.
        binding, bound = self._bindings[self._phase], self._bound[self._phase]
        arrays = [*frames, *self._all_valid] if self._all_valid else frames
        if valid is not None or len(arrays) != len(bound):
            self._take(self._checked_inputs(frames, valid, self.batch), binding, bound)
        elif arrays[0] is not bound[0] or (len(bound) > 1 and not all(map(is_, arrays, bound))):
            fit = True
            for array, (_, shape, dtype) in zip(arrays, self._inputs, strict=True):
                fit = fit and type(array) is np.ndarray and array.shape == shape and array.dtype is dtype
            self._take(arrays if fit else self._checked_inputs(frames, valid, self.batch), binding, bound)
        try:
            self._ort.run_with_iobinding(binding)
        except Exception as error:
            raise _ort_failed(error) from error
        self._phase = (self._phase + 1) % self._period
        if self._profile is not None:
            self._profile.stepped(self._ort)
        return self._only.new() if self._only is not None else tuple([result.new() for result in self._results])

    def _checked_step(self, frames: Sequence[Any], valid: Array | None) -> Array | tuple[Array, ...]:
        """A step whose values are looked at. No state of before it is overwritten: to go back is to count back."""
        assert self._check is not None
        results = self._step(frames, valid)
        outputs = _by_name(self.info, results)
        now = {state.input: buffer.read() for state, buffer in self._current() if state.input in self._check.states}
        try:
            self._restart(self._check.spoilt(outputs, now, slice(None)))
        except SessionError:
            self._phase = (self._phase - 1) % self._period
            raise
        return results

    def _restart(self, spoilt: dict[int, str]) -> None:
        """Put streams back to their start, and remember why."""
        self.spoilt = spoilt
        for stream in spoilt:
            self._begin(stream)

    def _begin(self, index: int | slice) -> None:
        for state, buffer in self._current():
            buffer.put(state.initial, index, state.batch_dim)
        if self._check is not None:
            self._check.begin(index)

    def _take(self, arrays: Sequence[Array], binding: ort.IOBinding, bound: list[Array]) -> None:
        """Have onnxruntime read these arrays where they lie, or copies of them in the session's own memory.

        What it reads where it lies is remembered: the next frame in the same array needs no binding.
        """
        for i, (array, (name, _, _)) in enumerate(zip(arrays, self._inputs, strict=True)):
            before, bound[i] = bound[i], _NOTHING
            # Flags take time, so only what comes again is asked; of what is not even onnxruntime takes a copy.
            again = self._here and array is self._last[i] and array.flags.c_contiguous and array.flags.aligned
            if again or not self._buffers:
                binding.bind_cpu_input(name, array)
                bound[i] = array if again else _NOTHING
            else:
                self._buffers[i].write(array)
                if before is not _NOTHING:
                    binding.bind_ortvalue_input(name, self._buffers[i].value)
        self._last = list(arrays)  # a list may be the caller's own, who puts the next frames into it

    def _step_some(
        self, frames: Sequence[object], valid: Array | None, index: slice | Array
    ) -> Array | tuple[Array, ...]:
        """A step of the streams at ``index``: their states are gathered, and what comes out is put back."""
        count = index.stop - index.start if isinstance(index, slice) else len(index)
        arrays = self._checked_inputs(frames, valid, count)
        values = {name: array for (name, _, _), array in zip(self._inputs, arrays, strict=True)}
        current = self._current()
        for state, buffer in current:
            values[state.input] = buffer.take(index, state.batch_dim, self._scratch[state.input])
        outputs = [output.name for output in self.info.outputs]
        names = outputs + [chain[0].output for chain, _ in self._rings]
        try:
            values |= zip(names, self._ort.run(names, values), strict=True)
        except Exception as error:
            raise _ort_failed(error) from error
        if self._profile is not None:
            self._profile.stepped(self._ort)
        spoilt: dict[int, str] = {}
        if self._check is not None:
            states = {state.input: values[state.output] for chain, _ in self._rings for state in chain}
            spoilt = self._check.spoilt(values, states, index)
        buffers = {state.input: buffer for state, buffer in current}
        for chain, _ in self._rings:
            for state in reversed(chain):  # the oldest first: what it takes may be the next one's own memory
                buffers[state.input].put(values[state.output], index, state.batch_dim)
        self._restart(spoilt)
        results = [values[name] for name in outputs]
        return results[0] if len(results) == 1 else tuple(results)

    def _checked_inputs(self, frames: Sequence[object], valid: Array | None, count: int) -> list[Array]:
        """What the model takes beside the states, for ``count`` streams."""
        specs = self.info.inputs
        if len(frames) != len(specs):
            names = ", ".join(spec.name for spec in specs)
            raise SessionError(f"Got {len(frames)} inputs, expected {len(specs)}.", hint=f"In this order: {names}.")
        arrays = [_frames(spec, frame, resolve(spec.shape, count)) for spec, frame in zip(specs, frames, strict=True)]
        if self.info.valid is None:
            if valid is not None:
                raise SessionError("This model takes no valid flags.", hint=_NO_VALID)
            return arrays
        _, (_, *rest), dtype = self._inputs[-1]
        shape = (count, *rest)
        if valid is None:
            return [*arrays, *(self._all_valid if count == self.batch else [np.ones(shape, np.bool_)])]
        if isinstance(valid, np.ndarray) and valid.shape == (count,):
            valid = np.broadcast_to(valid[:, None], shape)
        return [*arrays, _checked("Input", "valid", valid, shape, dtype)]

    def _indices(self, streams: Sequence[int]) -> slice | Array:
        """Places in the batch; as a slice where they follow one another, as those need no gathering."""
        places = [_whole("stream", stream, 0, self.batch - 1) for stream in streams]
        if not places or len(set(places)) < len(places):
            raise UsageError(f"streams is {list(streams)!r}.", hint="Give one or more, each once.")
        if self._fixed and len(places) < self.batch:
            raise UsageError(f"The model was compiled for a batch of {self.batch}: all its streams advance together.")
        if places == list(range(places[0], places[0] + len(places))):
            return slice(places[0], places[0] + len(places))
        return np.array(places)

    def _part(self, stream: int | None) -> tuple[slice, int]:
        """Where one stream or all lie in the batch, and how many that are."""
        first = 0 if stream is None else _whole("stream", stream, 0, self.batch - 1)
        count = self.batch if stream is None else 1
        return slice(first, first + count), count

    def _current(self) -> list[tuple[StateSpec, Buffer]]:
        """Every state with the buffer that the next step reads it from, in the order of the metadata."""
        place = {
            state.input: ring[(self._phase - 1 - age) % len(ring)]
            for chain, ring in self._rings
            for age, state in enumerate(chain)
        }
        return [(state, place[state.input]) for state in self.info.states]

    def _bind(self, phase: int) -> ort.IOBinding:
        """Bind all buffers as they lie at this phase.

        At each step a ring's output goes into the buffer after the newest state's, and every state of the chain is
        read one buffer further on: values move by a slot, no value is copied.
        """
        binding = self._ort.io_binding()
        for (name, _, _), buffer in zip(self._inputs, self._buffers, strict=False):
            binding.bind_ortvalue_input(name, buffer.value)
        for output, buffer in zip(self.info.outputs, self._outputs, strict=True):
            binding.bind_ortvalue_output(output.name, buffer.value)
        for chain, ring in self._rings:
            binding.bind_ortvalue_output(chain[0].output, ring[phase % len(ring)].value)
            for age, state in enumerate(chain):
                binding.bind_ortvalue_input(state.input, ring[(phase - 1 - age) % len(ring)].value)
        return binding


# Memory of these providers' device is bound as it is; the others take and give host memory.
_DEVICES = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda"}
_MAX_KEPT = 16  # bindings that each hold on to a frame; more take copies, but of frames that come in one array
_NOTHING: Array = np.empty(0)  # an array that nobody else has
_NO_VALID = 'Compile it with boundary="exact".'


def _whole(name: str, value: int, least: int, most: float = math.inf) -> int:
    if isinstance(value, (int, np.integer)) and least <= value <= most:
        return int(value)
    top = f" to {most}" if most < math.inf else ""
    raise UsageError(f"{name} is {value!r}.", hint=f"It must be a whole number from {least}{top}.")


def _frames(spec: InputSpec, frame: object, shape: tuple[int, ...]) -> Array:
    """The array for the ONNX input: without the time dim at one frame per step."""
    if isinstance(frame, np.ndarray) and spec.frames_per_step == 1 and frame.ndim == len(shape) + 1:
        dim = spec.time_dim
        frame = frame.squeeze(dim) if dim is not None and frame.shape[dim] == 1 else frame
    return _checked("Input", spec.name, frame, shape, np.dtype(spec.dtype))


def _checked(what: str, name: str, array: object, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """The array itself, if it has this shape and dtype."""
    if not isinstance(array, np.ndarray):
        problem, hint = f"is a {type(array).__name__}, expected a numpy array", "Convert it with numpy.asarray(...)."
    elif array.dtype != dtype:
        problem = f"has dtype {array.dtype}, expected {dtype}"
        hint = f"Convert it with .astype('{dtype}'), frames with the scale and mean of the training."
    elif array.shape != shape:
        problem = f"has shape {array.shape}, expected {shape}"
        hint = "A step takes one row for each stream that advances."
    else:
        return array
    raise SessionError(f"{what} '{name}' {problem}.", hint=hint)


def _by_name(info: Contract, results: Array | tuple[Array, ...]) -> dict[str, Array]:
    """What ``step`` returns, by the names of the outputs."""
    values = results if isinstance(results, tuple) else (results,)
    return {spec.name: value for spec, value in zip(info.outputs, values, strict=True)}


def _ort_failed(error: Exception) -> SessionError:
    return SessionError(f"onnxruntime failed: {error}", hint="The state is that of before the step.")
