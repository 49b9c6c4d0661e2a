"""The types of what is handed on everywhere: arrays, and objects that JSON can hold."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
JsonObject: TypeAlias = dict[str, Any]
