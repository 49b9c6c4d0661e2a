"""Fourier transforms and complex numbers: spectrograms, filters per frame, complex layers, rotary positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import Entry, Graph, long_clip, randomise


def _spectrum(m: Any, x: Tensor, center: bool = False, size: int = 8) -> Tensor:
    window = torch.hann_window(size)
    return torch.stft(x, size, size // 2, window=window, center=center, return_complex=True)


def _power(m: Any, x: Tensor) -> Tensor:
    return m.out(torch.log(_spectrum(m, x).abs().pow(2) + 1e-2))


def _centred(m: Any, x: Tensor) -> Tensor:
    return m.out(_spectrum(m, x, center=True).abs())


def _of_96_samples(m: Any, x: Tensor) -> Tensor:
    """Longer windows than anybody wants to have written out sample by sample."""
    return m.out(torch.log(_spectrum(m, x, center=True, size=96).abs() + 1e-2))


def _both_parts(m: Any, x: Tensor) -> Tensor:
    z = _spectrum(m, x)
    return m.out(torch.view_as_real(z).sum(-1) + z.imag * z.real)


def _filtered(m: Any, x: Tensor) -> Tensor:
    """A filter per frame, with weights stored as pairs of real numbers."""
    z = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(m.weight)
    return m.out(torch.fft.irfft2(z, s=x.shape[-2:], norm="ortho"))


def _complex_layer(m: Any, x: Tensor) -> Tensor:
    """Complex weights for each frequency, over an odd number of pixels."""
    z = torch.einsum("ncthk,cdk->ndthk", torch.fft.rfft(x[..., :5]), m.weight)
    return m.out(torch.fft.irfft(z, n=5))


def _phase(m: Any, x: Tensor) -> Tensor:
    """Products with conjugates, quotients, angles, a transform that is shifted and turned back."""
    z = torch.fft.fft(x)
    unit = z / (z.abs() + 0.1)
    turned = torch.fft.ifft(torch.fft.fftshift(unit * z.roll(1, 1).conj() - 0.5j * z, dim=-1)).real
    angle = torch.complex(x.abs() + 1, x).angle()
    return m.out(turned + 0.1 * (z / (2 + 1j)).imag + 0.1 * torch.polar(x.exp(), x).real + angle)


def _rotary(m: Any, x: Tensor) -> Tensor:
    n, c, t = x.shape
    z = torch.view_as_complex(x.transpose(1, 2).reshape(n, t, c // 2, 2).contiguous())
    return m.out(torch.view_as_real(z * torch.exp(1j * m.angles)).flatten(2).transpose(1, 2))


def _entry(name: str, forward: Callable[..., Tensor], shape: tuple[int, ...], out: nn.Module, **fields: Any) -> Entry:
    weights = {
        "filtered": torch.randn(4, 3, 2),
        "complex_layer": torch.randn(3, 3, 3, dtype=torch.cfloat) * 0.5,
    }

    def build() -> nn.Module:
        torch.manual_seed(0)
        net = Graph(forward, out=out)
        randomise(net)
        if name in weights:
            net.register_parameter("weight", nn.Parameter(weights[name]))
        net.register_buffer("angles", torch.rand(2))
        return net

    return Entry(name, build, (shape,), reference=long_clip(fields.pop("out_dim", 2)), **fields)


def _conv1d() -> nn.Module:
    return nn.Conv1d(5, 2, 3)


def _conv3d() -> nn.Module:
    return nn.Conv3d(3, 2, 3, padding=1)


_SOUND: dict[str, Any] = {"time_dim": 1}
_VIDEO = (1, 3, 6, 4, 4)
FOURIER = (
    _entry("stft_power", _power, (1, 32), _conv1d(), **_SOUND),
    _entry("stft_centred", _centred, (1, 32), _conv1d(), **_SOUND),
    _entry("stft_of_96_samples", _of_96_samples, (1, 384), nn.Conv1d(49, 2, 3), **_SOUND),
    _entry("stft_both_parts", _both_parts, (1, 32), _conv1d(), **_SOUND),
    _entry("filtered", _filtered, _VIDEO, _conv3d()),
    _entry("complex_layer", _complex_layer, (1, 3, 6, 4, 6), _conv3d()),
    _entry("phase", _phase, _VIDEO, _conv3d()),
    _entry("rotary", _rotary, (1, 4, 8), nn.Conv1d(4, 2, 3, padding=1)),
)
