"""What PyTorch prints while it tries something goes to the log: a failure is caught, and told in one line."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

log = logging.getLogger(__name__)
# A whole graph, or a traceback of a hundred lines, at each attempt that fails; lines on packages that are not there.
LOGGERS = (
    "torch.fx.experimental.symbolic_shapes",
    "torch._export.non_strict_utils",
    "torch._subclasses.fake_tensor",
    "torch.onnx._internal.exporter._registration",
)

# A tensor that a module keeps for itself (recurrent layers, weight norm) is made anew by every call.
MADE_ANEW = "The tensor attributes? "


@contextlib.contextmanager
def without_torch_logs() -> Iterator[None]:
    """Keeps PyTorch's loggers from printing what is tried, and may fail."""
    with contextlib.ExitStack() as stack:
        for name in LOGGERS:
            logger = logging.getLogger(name)
            stack.callback(setattr, logger, "disabled", logger.disabled)
            logger.disabled = True
        yield


@contextlib.contextmanager
def quiet(stdout: bool = False) -> Iterator[None]:
    """Keeps stderr empty, and stdout where it is PyTorch alone that prints: a model may print in forward."""
    said = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: log.debug("said:\n%s", said.getvalue().strip()) if said.getvalue().strip() else None)
        stack.enter_context(without_torch_logs())
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", MADE_ANEW, UserWarning)
        stack.enter_context(contextlib.redirect_stderr(said))
        if stdout:
            stack.enter_context(contextlib.redirect_stdout(said))
        yield
