"""What the kernels of ONNX Runtime on this machine look like from outside. Needs neither torch nor onnx."""

from __future__ import annotations

import base64
import platform
from functools import cache

import numpy as np
import onnxruntime as ort

from co3d_compile.support.cpu_session import cpu_session
from co3d_compile.support.linux_facts import linux_fact

# An ONNX model of one operator, ReorderInput of the domain com.microsoft.nchwc, from (1, 64, 1, 2) to the same.
_REORDER = base64.b64decode(
    "CAgSADpoCikKAXgSAXkiDFJlb3JkZXJJbnB1dDoTY29tLm1pY3Jvc29mdC5uY2h3YxIBZ1obCgF4EhYKFAgBEhAKAggBCgIIQAoC"
    "CAEKAggCYhsKAXkSFgoUCAESEAoCCAEKAghACgIIAQoCCAJCBAoAEBRCFwoTY29tLm1pY3Jvc29mdC5uY2h3YxAB"
)


@cache
def block_channels() -> int:
    """Counts the channels that the blocked layout of ONNX Runtime's convolutions on the CPU keeps side by side.

    16 with AVX-512, 8 with AVX2; 1 where there is no such layout. (``MlasNchwcGetBlockSize`` in ONNX Runtime's source.)
    """
    plain = np.arange(128, dtype=np.float32).reshape(1, 64, 1, 2)
    (blocked,) = cpu_session(_REORDER, threads=1).run(None, {"x": plain})
    # Side by side are the first pixels of so many channels: 0, 2, 4, ...
    return int((np.cumprod(blocked.ravel()[:64] == np.arange(0, 128, 2))).sum())


def cpu_name() -> str:
    """Names the processor."""
    return linux_fact("cpuinfo", "model name") or platform.processor() or platform.machine()


def kernels() -> str:
    """Names what decides which kernels ONNX Runtime takes: its version and the processor with its extensions."""
    extensions = linux_fact("cpuinfo", "flags") or linux_fact("cpuinfo", "Features") or ""
    facts = [ort.__version__, platform.system(), platform.machine(), cpu_name(), extensions, block_channels()]
    return "; ".join(map(str, facts))
