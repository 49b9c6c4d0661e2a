"""Runs a compiled model, one step at a time, with numpy and onnxruntime: imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

import numpy as np

from co3d_compile.contract.model_contract import Contract, contract_text
from co3d_compile.contract.weights_digest import check_weights
from co3d_compile.errors import SessionError, UsageError
from co3d_compile.native.running_form import RunningForm
from co3d_compile.runtime.buffers import CPU, Guard, Results, check_memory, no_memory
from co3d_compile.runtime.checked_arrays import NO_VALID, StepInputs, checked_array, expected, whole_number
from co3d_compile.runtime.finite_values import CHOICES, Finite, FiniteCheck
from co3d_compile.runtime.open_model import Provider, Serializable, device_of, read_source, session_options
from co3d_compile.runtime.row_states import RowStates
from co3d_compile.runtime.running_model import Layout, Opener
from co3d_compile.runtime.snapshot import pack, unpack
from co3d_compile.runtime.states import States
from co3d_compile.runtime.step_bindings import NO_GRAPH, StepBindings, graph_options
from co3d_compile.runtime.step_profile import Profile
from co3d_compile.runtime.stream_lengths import StreamLengths
from co3d_compile.support.plain_types import Array
from co3d_compile.support.readable_numbers import plural


class StreamSession:
    """A compiled model and the state of ``batch`` streams that advance together.

    For one thread: a second call while one is running raises SessionError. Give each thread its own session.

    Args:
        model: Path of an ONNX file, its bytes, or a compiled model. A file with external data only by its path.
        batch: Number of streams N.
        providers: onnxruntime execution providers by falling priority, as for ``onnxruntime.InferenceSession``.
            Default: the CPU. With ``enable_cuda_graph`` in the options of CUDA's, steps run as CUDA graphs.
        threads: CPU threads that one step may use. Default: onnxruntime's choice, one per core.
        finite: What to do when a step spoils a stream: NaN in an output, NaN or infinity in a state of unbounded memory
            (a recurrent layer's), which would stay there for good. "ignore": nothing; "reset": put that stream back to
            its start, see ``spoilt``; "raise": raise SessionError, the states are those of before the step.
        profile: A JSON file to write: onnxruntime's profile of the first 100 steps, for ``co3d inspect --profile``.
            It appears with the last of them, or with ``close``.
        check: Whether to compare the weights with the digest in the file's metadata. Needs the package onnx-ir.
        layout: "auto": the model runs in the layout of this machine's kernels where that is faster, on the CPU. It is
            converted when it is first opened here, which takes some seconds, and kept (docs/performance.md). States
            and snapshots are those of the given file all the same. "plain": the file runs as it is.

    Attributes:
        info: The contract in the file.
        layout: "native" or "plain": which of the two runs.
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
        layout: Layout = "auto",
    ) -> None:
        self.batch = whole_number("batch", batch, 1)
        if finite not in CHOICES:
            raise UsageError(f"finite is {finite!r}, not one of {', '.join(CHOICES)}.")
        self.spoilt: dict[int, str] = {}
        self._guard = Guard()
        source, self._fingerprint = read_source(model)
        options = session_options(None if threads is None else whole_number("threads", threads, 1))
        self._profile = None if profile is None else Profile(profile, options)
        running = Opener(source, self._fingerprint, providers, options, self.batch, layout).open()
        self._ort, self.info, self.layout = running.ort, running.info, running.layout
        self._check = None if finite == "ignore" else FiniteCheck(self.info, self.batch, raises=finite == "raise")
        if check:
            check_weights(self.info, source)
        device = device_of(self._ort)
        if device == CPU:
            check_memory(running.form.contract, self.batch)
        self._inputs = StepInputs(self.info, self.batch)
        self._lengths = StreamLengths(self.info) if self.info.lengths else None
        self._only: Results | None = None
        self._rows = self.info.free_rows is not None
        if self._rows:
            self._states: States = RowStates(self.info)
        else:
            self._bind(running.form, device)
        self._fixed = any(state.shape[state.batch_dim] != "N" for state in self.info.states)
        self.reset()

    def _bind(self, form: RunningForm, device: tuple[str, int]) -> None:
        """Makes the memory of the states and results, and has onnxruntime read and write there."""
        try:
            self._states = States(self.info, form, self.batch, device)
            self._bindings = StepBindings(self._ort, self.info, self._inputs, self._states, self.batch, device)
        except (MemoryError, ValueError) as error:  # ValueError: beyond the address space
            raise no_memory() from error
        self._only = self._bindings.results[0] if len(self._bindings.results) == 1 else None

    def step(
        self, *frames: Array | Sequence[Array], valid: Array | None = None, streams: Sequence[int] | None = None
    ) -> Array | tuple[Array, ...]:
        """Advances all streams, or some of them, by one step.

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
            SessionError: Wrong number of inputs, shape or dtype; a stream ends that is too short for exact ends; or
                onnxruntime failed. The state stays as it was.
        """
        arrays = frames[0] if len(frames) == 1 and isinstance(frames[0], (tuple, list)) else frames
        turn = self._guard.turn  # as `with self._guard` does, without its two calls
        try:
            turn.pop()
        except IndexError:
            raise self._guard.refusal() from None
        try:
            if not self._rows and (streams is None or list(streams) == list(range(self.batch))):
                return self._step(arrays, valid) if self._check is None else self._checked_step(arrays, valid)
            return self._step_some(arrays, valid, self._indices([0] if streams is None else streams))
        finally:
            turn.append(None)

    def step_one(self, frame: Array, *, valid: Array | None = None, streams: Sequence[int] | None = None) -> Array:
        """Advances a model of one input and one output by one step: ``step`` with one array in and one array out.

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
        """Advances by one step, with inputs and outputs by their names: ``step`` for models of any number of either.

        Raises:
            SessionError: As ``step``; or the names are not those of the inputs.
        """
        names = [spec.name for spec in self.info.inputs]
        if set(frames) != set(names):
            what = f"Got inputs named {', '.join(map(str, frames)) or 'nothing'}."
            raise SessionError(what, hint=f"The model takes {', '.join(names)}.")
        return _by_name(self.info, self.step(*(frames[name] for name in names), valid=valid, streams=streams))

    def flush(self) -> list[Array | tuple[Array, ...]]:
        """Gives the results that are still due when all streams have ended, as ``step`` returns them, oldest first.

        Call ``reset`` before the next stream. Raises SessionError for a model without ``boundary="exact"``, and for a
        stream of a length at which its ends are not exact.
        """
        if self.info.valid is None:
            raise SessionError("This model has no valid flags to flush with.", hint=NO_VALID)
        *nothing, none = [np.zeros(shape, dtype) for _, shape, dtype in self._inputs.tensors]
        with self._guard:
            if self._lengths is not None:  # also where no result is due any more
                self._lengths.check(none, self._states.values(self.info.counters))
            return [self._step(nothing, none) for _ in range(self.info.flush_steps)]

    def reset(self, stream: int | None = None) -> None:
        """Puts the state back to its start, for all streams or for the one with this index in the batch."""
        index = slice(None) if stream is None else whole_number("stream", stream, 0, self.batch - 1)
        with self._guard:
            self._begin(index)

    def get_state(self) -> dict[str, Array]:
        """Copies the state: {name of the state input: array}."""
        with self._guard:
            return self._states.values()

    def set_state(self, values: Mapping[str, Array]) -> None:
        """Puts back what ``get_state`` returned. Raises SessionError, and changes nothing, if a value does not fit."""
        odd = sorted(map(str, {state.input for state in self.info.states} ^ set(values)))
        if odd:
            hint = "Give all that get_state() returns, and no others."
            raise SessionError(f"These are not the states of this model: {', '.join(odd[:5])}.", hint=hint)
        with self._guard:
            for state in self.info.states:
                shape, dtype = expected(state.shape, self.batch), np.dtype(state.dtype)
                checked_array("State", state.input, values[state.input], shape, dtype)
            self._states.write(values)
            if self._check is not None:
                self._check.begin(slice(None), warm=True)

    def snapshot(self, stream: int | None = None) -> bytes:
        """Packs the state into bytes, for ``restore`` in any process that has the same model.

        Of all streams, for a session of the same batch. Of the one with this index, for a place in any session: it is
        what a session of batch 1 gives.
        """
        index, count = self._part(stream)
        with self._guard:
            return pack(self._fingerprint, count, self._states.packed(index))

    def restore(self, blob: bytes, stream: int | None = None) -> None:
        """Puts back a snapshot: of all streams, or the snapshot of one stream as the stream with this index.

        Raises SessionError, and changes nothing, if it is damaged, of another model or of another number of streams.
        """
        index, count = self._part(stream)
        with self._guard:
            self._states.unpack(unpack(blob, self._fingerprint, count, self._states.size(count)), index)
            if self._check is not None:
                self._check.begin(index, warm=True)

    def close(self) -> None:
        """Frees the model and the state. Every later call raises SessionError."""
        with self._guard:
            if self._profile is not None:
                self._profile.finish(self._ort)
            self._guard.closed = True
            self._only = None
            for name in ("_bindings", "_states", "_ort"):
                self.__dict__.pop(name, None)

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
        states, bindings = self._states, self._bindings
        binding, bound = bindings.each[states.phase], bindings.bound[states.phase]
        arrays = [*frames, *self._inputs.all_valid] if self._inputs.all_valid else frames
        if valid is not None or len(arrays) != len(bound):
            checked = self._inputs.checked(frames, valid, self.batch)
            if self._lengths is not None:
                self._lengths.check(checked[-1], self._states.values(self.info.counters))
            bindings.take(checked, binding, bound)
        elif arrays[0] is not bound[0] or (len(bound) > 1 and not all(map(is_, arrays, bound))):
            fit = True
            for array, (_, shape, dtype) in zip(arrays, self._inputs.tensors, strict=True):
                fit = fit and type(array) is np.ndarray and array.shape == shape and array.dtype is dtype
            bindings.take(arrays if fit else self._inputs.checked(frames, valid, self.batch), binding, bound)
        try:
            self._ort.run_with_iobinding(binding, bindings.run_options[states.phase])
        except Exception as error:
            raise _ort_failed(error) from error
        states.phase = (states.phase + 1) % states.period
        if self._profile is not None:
            self._profile.stepped(self._ort)
        return self._only.new() if self._only is not None else tuple([result.new() for result in bindings.results])

    def _checked_step(self, frames: Sequence[Any], valid: Array | None) -> Array | tuple[Array, ...]:
        """Runs a step whose values are looked at. No state of before it is overwritten: to go back is to count back."""
        assert self._check is not None
        results = self._step(frames, valid)
        outputs = _by_name(self.info, results)
        states = self._states
        try:
            self._restart(self._check.spoilt(outputs, states.values(self._check.states), slice(None)))
        except SessionError:
            states.phase = (states.phase - 1) % states.period
            raise
        return results

    def _restart(self, spoilt: dict[int, str]) -> None:
        """Puts streams back to their start, and remembers why."""
        self.spoilt = spoilt
        for stream in spoilt:
            self._begin(stream)

    def _begin(self, index: int | slice) -> None:
        self._states.begin(index)
        if self._check is not None:
            self._check.begin(index)

    def _step_some(
        self, frames: Sequence[object], valid: Array | None, index: slice | Array
    ) -> Array | tuple[Array, ...]:
        """Runs a step of the streams at ``index``: their states are gathered, and what comes out is put back."""
        count = index.stop - index.start if isinstance(index, slice) else len(index)
        arrays = self._inputs.checked(frames, valid, count)
        values = {name: array for (name, _, _), array in zip(self._inputs.tensors, arrays, strict=True)}
        values |= self._states.gathered(index)
        if self._lengths is not None:
            self._lengths.check(arrays[-1], values, range(self.batch)[index] if isinstance(index, slice) else index)
        outputs = [output.name for output in self.info.outputs]
        names = outputs + self._states.outputs()
        try:
            values |= zip(names, self._ort.run(names, values, graph_options(NO_GRAPH)), strict=True)
        except Exception as error:
            raise _ort_failed(error) from error
        if self._profile is not None:
            self._profile.stepped(self._ort)
        spoilt: dict[int, str] = {}
        if self._check is not None:
            spoilt = self._check.spoilt(values, self._states.next_values(values), index)
        self._states.scatter(values, index)
        self._restart(spoilt)
        results = [values[name] for name in outputs]
        return results[0] if len(results) == 1 else tuple(results)

    def _indices(self, streams: Sequence[int]) -> slice | Array:
        """Finds the places in the batch; as a slice where they follow one another, as those need no gathering."""
        places = [whole_number("stream", stream, 0, self.batch - 1) for stream in streams]
        if not places or len(set(places)) < len(places):
            raise UsageError(f"streams is {list(streams)!r}.", hint="Give one or more, each once.")
        if self._fixed and len(places) < self.batch:
            raise UsageError(f"The model was compiled for a batch of {self.batch}: all its streams advance together.")
        if places == list(range(places[0], places[0] + len(places))):
            return slice(places[0], places[0] + len(places))
        return np.array(places)

    def _part(self, stream: int | None) -> tuple[slice, int]:
        """Finds where one stream or all lie in the batch, and how many that are."""
        first = 0 if stream is None else whole_number("stream", stream, 0, self.batch - 1)
        count = self.batch if stream is None else 1
        return slice(first, first + count), count


def _by_name(info: Contract, results: Array | tuple[Array, ...]) -> dict[str, Array]:
    """Names what ``step`` returns as the outputs are named."""
    values = results if isinstance(results, tuple) else (results,)
    return {spec.name: value for spec, value in zip(info.outputs, values, strict=True)}


def _ort_failed(error: Exception) -> SessionError:
    return SessionError(f"onnxruntime failed: {error}", hint="The state is that of before the step.")
