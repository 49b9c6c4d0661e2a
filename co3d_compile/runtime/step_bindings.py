"""What onnxruntime reads and writes in a step, bound once: frames where they lie, results, states as they move on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort

from co3d_compile.contract.model_contract import Contract, resolve
from co3d_compile.runtime.buffers import CPU, Buffer, Results
from co3d_compile.runtime.checked_arrays import StepInputs
from co3d_compile.runtime.states import States
from co3d_compile.support.plain_types import Array

MAX_KEPT = 16  # bindings that each hold on to a frame; more take copies, but of frames that come in one array
NOTHING: Array = np.empty(0)  # an array that nobody else has
NO_GRAPH = -1  # onnxruntime's number for a run that is neither captured nor played back


class StepBindings:
    """One binding for each place in which the states can lie, and the memory of inputs and results.

    Attributes:
        each: The bindings, by the phase of the states.
        bound: For each binding the arrays whose memory it reads.
        results: One for each output, in model order.
        run_options: For each binding what onnxruntime runs it with: as a CUDA graph of its own, where the provider asks
            for these (``enable_cuda_graph``). A graph reads and writes the addresses that it was captured with.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        info: Contract,
        inputs: StepInputs,
        states: States,
        batch: int,
        device: tuple[str, int],
    ) -> None:
        self._names = [name for name, _, _ in inputs.tensors]
        graphs = captures_graphs(session)
        self._outputs = [Buffer(resolve(s.shape, batch), s.dtype, device if graphs else CPU) for s in info.outputs]
        self.results = [Results(buffer) for buffer in self._outputs]
        self._here = device == CPU and not graphs
        own = not self._here or states.period > MAX_KEPT
        self._buffers = [Buffer(shape, dtype, device) for _, shape, dtype in inputs.tensors] if own else []
        self.each = [self._bind(session, info, states, phase) for phase in range(states.period)]
        self.run_options = [graph_options(phase) if graphs else None for phase in range(states.period)]
        self.bound = [[NOTHING] * len(self._names) for _ in self.each]
        self._last: Sequence[Array] = [NOTHING] * len(self._names)  # the arrays of the step before

    def take(self, arrays: Sequence[Array], binding: ort.IOBinding, bound: list[Array]) -> None:
        """Lets onnxruntime read these arrays where they lie, or copies of them in the session's own memory.

        What it reads where it lies is remembered: the next frame in the same array needs no binding.
        """
        for i, (array, name) in enumerate(zip(arrays, self._names, strict=True)):
            before, bound[i] = bound[i], NOTHING
            # Flags take time, so only what comes again is asked; of what is not even onnxruntime takes a copy.
            again = self._here and array is self._last[i] and array.flags.c_contiguous and array.flags.aligned
            if again or not self._buffers:
                binding.bind_cpu_input(name, array)
                bound[i] = array if again else NOTHING
            else:
                self._buffers[i].write(array)
                if before is not NOTHING:
                    binding.bind_ortvalue_input(name, self._buffers[i].value)
        self._last = list(arrays)  # a list may be the caller's own, who puts the next frames into it

    def _bind(self, session: ort.InferenceSession, info: Contract, states: States, phase: int) -> ort.IOBinding:
        """Binds all buffers as they lie at this phase."""
        binding = session.io_binding()
        for name, buffer in zip(self._names, self._buffers, strict=False):
            binding.bind_ortvalue_input(name, buffer.value)
        for output, buffer in zip(info.outputs, self._outputs, strict=True):
            binding.bind_ortvalue_output(output.name, buffer.value)
        for name, buffer in states.written(phase):
            binding.bind_ortvalue_output(name, buffer.value)
        for name, buffer in states.read(phase):
            binding.bind_ortvalue_input(name, buffer.value)
        return binding


def captures_graphs(session: ort.InferenceSession) -> bool:
    """Says whether a provider of this session captures the step as a CUDA graph and plays that back."""
    return any(str(each.get("enable_cuda_graph", "0")) == "1" for each in session.get_provider_options().values())


def graph_options(graph: int) -> ort.RunOptions:
    """Makes the options of a run that is the graph of this number; -1: of one that is no graph."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    return options
