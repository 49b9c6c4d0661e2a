"""Fourier transforms. In ONNX a complex tensor has a last dim of two, a real one a last dim of one."""

from __future__ import annotations

import torch
from torch import Tensor

from co3d_compile.capture.onnx_reader.node_call import NodeCall, Value, reads, whole_numbers


@reads("DFT", host=(1, 2))
def dft(call: NodeCall, x: Tensor, length: Value = None, axis: Value = None) -> Tensor:
    """Computes the transform over one dim, or its inverse; of ``onesided`` results one half stands for both."""
    dim = whole_numbers(axis)[0] if axis is not None else call.integer("axis", 1 if call.opset < 20 else -2)
    dim, size = dim % x.dim(), None if length is None else whole_numbers(length)[0]
    onesided = bool(call.integer("onesided", 0))
    if call.integer("inverse", 0):
        signal = _numbers(x)
        if onesided:
            return torch.fft.irfft(signal, size, dim).unsqueeze(-1)
        return torch.view_as_real(torch.fft.ifft(signal, size, dim))
    return torch.view_as_real(_forward(call, _numbers(x), size, dim, onesided))


@reads("STFT", host=(1, 3))
def stft(call: NodeCall, x: Tensor, step: Value, window: Tensor | None = None, length: Value = None) -> Tensor:
    """Computes the transform of each frame of a signal: (N, samples[, 1 or 2]) to (N, frames, frequencies, 2)."""
    x = x.unsqueeze(-1) if x.dim() == 2 else x  # so ONNX Runtime takes it, too
    size = whole_numbers(length)[0] if length is not None else x.shape[1] if window is None else window.shape[0]
    onesided = bool(call.integer("onesided", 1))
    if onesided and x.shape[-1] == 2:
        raise call.refuse("gives one half of a spectrum that has two: its signal is complex")
    hop, window = whole_numbers(step)[0], x.new_ones(size) if window is None else window
    signal = _numbers(x)
    found = torch.stft(signal, size, hop, window=window, center=False, onesided=onesided, return_complex=True)
    return torch.view_as_real(found.transpose(1, 2))


def _forward(call: NodeCall, signal: Tensor, size: int | None, dim: int, onesided: bool) -> Tensor:
    if not onesided:
        return torch.fft.fft(signal, size, dim)
    if signal.is_complex():
        raise call.refuse("gives one half of a spectrum that has two: its signal is complex")
    return torch.fft.rfft(signal, size, dim)


def _numbers(x: Tensor) -> Tensor:
    """Makes a tensor of real or of complex numbers."""
    return x.squeeze(-1) if x.shape[-1] == 1 else torch.view_as_complex(x.contiguous())
